"""Read the headers of a tar archive, strictly and within bounds.

Python's own reader takes a corrupted header for the end of the archive, follows a negative size
backwards, reads a long name of any length into memory, and builds the map of a sparse file, which
can take minutes for a file of some kilobytes. Here every header is at most some megabytes, and
nothing in it is followed.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK = tarfile.BLOCKSIZE
EXTENDED_BYTES = 1 << 20  # of a long name, or of pax records
EXTENDED_HEADERS = 16  # before one member
SPARSE_BLOCKS = 4096  # in which old GNU tars continue the map of a sparse file
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_WITHOUT_DATA = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE),
    *(tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
)


class TarError(Exception):
    """What is wrong with a tar archive."""


class TarFile(Protocol):
    """What the headers are read from."""

    def read(self, size: int, /) -> bytes: ...

    def seek(self, position: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class TarMember:
    """One member: its name as stored, and where its content is."""

    name: str
    offset: int
    size: int
    is_file: bool  # with its content at that place: no link, no device, no sparse file
    is_folder: bool
    is_link: bool


def tar_headers(file: TarFile) -> Iterator[TarMember]:
    """Yield the members of a tar archive, which begins where `file` does.

    A caller may read a member's content from `file` before it asks for the next one. At the end
    `file` stands behind the first block of zeros.

    Raises
    ------
    TarError
        A header is corrupted, or too large, or the archive ends early.
    """
    position = 0
    shared: dict[bytes, bytes] = {}  # pax records for all members that follow
    while True:
        own: dict[bytes, bytes] = {}
        long_name: bytes | None = None
        for _ in range(EXTENDED_HEADERS):
            file.seek(position)
            block = _exactly(file, BLOCK)
            header = _header(block)
            if header is None:
                if own or long_name is not None:
                    raise TarError("a corrupted header")
                return
            position += BLOCK
            if header.type not in (*_LONG_NAMES, *_PAX):
                break
            if header.size > EXTENDED_BYTES:
                raise TarError("a corrupted header")
            content = _exactly(file, _padded(header.size))[: header.size]
            position += _padded(header.size)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.partition(b"\0")[0]
            elif header.type in _PAX:
                (shared if header.type == tarfile.XGLTYPE else own).update(_pax_records(content))
        else:
            raise TarError("a corrupted header (too many before one member)")
        records = {**shared, **own}
        is_sparse = header.type == tarfile.GNUTYPE_SPARSE
        if is_sparse:
            position += _sparse_map_bytes(file, block[482] != 0)
        size = header.size
        if b"size" in records:
            size = _number(records[b"size"])
        member = _member(header, records, long_name, position, size, is_sparse)
        yield member
        if header.type not in _WITHOUT_DATA:
            position += _padded(size)


def _member(
    header: tarfile.TarInfo,
    records: dict[bytes, bytes],
    long_name: bytes | None,
    offset: int,
    size: int,
    is_sparse: bool,
) -> TarMember:
    name = records.get(b"path", long_name)
    name = records.get(b"GNU.sparse.name", name)
    text = header.name if name is None else name.decode("utf-8", "surrogateescape")
    is_folder = header.isdir() or (header.type == tarfile.AREGTYPE and text.endswith("/"))
    return TarMember(
        text.rstrip("/") if is_folder else text,
        offset,
        size,
        header.isreg() and not is_sparse and not any(map(_is_of_sparse, records)),
        is_folder,
        header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE),
    )


def _is_of_sparse(key: bytes) -> bool:
    return key.startswith(b"GNU.sparse.")


def _header(block: bytes) -> tarfile.TarInfo | None:
    """Return the header in a block; None for a block of zeros."""
    if block.count(b"\0") == BLOCK:
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise TarError("a corrupted header") from error
    if header.size < 0:
        raise TarError("a corrupted header")
    return header


def _sparse_map_bytes(file: TarFile, continues: bool) -> int:
    """Pass over the blocks in which the map of a sparse file continues; return their bytes."""
    for count in range(SPARSE_BLOCKS):
        if not continues:
            return count * BLOCK
        continues = _exactly(file, BLOCK)[504] != 0
    raise TarError("a corrupted header (the map of a sparse file is too long)")


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """Return the records ``length key=value`` of a pax header."""
    records = {}
    at = 0
    while at < len(content) and content[at]:  # zeros may follow
        digits, space, _ = content[at : at + 20].partition(b" ")
        end = at + (_number(digits) if space else 0)
        key, equals, value = content[at + len(digits) + 1 : end].partition(b"=")
        if not equals or end > len(content) or not value.endswith(b"\n"):
            raise TarError("a corrupted header")
        records[key] = value[:-1]
        at = end
    return records


def _number(digits: bytes) -> int:
    if not 0 < len(digits) <= 18 or not digits.isdigit():
        raise TarError("a corrupted header")
    return int(digits)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _exactly(file: TarFile, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise TarError("it is cut off")
    return content
