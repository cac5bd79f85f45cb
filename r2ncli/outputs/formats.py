"""The formats of output files, one object each: how rows are packed, joined and read back.

Adding a format is adding a class and a row of `FORMATS`: the suffixes that a command takes, the
libraries that are required and recorded, and everything that reads outputs follow from it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from r2ncli.errors import UsageError, escaped
from r2ncli.files import create
from r2ncli.outputs.hdf5 import Hdf5Format
from r2ncli.outputs.reading import (
    CELLS,
    check_last_line,
    checked_rows,
    csv_rows,
    json_rows,
    lines_of,
    of_width,
    shortened,
)
from r2ncli.outputs.rows import CLASSES, INDEX, LABEL, PROBABILITY, WNID, Batch

ROWS_AT_ONCE = 1024  # rows of a finished file that are read at a time
CELLS_AT_ONCE = 1_000_000  # fewer rows where there are more cells than these
GROUP_CHARACTERS = 256_000_000  # of the text in the rows of a Parquet file that are read at a time
GROUP_CELLS = 200_000  # of a Parquet row group, which is held in memory while it is written

Record = Mapping[str, Any]
Cells = Sequence[Any]


class Format(Protocol):
    """One kind of output file.

    Attributes
    ----------
    suffix, block_suffix : str
        How the names of its files, and of its blocks, end.
    content : str
        What its rows hold: `CLASSES` or `FEATURES` (see `rows`).
    packages : tuple of str
        Distributions that write it; they are recorded with their versions.
    holds_record : bool
        Whether the run record is inside the file; otherwise it is in a file beside it.
    """

    suffix: ClassVar[str]
    block_suffix: ClassVar[str]
    content: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    holds_record: ClassVar[bool]

    def pack(self, batches: Sequence[Batch]) -> bytes:
        """Return the bytes of a block."""

    def row_bytes(self) -> int:
        """Return about how many bytes a row takes in a block."""

    def read_block(self, block: Path) -> Iterator[tuple[str, bool]]:
        """Yield the name of each row of a block, and whether it failed."""

    def join(self, blocks: Sequence[Path], out: Path, record: Record) -> None:
        """Write the whole file."""

    @classmethod
    def of(cls, output: Path) -> Self:
        """Return the format that a finished file was written with."""

    @classmethod
    def read_record(cls, output: Path) -> dict[str, Any]:
        """Return the run record inside a finished file; an empty dict if it is not inside."""

    @classmethod
    def read_names(cls, output: Path) -> Iterator[tuple[str, bool]]:
        """Yield the name of each row of a finished file, and whether it failed."""

    @classmethod
    def read(cls, output: Path, start: int = 0) -> Iterator[Batch]:
        """Yield the rows of a finished file from number `start` on."""


# --- classes: CSV, JSONL, Parquet -----------------------------------------------------------


@dataclass(frozen=True)
class RowFormat:
    """``path,status,error,index_1,wnid_1,label_1,probability_1,index_2,…``, in any syntax.

    Attributes
    ----------
    topk : int
        Classes per row.
    with_wnids, with_labels : bool
        Whether wnids and labels are known; otherwise these columns are absent.
    """

    content: ClassVar[str] = CLASSES
    packages: ClassVar[tuple[str, ...]] = ()
    holds_record: ClassVar[bool] = False

    topk: int
    with_wnids: bool
    with_labels: bool

    def header(self) -> list[str]:
        """Return the names of the columns."""
        columns = ["path", "status", "error"]
        for rank in range(1, self.topk + 1):
            columns += [f"{name}_{rank}" for name in self._ranked()]
        return columns

    def _ranked(self) -> list[str]:
        """Return the columns of one rank, without its number."""
        return [
            INDEX,
            *[WNID] * self.with_wnids,
            *[LABEL] * self.with_labels,
            PROBABILITY,
        ]

    def texts(self, batch: Batch, text: Callable[[Any], str]) -> Iterator[tuple[str, ...]]:
        """Yield each row's cells as texts; a failed row is empty after its error.

        `text` takes a str, int, float32, or None for an empty cell.
        """
        failed = [row for row, error in enumerate(batch.errors) if error is not None]
        status = ["ok"] * len(batch)
        for row in failed:
            status[row] = "failed"
        columns = [map(text, batch.names), map(text, status), map(text, batch.errors)]
        of_class = partial(_text_of_class, text)
        ranked = {  # by column and rank
            name: [[*of_rank] for of_rank in batch.columns[name].T]
            if name == PROBABILITY
            else batch.columns[name].T.tolist()
            for name in self._ranked()
        }
        for rank in range(self.topk):
            for name, cells in ranked.items():
                for row in failed:
                    cells[rank][row] = None
                columns.append(map(of_class if name in (WNID, LABEL) else text, cells[rank]))
        return zip(*columns, strict=True)

    def row_bytes(self) -> int:
        return 64 * (1 + self.topk)

    @classmethod
    def of(cls, output: Path) -> Self:
        with cls._opened(output) as (format, _):
            return format

    @classmethod
    def read_record(cls, _output: Path) -> dict[str, Any]:
        return {}

    @classmethod
    def read_names(cls, output: Path) -> Iterator[tuple[str, bool]]:
        with cls._opened(output) as (_, rows):
            for row in checked_rows(rows):
                yield row[0], row[1] == "failed"

    @classmethod
    def read(cls, output: Path, start: int = 0) -> Iterator[Batch]:
        with cls._opened(output) as (format, rows):
            remaining = islice(checked_rows(rows), start, None)
            count = max(1, min(ROWS_AT_ONCE, CELLS_AT_ONCE // len(format.header())))
            while some := list(islice(remaining, count)):
                yield format.batch(some)

    @classmethod
    def _opened(cls, output: Path) -> AbstractContextManager[tuple[Self, Iterator[Cells]]]:
        """Return the format of a finished file, and an iterator over each row's cells."""
        raise NotImplementedError

    @classmethod
    def _with_columns(cls, columns: list[str]) -> Self:
        topk = sum(column.startswith(f"{INDEX}_") for column in columns)
        format = cls(topk, f"{WNID}_1" in columns, f"{LABEL}_1" in columns)
        if not topk or columns != format.header():
            raise ValueError("its columns are not those of an output of r2n")
        return format

    def batch(self, rows: Sequence[Cells]) -> Batch:
        """Return rows of cells, as a file has them, as a batch.

        Probabilities are the original float32 values; an empty cell is NaN.

        Raises
        ------
        ValueError, TypeError, OverflowError
            A cell has another type.
        """
        shape = len(rows), self.topk
        columns: dict[str, Any] = {
            INDEX: np.zeros(shape, np.int64),
            WNID: np.full(shape, None, object),
            LABEL: np.full(shape, None, object),
            PROBABILITY: np.full(shape, np.nan, np.float32),
        }
        names = self._ranked()
        ok = [row for row in rows if row[1] == "ok"]
        places = [number for number, row in enumerate(rows) if row[1] == "ok"]
        for place, name in enumerate(names, start=3):
            cells = [cell for row in ok for cell in row[place :: len(names)]]
            columns[name][places] = CELLS[name](cells).reshape(len(ok), self.topk)
        return Batch(
            [row[0] for row in rows],
            [None if row[1] == "ok" else row[2] or "" for row in rows],
            {name: columns[name] for name in names},
        )


