"""What all backends share: the interface of an engine, and facts about this machine.

An engine executes a network on a device in one precision. It takes a uint8 batch of pixels
and returns named float32 arrays. It also normalises the pixels and pools the outputs.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from r2ncli.architectures import Architecture, Preprocessing
from r2ncli.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from r2ncli.engine.quantization import Sample
    from r2ncli.weights.loading import Checkpoint

Pixels = npt.NDArray[np.uint8]
Outputs = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class EngineDescription:
    """What an engine actually runs; part of the run record.

    Attributes
    ----------
    library : str
        The backend's library, with the version.
    device, device_model : str
        ``cpu``, ``cuda:N`` or ``cuda:N,M``, and the name of the processor or the GPUs.
    precision : str
        The precision executed: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
    batch_size : int
        Images in every batch, the last one included (it is padded).
    streams : int
        Batches that it executes at the same time, each in a thread that calls it.
    stream_threads : int
        The largest number of threads that compute one batch.
    executed_batch_size : int or None
        The smallest number of images computed at a time so far, if the memory was too small
        for a whole batch; None otherwise.
    """

    backend: str
    library: str
    device: str
    device_model: str
    precision: str
    batch_size: int
    streams: int = 1
    stream_threads: int = 1
    executed_batch_size: int | None = None

    @property
    def device_kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.device.partition(":")[0]


class Engine(Protocol):
    """A network that is ready to run on a device."""

    @property
    def description(self) -> EngineDescription:
        """Return what the engine actually runs."""

    def empty_batch(self, side: int) -> Pixels:
        """Allocate one batch where the device reads it fastest: uint8 [batch_size, side, side, 3].

        It is C-contiguous and not initialised.

        Raises
        ------
        DeviceError
            There is not enough memory.
        """

    def __call__(self, pixels: Pixels) -> Outputs:
        """Compute the outputs for one batch: a float32 array [batch_size, ...] for each layer.

        `pixels` are uint8 [batch_size, H, W, 3], RGB and C-contiguous. The caller may reuse them
        after the call, and owns the outputs.

        Raises
        ------
        DeviceError
            The device failed.
        """


@dataclass(frozen=True)
class Setup:
    """What a backend needs to get a network ready.

    Attributes
    ----------
    load : callable
        Loads the checkpoint's tensors and returns the checkpoint.
    identity : mapping or None
        What identifies the checkpoint in the cache of compiled networks; None means that
        nothing is cached.
    pool : str
        How feature maps are pooled: ``avg``, ``max`` or ``none``.
    devices : tuple of str
        ``cpu`` or GPUs of one model (see `choose_backend`).
    batch_size : int or None
        Images in a batch; None means a size that suits the device.
    sample : Sample or None
        The images that int8 is calibrated with.
    on_warning, on_quantising : callable
        As in `Listeners`.
    """

    load: Callable[[], Checkpoint]
    identity: Mapping[str, Any] | None
    layers: tuple[str, ...]
    pool: str
    preprocessing: Preprocessing
    devices: tuple[str, ...]
    precision: str
    batch_size: int | None
    sample: Sample | None
    on_warning: Callable[[str], None]
    on_quantising: Callable[[int], None]

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the shape of one image's output by layer; a UsageError if one is unknown."""
        from r2ncli.model import layer_shapes

        shapes = layer_shapes(architecture, self.preprocessing.image_size)
        for layer in self.layers:
            if layer not in shapes:
                near = get_close_matches(layer, shapes, n=3, cutoff=0.4)
                hint = f"Did you mean {', '.join(near)}? " if near else ""
                raise UsageError(
                    f"no layer {layer!r}. {hint}r2n extract --list-layers prints all of them"
                )
        return {layer: pooled_shape(shapes[layer], self.pool) for layer in self.layers}


@dataclass(frozen=True)
class Calibration:
    """The part of the run record about a sample: its digest, and how many images were usable."""

    sha256: str
    images: int


@dataclass(frozen=True)
class ReadyNetwork:
    """A network that is ready to run, and its properties (see `Predictor`)."""

    engine: Engine
    variant: str
    classes: int
    shapes: dict[str, tuple[int, ...]]
    calibration: Calibration | None = None


def empty_pixels(batch_size: int, side: int) -> Pixels:
    """Allocate the pixels of a batch in pageable memory (see `Engine.empty_batch`)."""
    try:
        return np.empty((batch_size, side, side, 3), dtype=np.uint8)
    except MemoryError as error:
        short = f"not enough memory for batches of {batch_size}"
        raise DeviceError(f"{short}: use a smaller `batch_size`") from error


def pooled_shape(shape: tuple[int, ...], pool: str) -> tuple[int, ...]:
    """Return the shape of one image's features: (C, H, W) becomes (C,) if they are pooled."""
    return shape[:1] if len(shape) == 3 and pool != "none" else shape


def cpu_precisions() -> tuple[str, ...]:
    """Return the precisions that this processor supports in hardware, the fastest first."""
    return ("bf16", "fp32") if cpu_has_bf16() else ("fp32",)


def cores() -> int:
    """Count the cores that this process may use.

    The processor's are limited by the process's affinity (as by ``taskset``), by the quota of
    its control group (as by ``docker --cpus``, a part of a core counts as one), and by
    ``OMP_NUM_THREADS``.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    limits = [affinity or os.cpu_count() or 1, *cpu_quotas()]
    if asked := re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", "")):
        limits.append(int(asked[1]))
    return max(1, math.ceil(min(limits)))


def cpu_quotas(root: Path = Path("/")) -> list[float]:
    """Return how many cores the control groups of this process may use, where they are limited.

    Versions 1 and 2 of Linux' control groups are read; `root` is that of the file system.
    """
    quotas = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            below = PurePosixPath(group.lstrip("/"))
            # a limit may be set at any level; in a container the upper ones are not to be seen
            for level in (below, *below.parents):
                with suppress(OSError, ValueError, ZeroDivisionError):
                    if controllers:
                        quota = (top / level / "cpu.cfs_quota_us").read_text()
                        period = (top / level / "cpu.cfs_period_us").read_text()
                    else:
                        quota, period = (top / level / "cpu.max").read_text().split()
                    if float(quota) > 0:  # "max" in version 2 and -1 in version 1 are no limit
                        quotas.append(float(quota) / float(period))
    return quotas


def cpu_model() -> str:
    """Return the processor's name, as the system reports it."""
    import platform

    return _cpuinfo("model name", "Model") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Return the instruction sets of this processor, or an empty list if they are not known.

    Virtual processors with the same name may have different ones.
    """
    return sorted(_cpuinfo("flags", "Features").split())


def cpu_has_bf16() -> bool:
    """Return whether this processor multiplies bfloat16 in hardware."""
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(cpu_flags())


def _cpuinfo(*starts: str) -> str:
    """Return the value of the first line that starts with one of `starts`, or an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(starts)), "")
