"""Read images inside archives, in place: tar (plain or compressed) and zip.

Members of a plain tar and of a zip are read by opening the archive again, from any thread,
so that files do not stay open while names wait. A compressed tar can only be read from
its beginning to its end: the bytes of its members are held until they are used, at most as
many as `Budget` allows at a time.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.client import IncompleteRead
from operator import attrgetter
from typing import IO, Any, Self, cast

from r2ncli.errors import ImageError
from r2ncli.files import open_regular, reason
from r2ncli.sources.content import Read, ReadBytes, fail, stamp_in, too_large, with_stamp
from r2ncli.sources.names import without_dot_slash
from r2ncli.web import WebError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
ZIP_SUFFIXES = (".zip",)
EXTENDED_HEADER_BYTES = 1 << 20  # a long name, or pax records: read whole before they are used
PIECE_BYTES = 1 << 16
DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {  # by the first bytes
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}

_identity = attrgetter("st_dev", "st_ino", "st_size", "st_mtime_ns")  # changes with the content

OpenAgain = Callable[[], AbstractContextManager[IO[bytes]]]


class Budget:
    """Limits the bytes that are held by inputs that wait to be used; `stop` ends each wait."""

    def __init__(self, limit: float, stop: threading.Event) -> None:
        self.stop = stop
        self._limit = limit
        self._held = 0
        self._freed = threading.Condition()

    def take(self, count: int) -> None:
        """Wait until `count` bytes may be held; a single input may always be held."""
        with self._freed:
            while self._held and self._held + count > self._limit and not self.stop.is_set():
                self._freed.wait(0.1)
            self._held += count

    def free(self, count: int) -> None:
        """Return bytes that `take` took."""
        with self._freed:
            self._held -= count
            self._freed.notify()


class _StrictTarInfo(tarfile.TarInfo):
    """A header of a tar archive; a corrupted or missing header is an error.

    Python's own reader takes either for the end of the archive and skips the rest. It
    also follows a negative size backwards, in an endless loop, and reads a long name of any
    length into memory.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            member = super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise  # a block of zeros: the end as it should be
            cut = str(error) in ("empty header", "truncated header")
            raise tarfile.ReadError("it is cut off" if cut else "a corrupted header") from error
        if member.size < 0:  # by a pax record
            raise tarfile.ReadError("a corrupted header")
        return member

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        too_long = header.type in _EXTENDED_HEADERS and header.size > EXTENDED_HEADER_BYTES
        if header.size < 0 or too_long:
            raise tarfile.ReadError("a corrupted header")
        return header


_EXTENDED_HEADERS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


class _Held:
    """The bytes of a member that cannot be read again; counted in `budget` while they exist."""

    def __init__(self, file: IO[bytes], size: int, budget: Budget) -> None:
        budget.take(size)
        self._size = size
        self._budget = budget
        self._content = file.read(size)
        if len(self._content) < size:
            raise EOFError

    def read(self, max_bytes: int) -> bytes:
        if self._size > max_bytes:
            raise too_large(max_bytes, self._size)
        return self._content

    def __del__(self) -> None:
        self._budget.free(self._size)


def is_archive(name: str) -> bool:
    """Return whether a name has the suffix of an archive."""
    return name.lower().endswith((*TAR_SUFFIXES, *ZIP_SUFFIXES))


def members(
    path: str, wanted: Callable[[str], bool], max_bytes: int, budget: Budget
) -> Iterator[tuple[str, Read]]:
    """Yield the name of every wanted member of the archive at `path`, as stored, and its reader.

    Of a compressed tar, at most what `budget` allows is held, and no member above `max_bytes`.

    Raises
    ------
    ImageError
        The file is not an archive, or cannot be read to its end.
    """
    try:
        file, status = open_regular(path)
        with file:
            open_again = partial(_open_unchanged, path, _identity(status))
            if path.lower().endswith(ZIP_SUFFIXES):
                found = zip_members(file, open_again, wanted)
            elif _decompressor(file):
                found = tar_stream_members(file, wanted, max_bytes, budget)
            else:
                found = _tar_members(file, wanted, partial(partial, _read_range, open_again))
            yield from with_stamp(found, stamp_in(status))
    except OSError as error:
        raise ImageError(f"cannot be read: {_words(error)}") from error


@contextmanager
def _open_unchanged(path: str, identity: tuple[int, ...]) -> Iterator[IO[bytes]]:
    changed = ImageError("the archive changed while it was read")
    try:
        file, status = open_regular(path)
        with file:
            if _identity(status) != identity:
                raise changed
            yield file
            if _identity(os.fstat(file.fileno())) != identity:
                raise changed
    except OSError as error:
        raise ImageError(f"cannot be read: {_words(error)}") from error


def _words(error: Exception) -> str:
    """Return the standard library's message about a corrupted archive, without a file name."""
    text = reason(error)
    cut = isinstance(error, (EOFError, IncompleteRead, struct.error))
    if cut or text == "unexpected end of data":
        return "it is cut off"
    return "its checksum does not match" if "crc" in text else text


# --- tar ------------------------------------------------------------------------------


