"""Results: one record per image for Python, and batches of them as columns for everything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from r2ncli.sources.content import Stamp

Array = npt.NDArray[np.float32]

CLASSES, FEATURES = "classes", "features"  # what the rows of an output hold

# the columns of a batch of classifications; the features of a batch are columns by layer
INDEX, WNID, LABEL, PROBABILITY = "index", "wnid", "label", "probability"


@dataclass(frozen=True)
class Prediction:
    """One of an image's k most probable classes; `wnid` and `label` where they are known."""

    index: int
    wnid: str | None
    label: str | None
    probability: float


@dataclass(frozen=True)
class Classification:
    """One image's most probable classes, or why there are none (`error`)."""

    path: str
    predictions: tuple[Prediction, ...]
    error: str | None = None


@dataclass(frozen=True)
class Features:
    """One image's features by layer, float32 [C] or [C, H, W], or why there are none (`error`)."""

    path: str
    features: dict[str, Array]
    error: str | None = None


@dataclass(frozen=True)
class Batch:
    """The results of consecutive inputs as columns: there is no object per row.

    Attributes
    ----------
    names : sequence of str
        The identity of each input.
    errors : sequence of str or None
        Why an input failed; None where it did not.
    columns : mapping of str to array [N, ...]
        Values by the name of the column: for a classification `INDEX` (integers [N, k]),
        `PROBABILITY` (float32 [N, k]) and, where they are known, `WNID` and `LABEL` (objects,
        str or None, [N, k]), most probable first; for features one column per layer. The
        values of a failed input mean nothing.
    stamps : sequence of Stamp or None
        Size and time of the local file that an input was read from; empty where none is known.
    """

    names: Sequence[str]
    errors: Sequence[str | None]
    columns: Mapping[str, npt.NDArray[Any]]
    stamps: Sequence[Stamp | None] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: slice) -> Batch:
        columns = {name: column[rows] for name, column in self.columns.items()}
        return Batch(self.names[rows], self.errors[rows], columns, self.stamps[rows])

    def with_rows(self, rows: Sequence[int], other: Batch) -> Batch:
        """Return this batch with everything but the names of `rows` taken from `other`."""
        errors = [*self.errors]
        stamps = [*(self.stamps or [None] * len(self))]
        columns = {name: column.copy() for name, column in self.columns.items()}
        for place, row in enumerate(rows):
            errors[row] = other.errors[place]
            stamps[row] = other.stamps[place] if other.stamps else None
        for name, column in columns.items():
            column[list(rows)] = other.columns[name]
        return Batch(self.names, errors, columns, stamps)

    @property
    def failed(self) -> int:
        """How many inputs failed."""
        return sum(error is not None for error in self.errors)


def classifications(batch: Batch) -> Iterator[Classification]:
    """Yield the rows of a batch of classifications, one record each."""
    columns = batch.columns
    nothing: list[list[None]] = [[None] * len(column) for column in columns[INDEX]]
    wnids, labels = (
        columns[name].tolist() if name in columns else nothing for name in (WNID, LABEL)
    )
    ranked = zip(
        *(columns[INDEX].tolist(), wnids, labels, columns[PROBABILITY].tolist()), strict=True
    )
    for name, error, values in zip(batch.names, batch.errors, ranked, strict=True):
        found = () if error is not None else tuple(map(Prediction, *values))
        yield Classification(name, found, error)


def features(batch: Batch) -> Iterator[Features]:
    """Yield the rows of a batch of features, one record each."""
    for i, (name, error) in enumerate(zip(batch.names, batch.errors, strict=True)):
        found = {} if error is not None else {k: v[i] for k, v in batch.columns.items()}
        yield Features(name, found, error)
