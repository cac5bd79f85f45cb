"""Quantise a graph to int8 with NNCF, and choose the images that it is calibrated with.

NNCF runs in a separate process: importing it replaces Python's logger class, it prints its
progress, and it would keep memory.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np

from r2ncli.architectures import Preprocessing
from r2ncli.errors import DeviceError, ImageError, InputNotFoundError, UsageError
from r2ncli.images.decode import DecodeRules, Pixels, decode
from r2ncli.openvino_import import Core, Model, save_model, without_telemetry
from r2ncli.sources.names import printable
from r2ncli.sources.walk import Input, PathLike, as_sequence, find_images

MOST_IMAGES = 300

Warn = Callable[[str], None]
T = TypeVar("T")


# --- calibration images -------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """At most `MOST_IMAGES` inputs, and the SHA-256 of the digests of their bytes, in order.

    `rules` and the number of threads (`workers`) are for reading and decoding them.
    """

    inputs: tuple[Input, ...]
    sha256: str
    rules: DecodeRules
    workers: int


def choose_sample(
    paths: Sequence[PathLike] | PathLike, rules: DecodeRules, workers: int, warn: Warn
) -> Sample:
    """Choose a sample of the images in `paths`, and read them without decoding them.

    The sample is spread evenly over the order of `find_images`, which gets `paths` and `warn`:
    in most cases a folder of folders has one folder for each class, and the first images are
    all of one class.

    Raises
    ------
    InputNotFoundError
        One of `paths` does not exist, or no image can be read.
    """
    given = as_sequence(paths)
    inputs = spread(find_images(given, warn), MOST_IMAGES)
    sha256, read, errors = _each(inputs, rules, workers, lambda _content: None)
    if not read:
        raise _none_usable([os.fspath(path) for path in given], errors)
    return Sample(tuple(inputs), sha256, rules, workers)


def decoded(sample: Sample, preprocessing: Preprocessing, warn: Warn) -> Pixels:
    """Decode a sample into the network's input: uint8 [N, image_size, image_size, 3], RGB.

    Images that fail are left out; `warn` takes a sentence about them.

    Raises
    ------
    InputNotFoundError
        No image can be used, or the images changed since the sample was chosen.
    """
    rules = sample.rules
    sha256, pixels, errors = _each(
        sample.inputs, rules, sample.workers, lambda content: decode(content, preprocessing, rules)
    )
    if sha256 != sample.sha256:
        raise InputNotFoundError("`calibration`: the images changed while they were read")
    if not pixels:
        raise _none_usable([source.name for source in sample.inputs], errors)
    if errors:
        left_out = f"{len(errors)} of {len(sample.inputs)} images"
        warn(f"calibration leaves out {left_out} that cannot be used, such as {errors[0]}")
    return np.stack(pixels)


def spread(inputs: Iterable[T], most: int) -> list[T]:
    """Return at most `most` of `inputs`, evenly spread; hold at most twice as many."""
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
    inputs: Sequence[Input], rules: DecodeRules, workers: int, use: Callable[[bytes], T]
) -> tuple[str, list[T], list[str]]:
    """Return the digest of all contents, the results of `use`, and the errors of failed inputs."""

    def attempt(source: Input) -> tuple[bytes, list[T], list[str]]:
        digest = b""
        try:
            content = source.read(rules.max_bytes).content
            digest = hashlib.sha256(content).digest()
            return digest, [use(content)], []
        except ImageError as error:
            return digest, [], [f"{source.name}: {error}"]

    whole, results, errors = hashlib.sha256(), [], []
    with ThreadPoolExecutor(workers, "r2n-calibrate") as threads:
        for digest, result, error in threads.map(attempt, inputs):
            whole.update(digest)
            results += result
            errors += error
    return whole.hexdigest(), results, errors


def _none_usable(names: Sequence[str], errors: Sequence[str]) -> InputNotFoundError:
    where = ", ".join(map(printable, names[:3]))
    why = f": {errors[0]}" if errors else ""
    return InputNotFoundError(f"`calibration` {where}: no image can be used{why}")


# --- quantisation -------------------------------------------------------------------------


def quantizer() -> str:
    """Return the name and version of NNCF, without importing it.

    Raises
    ------
    UsageError
        It is not installed.
    """
    if find_spec("nncf") is None:
        raise UsageError("`precision=int8` needs nncf, which is not installed: pip install nncf")
    return f"nncf {version('nncf')}"


def quantized(graph: Model, pixels: Pixels) -> Model:
    """Return `graph` with weights and activations in int8.

    `graph` is for batches of one image, without batch norms (see `folded`); `pixels`, uint8
    [N, H, W, 3], are images that show the usual range of its activations.

    Raises
    ------
    DeviceError
        NNCF failed.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="r2n-int8-") as folder:
            save_model(graph, Path(folder, "graph.xml"), compress_to_fp16=False)
            np.save(Path(folder, "pixels.npy"), pixels)
            done = subprocess.run(
                [sys.executable, "-P", "-W", "ignore", "-m", __name__, folder],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            )  # fmt: skip
            if done.returncode:
                last = done.stderr.strip().rpartition("\n")[2] or f"it ended with {done.returncode}"
                raise DeviceError(f"cpu: NNCF failed to quantise the network: {last}")
            core = Core()
            core.set_property({"ENABLE_MMAP": False})  # the file is deleted
            return core.read_model(Path(folder, "quantized.xml"))
    except (OSError, RuntimeError) as error:
        raise DeviceError(f"cpu: the network cannot be quantised: {error}") from error


def _quantize(folder: Path) -> None:
    """Quantise the graph in a folder: this runs in the other process.

    The range of an activation is from its smallest to its largest value over all images.
    NNCF's default, the mean of the extremes of each image, clips more than its finer steps
    gain: on the demo checkpoint it loses 0.15 points of top-1, this setting 0.07. NNCF's
    slower bias correction gains little over the fast one, and takes twice the time and 2.8 GB.
    """
    # NNCF would import torch to find out whether the network is a torch module
    sys.modules["torch"] = None  # type: ignore[assignment]
    with without_telemetry():
        import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    pixels = np.load(folder / "pixels.npy")
    ranges = nncf.AdvancedQuantizationParameters(
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
    )
    model = nncf.quantize(
        Core().read_model(folder / "graph.xml"),
        nncf.Dataset(list(pixels[:, None])),
        subset_size=len(pixels),
        advanced_parameters=ranges,
    )
    save_model(model, folder / "quantized.xml", compress_to_fp16=False)


if __name__ == "__main__":
    _quantize(Path(sys.argv[1]))
