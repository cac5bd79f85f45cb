"""The network has the published outputs, names, shapes and hooks."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.reference_weights import (
    KIT,
    TINY,
    expected_outputs,
    published_record,
    reference_input,
    reference_network,
    reference_state_dict,
    relative_error,
)
from torch import nn

from r2ncli.architectures import PUBLISHED
from r2ncli.errors import UsageError
from r2ncli.model import Bottle2neck, Res2Net, conv_bn_pairs, forward_flops, layer_shapes

STAGES = ["layer1", "layer2", "layer3", "layer4"]
CHILDREN = ["conv1", "bn1", "relu", "maxpool", *STAGES, "avgpool", "fc"]
PARAMETERS = {
    "res2net50_v1b_26w_4s": 25_718_352,
    "res2net101_v1b_26w_4s": 45_225_920,
    "res2net50_26w_4s": 25_699_120,
    "res2net50_48w_2s": 25_287_304,
    "res2net50_14w_8s": 25_059_816,
    "res2net50_26w_6s": 37_051_448,
    "res2net50_26w_8s": 48_403_776,
    "res2net101_26w_4s": 45_206_688,
    "res2next50": 24_671_464,
}

tiny = pytest.mark.parametrize("architecture", TINY.values(), ids=TINY)


def untrained(architecture):
    """The network without memory for its tensors: for names and shapes."""
    with torch.device("meta"):
        return Res2Net(architecture)


def pixels(size, count=2, seed=0):
    """Normalised noise, float32 [count, 3, size, size]."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def seen_by_hooks(network, x):
    """What a forward hook on each module gets in one pass: outputs, and clones made at once."""
    outputs = {name: [] for name, _ in network.named_modules() if name}
    clones = {name: [] for name in outputs}

    def hook(name):
        def keep(_module, _inputs, output):
            outputs[name].append(output)
            clones[name].append(output.clone())

        return keep

    handles = [network.get_submodule(name).register_forward_hook(hook(name)) for name in outputs]
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return outputs, clones


# --- the published networks -----------------------------------------------------------


@pytest.mark.parametrize("variant", KIT)
def test_names_and_shapes_are_the_published_ones_in_their_order(variant):
    state_dict = untrained(PUBLISHED[variant].architecture).state_dict()
    ours = [[name, list(tensor.shape)] for name, tensor in state_dict.items()]
    assert ours == published_record(variant)["state_dict"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    network = untrained(PUBLISHED[name].architecture)
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]
    assert PUBLISHED[name].parameters == PARAMETERS[name]


@pytest.mark.parametrize("variant", KIT)
def test_outputs_are_those_of_the_published_implementation(variant):
    network = reference_network(variant)
    expected = expected_outputs(variant)
    stages = [name for name in CHILDREN if f"{name}_pooled" in expected]
    assert set(STAGES) <= set(stages)
    seen = {}
    for name in stages:
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output})
        )
    with torch.no_grad():
        logits = network(reference_input())
    assert relative_error(logits, expected["logits"]) < 1e-5
    for name in stages:
        assert list(seen[name].shape) == expected[f"{name}_shape"].tolist()
        assert relative_error(seen[name].mean((2, 3)), expected[f"{name}_pooled"]) < 1e-5


