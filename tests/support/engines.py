"""Engines to test, and what the plain network gives for the same pixels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from r2ncli.architectures import Preprocessing
from r2ncli.engine.base import Engine, Pixels, cpu_has_bf16
from r2ncli.engine.cuda import CudaEngine
from r2ncli.engine.graph import to_graph
from r2ncli.engine.openvino import OpenVinoEngine, compiled
from r2ncli.engine.pytorch import TorchEngine
from r2ncli.model import Res2Net, layer_shapes
from support.reference_weights import TINY, reference_network

Array = npt.NDArray[Any]

SMALL = Preprocessing(64, 64)
FULL = Preprocessing()
CPU = torch.device("cpu", 0)

tiny = pytest.mark.parametrize("architecture", TINY.values(), ids=TINY)
needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="this processor has no bfloat16")


def torch_engine(
    network: Res2Net,
    outputs: Sequence[str] = ("fc",),
    pool: str = "none",
    batch_size: int | None = 3,
    preprocessing: Preprocessing = SMALL,
    precision: str = "fp32",
) -> TorchEngine:
    """Return an engine that runs torch on the CPU."""
    return TorchEngine(
        network, outputs, pool, preprocessing, precision=precision, batch_size=batch_size
    )


def openvino_engine(
    network: Res2Net,
    outputs: Sequence[str] = ("fc",),
    pool: str = "none",
    batch_size: int = 3,
    preprocessing: Preprocessing = SMALL,
    precision: str = "fp32",
    streams: int = 1,
) -> OpenVinoEngine:
    """Return an engine that runs OpenVINO."""
    graph = to_graph(network, outputs, pool, preprocessing, batch_size)
    return OpenVinoEngine(compiled(graph, precision), outputs, precision, streams=streams)


def cuda_engine(
    network: Res2Net | None = None,
    outputs: Sequence[str] = ("fc",),
    pool: str = "none",
    batch_size: int = 3,
    preprocessing: Preprocessing = SMALL,
    precision: str = "fp32",
    devices: Sequence[torch.device] = (CPU,),
) -> CudaEngine:
    """Return a CUDA engine, which runs a tiny network on one CPU device unless told otherwise."""
    return CudaEngine(
        network or reference_network(TINY["v1"]),
        outputs,
        pool,
        preprocessing,
        devices=list(devices),
        precision=precision,
        batch_size=batch_size,
    )


ENGINES: dict[str, Callable[..., Engine]] = {
    "torch": torch_engine,
    "openvino": openvino_engine,
    "cuda": cuda_engine,
}


def noise(count: int, size: int = 64, seed: int = 0) -> Pixels:
    """Return seeded pixels, uint8 [count, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def normalised(pixels: Pixels, preprocessing: Preprocessing = SMALL) -> torch.Tensor:
    """Return what the plain network takes for these pixels, float32 [N, 3, H, W]."""
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    mean, std = (
        torch.tensor(given, dtype=torch.float64).view(3, 1, 1)
        for given in (preprocessing.mean, preprocessing.std)
    )
    return ((values - mean) / std).float()


def plain_outputs(network: Res2Net, x: torch.Tensor) -> dict[str, Array]:
    """Return every layer's output in the plain network: float32 arrays."""
    network = copy.deepcopy(network)
    seen: dict[str, Array] = {}
    for name in layer_shapes(network.architecture, x.shape[-1]):
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output.numpy().copy()})
        )
    with torch.no_grad():
        network(x)
    return seen


def pooled(array: Array, pool: str) -> Array:
    """Pool `array` [N, C, H, W] over its last two axes, as `pool` says."""
    if array.ndim == 2 or pool == "none":
        return array
    return array.mean((2, 3), dtype=np.float64) if pool == "avg" else array.max((2, 3))


def global_state() -> dict[str, Any]:
    """Return every global setting of torch that a library could change."""
    backends = torch.backends
    return {
        "generic": backends.fp32_precision,
        "cuda": backends.cuda.matmul.fp32_precision,
        "cudnn": backends.cudnn.conv.fp32_precision,
        "mkldnn convolutions": backends.mkldnn.conv.fp32_precision,
        "mkldnn products": backends.mkldnn.matmul.fp32_precision,
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "random": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": backends.cudnn.benchmark,
        "deterministic convolutions": backends.cudnn.deterministic,
        "sums in fp16": backends.cuda.matmul.allow_fp16_accumulation,
    }
