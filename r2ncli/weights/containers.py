"""Recognise from a file's bytes which container a checkpoint has, or what else the file is.

Nothing is unpickled or executed here, and torch is not needed.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import cast

from r2ncli.errors import CheckpointError
from r2ncli.files import open_regular, reason

SUFFIXES = (".pth", ".pt", ".safetensors")
HEADER_LIMIT = 100_000_000  # bytes of a safetensors header, by the format's definition

# what a corrupted archive can raise: errors of zipfile, of its decompressors, of wrong numbers
ZIP_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError),
    *(RuntimeError, ValueError, OverflowError, struct.error),
)

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
    """Return the header of a safetensors file, recognised by content; None for any other file."""
    with reading(path) as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if start.startswith(b"PK") or start[8:] != b"{" or not 0 < length < HEADER_LIMIT:
            return None
        return b"{" + file.read(length - 1)


def looks_pickled(head: bytes) -> bool:
    """Return whether a file with these first bytes is a pickle.

    A pickle of protocol 0 or 1 is recognised only where it begins with an import.
    """
    old = rb"[(\[\]}]*[ci][A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n[(pqSVX\]}]"
    return re.match(rb"\x80[\x02-\x05]|" + old, head) is not None


def _zip_archive(file: BufferedReader) -> str | None:
    """Return what a zip archive is, or None where it is a checkpoint."""
    try:
        if not zipfile.is_zipfile(file):
            return "truncated: the end of the zip container is missing. Download it again"
        with zipfile.ZipFile(file) as archive:
            paths = archive.namelist()
    except ZIP_ERRORS as error:
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
        return f"a zip archive with {inside[0]} inside: {_UNPACK}"
    return "a zip archive, but not one that torch.save writes"


def broken_members(path: Path) -> tuple[int, list[str]]:
    """Return how many members of a zip archive have a CRC-32, and which members do not match.

    A file that torch wrote without checksums (``set_crc32_options``) gives 0.
    """
    broken: list[str] = []
    count = 0
    with reading(path) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.CRC:
                count += 1
                try:
                    with archive.open(member) as content:
                        while content.read(1 << 20):
                            pass
                except ZIP_ERRORS:
                    broken.append(member.filename)
    return count, broken


def _short_safetensors(file: BufferedReader, size: int) -> str | None:
    """Return the error for a safetensors file that ends before its tensors do, or None."""
    file.seek(0)
    start = 8 + int.from_bytes(file.read(8), "little")
    needed = start
    if start <= size:
        try:
            header = json.loads(file.read(start - 8))
            ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key[:2] != "__"]
            needed = start + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return None  # corrupted in another way: the library that reads it says how
    if needed <= size:
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
    shown = head[:2048].decode(errors="replace")
    if all(char.isprintable() or char.isspace() for char in shown) and "\ufffd" not in shown:
        return f"text, not a checkpoint: it starts {' '.join(shown.split())[:40]!r}"
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