def test_a_published_state_dict_loads_strictly_and_comes_back_the_same():
    weights = reference_state_dict("res2net50_v1b_26w_4s")
    network = Res2Net(PUBLISHED["res2net50_v1b_26w_4s"].architecture)
    network.load_state_dict(weights, strict=True)
    again = network.state_dict()
    assert list(again) == list(weights)
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in PUBLISHED if "v1b" not in name])
def test_logits_are_timms_where_timm_has_the_network(variant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own
        timm = pytest.importorskip("timm")
    ours = reference_network(variant)
    theirs = timm.create_model(variant, pretrained=False).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        x = reference_input()
        assert relative_error(ours(x), theirs(x)) < 1e-5


# --- output stride --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("output_stride", [16, 8])
@pytest.mark.parametrize(
    ("variant", "timms"),
    [
        ("res2net50_v1b_26w_4s", "res2net50d"),
        ("res2net50_26w_4s", "res2net50_26w_4s"),
        ("res2next50", "res2next50"),
    ],
)
def test_dilated_features_are_timms_for_the_same_weights(variant, timms, output_stride):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own
        timm = pytest.importorskip("timm")
    ours = reference_network(variant, output_stride)
    theirs = timm.create_model(timms, features_only=True, output_stride=output_stride).eval()
    weights = ours.state_dict()
    del weights["fc.weight"], weights["fc.bias"]
    theirs.load_state_dict(weights, strict=True)
    x = reference_input()[:1, :, :, :190]  # neither square nor a multiple of 32
    with torch.no_grad():
        features = theirs(x)[1:]  # without the stem's
        for feature, expected in zip(ours.forward_features(x), features, strict=True):
            assert relative_error(feature, expected) < 1e-4


@tiny
@pytest.mark.parametrize(
    ("output_stride", "sizes"), [(32, [16, 8, 4, 2]), (16, [16, 8, 4, 4]), (8, [16, 8, 8, 8])]
)
def test_features_are_no_smaller_than_the_output_stride_has_them(
    architecture, output_stride, sizes
):
    network = reference_network(architecture, output_stride)
    assert network.output_stride == output_stride
    with torch.no_grad():
        features = network.forward_features(pixels(64))
    planes = architecture.stage_planes
    assert [list(feature.shape) for feature in features] == [
        [2, 4 * channels, size, size] for channels, size in zip(planes, sizes, strict=True)
    ]


@tiny
@pytest.mark.parametrize("output_stride", [16, 8])
def test_a_dilated_network_has_the_published_state_dict(architecture, output_stride):
    dilated = reference_network(architecture, output_stride).state_dict()
    published = reference_network(architecture).state_dict()
    assert list(dilated) == list(published)
    assert all(torch.equal(dilated[name], published[name]) for name in published)


@pytest.mark.parametrize(("output_stride", "expected"), [(16, [1, 2, 2]), (8, [2, 4, 4])])
def test_the_first_block_of_a_dilated_stage_keeps_the_dilation_before_it(output_stride, expected):
    with torch.device("meta"):
        network = Res2Net(PUBLISHED["res2net50_v1b_26w_4s"].architecture, output_stride)
    for block, dilation in zip(network.layer4, expected, strict=True):
        for conv in block.convs:
            assert (conv.dilation, conv.padding) == ((dilation, dilation),) * 2
            assert conv.stride == (1, 1)
    assert network.layer2[0].convs[0].stride == (2, 2)


def test_an_invalid_output_stride_is_refused():
    with pytest.raises(UsageError, match=r"^`output_stride` 4: expected 32, 16 or 8$"):
        Res2Net(TINY["v1"], output_stride=4)


# --- the published class's habits -----------------------------------------------------


@tiny
def test_children_walked_in_order_give_the_logits(architecture):
    network, x = reference_network(architecture), pixels(64)
    assert [name for name, _ in network.named_children()] == CHILDREN
    with torch.no_grad():
        walked = x
        for name, child in network.named_children():
            if name == "fc":
                walked = torch.flatten(walked, 1)
            walked = child(walked)
        assert torch.equal(walked, network(x))


@tiny
def test_blocks_have_the_published_children_in_their_order(architecture):
    for name, block in untrained(architecture).named_modules():
        if isinstance(block, Bottle2neck):
            children = [child for child, _ in block.named_children()]
            first = name.endswith(".0")
            assert children[:2] == ["conv1", "bn1"]
            assert ("pool" in children) == first
            assert ("downsample" in children) <= first
            assert len(block.convs) == len(block.bns) == architecture.scale - 1


def test_the_stem_by_hand_works_at_another_size():
    network, x = reference_network("res2net50_v1b_26w_4s"), pixels(352, count=1)
    with torch.no_grad():
        stem = network.relu(network.bn1(network.conv1(x)))
        by_hand = network.layer1(network.maxpool(stem))
    assert stem.shape == (1, 64, 176, 176)
    assert by_hand.shape == (1, 256, 88, 88)
    assert stem.min() == 0


@tiny
def test_what_a_hook_keeps_is_never_altered_later(architecture):
    outputs, clones = seen_by_hooks(reference_network(architecture), pixels(64))
    for name, kept in outputs.items():
        for output, clone in zip(kept, clones[name], strict=True):
            assert torch.equal(output, clone), name


@tiny
def test_a_hook_sees_batch_norms_before_and_relus_after_the_activation(architecture):
    network = reference_network(architecture)
    outputs, _ = seen_by_hooks(network, pixels(64))
    assert outputs["bn1"][0].min() < 0
    assert torch.equal(outputs["relu"][0], outputs["bn1"][0].clamp(min=0))
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert outputs[name][0].min() < 0, name
        elif isinstance(module, nn.ReLU):
            assert all(output.min() == 0 for output in outputs[name]), name


def test_a_forward_pass_leaves_its_input_as_it_was():
    x = pixels(64)
    before = x.clone()
    with torch.no_grad():
        reference_network(TINY["v1b"])(x)
    assert torch.equal(x, before)


def test_torchvisions_layer_getter_gives_the_stages():
    from torchvision.models._utils import IntermediateLayerGetter

    network, x = reference_network(TINY["v1"]), pixels(64)
    getter = IntermediateLayerGetter(network, {"layer1": "low", "layer4": "high"})
    outputs, _ = seen_by_hooks(network, x)
    with torch.no_grad():
        got = getter(x)
    assert torch.equal(got["low"], outputs["layer1"][0])
    assert torch.equal(got["high"], outputs["layer4"][0])


@pytest.mark.parametrize(
    ("name", "output_stride"), [("v1", 32), ("no shortcut in layer1", 32), ("v1b", 8)]
)
def test_torchvisions_feature_extractor_can_trace_it(name, output_stride):
    from torchvision.models.feature_extraction import create_feature_extractor

    network, x = reference_network(TINY[name], output_stride), pixels(64)
    outputs, _ = seen_by_hooks(network, x)
    extractor = create_feature_extractor(network, ["layer2.0.bn3", "layer3", "fc"])
    with torch.no_grad():
        got = extractor(x)
    assert list(got) == ["layer2.0.bn3", "layer3", "fc"]
    assert all(torch.equal(output, outputs[name][0]) for name, output in got.items())


@tiny
def test_forward_features_gives_what_the_four_stages_give(architecture):
    network, x = reference_network(architecture), pixels(64)
    outputs, _ = seen_by_hooks(network, x)
    with torch.no_grad():
        features = network.forward_features(x)
    assert isinstance(features, list)
    for feature, stage in zip(features, STAGES, strict=True):
        assert torch.equal(feature, outputs[stage][0])


@tiny
def test_every_parameter_learns(architecture):
    network = copy.deepcopy(reference_network(architecture)).train()
    network(pixels(64)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_new_network_starts_with_he_initialisation():
    torch.manual_seed(0)
    network = Res2Net(TINY["v1"])
    weight = network.layer4[0].conv3.weight
    fan_out = weight.shape[0]
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert network.layer1[0].bn3.weight.eq(1).all()


# --- what others need to know of it ---------------------------------------------------


@tiny
@pytest.mark.parametrize("size", [32, 57])
def test_layer_shapes_are_those_that_hooks_see(architecture, size):
    network = reference_network(architecture)
    outputs, _ = seen_by_hooks(network, pixels(size))
    once = {name: tuple(o[0].shape[1:]) for name, o in outputs.items() if len(o) == 1}
    assert layer_shapes(architecture, size) == once


@tiny
def test_layers_are_modules_with_one_output_per_forward_pass(architecture):
    network = untrained(architecture)
    offered = layer_shapes(architecture, 64)
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList):
            assert name not in offered
        elif isinstance(module, Bottle2neck):
            assert name in offered
            assert f"{name}.relu" not in offered
            assert f"{name}.bn3" in offered
    assert set(CHILDREN) <= set(offered)
    assert offered["fc"] == (architecture.classes,)


def test_layer_shapes_of_the_default_network_are_the_well_known_ones():
    shapes = layer_shapes(PUBLISHED["res2net50_v1b_26w_4s"].architecture, 224)
    assert [shapes[f"layer{stage}"] for stage in (1, 2, 3, 4)] == [
        (256, 56, 56),
        (512, 28, 28),
        (1024, 14, 14),
        (2048, 7, 7),
    ]
    assert shapes["avgpool"] == (2048, 1, 1)
    assert shapes["fc"] == (1000,)


@tiny
def test_every_convolution_has_the_batch_norm_that_takes_its_output(architecture):
    network = reference_network(architecture)
    pairs = list(conv_bn_pairs(network))
    outputs, inputs = {}, {}
    for name, module in network.named_modules():
        module.register_forward_pre_hook(
            lambda _module, given, name=name: inputs.update({name: given[0]})
        )
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: outputs.update({name: output})
        )
    with torch.no_grad():
        network(pixels(64))
    assert all(outputs[conv] is inputs[bn] for conv, bn in pairs)
    kinds = {name: type(module) for name, module in network.named_modules()}
    assert {conv for conv, _ in pairs} == {n for n, kind in kinds.items() if kind is nn.Conv2d}
    assert {bn for _, bn in pairs} == {n for n, kind in kinds.items() if kind is nn.BatchNorm2d}


def test_the_default_networks_forward_pass_is_four_and_a_half_billion_multiply_adds():
    """timm's table of res2net50d: 4.52 GMACs at 224 x 224."""
    flops = forward_flops(PUBLISHED["res2net50_v1b_26w_4s"].architecture, 224)
    assert 4.4e9 < flops / 2 < 4.6e9
