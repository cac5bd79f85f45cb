"""The formats of output files: how rows become a block's bytes, and blocks the file.

A format packs a block of rows, reads the names of a block back, and joins blocks into the
file that users see. Blocks, locks and renames are the writers' business.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from r2ncli.inference import Classification, Features

CHUNK_BYTES = 4_000_000
STRINGS_AT_ONCE = 4096  # names held while an HDF5 file is joined

Record = Mapping[str, Any]


class Format(Protocol):
    """One kind of output file."""

    @property
    def suffix(self) -> str:
        """How its files' names end."""

    def pack(self, rows: Sequence[Any]) -> bytes:
        """A block's bytes."""

    def unpack_names(self, block: Path) -> Iterator[tuple[str, bool]]:
        """Name of each row of a block, and whether it failed."""

    def size_of(self, row: Any) -> int:
        """About how many bytes a row takes in a block."""

    def join(self, blocks: Sequence[Path], out: Path, record: Record) -> None:
        """Write the whole file."""


# --- CSV ------------------------------------------------------------------------------


@dataclass(frozen=True)
class CsvFormat:
    """``path,status,error,index_1,wnid_1,label_1,probability_1,index_2,…``"""

    topk: int
    with_wnids: bool
    with_labels: bool
    suffix: str = ".csv"

    def header(self) -> list[str]:
        """The columns' names; `wnid_k` and `label_k` only where they are known."""
        columns = ["path", "status", "error"]
        for rank in range(1, self.topk + 1):
            columns += [f"index_{rank}"]
            columns += [f"wnid_{rank}"] * self.with_wnids + [f"label_{rank}"] * self.with_labels
            columns += [f"probability_{rank}"]
        return columns

    def cells(self, row: Classification) -> list[str]:
        """One row; a failed one is empty after its error."""
        if row.error is not None:
            width = self.topk * (2 + self.with_wnids + self.with_labels)
            return [row.path, "failed", row.error, *[""] * width]
        cells = [row.path, "ok", ""]
        for prediction in row.predictions:
            cells.append(str(prediction.index))
            cells += [prediction.wnid or ""] * self.with_wnids
            cells += [prediction.label or ""] * self.with_labels
            cells.append(str(np.float32(prediction.probability)))  # the shortest that gives it back
        return cells

    def pack(self, rows: Sequence[Classification]) -> bytes:
        return _csv_text(self.cells(row) for row in rows).encode()

    def unpack_names(self, block: Path) -> Iterator[tuple[str, bool]]:
        with open(block, encoding="utf-8", newline="") as file:
            for cells in csv.reader(file, strict=True):
                if len(cells) != len(self.header()):
                    raise ValueError(f"a row of {len(cells)} cells, not {len(self.header())}")
                yield cells[0], cells[1] == "failed"

    def size_of(self, row: Classification) -> int:
        return 64 * (1 + len(row.predictions))

    def join(self, blocks: Sequence[Path], out: Path, record: Record) -> None:
        with open(out, "wb") as file:
            file.write(_csv_text([self.header()]).encode())
            for block in blocks:
                with open(block, "rb") as finished:
                    shutil.copyfileobj(finished, file, 1 << 20)


def csv_lines(rows: Iterable[Classification], format: CsvFormat) -> Iterator[str]:
    """Rows as text, as they come; the header comes with the first, so that an error has none."""
    header = [format.header()]
    for row in rows:
        yield _csv_text([*header, format.cells(row)])
        header = []


def _csv_text(rows: Iterable[Sequence[str]]) -> str:
    """RFC 4180, except that a line ends with a newline alone."""
    text = io.StringIO()
    for cells in rows:
        text.write(",".join(map(_quoted, cells)) + "\n")
    return text.getvalue()


def _quoted(cell: str) -> str:
    if any(character in cell for character in ',"\n\r'):
        return '"' + cell.replace('"', '""') + '"'
    return cell


# --- HDF5 -----------------------------------------------------------------------------


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

    shapes: dict[str, tuple[int, ...]]
    dtype: str = "float32"
    suffix: str = ".h5"

    def pack(self, rows: Sequence[Features]) -> bytes:
        arrays: dict[str, npt.NDArray[Any]] = {
            "paths": np.array([row.path for row in rows]),
            "errors": np.array([row.error or "" for row in rows]),
            "failed": np.array([row.error is not None for row in rows]),
        }
        for layer, shape in self.shapes.items():
            values = np.full((len(rows), *shape), np.nan, dtype=self.dtype)
            for i, row in enumerate(rows):
                if row.error is None:
                    values[i] = row.features[layer]
            arrays["features/" + layer] = values
        packed = io.BytesIO()
        np.savez(packed, allow_pickle=False, **arrays)
        return packed.getvalue()

    def unpack_names(self, block: Path) -> Iterator[tuple[str, bool]]:
        with np.load(block) as arrays:
            yield from zip(arrays["paths"].tolist(), arrays["failed"].tolist(), strict=True)

    def size_of(self, row: Features) -> int:
        return sum(
            np.dtype(self.dtype).itemsize * int(np.prod(shape)) for shape in self.shapes.values()
        )

    def join(self, blocks: Sequence[Path], out: Path, record: Record) -> None:
        count = sum(1 for block in blocks for _ in self.unpack_names(block))
        import h5py

        text = h5py.string_dtype("utf-8")
        with _hdf5_file(out) as (file, disk):
            for key, value in record.items():
                plain = isinstance(value, str | int | float)
                file.attrs[key] = value if plain else json.dumps(value, ensure_ascii=False)
            # whole chunks of fixed sizes, whatever the blocks were: the same bytes each time
            for layer, shape in self.shapes.items():
                chunk = _chunk_shape(shape, np.dtype(self.dtype), count)
                dataset = file.create_dataset(
                    f"features/{layer}", (count, *shape), self.dtype, chunks=chunk
                )
                for start, rows in _slabs(blocks, f"features/{layer}", chunk[0]):
                    dataset[start : start + len(rows)] = rows
                    disk.raise_error()
            for name, key in (("paths", "paths"), ("status", "failed"), ("error", "errors")):
                dataset = file.create_dataset(name, (count,), text)
                for start, rows in _slabs(blocks, key, STRINGS_AT_ONCE):
                    dataset[start : start + len(rows)] = rows
                    disk.raise_error()


@contextmanager
def _hdf5_file(out: Path) -> Iterator[tuple[Any, _Disk]]:
    """A new HDF5 file, and the disk below it, whose first failed write is raised at the end."""
    import h5py

    with _Disk(out, "w+b") as disk:
        try:
            with h5py.File(disk, "w") as file:
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
        """Raise what went wrong, if anything did."""
        if self.error is not None:
            raise self.error


def _slabs(
    blocks: Sequence[Path], key: str, rows_at_once: int
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """One array of all blocks, `rows_at_once` rows at a time, each with its first row's number."""
    start, waiting = 0, []
    for block in [*blocks, None]:
        if block is not None:
            with np.load(block) as arrays:
                waiting.append(_as_stored(arrays[key]))
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
    """Rows together, at most `CHUNK_BYTES`; a larger row is cut along its first axes."""
    chunk = list(shape)
    for axis in range(len(chunk)):
        while chunk[axis] > 1 and np.prod(chunk) * dtype.itemsize > CHUNK_BYTES:
            chunk[axis] = -(-chunk[axis] // 2)
    row_bytes = int(np.prod(chunk)) * dtype.itemsize
    return (max(1, min(rows, 1024, CHUNK_BYTES // row_bytes)), *chunk)
