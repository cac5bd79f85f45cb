"""Reads a finished output back, whatever its format: its record, its names, its rows.

Everything is streamed: at most a row group of Parquet, or a few rows of features, is in
memory. What r2n did not write, or what was cut or altered since, is an OutputError.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from os import PathLike as OsPathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r2ncli.errors import InputNotFoundError, OutputError, UsageError
from r2ncli.outputs.formats import (
    ROW_FORMATS,
    STRINGS_AT_ONCE,
    CsvFormat,
    Format,
    Hdf5Format,
    JsonlFormat,
    check_parquet,
    json_rows,
)
from r2ncli.outputs.partial import DAMAGE, record_path
from r2ncli.outputs.rows import Classification, Features, Prediction

SUFFIXES = (*ROW_FORMATS, ".h5")
# features in memory at once: a few rows each of a few places, for rows that come in another order
SLAB_ROWS, SLAB_BYTES, SLABS = 64, 4_000_000, 16

Cells = Sequence[Any]
AnyRowFormat = CsvFormat | JsonlFormat  # and ParquetFormat, which is one


def existing_result(output: str | OsPathLike[str]) -> Path:
    """`output` as the path of a result that is there.

    Raises
    ------
    InputNotFoundError
        There is no such file.
    UsageError
        It has no suffix of a result, or one that needs a library which is not there.
    """
    path = Path(output)
    is_features(path)
    if not path.is_file():
        raise InputNotFoundError(f"no such file: {path}")
    return path


def is_features(output: Path) -> bool:
    """Whether a result holds features, by its suffix.

    Raises
    ------
    UsageError
        It has no suffix of a result, or one that needs a library which is not there.
    """
    suffix = output.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{output}: a result of r2n ends in {' or '.join(SUFFIXES)}")
    if suffix == ".parquet":
        check_parquet()
    return suffix == ".h5"


def read_record(output: Path) -> dict[str, Any]:
    """The run record of a finished output; empty where it has none."""
    try:
        if is_features(output):
            import h5py

            with h5py.File(output) as file:
                return {key: _from_attribute(value) for key, value in file.attrs.items()}
        record = json.loads(record_path(output).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def read_format(output: Path) -> Format:
    """The format that a finished output was written in: its columns, or its layers.

    Raises
    ------
    OutputError
        The output is damaged, or none of r2n's.
    """
    if is_features(output):
        with open_features(output) as features:
            return Hdf5Format(features.shapes, features.dtype)
    with _damage_as_error(output), _cells(output) as (format, _):
        return format


def read_names(output: Path) -> Iterator[tuple[str, bool]]:
    """The names in a finished output, in order, and whether each failed.

    Raises
    ------
    OutputError
        The output is damaged, or none of r2n's.
    """
    if is_features(output):
        with open_features(output) as features:
            yield from ((name, error is not None) for name, error in features.names())
        return
    with _damage_as_error(output), _cells(output) as (_, rows):
        yield from ((row[0], row[1] == "failed") for row in rows)


def read_rows(output: Path) -> Iterator[Any]:
    """The rows of a finished output: a `Classification` each, or the `Features`.

    Raises
    ------
    OutputError
        The output is damaged, or none of r2n's.
    """
    return read_features(output) if is_features(output) else read_classifications(output)


def read_classifications(output: Path) -> Iterator[Classification]:
    """The rows of a finished CSV, JSONL or Parquet file, probabilities as the float32 they were.

    Raises
    ------
    OutputError
        The output is damaged, or none of r2n's.
    """
    with _damage_as_error(output), _cells(output) as (format, rows):
        for row in rows:
            yield _classification(row, format)


def read_features(output: Path) -> Iterator[Features]:
    """The rows of a finished HDF5 file, in the dtype that they are stored in.

    Raises
    ------
    OutputError
        The output is damaged, or none of r2n's.
    """
    with open_features(output) as features:
        for number, (name, error) in enumerate(features.names()):
            yield Features(name, {} if error is not None else features[number], error)


@contextmanager
def _damage_as_error(output: Path) -> Iterator[None]:
    try:
        yield
    except (*DAMAGE, TypeError, AttributeError) as error:
        raise OutputError(f"{output}: damaged, or none of r2n's ({error})") from error


def _check_count(output: Path, count: int) -> None:
    """Raise where the run record tells of more or fewer rows: whole ones may have been cut off."""
    recorded = read_record(output).get("counts", {}).get("inputs", count)
    if recorded != count:
        raise ValueError(f"{count:,} rows, {recorded:,} in its run record")


# --- rows -----------------------------------------------------------------------------


@contextmanager
def _cells(output: Path) -> Iterator[tuple[AnyRowFormat, Iterator[Cells]]]:
    """The format of a result of rows, and each row's cells."""
    suffix = output.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(output) as file:
            format = _row_format(suffix, file.schema_arrow.names)
            yield format, _counted(output, _parquet_rows(file))
        return
    _check_last_line(output)
    with open(output, encoding="utf-8", newline="") as text:
        if suffix == ".csv":
            rows = csv.reader(text, strict=True)
            format = _row_format(suffix, next(rows, []))
            yield format, _counted(output, _csv_rows(rows, len(format.header())))
        else:
            first = text.readline()
            # no row tells no columns: a shard may have none
            format = _row_format(suffix, _keys(first)) if first else JsonlFormat(0, False, False)
            objects = json_rows(output, format.header())
            yield format, _counted(output, ([*row.values()] for row in objects))


