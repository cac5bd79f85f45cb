"""The examples do what they say: a trained network that r2n uses, neighbours that are near."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.networks import TINY_ARCHITECTURE
from support.scripts import CHECKS, EXAMPLES, example

import r2ncli
from r2ncli.weights.checkpoints import find_checkpoint, read_metadata

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


@pytest.fixture
def train_demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, on one thread: two that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield example("train_demo", monkeypatch)
    torch.set_num_threads(threads)


@pytest.fixture
def neighbours(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return example("nearest_neighbours", monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images whose class is their colour: 24 to train with and 6 to test."""
    folder = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for label, colour in COLOURS.items():
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = np.array(colour) + random.integers(-30, 31, (32, 32, 3))
                picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                picture.save(folder / split / label / f"{number:04d}.png")
    return folder


# --- train_demo -------------------------------------------------------------------------


def test_training_on_class_folders_gives_a_network_that_r2n_classifies_with(
    train_demo: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_demo, "ARCHITECTURE", TINY_ARCHITECTURE)
    monkeypatch.setattr(train_demo, "BATCH_SIZE", 4)  # more steps, and gentler ones
    monkeypatch.setattr(train_demo, "PEAK_LEARNING_RATE", 0.02)
    output = tmp_path / "colours.safetensors"

    assert train_demo.main([str(data), "--epochs", "4", "-o", str(output)]) == 0

    rows = list(r2ncli.classify(data / "test", weights=output, topk=1, precision="fp32"))
    assert [row.predictions[0].label for row in rows] == [
        Path(row.path).parent.name for row in rows
    ]
    assert len(rows) == 6


