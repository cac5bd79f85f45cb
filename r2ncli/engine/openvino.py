"""The backend ``openvino``: OpenVINO on the CPU.

It executes a compiled graph, which `compiled` gives as bytes. New and cached graphs are loaded
from these bytes, so that both give the same values. With a cached graph neither torch nor the
checkpoint's tensors are loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from r2ncli.architectures import cpu_batch_size
from r2ncli.engine import INT8
from r2ncli.engine.base import (
    Calibration,
    EngineDescription,
    Outputs,
    Pixels,
    ReadyNetwork,
    Setup,
    cores,
    cpu_flags,
    cpu_model,
    cpu_precisions,
    empty_pixels,
)
from r2ncli.engine.cache import Entry, loaded_entry
from r2ncli.errors import DeviceError, UsageError
from r2ncli.openvino_import import CompiledModel, Core, InferRequest, Model, Tensor, get_version

if TYPE_CHECKING:
    from r2ncli.model import Res2Net

Bytes = npt.NDArray[np.uint8]

_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # for layers that are not quantised
_EXECUTED = {"f32": "fp32", "bf16": "bf16", "u8": "int8", "i8": "int8"}


def precisions(devices: Sequence[str]) -> tuple[str, ...]:
    """Return the precisions that the CPU supports (see `BackendModule`)."""
    capabilities = Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    can = [known for known in cpu_precisions() if known == "fp32" or known.upper() in capabilities]
    return (*can, INT8)


def open_network(setup: Setup) -> ReadyNetwork:
    """Load a compiled network from the cache, or compile and cache it (see `BackendModule`)."""
    batch_size = setup.batch_size or cpu_batch_size(setup.preprocessing.image_size)

    def make() -> Entry:
        pixels = None
        if setup.sample is not None:
            from r2ncli.engine.quantization import decoded

            pixels = decoded(setup.sample, setup.preprocessing, setup.on_warning)
            setup.on_quantising(len(pixels))
        checkpoint = setup.load()
        facts = {
            "variant": checkpoint.variant,
            "classes": checkpoint.network.architecture.classes,
            "shapes": setup.shapes(checkpoint.network.architecture),
            "images": 0 if pixels is None else len(pixels),
        }
        return Entry(facts, _compiled_network(checkpoint.network, setup, batch_size, pixels))

    def load(entry: Entry) -> ReadyNetwork:
        facts, sample = entry.facts, setup.sample
        shapes = {layer: tuple(map(int, facts["shapes"][layer])) for layer in facts["shapes"]}
        calibration = None if sample is None else Calibration(sample.sha256, int(facts["images"]))
        engine = OpenVinoEngine(entry.graph, setup.layers, setup.precision)
        return ReadyNetwork(
            engine, str(facts["variant"]), int(facts["classes"]), shapes, calibration
        )

    return loaded_entry(_cache_settings(setup, batch_size), make, load, setup.on_warning)


def _cache_settings(setup: Setup, batch_size: int) -> dict[str, Any] | None:
    """Return everything that determines the compiled network; None if it is not cached."""
    if setup.identity is None:
        return None
    settings = {
        "library": library(),
        "processor": cpu_model(),
        "instructions": cpu_flags(),
        **setup.identity,
        "layers": setup.layers,
        "pool": setup.pool,
        "preprocessing": asdict(setup.preprocessing),
        "precision": setup.precision,
        "batch_size": batch_size,
    }
    if setup.sample is None:
        return settings
    from r2ncli.engine.quantization import quantizer

    return settings | {
        "calibration": setup.sample.sha256,
        "quantizer": quantizer(),
        "decoder": version("pillow"),
        "rules": asdict(setup.sample.rules),
    }


def _compiled_network(
    network: Res2Net, setup: Setup, batch_size: int, calibration: Pixels | None
) -> Bytes:
    """Return the compiled graph of `network`, quantised to int8 if there are images for it."""
    from r2ncli.engine.folding import folded
    from r2ncli.engine.graph import to_graph

    wanted = setup.layers, setup.pool, setup.preprocessing
    if calibration is None:
        graph = to_graph(network, *wanted, batch_size)
    else:
        from r2ncli.engine.quantization import quantized

        # OpenVINO would fold batch norms later; NNCF needs the convolutions that will run
        graph = quantized(to_graph(folded(network), *wanted, 1), calibration)
        graph.reshape([batch_size, *calibration.shape[1:]])
    return compiled(graph, setup.precision)


def library() -> str:
    """Return the name and version of OpenVINO, as in the run record."""
    return f"openvino {get_version().partition('-')[0]}"


def compiled(graph: Model, precision: str) -> Bytes:
    """Compile `graph` for this processor, into the bytes that `OpenVinoEngine` takes.

    The precision is ``fp32`` or ``bf16``, or ``int8`` for a quantised graph.

    Raises
    ------
    DeviceError
        There is not enough memory.
    """
    hint = {"INFERENCE_PRECISION_HINT": _HINTS[precision]}
    with _device_errors(int(graph.inputs[0].shape[0])):
        network = Core().compile_model(graph, "CPU", hint)
        return np.frombuffer(network.export_model().getbuffer(), np.uint8)


class OpenVinoEngine:
    """An `Engine` that executes a compiled graph with OpenVINO.

    As many threads as it has streams may call it at the same time; None means a number of
    streams that suits the processor. `graph` is what `compiled` returned for `precision` on
    this processor with this version of OpenVINO; `outputs` names its outputs, in their order.

    Raises
    ------
    UsageError
        The processor does not execute the precision.
    DeviceError
        The graph cannot be loaded.
    """

    def __init__(
        self, graph: Bytes, outputs: Sequence[str], precision: str, *, streams: int | None = None
    ) -> None:
        settings = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "NUM_STREAMS": streams or _streams(cores()),
            "INFERENCE_NUM_THREADS": cores(),
            "ENABLE_CPU_PINNING": False,  # decode threads and other runs use cores too
        }
        with _device_errors(0):
            shared = Tensor(graph, shared_memory=True)
            self._network = Core().import_model(shared, "CPU", settings)
        self._graph = graph  # OpenVINO uses these bytes and does not copy them
        self._outputs = tuple(outputs)
        streams, threads = (
            self._network.get_property(name) for name in ("NUM_STREAMS", "INFERENCE_NUM_THREADS")
        )
        self.description = EngineDescription(
            backend="openvino",
            library=library(),
            device="cpu",
            device_model=cpu_model(),
            precision=_executed(self._network),
            batch_size=int(self._network.inputs[0].shape[0]),
            streams=streams,
            stream_threads=-(-threads // streams),
        )
        if self.description.precision != precision:
            raise UsageError(
                f"`precision={precision}` is not supported on cpu: OpenVINO executes "
                f"{self.description.precision} on this processor ({self.description.device_model})"
            )
        self._idle: SimpleQueue[InferRequest] = SimpleQueue()
        for _ in range(streams):
            self._idle.put(self._network.create_infer_request())

    def empty_batch(self, side: int) -> Pixels:
        return empty_pixels(self.description.batch_size, side)

    def __call__(self, pixels: Pixels) -> Outputs:
        request = self._idle.get()
        try:
            with _device_errors(self.description.batch_size):
                request.set_input_tensor(Tensor(pixels, shared_memory=True))
                request.start_async()
                request.wait()
            tensors = map(request.get_output_tensor, range(len(self._outputs)))
            return {
                name: np.array(tensor.data)
                for name, tensor in zip(self._outputs, tensors, strict=True)
            }
        finally:
            self._idle.put(request)


def _streams(cores: int) -> int:
    """Return the number of streams for `cores`: with one thread each, no core waits for another."""
    return min(cores, max(4, cores // 4))


def _executed(network: CompiledModel) -> str:
    """Return the precision that most convolutions really run in."""
    precisions = Counter(
        node.rt_info["runtimePrecision"].astype(str)
        for node in network.get_runtime_model().get_ops()
        if node.rt_info["layerType"].astype(str) == "Convolution"
    )
    most: str = precisions.most_common(1)[0][0]
    return _EXECUTED.get(most, most)


@contextmanager
def _device_errors(batch_size: int) -> Iterator[None]:
    """Turn failures of OpenVINO into a DeviceError."""
    try:
        yield
    # UnicodeDecodeError: its message quotes the bytes that it could not read
    except (RuntimeError, MemoryError, UnicodeDecodeError) as error:
        reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
        hint = f" at batch size {batch_size}; use a smaller `batch_size`" if batch_size else ""
        raise DeviceError(f"cpu ({cpu_model()}): OpenVINO failed{hint}: {reason}") from error
