"""The published networks are one table, and records refuse values that cannot be used."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys

import pytest

from r2ncli.architectures import (
    DEFAULT_NETWORK,
    PUBLISHED,
    Architecture,
    Preprocessing,
    published,
)

FILES_AND_ERRORS = {  # as upstream lists them: top-1 and top-5 error on ImageNet, per cent
    "res2net50_v1b_26w_4s": ("res2net50_v1b_26w_4s-3cf99910.pth", 19.73, 4.96),
    "res2net101_v1b_26w_4s": ("res2net101_v1b_26w_4s-0812c246.pth", 18.77, 4.64),
    "res2net50_26w_4s": ("res2net50_26w_4s-06e79181.pth", 22.01, 6.15),
    "res2net50_48w_2s": ("res2net50_48w_2s-afed724a.pth", 22.68, 6.47),
    "res2net50_14w_8s": ("res2net50_14w_8s-6527dddc.pth", 21.86, 6.14),
    "res2net50_26w_6s": ("res2net50_26w_6s-19041792.pth", 21.42, 5.87),
    "res2net50_26w_8s": ("res2net50_26w_8s-2c7c9f12.pth", 20.80, 5.63),
    "res2net101_26w_4s": ("res2net101_26w_4s-02a759a1.pth", 20.81, 5.57),
    "res2next50": ("res2next50_4s-6ef7e7bf.pth", 21.76, 6.09),
}


def test_the_table_is_the_published_one():
    table = {
        name: (network.file, network.top1_error, network.top5_error)
        for name, network in PUBLISHED.items()
    }
    assert table == FILES_AND_ERRORS


def test_the_default_network_is_res2net50_v1b_26w_4s():
    assert DEFAULT_NETWORK == "res2net50_v1b_26w_4s"
    assert DEFAULT_NETWORK in PUBLISHED


def test_a_network_is_found_under_its_own_name():
    assert all(network.name == name for name, network in PUBLISHED.items())


def test_no_two_published_networks_are_alike():
    architectures = [network.architecture for network in PUBLISHED.values()]
    assert len(set(architectures)) == len(architectures)
    assert len({network.file for network in PUBLISHED.values()}) == len(architectures)


def test_names_of_the_files_say_the_base_width_and_the_scale():
    for name, network in PUBLISHED.items():
        match = re.search(r"_(\d+)w_(\d+)s$", name)
        if match:
            widths = network.architecture.base_width, network.architecture.scale
            assert widths == (int(match[1]), int(match[2]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("res2net50_v1b_26w_4s", "Res2Net50-v1b 26w-4s, 1000 classes"),
        ("res2net101_26w_4s", "Res2Net101 26w-4s, 1000 classes"),
        ("res2net50_14w_8s", "Res2Net50 14w-8s, 1000 classes"),
        ("res2next50", "Res2NeXt50 4w-4s, 1000 classes"),
    ],
)
def test_an_architecture_describes_itself_in_the_usual_short_form(name, words):
    assert PUBLISHED[name].architecture.describe() == words


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("res2net50_v1b_26w_4s", [26, 52, 104, 208]),
        ("res2net50_14w_8s", [14, 28, 56, 112]),
        ("res2next50", [32, 64, 128, 256]),
    ],
)
def test_splits_widen_with_the_stages(name, widths):
    architecture = PUBLISHED[name].architecture
    assert [architecture.split_width(planes) for planes in architecture.stage_planes] == widths


def test_a_splits_width_is_rounded_down_and_whole_in_every_group():
    architecture = Architecture((1, 1, 1, 1), base_width=37, cardinality=2)
    assert architecture.split_width(13) == 14  # 13 * 37 / 64 = 7.5, in two groups
    assert all(architecture.split_width(planes) % 2 == 0 for planes in range(4, 100))


def test_records_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PUBLISHED[DEFAULT_NETWORK].architecture.scale = 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        Preprocessing().image_size = 32


def test_the_default_preprocessing_is_imagenets():
    assert Preprocessing() == Preprocessing(
        image_size=224,
        resize_size=256,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop="centre",
    )


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 31, "resize_size": 64},
        {"image_size": 224, "resize_size": 223},
        {"mean": (0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5, 0.5)},
        {"std": (0.5, 0.0, 0.5)},
        {"crop": "left"},
    ],
)
def test_an_invalid_preprocessing_is_refused(options):
    with pytest.raises(ValueError, match=next(reversed(options))):
        Preprocessing(**options)


def test_another_input_size_keeps_the_ratio_of_the_resize_target():
    assert Preprocessing().resized(320, no_crop=False) == Preprocessing(320, 366)
    assert Preprocessing(64, 64).resized(96, no_crop=False) == Preprocessing(96, 96)


def test_without_another_size_or_crop_a_preprocessing_stays_as_it_is():
    given = Preprocessing(64, 72, crop="square")
    assert given.resized(None, no_crop=False) == given
    assert given.resized(None, no_crop=True) == dataclasses.replace(given, crop="none")


# --- a published network is one row -------------------------------------------------------

WITH_ONE_MORE = """
import sys
from dataclasses import replace
from pathlib import Path
from r2ncli import architectures

name = "res2net_one_more"
architecture = architectures.Architecture((1, 1, 1, 1), base_width=8, classes=5)
architectures.PUBLISHED[name] = architectures.PublishedNetwork(
    name, "res2net_one_more-00000000.pth", architecture, 1, 20.0, 5.0
)

import r2ncli
assert name in r2ncli.__all__
assert name in dir(r2ncli)
assert "torch" not in sys.modules
from r2ncli import *
assert res2net_one_more().architecture == architecture

import r2ncli.hubconf
from r2ncli.hubconf import *
assert name in r2ncli.hubconf.__all__
assert res2net_one_more is r2ncli.res2net_one_more is r2ncli.hubconf.res2net_one_more

import torch
folder = str(Path(r2ncli.__file__).parent)
assert torch.hub.load(folder, name, source="local").architecture == architecture

import torchvision, r2ncli.torchvision_models
assert torchvision.models.get_model(name).architecture == architecture

from r2ncli.weights.checkpoints import find_checkpoint, published_file
from r2ncli.weights.loading import list_layers
from r2ncli.weights.structure import variant_name
assert published_file("res2net-one-more-00000000.pth").name == name
assert list_layers("res2net-one-more")["fc"] == (5,)
assert variant_name(architecture) == name
try:
    find_checkpoint("no such name")
except r2ncli.CheckpointError as error:
    assert str(error).endswith(name)
"""


def test_one_row_in_the_table_is_enough_for_another_published_network(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITH_ONE_MORE],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCH_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr


def test_a_published_name_is_understood_with_hyphens_and_none_is_the_default():
    assert published("res2net50-v1b-26w_4s") is PUBLISHED["res2net50_v1b_26w_4s"]
    assert published("resnet50") is published("") is published("demo") is None


def test_a_network_without_a_classifier_is_described_so():
    without = dataclasses.replace(PUBLISHED[DEFAULT_NETWORK].architecture, classes=0)
    assert without.describe() == "Res2Net50-v1b 26w-4s, no classifier"
