"""A network made ready to run on pictures: options and a checkpoint become a `Predictor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from r2ncli.architectures import Preprocessing
from r2ncli.engine import (
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
from r2ncli.images.decode import DecodeRules
from r2ncli.options import INT8, NO_LISTENERS, Listeners, RunOptions
from r2ncli.weights.checkpoints import (
    Labels,
    checked_sha256,
    find_checkpoint,
    labels_of,
    preprocessing_of,
    read_metadata,
)
from r2ncli.weights.containers import container

if TYPE_CHECKING:
    from r2ncli.images.gpu import GpuDecoder as CardDecoder
    from r2ncli.weights.loading import Checkpoint

LOGITS = "fc"  # the module whose output the logits are
GPU = "gpu"
MAX_WORKERS = 256


@dataclass(frozen=True)
class Predictor:
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


def open_predictor(
    layers: Sequence[str], options: RunOptions, listeners: Listeners = NO_LISTENERS
) -> Predictor:
    """Load the weights and get a device ready to give the outputs of `layers`.

    With the backend ``openvino`` the compiled network is kept in the cache: the next time
    neither torch nor the checkpoint's tensors are loaded.

    Raises
    ------
    UsageError, CheckpointError, DeviceError
        An option, the weights or the device do not fit.
    InputNotFoundError
        `options.calibration` has no image that can be used.
    """
    # what can be said before a large file is loaded, or even downloaded, is said before
    device, precision, pool = options.device, options.precision, options.pool
    if find_backend(options.backend, device) == "torch":
        if precision == INT8:
            raise UsageError(
                "precision 'int8' is for backend 'openvino' on a CPU: here backend 'torch' runs"
            )
        from r2ncli.engine.devices import find_devices, find_precision
        from r2ncli.weights.loading import load_checkpoint

        found = find_devices(device)[0]
        find_precision(precision, found)
        _check_decoding(options, found.type)
        checkpoint = load_checkpoint(options.weights, on_progress=listeners.on_download)
        predictor = assemble_predictor(checkpoint, layers, options)
        if predictor.engine.description.remark:
            listeners.on_warning(predictor.engine.description.remark)
        return predictor

    from r2ncli.engine import openvino

    _check_decoding(options, "cpu")
    layers = _distinct(layers)
    rules, workers = options.decode_rules(), _workers(options)
    warn = listeners.on_warning
    calibration = options.calibration
    sample: Sample | None = None
    if calibration is None:
        precision = openvino.find_precision(precision)
    else:
        from r2ncli.engine.quantization import quantizer

        made_by = quantizer()
        sample = choose_sample(calibration, rules, workers, warn)
    batch_size = options.batch_size or openvino.BATCH_SIZE
    path = find_checkpoint(options.weights, on_progress=listeners.on_download)
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
            listeners.on_quantising(len(pixels))
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
    return Predictor(
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


def assemble_predictor(
    checkpoint: Checkpoint, layers: Sequence[str], options: RunOptions
) -> Predictor:
    """Get a device ready for a checkpoint that is loaded, to give the outputs of `layers`.

    Raises
    ------
    UsageError, DeviceError
        An option or the device does not fit.
    """
    device, precision, pool, batch_size = (
        options.device,
        options.precision,
        options.pool,
        options.batch_size,
    )
    if precision == INT8:
        raise UsageError("`precision=int8` needs a checkpoint file, to keep what was quantised")
    layers = _distinct(layers)
    preprocessing = _preprocessing(checkpoint.preprocessing, options)
    shapes = _shapes(checkpoint, layers, pool, preprocessing)
    engine: Engine
    if find_backend(options.backend, device) == "torch":
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
    return Predictor(
        engine=engine,
        preprocessing=preprocessing,
        rules=options.decode_rules(),
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


def _preprocessing(checkpoints: Preprocessing, options: RunOptions) -> Preprocessing:
    return checkpoints.resized(options.image_size, options.no_crop)


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


def _check_decoding(options: RunOptions, device_kind: str) -> None:
    """Raise a UsageError where JPEGs are to be decoded on a card that does not run, or without
    the libraries for it."""
    if options.decode != GPU:
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
    options: RunOptions, description: EngineDescription, preprocessing: Preprocessing
) -> CardDecoder | None:
    _check_decoding(options, description.device_kind)
    if options.decode != GPU:
        return None
    from r2ncli.engine.devices import find_devices
    from r2ncli.images.gpu import GpuDecoder as CardDecoder

    cards = find_devices(options.device)
    return CardDecoder(cards, preprocessing, options.decode_rules())


def _workers(options: RunOptions) -> int:
    return min(options.workers or cores(), MAX_WORKERS)


def _no_such_layer(layer: str, layers: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(layer, layers, n=3, cutoff=0.4)
    hint = f"Did you mean {', '.join(near)}? " if near else ""
    return f"no layer {layer!r}. {hint}r2n extract --list-layers prints all of them"