@dataclass(frozen=True)
class CsvFormat(RowFormat):
    """RFC 4180, except that a line ends with a newline alone."""

    suffix: ClassVar[str] = ".csv"
    block_suffix: ClassVar[str] = ".csv"

    def head(self) -> bytes:
        """Return the first line."""
        return (",".join(map(_csv_cell, self.header())) + "\n").encode()

    def pack(self, batches: Sequence[Batch]) -> bytes:
        rows = chain.from_iterable(self.texts(batch, _csv_cell) for batch in batches)
        return "".join([",".join(cells) + "\n" for cells in rows]).encode()

    def read_block(self, block: Path) -> Iterator[tuple[str, bool]]:
        with open(block, encoding="utf-8", newline="") as file:
            for cells in checked_rows(of_width(csv_rows(file), len(self.header()))):
                yield cells[0], cells[1] == "failed"

    def join(self, blocks: Sequence[Path], out: Path, record: Record) -> None:
        _concatenate(self.head(), blocks, out)

    @classmethod
    @contextmanager
    def _opened(cls, output: Path) -> Iterator[tuple[Self, Iterator[Cells]]]:
        check_last_line(output)
        with open(output, encoding="utf-8", newline="") as text:
            rows = csv_rows(text)
            format = cls._with_columns(next(rows, []))
            yield format, of_width(rows, len(format.header()))


@dataclass(frozen=True)
class JsonlFormat(RowFormat):
    """One JSON object per line, with all keys in the order of the columns."""

    suffix: ClassVar[str] = ".jsonl"
    block_suffix: ClassVar[str] = ".jsonl"

    def head(self) -> bytes:
        """Return what comes before the first row: nothing."""
        return b""

    def pack(self, batches: Sequence[Batch]) -> bytes:
        keys = (json.dumps(column).replace("%", "%%") for column in self.header())
        line = "{" + ", ".join(f"{key}: %s" for key in keys) + "}\n"
        rows = chain.from_iterable(self.texts(batch, _json_text) for batch in batches)
        return "".join([line % cells for cells in rows]).encode()

    def read_block(self, block: Path) -> Iterator[tuple[str, bool]]:
        for row in checked_rows(map(_values, json_rows(block, self.header()))):
            yield row[0], row[1] == "failed"

    def join(self, blocks: Sequence[Path], out: Path, record: Record) -> None:
        _concatenate(b"", blocks, out)

    @classmethod
    @contextmanager
    def _opened(cls, output: Path) -> Iterator[tuple[Self, Iterator[Cells]]]:
        check_last_line(output)
        with open(output, encoding="utf-8", newline="\n") as text:
            first = next(lines_of(text), "")
        if first:
            row = json.loads(first)
            format = cls._with_columns(list(row) if isinstance(row, dict) else [])
        else:  # without rows the columns are unknown: a shard may be empty
            format = cls(0, False, False)
        yield format, map(_values, json_rows(output, format.header()))


