"""The HDF5 format of features: blocks are .npz files, the whole is one HDF5 file."""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from r2ncli.errors import OutputError
from r2ncli.files import locked_elsewhere, open_regular
from r2ncli.options import DTYPES
from r2ncli.outputs.hdf5_reader import TEXT, Hdf5Reader
from r2ncli.outputs.reading import RECORD_BYTES, checked_record, checked_text, damage_as_error
from r2ncli.outputs.rows import FEATURES, Batch

CHUNK_BYTES = 4_000_000
STRINGS_AT_ONCE = 4096  # names held while a file is joined or read
# features in memory at once: some slabs of a few rows each, for rows that come in another order
SLAB_ROWS, SLAB_BYTES, SLABS = 64, 4_000_000, 16

_NPY_HEADER = re.compile(
    rb"\{'descr': '([<|][bfU][0-9]{1,9})', 'fortran_order': False, "
    rb"'shape': \(([0-9]{0,18}(?:, ?[0-9]{0,18})*)\), \} *\n"
)

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Hdf5Format:
    """``/features/<layer>`` [N, …] row-aligned with ``/paths``, ``/status``, ``/error`` [N].

    Attributes
    ----------
    shapes : dict of str to tuple of int
        One row's shape by layer.
    dtype : str
        ``float32`` or ``float16``.
    """

    suffix: ClassVar[str] = ".h5"
    block_suffix: ClassVar[str] = ".npz"
    content: ClassVar[str] = FEATURES
    packages: ClassVar[tuple[str, ...]] = ()  # h5py is always installed and recorded
    holds_record: ClassVar[bool] = True

    shapes: dict[str, tuple[int, ...]]
    dtype: str = DTYPES[0]

    def pack(self, batches: Sequence[Batch]) -> bytes:
        arrays: dict[str, npt.NDArray[Any]] = {
            "paths": np.array([name for batch in batches for name in batch.names]),
            "errors": np.array([error or "" for batch in batches for error in batch.errors]),
            "failed": np.array([e is not None for batch in batches for e in batch.errors]),
        }
        for layer in self.shapes:
            values = np.concatenate([batch.columns[layer] for batch in batches])
            arrays[_column(layer)] = values = values.astype(self.dtype)
            values[arrays["failed"]] = np.nan
        packed = io.BytesIO()
        np.savez(packed, allow_pickle=False, **arrays)
        return packed.getvalue()

    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * sum(map(math.prod, self.shapes.values()))

    def read_block(self, block: Path) -> Iterator[tuple[str, bool]]:
        with _open_block(block) as arrays:
            names, failed = arrays.array("paths"), arrays.array("failed")
            if failed.dtype != bool:
                raise ValueError("its rows are neither ok nor failed")
            for layer, shape in self.shapes.items():
                expected = np.dtype(self.dtype), (len(names), *shape)
                if arrays.header(_column(layer)) != expected:
                    raise ValueError(f"features of another shape or type: {layer}")
        for name, one_failed in zip(names.tolist(), failed.tolist(), strict=True):
            yield checked_text(name), one_failed

    def join(self, blocks: Sequence[Path], out: Path, record: Record) -> None:
        count = sum(1 for block in blocks for _ in self.read_block(block))
        import h5py

        text = h5py.string_dtype("utf-8")
        with _new_file(out) as (file, disk):
            for key, value in record.items():
                plain = isinstance(value, str | int | float)
                file.attrs[key] = value if plain else json.dumps(value, ensure_ascii=False)
            # chunks of fixed sizes, independent of the blocks: the same bytes each time
            for layer, shape in self.shapes.items():
                chunk = _chunk_shape(shape, np.dtype(self.dtype), count)
                dataset = file.create_dataset(
                    _column(layer),
                    (count, *shape),
                    self.dtype,
                    chunks=chunk if count else None,  # a shard may have no rows
                )
                for start, rows in _slabs(blocks, _column(layer), chunk[0]):
                    dataset[start : start + len(rows)] = rows
                    disk.raise_error()
            for name, key in (("paths", "paths"), ("status", "failed"), ("error", "errors")):
                dataset = file.create_dataset(name, (count,), text)
                for start, rows in _slabs(blocks, key, STRINGS_AT_ONCE):
                    dataset[start : start + len(rows)] = rows
                    disk.raise_error()

    @classmethod
    def of(cls, output: Path) -> Self:
        with open_features(output) as features:
            return cls(features.shapes, features.dtype)

    @classmethod
    def read_record(cls, output: Path) -> dict[str, Any]:
        with _opened(output) as reader:
            return _record_in(reader)

    @classmethod
    def read_names(cls, output: Path) -> Iterator[tuple[str, bool]]:
        with open_features(output) as features:
            yield from ((name, error is not None) for name, error in features.names())

    @classmethod
    def read(cls, output: Path, start: int = 0) -> Iterator[Batch]:
        with open_features(output) as features:
            yield from features.batches(start)


