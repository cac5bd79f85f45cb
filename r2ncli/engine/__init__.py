"""The table of backends: libraries that execute a network on a device.

A new backend is one new row of `BACKENDS` and the module that it names. The choices of the
options, what ``auto`` means and the error messages follow from the table. Importing this
package imports no library, because ``r2n --help`` needs the names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, cast

from r2ncli.errors import UsageError

if TYPE_CHECKING:
    from r2ncli.engine.base import ReadyNetwork, Setup

AUTO, CPU, CUDA = "auto", "cpu", "cuda"
INT8 = "int8"
PRECISIONS = ("fp32", "bf16", "fp16", INT8)
POOLS = ("avg", "max", "none")


class BackendModule(Protocol):
    """What the module of a backend defines."""

    def precisions(self, devices: Sequence[str]) -> tuple[str, ...]:
        """Return the precisions that these devices support, the one for ``auto`` first.

        It is the fastest that keeps top-1. ``int8``, if it is supported, needs calibration.
        """

    def open_network(self, setup: Setup) -> ReadyNetwork:
        """Load a checkpoint and get its network ready to run.

        Raises
        ------
        UsageError, CheckpointError, DeviceError, InputNotFoundError
            A layer, the weights, the device or the calibration images cannot be used.
        """


@dataclass(frozen=True)
class Backend:
    """A library that executes networks.

    Attributes
    ----------
    name : str
        Its name among the values of the option `backend`.
    package : str
        The Python package that must be installed.
    kinds : tuple of str
        The kinds of devices that it runs on: ``cpu``, ``cuda``.
    module : str
        The name of its `BackendModule`, which is imported when the backend is used.
    """

    name: str
    package: str
    kinds: tuple[str, ...]
    module: str

    @property
    def installed(self) -> bool:
        """Return whether its library is installed."""
        return find_spec(self.package) is not None

    def runs_on(self, device: str) -> bool:
        """Return whether it runs on a device or a kind of device: ``cpu``, ``cuda``, ``cuda:N``."""
        return device.partition(":")[0] in self.kinds

    def load(self) -> BackendModule:
        """Import its module."""
        return cast(BackendModule, import_module(self.module))


BACKENDS = (  # auto is the first that is installed and runs on the device
    Backend("openvino", "openvino", (CPU,), "r2ncli.engine.openvino"),
    Backend("torch", "torch", (CPU, CUDA), "r2ncli.engine.pytorch"),
)


def choose_backend(
    backend: str, device: str, on_warning: Callable[[str], None] = lambda _: None
) -> tuple[Backend, tuple[str, ...]]:
    """Return the backend and the devices for the options `backend` and `device`.

    The devices are ``("cpu",)`` or GPUs of one model, such as ``("cuda:0", "cuda:1")``. To
    choose a CPU, torch is not imported unless a driver reports a GPU. `on_warning` is told why
    a GPU that is there is not used for ``auto``.

    Raises
    ------
    DeviceError
        The device is not valid or does not exist.
    UsageError
        The backend is not installed, or does not run on the device.
    """
    wanted = [row for row in BACKENDS if backend == row.name or (backend == AUTO and row.installed)]
    for kind in _kinds(device):
        able = [row for row in wanted if row.runs_on(kind)]
        devices = _find_devices(kind, device, on_warning) if able else ()
        if devices:
            if not able[0].installed:
                raise UsageError(
                    f"`backend={backend}` is not installed: pip install {able[0].package}"
                )
            return able[0], devices
    kinds = dict.fromkeys(kind for row in wanted for kind in row.kinds)
    raise UsageError(
        f"`backend={backend}` does not run on `device={device}` (it runs on: {', '.join(kinds)})"
    )


def choose_precision(precision: str, backend: Backend, devices: Sequence[str]) -> str:
    """Return the precision for the option `precision` on these devices.

    Raises
    ------
    UsageError
        The devices do not support it; the message lists what they support.
    """
    supported = backend.load().precisions(devices)
    if precision == AUTO:
        return supported[0]
    if precision in supported:
        return precision
    others = [
        row.name
        for row in BACKENDS
        if row is not backend
        and row.installed
        and row.runs_on(devices[0])
        and precision in row.load().precisions(devices)
    ]
    hint = f"; `backend={others[0]}` supports it" if others else ""
    raise UsageError(
        f"`precision={precision}` is not supported on {devices[0]} "
        f"(supported: {', '.join(supported)}{hint})"
    )


def _kinds(device: str) -> tuple[str, ...]:
    """Return the kinds of devices to look for, in this order."""
    if device == AUTO:
        return CUDA, CPU
    if device == CPU or re.fullmatch(r"cuda(:(0|[1-9][0-9]*))?", device):
        return (device.partition(":")[0],)
    from r2ncli.engine.gpus import invalid_device

    raise invalid_device(device)


def _find_devices(kind: str, device: str, warn: Callable[[str], None]) -> tuple[str, ...]:
    """Return the devices of a kind that `device` means; for ``auto`` there may be none."""
    if kind == CPU:
        return (CPU,)
    from r2ncli.engine.gpus import find_driver, find_gpus, why_no_gpu

    if device != AUTO:
        return find_gpus(device)
    driver = find_driver()
    if driver is None or not driver.gpus:  # torch would find none either, and is not imported
        return ()
    gpus = find_gpus(AUTO)
    if not gpus:
        warn(f"a GPU is there, but is not used: {why_no_gpu()}")
    return gpus
