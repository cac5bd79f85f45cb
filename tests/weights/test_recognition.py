"""Another network is recognised by a few names, and names are grouped by block."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision

from r2ncli.architectures import PUBLISHED
from r2ncli.weights.structure import by_block, expected_shapes, published_dla, seems_to_be

TORCHVISION = {
    "resnet18": "a ResNet-18, as torchvision's and timm's are",
    "resnet50": "a ResNet-50, as torchvision's and timm's are",
    "resnext50_32x4d": "a ResNeXt-50 of 32 groups",
    "wide_resnet50_2": "a Wide ResNet-50",
    "vgg11": "a VGG or an AlexNet",
    "alexnet": "a VGG or an AlexNet",
    "densenet121": "a DenseNet",
    "mobilenet_v2": "torchvision's MobileNetV2",
    "efficientnet_b0": "torchvision's EfficientNet",
    "convnext_tiny": "a ConvNeXt",
    "vit_b_16": "torchvision's vision transformer",
    "swin_t": "a Swin transformer",
}
TIMM = {
    "resnet50d": "a ResNet-50-D, as torchvision's and timm's are",
    "resnet26": "a ResNet-26, as torchvision's and timm's are",
    "seresnet50": "an SE-ResNet",
    "dla60_res2net": "res2net_dla60, a published network whose DLA body r2n does not support",
    "dla60_res2next": "res2next_dla60, a published network whose DLA body r2n does not support",
    "vit_tiny_patch16_224": "a vision transformer, timm's",
    "convnext_tiny": "a ConvNeXt",
    "swin_tiny_patch4_window7_224": "a Swin transformer",
    "efficientnet_b0": "an EfficientNet or MobileNetV3, timm's",
}


def shapes_of(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_networks_are_recognised(name):
    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None)
    assert seems_to_be(shapes_of(network)) == TORCHVISION[name]


@pytest.mark.parametrize("name", TIMM)
def test_timms_networks_are_recognised_under_any_prefix(name):
    with torch.device("meta"):
        shapes = shapes_of(timm.create_model(name, pretrained=False))
    assert seems_to_be(shapes) == TIMM[name]
    assert seems_to_be({f"module.{name}": shape for name, shape in shapes.items()}) == TIMM[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_res2net_seems_to_be_nothing_else(name):
    shapes = expected_shapes(PUBLISHED[name].architecture)
    assert seems_to_be(shapes) is None
    assert published_dla(shapes) is None


@pytest.mark.parametrize(
    ("width", "name"), [((28, 28), "res2net_dla60"), ((32, 4), "res2next_dla60")]
)
def test_the_published_networks_with_a_dla_body_are_recognised_by_their_splits(width, name):
    shapes = {"base_layer.0.weight": (16, 3, 7, 7), "level2.tree1.convs.0.weight": (*width, 3, 3)}
    assert published_dla(shapes) == name


def test_unknown_tensors_seem_to_be_nothing():
    assert seems_to_be({}) is None
    assert seems_to_be({"a": (1,), "b.weight": (2, 2)}) is None


def test_names_are_grouped_by_their_block():
    names = [f"layer3.5.{leaf}" for leaf in "abc"] + ["fc.weight", "fc.bias", "bn1.bias"]
    assert by_block(names) == "layer3.5 (3), fc (2), bn1.bias"
    assert by_block([]) == ""


def test_many_blocks_are_grouped_by_their_stage_and_many_stages_are_counted():
    every = list(expected_shapes(PUBLISHED["res2net50_v1b_26w_4s"].architecture))
    assert len(every) == 524
    assert by_block([name for name in every if name.startswith("layer4.")]) == (
        "layer4.0 (36), layer4.1 (30), layer4.2 (30)"
    )
    assert by_block([name for name in every if name.startswith("layer")]) == (
        "layer1 (96), layer2 (126), layer3 (186), layer4 (96)"
    )
    many = [f"{letter}.weight" for letter in "abcdefghi"]
    assert by_block(many) == f"{', '.join(many[:6])} and 3 more"
