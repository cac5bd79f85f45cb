"""A checkpoint is loaded safely, identified by its tensors, and refused with a reason."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.checkpoints import hollow, saved, torch_bytes
from support.pickles import Payload
from support.reference_weights import TINY, reference_input, reference_network, relative_error

import r2ncli
from r2ncli.architectures import DEMO, PUBLISHED, Architecture, Preprocessing
from r2ncli.errors import CheckpointError
from r2ncli.model import Res2Net
from r2ncli.weights.checkpoints import imagenet_labels, open_checkpoint
from r2ncli.weights.loading import (
    list_layers,
    load,
    load_checkpoint,
    load_model,
    published_network,
)
from r2ncli.weights.structure import (
    expected_shapes,
    guess_architecture,
    identify,
    names_for,
    variant_name,
)

BIRDS = ["auk", "booby", "crow", "dove", "emu", "finch", "gull"]


@pytest.fixture(scope="module")
def network():
    """A small network with a head for seven classes."""
    return reference_network(TINY["v1b"])


def same_weights(network, state_dict):
    """Whether a network has exactly these weights."""
    own = network.state_dict()
    return list(own) == list(state_dict) and all(
        torch.equal(own[name], state_dict[name].to(own[name].dtype)) for name in own
    )


def refusal(path):
    """The message with which `path` is refused: one short line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert message.startswith(f"{path}: ")
    reason = message.removeprefix(f"{path}: ")
    assert "\n" not in reason
    assert len(reason) < 300
    return reason


# --- containers, wrappers, prefixes ---------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".bin"])
def test_a_state_dict_loads_from_every_container(suffix, state_dict, network, tmp_path):
    path = tmp_path / f"mine{suffix}"
    if suffix == ".safetensors":
        save_file(state_dict, path)
    else:
        saved(state_dict, path)
    assert same_weights(load_model(path), state_dict)
    with torch.no_grad():
        x = reference_input()[:, :, :64, :64]
        assert torch.equal(load_model(path)(x), network(x))


def test_a_state_dict_in_the_format_before_zip_loads(state_dict, tmp_path):
    path = saved(state_dict, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert same_weights(load_model(path), state_dict)


def test_a_container_is_recognised_by_its_bytes_not_by_its_suffix(state_dict, tmp_path):
    save_file(state_dict, tmp_path / "really_safetensors.pth")
    saved(state_dict, tmp_path / "really_zip.safetensors")
    for path in tmp_path.glob("really_*"):
        assert same_weights(load_model(path), state_dict)


WRAPPINGS = {
    "state_dict": lambda weights: {"state_dict": weights},
    "model": lambda weights: {"model": weights},
    "model_state_dict": lambda weights: {"model_state_dict": weights},
    "net": lambda weights: {"net": weights},
    "an average alone": lambda weights: {"epoch": 3, "model_ema": {"module": weights}},
    "an average beside": lambda weights: {"model_ema": {"x": torch.ones(1)}, "model": weights},
    "one in another": lambda weights: {"model": {"state_dict": weights}},
    "beside other entries": lambda weights: {"epoch": 3, "arch": "r", "state_dict": weights},
    "beside a tensor": lambda weights: {"best_acc1": torch.tensor(78.0), "state_dict": weights},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_wrappers_are_removed(wrap, state_dict, tmp_path):
    path = saved(wrap(state_dict), tmp_path / "wrapped.pth")
    assert same_weights(load_model(path), state_dict)


@pytest.mark.parametrize("wrap", [None, "state_dict"])
@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "_orig_mod.module.", "0."])
def test_prefixes_are_removed(prefix, wrap, state_dict, tmp_path):
    prefixed = {prefix + name: tensor for name, tensor in state_dict.items()}
    path = saved({wrap: prefixed} if wrap else prefixed, tmp_path / "prefixed.pth")
    assert same_weights(load_model(path), state_dict)


