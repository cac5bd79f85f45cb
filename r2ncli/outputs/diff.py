"""Compare two outputs: which rows, classes and values differ, and by how much.

It shows what an upgrade, a precision or another machine changed. Both are read side by side.
Rows in a different order (merged shards) wait in memory for their match; of features only the
row numbers are kept.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from os import PathLike as OsPathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r2ncli.errors import UsageError
from r2ncli.outputs.formats import format_of
from r2ncli.outputs.hdf5 import FeatureFile, open_features
from r2ncli.outputs.record import differing_settings
from r2ncli.outputs.results import existing_result, read_record, read_rows
from r2ncli.outputs.rows import FEATURES, Classification

EXAMPLES = 5
PROBABILITY = "probability"


@dataclass(frozen=True)
class Names:
    """How many rows, and the names of the first few."""

    count: int = 0
    examples: tuple[str, ...] = ()

    def including(self, name: str) -> Names:
        """Add a name."""
        return Names(self.count + 1, (*self.examples, name)[:EXAMPLES])


@dataclass(frozen=True)
class Largest:
    """The largest difference, infinite if one of the two values is NaN, and its row."""

    difference: float = 0.0
    path: str | None = None


@dataclass(frozen=True)
class Difference:
    """How two outputs differ.

    Attributes
    ----------
    a, b : str
        The files.
    kind : str
        ``rows`` or ``features``.
    atol : float
        Values that differ by no more than this count as equal.
    rows_a, rows_b, compared : int
        Rows of each, and rows that are ok in both.
    only_in_a, only_in_b, status_changed, beyond_atol : Names
        Rows in one output only, rows that failed in one only, rows beyond `atol`.
    top1_changed : Names or None
        Rows with another most probable class; None for features.
    largest : dict of str to Largest
        The largest difference of probabilities, or of each layer's features.
    settings : dict of str to tuple, or None
        Settings that decide values and differ; None if a run record is missing.
    """

    a: str
    b: str
    kind: str
    atol: float
    rows_a: int
    rows_b: int
    compared: int
    only_in_a: Names
    only_in_b: Names
    status_changed: Names
    top1_changed: Names | None
    beyond_atol: Names
    largest: dict[str, Largest]
    settings: dict[str, tuple[Any, Any]] | None

    @property
    def different(self) -> bool:
        """Whether any row differs; settings do not count."""
        return any(names.count for names in self.changes().values())

    def changes(self) -> dict[str, Names]:
        """Return the rows that differ, by kind, under the names of `as_dict`."""
        names = {
            "only_in_a": self.only_in_a,
            "only_in_b": self.only_in_b,
            "status_changed": self.status_changed,
            "top1_changed": self.top1_changed,
            "beyond_atol": self.beyond_atol,
        }
        return {key: value for key, value in names.items() if value is not None}

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of ``r2n diff --json``; an infinite difference is null."""
        return {
            "schema": 1,
            "a": self.a,
            "b": self.b,
            "kind": self.kind,
            "atol": self.atol,
            "different": self.different,
            "rows": {"a": self.rows_a, "b": self.rows_b, "compared": self.compared},
            **{
                key: {"count": names.count, "examples": list(names.examples)}
                for key, names in self.changes().items()
            },
            "largest": {
                name: {
                    "difference": one.difference if math.isfinite(one.difference) else None,
                    "path": one.path,
                }
                for name, one in self.largest.items()
            },
            "settings": None
            if self.settings is None
            else {key: {"a": was, "b": now} for key, (was, now) in self.settings.items()},
        }


@dataclass(frozen=True)
class _Row:
    """A row under comparison: `content` is a `Classification`, or the number of a features' row."""

    path: str
    failed: bool
    content: Any


@dataclass
class _Tally:
    """What was found so far."""

    rows_a: int = 0
    rows_b: int = 0
    compared: int = 0
    only_in_a: Names = Names()
    only_in_b: Names = Names()
    status_changed: Names = Names()
    top1_changed: Names = Names()
    beyond_atol: Names = Names()
    largest: dict[str, Largest] = field(default_factory=dict)


def diff(a: str | OsPathLike[str], b: str | OsPathLike[str], *, atol: float = 0.0) -> Difference:
    """Compare two results of either kind, in any of its formats, row by row.

    Rows are matched by name, and repeated names by occurrence. The order of the rows and the
    errors of rows that failed in both are ignored.

    Parameters
    ----------
    a, b : path
        Finished outputs of `classify_to` or of `extract_to`.
    atol : float
        Probabilities or features that differ by no more than this count as equal.

    Raises
    ------
    UsageError
        The outputs cannot be compared: one has classes and the other features, or their layers,
        shapes or numbers of classes differ.
    InputNotFoundError, OutputError
        An output does not exist, is corrupted, or was not written by r2n.
    """
    if not atol >= 0:
        raise UsageError(f"`atol` must be at least 0, not {atol}")
    first, second = existing_result(a), existing_result(b)
    of_features, second_too = (format_of(path).content == FEATURES for path in (first, second))
    if of_features != second_too:
        features, rows = (first, second) if of_features else (second, first)
        raise UsageError(f"{features} holds features and {rows} classes: they cannot be compared")
    records = read_record(first), read_record(second)
    with ExitStack() as stack:
        if of_features:
            tally = _compare_features(first, second, atol, stack)
        else:
            _check_classes(first, second, *records)
            tally = _compare(
                map(_classification_row, read_rows(first)),
                map(_classification_row, read_rows(second)),
                _probability_differences,
                atol,
            )
    return Difference(
        a=str(first),
        b=str(second),
        kind="features" if of_features else "rows",
        atol=atol,
        settings=_settings(*records),
        **{**vars(tally), "top1_changed": None if of_features else tally.top1_changed},
    )


