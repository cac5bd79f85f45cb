"""A converted checkpoint gives the same logits, and the way back the same bits."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.extras import needs
from support.networks import TINY_ARCHITECTURE
from support.reference_weights import reference_network, reference_state_dict
from typer.testing import CliRunner

import r2ncli
import r2ncli.weights.convert
from r2ncli.cli.app import app
from r2ncli.errors import CheckpointError, OutputError, UsageError
from r2ncli.weights.checkpoints import read_metadata, sha256
from r2ncli.weights.convert import NAMINGS, convert
from r2ncli.weights.loading import load_model, load_state_dict


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return list(ours) == list(theirs) and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
        for name in ours
    )


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_library_exports_it() -> None:
    assert r2ncli.convert is convert


# --- names and containers -----------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("naming", ["official", "timm", "mmpretrain"])
def test_there_and_back_is_bit_identical(
    naming: str, suffix: str, tiny_weights: Path, tmp_path: Path
) -> None:
    there, back = tmp_path / f"there{suffix}", tmp_path / "back.pth"
    convert(tiny_weights, there, to=naming)
    convert(there, back)
    published = load_model(tiny_weights).state_dict()  # in its order, which safetensors lose
    assert same_bits(torch.load(back, weights_only=True), published)


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["timm", "mmpretrain"])
@pytest.mark.parametrize("variant", ["res2net50_v1b_26w_4s", "res2net50_26w_4s", "res2next50"])
def test_published_networks_come_back_bit_identical(
    variant: str, naming: str, tmp_path: Path
) -> None:
    published = reference_state_dict(variant)
    torch.save(published, tmp_path / "published.pth")
    convert(tmp_path / "published.pth", tmp_path / "there.pth", to=naming)
    there = torch.load(tmp_path / "there.pth", weights_only=True)
    assert (list(there) == list(published)) == (naming == "timm")
    convert(tmp_path / "there.pth", tmp_path / "back.pth")
    assert same_bits(torch.load(tmp_path / "back.pth", weights_only=True), published)


def test_half_precision_stays_half(tmp_path: Path) -> None:
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in reference_network(TINY_ARCHITECTURE).state_dict().items()
    }
    torch.save({"state_dict": {f"module.{n}": t for n, t in half.items()}}, tmp_path / "half.pth")
    convert(tmp_path / "half.pth", tmp_path / "there.safetensors", to="mmpretrain")
    convert(tmp_path / "there.safetensors", tmp_path / "back.pth")
    assert same_bits(torch.load(tmp_path / "back.pth", weights_only=True), half)


def test_tensors_that_are_part_of_a_larger_storage_are_written_alone(
    tiny_weights: Path, tmp_path: Path
) -> None:
    state_dict = load_file(tiny_weights)
    flat = torch.zeros(5_000_000)
    state_dict["fc.bias"] = flat[:6]
    torch.save(state_dict, tmp_path / "part.pth")
    convert(tmp_path / "part.pth", tmp_path / "whole.pth")
    assert (tmp_path / "whole.pth").stat().st_size < 2_000_000


def test_a_backbone_has_the_official_names_without_a_classifier(
    tiny_weights: Path, tmp_path: Path
) -> None:
    done = convert(tiny_weights, tmp_path / "backbone.pth", to="torchvision-backbone")
    backbone = torch.load(tmp_path / "backbone.pth", weights_only=True)
    official = reference_network(TINY_ARCHITECTURE).state_dict()
    assert list(backbone) == [name for name in official if not name.startswith("fc.")]
    assert done.naming == "torchvision-backbone"
    assert (done.compared, done.difference) == ("features", 0)
    assert convert(tiny_weights, tmp_path / "whole.pth").compared == "logits"
    with pytest.raises(
        CheckpointError, match="no classifier, but 2 tensors are missing"
    ):  # there is no way back
        convert(tmp_path / "backbone.pth", tmp_path / "back.pth")


def test_mmpretrains_names_are_split_in_backbone_and_head(
    tiny_weights: Path, tmp_path: Path
) -> None:
    convert(tiny_weights, tmp_path / "mm.pth", to="mmpretrain")
    names = set(torch.load(tmp_path / "mm.pth", weights_only=True))
    assert {
        "head.fc.weight",
        "backbone.stem.0.conv.weight",
        "backbone.layer1.0.convs.0.weight",
    } <= (names)
    assert {name.partition(".")[0] for name in names} == {"backbone", "head"}


# --- metadata -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_labels_preprocessing_and_the_sources_digest_are_kept(
    suffix: str, tiny_weights: Path, tmp_path: Path
) -> None:
    done = convert(tiny_weights, tmp_path / f"out{suffix}")
    metadata = read_metadata(tmp_path / f"out{suffix}")
    assert metadata["labels"] == ["ant", "bee", "cow", "doe", "eel", "fox"]
    assert metadata["preprocessing"]["image_size"] == 32
    assert metadata["preprocessing"]["resize_size"] == 36
    assert metadata["source"] == {"file": "tiny.safetensors", "sha256": sha256(tiny_weights)}
    assert done.sha256 == sha256(tiny_weights)

    convert(tmp_path / f"out{suffix}", tmp_path / "again.safetensors")
    again = read_metadata(tmp_path / "again.safetensors")
    assert again["labels"] == metadata["labels"]
    assert again["source"]["source"] == metadata["source"]


def test_other_metadata_is_kept(tiny_weights: Path, tmp_path: Path) -> None:
    told = {"recipe": "ten epochs", "labels": list("abcdef"), "wnids": list("ghijkl")}
    save_file(load_file(tiny_weights), tmp_path / "in.safetensors", {"r2n": json.dumps(told)})
    convert(tmp_path / "in.safetensors", tmp_path / "out.pth")
    assert told.items() <= read_metadata(tmp_path / "out.pth").items()


def test_a_converted_checkpoint_classifies_as_before(
    tiny_weights: Path, pictures: Path, tmp_path: Path
) -> None:
    convert(tiny_weights, tmp_path / "out.pth", to="mmpretrain")
    before = list(r2ncli.classify(pictures, weights=tiny_weights, precision="fp32"))
    after = list(r2ncli.classify(pictures, weights=tmp_path / "out.pth", precision="fp32"))
    assert after == before


# --- nothing half-written has a final name ------------------------------------------------


@pytest.mark.parametrize("name", ["out.pth", "out.pth.json", "out.safetensors"])
def test_existing_files_are_replaced_only_with_overwrite(
    name: str, tiny_weights: Path, tmp_path: Path
) -> None:
    output = tmp_path / name.removesuffix(".json")
    (tmp_path / name).write_text("precious")
    with pytest.raises(OutputError, match=rf"{name} exists\. `overwrite=True` replaces it"):
        convert(tiny_weights, output)
    assert (tmp_path / name).read_text() == "precious"
    convert(tiny_weights, output, overwrite=True)
    assert load_model(output).architecture == TINY_ARCHITECTURE


def test_a_checkpoint_can_be_converted_over_itself(tiny_weights: Path, tmp_path: Path) -> None:
    convert(tiny_weights, tmp_path / "mine.pth")
    before = load_state_dict(tmp_path / "mine.pth")
    convert(tmp_path / "mine.pth", tmp_path / "mine.pth", to="mmpretrain", overwrite=True)
    assert "head.fc.bias" in torch.load(tmp_path / "mine.pth", weights_only=True)
    assert same_bits(load_state_dict(tmp_path / "mine.pth"), before)


def test_what_does_not_give_the_same_logits_is_not_kept(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupted(path: Path) -> dict[str, torch.Tensor]:
        state_dict = load_state_dict(path)
        if path.name == "converted.pth":
            state_dict["fc.bias"][0] += 0.1
        return state_dict

    monkeypatch.setattr(r2ncli.weights.convert, "load_state_dict", corrupted)
    with pytest.raises(OutputError, match=r"not written: its logits differ from those of .* by "):
        convert(tiny_weights, tmp_path / "out.pth")
    assert left_over(tmp_path) == []


def test_a_backbone_that_does_not_give_the_same_features_is_not_kept(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupted(path: Path) -> dict[str, torch.Tensor]:
        state_dict = load_state_dict(path)
        if path.name == "converted.pth":
            state_dict["layer4.0.bn3.bias"][0] += 0.1
        return state_dict

    monkeypatch.setattr(r2ncli.weights.convert, "load_state_dict", corrupted)
    with pytest.raises(OutputError, match=r"not written: its features differ from those of .* by "):
        convert(tiny_weights, tmp_path / "out.pth", to="torchvision-backbone")
    assert left_over(tmp_path) == []


def test_an_interrupted_conversion_leaves_nothing(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_weights, tmp_path / "out.pth")
    assert left_over(tmp_path) == []


def test_the_file_gets_its_name_after_its_companion(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(tiny_weights, tmp_path / "out.pth")
    rename = os.replace

    def killed_before_the_last(source: Path, target: Path) -> None:
        if target.name == "out.pth":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed_before_the_last)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny_weights, tmp_path / "out.pth", overwrite=True)
    assert left_over(tmp_path) == ["out.pth.json"]  # never an old file with new metadata


# --- invalid options -----------------------------------------------------------------------


def test_invalid_options_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    for output, options, complaint in [
        ("out.zip", {}, "unknown suffix '.zip', expected one of .pth, .safetensors, "),
        ("out", {}, "unknown suffix ''"),
        ("out.pth", {"to": "keras"}, f"`to` 'keras': expected one of {', '.join(NAMINGS)}"),
        ("out.onnx", {"to": "timm"}, '`to="timm"`: .onnx files have no tensor names'),
    ]:
        with pytest.raises(UsageError) as caught:
            convert("absent.pth", tmp_path / output, **options)
        assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "missing"), [(".onnx", "onnxruntime"), (".xml", "openvino"), (".xml", "onnxscript")]
)
def test_a_library_that_is_missing_is_named(
    suffix: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UsageError) as caught:
        convert("absent.pth", tmp_path / f"out{suffix}")
    said, _, packages = str(caught.value).partition(": pip install ")
    assert said == f"{suffix} needs what is not installed"
    assert missing in packages.split()


def test_a_missing_folder_or_a_folder_of_the_outputs_name_is_an_error(
    tiny_weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match=r"the folder .* does not exist"):
        convert(tiny_weights, tmp_path / "absent" / "out.pth")
    (tmp_path / "out.pth").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        convert(tiny_weights, tmp_path / "out.pth", overwrite=True)
    with pytest.raises(OutputError, match="cannot be written: file name too long"):
        convert(tiny_weights, tmp_path / f"{'x' * 300}.safetensors")


def test_a_network_whose_logits_are_not_finite_is_refused(
    tiny_weights: Path, tmp_path: Path
) -> None:
    state_dict = load_file(tiny_weights)
    state_dict["fc.weight"][:] = 3e38
    torch.save(state_dict, tmp_path / "large.pth")
    with pytest.raises(CheckpointError, match="its logits are not finite; r2n verify-weights"):
        convert(tmp_path / "large.pth", tmp_path / "out.pth")


# --- the command --------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(tiny_weights: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(tiny_weights), str(tmp_path / "out.pth"), "--to", "mmpretrain"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert done.stdout == ""
    assert "mmpretrain names, logits bit-identical -> " in done.stderr
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 6
    assert "overwrite" in again.stderr
    quiet = CliRunner().invoke(app, [*arguments, "--overwrite", "--quiet"])
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_an_unknown_container_is_a_usage_error_of_the_command(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["convert", "demo", str(tmp_path / "x.h5")]).exit_code == 2


# --- other runtimes -----------------------------------------------------------------------


@pytest.mark.interop
def test_onnx_takes_any_batch_and_keeps_the_metadata(tiny_weights: Path, tmp_path: Path) -> None:
    needs("onnx", "onnxscript", "onnxruntime")
    import onnx
    import onnxruntime

    done = convert(tiny_weights, tmp_path / "out.onnx")
    assert 0 <= done.difference < 1e-4
    assert left_over(tmp_path) == ["out.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx")
    network = load_model(tiny_weights)
    for count in (1, 2, 5):
        pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        (logits,) = session.run(["logits"], {"input": pixels.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, network(pixels).numpy(), atol=1e-5)
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["r2n"])
    assert metadata["labels"][0] == "ant"
    assert metadata["source"]["sha256"] == sha256(tiny_weights)
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"), full_check=True)
    assert str(Path(r2ncli.__file__).parent).encode() not in (tmp_path / "out.onnx").read_bytes()


@pytest.mark.interop
def test_openvino_gets_two_files_and_sends_no_telemetry(tiny_weights: Path, tmp_path: Path) -> None:
    needs("onnx", "onnxscript", "openvino")
    sys.modules.pop("openvino_telemetry.main", None)
    convert(tiny_weights, tmp_path / "out.xml")
    assert left_over(tmp_path) == ["out.bin", "out.xml"]
    assert "openvino_telemetry.main" not in sys.modules

    import openvino

    read = openvino.Core().read_model(tmp_path / "out.xml")
    assert json.loads(read.get_rt_info("r2n").astype(str))["labels"][5] == "fox"
    compiled = openvino.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    network = load_model(tiny_weights)
    for count in (1, 4):
        pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected = network(pixels).numpy()
        np.testing.assert_allclose(compiled(pixels.numpy())["logits"], expected, atol=1e-5)
    with pytest.raises(OutputError, match=r"out\.bin exists"):
        convert(tiny_weights, tmp_path / "out.xml")
