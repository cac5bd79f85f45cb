"""The torch engine for the CPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from r2ncli.architectures import Preprocessing
from r2ncli.engine import EngineDescription, Outputs, Pixels, cpu_model, empty_pixels
from r2ncli.engine.devices import DTYPES, device_errors, exact_settings, find_precision
from r2ncli.engine.folding import FoldedNetwork
from r2ncli.model import Res2Net

BATCH_SIZE = 8  # small batches keep activations in the processor's cache


class TorchEngine:
    """A Res2Net executed by torch on the CPU. See `Engine` for what it takes and gives.

    It has as many streams as torch has threads, of one thread each: no core waits for another
    within a layer, which costs much as soon as another process takes one, and the bytes do not
    depend on how many threads there are. They are threads of its own, for how many torch
    computes with is a setting of the thread that calls it.

    Parameters
    ----------
    network, outputs, pool, preprocessing
        As for `FoldedNetwork`.
    precision : str
        ``auto`` or one that the processor can do.
    batch_size : int or None
        None means what suits a CPU.

    Raises
    ------
    DeviceError
        The memory does not hold the network.
    UsageError
        The processor cannot do the precision.
    """

    def __init__(
        self,
        network: Res2Net,
        outputs: Sequence[str],
        pool: str,
        preprocessing: Preprocessing,
        *,
        precision: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        self._device = torch.device("cpu")
        precision = find_precision(precision, self._device)
        self.description = EngineDescription(
            backend="torch",
            library=f"torch {torch.__version__}",
            device="cpu",
            device_model=cpu_model(),
            precision=precision,
            batch_size=batch_size or BATCH_SIZE,
            streams=torch.get_num_threads(),
        )
        self._errors = "cpu", self.description.device_model, self.description.batch_size
        with device_errors(*self._errors):
            self._network = FoldedNetwork(
                network, outputs, pool, preprocessing, self._device, DTYPES[precision]
            )
        self._streams = ThreadPoolExecutor(
            self.description.streams, "r2n-torch", initializer=compute_in_this_thread_alone
        )

    def empty_batch(self, side: int) -> Pixels:
        return empty_pixels(self.description.batch_size, side)

    def __call__(self, pixels: Pixels) -> Outputs:
        return self._streams.submit(self._forward, pixels).result()

    def _forward(self, pixels: Pixels) -> Outputs:
        with device_errors(*self._errors), torch.inference_mode(), exact_settings(self._device):
            outputs = self._network(torch.from_numpy(pixels))
            return {name: output.numpy() for name, output in outputs.items()}


_new_threads = threading.Lock()


def compute_in_this_thread_alone() -> None:
    """Let torch use this thread, a new one, and no others when it is called in it."""
    with _new_threads:
        others = torch.get_num_threads()
        torch.set_num_threads(1)
        # that was also what threads begin with that are yet to come: they keep what they had
        back = threading.Thread(target=torch.set_num_threads, args=(others,))
        back.start()
        back.join()