@dataclass(frozen=True)
class ParquetFormat(JsonlFormat):
    """The columns as int32, string and float32; blocks are JSONL, only the whole is Parquet."""

    suffix: ClassVar[str] = ".parquet"
    packages: ClassVar[tuple[str, ...]] = ("pyarrow",)

    def join(self, blocks: Sequence[Path], out: Path, record: Record) -> None:
        import pyarrow
        import pyarrow.parquet

        columns = self.header()
        schema = pyarrow.schema([(column, _parquet_type(column)) for column in columns])
        rows = chain.from_iterable(map(json_rows, blocks, repeat(columns)))
        group_rows = max(1, GROUP_CELLS // len(columns))  # independent of the blocks
        with create(out) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
            while group := list(islice(rows, group_rows)):
                writer.write_table(pyarrow.Table.from_pylist(group, schema), group_rows)

    @classmethod
    @contextmanager
    def _opened(cls, output: Path) -> Iterator[tuple[Self, Iterator[Cells]]]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(output) as file:
                format = cls._with_columns(file.schema_arrow.names)
                types = [(field.name, str(field.type)) for field in file.schema_arrow]
            if any(found != _PARQUET_NAMES[_parquet_type(name)] for name, found in types):
                raise ValueError("its columns have other types")
            texts = [name for name, found in types if found == "string"]
            with pyarrow.parquet.ParquetFile(output, read_dictionary=texts) as file:
                yield format, _parquet_rows(file)
        except pyarrow.ArrowException as error:
            raise ValueError(shortened(error)) from error


FORMATS: dict[str, type[Format]] = {
    format.suffix: format for format in (CsvFormat, JsonlFormat, ParquetFormat, Hdf5Format)
}


def suffixes(content: str | None = None) -> tuple[str, ...]:
    """Return the suffixes of all formats, or of those that hold `content`."""
    return tuple(suffix for suffix, f in FORMATS.items() if content in (None, f.content))


def format_of(output: Path, content: str | None = None) -> type[Format]:
    """Return the format of files with this suffix.

    Raises
    ------
    UsageError
        No format has that suffix (and that `content`), or its libraries are not installed.
    """
    expected = suffixes(content)
    suffix = output.suffix.lower()
    if suffix not in expected:
        raise UsageError(f"{output}: the name must end in {_alternatives(expected)}")
    format = FORMATS[suffix]
    for package in format.packages:
        try:
            import_module(package)
        except ImportError as error:
            raise UsageError(
                f"{suffix} needs {package}, which is not installed: pip install {package}"
            ) from error
    return format


def _alternatives(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " or " * (len(words) > 1) + words[-1]


# --- text -----------------------------------------------------------------------------------


def _values(row: dict[str, Any]) -> Cells:
    return [*row.values()]


def _parquet_rows(file: Any) -> Iterator[Cells]:
    """Yield the rows; texts are dictionaries, so that a long one is not repeated before a check."""
    from pyarrow import compute

    for batch in file.iter_batches(ROWS_AT_ONCE, use_threads=False):
        columns, left = [], GROUP_CHARACTERS
        for column in batch.columns:
            if hasattr(column, "dictionary"):
                lengths = compute.binary_length(column.dictionary).take(column.indices)
                left -= compute.sum(lengths).as_py() or 0
                if left < 0:
                    raise ValueError("its texts are too long")
                column = column.dictionary_decode()
            columns.append(column.to_pylist())
        yield from zip(*columns, strict=True)


_PARQUET_NAMES = {"int32": "int32", "float32": "float", "string": "string"}


def _parquet_type(column: str) -> str:
    return {INDEX: "int32", PROBABILITY: "float32"}.get(column.partition("_")[0], "string")


@lru_cache(20_000)  # the same few are needed in every batch
def _text_of_class(text: Callable[[Any], str], name: str | None) -> str:
    return text(escaped(name) if name else None)


def _json_text(cell: str | int | np.float32 | None) -> str:
    if isinstance(cell, np.float32):  # the shortest text that reads back as it
        return str(cell) if np.isfinite(cell) else "null"
    return json.dumps(cell, ensure_ascii=False)


def _concatenate(head: bytes, blocks: Sequence[Path], out: Path) -> None:
    with create(out) as file:
        file.write(head)
        for block in blocks:
            with open(block, "rb") as finished:
                shutil.copyfileobj(finished, file, 1 << 20)


def _csv_cell(cell: object) -> str:
    if not isinstance(cell, str):
        return "" if cell is None else str(cell)  # of a float32 the shortest text
    if _QUOTED(cell):
        return '"' + cell.replace('"', '""') + '"'
    return cell


_QUOTED = re.compile(r'[,"\n\r]').search
