"""What the engines of torch share: failures of devices, and settings that decide values."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from r2ncli.errors import DeviceError

NO_ENGINE = "unable to find an engine"  # cuDNN's error, mostly for too little workspace
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# --- failures -------------------------------------------------------------------------


def out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error means that a device had too little memory.

    torch's allocator raises a type of its own; CUDA's libraries only say so in the message. An
    error that ended the capture of a graph is the `__context__` of the capture's error.
    """
    words = "out of memory", "ALLOC_FAILED", NO_ENGINE
    return error is not None and (
        isinstance(error, torch.OutOfMemoryError)
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
        or out_of_memory(error.__context__)
    )


@contextmanager
def device_errors(device: str, model: str, batch_size: int) -> Iterator[None]:
    """Turn failures of the device into a DeviceError."""
    smaller = f"at batch size {batch_size}; use a smaller `batch_size`"
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]  # torch adds general advice below it
        if NO_ENGINE in first_line:
            raise DeviceError(
                f"{device} ({model}): cuDNN found no way to compute a convolution, perhaps for "
                f"lack of memory {smaller}"
            ) from error
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise DeviceError(f"{device} ({model}): out of memory {smaller}") from error
        if isinstance(error, torch.AcceleratorError):
            raise DeviceError(f"{device} ({model}) failed: {first_line}") from error
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise DeviceError(f"{device} ({model}): not enough memory {smaller}") from error


# --- settings that decide values ----------------------------------------------------------

_settings_lock = threading.Lock()
_settings_users = 0
_settings_before: list[tuple[Any, str, Any]] = []


@contextmanager
def exact_settings(device: torch.device) -> Iterator[None]:
    """Set torch's global settings that decide values on `device` while this context is active.

    Float32 is float32: no TF32, no bfloat16, and no sums in half precision. On a GPU the same
    kernels run each time: no autotuning (`cudnn.benchmark`), no non-deterministic reductions.

    The settings apply to all threads. The first context changes those that differ, and the
    last one restores them; if none differs, none is changed.
    """
    global _settings_users
    with _settings_lock:
        _settings_users += 1
        for place, name, wanted in _wanted_settings(device):
            before = getattr(place, name)
            if before not in wanted:
                _settings_before.append((place, name, before))
                setattr(place, name, wanted[0])
    try:
        yield
    finally:
        with _settings_lock:
            _settings_users -= 1
            while not _settings_users and _settings_before:
                place, name, before = _settings_before.pop()
                if name == "fp32_precision":
                    place.fp32_precision = "none"  # means: the setting of its backend
                if getattr(place, name) != before:
                    setattr(place, name, before)


def _wanted_settings(device: torch.device) -> tuple[tuple[Any, str, tuple[Any, ...]], ...]:
    """Return the object, name and accepted values of each setting; the first value is set."""
    backends: Any = torch.backends  # mypy does not know its attributes
    float32 = "fp32_precision", ("ieee", "none")
    if device.type == "cpu":
        return (backends.mkldnn.matmul, *float32), (backends.mkldnn.conv, *float32)
    return (
        (backends.cuda.matmul, *float32),
        (backends.cudnn.conv, *float32),
        (backends.cuda.matmul, "allow_fp16_accumulation", (False,)),
        (backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", (False,)),
        (backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", (False,)),
        (backends.cudnn, "benchmark", (False,)),
        (backends.cudnn, "deterministic", (True,)),
    )
