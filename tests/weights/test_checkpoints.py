"""A checkpoint file is found and checked, and its metadata is read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import error_of

from r2ncli.architectures import DEFAULT_NETWORK, PUBLISHED, Preprocessing
from r2ncli.weights import checkpoints
from r2ncli.weights.checkpoints import (
    checked_sha256,
    existing_file,
    find_checkpoint,
    hub_folder,
    labels_of,
    open_checkpoint,
    preprocessing_of,
    published_file,
    read_metadata,
)
from r2ncli.weights.containers import container
from r2ncli.weights.download import hash_prefix

FILE = PUBLISHED[DEFAULT_NETWORK].file
HERE = Path("x.pth")


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*_: object) -> Path:
        raise AssertionError("a download was begun")

    monkeypatch.setattr(checkpoints, "download_file", unwanted)


# --- where a checkpoint is looked for -----------------------------------------------------


def test_the_option_comes_before_the_environment(
    tmp_path: Path, hub: Path, no_download: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("option.pth", "environment.pth"):
        (tmp_path / name).touch()
    (hub / FILE).touch()
    assert find_checkpoint() == hub / FILE
    monkeypatch.setenv("R2N_WEIGHTS", str(tmp_path / "environment.pth"))
    assert find_checkpoint() == tmp_path / "environment.pth"
    assert find_checkpoint(tmp_path / "option.pth") == tmp_path / "option.pth"
    assert find_checkpoint(str(tmp_path / "option.pth")) == tmp_path / "option.pth"
    assert find_checkpoint(DEFAULT_NETWORK) == hub / FILE
    monkeypatch.setenv("R2N_WEIGHTS", "demo")
    assert find_checkpoint().name == "demo.safetensors"
    monkeypatch.setenv("R2N_WEIGHTS", "")
    assert find_checkpoint() == hub / FILE


def test_an_empty_option_does_not_mean_the_default(hub: Path, no_download: None) -> None:
    (hub / FILE).touch()
    assert "no such weights: ''" in error_of(find_checkpoint, "")


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_published_name_is_its_official_file_or_the_copy_with_hyphens(
    name: str, hub: Path, no_download: None
) -> None:
    copy = hub / PUBLISHED[name].file.replace("_", "-")
    copy.touch()
    assert find_checkpoint(name) == copy
    assert find_checkpoint(name.replace("_", "-")) == copy
    official = hub / PUBLISHED[name].file
    official.touch()
    assert find_checkpoint(name) == official


def test_an_own_file_is_found_with_hyphens_or_underscores(tmp_path: Path) -> None:
    (tmp_path / "my-net_v2.pth").touch()
    for name in ("my-net_v2.pth", "my_net_v2.pth", "my-net-v2.pth"):
        assert find_checkpoint(tmp_path / name) == tmp_path / "my-net_v2.pth"
    (tmp_path / "my_net-v2.pth").touch()
    assert find_checkpoint(tmp_path / "my_net-v2.pth") == tmp_path / "my_net-v2.pth"


def test_demo_is_the_embedded_checkpoint() -> None:
    path = find_checkpoint("demo")
    assert path.is_file()
    assert container(path) == "safetensors"
    assert len(read_metadata(path)["labels"]) == 10


def test_an_unknown_name_lists_what_there_is(no_download: None) -> None:
    text = error_of(find_checkpoint, "resnet50")
    assert text.startswith("no such weights: 'resnet50'.")
    assert all(word in text for word in ("'demo'", ".pth", ".safetensors", *PUBLISHED))


def test_other_weights_are_never_used_instead(tmp_path: Path, hub: Path, no_download: None) -> None:
    (hub / FILE).touch()
    (tmp_path / "a.pth").touch()
    error_of(find_checkpoint, tmp_path / "b.pth")
    error_of(find_checkpoint, tmp_path / "nowhere" / "b.pth")
    error_of(find_checkpoint, tmp_path / "a.pth" / "b.pth")
    text = error_of(find_checkpoint, "res2net50_48w_2s", download=False)
    assert text == (
        f"{PUBLISHED['res2net50_48w_2s'].file} is not in {hub}, and nothing was downloaded"
    )


def test_a_link_to_nothing_is_not_there(hub: Path) -> None:
    (hub / FILE).symlink_to("nowhere.pth")
    assert existing_file(hub / FILE) is None
    assert existing_file(hub / FILE.replace("_", "-")) is None


def test_a_name_too_long_for_the_system_is_an_error_of_the_checkpoint() -> None:
    assert "cannot be read: file name too long" in error_of(find_checkpoint, "x" * 5000)
    assert "no such weights" in error_of(find_checkpoint, "a\0b")


def test_a_file_that_may_not_be_read_is_a_checkpoint_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.stat

    def refusing(path: Any, *arguments: Any, **more: Any) -> os.stat_result:
        if str(path).endswith("x.pth"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return original(path, *arguments, **more)

    (tmp_path / "x.pth").touch()
    monkeypatch.setattr(os, "stat", refusing)
    error_of(find_checkpoint, tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TORCH_HOME": "/t"}, "/t/hub/checkpoints"),
        ({"TORCH_HOME": "/t", "XDG_CACHE_HOME": "/c"}, "/t/hub/checkpoints"),
        ({"TORCH_HOME": "~/t"}, "/home/me/t/hub/checkpoints"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/torch/hub/checkpoints"),
        ({}, "/home/me/.cache/torch/hub/checkpoints"),
    ],
)
def test_the_folder_is_torch_hubs(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.hub import get_dir

    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(hub_folder()) == expected
    assert str(hub_folder()) == os.path.join(get_dir(), "checkpoints")


def test_a_user_without_a_home_folder_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for an unknown user id
    assert hub_folder().name == "checkpoints"


# --- hash prefixes, names, SHA-256 ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "digits"),
    [
        ("res2net50_v1b_26w_4s-3cf99910.pth", "3cf99910"),
        ("res2net50-v1b-26w-4s-3cf99910.pth", "3cf99910"),
        ("net_0123456789abcdef.safetensors", "0123456789abcdef"),
        (f"net-{'a' * 64}.pth", "a" * 64),
        ("net-3cf99910.pth.tar", "3cf99910"),
        ("net-20231399.pth", "20231399"),  # there is no thirteenth month
        ("net-99991231.pth", "99991231"),
        ("net-20240131.pth", None),  # a date
        ("net-19991231.pth", None),
        ("net-3cf9991.pth", None),
        (f"net-{'a' * 65}.pth", None),
        ("net-3CF99910.pth", None),
        ("net3cf99910.pth", None),
        ("net-3cf99910", None),
        ("net-3cf99910-best.pth", None),
        ("net-3cf99910 (1).pth", None),
        ("net.pth", None),
        ("", None),
    ],
)
def test_the_hash_prefix_in_a_name(name: str, digits: str | None) -> None:
    assert hash_prefix(name) == digits


def test_the_name_of_every_published_file_has_eight_digits_of_its_hash() -> None:
    for network in PUBLISHED.values():
        assert re.fullmatch(r"[0-9a-f]{8}", hash_prefix(network.file) or "")
        assert published_file(network.file) == network
        assert published_file(network.file.replace("_", "-")) == network
    assert published_file("res2net50_v1b_26w_4s.pth") is None


def test_a_file_under_a_published_name_must_be_the_published_one(tmp_path: Path) -> None:
    for name in (FILE, FILE.replace("_", "-")):
        path = tmp_path / name
        path.write_bytes(b"other weights")
        digest = hashlib.sha256(b"other weights").hexdigest()
        text = error_of(checked_sha256, path)
        assert f"starts with 3cf99910, as the name says, got {digest[:8]}…" in text
    (tmp_path / "mine-00000000.pth").write_bytes(b"other weights")
    assert checked_sha256(tmp_path / "mine-00000000.pth") == digest


# --- metadata -----------------------------------------------------------


def safetensors(metadata: dict[str, str] | None = None) -> bytes:
    header = json.dumps({"__metadata__": metadata} if metadata else {}).encode()
    return len(header).to_bytes(8, "little") + header


def test_metadata_is_in_the_header_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors({"r2n": json.dumps({"labels": ["x"]}), "format": "pt"}))
    assert read_metadata(path) == {"labels": ["x"]}
    path.write_bytes(safetensors({"format": "pt"}))
    assert read_metadata(path) == {}
    path.write_bytes(safetensors())
    assert read_metadata(path) == {}


@pytest.mark.parametrize("beside", ["net.pth.json", "net.json"])
def test_metadata_is_in_a_json_file_beside(tmp_path: Path, beside: str) -> None:
    (tmp_path / "net.pth").touch()
    assert read_metadata(tmp_path / "net.pth") == {}
    (tmp_path / beside).write_text('{"labels": ["é"]}', encoding="utf-8")
    assert read_metadata(tmp_path / "net.pth") == {"labels": ["é"]}


def test_the_header_of_a_safetensors_file_comes_before_a_json_file_beside(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"r2n": '{"labels": ["own"]}'}))
    (tmp_path / "x.json").write_text('{"labels": ["of something else"]}')
    assert read_metadata(path) == {"labels": ["own"]}
    path.write_bytes(safetensors())
    assert read_metadata(path) == {"labels": ["of something else"]}


def test_the_json_file_with_the_whole_name_comes_first(tmp_path: Path) -> None:
    for name in ("net.pth", "net.pt"):
        (tmp_path / name).touch()
    (tmp_path / "net.pth.json").write_text('{"labels": ["whole"]}')
    (tmp_path / "net.json").write_text('{"labels": ["stem"]}')
    assert read_metadata(tmp_path / "net.pth") == {"labels": ["whole"]}
    assert read_metadata(tmp_path / "net.pt") == {"labels": ["stem"]}


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", "\x00", '{"a": 1} x', "[" * 100_000])
def test_metadata_that_is_not_a_json_object_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "net.pth").touch()
    (tmp_path / "net.json").write_text(text)
    assert f"{tmp_path}/net.json: its metadata is not" in error_of(
        read_metadata, tmp_path / "net.pth"
    )
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors({"r2n": text}))
    assert f"{path}: its metadata is not" in error_of(read_metadata, path)


def test_metadata_that_is_not_text_or_is_truncated_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = json.dumps({"__metadata__": {"r2n": 5}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "not JSON" in error_of(read_metadata, path)
    path.write_bytes(len(header).to_bytes(8, "little") + header[:-5])
    assert "not JSON" in error_of(read_metadata, path)
    path.write_bytes(b"\xff" * 8)
    assert read_metadata(path) == {}


def test_metadata_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.pth").touch()
    (tmp_path / "net.json").touch()

    real = os.open

    def refusing(path: Path, *arguments: Any, **options: Any) -> Any:
        if Path(path).suffix == ".json":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    text = error_of(read_metadata, tmp_path / "net.pth")
    assert text == f"{tmp_path}/net.json: cannot be read: permission denied"


@pytest.mark.parametrize("name", ["net.pth", "net.pt", "net", "net.SAFETENSORS", "net.bin"])
def test_a_safetensors_file_has_its_metadata_whatever_its_name_is(
    tmp_path: Path, name: str
) -> None:
    told = {"labels": ["own"], "preprocessing": {"image_size": 64, "resize_size": 64}}
    path = tmp_path / name
    path.write_bytes(safetensors({"r2n": json.dumps(told)}))
    assert read_metadata(path) == told
    assert open_checkpoint(path).preprocessing == Preprocessing(64, 64)


def test_a_pickle_named_safetensors_has_its_metadata_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))
    (tmp_path / "net.safetensors.json").write_text('{"labels": ["beside"]}')
    assert read_metadata(path) == {"labels": ["beside"]}


@pytest.mark.parametrize(
    "key", ["preprocesing", "Preprocessing", "label", "classes", "class_names", "synsets", "mean"]
)
@pytest.mark.parametrize("place", ["own.pth.json", "own.json", "the header"])
def test_a_key_that_would_be_ignored_by_mistake_is_an_error(
    tmp_path: Path, place: str, key: str
) -> None:
    path = source = tmp_path / "own.pth"
    path.touch()
    if place == "the header":
        path.write_bytes(safetensors({"r2n": json.dumps({key: ["a"]})}))
    else:
        source = tmp_path / place
        source.write_text(json.dumps({key: ["a"]}))
    text = error_of(read_metadata, path)
    assert text == f"{source}: unknown key {key!r} (known: labels, wnids, preprocessing)"


def test_an_unknown_key_of_the_preprocessing_is_an_error_with_those_known(tmp_path: Path) -> None:
    (tmp_path / "own.pth").touch()
    (tmp_path / "own.pth.json").write_text('{"preprocessing": {"imagesize": 64}}')
    assert error_of(read_metadata, tmp_path / "own.pth") == (
        f"{tmp_path}/own.pth.json: unknown key 'imagesize' in preprocessing "
        "(known: image_size, resize_size, mean, std, crop)"
    )


def test_notes_of_other_programs_are_kept(tmp_path: Path) -> None:
    told = {"recipe": "ten epochs", "accuracy": 0.9, "source": {}, "variant": "x", "epoch": 3}
    told |= {"labels": ["a"], "classes": 1}  # there is no mistake where labels are given
    (tmp_path / "own.pth").touch()
    (tmp_path / "own.pth.json").write_text(json.dumps(told))
    assert read_metadata(tmp_path / "own.pth") == told
    (tmp_path / "own.pth.json").write_text('{"classes": 10, "epochs": 5}')
    assert read_metadata(tmp_path / "own.pth") == {"classes": 10, "epochs": 5}


def test_a_checkpoint_is_opened_with_its_digest_labels_and_preprocessing_without_torch() -> None:
    program = (
        "import sys; from r2ncli.weights.checkpoints import open_checkpoint as open_it;"
        "file = open_it('demo'); print(file.path.name, len(file.sha256), file.labels(10).labels[0],"
        "file.preprocessing.image_size, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["demo.safetensors", "64", "airplane", "64", "False"]


def test_labels_must_fit_the_network() -> None:
    labels = labels_of({"labels": ["a", "b"], "wnids": ["n1", "n2"]}, 2, HERE)
    assert labels is not None
    assert (labels.labels, labels.wnids) == (("a", "b"), ("n1", "n2"))
    labels = labels_of({"labels": ["a", "b"]}, 2, HERE)
    assert labels is not None
    assert labels.wnids is None
    assert labels_of({}, 2, HERE) is None
    assert "2 labels for a network of 3 classes" in error_of(
        labels_of, {"labels": ["a", "b"]}, 3, HERE
    )
    assert "1 wnids for" in error_of(labels_of, {"labels": ["a", "b"], "wnids": ["n"]}, 2, HERE)
    for wrong in ("ab", ["a", 1], {"a": "b"}, 2):
        assert "to be a list of strings" in error_of(labels_of, {"labels": wrong}, 2, HERE)


def test_a_network_of_1000_classes_has_imagenets_labels_unless_it_has_its_own() -> None:
    labels = labels_of({}, 1000, HERE)
    assert labels is not None
    assert labels.wnids is not None
    assert len(labels.labels) == len(labels.wnids) == len(set(labels.wnids)) == 1000
    assert (labels.wnids[0], labels.labels[0]) == ("n01440764", "tench")
    assert list(labels.wnids) == sorted(labels.wnids)
    own = labels_of({"labels": [str(n) for n in range(1000)]}, 1000, HERE)
    assert own is not None
    assert own.labels[7] == "7"
    assert own.wnids is None


def test_preprocessing_is_imagenets_unless_a_checkpoint_has_its_own() -> None:
    assert preprocessing_of({}, HERE) == Preprocessing()
    given = {"image_size": 64, "resize_size": 72, "mean": [0, 0.5, 1], "std": [1, 1, 1]}
    found = preprocessing_of({"preprocessing": {**given, "crop": "square"}}, HERE)
    assert found == Preprocessing(64, 72, (0.0, 0.5, 1.0), (1.0, 1.0, 1.0), "square")
    found = preprocessing_of({"preprocessing": {"image_size": 128}}, HERE)
    assert found == replace(Preprocessing(), image_size=128)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        "none",
        {"image_size": 300},  # beyond the resize size
        {"image_size": 16},
        {"image_size": "128"},
        {"image_size": 128.5},
        {"resize_size": 256.0},
        {"image_size": True},
        {"mean": [0.5, 0.5]},
        {"mean": [0.5, 0.5, "x"]},
        {"mean": 0.5},
        {"mean": [0.5, 0.5, 10**400]},
        {"mean": "abc"},
        {"mean": [0.5, 0.5, float("nan")]},
        {"std": [1, 1, 0]},
        {"std": [1, 1, -1]},
        {"std": [1, 1, float("inf")]},
        {"std": [None, 1, 1]},
        {"crop": "centered"},
        {"crop": ["none"]},
    ],
)
def test_invalid_preprocessing_is_an_error(wrong: object) -> None:
    text = error_of(preprocessing_of, {"preprocessing": wrong}, HERE)
    known = "image_size, resize_size, mean, std, crop"
    assert text.startswith("x.pth: invalid 'preprocessing': ")
    assert text.endswith(f". Known keys: {known}")
    assert "object" not in text or "is not an object" in text  # not a message of Python's
