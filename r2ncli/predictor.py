"""Make a network ready to run on images: options and a checkpoint become a `Predictor`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2ncli.architectures import Preprocessing
from r2ncli.engine import Backend, choose_backend, choose_precision
from r2ncli.engine.base import Calibration, Engine, Setup, cores
from r2ncli.images.decode import DecodeRules
from r2ncli.options import NO_LISTENERS, Listeners, RunOptions
from r2ncli.weights.checkpoints import CheckpointFile, Labels, open_checkpoint

if TYPE_CHECKING:
    from r2ncli.engine.quantization import Sample
    from r2ncli.weights.loading import Checkpoint

LOGITS = "fc"  # the module whose output the logits are
MAX_WORKERS = 256


@dataclass(frozen=True)
class Predictor:
    """A network that is ready to turn inputs into rows, and its settings.

    Attributes
    ----------
    engine : Engine
        Executes the network.
    preprocessing, rules : Preprocessing, DecodeRules
        How images become the network's input.
    workers : int
        Number of threads that decode.
    checkpoint, sha256, variant : Path, str, str
        The checkpoint's file, its SHA-256 and its variant.
    classes, labels : int, Labels or None
        The number of classes, and their labels if they are known.
    pool, shapes : str, dict
        How feature maps are pooled, and the shape of one image's output by layer.
    calibration : Calibration or None
        What int8 was calibrated with.
    """

    engine: Engine
    preprocessing: Preprocessing
    rules: DecodeRules
    workers: int
    checkpoint: Path
    sha256: str
    variant: str
    classes: int
    labels: Labels | None
    pool: str
    shapes: dict[str, tuple[int, ...]]
    calibration: Calibration | None = None


def open_predictor(
    layers: Sequence[str], options: RunOptions, listeners: Listeners = NO_LISTENERS
) -> Predictor:
    """Load the weights and get a device ready to compute the outputs of `layers`.

    Everything that can be checked without the weights is checked before they are downloaded or
    loaded. Neither torch nor the checkpoint's tensors are loaded if the backend finds the
    compiled network in its cache.

    Raises
    ------
    UsageError, CheckpointError, DeviceError
        An option, the weights or the device cannot be used.
    InputNotFoundError
        `options.calibration` has no image that can be used.
    """
    runs_on = _checked(options, listeners)
    sample = _calibration_sample(options, listeners)
    file = open_checkpoint(options.weights, on_progress=listeners.on_download)

    def load_tensors() -> Checkpoint:
        from r2ncli.weights.loading import load

        return load(file)

    return _opened(
        runs_on,
        layers,
        options,
        listeners,
        file,
        load_tensors,
        file.labels,
        {"sha256": file.sha256, "metadata": file.metadata},
        sample,
    )


def assemble_predictor(
    checkpoint: Checkpoint, layers: Sequence[str], options: RunOptions
) -> Predictor:
    """Get a device ready to compute the outputs of `layers` for a loaded checkpoint.

    The cache of compiled networks is not used.

    Raises
    ------
    UsageError, DeviceError
        An option or the device cannot be used.
    """
    return _opened(
        _checked(options, NO_LISTENERS),
        layers,
        options,
        NO_LISTENERS,
        checkpoint,
        lambda: checkpoint,
        lambda _classes: checkpoint.labels,
    )


def _checked(options: RunOptions, listeners: Listeners) -> tuple[Backend, tuple[str, ...], str]:
    """Choose the backend, the devices and the precision, and check that they fit."""
    backend, devices = choose_backend(options.backend, options.device, listeners.on_warning)
    return backend, devices, choose_precision(options.precision, backend, devices)


def _calibration_sample(options: RunOptions, listeners: Listeners) -> Sample | None:
    if options.calibration is None:
        return None
    from r2ncli.engine.quantization import choose_sample, quantizer

    quantizer()  # raises an error if it is not installed
    rules, workers = options.decode_rules(), _workers(options)
    return choose_sample(options.calibration, rules, workers, listeners.on_warning)


def _opened(
    runs_on: tuple[Backend, tuple[str, ...], str],
    layers: Sequence[str],
    options: RunOptions,
    listeners: Listeners,
    checkpoint: CheckpointFile | Checkpoint,
    load: Callable[[], Checkpoint],
    labels: Callable[[int], Labels | None],
    identity: Mapping[str, Any] | None = None,
    sample: Sample | None = None,
) -> Predictor:
    """Let the backend get the network ready (see `Setup` for `load`, `identity`, `sample`)."""
    backend, devices, precision = runs_on
    setup = Setup(
        load=load,
        identity=identity,
        layers=tuple(dict.fromkeys(layers)),
        pool=options.pool,
        preprocessing=checkpoint.preprocessing.resized(options.image_size, options.no_crop),
        devices=devices,
        precision=precision,
        batch_size=options.batch_size,
        sample=sample,
        on_warning=listeners.on_warning,
        on_quantising=listeners.on_quantising,
    )
    ready = backend.load().open_network(setup)
    return Predictor(
        engine=ready.engine,
        preprocessing=setup.preprocessing,
        rules=options.decode_rules(),
        workers=_workers(options),
        checkpoint=checkpoint.path,
        sha256=checkpoint.sha256,
        variant=ready.variant,
        classes=ready.classes,
        labels=labels(ready.classes),
        pool=setup.pool,
        shapes=ready.shapes,
        calibration=ready.calibration,
    )


def _workers(options: RunOptions) -> int:
    return min(options.workers or cores(), MAX_WORKERS)
