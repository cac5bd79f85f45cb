"""Undo gzip, deflate, bzip2 and xz while reading, in bounded memory.

The modules of the standard library limit neither the memory that an xz file asks for nor, in
old releases of urllib3, what a small piece expands to.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Protocol

PIECE_BYTES = 1 << 16
XZ_MEMORY_BYTES = 1 << 28  # xz -9 needs 65 MB


class Unpacker(Protocol):
    """Undoes one compressed stream, at most `max_length` bytes at a time."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Zlib:
    """zlib's decompressor with the interface of those of bz2 and lzma."""

    def __init__(self, window_bits: int) -> None:
        self._plain = zlib.decompressobj(window_bits)

    @property
    def eof(self) -> bool:
        return self._plain.eof

    @property
    def unused_data(self) -> bytes:
        return self._plain.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._plain.decompress(self._plain.unconsumed_tail + data, max_length)


def gzip_unpacker() -> Unpacker:
    """Return what undoes one gzip stream, and checks its checksum and length."""
    return _Zlib(zlib.MAX_WBITS | 16)


def zlib_unpacker() -> Unpacker:
    """Return what undoes one zlib stream, HTTP's ``deflate``."""
    return _Zlib(zlib.MAX_WBITS)


def raw_unpacker() -> Unpacker:
    """Return what undoes deflate without a header, which some servers call ``deflate``."""
    return _Zlib(-zlib.MAX_WBITS)


def xz_unpacker() -> Unpacker:
    """Return what undoes one xz stream."""
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES)


UNPACKERS: dict[bytes, Callable[[], Unpacker]] = {  # by the first bytes
    b"\x1f\x8b": gzip_unpacker,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": xz_unpacker,
}


def unpacker_of(head: bytes) -> Callable[[], Unpacker] | None:
    """Return what undoes content that begins with `head`; None if it is not compressed."""
    return next((make for start, make in UNPACKERS.items() if head.startswith(start)), None)


class Unpacked(io.RawIOBase):
    """What a compressed file or answer holds; streams that follow each other are one.

    Reading raises an EOFError where it ends too early, and what the library of its compression
    raises where it is corrupted.
    """

    def __init__(
        self, packed: io.RawIOBase, make: Callable[[], Unpacker], head: bytes = b""
    ) -> None:
        super().__init__()
        self._packed = packed
        self._make = make
        self._unpacker = make()
        self._input = head  # what was read of it before
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ended and len(buffer):
            if self._unpacker.eof:
                self._next_stream()
                continue
            piece = self._unpacker.decompress(self._input, len(buffer))
            self._input = b""
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)
            if not self._unpacker.eof:
                self._input = self._packed.read(PIECE_BYTES) or b""
                if not self._input:
                    raise EOFError("it is cut off")
        return 0

    def _next_stream(self) -> None:
        """Begin the stream that follows, after a padding of zeros; end if none follows."""
        rest = self._unpacker.unused_data
        while not (rest := rest.lstrip(b"\0")):
            if not (rest := self._packed.read(PIECE_BYTES) or b""):
                self._ended = True
                return
        while len(rest) < 6 and (more := self._packed.read(6 - len(rest))):
            rest += more
        if unpacker_of(rest) is None:
            self._ended = True
            if self._make is gzip_unpacker:
                raise OSError("more follows after its end")
            return
        self._unpacker, self._input = self._make(), rest

    def close(self) -> None:
        self._packed.close()
        super().close()
