"""Names of other libraries are translated to the published ones and back."""

from __future__ import annotations

import pytest
from support.reference_weights import TINY, published_record

from r2ncli.architectures import PUBLISHED
from r2ncli.weights.structure import LIBRARIES, expected_shapes, names_for, read_naming

ARCHITECTURES = {name: known.architecture for name, known in PUBLISHED.items()} | TINY
V1, V1B = "res2net50_26w_4s", "res2net50_v1b_26w_4s"


def published_names(variant):
    return [name for name, _ in published_record(variant)["state_dict"]]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("network", ARCHITECTURES)
def test_every_name_is_translated_there_and_back(library, network):
    official = list(expected_shapes(ARCHITECTURES[network]))
    there = names_for(library, official)
    assert list(there) == official
    back = read_naming(there.values()).official
    assert [back[there[name]] for name in official] == official


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "a.b.", "_orig_mod.module."])
@pytest.mark.parametrize("library", ["official", "mmpretrain", "mmdetection"])
def test_a_prefix_around_everything_is_recognised_and_removed(prefix, library):
    official = published_names(V1B)
    naming = read_naming(prefix + name for name in names_for(library, official).values())
    assert naming.library == library
    assert naming.prefix == prefix + ("" if library == "official" else "backbone.")
    assert list(naming.official.values()) == official


def test_the_deep_stem_has_mmpretrains_names():
    there = names_for("mmpretrain", published_names(V1B))
    assert there["conv1.0.weight"] == "backbone.stem.0.conv.weight"
    assert there["conv1.4.running_var"] == "backbone.stem.1.bn.running_var"
    assert there["bn1.bias"] == "backbone.stem.2.bn.bias"
    assert there["layer1.0.bns.2.weight"] == "backbone.layer1.0.bns.2.weight"
    assert there["layer2.0.downsample.1.weight"] == "backbone.layer2.0.downsample.1.weight"
    assert there["fc.bias"] == "head.fc.bias"


def test_the_deep_stem_has_mmdetections_names():
    there = names_for("mmdetection", published_names(V1B))
    assert there["conv1.0.weight"] == "backbone.stem.0.weight"
    assert there["conv1.6.weight"] == "backbone.stem.6.weight"
    assert there["bn1.running_mean"] == "backbone.stem.7.running_mean"


def test_a_stem_of_one_convolution_keeps_its_names():
    for library in ("mmpretrain", "mmdetection"):
        there = names_for(library, published_names(V1))
        assert there["conv1.weight"] == "backbone.conv1.weight"
        assert there["bn1.weight"] == "backbone.bn1.weight"


@pytest.mark.parametrize(
    ("timm_name", "variant"),
    [("res2net50d", V1B), ("res2net50_26w_4s", V1), ("res2next50", "res2next50")],
)
def test_timm_has_the_published_names(timm_name, variant):
    import timm
    import torch

    with torch.device("meta"):
        network = timm.create_model(timm_name, pretrained=False)
    official = published_names(variant)
    assert list(network.state_dict()) == list(names_for("timm", official).values()) == official


def test_a_detectors_other_parts_stay_and_its_backbone_gets_the_published_names():
    backbone = [n for n in names_for("mmdetection", published_names(V1B)).values() if "fc" not in n]
    naming = read_naming([*backbone, "neck.conv.weight", "bbox_head.fc.weight"])
    assert naming.library == "mmdetection"
    assert naming.official["neck.conv.weight"] == "neck.conv.weight"
    assert naming.official["bbox_head.fc.weight"] == "bbox_head.fc.weight"
    assert naming.official["backbone.stem.7.weight"] == "bn1.weight"


def test_names_of_another_network_stay_as_they_are():
    names = ["stem.0.weight", "head.fc.weight", "blocks.0.norm1.weight"]
    assert read_naming(names).official == {name: name for name in names}
    assert read_naming([]).official == {}


def test_no_two_names_become_one():
    names = ["layer1.0.conv1.weight", "fc.weight", "head.fc.weight"]
    assert len(set(read_naming(names).official.values())) == 3
    names = ["m.layer1.0.conv1.weight", "m.bn1.weight", "bn1.weight"]
    assert len(set(read_naming(names).official.values())) == 3


def test_an_unknown_library_is_named():
    with pytest.raises(ValueError, match=r"'keras': expected one of official, timm, mmpretrain"):
        names_for("keras", [])
