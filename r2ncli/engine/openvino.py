"""The OpenVINO engine: the CPU, in bfloat16 where it has it. It needs no torch.

What it runs is a compiled graph in bytes (`compiled`), fresh or out of the cache alike, so
that both give the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from r2ncli.engine import (
    EngineDescription,
    Outputs,
    Pixels,
    choose_precision,
    cores,
    cpu_model,
    cpu_precisions,
    empty_pixels,
)
from r2ncli.errors import DeviceError, UsageError
from r2ncli.openvino_import import CompiledModel, Core, InferRequest, Model, Tensor, get_version

BATCH_SIZE = 8  # small batches keep activations in the processor's cache

Bytes = npt.NDArray[np.uint8]

_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # of what is not quantised
_EXECUTED = {"f32": "fp32", "bf16": "bf16", "u8": "int8", "i8": "int8"}


def library() -> str:
    """The library with its version, as it is recorded."""
    return f"openvino {get_version().partition('-')[0]}"


def find_precision(name: str) -> str:
    """The precision that `name` means here; ``auto`` is the fastest that keeps top-1.

    Raises
    ------
    UsageError
        The processor, or OpenVINO on it, cannot do it; the message lists what it can.
    """
    capabilities = Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    can = [known for known in cpu_precisions() if known == "fp32" or known.upper() in capabilities]
    return choose_precision(name, can, "cpu")


def compiled(graph: Model, precision: str) -> Bytes:
    """`graph` compiled for this processor: what `OpenVinoEngine` takes.

    In ``fp32``, ``bf16``, or ``int8`` if it is quantised.

    Raises
    ------
    DeviceError
        The memory does not hold it.
    """
    with _device_errors(int(graph.inputs[0].shape[0])):
        network = Core().compile_model(
            graph, "CPU", {"INFERENCE_PRECISION_HINT": _HINTS[precision]}
        )
        return np.frombuffer(network.export_model().getbuffer(), np.uint8)


class OpenVinoEngine:
    """A compiled graph executed by OpenVINO. See `Engine` for what it takes and gives.

    As many threads as it has streams may call it at the same time.

    Parameters
    ----------
    graph : uint8 array
        What `compiled` gave for `precision`, here and with this version of OpenVINO.
    outputs : sequence of str
        Names of the graph's outputs, in their order.
    precision : str
        ``fp32``, ``bf16`` or ``int8``.
    streams : int or None
        Batches at the same time; None means what suits the processor.

    Raises
    ------
    UsageError
        The processor does not execute the precision.
    DeviceError
        The graph cannot be loaded here.
    """

    def __init__(
        self,
        graph: Bytes,
        outputs: Sequence[str],
        precision: str,
        *,
        streams: int | None = None,
    ) -> None:
        streams = streams or _streams(cores())
        with _device_errors(0):
            self._network = Core().import_model(
                Tensor(graph, shared_memory=True),
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": _HINTS[precision],
                    "NUM_STREAMS": streams,
                    "INFERENCE_NUM_THREADS": cores(),
                    "ENABLE_CPU_PINNING": False,  # decode threads and other runs use cores too
                },
            )
        self._graph = graph  # its weights are used where they lie
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
                f"precision {precision!r} on cpu: OpenVINO executes {self.description.precision} "
                f"on this processor ({self.description.device_model})"
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
            return {
                name: np.array(request.get_output_tensor(number).data)
                for number, name in enumerate(self._outputs)
            }
        finally:
            self._idle.put(request)


def _streams(cores: int) -> int:
    """One thread a stream while they are few: then no core waits for another within a layer."""
    return min(cores, max(4, cores // 4))


def _executed(network: CompiledModel) -> str:
    """The precision in which the convolutions really run, or most of them."""
    precisions = Counter(
        node.rt_info["runtimePrecision"].astype(str)
        for node in network.get_runtime_model().get_ops()
        if node.rt_info["layerType"].astype(str) == "Convolution"
    )
    most: str = precisions.most_common(1)[0][0]
    return _EXECUTED.get(most, most)


@contextmanager
def _device_errors(batch_size: int) -> Iterator[None]:
    """A failure of OpenVINO in the user's words."""
    try:
        yield
    # the last where it quotes what it could not read
    except (RuntimeError, MemoryError, UnicodeDecodeError) as error:
        reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
        hint = f" at batch size {batch_size}. Try a smaller --batch-size" if batch_size else ""
        raise DeviceError(f"cpu ({cpu_model()}): OpenVINO failed{hint}: {reason}") from error
