"""What torch's engines share: which devices there are, what they can do, and how they fail."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from r2ncli.engine import choose_precision, cpu_precisions
from r2ncli.errors import DeviceError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_devices(name: str) -> tuple[torch.device, ...]:
    """The devices that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here.

    ``auto`` is one card or the CPU, ``cuda`` every card of the first one's model.

    Raises
    ------
    DeviceError
        It is not there.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return (torch.device("cuda:0" if cards else "cpu"),)
    if name == "cpu":
        return (torch.device("cpu"),)
    there = "cpu" + "".join(f", cuda:{card}" for card in range(cards))
    match = re.fullmatch(r"cuda(?::(0|[1-9][0-9]*))?", name)
    if match is None:
        raise DeviceError(f"no device {name!r}: expected auto, {there}")
    number = int(match[1] or 0)
    if number >= cards:
        raise DeviceError(f"no device {name!r}: torch sees {cards} CUDA cards. There are: {there}")
    if match[1] is not None:
        return (torch.device(f"cuda:{number}"),)
    every = [torch.device(f"cuda:{card}") for card in range(cards)]
    models = [torch.cuda.get_device_name(card) for card in every]
    return tuple(card for card, model in zip(every, models, strict=True) if model == models[number])


def find_precision(name: str, device: torch.device) -> str:
    """The precision that `name` means on `device`; ``auto`` is the fastest that keeps top-1.

    Raises
    ------
    UsageError
        The device cannot do it; the message lists what it can.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            # Both are as fast. fp16 keeps three bits more of every value, but ends at 65504:
            # a network of someone's own that goes beyond gives infinities, and no warning.
            # bf16 has float32's range, and keeps top-1.
            can: tuple[str, ...] = ("bf16", "fp16", "fp32")
        elif capability >= (7, 0):
            can = ("fp16", "fp32")
        else:
            can = ("fp32", "fp16")  # without tensor cores fp16 is no faster
    else:
        can = cpu_precisions()
    return choose_precision(name, can, str(device))


# --- failures -------------------------------------------------------------------------


def out_of_memory(error: BaseException | None) -> bool:
    """Whether a device had too little memory.

    torch's allocator says so by a type of error, CUDA and the libraries on it by words; one
    that breaks a graph's capture off is the context of the capture's own error.
    """
    words = "out of memory", "ALLOC_FAILED", "unable to find an engine"  # cuDNN's, for workspace
    return error is not None and (
        isinstance(error, torch.OutOfMemoryError)
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
        or out_of_memory(error.__context__)
    )


@contextmanager
def device_errors(device: str, model: str, batch_size: int) -> Iterator[None]:
    """A failure of the device in the user's words."""
    smaller = f"at batch size {batch_size}. Try a smaller one with --batch-size"
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
    """The settings that decide what is computed on `device` are ours while this lasts.

    Float32 is float32: no TF32 and no bfloat16 underneath, and no sums in half precision. On a
    card the same kernels run each time: none is chosen by a race, none adds in no order.

    The settings are torch's own, of all threads: the first user changes what is not as it
    should be, the last one puts it back, and where all is as it should be nothing is touched.
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
                    place.fp32_precision = "none"  # as its backend, where it was so before
                if getattr(place, name) != before:
                    setattr(place, name, before)


def _wanted_settings(device: torch.device) -> tuple[tuple[Any, str, tuple[Any, ...]], ...]:
    """Each setting's place and name, and what will do, the one that is set first."""
    backends: Any = torch.backends  # their attributes are made at run time
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