def _counted(output: Path, rows: Iterator[Cells]) -> Iterator[Cells]:
    count = 0
    for row in rows:
        if row[1] not in ("ok", "failed"):
            raise ValueError(f"status {row[1]!r}, neither ok nor failed")
        yield row
        count += 1
    _check_count(output, count)


def _csv_rows(rows: Iterator[list[str]], width: int) -> Iterator[Cells]:
    for cells in rows:
        if len(cells) != width:
            raise ValueError(f"a row of {len(cells)} cells, not {width}")
        yield cells


def _parquet_rows(file: Any) -> Iterator[Cells]:
    for group in range(file.num_row_groups):
        columns = file.read_row_group(group).columns
        yield from zip(*(column.to_pylist() for column in columns), strict=True)


def _check_last_line(output: Path) -> None:
    """Raise where a text ends inside a line: its last number may have lost digits."""
    with open(output, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        if file.read() not in (b"", b"\n"):
            raise ValueError("it ends inside a line")


def _keys(line: str) -> list[str]:
    row = json.loads(line)
    return list(row) if isinstance(row, dict) else []


def _row_format(suffix: str, columns: list[str]) -> AnyRowFormat:
    topk = sum(column.startswith("index_") for column in columns)
    format = ROW_FORMATS[suffix](topk, "wnid_1" in columns, "label_1" in columns)
    if not topk or columns != format.header():
        raise ValueError("its columns are not those of a result")
    return format


def _classification(cells: Cells, format: AnyRowFormat) -> Classification:
    path, status, error, *rest = cells
    if status == "failed":
        return Classification(path, (), error or "")
    predictions = []
    width = len(rest) // format.topk
    for start in range(0, len(rest), width):
        index, *names, probability = rest[start : start + width]
        wnid = names.pop(0) if format.with_wnids else None
        label = names.pop(0) if format.with_labels else None
        exact = float(np.float32(np.nan if probability is None else probability))
        predictions.append(Prediction(int(index), wnid or None, label or None, exact))
    return Classification(path, tuple(predictions))


# --- features ---------------------------------------------------------------------------


class FeatureFile:
    """A finished HDF5 file that is open: its names in order, its features by row number.

    Attributes
    ----------
    shapes : dict of str to tuple of int
        One row's shape by layer, in the order in which the layers were asked for.
    dtype : str
        ``float32`` or ``float16``.
    """

    def __init__(self, output: Path, file: Any) -> None:
        self._output = output
        layers = read_record(output).get("layers", sorted(file["features"]))
        datasets = {layer: file["features"][layer] for layer in layers}
        self._texts = [file[name].asstr() for name in ("paths", "status", "error")]
        self._count = len(file["paths"])
        if not layers:
            raise ValueError("it has no layer")
        for dataset in (*datasets.values(), *self._texts):
            if len(dataset) != self._count:
                raise ValueError(f"{len(dataset):,} rows of one thing, {self._count:,} of another")
        self.shapes = {layer: dataset.shape[1:] for layer, dataset in datasets.items()}
        self.dtype = str(next(iter(datasets.values())).dtype)
        row_bytes = np.dtype(self.dtype).itemsize * sum(
            math.prod(shape) for shape in self.shapes.values()
        )
        self._slab_rows = max(1, min(SLAB_ROWS, SLAB_BYTES // row_bytes))
        slabs = max(1, SLABS * SLAB_BYTES // max(SLAB_BYTES, row_bytes))
        self._slab = lru_cache(slabs)(partial(_slab, output, datasets, self._slab_rows))

    def names(self) -> Iterator[tuple[str, str | None]]:
        """Name of each row, and its error if it failed."""
        with _damage_as_error(self._output):
            paths, statuses, errors = self._texts
            for start in range(0, self._count, STRINGS_AT_ONCE):
                some = slice(start, start + STRINGS_AT_ONCE)
                rows = zip(paths[some], statuses[some], errors[some], strict=True)
                for name, status, error in rows:
                    yield name, error if status == "failed" else None
            _check_count(self._output, self._count)

    def __getitem__(self, number: int) -> dict[str, npt.NDArray[Any]]:
        """The features of row `number` by layer; NaN where it failed."""
        slab, row = divmod(number, self._slab_rows)
        return {layer: rows[row] for layer, rows in self._slab(slab).items()}


def _slab(
    output: Path, datasets: dict[str, Any], slab_rows: int, number: int
) -> dict[str, npt.NDArray[Any]]:
    with _damage_as_error(output):
        some = slice(number * slab_rows, (number + 1) * slab_rows)
        return {layer: dataset[some] for layer, dataset in datasets.items()}


@contextmanager
def open_features(output: Path) -> Iterator[FeatureFile]:
    """Open a finished HDF5 file for as long as the block lasts.

    Raises
    ------
    OutputError
        It is damaged, or none of r2n's.
    """
    import h5py

    with ExitStack() as stack:
        with _damage_as_error(output):
            file = stack.enter_context(h5py.File(output))
            features = FeatureFile(output, file)
        yield features


def _from_attribute(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str) and (value == "null" or value.startswith(("[", "{"))):
        return json.loads(value)
    return value
