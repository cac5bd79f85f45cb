"""The examples work, show their help without extras, and end expected errors in a sentence."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.networks import TINY_ARCHITECTURE
from support.scripts import EXAMPLES, example

import r2ncli
from r2ncli.weights.checkpoints import find_checkpoint, read_metadata

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}

EXTRAS = (
    *("fsspec", "mmcv", "mmengine", "mmpretrain", "nncf", "onnx", "onnxruntime", "onnxscript"),
    *("pillow_heif", "pyarrow", "segmentation_models_pytorch", "timm"),
    *("ultralytics", "yaml"),
)
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def run_script(name: str, *arguments: str) -> int:
    """Run an example as `python examples/NAME.py` does, in this process; return its exit code."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return int(ended.value.code or 0)


# --- every example ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_shows_its_help_without_any_extra(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in EXTRAS:
        monkeypatch.setitem(sys.modules, library, None)  # importing it raises ModuleNotFoundError
    assert run_script(name, "--help") == 0
    printed = capsys.readouterr()
    assert "usage: " in printed.out.lower()
    assert printed.err == ""


@pytest.mark.parametrize(
    ("name", "arguments", "library", "command"),
    [
        ("mmpretrain_classifier", ["demo"], "mmpretrain", "pip install '.[interop]'"),
        ("timm_res2net50d", ["demo"], "timm", "pip install timm"),
        ("unet", [], "segmentation_models_pytorch", "pip install '.[interop]'"),
        ("yolo", [], "ultralytics", "pip install '.[interop]'"),
    ],
)
def test_a_missing_extra_ends_in_a_sentence_with_the_command_that_installs_it(
    name: str,
    arguments: list[str],
    library: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", ModuleType("yaml"))
    monkeypatch.setitem(sys.modules, library, None)
    assert run_script(name, *arguments) == 2
    assert capsys.readouterr().err == f"{name}: {library} is not installed: {command}\n"


@pytest.mark.parametrize(
    ("name", "arguments", "code", "complaint"),
    [
        ("deeplabv3", ["--weights", "absent"], 4, "no such weights: 'absent'"),
        ("deeplabv3", [], 4, "cannot download"),  # the tests have no network
        ("faster_rcnn", ["--weights", "absent"], 4, "no such weights: 'absent'"),
        ("fine_tune", ["absent"], 3, "absent: no such folder"),
        ("fine_tune", ["colours/red"], 3, "expected one folder of images per class"),
        ("fine_tune", ["colours", "--val", "absent"], 3, "absent: no such folder"),
        ("fine_tune", ["colours", "--val", "1.5"], 2, "must be at least 0 and below 1"),
        ("fine_tune", ["colours", "--val", "other"], 3, "its class folders are blue, pink"),
        ("fine_tune", ["colours", "--weights", "absent"], 4, "no such weights: 'absent'"),
        ("fine_tune", ["colours", "--device", "cuda:99"], 5, "--device cuda:99: torch cannot"),
        ("fine_tune", ["colours", "-o", "mine.pth"], 2, "must end in .safetensors"),
        ("fine_tune", ["colours", "-o", "absent/mine.safetensors"], 6, "no folder absent"),
        ("fine_tune", ["broken"], 3, "broken/blue/0.png: cannot be read as an image"),
        ("mmpretrain_classifier", ["absent"], 4, "no such weights: 'absent'"),
        ("nearest_neighbours", ["absent.h5"], 3, "absent.h5: no such file"),
        ("nearest_neighbours", ["text.txt"], 3, "text.txt: not an HDF5 file"),
        ("nearest_neighbours", ["other.h5"], 3, "other.h5: not the output of r2n extract"),
        ("polyp_segmentation", ["--weights", "absent"], 4, "no such weights: 'absent'"),
        ("timm_res2net50d", ["absent"], 4, "no such weights: 'absent'"),
        ("timm_res2net50d", ["demo"], 4, "10 classes, expected res2net50_v1b_26w_4s"),
        ("train_demo", ["absent"], 3, "absent: no such file"),
        ("train_demo", ["text.txt"], 3, "text.txt: neither a folder nor a zip file"),
        ("train_demo", ["colours"], 3, "expected train/ and test/ with a folder per class"),
        ("train_demo", [".", "--export", "absent.pth"], 4, "absent.pth: cannot be read"),
        ("train_demo", [".", "-o", "absent/demo.safetensors"], 6, "no folder absent"),
        ("train_demo", [".", "--state", "text.txt"], 4, "text.txt: not the state of a training"),
    ],
)
def test_an_expected_error_ends_in_a_sentence_and_its_exit_code(
    name: str,
    arguments: list[str],
    code: int,
    complaint: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(data / "test", tmp_path / "colours")
    for folder in ("train", "test"):
        (tmp_path / folder).symlink_to(data / folder)
    for folder, label in (("other", "blue"), ("other", "pink"), ("broken", "blue")):
        (tmp_path / folder / label).mkdir(parents=True)
        (tmp_path / folder / label / "0.png").write_bytes(b"no image")
    (tmp_path / "text.txt").write_text("text")
    h5py.File(tmp_path / "other.h5", "w").close()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "timm", ModuleType("timm"))  # errors come before its use
    if name == "fine_tune" and "--weights" not in arguments:
        arguments = [*arguments, "--weights", "demo"]

    assert run_script(name, *arguments) == code

    error = capsys.readouterr().err
    assert error.startswith(f"{name}: ")
    assert complaint in error
    assert error.count("\n") == 1


# --- fine_tune --------------------------------------------------------------------------


def test_fine_tuning_says_what_it_does_before_torch_is_imported(data: Path) -> None:
    program = f"""
import sys, fine_tune
fine_tune.fine_tune = lambda options: print("torch" in sys.modules)
fine_tune.main([{str(data / "train")!r}, "--weights", "demo"])
"""
    path = [str(EXAMPLES), str(EXAMPLES.parent)]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path}{program}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, torch_imported = done.stdout.splitlines()
    assert first.startswith("Fine-tuning demo on ")
    assert torch_imported == "False"


