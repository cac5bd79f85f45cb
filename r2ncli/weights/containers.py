"""Read how a checkpoint file is packed, or say what else the file is.

Nothing is unpickled or executed here, and torch is not needed. Every size in a file is compared
with the size of the file before anything of that size is read.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import cast

from r2ncli.errors import CheckpointError
from r2ncli.files import open_regular, reason

SUFFIXES = (".pth", ".pt", ".safetensors")
HEADER_LIMIT = 100_000_000  # bytes of a safetensors header, by the format's definition
# Bytes of a list of tensors (the header of a safetensors file, the directory of a zip archive)
# that r2n reads. A tensor takes about 100 of them, and a checkpoint of a Res2Net at most 4,000
# tensors with its optimizer; parsed, 8 MB can take 300 MB of memory.
LIST_LIMIT = 8_000_000

_UNPACK = "unpack it first"
_SERVER = "probably a server's error message. Download the file again"

# offset in the file, bytes found there, what the file is then
_SIGNATURES = (
    (0, b"\x1f\x8b", f"gzip-compressed: {_UNPACK}"),
    (257, b"ustar", f"a tar archive, not a checkpoint: {_UNPACK}"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (of Keras?), not a PyTorch checkpoint"),
    (0, b"\x89PNG\r\n\x1a\n", "a PNG image, not a checkpoint"),
    (0, b"\xff\xd8\xff", "a JPEG image, not a checkpoint"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull"),
)


def shown(name: object) -> str:
    """Return a name from a file as an error shows it: escaped, in quotes and not too long."""
    if not isinstance(name, str | bytes):
        return reprlib.repr(name) if type(name) is float or name is None else type(name).__name__
    return repr(name) if len(name) <= 80 else f"{name[:80]!r}…"


def container(path: Path) -> str:
    """Return a checkpoint's container: ``zip``, ``pickle`` (torch before 1.6) or ``safetensors``.

    Raises
    ------
    CheckpointError
        The file is not a checkpoint; the message says what it seems to be.
    """
    if os.path.isdir(path):
        raise CheckpointError(f"{path}: is a folder, not a checkpoint file{_inside(path)}")
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(4096)
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            found = _zip_archive(file)
            if found is None:
                return "zip"
        elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") < HEADER_LIMIT:
            found = _short_safetensors(file, size)
            if found is None:
                return "safetensors"
        elif looks_pickled(head):
            return "pickle"
        else:
            found = _foreign(head)
    raise CheckpointError(f"{path}: {found}")


def safetensors_header(path: Path) -> bytes | None:
    """Return the header of a safetensors file, recognised by content; None for any other file.

    Raises
    ------
    CheckpointError
        The header is larger than `LIST_LIMIT`.
    """
    with reading(path) as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if start.startswith(b"PK") or start[8:] != b"{" or not 0 < length < HEADER_LIMIT:
            return None
        if length > LIST_LIMIT:
            raise CheckpointError(f"{path}: {_large_header(length)}")
        return b"{" + file.read(length - 1)


def _large_header(length: int) -> str:
    return (
        f"its safetensors header has {length:,} bytes, larger than the limit of "
        f"{LIST_LIMIT:,} bytes"
    )


def looks_pickled(head: bytes) -> bool:
    """Return whether a file with these first bytes is a pickle.

    A pickle of protocol 0 or 1 is recognised only where it begins with an import.
    """
    old = rb"[(\[\]}]*[ci][A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n[(pqSVX\]}]"
    return re.match(rb"\x80[\x02-\x05]|" + old, head) is not None


# --- zip archives ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a zip archive, as the archive's directory describes it.

    `packed` and `size` are its bytes in the file and unpacked, `header` is where it starts in the
    file, and `crc` is 0 where the archive has no checksum.
    """

    name: str
    method: int
    encrypted: bool
    crc: int
    packed: int
    size: int
    header: int


