"""Joins the outputs of a run's shards into the output of one run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike as OsPathLike
from pathlib import Path
from typing import Any

from r2ncli.errors import OutputError, UsageError
from r2ncli.outputs.formats import Format
from r2ncli.outputs.partial import PartialOutput, checked_output, refuse_existing
from r2ncli.outputs.record import differing_settings, in_words
from r2ncli.outputs.results import existing_result, read_format, read_record, read_rows

AGAIN = "--overwrite merges again"

Record = dict[str, Any]
Shard = tuple[Path, Record]


def merge(
    shards: Sequence[str | OsPathLike[str]],
    output: str | OsPathLike[str],
    *,
    overwrite: bool = False,
) -> Record:
    """Join the finished outputs of ``--shard 1/N`` to ``N/N`` into `output`, in shard order.

    Parameters
    ----------
    shards : sequence of path
        All of them, in any order.
    output : path
        Ends as they do.
    overwrite : bool
        Replace what is there.

    Returns
    -------
    dict
        The run record: that of the first shard with the counts of all, from the earliest start
        to the latest end.

    Raises
    ------
    UsageError
        There is no shard, or the names do not end alike.
    InputNotFoundError, OutputError
        One is not there, is missing among 1 to N or there twice, was made with other settings,
        or is damaged; or `output` exists or cannot be written.
    """
    paths = [existing_result(shard) for shard in shards]
    suffixes = sorted({path.suffix.lower() for path in paths})
    if len(suffixes) != 1:
        raise UsageError(f"expected the shards of one run in one format, not {suffixes or 'none'}")
    out = checked_output(output, (suffixes[0],), overwrite=overwrite, choices=AGAIN)
    if any(path.samefile(out) for path in paths if out.exists()):
        raise UsageError(f"{out}: is one of the shards, give another output")
    ordered = _in_order([(path, read_record(path)) for path in paths])
    _check_settings(ordered)
    record = _merged_record([record for _, record in ordered])
    with PartialOutput(out, _format(ordered), again=AGAIN) as partial:
        if not overwrite:
            refuse_existing(out, began=bool(partial.blocks()), choices=AGAIN)
        partial.begin(record)
        for path, _ in ordered:
            for row in read_rows(path):
                partial.append(row)
        partial.finish(record)
    return record


def _in_order(shards: list[Shard]) -> list[Shard]:
    """The shards by number, all of 1 to N once."""
    numbered: dict[int, Shard] = {}
    totals: dict[int, Path] = {}
    for path, record in shards:
        match = re.fullmatch(r"(\d+)/(\d+)", str(record.get("shard")))
        if match is None or "fingerprint" not in record:
            raise OutputError(f"{path}: expected the output of a run with --shard, it is of none")
        number, total = int(match[1]), int(match[2])
        totals[total] = path
        if len(totals) > 1:
            (few, one), (many, other) = totals.items()
            raise OutputError(f"{one} is one of {few} shards, {other} of {many}: of two runs")
        if number in numbered:
            raise OutputError(f"{numbered[number][0]} and {path}: both are shard {number}/{total}")
        numbered[number] = path, record
    missing = [f"{n}/{total}" for n in range(1, total + 1) if n not in numbered]
    if missing:
        raise OutputError(f"missing of {total} shards: {', '.join(missing)}. Give all of them")
    return [numbered[n] for n in sorted(numbered)]


def _check_settings(ordered: list[Shard]) -> None:
    first, record = ordered[0]
    for path, other in ordered[1:]:
        if other["fingerprint"] != record["fingerprint"]:
            differing = in_words(differing_settings(record, other))
            raise OutputError(f"{first} and {path}: cannot be merged: {differing}")


def _format(ordered: list[Shard]) -> Format:
    """The one format of all; a shard without rows may not tell its columns."""
    (first, _), *others = [shard for shard in ordered if shard[1]["counts"]["inputs"]] or ordered
    format = read_format(first)
    for path, _ in others:
        if read_format(path) != format:
            raise OutputError(f"{first} and {path}: cannot be merged: other columns or layers")
    return format


def _merged_record(records: list[Record]) -> Record:
    return {
        **records[0],
        "shard": None,
        "counts": {
            key: sum(record["counts"][key] for record in records) for key in records[0]["counts"]
        },
        "start": min(record["start"] for record in records),
        "end": max(record["end"] for record in records),
    }
