"""Read a finished output of any format: its record, its names, its rows.

Everything is streamed: at most a row group of Parquet, or a few rows of features, is in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from os import PathLike as OsPathLike
from pathlib import Path
from typing import Any

from r2ncli.errors import InputNotFoundError
from r2ncli.files import reason
from r2ncli.outputs.formats import Format, format_of
from r2ncli.outputs.reading import DAMAGE, damage_as_error, read_json_record
from r2ncli.outputs.record import read_stamps, record_path, stamps_path
from r2ncli.outputs.rows import CLASSES, Batch, classifications, features
from r2ncli.sources.content import Stamp


def existing_result(output: str | OsPathLike[str]) -> Path:
    """Check that `output` is an existing file of a known format, and return its path.

    Raises
    ------
    InputNotFoundError
        There is no such file.
    UsageError
        No format has its suffix, or the format needs a library that is not installed.
    """
    path = Path(os.path.expanduser(output))
    format_of(path)
    try:
        found = path.is_file()
    except OSError as error:
        raise InputNotFoundError(f"{path}: cannot be read: {reason(error)}") from error
    if not found:
        raise InputNotFoundError(f"no such file: {path}")
    return path


def read_record(output: Path) -> dict[str, Any]:
    """Return the run record of a finished output; an empty dict if none can be read.

    Raises
    ------
    OutputError
        Another program is writing the output.
    """
    format = format_of(output)
    try:
        if format.holds_record:
            return format.read_record(output)
        beside_link = output.with_name(output.name + ".run.json")
        path = record_path(output)
        return read_json_record(path if path.exists() else beside_link)
    except DAMAGE:
        return {}


def read_format(output: Path) -> Format:
    """Return the format of a finished output with its columns, or its layers.

    Raises
    ------
    OutputError
        The output is corrupted, or was not written by r2n.
    """
    with damage_as_error(output):
        return format_of(output).of(output)


def read_names(output: Path) -> Iterator[tuple[str, bool]]:
    """Yield the names in a finished output, in order, and whether each failed.

    Raises
    ------
    OutputError
        The output is corrupted, or was not written by r2n.
    """
    with damage_as_error(output):
        count = 0
        for row in format_of(output).read_names(output):
            yield row
            count += 1
        _check_count(output, count)


def read_batches(output: Path, start: int = 0) -> Iterator[Batch]:
    """Yield the rows of a finished output from number `start` on, as columns.

    Probabilities are the original float32 values; features have the dtype that is stored.

    Raises
    ------
    OutputError
        The output is corrupted, or was not written by r2n.
    """
    with damage_as_error(output):
        count = start
        stamps = islice(known_stamps(output), start, None)
        for batch in format_of(output).read(output, start):
            yield replace(batch, stamps=[*islice(stamps, len(batch))])
            count += len(batch)
        _check_count(output, count)


def known_stamps(output: Path) -> Iterator[Stamp | None]:
    """Yield the stamp of the file of each row of a finished output; None where it is unknown."""
    rows = read_record(output).get("counts", {}).get("inputs")
    return read_stamps(stamps_path(output), rows)


def read_rows(output: Path) -> Iterator[Any]:
    """Yield the rows of a finished output as `Classification` or `Features` (see `read_batches`).

    Raises
    ------
    OutputError
        The output is corrupted, or was not written by r2n.
    """
    records = classifications if format_of(output).content == CLASSES else features
    return (row for batch in read_batches(output) for row in records(batch))


def _check_count(output: Path, count: int) -> None:
    """Raise a ValueError if the run record counts other rows: the file may have been cut."""
    recorded = read_record(output).get("counts", {}).get("inputs", count)
    if recorded != count:
        raise ValueError(f"{count:,} rows, but its run record counts {recorded:,}")