@pytest.mark.parametrize("library", ["timm", "mmpretrain", "mmdetection"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_another_librarys_names_load(library, prefix, state_dict, tmp_path):
    names = names_for(library, state_dict)
    theirs = {prefix + names[name]: tensor for name, tensor in state_dict.items()}
    path = saved({"meta": {"epoch": 1}, "state_dict": theirs}, tmp_path / "theirs.pth")
    assert same_weights(load_model(path), state_dict)


def test_a_training_checkpoint_with_its_optimizer_loads(tmp_path):
    network = Res2Net(TINY["v1"])
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    network(reference_input()[:, :, :64, :64]).mean().backward()
    optimizer.step()
    scheduler.step()
    checkpoint = {
        "epoch": 1,
        "arch": "res2net",
        "best_acc1": torch.tensor(12.5),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "state_dict": network.state_dict(),
    }
    path = saved(checkpoint, tmp_path / "training.pth.tar")
    assert same_weights(load_model(path), network.state_dict())


def test_a_dict_that_holds_itself_is_refused(tmp_path):
    endless = {}
    endless["state_dict"] = endless
    assert "a container holds itself" in refusal(saved(endless, tmp_path / "endless.pth"))


# --- precision ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(dtype, suffix, state_dict, tmp_path):
    other = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in state_dict.items()
    }
    path = tmp_path / f"other{suffix}"
    save_file(other, path) if suffix == ".safetensors" else torch.save(other, path)
    loaded = load_model(path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert same_weights(loaded, other)


def test_a_network_is_float32_whatever_torchs_default_is(state_dict, tmp_path):
    path = saved(state_dict, tmp_path / "mine.pth")
    torch.set_default_dtype(torch.float64)
    try:
        loaded = load_model(path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


UNFIT = {
    "int8": lambda tensor: (tensor * 10).to(torch.int8),
    "complex64": lambda tensor: tensor.to(torch.complex64),
    "float8_e4m3fn": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "sparse_coo float32": lambda tensor: tensor.to_sparse(),
    "meta float32": lambda tensor: tensor.to("meta"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_tensors_that_are_no_plain_floats_are_refused(kind, state_dict, tmp_path):
    state_dict["fc.weight"] = UNFIT[kind](state_dict["fc.weight"])
    reason = refusal(saved(state_dict, tmp_path / "unfit.pth"))
    assert reason.endswith(f"but 1 tensor is not of plain floats (fc.weight: {kind})")


# --- which network it is --------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_network_is_identified_by_its_tensors(name):
    architecture = guess_architecture(hollow(PUBLISHED[name].architecture))
    assert architecture == PUBLISHED[name].architecture
    assert variant_name(architecture) == name


@pytest.mark.parametrize(
    "architecture",
    [
        *TINY.values(),
        Architecture((1, 1, 1, 1), stem=(3, 4, 5)),
        Architecture((1, 1, 1, 1), stem=(4,), average_pool_shortcut=True, classes=1),
        Architecture((3, 1, 2, 1), 5, 8, 3, stage_planes=(13, 17, 23, 31), classes=2),
        Architecture((1, 1, 1, 1), 61, 2, stage_planes=(3, 5, 7, 9)),
    ],
)
def test_unusual_networks_are_identified_by_their_tensors(architecture, tmp_path):
    weights = hollow(architecture)
    found = identify(weights, tmp_path)
    assert expected_shapes(found) == expected_shapes(architecture)
    for field in ("layers", "scale", "cardinality", "stem", "average_pool_shortcut", "classes"):
        assert getattr(found, field) == getattr(architecture, field)


def test_a_file_under_another_variants_name_is_known_by_its_tensors(tmp_path):
    weights = hollow(PUBLISHED["res2net50_26w_4s"].architecture)
    checkpoint = load_checkpoint(saved(weights, tmp_path / "res2net101_v1b_26w_4s.pth"))
    assert checkpoint.variant == "res2net50_26w_4s"
    assert checkpoint.network.architecture == PUBLISHED["res2net50_26w_4s"].architecture


def test_a_file_with_a_published_name_must_be_that_file(state_dict, tmp_path):
    path = saved(state_dict, tmp_path / PUBLISHED["res2net50_v1b_26w_4s"].file)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    with pytest.raises(
        CheckpointError, match=f"starts with 3cf99910, as the name says, got {digits}"
    ):
        load_model(path)


def test_a_loaded_checkpoint_has_its_path_digest_and_variant(state_dict, tmp_path):
    path = saved(state_dict, tmp_path / "mine.pth")
    checkpoint = load_checkpoint(str(path))
    assert checkpoint.path == path
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.variant == TINY["v1b"].describe()
    assert checkpoint.preprocessing == Preprocessing()
    assert checkpoint.labels is None


def test_old_checkpoints_without_batch_counters_load(state_dict, tmp_path):
    old = {n: t for n, t in state_dict.items() if not n.endswith("num_batches_tracked")}
    assert len(old) < len(state_dict)
    assert same_weights(load_model(saved(old, tmp_path / "old.pth")), state_dict)


def test_the_order_of_the_tensors_does_not_matter(state_dict, tmp_path):
    turned = dict(reversed(state_dict.items()))
    assert same_weights(load_model(saved(turned, tmp_path / "turned.pth")), state_dict)


# --- tensors that do not fit ----------------------------------------------------------


def test_one_missing_tensor_is_named(state_dict, tmp_path):
    del state_dict["layer3.1.bn3.weight"]
    reason = refusal(saved(state_dict, tmp_path / "m.pth"))
    assert reason == (
        "looks like Res2Net20-v1b 26w-4s, 7 classes, but 1 tensor is missing (layer3.1.bn3.weight)"
    )


def test_a_backbone_without_its_classifier_is_said_to_miss_it(state_dict, tmp_path):
    headless = {name: t for name, t in state_dict.items() if not name.startswith("fc.")}
    reason = refusal(saved(headless, tmp_path / "headless.pth"))
    assert reason.endswith("but 2 tensors are missing (fc.weight, …)")


def test_unexpected_tensors_are_counted_and_one_is_named(state_dict, tmp_path):
    state_dict |= {f"aux.{i}": torch.zeros(1) for i in range(3)}
    reason = refusal(saved(state_dict, tmp_path / "u.pth"))
    assert reason.endswith("but 3 tensors are unexpected (aux.0, …)")


def test_a_wrong_shape_is_named_with_the_expected_one(state_dict, tmp_path):
    state_dict["layer2.0.conv1.weight"] = torch.zeros(2, 3, 1, 1)
    reason = refusal(saved(state_dict, tmp_path / "s.pth"))
    expected = list(expected_shapes(TINY["v1b"])["layer2.0.conv1.weight"])
    assert reason.endswith(f"shape (layer2.0.conv1.weight: [2, 3, 1, 1], not {expected})")


def test_all_kinds_of_mismatches_are_named_at_once(state_dict, tmp_path):
    del state_dict["bn1.bias"]
    state_dict["aux"] = torch.zeros(1)
    state_dict["bn1.weight"] = torch.zeros(2)
    reason = refusal(saved(state_dict, tmp_path / "all.pth"))
    assert "is missing (bn1.bias), 1 tensor is unexpected (aux), 1 tensor is of another" in reason


@pytest.mark.parametrize(
    "weights",
    [
        {"stem.weight": torch.zeros(1), "head.weight": torch.zeros(1)},
        {"layer1.0.conv1.weight": torch.zeros(())},
        {**hollow(TINY["v1"]), "fc.weight": torch.zeros(0, 80), "fc.bias": torch.zeros(0)},
        {name: torch.zeros(()) for name in expected_shapes(TINY["v1"])},
    ],
    ids=["other names", "one name", "no classes", "only scalars"],
)
def test_tensors_of_other_networks_are_refused(weights, tmp_path):
    assert "expected the tensors of a Res2Net, found" in refusal(
        saved(weights, tmp_path / "other.pth")
    )


# --- labels and preprocessing of its own ----------------------------------------------


@pytest.fixture
def bird(tmp_path):
    """An image of the network's input size, and its pixels."""
    pixels = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "bird.png")
    return tmp_path / "bird.png", pixels


SAID = {
    "labels": BIRDS,
    "preprocessing": {
        "image_size": 64,
        "resize_size": 64,
        "mean": [0.2, 0.5, 0.7],
        "std": [0.5, 0.25, 0.3],
    },
}


@pytest.mark.parametrize("place", ["header", "mine.pth.json", "mine.json"])
def test_a_fine_tuned_head_classifies_with_its_own_labels_and_preprocessing(
    place, bird, network, state_dict, tmp_path
):
    if place == "header":
        weights = tmp_path / "mine.safetensors"
        save_file(state_dict, weights, {"r2n": json.dumps(SAID)})
    else:
        weights = saved(state_dict, tmp_path / "mine.pth")
        (tmp_path / place).write_text(json.dumps(SAID))

    path, pixels = bird
    mean, std = (np.array(SAID["preprocessing"][name]) for name in ("mean", "std"))
    x = torch.from_numpy((pixels / 255 - mean) / std).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = network(x).softmax(1)[0]

    options = {"weights": weights, "device": "cpu", "precision": "fp32", "batch_size": 1}
    (row,) = r2ncli.classify(path, topk=7, **options)
    assert row.error is None
    assert sorted(prediction.label for prediction in row.predictions) == BIRDS
    assert [BIRDS[prediction.index] for prediction in row.predictions] == [
        prediction.label for prediction in row.predictions
    ]
    assert {prediction.wnid for prediction in row.predictions} == {None}
    probabilities = [prediction.probability for prediction in row.predictions]
    assert probabilities == sorted(probabilities, reverse=True)
    by_index = [0.0] * 7
    for prediction in row.predictions:
        by_index[prediction.index] = prediction.probability
    assert relative_error(by_index, expected) < 1e-5


def test_a_head_without_labels_of_its_own_has_none(bird, state_dict, tmp_path):
    weights = saved(state_dict, tmp_path / "mine.pth")
    (row,) = r2ncli.classify(bird[0], weights=weights, device="cpu", image_size=64)
    assert {prediction.label for prediction in row.predictions} == {None}


def test_a_thousand_classes_without_labels_are_imagenets(tmp_path):
    weights = hollow(PUBLISHED["res2net50_26w_4s"].architecture)
    labels = load_checkpoint(saved(weights, tmp_path / "mine.pth")).labels
    assert labels == imagenet_labels()
    assert (labels.labels[0], labels.wnids[0]) == ("tench", "n01440764")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"labels": BIRDS[:6]}, "6 labels for a network of 7 classes"),
        ({"labels": BIRDS, "wnids": ["n1"]}, "1 wnids for a network of 7 classes"),
        ({"labels": "birds"}, "expected 'labels' to be a list of strings"),
        ({"labels": [1, 2, 3, 4, 5, 6, 7]}, "expected 'labels' to be a list of strings"),
        ({"preprocessing": {"image_size": 7}}, "invalid 'preprocessing'"),
        ({"preprocessing": {"sise": 64}}, "unknown key 'sise' in preprocessing"),
        (["auk"], "its metadata is not a JSON object"),
    ],
)
def test_metadata_must_fit_the_network(said, reason, state_dict, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_file(state_dict, path, {"r2n": json.dumps(said)})
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


# --- files that are dangerous ---------------------------------------------------------


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.mkdir, lambda mark: (mark,), "posix.mkdir"),
        (exec, lambda mark: (f"import os; os.mkdir({mark!r})",), "builtins.exec"),
        (shutil.copyfile, lambda mark: (__file__, mark), "shutil.copyfile"),
    ],
    ids=["system call", "code", "library"],
)
def test_a_file_that_would_run_something_is_refused_by_name_and_nothing_has_run(
    container, function, arguments, name, state_dict, tmp_path
):
    mark = tmp_path / "mark"
    content = {"state_dict": state_dict, "extra": Payload(function, *arguments(str(mark)))}
    zipped = container == "zip"
    path = saved(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(path) == zipped
    assert refusal(path) == (
        f"refused, nothing in it was executed: it would import {name}, which a state dict never "
        "needs"
    )
    assert not mark.exists()

    torch.load(path, weights_only=False)  # the payload is a live one
    assert mark.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_bare_pickle_that_would_run_something_is_refused_and_nothing_has_run(protocol, tmp_path):
    mark = tmp_path / "mark"
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Payload(os.mkdir, str(mark)), protocol))
    assert refusal(path).startswith("refused, nothing in it was executed: ")
    assert not mark.exists()

    pickle.loads(path.read_bytes())
    assert mark.exists()


