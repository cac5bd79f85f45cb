"""The pictures that int8 is calibrated with: which ones, their digest, their pixels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from r2ncli.architectures import Preprocessing
from r2ncli.errors import ImageError, InputNotFoundError
from r2ncli.images.decode import DecodeRules, Pixels, decode
from r2ncli.sources.names import printable
from r2ncli.sources.walk import Input, PathLike, as_sequence, find_images

MOST_PICTURES = 300

Warn = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Calibration:
    """What is recorded of a sample: its digest, and how many of its pictures could be used."""

    sha256: str
    pictures: int


@dataclass(frozen=True)
class Sample:
    """At most `MOST_PICTURES` inputs, and the SHA-256 over those of their bytes, in order."""

    inputs: tuple[Input, ...]
    sha256: str


def choose_sample(
    paths: Sequence[PathLike] | PathLike, rules: DecodeRules, workers: int, warn: Warn
) -> Sample:
    """The sample of the pictures among `paths`: each is read, and none is decoded.

    It is spread evenly over them in the order of `find_images`, because a folder of folders
    is in most cases one of classes, and its first pictures are all of the first.

    Parameters
    ----------
    paths : path or sequence of paths
        Whatever is an input.
    rules : DecodeRules
        A file beyond its `max_bytes` is not read.
    workers : int
        Threads that read.
    warn : callable
        As for `find_images`.

    Raises
    ------
    InputNotFoundError
        One of `paths` does not exist, or there is no picture that can be read.
    """
    given = as_sequence(paths)
    inputs = spread(find_images(given, warn), MOST_PICTURES)
    sha256, read, errors = _each(inputs, rules.max_bytes, workers, lambda _content: None)
    if not read:
        raise _none_usable([os.fspath(path) for path in given], errors)
    return Sample(tuple(inputs), sha256)


def decoded(
    sample: Sample, preprocessing: Preprocessing, rules: DecodeRules, workers: int, warn: Warn
) -> Pixels:
    """The network's input for the pictures of `sample`, without those that fail.

    Parameters
    ----------
    sample : Sample
        What `choose_sample` gave.
    preprocessing, rules
        As for `decode`.
    workers : int
        Threads that decode.
    warn : callable
        Takes a sentence about the pictures that fail.

    Returns
    -------
    uint8 array [N, image_size, image_size, 3]
        RGB.

    Raises
    ------
    InputNotFoundError
        None of them can be used, or they are not the same as before.
    """
    sha256, pixels, errors = _each(
        sample.inputs,
        rules.max_bytes,
        workers,
        lambda content: decode(content, preprocessing, rules),
    )
    if sha256 != sample.sha256:
        raise InputNotFoundError("--calibration: the pictures changed while they were read")
    if not pixels:
        raise _none_usable([source.name for source in sample.inputs], errors)
    if errors:
        left_out = f"{len(errors)} of {len(sample.inputs)} pictures"
        warn(f"calibration leaves out {left_out} that cannot be used, such as {errors[0]}")
    return np.stack(pixels)


def spread(inputs: Iterable[T], most: int) -> list[T]:
    """At most so many of `inputs`, evenly spread, while twice as many are held."""
    kept: list[T] = []
    stride = 1
    for number, each in enumerate(inputs):
        if number % stride:
            continue
        kept.append(each)
        if len(kept) > 2 * most:
            kept, stride = kept[::2], 2 * stride
    if len(kept) <= most:
        return kept
    return [kept[number * len(kept) // most] for number in range(most)]


def _each(
    inputs: Sequence[Input], max_bytes: int, workers: int, use: Callable[[bytes], T]
) -> tuple[str, list[T], list[str]]:
    """The digest of all that is read, what `use` makes of each, and of the others why not."""

    def attempt(source: Input) -> tuple[bytes, T | ImageError]:
        digest = b""
        try:
            content = source.read(max_bytes).content
            digest = hashlib.sha256(content).digest()
            return digest, use(content)
        except ImageError as error:
            return digest, error

    with ThreadPoolExecutor(workers, "r2n-calibrate") as threads:
        digests, outcomes = zip(*threads.map(attempt, inputs), strict=True) if inputs else ((), ())
    return (
        hashlib.sha256(b"".join(digests)).hexdigest(),
        [outcome for outcome in outcomes if not isinstance(outcome, ImageError)],
        [
            f"{source.name}: {outcome}"
            for source, outcome in zip(inputs, outcomes, strict=True)
            if isinstance(outcome, ImageError)
        ],
    )


def _none_usable(names: Sequence[str], errors: Sequence[str]) -> InputNotFoundError:
    where = ", ".join(map(printable, names[:3]))
    why = f": {errors[0]}" if errors else ""
    return InputNotFoundError(f"--calibration {where}: no picture that can be used{why}")
