"""The examples do what they say: a trained network that r2n uses, neighbours that are near."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.networks import TINY_ARCHITECTURE
from support.scripts import example

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