def test_a_whole_pickled_network_is_refused_by_the_name_of_its_class(network, tmp_path):
    reason = refusal(saved(network, tmp_path / "whole.pth"))
    assert "it would import r2ncli.model.Res2Net, " in reason
    assert reason.endswith(
        "which a state dict never needs; it holds a whole network, not its state dict: if you "
        "trust it, save only its state dict"
    )


# --- files that are no checkpoint -----------------------------------------------------


def zipped(*names):
    """A zip archive with members of these names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return buffer.getvalue()


NOISE = np.random.default_rng(0).bytes(4096)
NO_CHECKPOINTS = {
    "empty": (b"", "empty"),
    "a web page": (b"\n<!DOCTYPE html><html>Not found</html>", "a web page (HTML)"),
    "random bytes": (NOISE, "not a checkpoint"),
    "random bytes that start as a pickle": (b"\x80\x02" + NOISE, "refused, nothing in it was exec"),
    "random bytes that start as a zip": (b"PK\x03\x04" + NOISE, "truncated: the end"),
    "half a zip container": (torch_bytes(hollow(TINY["v1"]))[:4096], "truncated: the end"),
    "a picture in a zip": (zipped("photo.jpg"), "a zip archive, but not one that torch.save"),
    "TorchScript": (zipped("a/data.pkl", "a/constants.pkl"), "a TorchScript program"),
    "a hollow zip container": (zipped("a/data.pkl", "a/version"), "truncated"),
    "a broken safetensors": (b"\x10\0\0\0\0\0\0\0{" + NOISE, "corrupted"),
    "a list": (torch_bytes([torch.zeros(1)]), "holds a list, expected a state dict"),
    "a tensor": (torch_bytes(torch.zeros(1)), "holds a Tensor, expected a state dict"),
    "no tensors": (torch_bytes({"a": 1, "b": "x"}), "holds no state dict (its keys: 'a', 'b')"),
    "an empty dict": (torch_bytes({}), "holds no state dict (its keys: none)"),
    "a wrapped list": (torch_bytes({"model": [1]}), "holds no state dict (its keys: 'model')"),
}


@pytest.mark.parametrize(("content", "reason"), NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
def test_a_file_that_is_not_a_checkpoint_is_refused_with_what_it_is(content, reason, tmp_path):
    path = tmp_path / "download.pth"
    path.write_bytes(content)
    assert refusal(path).startswith(reason)


@pytest.mark.parametrize("part", [0.0001, 0.01, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file_is_refused(kind, part, state_dict, tmp_path):
    path = tmp_path / "cut.pth"
    if kind == "safetensors":
        save_file(state_dict, path)
    else:
        saved(state_dict, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: max(1, int(part * len(whole)))])
    assert refusal(path).startswith(("truncated", "corrupted", "not a checkpoint"))


def test_a_folder_is_no_checkpoint(tmp_path):
    assert refusal(tmp_path) == "is a folder, not a checkpoint file"


def test_missing_weights_are_refused_with_a_list_of_known_ones():
    with pytest.raises(CheckpointError, match=r"no such weights: 'mine.pth'.*res2next50$"):
        load_model("mine.pth")


# --- by name --------------------------------------------------------------------------


def test_the_demonstration_network_is_plain_float32_on_the_cpu_in_eval_mode():
    network = load_model("demo")
    assert isinstance(network, Res2Net)
    assert not any(module.training for module in network.modules())
    tensors = [*network.parameters(), *network.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = network(reference_input()[:, :, :64, :64])
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


def test_the_demonstration_checkpoint_says_what_it_is():
    checkpoint = load_checkpoint(DEMO)
    assert checkpoint.variant == "demo"
    assert checkpoint.path.stat().st_size <= 2_500_000
    assert checkpoint.network.architecture == Architecture(
        (1, 2, 2, 1),
        stem=(16, 16, 32),
        average_pool_shortcut=True,
        stage_planes=(32, 64, 96, 128),
        classes=10,
    )
    assert len(checkpoint.labels.labels) == 10
    assert {"airplane", "cat", "ship"} <= set(checkpoint.labels.labels)
    assert checkpoint.preprocessing.image_size == 64


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_network_has_a_function_that_builds_it_untrained(name):
    build = getattr(r2ncli, name)
    with torch.device("meta"):
        network = build(weights=None)
        assert build().architecture == network.architecture
    assert network.architecture == PUBLISHED[name].architecture
    assert not network.training
    assert PUBLISHED[name].architecture.describe() in build.__doc__
    assert name in r2ncli.__all__


def test_the_function_of_a_published_network_is_an_ordinary_one():
    build = r2ncli.res2next50
    assert (build.__module__, build.__qualname__) == ("r2ncli", "res2next50")
    assert list(inspect.signature(build).parameters) == ["weights", "output_stride"]
    assert pickle.loads(pickle.dumps(build)) is build is r2ncli.res2next50


def test_the_layers_of_a_published_network_are_listed_without_its_checkpoint(monkeypatch):
    monkeypatch.setattr("r2ncli.weights.checkpoints.download_file", None)  # nothing is fetched
    shapes = list_layers("res2net50-v1b-26w-4s")
    assert shapes["layer4"] == (2048, 7, 7)
    assert list_layers() == shapes
    assert list_layers(image_size=64)["layer4"] == (2048, 2, 2)
    monkeypatch.setenv("R2N_WEIGHTS", "demo")
    assert list_layers()["layer4"] == (512, 2, 2)  # of 64 pixels, as the checkpoint says


def test_a_checkpoint_file_is_loaded_as_it_was_opened(state_dict, tmp_path):
    told = {"labels": BIRDS, "preprocessing": {"image_size": 64, "resize_size": 64}}
    path = tmp_path / "mine.pth"  # not the suffix of its container
    save_file(state_dict, path, {"r2n": json.dumps(told)})
    file = open_checkpoint(path)
    checkpoint = load(file)
    assert (checkpoint.path, checkpoint.sha256) == (file.path, file.sha256)
    assert checkpoint.labels.labels == file.labels(7).labels == tuple(BIRDS)
    assert checkpoint.preprocessing == file.preprocessing == Preprocessing(64, 64)


def test_a_published_network_takes_its_own_weights(tmp_path):
    weights = hollow(PUBLISHED["res2net50_v1b_26w_4s"].architecture)
    weights["fc.bias"] = torch.arange(1000.0)
    network = r2ncli.res2net50_v1b_26w_4s(weights=saved(weights, tmp_path / "mine.pth"))
    assert torch.equal(network.fc.bias, torch.arange(1000.0))
    assert not network.training


def test_a_published_network_takes_a_fine_tuned_head(tmp_path):
    own = Architecture((3, 4, 6, 3), classes=7)
    path = saved(hollow(own), tmp_path / "mine.pth")
    assert published_network("res2net50_26w_4s", path).fc.out_features == 7


def test_a_published_network_refuses_another_variants_weights(tmp_path):
    path = saved(hollow(PUBLISHED["res2net50_26w_4s"].architecture), tmp_path / "v1.pth")
    with pytest.raises(CheckpointError) as caught:
        r2ncli.res2net50_v1b_26w_4s(weights=path)
    assert str(caught.value) == (
        f"{path}: holds Res2Net50 26w-4s, 1000 classes, expected res2net50_v1b_26w_4s"
    )


def test_a_checkpoint_is_loaded_with_another_output_stride(tmp_path):
    published = hollow(PUBLISHED["res2net50_26w_4s"].architecture)
    published["fc.bias"] = torch.arange(1000.0)
    path = saved(published, tmp_path / "mine.pth")
    for network in (
        load_model(path, output_stride=8),
        r2ncli.res2net50_26w_4s(path, output_stride=8),
    ):
        assert network.output_stride == 8
        assert torch.equal(network.fc.bias, torch.arange(1000.0))
    assert load_model(path).output_stride == 32
    assert r2ncli.res2net50_26w_4s(output_stride=16).output_stride == 16