def zip_members(file: BufferedReader) -> list[Member]:
    """Return the members of a zip archive in the order of its directory.

    Raises
    ------
    ValueError
        The directory is missing, corrupted or larger than `LIST_LIMIT`.
    """
    size = os.fstat(file.fileno()).st_size
    tail_start = max(0, size - 65_557)  # the longest end record, with its comment
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        raise EOFError
    length, start = struct.unpack_from("<II", tail, at + 12)
    end = tail_start + at
    locator = tail[at - 20 : at] if at >= 20 else b""
    if locator.startswith(b"PK\6\7"):
        (end,) = struct.unpack_from("<Q", locator, 8)
        if end > size - 56:
            raise ValueError("its directory is not where the archive says")
        file.seek(end)
        record = file.read(56)
        if not record.startswith(b"PK\6\6"):
            raise ValueError("its directory is not where the archive says")
        length, start = struct.unpack_from("<QQ", record, 40)
    if start + length != end:
        raise ValueError("its directory is not where the archive says")
    if length > LIST_LIMIT:
        raise ValueError(
            f"its directory has {length:,} bytes, larger than the limit of {LIST_LIMIT:,} bytes"
        )
    file.seek(start)
    return list(_directory(file.read(length)))


def _directory(content: bytes) -> Iterator[Member]:
    at = 0
    while at < len(content):
        if content[at : at + 4] != b"PK\1\2" or len(content) - at < 46:
            raise ValueError("its directory is corrupted")
        flags, method = struct.unpack_from("<HH", content, at + 8)
        crc, packed, size, *lengths = struct.unpack_from("<IIIHHH", content, at + 16)
        (header,) = struct.unpack_from("<I", content, at + 42)
        name_end = at + 46 + lengths[0]
        extra = content[name_end : name_end + lengths[1]]
        numbers = iter(_zip64_numbers(extra))
        try:
            size, packed, header = (
                next(numbers) if value == 0xFFFFFFFF else value for value in (size, packed, header)
            )
        except (StopIteration, RuntimeError):
            raise ValueError("its directory is corrupted") from None
        name = content[at + 46 : name_end].decode("utf-8", "replace")
        at = name_end + lengths[1] + lengths[2]
        if at > len(content):
            raise ValueError("its directory is corrupted")
        yield Member(name, method, bool(flags & 1), crc, packed, size, header)


