"""Results become files: finished blocks in ``OUT.partial/``, joined and renamed at the end.

A run's output grows as blocks of at most 256 rows or 64 MB, each written under a
temporary name, fsynced and renamed: a block that exists is whole. At the end they are
joined under a temporary name, fsynced and renamed to OUT, and the folder goes. One
mechanism for every format; a format says how its block is packed, how its names are read
back, and how blocks become the file.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, TextIO

import numpy as np
import numpy.typing as npt

from r2ncli.errors import OutputError
from r2ncli.inference import Classification, Features

BLOCK_ROWS = 256
BLOCK_BYTES = 64_000_000
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
            for cells in csv.reader(file):
                yield cells[0], cells[1] == "failed"

    def size_of(self, row: Classification) -> int:
        return 64 * (1 + len(row.predictions))

    def join(self, blocks: Sequence[Path], out: Path, record: Record) -> None:
        with open(out, "wb") as file:
            file.write(_csv_text([self.header()]).encode())
            for block in blocks:
                with open(block, "rb") as finished:
                    shutil.copyfileobj(finished, file, 1 << 20)


def stream_csv(rows: Iterable[Classification], format: CsvFormat, out: TextIO) -> None:
    """Write rows as they come; the header comes with the first, so that an error has none."""
    header = [format.header()]
    for row in rows:
        out.write(_csv_text([*header, format.cells(row)]))
        out.flush()
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


# --- the partial folder -----------------------------------------------------------------


class PartialOutput:
    """The growing output of one run: ``OUT.partial/``, locked for this process.

    Entering takes the lock and reads what is there; leaving releases it. A folder that
    holds no block when an error leaves is removed.

    Attributes
    ----------
    done : int
        Rows in finished blocks.
    """

    def __init__(self, output: Path, format: Format) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self.format = format
        self.done = 0
        self._rows: list[Any] = []
        self._bytes = 0
        self._next_block = 0
        self._lock: BinaryIO | None = None

    def __enter__(self) -> PartialOutput:
        self._lock = _take_lock(self.folder, self.output)
        self._next_block = len(self.blocks())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is None:
            return
        if self.folder.is_dir() and not self.blocks():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
        self._lock = None

    def blocks(self) -> list[Path]:
        """The finished blocks, in order."""
        return sorted(self.folder.glob("block-*" + self._block_suffix()))

    def record(self) -> dict[str, Any] | None:
        """The run record that this partial output began with; None where it has none."""
        try:
            record = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def names(self) -> Iterator[tuple[str, bool]]:
        """Name of each finished row, and whether it failed."""
        for block in self.blocks():
            yield from self.format.unpack_names(block)

    def begin(self, record: Record) -> None:
        """Start from nothing: the run record first."""
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()
        self._next_block = 0
        self._write("run.json", json_bytes(record))

    def append(self, row: Any) -> None:
        """Add a row; a block that is full is written."""
        self._rows.append(row)
        self._bytes += self.format.size_of(row)
        if len(self._rows) >= BLOCK_ROWS or self._bytes >= BLOCK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the rows since the last block as a block of their own."""
        if not self._rows:
            return
        name = f"block-{self._next_block:08d}{self._block_suffix()}"
        self._write(name, self.format.pack(self._rows))
        # An interrupt before this writes the same block once more under the same name; none can
        # come in between, for signals are seen at calls and jumps only.
        done, following = self.done + len(self._rows), self._next_block + 1
        self._rows, self._bytes, self._next_block, self.done = [], 0, following, done

    def finish(self, record: Record) -> None:
        """Join the blocks, give the file its name, and remove the folder."""
        self.flush()
        blocks = self.blocks()
        needed = sum(block.stat().st_size for block in blocks)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OutputError(
                f"{self.output}: {needed:,} bytes are needed to join the finished blocks, "
                f"{free:,} are free. Make room and go on with --resume"
            )
        joined = self.folder / ("joined" + self.format.suffix)
        try:
            self.format.join(blocks, joined, record)
            _fsync(joined)
            if self.format.suffix != ".h5":  # which holds its record inside
                self._write("final.json", json_bytes(record))
                os.replace(self.folder / "final.json", record_path(self.output))
            os.replace(joined, self.output)
            _fsync(self.output.parent)
        except OSError as error:
            joined.unlink(missing_ok=True)
            raise OutputError(
                f"{self.output}: cannot be written: {_reason(error)}. All results are kept in "
                f"{self.folder}; go on with --resume"
            ) from error
        shutil.rmtree(self.folder, ignore_errors=True)

    def _block_suffix(self) -> str:
        return ".npz" if self.format.suffix == ".h5" else self.format.suffix

    def _write(self, name: str, content: bytes) -> None:
        """Write a file of the folder so that it is there whole or not at all."""
        temporary = self.folder / (name + ".tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
            _fsync(self.folder)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            kept = f". {self.done:,} finished rows are kept in {self.folder}" if self.done else ""
            resume = "; make room and go on with --resume" if self.done else ""
            raise OutputError(
                f"{self.output}: cannot be written: {_reason(error)}{kept}{resume}"
            ) from error


def record_path(output: Path) -> Path:
    """Where the run record of an output stands: beside it, ``OUT.run.json``."""
    return output.with_name(output.name + ".run.json")


def read_record(output: Path) -> dict[str, Any]:
    """The run record of a finished output; empty where it has none."""
    try:
        if output.suffix == ".h5":
            import h5py

            with h5py.File(output) as file:
                return {key: _from_attribute(value) for key, value in file.attrs.items()}
        record = json.loads(record_path(output).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def read_names(output: Path) -> Iterator[str]:
    """The names in a finished output, in order."""
    if output.suffix == ".h5":
        import h5py

        with h5py.File(output) as file:
            paths = file["paths"].asstr()
            for start in range(0, len(paths), STRINGS_AT_ONCE):
                yield from paths[start : start + STRINGS_AT_ONCE]
        return
    with open(output, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["path"]


def json_bytes(record: Record) -> bytes:
    """A record as a JSON file's content."""
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def _take_lock(folder: Path, output: Path) -> BinaryIO:
    """The lock of a partial folder, made if it is not there; one process holds it."""
    while True:
        try:
            folder.mkdir(exist_ok=True)
            lock = (folder / "lock").open("ab")
        except OSError as error:
            raise OutputError(f"{output}: cannot be written: {_reason(error)}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock"))
        except BlockingIOError:
            lock.close()
            raise OutputError(f"{output}: another r2n is writing it at this moment") from None
        except FileNotFoundError:
            ours = False  # the run that held it ended and removed the folder
        if ours:
            return lock
        lock.close()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _from_attribute(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str) and (value == "null" or value.startswith(("[", "{"))):
        return json.loads(value)
    return value


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
