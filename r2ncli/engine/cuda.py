"""The CUDA engine: one CUDA graph for each GPU, and copies that overlap with computing.

    caller's batch ──► slot's pixels ──► graph ──► slot's outputs ──► pinned memory ──► caller
               upload stream        compute stream           download stream

A slot is the memory of one batch in progress. Three slots keep a GPU busy: while one batch is
computed, the outputs of the one before are downloaded and the pixels of the next are uploaded.
The slots of all GPUs wait in one queue, so the next batch goes to the GPU that is free.

The same code runs on CPU devices, for tests: torch's streams and events do nothing there, and
there is no graph.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import prod
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from r2ncli.architectures import Preprocessing
from r2ncli.engine.base import EngineDescription, Outputs, Pixels, cpu_model, pooled_shape
from r2ncli.engine.devices import DTYPES, device_errors, exact_settings, out_of_memory
from r2ncli.engine.folding import FoldedNetwork
from r2ncli.errors import DeviceError
from r2ncli.model import Res2Net, layer_shapes

SLOTS = 3  # for each GPU
WARM_UPS = 3  # torch advises to warm up before a capture, so that nothing is loaded during it

# Images in a batch at 224 x 224, by a word in the GPU's name: more for more multiprocessors. The
# numbers are estimates, not measurements.
BATCH_SIZES = {"T4": 64, "L4": 128, "A10": 128, "A100": 256, "H100": 256, "H200": 512, "B200": 512}
# The same by total memory (GiB, at least): the size for other GPUs, and the limit for those above,
# because a process may see only a part of a GPU.
BATCH_SIZES_BY_MEMORY = ((60, 512), (20, 256), (10, 128), (0, 64))
MOST_OUTPUT_BYTES = 2**29  # of a batch; each slot has them twice, on the GPU and pinned

T = TypeVar("T")
Event = torch.cuda.Event | torch.cpu.Event

_capturing = threading.Lock()  # torch captures one graph at a time in a process


def suitable_batch_size(model: str, memory: int, side: int, output_bytes: int) -> int:
    """Return the batch size for a GPU.

    It depends only on properties that never change, because the batch size affects the last
    bits of the values.

    Parameters
    ----------
    model : str
        The GPU's name.
    memory : int
        Its total memory in bytes, free or used.
    side : int
        Width and height of an image in pixels.
    output_bytes : int
        Bytes of one image's outputs.

    Returns
    -------
    int
        A power of two, 512 at most.
    """
    size = next(size for least, size in BATCH_SIZES_BY_MEMORY if memory >= least * 2**30)
    for word in re.split("[ -]", model):
        size = min(size, BATCH_SIZES.get(word, size))
    most = min(512, size * 224**2 // side**2, MOST_OUTPUT_BYTES // output_bytes)
    return 1 << max(most.bit_length() - 1, 0)


class CudaEngine:
    """An `Engine` that executes a Res2Net with torch on CUDA GPUs.

    If a GPU has too little memory for a batch, it computes the batch in halves, or halves of
    halves. The rows are then the same except for rounding, and `description` says so.

    Parameters
    ----------
    network, outputs, pool, preprocessing
        As for `FoldedNetwork`; the images have the size of the preprocessing.
    devices : sequence of torch.device
        GPUs of one model (`find_gpus`).
    precision : str
        One of `gpu_precisions`.
    batch_size : int or None
        None means the size that suits the GPU (`suitable_batch_size`).

    Raises
    ------
    DeviceError
        A GPU fails, or has too little memory for the network.
    """

    def __init__(
        self,
        network: Res2Net,
        outputs: Sequence[str],
        pool: str,
        preprocessing: Preprocessing,
        *,
        devices: Sequence[torch.device],
        precision: str,
        batch_size: int | None = None,
    ) -> None:
        first, side = devices[0], preprocessing.image_size
        if batch_size is None:
            shapes = layer_shapes(network.architecture, side)
            output_bytes = 4 * sum(prod(pooled_shape(shapes[name], pool)) for name in outputs)
            gpu = torch.cuda.get_device_properties(first)
            batch_size = suitable_batch_size(gpu.name, gpu.total_memory, side, output_bytes)
        self._description = EngineDescription(
            backend="torch",
            library=f"torch {torch.__version__}",
            device=_names(devices),
            device_model=_model(first),
            precision=precision,
            batch_size=batch_size,
            streams=SLOTS * len(devices),
        )
        shape, dtype = (batch_size, side, side, 3), DTYPES[precision]
        network_on = partial(FoldedNetwork, network, outputs, pool, preprocessing, dtype=dtype)
        self._gpus = [_Gpu(device, network_on, shape) for device in devices]
        slots = [gpu.new_slots() for gpu in self._gpus]
        self._idle: SimpleQueue[_Slot] = SimpleQueue()
        for slot in chain(*zip(*slots, strict=True)):  # the first batches go to different GPUs
            self._idle.put(slot)

    @property
    def description(self) -> EngineDescription:
        """Return what the engine actually runs."""
        rows = min(gpu.rows for gpu in self._gpus)
        if rows == self._description.batch_size:
            return self._description
        return replace(self._description, executed_batch_size=rows)

    def empty_batch(self, side: int) -> Pixels:
        shape = self._description.batch_size, side, side, 3
        pixels: Pixels = self._gpus[0].host_memory(shape, torch.uint8).numpy()
        return pixels  # the array keeps the tensor alive

    def __call__(self, pixels: Pixels) -> Outputs:
        slot = self._idle.get()
        try:
            return slot.gpu.outputs(slot, pixels)
        finally:
            self._idle.put(slot)


def _names(devices: Sequence[torch.device]) -> str:
    """Return the devices as one name: ``cuda:0``, or ``cuda:0,1``."""
    return ",".join([str(devices[0]), *(str(device.index) for device in devices[1:])])


def _model(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


@dataclass(frozen=True)
class _Slot:
    """The memory of one batch in progress, and the events at the end of its steps."""

    gpu: _Gpu
    pixels: Tensor
    outputs: Mapping[str, Tensor]
    pinned: Mapping[str, Tensor]
    uploaded: Event
    computed: Event
    downloaded: Event


class _Gpu:
    """One GPU with its network, its CUDA graph and three streams.

    All slots share one graph. Replays follow each other on the compute stream: before a replay
    the pixels of a slot are copied to the graph's memory, and after it the outputs are copied to
    the slot, all on this stream. So other streams never read or write the memory of the graph,
    which each replay overwrites. A graph for each slot would need that memory several times,
    because graphs that share memory overwrite each other's outputs. The copies within the GPU
    move a few percent of what the network itself reads and writes.

    Parameters
    ----------
    device : torch.device
        The GPU.
    network_on : callable
        Takes a device and returns the network on it.
    shape : tuple of int
        Shape of a batch of pixels.

    Attributes
    ----------
    rows : int
        Number of images that it computes at a time.
    """

    def __init__(
        self,
        device: torch.device,
        network_on: Callable[[torch.device], FoldedNetwork],
        shape: tuple[int, ...],
    ) -> None:
        self.rows = shape[0]
        self._shape = shape
        self._device = device
        self._model = _model(device)
        self._on_gpu = device.type == "cuda"
        self._torch: Any = torch.cuda if self._on_gpu else torch.cpu
        self._lock = threading.Lock()
        self._pixels: Tensor | None = None  # of the graph; None before its capture
        self._outputs: Mapping[str, Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        with self._errors():
            self._upload, self._compute, self._download = (
                self._torch.Stream(device) if self._on_gpu else None for _ in range(3)
            )
            with self._computing():
                self._network = network_on(device)

    def new_slots(self) -> list[_Slot]:
        """Allocate its slots; halve `rows` until the memory is large enough."""
        with self._errors(), self._computing():
            slots = self._halving(self._new_slots)
            self._finish()  # the next steps are on other streams
            return slots

    def outputs(self, slot: _Slot, pixels: Pixels) -> Outputs:
        """Compute the outputs for `pixels` in `slot`, which no other call uses meanwhile.

        Each step waits for the event of the step before it, and the caller waits for the last
        event. So nothing in the slot is in progress after the call, and neither the slot nor
        `pixels` needs an event before its next use. Another call may enqueue a copy between a
        copy and its event on the same stream; the event is then later than necessary, never
        earlier.
        """
        with self._errors(), torch.no_grad():
            with self._torch.stream(self._upload):
                slot.pixels.copy_(torch.from_numpy(pixels), non_blocking=True)
                slot.uploaded.record()
            # The lock keeps the steps of two batches from mixing on the compute stream: until
            # its outputs are copied, the memory of the graph belongs to this batch.
            with self._lock, self._computing():
                slot.uploaded.wait()
                self._halving(partial(self._compute_slot, slot))
                slot.computed.record()
            with self._torch.stream(self._download):
                slot.computed.wait()
                for name, pinned in slot.pinned.items():
                    pinned.copy_(slot.outputs[name], non_blocking=True)
                slot.downloaded.record()
            slot.downloaded.synchronize()  # other threads run in the meantime
            return {name: pinned.numpy().copy() for name, pinned in slot.pinned.items()}

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate pinned memory on the host, which the GPU reads and writes directly."""
        try:
            with self._current():
                return torch.empty(shape, dtype=dtype, pin_memory=self._on_gpu)
        except RuntimeError as error:
            if isinstance(error, torch.AcceleratorError):  # an earlier failure that is reported now
                with self._errors():
                    raise
            raise DeviceError(
                f"not enough memory that can be pinned for batches of {self._shape[0]} "
                f"({self._device}): use a smaller `batch_size`"
            ) from error

    def _compute_slot(self, slot: _Slot) -> None:
        """Enqueue the computation of the slot's outputs, `rows` images at a time."""
        pixels = self._captured()
        for start in range(0, len(slot.pixels), self.rows):
            part = slice(start, min(start + self.rows, len(slot.pixels)))
            count = part.stop - start  # a last part may be shorter; its other rows are ignored
            pixels[:count].copy_(slot.pixels[part])
            if self._graph is None:
                self._outputs = self._forward(pixels)
            else:
                self._graph.replay()
            for name, output in self._outputs.items():
                slot.outputs[name][part].copy_(output[:count])

    def _captured(self) -> Tensor:
        """Return the memory of the graph's pixels; capture the graph first if necessary."""
        if self._pixels is not None:
            return self._pixels
        pixels = torch.zeros((self.rows, *self._shape[1:]), dtype=torch.uint8, device=self._device)
        # A warm-up needs as much memory as a capture. So it fails first if there is too little:
        # a capture that fails may leak its memory.
        for _ in range(WARM_UPS):
            self._outputs = self._forward(pixels)
        if self._on_gpu:
            self._outputs = {}  # freed before the capture allocates new ones
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads of the caller's program may do what a capture forbids,
            # such as allocating memory on the GPU
            mode = "thread_local"
            with (
                _capturing,
                torch.cuda.graph(graph, stream=self._compute, capture_error_mode=mode),
            ):
                self._outputs = self._forward(pixels)
            self._graph = graph
        self._pixels = pixels
        return pixels

    def _forward(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """Run the network; a captured graph keeps the kernels that these settings select."""
        with exact_settings(self._device):
            return self._network(pixels)

    def _halving(self, action: Callable[[], T]) -> T:
        """Return the result of `action`; halve `rows` each time the memory is too small."""
        while True:
            try:
                return action()
            except RuntimeError as error:
                if self.rows == 1 or not out_of_memory(error):
                    raise
            # not within `except`: the traceback keeps what was allocated
            self._finish()  # replays may still use the memory of the graph
            self._pixels = self._graph = None
            self._outputs = {}
            self.rows //= 2

    def _new_slots(self) -> list[_Slot]:
        self._captured()
        batch_size = self._shape[0]
        shapes = {name: (batch_size, *output.shape[1:]) for name, output in self._outputs.items()}
        float32 = torch.float32
        return [
            _Slot(
                gpu=self,
                pixels=torch.zeros(self._shape, dtype=torch.uint8, device=self._device),
                outputs={
                    name: torch.zeros(shape, dtype=float32, device=self._device)
                    for name, shape in shapes.items()
                },
                pinned={name: self.host_memory(shape, float32) for name, shape in shapes.items()},
                uploaded=self._event(),
                computed=self._event(),
                downloaded=self._event(),
            )
            for _ in range(SLOTS)
        ]

    def _event(self) -> Event:
        # blocking: a thread that waits sleeps, so that decode threads can use the core
        event: Event = self._torch.Event(blocking=True) if self._on_gpu else self._torch.Event()
        return event

    def _finish(self) -> None:
        """Wait until the compute stream is idle."""
        if self._compute is not None:
            self._compute.synchronize()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Make the compute stream and its GPU the current ones, without gradients.

        This does not use inference mode: after a capture in it, torch refuses all captures
        outside it, those of the caller too (torch 2.11, pytorch#166792).
        """
        with torch.no_grad(), self._torch.stream(self._compute):
            yield

    def _current(self) -> AbstractContextManager[object]:
        """Make its GPU the current one.

        Otherwise the end of every stream's context makes GPU 0 the current one again, and with
        it a context of half a GB on that GPU, which may be someone else's.
        """
        return torch.cuda.device(self._device) if self._on_gpu else nullcontext()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with device_errors(str(self._device), self._model, self._shape[0]), self._current():
            yield
