"""Find the GPUs that torch can use, and say why there are none.

The driver is asked first, without torch: its import takes seconds, and most machines that have
no GPU have no driver.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from r2ncli.errors import DeviceError

# The driver that each version of CUDA needs at least: CUDA Toolkit release notes, table 3.
DRIVERS = {11: "450", 12: "525", 13: "580"}
# what people type for a GPU, and what to type instead
HINTS = {
    **dict.fromkeys(("gpu", "nvidia"), "use cuda"),
    "mps": "GPUs of Apple are not supported",
    **dict.fromkeys(("rocm", "hip", "amd"), "GPUs of AMD are not tested"),
}


@dataclass(frozen=True)
class Driver:
    """What NVIDIA's driver answers: the CUDA version that it supports, and its GPUs.

    `error` is the number of CUDA's error where it cannot list GPUs, 0 otherwise. It shows the
    GPUs that ``CUDA_VISIBLE_DEVICES`` names.
    """

    cuda: tuple[int, int]
    gpus: int
    error: int


def find_driver() -> Driver | None:
    """Ask NVIDIA's driver; None if it is not installed."""
    version, gpus = ctypes.c_int(0), ctypes.c_int(0)
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        library.cuDriverGetVersion(ctypes.byref(version))  # this needs no cuInit
        error = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(gpus))
    except (OSError, AttributeError):
        return None
    cuda = version.value // 1000, version.value % 1000 // 10
    return Driver(cuda, 0 if error else gpus.value, int(error))


def why_no_gpu() -> str | None:
    """Return why torch can use no GPU of this machine, as a clause; None if it can use one."""
    driver = find_driver()
    if driver is None:
        if sys.platform == "darwin":
            return "GPUs of Apple are not supported"
        hip = _torch().version.hip
        return (
            f"{_name()} is built for ROCm, which is not tested"
            if hip
            else "there is no NVIDIA driver"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not driver.gpus and hidden is not None:
        return f"CUDA_VISIBLE_DEVICES is {hidden!r}, which shows none"
    if not driver.gpus:
        return f"the NVIDIA driver shows none (CUDA error {driver.error})"
    torch = _torch()
    if torch.version.cuda is None:
        return (
            f"{_name()} is built without CUDA: install the build for CUDA that "
            "https://pytorch.org/get-started/locally names"
        )
    needed = int(torch.version.cuda.partition(".")[0])
    if driver.cuda[0] < needed:
        has = ".".join(map(str, driver.cuda))
        newer = f" to {DRIVERS[needed]} or newer" if needed in DRIVERS else ""
        return (
            f"the NVIDIA driver is too old: it supports CUDA {has}, and {_name()} needs CUDA "
            f"{torch.version.cuda}. Update the driver{newer}, or install a torch that is built "
            f"for CUDA {driver.cuda[0]}"
        )
    if not torch.cuda.is_available():
        return f"{_name()} cannot use the {driver.gpus} that the NVIDIA driver shows"
    if not usable_gpus():
        capability = ".".join(map(str, torch.cuda.get_device_capability("cuda:0")))
        return (
            f"{_name()} has no kernels for {torch.cuda.get_device_name('cuda:0')} (compute "
            f"capability {capability}; it has them for {', '.join(torch.cuda.get_arch_list())})"
        )
    return None


def usable_gpus() -> tuple[str, ...]:
    """Return the GPUs that torch has kernels for: ``cuda:0``, ``cuda:1``, …"""
    torch = _torch()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    every = (f"cuda:{number}" for number in range(count))
    if torch.version.hip:  # its architectures have other names
        return tuple(every)
    built = torch.cuda.get_arch_list()
    return tuple(gpu for gpu in every if _has_kernels(torch.cuda.get_device_capability(gpu), built))


def _has_kernels(capability: tuple[int, int], built: list[str]) -> bool:
    """Return whether code for one of these architectures runs on a GPU.

    Kernels run on a GPU of the same major version and the same or a higher minor one;
    ``compute_XY`` is an intermediate form that the driver compiles for any later GPU.
    """
    for architecture in built:
        kind, _, digits = architecture.partition("_")
        number = re.match(r"\d+", digits)
        if number is None:
            continue
        major, minor = divmod(int(number[0]), 10)
        if kind == "compute" and capability >= (major, minor):
            return True
        if kind == "sm" and capability[0] == major and capability[1] >= minor:
            return True
    return False


def find_gpus(name: str) -> tuple[str, ...]:
    """Return the GPUs that ``auto``, ``cuda`` or ``cuda:N`` means here.

    ``auto`` is one GPU, or none if there is none; ``cuda`` is every GPU of the first one's
    model.

    Raises
    ------
    DeviceError
        ``cuda`` or ``cuda:N`` does not exist, or torch cannot use it.
    """
    every = usable_gpus()
    if name == "auto":
        return every[:1]
    if name in every:
        return (name,)
    if name != "cuda" or not every:
        found = f"torch can use {', '.join(every)}" if every else f"no GPU: {why_no_gpu()}"
        raise DeviceError(f"`device` {name!r} is not available ({found})")
    names = [_torch().cuda.get_device_name(gpu) for gpu in every]
    return tuple(gpu for gpu, model in zip(every, names, strict=True) if model == names[0])


def invalid_device(name: str) -> DeviceError:
    """Return the error for a device whose name r2n does not know."""
    hint = HINTS.get(name.lower())
    if re.fullmatch(r"cuda", name, re.IGNORECASE):
        hint = "use cuda"
    elif re.fullmatch(r"\d+", name):
        hint = f"use cuda:{int(name)}"
    elif re.fullmatch(r"(cuda:)?\d+(,(cuda:)?\d+)+", name):
        hint = f"set CUDA_VISIBLE_DEVICES={name.replace('cuda:', '')} and use cuda"
    driver = find_driver()
    gpus = [f"cuda:{number}" for number in range(driver.gpus if driver else 0)]
    found = f"CUDA GPUs found: {', '.join(gpus)}" if gpus else "no CUDA GPU was found"
    expected = "use auto, cpu, cuda or cuda:N"
    advice = (
        f"{hint} (valid: auto, cpu, cuda, cuda:N; {found})" if hint else f"{expected} ({found})"
    )
    return DeviceError(f"`device` {name!r} is not valid: {advice}")


def gpu_precisions(gpu: str) -> tuple[str, ...]:
    """Return the precisions that a GPU supports, the one for ``auto`` first."""
    if _torch().cuda.get_device_capability(gpu) >= (8, 0):
        # Both half precisions are equally fast. fp16 keeps three more bits, but its largest
        # value is 65504: a custom network that exceeds it gives infinities. bf16 has the range
        # of float32, and keeps top-1.
        return "bf16", "fp16", "fp32"
    return "fp16", "fp32"


def _torch() -> Any:
    import torch

    return torch


def _name() -> str:
    return f"torch {_torch().__version__}"