class FeatureFile:
    """A finished HDF5 file that is open: its names in order, its features by row number.

    Attributes
    ----------
    shapes : dict of str to tuple of int
        One row's shape by layer, in the order in which the layers were asked for.
    dtype : str
        ``float32`` or ``float16``.
    """

    def __init__(self, output: Path, reader: Hdf5Reader) -> None:
        self._output = output
        self._bytes = reader.size
        found, stored = reader.links(), reader.links("features")
        layers = _record_in(reader).get("layers", sorted(stored))
        self._layers = {layer: reader.dataset(stored[layer]) for layer in layers}
        self._texts = [reader.dataset(found[name]) for name in ("paths", "status", "error")]
        self._count = len(self._texts[0])
        if not layers:
            raise ValueError("it has no layer")
        self.dtype = str(next(iter(self._layers.values())).dtype)
        for dataset in (*self._layers.values(), *self._texts):
            if len(dataset) != self._count:
                raise ValueError(f"one dataset has {len(dataset):,} rows, another {self._count:,}")
        for layer, dataset in self._layers.items():
            if str(dataset.dtype) != self.dtype or self.dtype not in DTYPES:
                raise ValueError(f"{layer} is of the type {dataset.dtype}")
            if not math.prod(dataset.shape[1:]):
                raise ValueError(f"{layer} has no values")
        if any(dataset.dtype != TEXT or len(dataset.shape) != 1 for dataset in self._texts):
            raise ValueError("its names are no text")
        self.shapes = {layer: dataset.shape[1:] for layer, dataset in self._layers.items()}
        row_bytes = Hdf5Format(self.shapes, self.dtype).row_bytes()
        self._slab_rows = max(1, min(SLAB_ROWS, SLAB_BYTES // row_bytes))
        slabs = max(1, SLABS * SLAB_BYTES // max(SLAB_BYTES, row_bytes))
        self._slab = lru_cache(slabs)(self._read_slab)

    def names(self, start: int = 0) -> Iterator[tuple[str, str | None]]:
        """Yield the name of each row from number `start` on, and its error if it failed."""
        left = self._bytes  # every string is stored once
        with damage_as_error(self._output):
            for first in range(start, self._count, STRINGS_AT_ONCE):
                last = min(first + STRINGS_AT_ONCE, self._count)
                rows = zip(*(dataset.texts(first, last) for dataset in self._texts), strict=True)
                for name, status, error in rows:
                    left -= len(name) + len(error)
                    if status not in ("ok", "failed") or left < 0:
                        raise ValueError("its rows are neither ok nor failed, or repeat each other")
                    yield name, error if status == "failed" else None

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield all rows from number `start` on."""
        rows = self.names(start)
        for first in range(start, self._count, self._slab_rows):
            last = min(first + self._slab_rows, self._count)
            names, errors = zip(*(next(rows) for _ in range(first, last)), strict=True)
            yield Batch(names, errors, self._values(first, last))

    def __getitem__(self, number: int) -> dict[str, npt.NDArray[Any]]:
        """Return the features of row `number` by layer; NaN if it failed."""
        slab, row = divmod(number, self._slab_rows)
        return {layer: rows[row] for layer, rows in self._slab(slab).items()}

    def _read_slab(self, number: int) -> dict[str, npt.NDArray[Any]]:
        first = number * self._slab_rows
        return self._values(first, min(first + self._slab_rows, self._count))

    def _values(self, start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
        with damage_as_error(self._output):
            return {layer: dataset.rows(start, stop) for layer, dataset in self._layers.items()}


@contextmanager
def open_features(output: Path) -> Iterator[FeatureFile]:
    """Open a finished HDF5 file within a `with` block.

    Raises
    ------
    OutputError
        The file is corrupted, was not written by r2n, or is open in another program.
    """
    with ExitStack() as stack:
        with damage_as_error(output):
            file = FeatureFile(output, stack.enter_context(_opened(output)))
        yield file


@contextmanager
def _opened(output: Path) -> Iterator[Hdf5Reader]:
    file, _ = open_regular(output)
    with file:
        if locked_elsewhere(file):
            raise OutputError(f"{output}: another program is writing it. Close it there first")
        yield Hdf5Reader(file)


def _record_in(reader: Hdf5Reader) -> dict[str, Any]:
    record, left = reader.attributes(), RECORD_BYTES
    for key, value in record.items():
        if isinstance(value, str) and (value == "null" or value.startswith(("[", "{"))):
            left -= len(value)
            if left < 0:
                raise ValueError("its run record is too long")
            record[key] = json.loads(value)
    return checked_record(record)


def _column(layer: str) -> str:
    """Return the name of a layer's features in a block and in a file."""
    return f"features/{layer}"


@contextmanager
def _new_file(out: Path) -> Iterator[tuple[Any, _Disk]]:
    """Create an HDF5 file; the first failed write is raised at the end of the `with` block."""
    import h5py

    with _Disk(out, "x+b") as disk:  # "x" follows no link
        try:
            with h5py.File(disk, "w", libver="earliest") as file:  # which `Hdf5Reader` reads
                yield file, disk
        finally:
            disk.raise_error()


class _Disk(io.FileIO):
    """A file that keeps its first failed write for `raise_error` and takes the rest as written.

    The HDF5 library must not see a write fail: on a full disk it crashes the process
    (h5py 3.16: a segmentation fault while the file is closed).
    """

    error: OSError | None = None

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        written = 0
        try:
            while self.error is None and written < len(view):
                written += super().write(view[written:])
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def raise_error(self) -> None:
        """Raise the first failed write, if there was one."""
        if self.error is not None:
            raise self.error


class _Block:
    """A block that is open: an uncompressed .npz file, as numpy's own writer writes it.

    Every method raises a ValueError or a LookupError where it is something else.
    """

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        self._members = {member.filename: member for member in archive.infolist()}
        members = self._members.values()
        if sum(member.file_size for member in members) > size or any(
            member.compress_type for member in members
        ):
            raise ValueError("its arrays are larger than the file")

    def array(self, key: str) -> npt.NDArray[Any]:
        """Return an array."""
        with self._archive.open(self._members[f"{key}.npy"]) as content:
            dtype, shape = self._header(key, content)
            array = np.frombuffer(content.read(), dtype).reshape(shape)
        if dtype.kind == "U":
            characters = array.view("<u4")
            if ((characters >= 0xD800) & (characters < 0xE000) | (characters > 0x10FFFF)).any():
                raise ValueError("a text that is no Unicode")
        return array

    def header(self, key: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Return the type and shape of an array without reading it."""
        with self._archive.open(self._members[f"{key}.npy"]) as content:
            return self._header(key, content)

    def _header(self, key: str, content: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...]]:
        start = content.read(10)
        if start[:8] != b"\x93NUMPY\x01\x00":
            raise ValueError("an array of another version")
        length = int.from_bytes(start[8:], "little")
        header = _NPY_HEADER.fullmatch(content.read(length))
        if header is None:
            raise ValueError("an array of another type or shape")
        dtype = np.dtype(header[1].decode())
        shape = tuple(int(axis) for axis in header[2].split(b",") if axis.strip())
        size = self._members[f"{key}.npy"].file_size - length - len(start)
        if math.prod(shape) * dtype.itemsize != size:
            raise ValueError("an array of another size")
        return dtype, shape


@contextmanager
def _open_block(block: Path) -> Iterator[_Block]:
    file, status = open_regular(block)
    with file, zipfile.ZipFile(file) as archive:
        yield _Block(archive, status.st_size)


def _slabs(
    blocks: Sequence[Path], key: str, rows_at_once: int
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield an array of all blocks in slabs of `rows_at_once` rows, and each first row's number."""
    start, waiting = 0, []
    for block in [*blocks, None]:
        if block is not None:
            with _open_block(block) as arrays:
                waiting.append(_as_stored(arrays.array(key)))
        while waiting and (sum(map(len, waiting)) >= rows_at_once or block is None):
            joined = np.concatenate(waiting)
            slab, rest = joined[:rows_at_once], joined[rows_at_once:]
            yield start, slab
            start, waiting = start + len(slab), [rest] if len(rest) else []


def _as_stored(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if array.dtype.kind == "b":
        return np.where(array, "failed", "ok").astype(object)
    return array.astype(object) if array.dtype.kind == "U" else array


def _chunk_shape(shape: tuple[int, ...], dtype: np.dtype[Any], rows: int) -> tuple[int, ...]:
    """Return a chunk's shape: rows of at most `CHUNK_BYTES`, or a part of one larger row."""
    chunk = list(shape)
    for axis in range(len(chunk)):
        while chunk[axis] > 1 and np.prod(chunk) * dtype.itemsize > CHUNK_BYTES:
            chunk[axis] = -(-chunk[axis] // 2)
    row_bytes = int(np.prod(chunk)) * dtype.itemsize
    return (max(1, min(rows, 1024, CHUNK_BYTES // row_bytes)), *chunk)
