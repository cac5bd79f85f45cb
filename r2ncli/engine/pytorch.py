"""The torch engine: CUDA where there is a card, else the CPU."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from r2ncli.architectures import Preprocessing
from r2ncli.engine import (
    EngineDescription,
    Outputs,
    Pixels,
    choose_precision,
    cpu_model,
    cpu_precisions,
)
from r2ncli.engine.folding import FoldedNetwork
from r2ncli.errors import DeviceError
from r2ncli.model import Res2Net

BATCH_SIZES = {"cpu": 8, "cuda": 64}  # on a CPU small batches keep activations in its cache

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """A Res2Net executed by torch. See `Engine` for what it takes and gives.

    Parameters
    ----------
    network : Res2Net
        In eval mode, float32, on the CPU; it is copied, not changed.
    outputs : sequence of str
        Names of modules (`layer_shapes`) whose outputs are wanted.
    pool : str
        ``avg`` or ``max`` over height and width, or ``none``.
    preprocessing : Preprocessing
        Gives the mean and standard deviation; the size is the batches'.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    precision : str
        ``auto`` or one that the device can do.
    batch_size : int or None
        None means what suits the device.

    Raises
    ------
    DeviceError
        The device is not there, or its memory does not hold the network.
    UsageError
        The device cannot do the precision.
    """

    def __init__(
        self,
        network: Res2Net,
        outputs: Sequence[str],
        pool: str,
        preprocessing: Preprocessing,
        *,
        device: str = "auto",
        precision: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        self._device = find_device(device)
        precision = find_precision(precision, self._device)
        on_card = self._device.type == "cuda"
        self.description = EngineDescription(
            backend="torch",
            library=f"torch {torch.__version__}",
            device=str(self._device),
            device_model=torch.cuda.get_device_name(self._device) if on_card else cpu_model(),
            precision=precision,
            batch_size=batch_size or BATCH_SIZES[self._device.type],
        )
        with _device_errors(self.description):
            self._network = FoldedNetwork(
                network, outputs, pool, preprocessing, self._device, DTYPES[precision]
            )

    def __call__(self, pixels: Pixels) -> Outputs:
        with _device_errors(self.description), torch.inference_mode(), _exact_fp32(self._device):
            outputs = self._network(torch.from_numpy(pixels).to(self._device))
            return {name: output.cpu().numpy() for name, output in outputs.items()}


def find_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here.

    Raises
    ------
    DeviceError
        It is not there.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if cards else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    there = "cpu" + "".join(f", cuda:{card}" for card in range(cards))
    match = re.fullmatch(r"cuda(?::(0|[1-9][0-9]*))?", name)
    if match is None:
        raise DeviceError(f"no device {name!r}: expected auto, {there}")
    number = int(match[1] or 0)
    if number >= cards:
        raise DeviceError(f"no device {name!r}: torch sees {cards} CUDA cards. There are: {there}")
    return torch.device(f"cuda:{number}")


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
            can: tuple[str, ...] = ("bf16", "fp16", "fp32")
        elif capability >= (7, 0):
            can = ("fp16", "fp32")
        else:
            can = ("fp32", "fp16")  # without tensor cores fp16 is no faster
    else:
        can = cpu_precisions()
    return choose_precision(name, can, str(device))


@contextmanager
def _device_errors(description: EngineDescription) -> Iterator[None]:
    """A failure of the device in the user's words."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{description.device} ({description.device_model}): out of memory at batch size "
            f"{description.batch_size}. Try a smaller one with --batch-size"
        ) from error
    except torch.AcceleratorError as error:
        raise DeviceError(
            f"{description.device} ({description.device_model}) failed: {error}"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise DeviceError(
            f"{description.device} ({description.device_model}): not enough memory at batch size "
            f"{description.batch_size}. Try a smaller one with --batch-size"
        ) from error


_fp32_lock = threading.Lock()
_fp32_users = 0
_fp32_before: list[tuple[Any, str]] = []


@contextmanager
def _exact_fp32(device: torch.device) -> Iterator[None]:
    """Float32 is float32 on `device` while this lasts: no TF32 and no bfloat16 underneath.

    The setting is torch's own, of all threads: the first user changes what is not exact,
    the last one puts it back, and where all is exact nothing is touched.
    """
    global _fp32_users
    backends: Any = torch.backends  # their attributes are made at run time
    with _fp32_lock:
        _fp32_users += 1
        for place in (
            (backends.cuda.matmul, backends.cudnn.conv)
            if device.type == "cuda"
            else (backends.mkldnn.matmul, backends.mkldnn.conv)
        ):
            if place.fp32_precision not in ("none", "ieee"):
                _fp32_before.append((place, place.fp32_precision))
                place.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _fp32_lock:
            _fp32_users -= 1
            while not _fp32_users and _fp32_before:
                place, precision = _fp32_before.pop()
                place.fp32_precision = "none"  # as its backend, where it was so before
                if place.fp32_precision != precision:
                    place.fp32_precision = precision
