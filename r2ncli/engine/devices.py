"""What the engines of torch share: GPUs, their precisions, failures and settings."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from r2ncli.errors import DeviceError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_gpus(name: str) -> tuple[str, ...]:
    """Return the GPUs that ``auto``, ``cuda`` or ``cuda:N`` means here.

    ``auto`` is one GPU, or none if there is none; ``cuda`` is every GPU of the first one's
    model.

    Raises
    ------
    DeviceError
        ``cuda`` or ``cuda:N`` does not exist.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    every = tuple(f"cuda:{number}" for number in range(count))
    if name == "auto":
        return every[:1]
    if name in every:
        return (name,)
    if name != "cuda" or not every:
        found = f"torch found {', '.join(every)}" if every else "torch found no CUDA GPU"
        raise DeviceError(f"`device` {name!r} is not available: {found}")
    models = [torch.cuda.get_device_name(gpu) for gpu in every]
    return tuple(gpu for gpu, model in zip(every, models, strict=True) if model == models[0])


def gpu_precisions(gpu: str) -> tuple[str, ...]:
    """Return the precisions that a GPU supports, the one for ``auto`` first."""
    capability = torch.cuda.get_device_capability(gpu)
    if capability >= (8, 0):
        # Both half precisions are equally fast. fp16 keeps three more bits, but its largest
        # value is 65504: a custom network that exceeds it gives infinities without a warning.
        # bf16 has the range of float32, and keeps top-1.
        return "bf16", "fp16", "fp32"
    if capability >= (7, 0):
        return "fp16", "fp32"
    return "fp32", "fp16"  # without tensor cores fp16 is not faster


# --- failures -------------------------------------------------------------------------


def out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error means that a device had too little memory.

    torch's allocator raises a type of its own; CUDA's libraries only say so in the message. An
    error that ended the capture of a graph is the `__context__` of the capture's error.
    """
    words = "out of memory", "ALLOC_FAILED", "unable to find an engine"  # cuDNN's, for workspace
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
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise DeviceError(f"{device} ({model}): out of memory {smaller}") from error
        if isinstance(error, torch.AcceleratorError):
            raise DeviceError(f"{device} ({model}) failed: {error}") from error
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
        (backends.cudnn, "benchmark", (False,)),
        (backends.cudnn, "deterministic", (True,)),
    )
