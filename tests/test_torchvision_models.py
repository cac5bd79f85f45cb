"""torchvision and torch.hub give the published networks, with r2ncli's weights and checks."""

from __future__ import annotations

import copy
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.reference_weights import reference_state_dict
from torchvision.models import get_model, get_model_builder, get_model_weights, list_models
from torchvision.models._utils import IntermediateLayerGetter

import r2ncli
import r2ncli.hubconf
import r2ncli.torchvision_models
from r2ncli.architectures import PUBLISHED, Preprocessing
from r2ncli.errors import CheckpointError, UsageError
from r2ncli.images.decode import DecodeRules, decode

NAME = "res2net50_v1b_26w_4s"


# --- torchvision --------------------------------------------------------------------------


def test_torchvision_lists_every_published_network() -> None:
    assert set(PUBLISHED) <= set(list_models())


def test_torchvision_builds_it_untrained_and_in_training_mode_as_its_own() -> None:
    network = get_model(NAME, num_classes=7, output_stride=16)
    assert network.training
    assert network.fc.out_features == 7
    assert network.output_stride == 16


def test_torchvision_builds_it_with_the_weights_of_a_file(reference_file: Path) -> None:
    network = get_model(NAME, weights=reference_file)
    assert network.training
    expected = reference_state_dict(NAME)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
    getter = IntermediateLayerGetter(network.eval(), {"layer4": "out"})
    assert getter(torch.zeros(1, 3, 64, 64))["out"].shape == (1, 2048, 2, 2)


@pytest.mark.parametrize(
    "weights", ["DEFAULT", "IMAGENET1K_V1", f"{NAME}_Weights.DEFAULT", "the record"]
)
def test_torchvisions_default_weights_are_the_official_file_checked(
    weights: str, hub: Path, reference_file: Path
) -> None:
    shutil.copy(reference_file, hub / PUBLISHED[NAME].file)  # its digest is not the published one
    record = get_model_weights(NAME).DEFAULT
    with pytest.raises(CheckpointError, match="not the published file"):
        get_model(NAME, weights=record if weights == "the record" else weights)
    with pytest.raises(CheckpointError, match="not the published file"):
        record.get_state_dict(progress=False, check_hash=True)


def test_unknown_weights_are_refused_with_a_sentence() -> None:
    with pytest.raises(CheckpointError, match="no such weights: 'IMAGENET1K_V7'"):
        get_model(NAME, weights="IMAGENET1K_V7")
    with pytest.raises(TypeError, match=f"expected {NAME}_Weights but received"):
        get_model(NAME, weights=get_model_weights("res2net50_26w_4s").DEFAULT)


def test_another_number_of_classes_than_the_weights_have_is_refused(reference_file: Path) -> None:
    with pytest.raises(UsageError, match=r"^`num_classes` 7: these weights have 1000 classes"):
        get_model(NAME, weights=reference_file, num_classes=7)
    assert get_model(NAME, weights=reference_file, num_classes=1000).fc.out_features == 1000


def test_the_record_has_the_fields_of_torchvisions_own() -> None:
    record = get_model_weights(NAME).DEFAULT
    assert record is get_model_weights(get_model_builder(NAME)).IMAGENET1K_V1
    assert copy.deepcopy(record) == record
    assert record.url.endswith("/" + PUBLISHED[NAME].file)
    assert record.meta["num_params"] == 25_718_352
    assert record.meta["_metrics"] == {"ImageNet-1K": {"acc@1": 80.27, "acc@5": 95.04}}
    assert len(record.meta["categories"]) == 1000
    assert "noncommercial" in record.meta["license"]


def test_the_records_transforms_are_our_preprocessing(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    image = coarse.resize((400, 300))
    image.save(tmp_path / "image.png")
    theirs = get_model_weights(NAME).DEFAULT.transforms()(image)

    preprocessing = Preprocessing()
    pixels = decode((tmp_path / "image.png").read_bytes(), preprocessing, DecodeRules("exact"))
    ours = (pixels / 255 - preprocessing.mean) / preprocessing.std
    one_grey_level = 1.01 / 255 / min(preprocessing.std)
    assert theirs.shape == (3, 224, 224)
    assert np.abs(ours.transpose(2, 0, 1) - theirs.numpy()).max() <= one_grey_level


# --- torch.hub ----------------------------------------------------------------------------

HUB = """
import sys, torch
folder, weights = sys.argv[1:]
assert not any(name.startswith("r2ncli") for name in sys.modules)
network = torch.hub.load(
    folder, "res2net50_v1b_26w_4s", source="local", weights=weights, output_stride=8
)
print(network.training, network.output_stride, float(network.fc.bias.sum()))
print(folder in sys.path, sys.modules["r2ncli"].__file__)
"""


def test_torch_hub_is_offered_the_published_networks_and_any_checkpoint() -> None:
    before = list(sys.path)
    offered = {name for name, value in vars(r2ncli.hubconf).items() if callable(value)}
    assert offered == {*PUBLISHED, "load_model"}
    assert set(r2ncli.hubconf.__all__) == offered
    importlib.reload(r2ncli.hubconf)
    assert sys.path == before


@pytest.mark.slow
def test_torch_hub_loads_from_a_checkout_that_is_not_installed(
    reference_file: Path, tmp_path: Path
) -> None:
    checkout = Path(r2ncli.__file__).parent
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "r2ncli").symlink_to(checkout)
    folder = tmp_path / "elsewhere" / "r2ncli"
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(folder), str(reference_file)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "TORCH_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    network, package = done.stdout.splitlines()
    expected = float(reference_state_dict(NAME)["fc.bias"].sum())
    assert network == f"False 8 {expected}"
    assert package == f"False {folder / '__init__.py'}"
