"""Check what is read back from outputs, and turn the errors of corrupted ones into an OutputError.

A file that is read back may hold anything. What is taken from it has the types and sizes that r2n
writes; anything else raises an error of `DAMAGE`, within `damage_as_error`.
"""

from __future__ import annotations

import csv
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from r2ncli.errors import OutputError
from r2ncli.files import open_regular
from r2ncli.outputs.rows import INDEX, LABEL, PROBABILITY, WNID

Cells = Sequence[Any]

# every error that reading a corrupted file can cause
DAMAGE = (
    *(OSError, ValueError, LookupError, EOFError, TypeError, AttributeError),
    *(ArithmeticError, RuntimeError, MemoryError, BufferError),
    *(zipfile.BadZipFile, zlib.error, struct.error, csv.Error),
)
SHOWN = 200  # characters of such an error, or of a value from a file, in a message

ROW_CHARACTERS = 16_000_000  # of a row of text: one with 21,000 classes has a tenth of that
RECORD_BYTES = 4_000_000  # of a run record: it has some thousands
RECORD_DEPTH = 5  # of dicts and lists within each other: it has two
# the parts of a run record that are read, by the type of their values
GROUPS = (
    *("checkpoint", "device", "calibration", "versions", "inputs", "preprocessing"),
    *("decode_rules", "counts"),
)
TEXTS = ("fingerprint", "shard", "start", "end", "command")
NUMBERS = ("executed_batch_size",)


@contextmanager
def damage_as_error(output: Path) -> Iterator[None]:
    """Raise an OutputError that names `output` in place of any error that its corruption causes."""
    try:
        yield
    except DAMAGE as error:
        why = shortened(error)
        raise OutputError(f"{output}: corrupted, or not written by r2n ({why})") from error


def shortened(value: object) -> str:
    """Return an error, or a value from a file, as text for a message: one line, not too long."""
    text = " ".join(str(value).split()) or type(value).__name__
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def checked_text(value: Any) -> str:
    """Return a name or a reason that was read; raise a ValueError if it is no UTF-8 text."""
    if not isinstance(value, str):
        raise ValueError(f"a value of the type {type(value).__name__} where text is expected")
    if not value.isascii():
        value.encode()  # raises for halves of surrogate pairs
    return value


def read_json_record(path: Path) -> dict[str, Any]:
    """Return the run record in a JSON file.

    Raises
    ------
    OSError, ValueError, RecursionError
        It cannot be read, or is no run record.
    """
    file, _ = open_regular(path)
    with file:
        content = file.read(RECORD_BYTES + 1)
    if len(content) > RECORD_BYTES:
        raise ValueError("it is too long for a run record")
    return checked_record(json.loads(content.decode()))


def checked_record(record: Any) -> dict[str, Any]:
    """Return a run record that was read; raise a ValueError if a part of it has another type."""
    if not isinstance(record, dict) or not _is_shallow(record, RECORD_DEPTH):
        raise ValueError("no run record")
    layers, counts = record.get("layers", []), record.get("counts", {})
    sound = (
        all(isinstance(record.get(key, {}), dict) for key in GROUPS)
        and all(isinstance(record.get(key), str | None) for key in TEXTS)
        and all(_is_number(record.get(key, 0)) for key in NUMBERS)
        and isinstance(layers, list)
        and all(isinstance(layer, str) for layer in layers)
        and all(map(_is_number, counts.values()))
    )
    if not sound:
        raise ValueError("a run record whose parts have other types")
    json.dumps(record, ensure_ascii=False).encode()  # raises for halves of surrogate pairs
    return record


def _is_number(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_shallow(value: Any, depth: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth >= 0 and all(_is_shallow(part, depth - 1) for part in parts)


# --- rows ----------------------------------------------------------------------------------


def checked_rows(rows: Iterator[Cells]) -> Iterator[Cells]:
    for row in rows:
        checked_text(row[0])
        if row[1] not in ("ok", "failed"):
            raise ValueError(f"status {shortened(row[1])!r}, neither ok nor failed")
        checked_text(row[2] or "")
        yield row


def _indices(cells: Cells) -> npt.NDArray[np.int64]:
    _check_types(cells, int, str)
    return np.array([*map(int, cells)], np.int64)


def _probabilities(cells: Cells) -> npt.NDArray[np.float32]:
    _check_types(cells, int, float, str, NoneType)
    with np.errstate(over="ignore"):  # infinity
        return np.array([np.nan if cell is None else cell for cell in cells], np.float32)


def _labels(cells: Cells) -> npt.NDArray[Any]:
    _check_types(cells, str, NoneType)
    labels = [cell or None for cell in cells]
    checked_text("".join(filter(None, labels)))
    return np.array(labels, object)


def _check_types(cells: Cells, *types: type) -> None:
    if wrong := {*map(type, cells)} - {*types}:
        raise ValueError(f"a cell of the type {wrong.pop().__name__}")


# how the cells of each kind of column become an array
CELLS: dict[str, Callable[[Cells], npt.NDArray[Any]]] = {
    INDEX: _indices,
    PROBABILITY: _probabilities,
    WNID: _labels,
    LABEL: _labels,
}


def lines_of(file: TextIO) -> Iterator[str]:
    """Yield the lines of a text file; raise a ValueError before an endless one is in memory."""
    while line := file.readline(ROW_CHARACTERS):
        if len(line) == ROW_CHARACTERS:
            raise ValueError(f"a line of more than {ROW_CHARACTERS:,} characters")
        yield line


def csv_rows(file: TextIO) -> Iterator[list[str]]:
    """Yield the rows of a CSV file; raise a ValueError before an endless one is in memory."""
    left = ROW_CHARACTERS

    def lines() -> Iterator[str]:
        nonlocal left
        for line in lines_of(file):
            left -= len(line)
            if left < 0:
                raise ValueError(f"a row of more than {ROW_CHARACTERS:,} characters")
            yield line

    for row in csv.reader(lines(), strict=True):
        yield row
        left = ROW_CHARACTERS


def of_width(rows: Iterator[list[str]], width: int) -> Iterator[Cells]:
    for cells in rows:
        if len(cells) != width:
            raise ValueError(f"a row of {len(cells)} cells, not {width}")
        yield cells


def check_last_line(output: Path) -> None:
    """Raise a ValueError if a text ends inside a line: its last number may have lost digits."""
    with open(output, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        if file.read() not in (b"", b"\n"):
            raise ValueError("it ends inside a line")


def json_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file; raise a ValueError if a line does not have `columns`."""
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in lines_of(file):
            row = json.loads(line)
            if not isinstance(row, dict) or list(row) != list(columns):
                raise ValueError("a line that is not an object with the keys of a row")
            yield row