def tar_stream_members(
    stream: IO[bytes], wanted: Callable[[str], bool], max_bytes: int, budget: Budget
) -> Iterator[tuple[str, ReadBytes]]:
    """Yield the members of a tar that can only be read forwards (see `members`)."""

    try:
        buffered = io.BufferedReader(cast(io.RawIOBase, stream), PIECE_BYTES)
        decompressor = _decompressor(buffered)
    except Exception as error:  # a server can make its reader raise anything
        raise ImageError(f"cannot be read: {_words(error)}") from error
    # not by tarfile itself: it checks no checksum, and its memory use has no limit
    with buffered, decompressor(buffered) if decompressor else buffered as plain:
        forwards = cast(IO[bytes], _Forwards(plain))

        def held(_offset: int, size: int) -> ReadBytes:
            if size > max_bytes:
                return partial(fail, str(too_large(max_bytes, size)))
            return _Held(forwards, size, budget).read

        yield from _tar_members(forwards, wanted, held)


class _Forwards:
    """A stream for tarfile, which skips by seeking; this class skips by reading."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._position = 0

    def read(self, size: int) -> bytes:
        piece = self._stream.read(size)
        self._position += len(piece)
        return piece

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        while position > self._position and self.read(min(PIECE_BYTES, position - self._position)):
            continue
        return self._position


def _decompressor(file: io.BufferedReader | IO[bytes]) -> Callable[[IO[bytes]], IO[bytes]] | None:
    head = cast(io.BufferedReader, file).peek(6)
    return next((opened for start, opened in DECOMPRESSORS.items() if head.startswith(start)), None)


def _read_range(open_again: OpenAgain, offset: int, size: int, max_bytes: int) -> bytes:
    if size > max_bytes:
        raise too_large(max_bytes, size)
    with open_again() as file:
        if offset + size > file.seek(0, os.SEEK_END):  # before that much memory is allocated
            raise ImageError("the archive ends before this member does")
        file.seek(offset)
        return file.read(size)


def _tar_members(
    file: IO[bytes], wanted: Callable[[str], bool], reader: Callable[[int, int], ReadBytes]
) -> Iterator[tuple[str, ReadBytes]]:
    count = 0
    try:
        with tarfile.TarFile(fileobj=file, tarinfo=_StrictTarInfo, encoding="utf-8") as archive:
            while (member := archive.next()) is not None:
                count += 1
                archive.members.clear()  # type: ignore[attr-defined]  # which would grow with the archive
                name = without_dot_slash(member.name)
                if not member.isdir() and wanted(name):
                    if member.islnk() or member.issym():
                        yield name, partial(fail, "a link inside the archive: not followed")
                    elif not member.isreg() or member.issparse():
                        yield name, partial(fail, "not a regular file")
                    else:
                        yield name, reader(member.offset_data, member.size)
            while piece := file.read(PIECE_BYTES):  # a decompressor checks its checksum there
                if piece.strip(b"\0"):
                    raise tarfile.ReadError("more follows after its end mark")
    except Exception as error:  # a corrupted file or a server can raise anything
        if not count and not isinstance(error, (ImageError, WebError)):
            raise ImageError("not a tar archive, or its beginning is corrupted") from error
        beyond = f" beyond member {count:,}" if count else ""
        raise ImageError(f"cannot be read{beyond}: {_words(error)}") from error


# --- zip ------------------------------------------------------------------------------


def zip_members(
    file: IO[bytes], open_again: OpenAgain, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, ReadBytes]]:
    """Yield the members of a zip (see `members`): listed from `file`, read by opening it again."""
    try:
        with zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
    except Exception as error:  # a corrupted file or a server can raise anything
        failed = isinstance(error, ImageError) or (isinstance(error, OSError) and error.strerror)
        why = f"cannot be read: {_words(error)}" if failed else "not a zip archive, or cut off"
        raise ImageError(why) from error
    for member in listed:
        name = without_dot_slash(_name_as_stored(member))
        if not member.is_dir() and wanted(name):
            yield name, partial(_read_zip_member, open_again, member)


def _name_as_stored(member: zipfile.ZipInfo) -> str:
    """Return a member's name, read as UTF-8 even if the flag for it is missing, as macOS does."""
    if member.flag_bits & 0x800 or member.filename != member.orig_filename:
        return member.filename
    return member.filename.encode("cp437").decode("utf-8", "surrogateescape")


def _read_zip_member(open_again: OpenAgain, member: zipfile.ZipInfo, max_bytes: int) -> bytes:
    if member.flag_bits & 1:
        raise ImageError("encrypted inside the archive")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile cannot limit the output of bzip2 or LZMA: up to a million times the input
        method = zipfile.compressor_names.get(member.compress_type, str(member.compress_type))  # type: ignore[attr-defined]
        raise ImageError(f"compressed by {method} inside the archive: only deflate is read")
    with open_again() as file:
        try:
            file.seek(member.header_offset)
            signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", file.read(30))
            if signature != b"PK\3\4":
                raise zipfile.BadZipFile("a corrupted header")
            file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
            with zipfile.ZipExtFile(file, "r", member) as plain:
                content = plain.read(max_bytes + 1)  # the header's size may be wrong
        except Exception as error:  # a corrupted file or a server can raise anything
            raise ImageError(f"cannot be read from the archive: {_words(error)}") from error
    if len(content) > max_bytes:
        raise too_large(max_bytes)
    return content
