"""The CUDA engine: one graph a card, and copies to and from it while it computes.

    caller's batch ──► slot's pixels ──► graph ──► slot's outputs ──► pinned memory ──► caller
               upload stream        compute stream           download stream

A slot is the memory of one batch under way. Three of them keep a card busy: while one is
computed, the one before it is on its way out and the one after it on its way in. The slots of
all cards wait in one queue, so whichever card is free takes the next batch.

Nothing in the order of the work is CUDA's alone: on CPU devices the same lines run, where
torch's streams and events do nothing and there is no graph.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from math import prod
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from r2ncli.architectures import Preprocessing
from r2ncli.engine import EngineDescription, Outputs, Pixels, cpu_model, pooled_shape
from r2ncli.engine.devices import (
    DTYPES,
    device_errors,
    exact_settings,
    find_precision,
    out_of_memory,
)
from r2ncli.engine.folding import FoldedNetwork, InferenceNetwork
from r2ncli.errors import DeviceError
from r2ncli.model import Res2Net, layer_shapes

SLOTS = 3  # of each card
WARM_UPS = 3  # torch's advice before a capture: what is loaded or built at first use is then there

# Pictures a batch at 224 x 224, by a word of the card's name: more for more multiprocessors. By
# reasoning, not by measurement.
BATCH_SIZES = {"T4": 64, "L4": 128, "A10": 128, "A100": 256, "H100": 256, "H200": 512, "B200": 512}
# And by its memory, GiB at least: for cards of other names, and at most for these, since a part of
# a card may be all that one sees.
BATCH_SIZES_BY_MEMORY = ((60, 512), (20, 256), (10, 128), (0, 64))
MOST_OUTPUT_BYTES = 2**29  # of a batch; each slot has them twice, on the card and pinned

T = TypeVar("T")
Event = torch.cuda.Event | torch.cpu.Event

_capturing = threading.Lock()  # torch captures one graph at a time in a process


def suitable_batch_size(model: str, memory: int, side: int, output_bytes: int) -> int:
    """The batch size for a card, by what does not change: it decides the values' last bits.

    Parameters
    ----------
    model : str
        The card's name.
    memory : int
        All of its memory in bytes, however much of it is free.
    side : int
        Of a picture, in pixels: what a picture takes grows with its square.
    output_bytes : int
        Of one picture's outputs.

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
    """A Res2Net executed by torch on CUDA cards. See `Engine` for what it takes and gives.

    Where a card's memory does not hold what a batch takes, that card computes it in halves, or
    halves of halves: the rows are then the same but for the precision's rounding, and
    `description` says so.

    Parameters
    ----------
    network, outputs, pool, preprocessing
        As for `FoldedNetwork`; the pictures have the preprocessing's size.
    devices : sequence of torch.device
        Cards of one model (`find_devices`).
    precision : str
        ``auto`` or one that the cards can do.
    batch_size : int or None
        None means what suits the card (`suitable_batch_size`).

    Raises
    ------
    DeviceError
        A card's memory does not hold the network, or it fails.
    UsageError
        The cards cannot do the precision.
    """

    def __init__(
        self,
        network: Res2Net,
        outputs: Sequence[str],
        pool: str,
        preprocessing: Preprocessing,
        *,
        devices: Sequence[torch.device],
        precision: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        first, side = devices[0], preprocessing.image_size
        precision = find_precision(precision, first)
        if batch_size is None:
            shapes = layer_shapes(network.architecture, side)
            output_bytes = 4 * sum(prod(pooled_shape(shapes[name], pool)) for name in outputs)
            card = torch.cuda.get_device_properties(first)
            batch_size = suitable_batch_size(card.name, card.total_memory, side, output_bytes)
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
        with device_errors(str(first), _model(first), batch_size):
            form, reason = quickest_form(network, outputs, pool, preprocessing, first, dtype)
        if form is not FoldedNetwork:  # the fingerprint tells the forms apart
            library = f"{self._description.library}, triton {version('triton')}"
            self._description = replace(self._description, library=library)
        if reason:
            remark = f"{first}: the quicker kernels {reason}, so torch's own run; see the README"
            self._description = replace(self._description, remark=remark)
        network_on = partial(form, network, outputs, pool, preprocessing, dtype=dtype)
        self._cards = [_Card(device, network_on, shape) for device in devices]
        slots = [card.new_slots() for card in self._cards]
        self._idle: SimpleQueue[_Slot] = SimpleQueue()
        for slot in chain(*zip(*slots, strict=True)):  # the first batches go to several cards
            self._idle.put(slot)

    @property
    def description(self) -> EngineDescription:
        """What really runs."""
        rows = min(card.rows for card in self._cards)
        if rows == self._description.batch_size:
            return self._description
        return replace(self._description, executed_batch_size=rows)

    def empty_batch(self, side: int) -> Pixels:
        shape = self._description.batch_size, side, side, 3
        pixels: Pixels = self._cards[0].host_memory(shape, torch.uint8).numpy()
        return pixels  # it keeps the tensor whose memory it shows

    def __call__(self, pixels: Pixels) -> Outputs:
        slot = self._idle.get()
        try:
            return slot.card.outputs(slot, pixels)
        finally:
            self._idle.put(slot)


def quickest_form(
    network: Res2Net,
    outputs: Sequence[str],
    pool: str,
    preprocessing: Preprocessing,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Callable[..., InferenceNetwork], str | None]:
    """The form of `network` to run on a card: `FusedNetwork` where it can, else `FoldedNetwork`.

    And why not the first, where the card could.

    Its kernels are for tensor cores of half precision from Ampere on, and Triton needs a C
    compiler to build them. What they give is compared with torch's own functions here, on the
    card and before any picture: a compiler's fault must not become a row.
    """
    if device.type != "cuda" or dtype == torch.float32:
        return FoldedNetwork, None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return FoldedNetwork, None
    side = preprocessing.image_size
    pixels = torch.arange(2 * side * side * 3, device=device) % 251
    pixels = pixels.to(torch.uint8).view(2, side, side, 3)
    with exact_settings(device), torch.inference_mode(), torch.cuda.device(device):
        try:
            from r2ncli.engine.fused import FusedNetwork

            fused, folded = (
                form(network, outputs, pool, preprocessing, device, dtype)(pixels)
                for form in (FusedNetwork, FoldedNetwork)
            )
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (
            Exception
        ) as error:  # no Triton, no C compiler, or one that fails, whatever it raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            return FoldedNetwork, f"cannot be built ({reason})"
        if not all(_alike(fused[name], folded[name], dtype) for name in outputs):
            return FoldedNetwork, "are wrong"
    return FusedNetwork, None


def _alike(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways of rounding explain the difference: a wrong kernel is far off."""
    error, most = (ours - expected).abs().max(), expected.abs().max()
    return bool(error <= 8 * torch.finfo(dtype).eps * most)  # false for NaN


def _names(devices: Sequence[torch.device]) -> str:
    """``cuda:0``, or ``cuda:0,1``."""
    return ",".join([str(devices[0]), *(str(device.index) for device in devices[1:])])


def _model(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


@dataclass(frozen=True)
class _Slot:
    """The memory of one batch under way, and the events that say how far it is."""

    card: _Card
    pixels: Tensor
    outputs: Mapping[str, Tensor]
    pinned: Mapping[str, Tensor]
    uploaded: Event
    computed: Event
    downloaded: Event


class _Card:
    """A card at work: the network, its graph, and three streams.

    There is one graph, not one a slot. Replays follow each other on the compute stream, and on
    it the graph's pixels are copied from a slot before a replay, its outputs to the slot after
    it. So what another stream reads or writes is never the graph's own memory, which each
    replay overwrites; graphs of several slots would need all of it several times over, for the
    outputs of one that shares its memory lie where another one works. The copies within the
    card move a few hundredths of what the network itself reads and writes.

    Parameters
    ----------
    device : torch.device
        The card.
    network_on : callable
        Gives the network on a device.
    shape : tuple of int
        Of a batch's pixels.

    Attributes
    ----------
    rows : int
        Pictures that it computes at a time.
    """

    def __init__(
        self,
        device: torch.device,
        network_on: Callable[[torch.device], InferenceNetwork],
        shape: tuple[int, ...],
    ) -> None:
        self.rows = shape[0]
        self._shape = shape
        self._device = device
        self._model = _model(device)
        self._on_card = device.type == "cuda"
        self._torch: Any = torch.cuda if self._on_card else torch.cpu
        self._lock = threading.Lock()
        self._pixels: Tensor | None = None  # the graph's; None before its capture
        self._outputs: Mapping[str, Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        with self._errors():
            self._upload, self._compute, self._download = (
                self._torch.Stream(device) if self._on_card else None for _ in range(3)
            )
            with self._computing():
                self._network = network_on(device)

    def new_slots(self) -> list[_Slot]:
        """Its slots, after making sure that it has memory for what they bring."""
        with self._errors(), self._computing():
            slots = self._halving(self._new_slots)
            self._finish()  # what comes next is on other streams
            return slots

    def outputs(self, slot: _Slot, pixels: Pixels) -> Outputs:
        """What the network makes of `pixels`, by way of `slot`, which no other call has now.

        Each step is enqueued behind the event that the one before it leaves, and the caller
        waits for the last one. So when it returns nothing in the slot is under way, and neither
        the slot nor `pixels` needs an event before its next use. Between a copy and its event
        another call may enqueue a copy on the same stream: the event is then later than it need
        be, never earlier.
        """
        with self._errors(), torch.no_grad():
            with self._torch.stream(self._upload):
                slot.pixels.copy_(torch.from_numpy(pixels), non_blocking=True)
                slot.uploaded.record()
            # Until its outputs are copied out the graph is this batch's: the lock keeps the
            # steps of two batches from mixing on the compute stream.
            with self._lock, self._computing():
                slot.uploaded.wait()
                self._halving(partial(self._compute_slot, slot))
                slot.computed.record()
            with self._torch.stream(self._download):
                slot.computed.wait()
                for name, pinned in slot.pinned.items():
                    pinned.copy_(slot.outputs[name], non_blocking=True)
                slot.downloaded.record()
            slot.downloaded.synchronize()  # other threads run meanwhile
            return {name: pinned.numpy().copy() for name, pinned in slot.pinned.items()}

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the host that the card reads and writes by itself: pinned."""
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=self._on_card)
        except RuntimeError as error:
            raise DeviceError(
                f"not enough memory that can be pinned for batches of {self._shape[0]} "
                f"({self._device}). Try a smaller --batch-size"
            ) from error

    def _compute_slot(self, slot: _Slot) -> None:
        """Enqueue what makes the slot's outputs of its pixels, `rows` at a time."""
        pixels = self._captured()
        for start in range(0, len(slot.pixels), self.rows):
            part = slice(start, min(start + self.rows, len(slot.pixels)))
            count = part.stop - start  # fewer in a last part, before pictures that do not count
            pixels[:count].copy_(slot.pixels[part])
            if self._graph is None:
                self._outputs = self._forward(pixels)
            else:
                self._graph.replay()
            for name, output in self._outputs.items():
                slot.outputs[name][part].copy_(output[:count])

    def _captured(self) -> Tensor:
        """The graph's pixels; it is captured now if it is not yet."""
        if self._pixels is not None:
            return self._pixels
        pixels = torch.zeros((self.rows, *self._shape[1:]), dtype=torch.uint8, device=self._device)
        # A warm-up needs as much memory as a capture. So what is too much shows here, and not
        # within a capture: the memory of one that breaks off may be lost.
        for _ in range(WARM_UPS):
            self._outputs = self._forward(pixels)
        if self._on_card:
            self._outputs = {}  # the capture's take their place
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may do meanwhile what a capture forbids, such as
            # taking memory to decode on the card
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
        """The network's outputs; a capture keeps the kernels that these settings choose."""
        with exact_settings(self._device):
            return self._network(pixels)

    def _halving(self, action: Callable[[], T]) -> T:
        """What `action` gives, after halving `rows` as often as the memory asks for."""
        while True:
            try:
                return action()
            except RuntimeError as error:
                if self.rows == 1 or not out_of_memory(error):
                    raise
            # not within `except`: the traceback holds on to what was allocated up to there
            self._finish()  # replays may still be at work in the graph's memory
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
                card=self,
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
        # blocking: who waits for it sleeps, and leaves the core to the decode threads
        event: Event = self._torch.Event(blocking=True) if self._on_card else self._torch.Event()
        return event

    def _finish(self) -> None:
        """Wait for what is on the compute stream."""
        if self._compute is not None:
            self._compute.synchronize()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """What is enqueued meanwhile goes to the compute stream, and its card is the current.

        Not in inference mode: after a first capture there, torch (2.11, pytorch#166792) refuses
        all others outside it, the caller's own among them.
        """
        with torch.no_grad(), self._torch.stream(self._compute):
            yield

    def _errors(self) -> AbstractContextManager[None]:
        return device_errors(str(self._device), self._model, self._shape[0])
