"""The formats of output files: how rows become a block's bytes, and blocks the file.

A format packs a block of rows, reads the names of a block back, and joins blocks into the
file that users see. Blocks, locks and renames are the writers' business.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from r2ncli.errors import UsageError
from r2ncli.outputs.rows import Classification, Features

CHUNK_BYTES = 4_000_000
STRINGS_AT_ONCE = 4096  # names held while an HDF5 file is joined
GROUP_CELLS = 200_000  # of a Parquet file's row group, which is held while it is joined

Record = Mapping[str, Any]


class Format(Protocol):
    """One kind of output file."""

    @property
    def suffix(self) -> str:
        """How its files' names end."""

    @property
    def block_suffix(self) -> str:
        """How its blocks' names end."""

    def pack(self, rows: Sequence[Any]) -> bytes:
        """A block's bytes."""

    def unpack_names(self, block: Path) -> Iterator[tuple[str, bool]]:
        """Name of each row of a block, and whether it failed."""

    def size_of(self, row: Any) -> int:
        """About how many bytes a row takes in a block."""

    def join(self, blocks: Sequence[Path], out: Path, record: Record) -> None:
        """Write the whole file."""


# --- rows: CSV, JSONL, Parquet ------------------------------------------------------------


@dataclass(frozen=True)
class RowFormat:
    """``path,status,error,index_1,wnid_1,label_1,probability_1,index_2,…``, in whatever syntax."""

    topk: int
    with_wnids: bool
    with_labels: bool

    def header(self) -> list[str]:
        """The columns' names; `wnid_k` and `label_k` only where they are known."""
        columns = ["path", "status", "error"]
        for rank in range(1, self.topk + 1):
            columns += [f"index_{rank}"]
            columns += [f"wnid_{rank}"] * self.with_wnids + [f"label_{rank}"] * self.with_labels
            columns += [f"probability_{rank}"]
        return columns

    def cells(self, row: Classification) -> list[str | int | np.float32 | None]:
        """One row, None where a cell is empty; a failed one is empty after its error."""
        if row.error is not None:
            width = self.topk * (2 + self.with_wnids + self.with_labels)
            return [row.path, "failed", row.error, *[None] * width]
        cells: list[str | int | np.float32 | None] = [row.path, "ok", None]
        for prediction in row.predictions:
            cells.append(prediction.index)
            cells += [prediction.wnid or None] * self.with_wnids
            cells += [_utf8(prediction.label) or None] * self.with_labels
            cells.append(np.float32(prediction.probability))
        return cells

    def size_of(self, row: Classification) -> int:
        return 64 * (1 + len(row.predictions))


@dataclass(frozen=True)
class CsvFormat(RowFormat):
    """RFC 4180, except that a line ends with a newline alone."""

    suffix: str = ".csv"
    block_suffix: str = ".csv"

    def lines(self, rows: Iterable[Classification]) -> Iterator[str]:
        """Rows as text; the header comes with the first, so that an error has none."""
        header = [self.header()]
        for row in rows:
            yield _csv_text([*header, self.cells(row)])
            header = []

    def pack(self, rows: Sequence[Classification]) -> bytes:
        return _csv_text(self.cells(row) for row in rows).encode()

    def unpack_names(self, block: Path) -> Iterator[tuple[str, bool]]:
        with open(block, encoding="utf-8", newline="") as file:
            for cells in csv.reader(file, strict=True):
                if len(cells) != len(self.header()):
                    raise ValueError(f"a row of {len(cells)} cells, not {len(self.header())}")
                yield cells[0], cells[1] == "failed"

    def join(self, blocks: Sequence[Path], out: Path, record: Record) -> None:
        _concatenate(_csv_text([self.header()]).encode(), blocks, out)


@dataclass(frozen=True)
class JsonlFormat(RowFormat):
    """One JSON object a line, with all keys in the columns' order."""

    suffix: str = ".jsonl"
    block_suffix: str = ".jsonl"

    def pack(self, rows: Sequence[Classification]) -> bytes:
        keys = [json.dumps(column) for column in self.header()]
        lines = []
        for row in rows:
            cells = zip(keys, map(_json_text, self.cells(row)), strict=True)
            lines.append("{" + ", ".join(f"{key}: {text}" for key, text in cells) + "}\n")
        return "".join(lines).encode()

    def unpack_names(self, block: Path) -> Iterator[tuple[str, bool]]:
        for row in json_rows(block, self.header()):
            yield row["path"], row["status"] == "failed"

    def join(self, blocks: Sequence[Path], out: Path, record: Record) -> None:
        _concatenate(b"", blocks, out)


@dataclass(frozen=True)
class ParquetFormat(JsonlFormat):
    """The columns as int32, string and float32; blocks are JSONL, only the whole is Parquet."""

    suffix: str = ".parquet"

    def join(self, blocks: Sequence[Path], out: Path, record: Record) -> None:
        import pyarrow
        import pyarrow.parquet

        columns = self.header()
        schema = pyarrow.schema([(column, _parquet_type(column)) for column in columns])
        rows = (row for block in blocks for row in json_rows(block, columns))
        group_rows = max(1, GROUP_CELLS // len(columns))  # whatever the blocks were
        with open(out, "wb") as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
            while group := list(islice(rows, group_rows)):
                writer.write_table(pyarrow.Table.from_pylist(group, schema), group_rows)


ROW_FORMATS: dict[str, type[CsvFormat | JsonlFormat | ParquetFormat]] = {
    ".csv": CsvFormat,
    ".jsonl": JsonlFormat,
    ".parquet": ParquetFormat,
}


def check_parquet() -> None:
    """Raise unless the library that writes and reads Parquet is there."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "Parquet needs pyarrow, which is not installed: pip install 'r2ncli[parquet]'"
        ) from error


def json_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises
    ------
    ValueError
        A line is no object with exactly these columns.
    """
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            row = json.loads(line)
            if not isinstance(row, dict) or list(row) != list(columns):
                raise ValueError("a line that is no object with the keys of a row")
            yield row


def _utf8(label: str | None) -> str | None:
    """`label` with what is no text, half of a surrogate pair from a JSON file, escaped."""
    if label is None or label.isascii():
        return label
    return label.encode("utf-8", "backslashreplace").decode()


def _json_text(cell: str | int | np.float32 | None) -> str:
    if isinstance(cell, np.float32):  # the shortest number that gives it back
        return str(cell) if np.isfinite(cell) else "null"
    return json.dumps(cell, ensure_ascii=False)


def _parquet_type(column: str) -> str:
    kind = column.partition("_")[0]
    return {"index": "int32", "probability": "float32"}.get(kind, "string")


def _concatenate(header: bytes, blocks: Sequence[Path], out: Path) -> None:
    with open(out, "wb") as file:
        file.write(header)
        for block in blocks:
            with open(block, "rb") as finished:
                shutil.copyfileobj(finished, file, 1 << 20)


def _csv_text(rows: Iterable[Sequence[object]]) -> str:
    return "".join([",".join(map(_csv_cell, cells)) + "\n" for cells in rows])


def _csv_cell(cell: object) -> str:
    if not isinstance(cell, str):
        return "" if cell is None else str(cell)  # of a float32 the shortest that gives it back
    if _QUOTED(cell):
        return '"' + cell.replace('"', '""') + '"'
    return cell


_QUOTED = re.compile(r'[,"\n\r]').search


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
    block_suffix: str = ".npz"

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
                    f"features/{layer}",
                    (count, *shape),
                    self.dtype,
                    chunks=chunk if count else None,  # a shard may have no rows
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