def test_a_gpu_with_too_little_memory_is_a_device_error_that_advises_a_smaller_batch(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(_options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    fine_tune = example("fine_tune", monkeypatch)
    monkeypatch.setattr(fine_tune, "fine_tune", out_of_memory)
    with pytest.raises(r2ncli.DeviceError, match="out of memory at --batch-size 16"):
        fine_tune.main([str(data / "train")])


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.01, 3), (0.25, 6), (0.99, 21)])
def test_the_seed_decides_which_images_of_each_class_are_held_out(
    fraction: float, count: int, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine_tune = example("fine_tune", monkeypatch)

    def split(seed: int) -> SimpleNamespace:
        photos = data / "train"
        kept, held, _ = fine_tune.datasets(photos, fraction, seed, r2ncli.Preprocessing())
        return SimpleNamespace(kept=kept.indices, held=held.indices, photos=held.dataset)

    first, again, other = split(0), split(0), split(1)
    assert (first.kept, first.held) == (again.kept, again.held)
    assert sorted(first.kept + first.held) == list(range(24))
    assert len(first.held) == count
    assert first.held != other.held or not count
    for indices in (first.kept, first.held) if count else (first.kept,):
        counts = np.bincount([first.photos.targets[index] for index in indices])
        assert counts.tolist() == [len(indices) // 3] * 3


def test_the_validation_accuracy_is_that_of_r2n(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "mine.safetensors")
    arguments = ["--val", str(data / "test"), "--weights", "demo", "--epochs", "1", "-o", output]
    assert run_script("fine_tune", str(data / "train"), *arguments) == 0

    rows = list(r2ncli.classify(data / "test", weights=output, topk=1, precision="fp32"))
    right = sum(row.predictions[0].label == Path(row.path).parent.name for row in rows)
    assert f"validation accuracy {100 * right / 6:.1f} %" in capsys.readouterr().out


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
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / split / label / f"{number:04d}.png")
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
    train_demo: ModuleType, data: Path, tmp_path: Path
) -> None:
    output = str(tmp_path / "demo.safetensors")
    assert train_demo.main([str(data), "--epochs", "1", "-o", output]) == 0
    with pytest.raises(r2ncli.OutputError, match="Give another --state"):
        train_demo.main([str(data), "--epochs", "2", "-o", output])


