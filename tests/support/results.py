"""Rows to write, and small functions that write and read outputs."""

from __future__ import annotations

import csv

import numpy as np

from r2ncli.outputs.formats import CsvFormat
from r2ncli.outputs.partial import PartialOutput
from r2ncli.outputs.results import is_features, read_classifications, read_features
from r2ncli.outputs.rows import Classification, Features, Prediction

LABELLED = CsvFormat(topk=2, with_wnids=True, with_labels=True)
SHAPES = {"layer4": (5,), "layer1.0.bn1": (2,)}


def classified(path, *probabilities):
    """A classification with these probabilities."""
    return Classification(
        path, tuple(Prediction(i, f"n{i}", f"label {i}", p) for i, p in enumerate(probabilities))
    )


def features(count, failed=(), shape=(5,)):
    random = np.random.default_rng(1)
    for n in range(count):
        values = random.standard_normal(shape).astype(np.float32)
        if n in failed:
            yield Features(f"p/ü{n}.jpg", {}, "empty file")
        else:
            yield Features(f"p/ü{n}.jpg", {"layer4": values, "layer1.0.bn1": values[:2]})


def rows(count=300):
    random = np.random.default_rng(3)
    for n, (a, b) in enumerate(random.random((count, 2)).astype(np.float32).tolist()):
        if n % 7:
            yield classified(f'p/ü,"{n}\n\u2028.jpg', a, b)
        else:
            yield Classification(f"p/{n}.jpg", (), "cannot be read: no such file or directory")


def write(output, format, rows, record=None):
    """Write all rows as one run does."""
    with PartialOutput(output, format) as partial:
        partial.begin(record or {})
        for row in rows:
            partial.append(row)
        partial.finish(record or {})


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_all(out):
    return list(read_features(out) if is_features(out) else read_classifications(out))
