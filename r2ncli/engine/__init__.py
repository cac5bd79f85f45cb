"""The door to the engines: each executes a network on a device, in a precision.

An engine takes a uint8 batch of pixels and gives named float32 arrays. Normalisation and
pooling are part of what it runs. One file per backend.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from r2ncli.errors import DeviceError, UsageError

Pixels = npt.NDArray[np.uint8]
Outputs = Mapping[str, npt.NDArray[np.float32]]

BACKENDS = ("auto", "torch", "openvino")
POOLS = ("avg", "max", "none")


@dataclass(frozen=True)
class EngineDescription:
    """What really runs: recorded with every result.

    Attributes
    ----------
    backend, library : str
        The engine's name, and its library with the version.
    device, device_model : str
        ``cpu``, ``cuda:N`` or ``cuda:N,M``, and the processor's or cards' name.
    precision : str
        The precision executed: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
    batch_size : int
        Pictures in every batch, the last one included (it is padded).
    streams : int
        Batches that it executes at the same time, each in a thread that calls it.
    stream_threads : int
        Threads that one batch is computed with at the most.
    executed_batch_size : int or None
        Pictures computed at a time, the fewest so far, where the memory did not hold what a
        whole batch takes; None where it did.
    remark : str or None
        A sentence about what runs in place of something quicker, and why.
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
    remark: str | None = None

    @property
    def device_kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.device.partition(":")[0]


class Engine(Protocol):
    """A network, compiled for a device."""

    @property
    def description(self) -> EngineDescription:
        """What really runs."""

    def empty_batch(self, side: int) -> Pixels:
        """Memory for one batch of pictures of `side` pixels, from where it is read fastest.

        Returns
        -------
        uint8 array [batch_size, side, side, 3]
            C-contiguous, of any values.

        Raises
        ------
        DeviceError
            There is not enough memory.
        """

    def __call__(self, pixels: Pixels) -> Outputs:
        """The outputs for one batch.

        Parameters
        ----------
        pixels : uint8 array [batch_size, H, W, 3]
            C-contiguous RGB; it may be used again when the call has ended.

        Returns
        -------
        mapping of str to float32 array [batch_size, ...]
            One array for each output that was asked for; owned by the caller.

        Raises
        ------
        DeviceError
            The device failed.
        """


def empty_pixels(batch_size: int, side: int) -> Pixels:
    """A batch's pixels in ordinary memory (see `Engine.empty_batch`)."""
    try:
        return np.empty((batch_size, side, side, 3), dtype=np.uint8)
    except MemoryError as error:
        raise DeviceError(
            f"not enough memory for batches of {batch_size}. Try a smaller --batch-size"
        ) from error


def pooled_shape(shape: tuple[int, ...], pool: str) -> tuple[int, ...]:
    """Shape of one picture's features: (C, H, W) becomes (C,) unless `pool` is ``none``."""
    return shape[:1] if len(shape) == 3 and pool != "none" else shape


def find_backend(backend: str, device: str) -> str:
    """``torch`` or ``openvino``: what `backend` means for `device`, without torch on a CPU.

    Raises
    ------
    UsageError
        The backend is not installed, or does not run on the device.
    DeviceError
        The device is not there.
    """
    if backend == "torch":
        return backend
    there = find_spec("openvino") is not None
    if backend == "auto":
        return "openvino" if there and _is_cpu(device) else "torch"
    if device not in ("auto", "cpu"):
        raise UsageError(f"backend 'openvino' runs on the CPU, not on {device!r}")
    if not there:
        raise UsageError("backend 'openvino' is not installed: pip install openvino")
    return backend


def _is_cpu(device: str) -> bool:
    if device == "cpu" or (device == "auto" and not cuda_cards()):
        return True
    from r2ncli.engine.devices import find_devices

    return find_devices(device)[0].type == "cpu"  # a card that torch cannot use does not count


def cuda_cards() -> int:
    """How many CUDA cards the driver shows to this process (`CUDA_VISIBLE_DEVICES` counts)."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    except (OSError, AttributeError):  # there is no driver
        return 0
    return 0 if failed else count.value


def choose_precision(name: str, can: Sequence[str], device: str) -> str:
    """The precision that `name` means where a device does `can`; ``auto`` is the first.

    Raises
    ------
    UsageError
        The device cannot do it; the message lists what it can.
    """
    if name == "auto":
        return can[0]
    if name not in can:
        raise UsageError(f"precision {name!r} on {device}: this device does {', '.join(can)}")
    return name


def cpu_precisions() -> tuple[str, ...]:
    """What this processor does at full speed, the fastest first."""
    return ("bf16", "fp32") if cpu_has_bf16() else ("fp32",)


def cores() -> int:
    """Cores that this process may use: a container or a scheduler may give fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    for line in _cpuinfo():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    import platform

    return platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instructions that this processor has, as the system names them; none where it does not.

    Virtual processors of one name may differ in them.
    """
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            return sorted(line.partition(":")[2].split())
    return []


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware."""
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(cpu_flags())


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
