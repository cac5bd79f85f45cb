"""The network of fused kernels gives what `FoldedNetwork` gives, whatever is asked of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.reference_weights import TINY, reference_network, relative_error

pytest.importorskip("triton")

from support.kernels import DEVICE, RUNS_KERNELS

from r2ncli.architectures import PUBLISHED, Preprocessing
from r2ncli.engine.folding import FoldedNetwork
from r2ncli.engine.fused import FusedNetwork
from r2ncli.model import Res2Net, layer_shapes

pytestmark = RUNS_KERNELS
STEPS = ("relu", "maxpool", "layer1.0", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc")

tiny = pytest.mark.parametrize("architecture", TINY.values(), ids=TINY)


def noise(count, size):
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).to(DEVICE)


def outputs_of(form, network, names, pixels, pool="none"):
    with torch.inference_mode():
        return form(network, names, pool, Preprocessing(64, 64), DEVICE, torch.float32)(pixels)


def assert_alike(network, names, pixels, pool="none"):
    """Compare with `FoldedNetwork`, which `test_engines` compares with the plain network."""
    ours = outputs_of(FusedNetwork, network, names, pixels, pool)
    expected = outputs_of(FoldedNetwork, network, names, pixels, pool)
    assert list(ours) == list(names)
    for name in names:
        assert ours[name].dtype == torch.float32
        assert ours[name].is_contiguous()
        assert relative_error(ours[name].cpu(), expected[name].cpu()) < 1e-5, name


@tiny
def test_fused_steps_are_those_of_torchs_functions(architecture):
    assert_alike(reference_network(architecture), STEPS, noise(2, 33))


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_fused_steps_are_pooled_as_torch_pools_them(pool):
    assert_alike(reference_network(TINY["v1"]), STEPS, noise(2, 33), pool)


@tiny
def test_all_layers_at_once_are_those_of_torchs_functions(architecture):
    assert_alike(
        reference_network(architecture), tuple(layer_shapes(architecture, 32)), noise(1, 32)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v1b", "2 splits in 2 groups"])
def test_each_layer_alone_is_that_of_torchs_functions(name):
    network = reference_network(TINY[name])
    for layer in list(layer_shapes(TINY[name], 32))[::4]:
        assert_alike(network, (layer,), noise(1, 32))


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in PUBLISHED if "101" not in name])
def test_published_blocks_give_what_torchs_functions_give(variant):
    """With a block or two of each stage: the others, and those of the 101s, are like these."""
    shortened = replace(PUBLISHED[variant].architecture, layers=(2, 1, 1, 1))
    assert_alike(reference_network(shortened), ("layer1", "layer4", "fc"), noise(1, 32))


@pytest.mark.parametrize("output_stride", [16, 8])
def test_a_dilated_network_is_fused_too(output_stride):
    network = Res2Net(TINY["v1b"], output_stride).eval()
    assert_alike(network, ("layer3", "layer4", "fc"), noise(1, 48))


def test_nothing_runs_after_the_deepest_layer():
    network = reference_network(TINY["v1"])
    form = FusedNetwork(network, ["layer2.0"], "avg", Preprocessing(64, 64), DEVICE, torch.float32)
    assert len(form._steps) == 4  # stem, max pool, layer1's block, layer2's first


def test_a_row_does_not_depend_on_its_neighbours():
    network, pixels = reference_network(TINY["v1"]), noise(3, 25)
    together = outputs_of(FusedNetwork, network, ["layer3", "fc"], pixels)
    for row in (0, 2):
        alone = outputs_of(FusedNetwork, network, ["layer3", "fc"], pixels[row : row + 1])
        for name, values in alone.items():
            assert relative_error(values.cpu(), together[name][row : row + 1].cpu()) < 1e-6


def test_fusing_leaves_the_given_network_as_it_was():
    network = reference_network(TINY["v1b"])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    outputs_of(FusedNetwork, network, ["fc", "layer1.0.bns.0"], noise(1, 32))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
