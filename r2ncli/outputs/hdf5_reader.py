"""Read the HDF5 files that r2n writes, without the HDF5 library.

A corrupted file must not reach the HDF5 library: with h5py 3.16 and HDF5 2.0 a cycle in a B-tree
crashes the process, and a global heap that holds zeros is read for ever. A file of r2n needs
few of HDF5's structures (superblock 0, groups as symbol tables, datasets that are contiguous or
chunked, strings in global heaps). This reader knows these and refuses all others: links to
elsewhere, external and virtual storage, filters, other types.

Every address and size is compared with the size of the file, and the number of bytes that are read
as structures is bounded by it, so that no file takes more time or memory than its size explains.
The structures are those of the HDF5 File Format Specification, version 3.0.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

UNDEFINED = 2**64 - 1  # the address of what is not stored
HEAP_BYTES = 5_000_000  # of a global heap, which holds many short strings or a long one
HEAPS = 64  # global heaps kept in memory; the library fills up to 16 at a time
# how often the bytes of the file may be read as structures: once is normal, more for a small file
READS, MORE_BYTES = 16, 1_000_000
NAME_BYTES = 1000  # of a layer or a dataset

SIGNATURE = b"\x89HDF\r\n\x1a\n"
SPACE, TYPE, EXTERNAL, LAYOUT, FILTERS, ATTRIBUTE, CONTINUATION, SYMBOLS = (
    *(0x01, 0x03, 0x07, 0x08, 0x0B, 0x0C, 0x10, 0x11),
)
GROUP_TREE, CHUNK_TREE = 0, 1
TEXT = np.dtype(object)  # a string of any length

# bit offset, precision, place and size of exponent and mantissa, bias of IEEE 754's numbers
_FLOATS = {
    2: struct.pack("<HHBBBBI", 0, 16, 10, 5, 0, 10, 15),
    4: struct.pack("<HHBBBBI", 0, 32, 23, 8, 0, 23, 127),
    8: struct.pack("<HHBBBBI", 0, 64, 52, 11, 0, 52, 1023),
}
_HEAP_OBJECT = struct.Struct("<H6xQ")
_STRING = struct.Struct("<IQI")  # length, address of its heap, number in the heap


class Hdf5Reader:
    """An HDF5 file that is open for reading.

    Every method raises a ValueError or a LookupError where the file is corrupted, or is not
    of the kind that r2n writes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size
        self._left = READS * self.size + MORE_BYTES
        superblock = self._read(0, 96)
        if not superblock.startswith(SIGNATURE):
            raise ValueError("not an HDF5 file")
        if superblock[8] != 0 or superblock[13:15] != b"\x08\x08":
            raise ValueError("not of the HDF5 version that r2n writes")
        base, _, end = struct.unpack_from("<QQQ", superblock, 24)
        if base or end > self.size:
            raise ValueError(f"it should have {end:,} bytes, but has {self.size:,}")
        (self._root,) = struct.unpack_from("<Q", superblock, 64)
        self._heap = lru_cache(HEAPS)(self._read_heap)

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of the root group that are strings, numbers or booleans."""
        found = (
            self._attribute(body) for kind, body in self._messages(self._root) if kind == ATTRIBUTE
        )
        return dict(attribute for attribute in found if attribute is not None)

    def links(self, *group: str) -> dict[str, int]:
        """Return the objects of a group below the root, by name: hard links only."""
        address = self._root
        for name in group:
            address = self.links()[name]
        symbols = [body for kind, body in self._messages(address) if kind == SYMBOLS]
        if not symbols:
            raise ValueError("a group that r2n did not write")
        tree, heap = struct.unpack_from("<QQ", symbols[0])
        head = self._read(heap, 32)
        if head[:4] != b"HEAP":
            raise ValueError("the names of a group are missing")
        size, _, start = struct.unpack_from("<QQQ", head, 8)
        names = self._read(start, size)
        found: dict[str, int] = {}
        for _, node in self._leaves(tree, GROUP_TREE, 8):
            head = self._read(node, 8)
            if head[:4] != b"SNOD":
                raise ValueError("the objects of a group are missing")
            (count,) = struct.unpack_from("<H", head, 6)
            entries = self._read(node + 8, count * 40)
            for offset, header, cache in struct.iter_unpack("<QQI20x", entries):
                if offset < len(names) and cache != 2:  # 2 is a soft link
                    end = names.index(b"\0", offset, offset + NAME_BYTES)
                    found[names[offset:end].decode()] = header
        return found

    def dataset(self, address: int) -> Dataset:
        """Return the dataset whose object header is at `address`."""
        parts: dict[int, bytes] = {}
        for kind, body in self._messages(address):
            if kind in (EXTERNAL, FILTERS):
                raise ValueError("a dataset that is compressed, or stored in another file")
            parts[kind] = body
        shape, dtype = _shape_in(parts[SPACE]), _dtype_in(parts[TYPE])
        if dtype is None or not shape:
            raise ValueError("a dataset of a type or shape that r2n does not write")
        item_bytes = _STRING.size if dtype == TEXT else dtype.itemsize
        layout = parts[LAYOUT]
        if layout[0] != 3 or layout[1] not in (1, 2):
            raise ValueError("a dataset that is stored as r2n does not store it")
        if math.prod(shape) * item_bytes > self.size:
            raise ValueError(f"a dataset of {' x '.join(map(str, shape))} is larger than the file")
        if layout[1] == 1:
            (start,) = struct.unpack_from("<Q", layout, 2)
            chunk = shape
            chunks = np.full((1,) * len(shape), start, np.uint64)
        else:
            rank, tree = struct.unpack_from("<BQ", layout, 2)
            *parts_of_axes, stored_bytes = struct.unpack_from(f"<{rank}I", layout, 11)
            chunk = tuple(parts_of_axes)
            if len(chunk) != len(shape) or stored_bytes != item_bytes or 0 in chunk:
                raise ValueError("a dataset with chunks of another shape")
            chunks = self._chunks(tree, shape, chunk, item_bytes)
        return Dataset(self, shape, dtype, chunk, chunks)

    def _chunks(
        self, tree: int, shape: tuple[int, ...], chunk: tuple[int, ...], item_bytes: int
    ) -> npt.NDArray[np.uint64]:
        """Return the address of each chunk, by its place in the grid of chunks."""
        grid = [-(-length // part) for length, part in zip(shape, chunk, strict=True)]
        chunk_bytes = math.prod(chunk) * item_bytes
        if math.prod(grid) * chunk_bytes > self.size:
            raise ValueError("its chunks are larger than the file")
        chunks = np.full(grid, UNDEFINED, np.uint64)
        rank = len(shape)
        for key, address in self._leaves(tree, CHUNK_TREE, 16 + 8 * rank):
            stored, omitted_filters, *place = struct.unpack_from(f"<II{rank}Q", key)
            if stored != chunk_bytes or omitted_filters:
                raise ValueError(f"a chunk of {stored:,} bytes, not {chunk_bytes:,}")
            chunks[tuple(start // part for start, part in zip(place, chunk, strict=True))] = address
        return chunks

    def _leaves(self, root: int, kind: int, key_bytes: int) -> Iterator[tuple[bytes, int]]:
        """Yield each key of a B-tree with its address, in order."""
        pending: list[tuple[int, int | None]] = [(root, None)] if root != UNDEFINED else []
        seen = set()
        while pending:
            address, expected = pending.pop()
            if address in seen:
                raise ValueError("a B-tree contains itself")
            seen.add(address)
            head = self._read(address, 24)
            found, level, used = struct.unpack_from("<BBH", head, 4)
            if head[:4] != b"TREE" or found != kind or expected not in (None, level):
                raise ValueError("a B-tree is corrupted")
            content = self._read(address + 24, used * (key_bytes + 8))
            children = []
            for at in range(0, len(content), key_bytes + 8):
                (child,) = struct.unpack_from("<Q", content, at + key_bytes)
                if level:
                    children.append((child, level - 1))
                else:
                    yield content[at : at + key_bytes], child
            pending += reversed(children)

    def _messages(self, address: int) -> Iterator[tuple[int, bytes]]:
        """Yield the kind and the content of each message of an object header."""
        version, count, size = struct.unpack_from("<BxH4xI", self._read(address, 16))
        if version != 1:
            raise ValueError("an object that r2n did not write")
        blocks = [(address + 16, size)]
        while blocks:
            content = self._read(*blocks.pop(0))
            at = 0
            while at + 8 <= len(content) and count:
                kind, length, flags = struct.unpack_from("<HHB", content, at)
                body = content[at + 8 : at + 8 + length]
                at, count = at + 8 + length, count - 1
                if len(body) < length:
                    raise ValueError("an object's header is corrupted")
                if kind == CONTINUATION:
                    blocks.append(struct.unpack_from("<QQ", body))
                elif not flags & 2:  # such a message is stored with another object
                    yield kind, body

    def _attribute(self, body: bytes) -> tuple[str, Any] | None:
        """Return the name and value in an attribute message; None if r2n writes no such value."""
        version, flags, *sizes = struct.unpack_from("<BBHHH", body)
        if version not in (1, 2, 3) or (version > 1 and flags & 3):
            return None
        parts, at = [], 9 if version == 3 else 8
        for size in sizes:
            parts.append(body[at : at + size])
            at += size + (-size % 8 if version == 1 else 0)
        name = parts[0].rstrip(b"\0").decode()
        dtype = _dtype_in(parts[1])
        if dtype is None or _shape_in(parts[2]) != ():
            return None
        if dtype == TEXT:
            return name, self.text(*_STRING.unpack_from(body, at))
        return name, np.frombuffer(body, dtype, 1, at)[0].item()

    def text(self, length: int, heap: int, number: int) -> str:
        """Return a string in a global heap."""
        if length == 0:
            return ""
        stored = self._heap(heap)[number]
        if len(stored) < length or b"\0" in stored[:length]:
            raise ValueError("a string is corrupted")
        return stored[:length].decode()

    def _read_heap(self, address: int) -> dict[int, bytes]:
        """Return the objects of a global heap, by number."""
        head = self._read(address, 16)
        (size,) = struct.unpack_from("<Q", head, 8)
        if head[:5] != b"GCOL\x01" or size > HEAP_BYTES:
            raise ValueError("a string is missing")
        content = self._read(address, size)
        objects, at = {}, 16
        while at + _HEAP_OBJECT.size <= size:
            number, length = _HEAP_OBJECT.unpack_from(content, at)
            if number == 0:  # the rest is free
                break
            at += _HEAP_OBJECT.size
            objects[number] = content[at : at + length]
            at += length + -length % 8
        return objects

    def _read(self, address: int, count: int) -> bytes:
        """Return bytes of a structure."""
        self._left -= count
        if self._left < 0:
            raise ValueError("its structures overlap, or are not in the order of its rows")
        return self.read(address, count)

    def read(self, address: int, count: int) -> bytes:
        """Return bytes of the file."""
        if address + count > self.size:
            raise ValueError("it points beyond its end")
        self._file.seek(address)
        content = self._file.read(count)
        if len(content) < count:
            raise ValueError("it became shorter while it was read")
        return content


@dataclass(frozen=True)
class Dataset:
    """A dataset [N, …] of an open file.

    Attributes
    ----------
    shape : tuple of int
        All dimensions.
    dtype : dtype
        A number's type, or `TEXT`.
    """

    _reader: Hdf5Reader
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    _chunk: tuple[int, ...]
    _chunks: npt.NDArray[np.uint64]  # their addresses

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return the rows from number `start` to before `stop`, which must exist."""
        return self._numbers(start, stop, self.dtype)

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the strings of these rows."""
        stored = self._numbers(start, stop, np.dtype([("n", "<u4"), ("at", "<u8"), ("i", "<u4")]))
        return [self._reader.text(*reference) for reference in stored.tolist()]

    def _numbers(self, start: int, stop: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        out = np.empty((stop - start, *self.shape[1:]), dtype)
        if not out.size:
            return out
        height, *rest = self._chunk
        row_bytes = math.prod(rest) * dtype.itemsize
        for place in range(start // height, -(-stop // height)):
            first, last = max(start, place * height), min(stop, (place + 1) * height)
            for others in np.ndindex(*self._chunks.shape[1:]):
                address = int(self._chunks[(place, *others)])
                address += (first - place * height) * row_bytes
                content = self._reader.read(address, (last - first) * row_bytes)
                block = np.frombuffer(content, dtype).reshape(last - first, *rest)
                target = out[first - start : last - start]
                for axis, (other, part) in enumerate(zip(others, rest, strict=True), start=1):
                    some = slice(other * part, min((other + 1) * part, self.shape[axis]))
                    target = target[(slice(None),) * axis + (some,)]
                    block = block[(slice(None),) * axis + (slice(some.stop - some.start),)]
                target[...] = block
        return out


def _shape_in(body: bytes) -> tuple[int, ...] | None:
    """Return the dimensions in a dataspace message; None if it has no element."""
    version, rank = body[0], body[1]
    if version not in (1, 2) or (version == 2 and body[3] == 2):
        return None
    return struct.unpack_from(f"<{rank}Q", body, 8 if version == 1 else 4)


def _dtype_in(body: bytes) -> np.dtype[Any] | None:
    """Return the type in a datatype message; None if r2n writes no such type."""
    first, bits, size = struct.unpack_from("<BB2xI", body)
    kind = first & 15
    if kind == 9 and bits & 15 == 1 and size == _STRING.size:
        return TEXT
    if kind == 1 and not bits & 1 and body[8:20] == _FLOATS.get(size):
        return np.dtype(f"<f{size}")
    if kind == 0 and not bits & 1 and size in (1, 2, 4, 8):
        return np.dtype(f"<{'i' if bits & 8 else 'u'}{size}")
    return np.dtype(bool) if kind == 8 and size == 1 else None
