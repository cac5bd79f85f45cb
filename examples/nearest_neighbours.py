"""The most similar pictures, by the features that ``r2n extract`` wrote.

    r2n extract photos -o features.h5
    python examples/nearest_neighbours.py features.h5 --query photos/cat.jpg -k 3

Similarity is the cosine of the angle between two pictures' features, 1 for the same
picture. The features are read a piece at a time: memory does not depend on their number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Neighbour = tuple[float, str]  # cosine similarity, path

PIECE_BYTES = 32_000_000
QUERIES = 5  # how many pictures are asked for where none is named


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Find similar pictures by their features.")
    parser.add_argument("features", help="HDF5 file that r2n extract wrote")
    parser.add_argument("--layer", help="default: the file's first")
    parser.add_argument(
        "--query", metavar="PATH", help=f"as in the file (default: its first {QUERIES} pictures)"
    )
    parser.add_argument("-k", type=int, default=5, help="neighbours of each (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.k < 1:
        parser.error("-k must be at least 1")
    try:
        with h5py.File(options.features) as file:
            layer = options.layer or next(iter(file["features"]))
            rows = query_rows(file, options.query)
            answers = nearest_neighbours(file, layer, rows, options.k)
            for row, neighbours in zip(rows, answers, strict=True):
                print(path_of(file, row))
                for similarity, path in neighbours:
                    print(f"  {similarity:.4f}  {path}")
    except (OSError, LookupError) as error:
        text = error.args[0] if isinstance(error, LookupError) else error
        print(f"nearest_neighbours: {options.features}: {text}", file=sys.stderr)
        return 1
    return 0


def query_rows(file: h5py.File, query: str | None) -> list[int]:
    """The row of the picture `query`; None stands for the first few that have features."""
    paths, status = file["paths"], file["status"]
    found: list[int] = []
    for start in range(0, len(paths), 100_000):
        piece = slice(start, start + 100_000)
        wanted = status[piece] == b"ok"
        if query is not None:
            wanted &= paths[piece] == query.encode()
        found += (start + np.flatnonzero(wanted)).tolist()
        if len(found) >= (QUERIES if query is None else 1):
            break
    if not found:
        raise LookupError(f"no picture {query!r} with features" if query else "no features")
    return found[: QUERIES if query is None else 1]


def nearest_neighbours(
    file: h5py.File, layer: str, rows: Sequence[int], k: int
) -> list[list[Neighbour]]:
    """The `k` most similar pictures to each of `rows`, itself left out, the best first.

    Of equally similar ones the first in the file comes first.
    """
    if layer not in file["features"]:
        raise LookupError(f"no layer {layer!r}, there are: {', '.join(file['features'])}")
    dataset = file["features"][layer]
    queries = unit_vectors(np.stack([dataset[row] for row in rows]))
    best = np.full((len(rows), k), -np.inf, dtype=np.float32)
    best_rows = np.full((len(rows), k), -1)
    for start, vectors, failed in pieces(dataset, file["status"]):
        similarities = queries @ vectors.T
        similarities[:, failed] = -np.inf
        for number, row in enumerate(rows):
            if start <= row < start + len(vectors):
                similarities[number, row - start] = -np.inf
        numbers = np.broadcast_to(np.arange(start, start + len(vectors)), similarities.shape)
        candidates = np.concatenate([best, similarities], axis=1)
        candidate_rows = np.concatenate([best_rows, numbers], axis=1)
        order = np.argsort(-candidates, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(candidates, order, axis=1)
        best_rows = np.take_along_axis(candidate_rows, order, axis=1)
    return [
        [(float(s), path_of(file, row)) for s, row in zip(*pair, strict=True) if s > -np.inf]
        for pair in zip(best, best_rows, strict=True)
    ]


def pieces(
    dataset: h5py.Dataset, status: h5py.Dataset
) -> Iterator[tuple[int, Array, npt.NDArray[np.bool_]]]:
    """Runs of rows: the first one's number, their unit vectors [n, D], and which failed [n]."""
    step = max(1, PIECE_BYTES // (4 * int(np.prod(dataset.shape[1:]))))
    for start in range(0, len(dataset), step):
        failed = status[start : start + step] != b"ok"
        yield start, unit_vectors(dataset[start : start + step]), failed


def unit_vectors(features: npt.NDArray[Any]) -> Array:
    """Each picture's features [n, ...] as one vector of length 1, float32 [n, D]."""
    vectors = features.reshape(len(features), -1).astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Array = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit


def path_of(file: h5py.File, row: int) -> str:
    path: bytes = file["paths"][row]
    return path.decode()


if __name__ == "__main__":
    sys.exit(main())
