"""The weights in other libraries: each example loads them strictly, and runs."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.extras import needs
from support.networks import TINY_ARCHITECTURE
from support.reference_weights import reference_state_dict
from support.scripts import EXAMPLES, example
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from typer.testing import CliRunner

import r2ncli
from r2ncli.cli.app import app
from r2ncli.weights.loading import load_model

NAME = "res2net50_v1b_26w_4s"


def has_all_of(part: nn.Module, weights: str | Path) -> bool:
    """Whether `part` has all of these weights but the classifier, under the same names."""
    expected = load_model(weights).state_dict()
    del expected["fc.weight"], expected["fc.bias"]
    own = part.state_dict()
    return list(own) == list(expected) and all(torch.equal(own[n], expected[n]) for n in own)


def losses(printed: str) -> list[float]:
    found = [float(text) for text in re.findall(r"loss (\S+)", printed)]
    assert found
    assert all(math.isfinite(loss) for loss in found)
    return found


# --- torchvision --------------------------------------------------------------------------


@pytest.mark.slow
def test_faster_rcnn_with_a_pyramid_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faster_rcnn = example("faster_rcnn", monkeypatch)
    model = faster_rcnn.detector("demo", classes=2, size=64)
    assert has_all_of(model.backbone.body, "demo")
    pyramid = model.backbone(torch.zeros(1, 3, 64, 64))
    assert [level.shape[-1] for level in pyramid.values()] == [16, 8, 4, 2, 1]

    assert faster_rcnn.main(["--weights", "demo", "--steps", "2", "--size", "64"]) == 0
    assert len(losses(capsys.readouterr().out)) == 2


def test_deeplabv3_with_output_stride_8_learns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deeplabv3 = example("deeplabv3", monkeypatch)
    model = deeplabv3.segmenter("demo", classes=2)
    assert has_all_of(model.backbone, "demo")
    maps = model.backbone(torch.zeros(1, 3, 64, 64))
    assert maps["out"].shape[-2:] == maps["aux"].shape[-2:] == (8, 8)

    assert deeplabv3.main(["--weights", "demo", "--steps", "4", "--size", "64"]) == 0
    first, *_, last = losses(capsys.readouterr().out)
    assert last < first


def test_a_converted_backbone_loads_strictly_into_torchvisions_layer_getter(
    tiny_weights: Path, tmp_path: Path
) -> None:
    r2ncli.convert(tiny_weights, tmp_path / "backbone.pth", to="torchvision-backbone")
    kept = IntermediateLayerGetter(r2ncli.Res2Net(TINY_ARCHITECTURE), {"layer4": "out"})
    kept.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=True)
    assert has_all_of(kept, tiny_weights)


# --- code that calls the layers, and fine-tuning ------------------------------------------


def test_stem_and_layers_called_one_by_one_give_what_forward_gives(
    reference_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = example("polyp_segmentation", monkeypatch).PolypSegmenter(str(reference_file))
    seen: list[Tensor] = []
    for layer in (1, 2, 3, 4):
        model.resnet.get_submodule(f"layer{layer}").register_forward_hook(
            lambda _module, _inputs, output: seen.append(output)
        )
    pixels = torch.randn(1, 3, 352, 352, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.resnet(pixels)
        forwards_own = seen.copy()
        one_by_one = model.layers(pixels)
    assert [list(x.shape) for x in one_by_one] == [
        [1, 256, 88, 88],
        [1, 512, 44, 44],
        [1, 1024, 22, 22],
        [1, 2048, 11, 11],
    ]
    assert all(torch.equal(x, y) for x, y in zip(one_by_one, forwards_own, strict=True))


def test_a_polyp_segmenter_learns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    polyps = example("polyp_segmentation", monkeypatch)
    assert polyps.main(["--weights", "demo", "--steps", "4", "--size", "96"]) == 0
    first, *_, last = losses(capsys.readouterr().out)
    assert last < first


def test_a_fine_tuned_network_is_what_r2n_classifies_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    for label, colour in (("blue", (40, 60, 200)), ("red", (200, 50, 40))):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(6):
            pixels = np.array(colour) + random.integers(-30, 31, (40, 40, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(tmp_path / "photos" / label / f"{number}.png")
    photos, mine = str(tmp_path / "photos"), str(tmp_path / "mine.safetensors")

    arguments = [photos, "--weights", "demo", "--epochs", "12", "--batch-size", "4", "-o", mine]
    assert example("fine_tune", monkeypatch).main(arguments) == 0

    done = CliRunner().invoke(app, ["classify", photos, "--weights", mine, "--topk", "1"])
    assert done.exit_code == 0
    _, *rows = done.stdout.splitlines()
    assert len(rows) == 12
    for row in rows:
        path, status, _, _, label, _ = row.split(",")
        assert (status, label) == ("ok", Path(path).parent.name)


# --- other libraries ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # timm's own
def test_timm_gives_the_same_logits(
    reference_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    assert example("timm_res2net50d", monkeypatch).main([str(reference_file)]) == 0
    assert "of the largest logit" in capsys.readouterr().out


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")  # mmcv's own
def test_mmpretrain_gives_the_same_logits_with_the_deep_stem_and_no_other(
    reference_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("interop", "mmpretrain", "mmcv", "mmengine", "modelindex", "markdown")
    mmpretrain = example("mmpretrain_classifier", monkeypatch)
    assert mmpretrain.main([str(reference_file)]) == 0

    r2ncli.convert(reference_file, tmp_path / "mmpretrain.pth", to="mmpretrain")
    converted = torch.load(tmp_path / "mmpretrain.pth", weights_only=True)
    widespread = {**mmpretrain.BACKBONE, "deep_stem": False, "avg_down": False}
    with pytest.raises(RuntimeError, match="Missing key"):
        mmpretrain.classifier(widespread).load_state_dict(converted, strict=True)

    with pytest.raises(r2ncli.CheckpointError, match="10 classes, which does not fit"):
        mmpretrain.main(["demo"])

    # they are right for v1, whose stem is one convolution
    v1 = tmp_path / "v1.pth"
    torch.save(reference_state_dict("res2net50_26w_4s"), v1)
    monkeypatch.setattr(mmpretrain, "BACKBONE", widespread)
    assert mmpretrain.main([str(v1)]) == 0


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")  # the library's own
def test_a_unet_with_a_registered_encoder_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("interop", "segmentation_models_pytorch")
    from segmentation_models_pytorch.encoders import get_encoder

    unet = example("unet", monkeypatch)
    model = unet.segmenter("demo")
    assert has_all_of(model.encoder.network, "demo")
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 64, 64)
    dilated = get_encoder("res2net", output_stride=8)
    sizes = [feature.shape[-1] for feature in dilated(torch.zeros(1, 3, 64, 64))]
    assert sizes == [64, 32, 16, 8, 8, 8]

    with pytest.raises(r2ncli.CheckpointError, match="no such weights"):
        unet.main(["--weights", "absent"])
    assert unet.main(["--weights", "demo", "--steps", "4", "--size", "64"]) == 0
    first, *_, last = losses(capsys.readouterr().out)
    assert last < first


# in a process of its own: importing ultralytics replaces functions of torch and OpenCV
YOLO = """
import sys
from pathlib import Path
import torch, yaml, yolo
from ultralytics import YOLO
from r2ncli import CheckpointError
from r2ncli.weights.loading import load_model

weights, folder = sys.argv[1:]
Path(folder, "yolo.yaml").write_text(yaml.safe_dump(yolo.configuration(weights, classes=1)))
model = YOLO(Path(folder, "yolo.yaml"), task="detect").model
yolo.keep_eps(model)
network = load_model(weights)
pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    outputs = model.eval().model[0](pixels)
    expected = network.forward_features(pixels)[1:]
for output, feature in zip(outputs[12:15], expected, strict=True):
    assert torch.equal(output, feature)
assert len(outputs) == 15
assert yolo.main(["--weights", weights, "--images", "4", "--size", "64"]) == 0
try:
    yolo.main(["--weights", "demo", "--images", "4"])
except CheckpointError:
    pass
else:
    raise AssertionError("another network was accepted")
print("trained")
"""


@pytest.mark.interop
def test_yolo_gets_the_outputs_of_the_layers_and_trains(
    reference_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("interop", "ultralytics")
    monkeypatch.setenv("YOLO_OFFLINE", "1")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{EXAMPLES}:{EXAMPLES.parent}")
    command = [sys.executable, "-c", YOLO, str(reference_file), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("trained\n")
