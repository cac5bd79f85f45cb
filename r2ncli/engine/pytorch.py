"""The backend ``torch``: the choice between CPU and GPUs, and the engine for the CPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from r2ncli.architectures import Preprocessing, cpu_batch_size
from r2ncli.engine.base import (
    Engine,
    EngineDescription,
    Outputs,
    Pixels,
    ReadyNetwork,
    Setup,
    cpu_model,
    cpu_precisions,
    empty_pixels,
)
from r2ncli.engine.devices import DTYPES, device_errors, exact_settings
from r2ncli.engine.folding import FoldedNetwork
from r2ncli.engine.gpus import gpu_precisions
from r2ncli.model import Res2Net


def precisions(devices: Sequence[str]) -> tuple[str, ...]:
    """Return the precisions that these devices support (see `BackendModule`)."""
    return cpu_precisions() if devices[0] == "cpu" else gpu_precisions(devices[0])


def open_network(setup: Setup) -> ReadyNetwork:
    """Load a checkpoint and its network onto the devices (see `BackendModule`)."""
    checkpoint = setup.load()
    network = checkpoint.network
    shapes = setup.shapes(network.architecture)
    wanted = network, setup.layers, setup.pool, setup.preprocessing
    engine: Engine
    if setup.devices[0] == "cpu":
        engine = TorchEngine(*wanted, precision=setup.precision, batch_size=setup.batch_size)
    else:
        from r2ncli.engine.cuda import CudaEngine

        engine = CudaEngine(
            *wanted,
            devices=[torch.device(name) for name in setup.devices],
            precision=setup.precision,
            batch_size=setup.batch_size,
        )
    return ReadyNetwork(engine, checkpoint.variant, network.architecture.classes, shapes)


class TorchEngine:
    """An `Engine` that executes a Res2Net with torch on the CPU.

    It has as many streams as torch has threads, with one thread each. So no core waits for
    another one within a layer, which is slow when another process uses that core, and the
    values do not depend on the number of threads. The engine has its own threads, because
    torch's number of threads is a setting of the calling thread.

    Parameters
    ----------
    network, outputs, pool, preprocessing
        As for `FoldedNetwork`.
    precision : str
        ``fp32`` or ``bf16``.
    batch_size : int or None
        None means a size that suits a CPU.

    Raises
    ------
    DeviceError
        There is not enough memory for the network.
    """

    def __init__(
        self,
        network: Res2Net,
        outputs: Sequence[str],
        pool: str,
        preprocessing: Preprocessing,
        *,
        precision: str,
        batch_size: int | None = None,
    ) -> None:
        self._device = torch.device("cpu")
        self.description = EngineDescription(
            backend="torch",
            library=f"torch {torch.__version__}",
            device="cpu",
            device_model=cpu_model(),
            precision=precision,
            batch_size=batch_size or cpu_batch_size(preprocessing.image_size),
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
    """Make torch compute in this new thread alone when it is called from it."""
    with _new_threads:
        others = torch.get_num_threads()
        torch.set_num_threads(1)
        # new threads inherit that number, so the old one is set again in another thread
        back = threading.Thread(target=torch.set_num_threads, args=(others,))
        back.start()
        back.join()