def _zip64_numbers(extra: bytes) -> tuple[int, ...]:
    """Return the 64-bit numbers of a directory entry that do not fit into 32 bits."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            block = extra[at + 4 : at + 4 + length]
            count = min(len(block) // 8, 3)
            return struct.unpack_from(f"<{count}Q", block)
        at += 4 + length
    return ()


def member_start(file: BufferedReader, member: Member) -> int:
    """Return where the bytes of a stored member start in the file.

    Raises
    ------
    ValueError
        The member is not stored as torch does it, or not where the directory says.
    """
    name = f"its member {shown(member.name)}"
    if member.encrypted or member.method:
        how = "encrypted" if member.encrypted else "compressed"
        raise ValueError(f"{name} is {how}, which torch.save never does")
    if member.packed != member.size:
        raise ValueError(f"{name} has two sizes, {member.packed:,} and {member.size:,} bytes")
    file.seek(member.header)
    fixed = file.read(30)
    if len(fixed) < 30 or not fixed.startswith(b"PK\3\4"):
        raise ValueError(f"{name} is not where the archive's directory says")
    method, length, extra = struct.unpack_from("<H16xHH", fixed, 8)
    if method or file.read(length).decode("utf-8", "replace") != member.name:
        raise ValueError(f"{name} has another name or method in the archive's directory")
    start = int(member.header + 30 + length + extra)
    if start + member.size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{name} claims {member.size:,} bytes, more than the file has")
    return start


def stored_members(file: BufferedReader, members: list[Member]) -> dict[str, tuple[int, int]]:
    """Return where in the file each member's bytes start, and how many they are, by its name.

    Raises
    ------
    ValueError
        The archive is not one that torch.save writes: a member is compressed or encrypted, is not
        within the file, overlaps another one or has the same name.
    """
    places: dict[str, tuple[int, int]] = {}
    for member in members:
        if member.name in places:
            raise ValueError(f"it has two members with the name {shown(member.name)}")
        places[member.name] = member_start(file, member), member.size
    spans = sorted((m.header, sum(places[m.name]), m.name) for m in members)
    for (_, end, one), (header, _, other) in pairwise(spans):
        if header < end:
            raise ValueError(f"its members {shown(one)} and {shown(other)} overlap")
    return places


def _zip_archive(file: BufferedReader) -> str | None:
    """Return what a zip archive is, or None where it is a checkpoint."""
    try:
        paths = [member.name for member in zip_members(file)]
    except EOFError:
        return "truncated: the end of the zip container is missing. Download it again"
    except (ValueError, OSError, OverflowError) as error:
        return f"corrupted: the zip container cannot be listed ({error}). Download it again"
    names = {path.rpartition("/")[2] for path in paths}
    for member, kind in (("constants.pkl", "TorchScript"), ("archive_format", "torch.export")):
        if member in names:
            return f"a {kind} program, expected a state dict of tensors"
    if "data.pkl" in names:
        return None
    if "model.weights.h5" in names:
        return "a Keras model, not a PyTorch checkpoint"
    inside = [name for name in paths if name.endswith((*SUFFIXES, ".tar"))]
    if inside:
        return f"a zip archive with {shown(inside[0])[1:-1]} inside: {_UNPACK}"
    return "a zip archive, but not one that torch.save writes"


def broken_members(path: Path) -> tuple[int, list[str]]:
    """Return how many members of a zip archive have a CRC-32, and which members do not match.

    A file that torch wrote without checksums (``set_crc32_options``) gives 0. Deflated members
    are left out: `stored_members` refuses them.
    """
    broken: list[str] = []
    count = total = 0
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        for member in zip_members(file):
            if not member.crc or (member.method == 8 and not member.encrypted):
                continue
            count += 1
            total += member.size
            try:
                start = member_start(file, member)
                # members that overlap could make this take for ever; they are refused later
                matches = total > size or _crc32(file, start, member.size) == member.crc
            except (ValueError, OSError, OverflowError):
                matches = False
            if not matches:
                broken.append(member.name)
    return count, broken


def _crc32(file: BufferedReader, start: int, size: int) -> int:
    file.seek(start)
    crc = 0
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        crc = zlib.crc32(block, crc)
        size -= len(block)
    return crc


def _short_safetensors(file: BufferedReader, size: int) -> str | None:
    """Return the error for a safetensors file that ends before its tensors do, or None."""
    file.seek(0)
    start = 8 + int.from_bytes(file.read(8), "little")
    needed = start
    if LIST_LIMIT < start - 8 <= size:
        return _large_header(start - 8)
    if start <= size:
        try:
            header = json.loads(file.read(start - 8))
            ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key[:2] != "__"]
            needed = start + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return None  # corrupted in another way, which `safetensors_content` says
    if not isinstance(needed, int) or needed <= size:
        return None
    return f"truncated: {size:,} of a safetensors file's {needed:,} bytes. Download it again"


def _foreign(head: bytes) -> str:
    if not head:
        return "empty"
    for offset, mark, found in _SIGNATURES:
        if head[offset : offset + len(mark)] == mark:
            return found
    if not head.strip(b"\0"):
        return "not a checkpoint: it starts with zeros only, like an interrupted download"
    # protocol buffers: a first field of a small number, then a producer's name or a graph
    if head[0] == 8 and 3 <= head[1] <= 30 and head[2:3] in (b"\x12", b"\x3a", b"\x42"):
        return "an ONNX model, expected a PyTorch checkpoint"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<body")):
        return f"a web page (HTML), not a checkpoint: {_SERVER}"
    if text.startswith(b"<?xml"):
        return f"an XML document, not a checkpoint: {_SERVER}"
    if text.startswith((b"{", b"[")) and b"\0" not in text:
        return f"a JSON document, not a checkpoint: {_SERVER}"
    words = head[:2048].decode(errors="replace")
    if all(char.isprintable() or char.isspace() for char in words) and "\ufffd" not in words:
        return f"text, not a checkpoint: it starts {' '.join(words.split())[:40]!r}"
    return "not a checkpoint (the format is unknown)"


def _inside(folder: Path) -> str:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ""
    if "data.pkl" in names:
        return ", but an unpacked one: download the file again and do not unpack it"
    inside = [name for name in names if name.endswith(SUFFIXES)]
    return f"; it contains {inside[0]}" if inside else ""


@contextmanager
def reading(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading; a pipe or a device is an error at once."""
    try:
        file, _ = open_regular(path)
        with file:
            yield cast(BufferedReader, file)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from error
