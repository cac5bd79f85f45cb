"""Join the outputs of the shards of a run into one output."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import islice
from os import PathLike as OsPathLike
from pathlib import Path
from typing import Any

from r2ncli.errors import OutputError, UsageError
from r2ncli.outputs.formats import Format, format_of
from r2ncli.outputs.partial import PartialOutput, checked_output, refuse_existing
from r2ncli.outputs.record import EXECUTED, differing_settings, in_words
from r2ncli.outputs.results import existing_result, read_batches, read_format, read_record

AGAIN = "`overwrite` merges again"
MISSING_SHOWN = 10

Record = dict[str, Any]
Shard = tuple[Path, Record]


def merge(
    shards: Sequence[str | OsPathLike[str]],
    output: str | OsPathLike[str],
    *,
    overwrite: bool = False,
    on_progress: Callable[[int], None] | None = None,
    on_warning: Callable[[str], None] = lambda _: None,
) -> Record:
    """Join the finished outputs of the shards ``1/N`` to ``N/N`` into `output`, in shard order.

    Parameters
    ----------
    shards : sequence of path
        The outputs of all shards, in any order.
    output : path
        The file to write, with the same suffix.
    overwrite : bool
        Replace an existing output.
    on_progress : callable, optional
        Takes the number of rows that are copied, after each batch.
    on_warning : callable, optional
        Takes a warning as a sentence: the file system has no locks.

    Returns
    -------
    dict
        The first shard's run record with the counts of all, from the earliest start to the
        latest end.

    Raises
    ------
    UsageError
        There is no shard, or the suffixes differ.
    InputNotFoundError, OutputError
        A shard does not exist, is missing or repeated, was made with other settings, or is
        corrupted; or `output` exists or cannot be written.
    """
    paths = [existing_result(shard) for shard in shards]
    suffixes = sorted({path.suffix.lower() for path in paths})
    if len(suffixes) != 1:
        raise UsageError(
            f"all shards must have the same format, got {' and '.join(suffixes) or 'no shard'}"
        )
    out = checked_output(output, format_of(paths[0]).content, replaced=overwrite, choices=AGAIN)
    if out.suffix.lower() != suffixes[0]:
        raise UsageError(f"{out}: must end in {suffixes[0]} as the shards do")
    if any(path.samefile(out) for path in paths if out.exists()):
        raise UsageError(f"{out} is one of the shards: give another output")
    ordered = _in_order([(path, read_record(path)) for path in paths])
    _check_settings(ordered)
    record = _merged_record([record for _, record in ordered])
    done = 0
    with PartialOutput(out, _format(ordered), AGAIN, on_warning) as partial:
        if not overwrite:
            refuse_existing(out, began=bool(partial.blocks()), choices=AGAIN)
        partial.begin(record)
        for path, _ in ordered:
            for batch in read_batches(path):
                partial.append(batch)
                done += len(batch)
                if on_progress:
                    on_progress(done)
        partial.finish(record)
    return record


def _in_order(shards: list[Shard]) -> list[Shard]:
    """Return the shards by number; raise an OutputError if one is missing or repeated."""
    numbered: dict[int, Shard] = {}
    totals: dict[int, Path] = {}
    for path, record in shards:
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", str(record.get("shard")))
        if match is None or not _is_whole(record):
            raise OutputError(
                f"{path} was not made with `shard`, or its run record is missing or corrupted"
            )
        number, total = int(match[1]), int(match[2])
        totals[total] = path
        if len(totals) > 1:
            (few, one), (many, other) = totals.items()
            raise OutputError(f"{one} is one of {few} shards, {other} of {many}: not of one run")
        if number in numbered:
            raise OutputError(f"{numbered[number][0]} and {path}: both are shard {number}/{total}")
        numbered[number] = path, record
    if len(numbered) < total:
        absent = (f"{n}/{total}" for n in range(1, total + 1) if n not in numbered)
        missing = [*islice(absent, MISSING_SHOWN)]
        missing += ["…"] * (total - len(numbered) > len(missing))
        are = "shard" + " is" * (len(missing) == 1) + "s are" * (len(missing) > 1)
        raise OutputError(f"{are} missing: {', '.join(missing)}. Give all {total} shards")
    return [numbered[n] for n in sorted(numbered)]


def _is_whole(record: Record) -> bool:
    counts = record.get("counts", {})
    return all(isinstance(record.get(key), str) for key in ("fingerprint", "start", "end")) and all(
        key in counts for key in ("inputs", "ok", "failed")
    )


def _check_settings(ordered: list[Shard]) -> None:
    first, record = ordered[0]
    for path, other in ordered[1:]:
        if other["fingerprint"] != record["fingerprint"]:
            differing = in_words(differing_settings(record, other))
            raise OutputError(f"{first} and {path}: cannot be merged: {differing}")


def _format(ordered: list[Shard]) -> Format:
    """Return the common format of all shards; without rows, a shard's columns may be unknown."""
    (first, _), *others = [shard for shard in ordered if shard[1]["counts"]["inputs"]] or ordered
    format = read_format(first)
    for path, _ in others:
        if read_format(path) != format:
            raise OutputError(f"{first} and {path}: cannot be merged: columns or layers differ")
    return format


def _merged_record(records: list[Record]) -> Record:
    executed = [record[EXECUTED] for record in records if EXECUTED in record]
    return {
        **records[0],
        "shard": None,
        "counts": {
            key: sum(record["counts"][key] for record in records)
            for key in ("inputs", "ok", "failed")
        },
        **({EXECUTED: min(executed)} if executed else {}),
        "start": min(record["start"] for record in records),
        "end": max(record["end"] for record in records),
    }