def test_an_export_is_small_and_states_labels_preprocessing_recipe_and_accuracy(
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


def test_a_checkpoint_is_exported_without_training_and_with_data_in_a_zip_file(
    train_demo: ModuleType, data: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    archive = shutil.make_archive(str(tmp_path / "colours"), "zip", data)
    state = tmp_path / "state.pth"
    train_demo.main([archive, "--epochs", "1", "--state", str(state), "-o", str(first)])

    train_demo.main([archive, "--epochs", "1", "--export", str(state), "-o", str(second)])

    assert second.read_bytes() == first.read_bytes()


def test_the_shipped_network_states_how_it_was_trained_and_its_accuracy() -> None:
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
    (pictures / "00003.jpg").write_bytes(b"no image")
    features = tmp_path / "features.h5"
    r2ncli.extract_to(features, pictures, weights=tiny_weights, precision="fp32")
    query = str(pictures / "00007.jpg")

    assert neighbours.main([str(features), "--query", query, "-k", "30"]) == 0

    first, *nearest = capsys.readouterr().out.splitlines()
    assert first == query
    assert nearest[0] == f"  1.0000  {pictures / 'copy.jpg'}"
    assert len(nearest) == 19  # all but itself and the failed one
    assert not any("00003.jpg" in line for line in nearest)


def test_neighbours_found_in_small_chunks_are_those_of_the_whole_file(
    neighbours: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 2, 3)).astype(np.float32)
    failed = np.arange(50) % 7 == 0
    vectors[failed] = np.nan
    with feature_file(tmp_path / "features.h5", vectors, failed) as file:
        monkeypatch.setattr(neighbours, "CHUNK_BYTES", 4 * 24)  # four rows
        found = neighbours.nearest_neighbours(file, "layer4", [1, 30], 5)

    unit = vectors.reshape(50, 6) / np.linalg.norm(vectors.reshape(50, 6), axis=1, keepdims=True)
    for row, nearest in zip([1, 30], found, strict=True):
        similarities = np.where(failed, -2, unit @ unit[row])
        similarities[row] = -2
        expected = np.argsort(-similarities)[:5]
        assert [path for _, path in nearest] == [f"{n}.jpg" for n in expected]
        np.testing.assert_allclose([s for s, _ in nearest], similarities[expected], rtol=1e-5)


def test_without_a_query_the_first_images_with_features_are_queried(
    neighbours: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = np.arange(10) == 1
    feature_file(tmp_path / "features.h5", np.eye(10, dtype=np.float32), failed).close()
    assert neighbours.main([str(tmp_path / "features.h5"), "-k", "1"]) == 0
    queried = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert queried == ["0.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--query", "1.jpg"], "no image '1.jpg' with features"),  # which failed
        (["--query", "absent.jpg"], "no image 'absent.jpg' with features"),
        (["--layer", "layer9"], "no layer 'layer9'; its layers: layer4"),
    ],
)
def test_an_image_or_layer_that_is_not_in_the_file_is_named(
    neighbours: ModuleType, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    failed = np.arange(4) == 1
    feature_file(tmp_path / "features.h5", np.eye(4, dtype=np.float32), failed).close()
    with pytest.raises(r2ncli.R2NError, match=complaint):
        neighbours.main([str(tmp_path / "features.h5"), *arguments])


def feature_file(path: Path, vectors: np.ndarray, failed: np.ndarray) -> h5py.File:
    """A file as `r2n extract` writes it: datasets /features/<layer>, /paths, /status."""
    text = h5py.string_dtype()
    file = h5py.File(path, "w")
    file["features/layer4"] = vectors
    file.create_dataset("paths", data=[f"{n}.jpg" for n in range(len(vectors))], dtype=text)
    file.create_dataset("status", data=["failed" if f else "ok" for f in failed], dtype=text)
    return file
