"""A network made ready to run on pictures: options and a checkpoint become a `Pipeline`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from r2ncli.architectures import Preprocessing
from r2ncli.engine import (
    BACKENDS,
    POOLS,
    Engine,
    EngineDescription,
    Pixels,
    cores,
    cpu_flags,
    cpu_model,
    find_backend,
    pooled_shape,
)
from r2ncli.engine.cache import Entry, loaded_entry
from r2ncli.engine.calibration import Calibration, Sample, choose_sample, decoded
from r2ncli.errors import UsageError
from r2ncli.images.decode import MAX_PIXELS, DecodeRules
from r2ncli.sources.selection import MAX_BYTES
from r2ncli.sources.walk import PathLike
from r2ncli.weights.checkpoints import (
    Labels,
    checked_sha256,
    find_checkpoint,
    labels_of,
    preprocessing_of,
    read_metadata,
)
from r2ncli.weights.containers import container
from r2ncli.weights.download import OnProgress

if TYPE_CHECKING:
    from r2ncli.images.gpu import GpuDecoder as CardDecoder
    from r2ncli.weights.loading import Checkpoint

LOGITS = "fc"  # the module whose output the logits are
DECODES = ("auto", "exact", "gpu")
GPU = DECODES[-1]
INT8 = "int8"
MAX_WORKERS = 256


class ExecutionOptions(TypedDict, total=False):
    """Keywords that say how a network is executed; see `open_pipeline`."""

    device: str
    backend: str
    precision: str
    calibration: Sequence[PathLike] | PathLike | None
    batch_size: int | None
    workers: int | None
    decode: str
    image_size: int | None
    no_crop: bool
    max_pixels: int
    max_bytes: int


class PipelineOptions(ExecutionOptions, total=False):
    """Keywords that say which network is executed, and how; see `open_pipeline`."""

    weights: str | os.PathLike[str] | None
    on_download: OnProgress | None
    on_quantising: Callable[[int], None] | None


@dataclass(frozen=True)
class Pipeline:
    """A network at work: what turns inputs into rows, and what it is made of."""

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
    shapes: dict[str, tuple[int, ...]]  # of one picture's outputs, by layer
    calibration: Calibration | None = None  # where the precision is int8
    card_decoder: CardDecoder | None = None  # where JPEGs are decoded on the card


def open_pipeline(
    layers: Sequence[str],
    pool: str = "avg",
    *,
    weights: str | os.PathLike[str] | None = None,
    on_download: OnProgress | None = None,
    on_quantising: Callable[[int], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
    **options: Unpack[ExecutionOptions],
) -> Pipeline:
    """Load the weights and get a device ready.

    With the backend ``openvino`` the compiled network is kept in the cache: the next time
    neither torch nor the checkpoint's tensors are loaded.

    Parameters
    ----------
    layers : sequence of str
        Modules of the network whose outputs are wanted.
    pool : str
        ``avg`` or ``max`` over height and width, or ``none``.
    weights : str, path or None
        A checkpoint file, a published network's name, or ``demo`` (see `find_checkpoint`).
    on_download : callable, optional
        Called with a `DownloadProgress` while weights are downloaded.
    on_quantising : callable, optional
        Called with the number of pictures before a network is quantised, which takes a while.
    on_warning : callable, optional
        Takes a sentence if the cache cannot be written, calibration pictures fail, or a card
        cannot run the quickest kernels.
    calibration : path, sequence of paths, or None
        Pictures that the precision ``int8`` is calibrated with (see `choose_sample`), which
        needs them; for logits.
    **options
        As for `assemble_pipeline`.

    Raises
    ------
    UsageError, CheckpointError, DeviceError
        An option, the weights or the device do not fit.
    InputNotFoundError
        `calibration` has no picture that can be used.
    """
    # what can be said before a large file is loaded, or even downloaded, is said before
    check_options(pool, **options)
    device, precision = options.get("device", "auto"), options.get("precision", "auto")
    if find_backend(options.get("backend", "auto"), device) == "torch":
        if precision == INT8:
            raise UsageError(
                "precision 'int8' is for backend 'openvino' on a CPU: here backend 'torch' runs"
            )
        from r2ncli.engine.devices import find_devices, find_precision
        from r2ncli.weights.loading import load_checkpoint

        found = find_devices(device)[0]
        find_precision(precision, found)
        _check_decoding(options, found.type)
        checkpoint = load_checkpoint(weights, on_progress=on_download)
        pipeline = assemble_pipeline(checkpoint, layers, pool, **options)
        if on_warning and pipeline.engine.description.remark:
            on_warning(pipeline.engine.description.remark)
        return pipeline

    from r2ncli.engine import openvino

    _check_decoding(options, "cpu")
    layers = _distinct(layers)
    rules, workers, warn = _rules(options), _workers(options), on_warning or _ignore
    calibration = options.get("calibration")
    sample: Sample | None = None
    if calibration is None:
        precision = openvino.find_precision(precision)
    else:
        from r2ncli.engine.quantization import quantizer

        made_by = quantizer()
        sample = choose_sample(calibration, rules, workers, warn)
    batch_size = options.get("batch_size") or openvino.BATCH_SIZE
    path = find_checkpoint(weights, on_progress=on_download)
    container(path)
    sha256, metadata = checked_sha256(path), read_metadata(path)
    preprocessing = _preprocessing(preprocessing_of(metadata, path), options)
    settings = {
        "library": openvino.library(),
        "processor": cpu_model(),
        "instructions": cpu_flags(),
        "sha256": sha256,
        "metadata": metadata,
        "layers": layers,
        "pool": pool,
        "preprocessing": asdict(preprocessing),
        "precision": precision,
        "batch_size": batch_size,
    }
    if sample is not None:
        settings |= {
            "calibration": sample.sha256,
            "quantizer": made_by,
            "decoder": version("pillow"),
            "rules": asdict(rules),
        }

    def compile_checkpoint() -> Entry:
        from r2ncli.weights.loading import load_file

        pixels = None
        if sample is not None:
            pixels = decoded(sample, preprocessing, rules, workers, warn)
            if on_quantising:
                on_quantising(len(pixels))
        loaded = load_file(path, sha256)
        facts = {
            "variant": loaded.variant,
            "classes": loaded.network.architecture.classes,
            "shapes": _shapes(loaded, layers, pool, preprocessing),
            "pictures": 0 if pixels is None else len(pixels),
        }
        graph = _graph(loaded, layers, pool, preprocessing, precision, batch_size, pixels)
        return Entry(facts, graph)

    def load(entry: Entry) -> openvino.OpenVinoEngine:
        return openvino.OpenVinoEngine(entry.graph, layers, precision)

    entry, engine = loaded_entry(settings, compile_checkpoint, load, warn)
    return Pipeline(
        engine=engine,
        preprocessing=preprocessing,
        rules=rules,
        workers=workers,
        checkpoint=path,
        sha256=sha256,
        variant=entry.facts["variant"],
        classes=entry.facts["classes"],
        labels=labels_of(metadata, entry.facts["classes"], path),
        pool=pool,
        shapes={layer: tuple(shape) for layer, shape in entry.facts["shapes"].items()},
        calibration=Calibration(sample.sha256, entry.facts["pictures"]) if sample else None,
    )


def open_classifier(
    topk: int,
    on_warning: Callable[[str], None] | None = None,
    **options: Unpack[PipelineOptions],
) -> Pipeline:
    """The pipeline that gives logits, after a look at `topk` (see `open_pipeline`)."""
    if topk < 1:
        raise UsageError(f"topk must be at least 1, not {topk}")
    return open_pipeline((LOGITS,), on_warning=on_warning, **options)


def open_extractor(
    layers: Sequence[str],
    pool: str,
    on_warning: Callable[[str], None] | None = None,
    **options: Unpack[PipelineOptions],
) -> Pipeline:
    """The pipeline that gives features, never in int8 (see `open_pipeline`)."""
    _refuse_int8(options.get("precision"))
    return open_pipeline(layers, pool, on_warning=on_warning, **options)


def assemble_pipeline(
    checkpoint: Checkpoint,
    layers: Sequence[str],
    pool: str = "avg",
    **options: Unpack[ExecutionOptions],
) -> Pipeline:
    """Get a device ready for a loaded checkpoint.

    Parameters
    ----------
    checkpoint : Checkpoint
        A loaded one.
    layers, pool
        As for `open_pipeline`.
    device : str
        ``auto`` (one card, or the CPU), ``cpu``, ``cuda`` (all cards of the first one's model) or
        ``cuda:N``.
    backend : str
        ``torch``, ``openvino`` (for the CPU), or ``auto``: on a CPU openvino where it is
        installed, else torch.
    precision : str
        ``auto`` (the fastest that keeps top-1), ``fp32``, ``bf16`` or ``fp16``.
    batch_size : int or None
        Pictures a batch; None means what suits the device.
    workers : int or None
        Decode threads; None means one a core.
    decode : str
        ``exact``: every pixel decoded at full size; ``auto``: JPEGs of more than twice the
        resize target reduced while they are decoded, within a grey level in the mean;
        ``gpu``: baseline JPEGs decoded on the CUDA card, the others as ``exact``.
    image_size : int or None
        The network's input in pixels; the resize target keeps the checkpoint's ratio.
    no_crop : bool
        Stretch the whole picture to the input instead of cropping its centre.
    max_pixels, max_bytes : int
        A picture, or a file, beyond it is a failed row.

    Raises
    ------
    UsageError, DeviceError
        An option or the device does not fit.
    """
    device, precision = options.get("device", "auto"), options.get("precision", "auto")
    _refuse_int8(precision)
    check_options(pool, **options)
    batch_size = options.get("batch_size")
    layers = _distinct(layers)
    preprocessing = _preprocessing(checkpoint.preprocessing, options)
    shapes = _shapes(checkpoint, layers, pool, preprocessing)
    engine: Engine
    if find_backend(options.get("backend", "auto"), device) == "torch":
        from r2ncli.engine.cuda import CudaEngine
        from r2ncli.engine.devices import find_devices
        from r2ncli.engine.pytorch import TorchEngine

        devices = find_devices(device)
        on_cards = devices[0].type == "cuda"
        engine = (partial(CudaEngine, devices=devices) if on_cards else TorchEngine)(
            checkpoint.network,
            layers,
            pool,
            preprocessing,
            precision=precision,
            batch_size=batch_size,
        )
    else:
        from r2ncli.engine import openvino

        precision = openvino.find_precision(precision)
        size = batch_size or openvino.BATCH_SIZE
        graph = _graph(checkpoint, layers, pool, preprocessing, precision, size)
        engine = openvino.OpenVinoEngine(graph, layers, precision)
    return Pipeline(
        engine=engine,
        preprocessing=preprocessing,
        rules=_rules(options),
        workers=_workers(options),
        checkpoint=checkpoint.path,
        sha256=checkpoint.sha256,
        variant=checkpoint.variant,
        classes=checkpoint.network.architecture.classes,
        labels=checkpoint.labels,
        pool=pool,
        shapes=shapes,
        card_decoder=_card_decoder(options, engine.description, preprocessing),
    )


def _distinct(layers: Sequence[str]) -> tuple[str, ...]:
    layers = tuple(dict.fromkeys([layers] if isinstance(layers, str) else layers))
    if not layers:
        raise UsageError("no layer given. r2n extract --list-layers prints all of them")
    return layers


def _preprocessing(checkpoints: Preprocessing, options: ExecutionOptions) -> Preprocessing:
    return checkpoints.resized(options.get("image_size"), options.get("no_crop", False))


def _shapes(
    checkpoint: Checkpoint, layers: Sequence[str], pool: str, preprocessing: Preprocessing
) -> dict[str, tuple[int, ...]]:
    """Shapes of one picture's outputs, by layer."""
    from r2ncli.model import layer_shapes

    shapes = layer_shapes(checkpoint.network.architecture, preprocessing.image_size)
    for layer in layers:
        if layer not in shapes:
            raise UsageError(_no_such_layer(layer, list(shapes)))
    return {layer: pooled_shape(shapes[layer], pool) for layer in layers}


def _graph(
    checkpoint: Checkpoint,
    layers: Sequence[str],
    pool: str,
    preprocessing: Preprocessing,
    precision: str,
    batch_size: int,
    calibration: Pixels | None = None,
) -> npt.NDArray[np.uint8]:
    from r2ncli.engine.graph import folded, to_graph
    from r2ncli.engine.openvino import compiled

    if calibration is None:
        graph = to_graph(checkpoint.network, layers, pool, preprocessing, batch_size)
    else:
        from r2ncli.engine.quantization import quantized

        one = to_graph(folded(checkpoint.network), layers, pool, preprocessing, 1)
        graph = quantized(one, calibration)
        graph.reshape([batch_size, *calibration.shape[1:]])
    return compiled(graph, precision)


def _rules(options: ExecutionOptions) -> DecodeRules:
    return DecodeRules(
        options.get("decode", "auto"),
        options.get("max_pixels", MAX_PIXELS),
        options.get("max_bytes", MAX_BYTES),
    )


def _check_decoding(options: ExecutionOptions, device_kind: str) -> None:
    """Raise a UsageError where JPEGs are to be decoded on a card that does not run, or without
    the libraries for it."""
    if options.get("decode") != GPU:
        return
    if device_kind != "cuda":
        raise UsageError(
            f"decode 'gpu' is for a CUDA card, and this runs on the {device_kind}: give --device "
            "cuda where there is a card, or --decode auto"
        )
    for library, source in (("torchcodec", "'r2ncli[gpu-decode]'"), ("triton", "triton")):
        if find_spec(library) is None:
            raise UsageError(f"decode 'gpu' needs {library}: pip install {source}")


def _card_decoder(
    options: ExecutionOptions, description: EngineDescription, preprocessing: Preprocessing
) -> CardDecoder | None:
    _check_decoding(options, description.device_kind)
    if options.get("decode") != GPU:
        return None
    from r2ncli.engine.devices import find_devices
    from r2ncli.images.gpu import GpuDecoder as CardDecoder

    cards = find_devices(options.get("device", "auto"))
    return CardDecoder(cards, preprocessing, _rules(options))


def _workers(options: ExecutionOptions) -> int:
    return min(options.get("workers") or cores(), MAX_WORKERS)


def check_options(pool: str = "avg", **options: Unpack[ExecutionOptions]) -> None:
    """Raise a UsageError for a value that cannot be, whatever the device and the weights are."""
    for name, value, choices in (
        ("pool", pool, POOLS),
        ("backend", options.get("backend", "auto"), BACKENDS),
        ("decode", options.get("decode", "auto"), DECODES),
    ):
        if value not in choices:
            raise UsageError(f"{name} {value!r}: expected one of {', '.join(choices)}")
    calibrated = options.get("calibration") is not None
    if options.get("precision") == INT8 and not calibrated:
        raise UsageError(
            "precision 'int8' needs pictures to be calibrated with: give --calibration PATHS, "
            "pictures like those to be classified; 300 suffice"
        )
    if calibrated and options.get("precision") != INT8:
        raise UsageError("--calibration is for --precision int8: give both, or neither")
    for name, number in (
        ("batch size", options.get("batch_size")),
        ("workers", options.get("workers")),
        ("max pixels", options.get("max_pixels")),
        ("max bytes", options.get("max_bytes")),
    ):
        if number is not None and number < 1:
            raise UsageError(f"{name} must be at least 1, not {number}")
    size = options.get("image_size")
    if size is not None and not 32 <= size <= 4096:
        raise UsageError(f"image size must be from 32 to 4096, not {size}")


def _refuse_int8(precision: str | None) -> None:
    if precision == INT8:
        raise UsageError(
            "precision 'int8' is for classify alone: it keeps top-1, not the values of features"
        )


def _no_such_layer(layer: str, layers: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(layer, layers, n=3, cutoff=0.4)
    hint = f"Did you mean {', '.join(near)}? " if near else ""
    return f"no layer {layer!r}. {hint}r2n extract --list-layers prints all of them"


def _ignore(_warning: str) -> None: ...
