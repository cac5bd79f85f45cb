"""Rows to write, and small functions that write and read outputs."""

from __future__ import annotations

import csv

import numpy as np

from r2ncli.outputs.formats import FORMATS, CsvFormat
from r2ncli.outputs.hdf5 import Hdf5Format
from r2ncli.outputs.partial import PartialOutput
from r2ncli.outputs.results import read_rows
from r2ncli.outputs.rows import (
    CLASSES,
    INDEX,
    LABEL,
    PROBABILITY,
    WNID,
    Batch,
    Classification,
    Features,
    Prediction,
)

ROW_FORMATS = {s: format for s, format in FORMATS.items() if format.content == CLASSES}
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


def batch_of(rows, format):
    """Records as the batch that a run would write them from."""
    names = [row.path for row in rows]
    errors = [row.error for row in rows]
    if isinstance(format, Hdf5Format):
        nothing = {layer: np.zeros(shape, "f4") for layer, shape in format.shapes.items()}
        values = [row.features if row.error is None else nothing for row in rows]
        columns = {
            layer: np.array([value[layer] for value in values], "f4").reshape(len(rows), *shape)
            for layer, shape in format.shapes.items()
        }
        return Batch(names, errors, columns)
    nothing = (Prediction(0, None, None, 0.0),) * format.topk
    found = [row.predictions if row.error is None else nothing for row in rows]
    shape = (len(rows), format.topk)
    columns = {
        INDEX: np.array([[p.index for p in row] for row in found]).reshape(shape),
        WNID: np.array([[p.wnid for p in row] for row in found], object).reshape(shape),
        LABEL: np.array([[p.label for p in row] for row in found], object).reshape(shape),
        PROBABILITY: np.array([[p.probability for p in row] for row in found], "f4").reshape(shape),
    }
    return Batch(names, errors, columns)


def append(output, *rows):
    """Append records to an output that is open."""
    output.append(batch_of(rows, output.format))


def write(output, format, rows, record=None):
    """Write all rows as one run does."""
    with PartialOutput(output, format) as partial:
        partial.begin(record or {})
        for row in rows:
            append(partial, row)
        partial.finish(record or {})


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_all(out):
    return list(read_rows(out))