def _settings(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]] | None:
    if "fingerprint" not in a or "fingerprint" not in b:
        return None
    differing = differing_settings(a, b)
    differing.pop("versions pyarrow", None)  # affects a file's bytes, but no value
    return differing


def _check_classes(a: Path, b: Path, record_a: dict[str, Any], record_b: dict[str, Any]) -> None:
    classes_a, classes_b = record_a.get("classes"), record_b.get("classes")
    if None not in (classes_a, classes_b) and classes_a != classes_b:
        raise UsageError(
            f"{a} is of {classes_a} classes and {b} of {classes_b}: they cannot be compared"
        )


def _classification_row(row: Classification) -> _Row:
    return _Row(row.path, row.error is not None, row)


def _probability_differences(a: Classification, b: Classification) -> dict[str, float]:
    theirs = {prediction.index: prediction.probability for prediction in b.predictions}
    both = [(p.probability, theirs[p.index]) for p in a.predictions if p.index in theirs]
    return {PROBABILITY: _largest_difference(*np.array(both or [(0.0, 0.0)]).T)}


def _compare_features(a: Path, b: Path, atol: float, stack: ExitStack) -> _Tally:
    files = [stack.enter_context(open_features(out)) for out in (a, b)]
    if files[0].shapes != files[1].shapes:
        raise UsageError(
            f"{a} has {_in_words(files[0].shapes)}, {b} has {_in_words(files[1].shapes)}: "
            "features of other layers or shapes cannot be compared"
        )

    def differences(row_a: int, row_b: int) -> dict[str, float]:
        ours, theirs = files[0][row_a], files[1][row_b]
        return {layer: _largest_difference(ours[layer], theirs[layer]) for layer in ours}

    return _compare(_feature_rows(files[0]), _feature_rows(files[1]), differences, atol)


def _feature_rows(file: FeatureFile) -> Iterator[_Row]:
    for number, (name, error) in enumerate(file.names()):
        yield _Row(name, error is not None, number)


def _in_words(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{layer} [{', '.join(map(str, shape))}]" for layer, shape in shapes.items())


def _largest_difference(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Return max |a - b|: NaN in both counts as equal, NaN in one as an infinite difference."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity minus infinity, which count as equal
        difference = np.abs(a - b)
    difference[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))


def _compare(
    a: Iterable[_Row],
    b: Iterable[_Row],
    differences: Callable[[Any, Any], dict[str, float]],
    atol: float,
) -> _Tally:
    tally = _Tally()
    for ours, theirs in _matched(iter(a), iter(b)):
        tally.rows_a += ours is not None
        tally.rows_b += theirs is not None
        if ours is None or theirs is None:
            if theirs is None:
                assert ours is not None
                tally.only_in_a = tally.only_in_a.including(ours.path)
            else:
                tally.only_in_b = tally.only_in_b.including(theirs.path)
        elif ours.failed != theirs.failed:
            tally.status_changed = tally.status_changed.including(ours.path)
        elif not ours.failed:
            tally.compared += 1
            if _top1(ours) != _top1(theirs):
                tally.top1_changed = tally.top1_changed.including(ours.path)
            found = differences(ours.content, theirs.content)
            for name, value in found.items():
                if value > tally.largest.setdefault(name, Largest()).difference:
                    tally.largest[name] = Largest(value, ours.path)
            if max(found.values()) > atol:
                tally.beyond_atol = tally.beyond_atol.including(ours.path)
    return tally


def _top1(row: _Row) -> int | None:
    return row.content.predictions[0].index if isinstance(row.content, Classification) else None


def _matched(a: Iterator[_Row], b: Iterator[_Row]) -> Iterator[tuple[_Row | None, _Row | None]]:
    """Yield pairs of rows with the same name, by occurrence; None where one output lacks the row.

    While both outputs have the same order, no row is held in memory.
    """
    waiting_a: dict[str, deque[_Row]] = {}
    waiting_b: dict[str, deque[_Row]] = {}
    for ours, theirs in zip_longest(a, b):
        if ours is not None:
            if (match := _taken(waiting_b, ours.path)) is not None:
                yield ours, match
            else:
                waiting_a.setdefault(ours.path, deque()).append(ours)
        if theirs is not None:
            if (match := _taken(waiting_a, theirs.path)) is not None:
                yield match, theirs
            else:
                waiting_b.setdefault(theirs.path, deque()).append(theirs)
    yield from ((row, None) for rows in waiting_a.values() for row in rows)
    yield from ((None, row) for rows in waiting_b.values() for row in rows)


def _taken(waiting: dict[str, deque[_Row]], path: str) -> _Row | None:
    rows = waiting.get(path)
    if rows is None:
        return None
    row = rows.popleft()
    if not rows:
        del waiting[path]
    return row
