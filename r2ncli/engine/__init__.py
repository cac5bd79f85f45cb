"""The door to the engines: each executes a network on a device, in a precision.

An engine takes a uint8 batch of pixels and gives named float32 arrays. Normalisation and
pooling are part of what it runs. One file per backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Outputs = Mapping[str, npt.NDArray[np.float32]]

BACKENDS = ("torch",)
POOLS = ("avg", "max", "none")
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")


@dataclass(frozen=True)
class EngineDescription:
    """What really runs: recorded with every result.

    Attributes
    ----------
    backend, library : str
        The engine's name, and its library with the version.
    device, device_model : str
        ``cpu`` or ``cuda:N``, and the processor's or card's name.
    precision : str
        The precision executed: ``fp32``, ``bf16`` or ``fp16``.
    batch_size : int
        Pictures in every batch, the last one included (it is padded).
    """

    backend: str
    library: str
    device: str
    device_model: str
    precision: str
    batch_size: int

    @property
    def device_kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.device.partition(":")[0]


class Engine(Protocol):
    """A network, compiled for a device."""

    @property
    def description(self) -> EngineDescription:
        """What really runs."""

    def __call__(self, pixels: Pixels) -> Outputs:
        """The outputs for one batch.

        Parameters
        ----------
        pixels : uint8 array [batch_size, H, W, 3]
            C-contiguous RGB.

        Returns
        -------
        mapping of str to float32 array [batch_size, ...]
            One array for each output that was asked for; owned by the caller.

        Raises
        ------
        DeviceError
            The device failed.
        """


def pooled_shape(shape: tuple[int, ...], pool: str) -> tuple[int, ...]:
    """Shape of one picture's features: (C, H, W) becomes (C,) unless `pool` is ``none``."""
    return shape[:1] if len(shape) == 3 and pool != "none" else shape


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    for line in _cpuinfo():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    import platform

    return platform.processor() or platform.machine()


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware."""
    flags: Sequence[str] = ()
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            flags = line.partition(":")[2].split()
            break
    return any(flag in flags for flag in ("amx_bf16", "avx512_bf16", "bf16"))


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
