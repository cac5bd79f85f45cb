"""Find the most similar images by the features that ``r2n extract`` wrote.

    r2n extract photos -o features.h5
    python examples/nearest_neighbours.py features.h5
    python examples/nearest_neighbours.py features.h5 --query photos/cat.jpg -k 3

Similarity is the cosine of the angle between two images' features: 1 for equal images. The
features are read in chunks, so that memory does not depend on the number of images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from r2ncli import InputNotFoundError, R2NError, UsageError

Array = npt.NDArray[np.float32]
Neighbour = tuple[float, str]  # cosine similarity, path

CHUNK_BYTES = 32_000_000
QUERIES = 5  # how many images are queried if none is named


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Find similar images by their features.")
    parser.add_argument("features", help="HDF5 file that r2n extract wrote")
    parser.add_argument("--layer", help="name of a layer in the file (default: the first)")
    parser.add_argument(
        "--query",
        metavar="PATH",
        help=f"path of an image, as in the file (default: its first {QUERIES} images)",
    )
    parser.add_argument(
        "-k", type=int, default=5, help="neighbours per image (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.k < 1:
        raise UsageError("-k must be at least 1")
    with open_features(options.features) as file:
        layer = options.layer or next(iter(file["features"]))
        rows = query_rows(file, options.query)
        answers = nearest_neighbours(file, layer, rows, options.k)
        for row, neighbours in zip(rows, answers, strict=True):
            print(path_of(file, row))
            for similarity, path in neighbours:
                print(f"  {similarity:.4f}  {path}")
    return 0


def open_features(path: str) -> h5py.File:
    """Open a file that `r2n extract` wrote."""
    if not Path(path).is_file():
        raise InputNotFoundError(f"{path}: no such file")
    try:
        file = h5py.File(path)
    except OSError as error:
        raise InputNotFoundError(f"{path}: not an HDF5 file") from error
    if not file.get("features") or "paths" not in file or "status" not in file:
        raise InputNotFoundError(f"{path}: not the output of r2n extract")
    return file


def query_rows(file: h5py.File, query: str | None) -> list[int]:
    """Return the row of the image `query`; for None, the first rows that have features."""
    paths, status = file["paths"], file["status"]
    found: list[int] = []
    for start in range(0, len(paths), 100_000):
        chunk = slice(start, start + 100_000)
        wanted = status[chunk] == b"ok"
        if query is not None:
            wanted &= paths[chunk] == query.encode()
        found += (start + np.flatnonzero(wanted)).tolist()
        if len(found) >= (QUERIES if query is None else 1):
            break
    if not found:
        image = "image" if query is None else f"image {query!r}"
        raise InputNotFoundError(f"{file.filename}: no {image} with features")
    return found[: QUERIES if query is None else 1]


def nearest_neighbours(
    file: h5py.File, layer: str, rows: Sequence[int], k: int
) -> list[list[Neighbour]]:
    """Return the `k` images that are most similar to each of `rows`, the best first.

    An image is not its own neighbour. Equally similar images stay in the file's order.
    """
    if layer not in file["features"]:
        layers = ", ".join(file["features"])
        raise UsageError(f"{file.filename}: no layer {layer!r}; its layers: {layers}")
    dataset = file["features"][layer]
    queries = unit_vectors(np.stack([dataset[row] for row in rows]))
    best = np.full((len(rows), k), -np.inf, dtype=np.float32)
    best_rows = np.full((len(rows), k), -1)
    for start, vectors, failed in chunks(dataset, file["status"]):
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


def chunks(
    dataset: h5py.Dataset, status: h5py.Dataset
) -> Iterator[tuple[int, Array, npt.NDArray[np.bool_]]]:
    """Yield chunks of rows: the first row's number, unit vectors [n, D], which rows failed [n]."""
    step = max(1, CHUNK_BYTES // (4 * int(np.prod(dataset.shape[1:]))))
    for start in range(0, len(dataset), step):
        failed = status[start : start + step] != b"ok"
        yield start, unit_vectors(dataset[start : start + step]), failed


def unit_vectors(features: npt.NDArray[Any]) -> Array:
    """Return each image's features [n, ...] as one vector of length 1, float32 [n, D]."""
    vectors = features.reshape(len(features), -1).astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Array = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit


def path_of(file: h5py.File, row: int) -> str:
    path: bytes = file["paths"][row]
    return path.decode()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except R2NError as error:  # expected: one sentence, not a traceback
        print(f"nearest_neighbours: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
