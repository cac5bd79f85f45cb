"""The conformance kit: what the published networks give on weights made from names alone.

The published checkpoints are about 100 MB each, so the kit stands on a rule instead: each
tensor's values follow from its name, and `conformance/` holds what the published
implementations give with them, computed in float64. For each variant of the kit

- ``<variant>.json`` has its number of parameters and its state dict's names and shapes;
- ``<variant>.npz`` has ``logits`` [2, 1000] for `reference_input`, and for maxpool and
  layer1 to layer4 ``<layer>_pooled`` [2, C], the mean over space, and ``<layer>_shape``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from r2ncli.architectures import PUBLISHED, Architecture
from r2ncli.model import Res2Net

KIT = ("res2net50_v1b_26w_4s", "res2net101_v1b_26w_4s", "res2net50_26w_4s", "res2next50")

# small networks for what does not need a published one: odd widths, every kind of stem,
# shortcut, scale and grouping, and a first stage that needs no projection
TINY = {
    "v1": Architecture((1, 2, 1, 1), stem=(10,), stage_planes=(8, 12, 16, 20), classes=5),
    "v1b": Architecture(
        (2, 1, 2, 1),
        stem=(6, 7, 9),
        average_pool_shortcut=True,
        stage_planes=(7, 11, 16, 32),
        classes=7,
    ),
    "2 splits in 2 groups": Architecture(
        (1, 1, 1, 2), 37, 2, 2, stem=(11,), stage_planes=(8, 13, 16, 20), classes=3
    ),
    "8 splits in 2 groups": Architecture(
        (1, 2, 1, 1),
        13,
        8,
        2,
        stem=(5, 6, 8),
        average_pool_shortcut=True,
        stage_planes=(10, 12, 20, 28),
        classes=4,
    ),
    "no shortcut in layer1": Architecture(
        (2, 1, 1, 1),
        stem=(8, 8, 32),
        average_pool_shortcut=True,
        stage_planes=(8, 12, 16, 20),
        classes=6,
    ),
}


def reference_tensor(name: str, shape: Iterable[int]) -> Tensor:
    """The values that belong to `name`: float32, or an int64 zero for a batch counter."""
    shape = tuple(shape)
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        values = random.uniform(0.5, 1.5, shape)
    elif name.endswith(("running_mean", ".bias")):
        values = random.normal(0.0, 0.1, shape)
    elif len(shape) > 1:  # a convolution or the classifier: He's rule over the fan-in
        values = random.normal(0.0, sqrt(2.0 / prod(shape[1:])), shape)
    elif ".bn3." in name:  # a block's last scale is small, so that depth does not add up
        values = random.uniform(0.1, 0.3, shape)
    else:
        values = random.uniform(0.5, 1.5, shape)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def reference_input() -> Tensor:
    """Two images' worth of normalised noise, float32 [2, 3, 224, 224]."""
    noise = np.random.default_rng(2019).standard_normal((2, 3, 224, 224))
    return torch.from_numpy(noise.astype(np.float32))


def published_record(variant: str) -> dict[str, Any]:
    """What ``<variant>.json`` says: `variant`, `parameters`, `state_dict`."""
    folder = Path(__file__).parent / "conformance"
    record: dict[str, Any] = json.loads((folder / f"{variant}.json").read_text())
    return record


def expected_outputs(variant: str) -> dict[str, npt.NDArray[Any]]:
    """What ``<variant>.npz`` holds."""
    with np.load(Path(__file__).parent / "conformance" / f"{variant}.npz") as arrays:
        return dict(arrays)


def reference_state_dict(variant: str) -> dict[str, Tensor]:
    """The state dict of a variant of the kit, with the published names in their order."""
    pairs = published_record(variant)["state_dict"]
    return {name: reference_tensor(name, shape) for name, shape in pairs}


def reference_network(architecture: Architecture | str, output_stride: int = 32) -> Res2Net:
    """The network, or the published one of this name, with the rule's weights."""
    if isinstance(architecture, str):
        architecture = PUBLISHED[architecture].architecture
    with torch.device("meta"):
        network = Res2Net(architecture, output_stride)
    weights = {
        name: reference_tensor(name, tensor.shape) for name, tensor in network.state_dict().items()
    }
    network.load_state_dict(weights, assign=True)
    return network.eval()


def relative_error(ours: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """max|ours - expected| / max|expected|, of arrays of one shape."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape
    return float(np.abs(ours - expected).max() / np.abs(expected).max())