def test_an_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(
    train_demo: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    assert train_demo.main([str(data), "--epochs", "3", "-o", str(whole)]) == 0

    with monkeypatch.context() as patch:
        patch.setattr(train_demo, "augment", interrupted_on_call(3, train_demo.augment))
        assert train_demo.main([str(data), "--epochs", "3", "-o", str(resumed)]) == 130
    assert not resumed.exists()
    assert train_demo.main([str(data), "--epochs", "3", "-o", str(resumed)]) == 0

    assert resumed.read_bytes() == whole.read_bytes()


def interrupted_on_call(number: int, function: Callable[..., object]) -> Callable[..., object]:
    calls = []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == number:
            raise KeyboardInterrupt
        return function(*arguments)

    return interrupted


def test_the_state_of_another_training_is_refused(
    train_demo: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "demo.safetensors")
    assert train_demo.main([str(data), "--epochs", "1", "-o", output]) == 0
    assert train_demo.main([str(data), "--epochs", "2", "-o", output]) == 1
    assert "Give another --state" in capsys.readouterr().err


def test_an_export_is_small_and_says_labels_preprocessing_recipe_and_accuracy(
    train_demo: ModuleType, data: Path, tmp_path: Path
) -> None:
    output, state = tmp_path / "demo.safetensors", tmp_path / "state.pth"
    arguments = [str(data), "--epochs", "1", "--limit", "10", "--state", str(state)]
    assert train_demo.main([*arguments, "-o", str(output)]) == 0

    assert output.stat().st_size <= 2_500_000
    tensors = load_file(output)
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
    metadata = read_metadata(output)
    assert metadata["variant"] == "demo"
    assert metadata["labels"] == ["blue", "green", "red"]
    assert metadata["preprocessing"]["image_size"] == 64
    assert metadata["recipe"].startswith("1 epochs of the 8 training pictures of colours")
    assert metadata["accuracy"].keys() == {"top1", "pictures", "precision", "measured"}
    assert metadata["accuracy"]["pictures"] == 6
    assert metadata["accuracy"]["precision"] == "fp32"


def test_a_checkpoint_is_exported_without_training_from_a_zip_file_too(
    train_demo: ModuleType, data: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    archive = shutil.make_archive(str(tmp_path / "colours"), "zip", data)
    state = tmp_path / "state.pth"
    train_demo.main([archive, "--epochs", "1", "--state", str(state), "-o", str(first)])

    train_demo.main([archive, "--epochs", "1", "--export", str(state), "-o", str(second)])

    assert second.read_bytes() == first.read_bytes()


def test_the_shipped_network_says_how_it_was_trained_and_how_good_it_is() -> None:
    shipped = find_checkpoint("demo")
    assert shipped.stat().st_size <= 2_500_000
    metadata = read_metadata(shipped)
    assert len(metadata["labels"]) == 10
    assert metadata["labels"] == sorted(metadata["labels"])
    assert metadata["recipe"].startswith("31 epochs of the 50,000 training pictures of cifar10")
    assert metadata["accuracy"]["pictures"] == 10_000
    assert metadata["accuracy"]["top1"] > 0.87


# --- stress -----------------------------------------------------------------------------


def stress(*arguments: str) -> dict[str, Any]:
    """The document that the script ends with; it must end well."""
    command = [sys.executable, str(CHECKS / "stress.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "h5"])
def test_runs_that_are_killed_at_random_moments_end_as_an_uninterrupted_one(kind: str) -> None:
    document = stress("kill", "--kills", "4", "--pictures", "1000", "--format", kind)
    assert document["formats"][kind]["kills"] == 4


@pytest.mark.slow
def test_five_thousand_pictures_take_no_more_memory_than_one_thousand() -> None:
    assert stress("many", "--inputs", "5000")["more_mb"] < 100


@pytest.mark.slow
def test_two_thousand_corrupted_files_break_nothing() -> None:
    report: dict[str, Any] = stress("files", "--count", "2000", "--jobs", "1")
    assert report["broken"] == []
    assert sum(sum(outcomes.values()) for outcomes in report["formats"].values()) == 2000
    for kind, outcomes in report["formats"].items():
        assert outcomes.keys() == {"decoded", "failed"}, kind
    assert len(report["formats"]) >= 10


@pytest.mark.slow
def test_files_that_end_the_process_are_named_and_the_rest_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = example("stress", monkeypatch)
    nothing = script.Corruption(originals=None, seed=0, max_pixels=1)  # ends it at once
    counted, troubles, _ = script.watch_decoding(range(7, 13, 3), nothing)
    assert counted.total() == 0
    assert troubles == [{"number": n, "what": "ends the process: 1"} for n in (7, 10)]


# --- nearest_neighbours -----------------------------------------------------------------


def test_the_nearest_neighbour_of_an_image_is_its_copy(
    neighbours: ModuleType,
    pictures: Path,
    tiny_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(pictures / "00007.jpg", pictures / "copy.jpg")
    (pictures / "00003.jpg").write_bytes(b"no picture")
    features = tmp_path / "features.h5"
    r2ncli.extract_to(features, pictures, weights=tiny_weights, precision="fp32")
    query = str(pictures / "00007.jpg")

    assert neighbours.main([str(features), "--query", query, "-k", "30"]) == 0

    first, *nearest = capsys.readouterr().out.splitlines()
    assert first == query
    assert nearest[0] == f"  1.0000  {pictures / 'copy.jpg'}"
    assert len(nearest) == 19  # all but itself and the failed one
    assert not any("00003.jpg" in line for line in nearest)


def test_neighbours_found_in_small_pieces_are_those_of_the_whole(
    neighbours: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 2, 3)).astype(np.float32)
    failed = np.arange(50) % 7 == 0
    vectors[failed] = np.nan
    with feature_file(tmp_path / "features.h5", vectors, failed) as file:
        monkeypatch.setattr(neighbours, "PIECE_BYTES", 4 * 24)  # four rows
        found = neighbours.nearest_neighbours(file, "layer4", [1, 30], 5)

    unit = vectors.reshape(50, 6) / np.linalg.norm(vectors.reshape(50, 6), axis=1, keepdims=True)
    for row, nearest in zip([1, 30], found, strict=True):
        similarities = np.where(failed, -2, unit @ unit[row])
        similarities[row] = -2
        expected = np.argsort(-similarities)[:5]
        assert [path for _, path in nearest] == [f"{n}.jpg" for n in expected]
        np.testing.assert_allclose([s for s, _ in nearest], similarities[expected], rtol=1e-5)


def test_without_a_query_the_first_images_with_features_are_asked_for(
    neighbours: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = np.arange(10) == 1
    feature_file(tmp_path / "features.h5", np.eye(10, dtype=np.float32), failed).close()
    assert neighbours.main([str(tmp_path / "features.h5"), "-k", "1"]) == 0
    asked = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert asked == ["0.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--query", "1.jpg"], "no picture '1.jpg' with features"),  # which failed
        (["--query", "absent.jpg"], "no picture 'absent.jpg' with features"),
        (["--layer", "layer9"], "no layer 'layer9', there are: layer4"),
    ],
)
def test_what_the_file_does_not_have_is_said_in_a_sentence(
    neighbours: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    failed = np.arange(4) == 1
    feature_file(tmp_path / "features.h5", np.eye(4, dtype=np.float32), failed).close()
    assert neighbours.main([str(tmp_path / "features.h5"), *arguments]) == 1
    assert complaint in capsys.readouterr().err


def feature_file(path: Path, vectors: np.ndarray, failed: np.ndarray) -> h5py.File:
    """A file as `r2n extract` writes it: datasets /features/<layer>, /paths, /status."""
    text = h5py.string_dtype()
    file = h5py.File(path, "w")
    file["features/layer4"] = vectors
    file.create_dataset("paths", data=[f"{n}.jpg" for n in range(len(vectors))], dtype=text)
    file.create_dataset("status", data=["failed" if f else "ok" for f in failed], dtype=text)
    return file


# --- compare_peers ----------------------------------------------------------------------------


def compare_peers(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHECKS / "compare_peers.py"), "--rounds", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peers", "compared"),
    [("timm_best,model", {"timm_best", "r2n"}), ("r2n_extract", {"r2n", "r2n_extract"})],
)
def test_peers_are_compared_on_the_same_pictures_in_turns(peers: str, compared: set[str]) -> None:
    done = compare_peers("--pictures", "4", "--seconds", "0.1", "--peers", peers)
    assert done.returncode == 0, (done.stdout, done.stderr)
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["ratios"]["r2n"]) == compared
    assert report["ratios"]["r2n"]["r2n"] == [1.0]
    assert ({"r2n model", "r2n whole"} < set(report["images_per_second"])) == ("model" in peers)


def test_peers_that_nobody_knows_are_refused_with_those_there_are() -> None:
    done = compare_peers("--peers", "tim")
    assert done.returncode == 2
    assert "timm_default" in done.stderr


# --- gpu_check --------------------------------------------------------------------------------


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delitem(sys.modules, "gpu_pictures", raising=False)
    return example("gpu_check", monkeypatch)


@pytest.mark.slow
def test_every_section_of_the_check_of_a_gpu_runs_on_a_cpu_as_far_as_it_can(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    output, photos = tmp_path / "check.json", str(EXAMPLES / "photos")
    arguments = ["--device", "cpu", "--quick", "--pictures", photos, "-o", str(output)]
    command = [sys.executable, str(EXAMPLES / "gpu_check.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, (done.stdout, done.stderr)
    sections = json.loads(output.read_text())["sections"]
    assert list(sections) == list(gpu_check.NAMES)
    assert [name for name, found in sections.items() if not found.get("whole")] == []
    left_out = {
        (section, name)
        for section, found in sections.items()
        for name, value in found.items()
        if isinstance(value, str) and value.startswith(("skipped", "not measured", "left out"))
    }
    gpu = "r2n --decode gpu"
    absent = {("decoding", "torchcodec")}  # it is an extra
    assert left_out - absent == {("memory", "skipped"), ("decoding", gpu), ("end_to_end", gpu)}
    checks = [check["what"] for found in sections.values() for check in found["checks"]]
    assert sum("the same bytes" in what for what in checks) == 12
    assert sum("against" in what for what in checks) == 6


def test_a_section_that_takes_too_long_is_an_error_of_its_own(gpu_check: ModuleType) -> None:
    found = gpu_check.section_found("environment", 0.1, ["cpu", "1", ""])
    assert found["error"] == "stopped after 0 s"


def test_only_numbers_that_are_not_proven_fail_the_check(
    gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = gpu_check.Section("cpu", True, "", 60, tmp_path / "found.json")
    section.reaches("model alone", 1.2, 3)
    section.within_limit("near", [1.0, 2.00001], [1.0, 2.0], "fp32")
    assert gpu_check.summary({"model": section.found}) == 0
    assert gpu_check.summary({"decoding": {"error": "absent", "checks": []}}) == 0
    assert gpu_check.summary({"numbers": {"error": "absent", "checks": []}}) == 1
    section.within_limit("nowhere", [1.0, np.nan], [1.0, 2.0], "fp32")
    assert gpu_check.summary({"model": section.found}) == 1

    assert json.loads((tmp_path / "found.json").read_text())["checks"][2]["value"] == "nan"
    printed = capsys.readouterr().out
    assert "MISSED model alone: 1.2 (at least 3)" in printed
    assert "FAIL   nowhere" in printed


def test_the_steady_part_of_a_program_leaves_its_start_out(
    gpu_check: ModuleType, tmp_path: Path
) -> None:
    from gpu_pictures import watched

    out = tmp_path / "out.csv"
    program = f"""
import time
time.sleep(1)
with open({str(out)!r}, "w") as file:
    for _ in range(50):
        print("row", file=file, flush=True)
        time.sleep(0.02)
"""
    section = gpu_check.Section("cpu", True, "", 60, tmp_path / "found.json")
    found = watched(section, [sys.executable, "-c", program], out, 50)
    assert found["whole"]["images/s"] < 25
    assert found["whole"]["images/s"] < found["steady"]["images/s"] < 51
