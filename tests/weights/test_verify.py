"""`verify_weights`: each check says what it found and fails for its own reason."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import warnings

import h5py
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file
from support.archives import tar_bytes, zip_bytes
from support.checkpoints import hollow, saved, torch_bytes
from support.pickles import Payload
from support.reference_weights import TINY, reference_network, reference_state_dict
from typer.testing import CliRunner

import r2ncli
from r2ncli.architectures import PUBLISHED
from r2ncli.cli.app import app
from r2ncli.errors import CheckpointError, UsageError
from r2ncli.model import Res2Net
from r2ncli.weights.loading import tensors_sha256
from r2ncli.weights.structure import expected_shapes, names_for
from r2ncli.weights.verify import CHECKS, verify_weights

DEFAULT = "res2net50_v1b_26w_4s"
KEYS = [
    *("schema", "file", "sha256", "tensors_sha256", "variant", "checks", "differences", "error"),
    "ok",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The default network of full size with the kit's weights, with its hash prefix in the name."""
    path = tmp_path_factory.mktemp("whole") / "weights.pth"
    torch.save(reference_state_dict(DEFAULT), path)
    return path.rename(path.with_name(f"{DEFAULT}-{sha256(path)[:8]}.pth"))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def statuses(verification):
    """The status of each check by its name."""
    return {check.name: check.status for check in verification.checks}


def failures(path):
    """What the failed checks of `path` found, by their names."""
    verification = verify_weights(path)
    failed = {c.name: c.found for c in verification.checks if c.status == "failed"}
    assert verification.ok == (not failed)
    assert all(failed.values())
    return failed


# --- a file as it should be -----------------------------------------------------------


def test_a_whole_file_with_its_hash_prefix_in_the_name_passes(whole):
    verification = verify_weights(whole)
    assert verification.ok
    assert verification.variant == DEFAULT
    assert verification.sha256 == sha256(whole)
    assert statuses(verification) == dict.fromkeys(CHECKS, "passed") | {
        "expected SHA-256": "not applicable",
        "published list": "warning",  # of the name, but not the file that was published
    }
    found = {check.name: check.found for check in verification.checks}
    assert found["hash prefix"].startswith("the first 8 of 64 hex digits match: ")
    assert found["published list"].startswith("not the published file, though named like res2net5")


def test_a_file_is_found_under_its_name_with_hyphens_for_underscores(state_dict, tmp_path):
    path = saved(state_dict, tmp_path / "my_small-net.pth")
    verification = verify_weights(tmp_path / "my-small_net.pth")
    assert verification.ok
    assert verification.file == str(path)


def test_a_file_in_torch_hubs_folder_is_found_by_its_name(state_dict, hub):
    path = saved(state_dict, hub / "my_net.pth")
    assert verify_weights("my-net.pth").file == str(path)


@pytest.mark.parametrize("folder", ["{tmp_path}/nowhere", "{tmp_path}", ".", "nowhere"])
def test_a_name_with_a_folder_is_looked_for_only_in_that_folder(
    folder, state_dict, hub, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    saved(state_dict, hub / "my_net.pth")
    asked = f"{folder.format(tmp_path=tmp_path)}/my_net.pth"
    with pytest.raises(CheckpointError) as caught:
        verify_weights(asked)
    assert str(caught.value) == f"no such file: {asked}"


def test_the_published_file_is_recognised_by_its_sha256_under_any_name(
    state_dict, tmp_path, monkeypatch
):
    monkeypatch.setattr("r2ncli.weights.verify.digest_of", lambda path: "3cf99910" + "0" * 56)
    (check,) = (
        check
        for check in verify_weights(saved(state_dict, tmp_path / "mine.pth")).checks
        if check.name == "published list"
    )
    assert check.status == "passed"
    assert PUBLISHED[DEFAULT].file in check.found


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_any_name_is_checked_for_what_it_holds(suffix, state_dict, tmp_path):
    path = tmp_path / f"mine{suffix}"
    save_file(state_dict, path) if suffix == ".safetensors" else torch.save(state_dict, path)
    verification = verify_weights(path)
    assert verification.ok
    assert verification.variant == TINY["v1b"].describe()
    without = {"expected SHA-256", "hash prefix", "published list"}
    if suffix == ".safetensors":
        without |= {"pickle", "stored checksums"}
    assert statuses(verification) == dict.fromkeys(CHECKS, "passed") | dict.fromkeys(
        without, "not applicable"
    )


def test_old_files_without_batch_counters_pass(state_dict, tmp_path):
    old = {n: t for n, t in state_dict.items() if not n.endswith("num_batches_tracked")}
    path = saved(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert failures(path) == {}


def test_the_embedded_demonstration_checkpoint_passes():
    from r2ncli.weights.checkpoints import find_checkpoint

    assert failures(find_checkpoint("demo")) == {}


def test_the_json_document_has_its_schema(state_dict, tmp_path):
    path = saved(state_dict, tmp_path / "mine.pth")
    document = json.loads(json.dumps(verify_weights(path).as_dict()))
    assert document["schema"] == 2
    assert list(document) == KEYS
    assert document["tensors_sha256"] == tensors_sha256(state_dict)
    assert document["variant"] == TINY["v1b"].describe()
    assert document["differences"] == {"missing": [], "unexpected": [], "shapes": [], "kinds": []}
    assert document["error"] is None
    assert document["file"] == str(path)
    assert document["sha256"] == sha256(path)
    assert document["ok"] is True
    assert [check["name"] for check in document["checks"]] == list(CHECKS)
    for check in document["checks"]:
        assert list(check) == ["name", "status", "found", "expected"]
        assert check["status"] in ("passed", "failed", "warning", "not applicable")


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x80\x02N."])
def test_every_check_is_listed_once_and_in_order_for_a_corrupted_file(content, tmp_path):
    path = tmp_path / "mine.pth"
    path.write_bytes(content)
    verification = verify_weights(path)
    assert [check.name for check in verification.checks] == list(CHECKS)
    assert not verification.ok
    assert verification.variant is None
    assert statuses(verification)["forward pass"] == "not applicable"


def test_the_library_exports_it_with_its_results(state_dict, tmp_path):
    assert r2ncli.verify_weights is verify_weights
    path = saved(state_dict, tmp_path / "mine.pth")
    assert type(verify_weights(path)) is r2ncli.Verification
    assert type(verify_weights(path, against=path)) is r2ncli.TensorComparison


def test_failed_checks_say_what_was_found_and_expected(state_dict, tmp_path):
    path = saved(state_dict, tmp_path / "mine.pth")
    assert verify_weights(path).failures == ()
    (check,) = verify_weights(path, sha256="0" * 64).failures
    assert check.describe() == f"SHA-256 {sha256(path)} (expected {'0' * 64})"
    (variant, *_) = (c for c in verify_weights(path).checks if c.name == "variant")
    assert variant.describe() == f"a Res2Net like none published: {TINY['v1b'].describe()}"


# --- bytes that are not those of the name ---------------------------------------------


def test_one_flipped_bit_fails_by_the_hash_prefix(whole, tmp_path):
    path = tmp_path / whole.name
    shutil.copy(whole, path)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    found = failures(path)
    assert found["hash prefix"] == f"SHA-256 {sha256(path)[:8]}…"
    assert "was altered or corrupted after it was written" in found["stored checksums"]
    assert set(found) == {"hash prefix", "stored checksums"}


def test_a_truncated_file_fails_by_its_container(whole, tmp_path):
    path = tmp_path / whole.name
    path.write_bytes(whole.read_bytes()[:1_000_000])
    found = failures(path)
    assert (
        found["container"]
        == "truncated: the end of the zip container is missing. Download it again"
    )
    assert set(found) == {"container", "hash prefix"}


def test_a_web_page_fails_by_its_container(tmp_path):
    path = tmp_path / PUBLISHED[DEFAULT].file
    path.write_bytes(b"<!DOCTYPE html><html><body>504 Gateway Time-out</body></html>")
    found = failures(path)
    assert found["container"].startswith("a web page (HTML), not a checkpoint")
    assert set(found) == {"container", "hash prefix", "published list"}


def test_a_file_of_a_published_name_with_other_content_fails_by_hash_prefix_and_list(tmp_path):
    weights = hollow(PUBLISHED[DEFAULT].architecture)
    path = saved(weights, tmp_path / PUBLISHED[DEFAULT].file)
    checks = {check.name: check for check in verify_weights(path).checks}
    assert set(failures(path)) == {"hash prefix", "published list", "constant tensors"}
    assert checks["hash prefix"].expected == "3cf99910"
    assert checks["hash prefix"].found == f"SHA-256 {sha256(path)[:8]}…"
    assert checks["published list"].found == f"not the published {DEFAULT}"
    assert checks["published list"].expected == PUBLISHED[DEFAULT].file


def test_hyphens_in_a_published_name_change_no_check(state_dict, tmp_path):
    path = saved(state_dict, tmp_path / PUBLISHED[DEFAULT].file.replace("_", "-"))
    assert {"hash prefix", "published list", "variant"} <= set(failures(path))


# --- which file is meant --------------------------------------------------------------


def test_a_bare_name_is_looked_for_in_the_current_folder_first(
    state_dict, hub, tmp_path, monkeypatch
):
    saved(state_dict, hub / "my_net.pth")
    monkeypatch.chdir(tmp_path)
    assert verify_weights("my_net.pth").file == str(hub / "my_net.pth")
    saved(state_dict, tmp_path / "my-net.pth")
    assert verify_weights("my_net.pth").file == "my-net.pth"


def test_no_file_means_the_checkpoint_that_classify_would_load(
    state_dict, hub, tmp_path, monkeypatch
):
    with pytest.raises(CheckpointError, match=r"is not in .* and nothing was downloaded"):
        verify_weights()
    saved(state_dict, hub / PUBLISHED[DEFAULT].file)
    assert verify_weights().file == str(hub / PUBLISHED[DEFAULT].file)
    monkeypatch.setenv("R2N_WEIGHTS", str(saved(state_dict, tmp_path / "mine.pth")))
    assert verify_weights().file == str(tmp_path / "mine.pth")
    monkeypatch.setenv("R2N_WEIGHTS", "demo")
    assert verify_weights().ok


def test_a_published_name_is_its_file_in_torch_hubs_folder(state_dict, hub):
    saved(state_dict, hub / PUBLISHED["res2next50"].file)
    assert verify_weights("res2next50").file == str(hub / PUBLISHED["res2next50"].file)
    assert verify_weights("demo").file.endswith("demo.safetensors")
    with pytest.raises(CheckpointError, match="nothing was downloaded"):
        verify_weights("res2net50-48w-2s")
    with pytest.raises(CheckpointError, match="no such file: ''"):
        verify_weights("")


# --- digests --------------------------------------------------------------------------


def test_the_whole_sha256_can_be_given(state_dict, tmp_path):
    path = saved(state_dict, tmp_path / "mine.pth")
    digest = sha256(path)
    for expected in (digest, digest.upper()):
        assert statuses(verify_weights(path, sha256=expected))["expected SHA-256"] == "passed"
    verification = verify_weights(path, sha256="0" * 64)
    assert not verification.ok
    (check,) = (check for check in verification.checks if check.status == "failed")
    assert (check.name, check.found) == ("expected SHA-256", f"SHA-256 {digest}")


@pytest.mark.parametrize("expected", ["", "3cf99910", "g" * 64, "0" * 65, f" {'0' * 64}"])
def test_an_expected_sha256_that_is_not_one_is_a_usage_error(expected, state_dict, tmp_path):
    path = saved(state_dict, tmp_path / "mine.pth")
    with pytest.raises(UsageError, match="expected the 64 hex digits"):
        verify_weights(path, sha256=expected)


def test_a_date_in_the_name_is_no_hash(state_dict, tmp_path):
    (check,) = (
        check
        for check in verify_weights(saved(state_dict, tmp_path / "net_20240131.pth")).checks
        if check.name == "hash prefix"
    )
    assert check.status == "not applicable"
    assert check.found == "the file name has none (20240131 is a date)"


def test_a_name_with_the_whole_sha256_proves_the_whole_file(state_dict, tmp_path):
    path = saved(state_dict, tmp_path / "mine.pth")
    path = path.rename(tmp_path / f"mine-{sha256(path)}.pth")
    (check,) = (c for c in verify_weights(path).checks if c.name == "hash prefix")
    assert (check.status, check.found) == ("passed", "all 64 hex digits of the SHA-256 match")


def test_the_content_hash_is_the_same_in_every_container(state_dict, tmp_path):
    renamed = names_for("mmpretrain", state_dict)
    digests = set()
    for path in (
        saved(state_dict, tmp_path / "zip.pth"),
        saved(state_dict, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False),
        saved({"epoch": 3, "state_dict": state_dict}, tmp_path / "wrapped.pt"),
        saved({f"module.{n}": t for n, t in state_dict.items()}, tmp_path / "prefixed.pth"),
        saved({renamed[n]: t for n, t in state_dict.items()}, tmp_path / "mmpretrain.pth"),
        saved(dict(reversed(state_dict.items())), tmp_path / "turned.pth"),
    ):
        digests.add(verify_weights(path).tensors_sha256)
    save_file(state_dict, tmp_path / "a.safetensors")
    digests.add(verify_weights(tmp_path / "a.safetensors").tensors_sha256)
    assert digests == {tensors_sha256(state_dict)}


def test_the_content_hash_is_what_its_definition_says():
    tensors = {"b": torch.tensor([[1.0, 2.0]]).T, "a": torch.tensor(7)}
    told = b'["a", "int64", []]\n' + (7).to_bytes(8, "little")
    told += b'["b", "float32", [2, 1]]\n' + np.array([1, 2], "<f4").tobytes()
    assert tensors_sha256(tensors) == hashlib.sha256(told).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {**tensors, "b": tensors["b"] + 1e-7},
        lambda tensors: {**tensors, "b": tensors["b"].reshape(2, 1)},
        lambda tensors: {**tensors, "b": tensors["b"].view(torch.int32)},
        lambda tensors: {"a": tensors["a"], "c": tensors["b"]},
        lambda tensors: {"a": tensors["b"], "b": tensors["a"]},
        lambda tensors: {"a": tensors["a"]},
        lambda tensors: {**tensors, "b": tensors["b"].to_sparse()},
        lambda tensors: {**tensors, "b": tensors["b"].to("meta")},
    ],
)
def test_the_content_hash_changes_with_names_dtypes_shapes_and_values(change):
    tensors = {"a": torch.tensor([0.5, 0.25]), "b": torch.tensor([1.0, 0.0])}
    assert tensors_sha256(change(tensors)) != tensors_sha256(tensors)
    assert tensors_sha256(dict(reversed(tensors.items()))) == tensors_sha256(tensors)


# --- another network than the name says -----------------------------------------------


@pytest.mark.parametrize("separator", ["-", "_"])
def test_a_v1_file_under_a_v1b_name_fails_by_its_variant(separator, tmp_path):
    path = saved(hollow(PUBLISHED["res2net50_26w_4s"].architecture), tmp_path / "weights.pth")
    name = f"{DEFAULT}-{sha256(path)[:8]}.pth".replace("_", separator)
    path = path.rename(tmp_path / name)
    assert failures(path)["variant"] == "res2net50_26w_4s"
    checks = {check.name: check for check in verify_weights(path).checks}
    assert checks["variant"].expected == f"{DEFAULT}, by its name"


def test_a_fine_tuned_head_under_its_networks_name_is_a_warning(state_dict, tmp_path):
    weights = hollow(PUBLISHED[DEFAULT].architecture)
    weights |= {"fc.weight": torch.zeros(7, 2048), "fc.bias": torch.zeros(7)}
    verification = verify_weights(saved(weights, tmp_path / f"{DEFAULT}.pth"))
    assert verification.variant == "Res2Net50-v1b 26w-4s, 7 classes"
    (check,) = (check for check in verification.checks if check.name == "variant")
    assert check.status == "warning"
    assert check.found == f"a Res2Net like {DEFAULT}, with 7 classes"


def test_tensors_of_something_else_fail_by_their_variant(tmp_path):
    path = saved({"stem.weight": torch.ones(2), "head.bias": torch.ones(1)}, tmp_path / "m.pth")
    assert failures(path) == {"variant": "not a Res2Net: stem.weight, head.bias…"}
    assert statuses(verify_weights(path))["finite values"] == "passed"


# --- tensors that are not as they should be -------------------------------------------


def test_a_nan_fails_and_is_counted_where_it_is(state_dict, tmp_path):
    state_dict["layer2.0.conv1.weight"].view(-1)[3:5] = torch.nan
    state_dict["bn1.running_var"][0] = torch.inf
    found = failures(saved(state_dict, tmp_path / "mine.pth"))
    assert found == {
        "finite values": "bn1.running_var (1 values); layer2.0.conv1.weight (2 values)"
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_another_float_than_float32_is_a_warning(dtype, state_dict, tmp_path):
    other = {
        name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        for name, tensor in state_dict.items()
    }
    verification = verify_weights(saved(other, tmp_path / "mine.pth"))
    checks = {check.name: check for check in verification.checks}
    floats = sum(tensor.is_floating_point() for tensor in state_dict.values())
    assert verification.ok
    assert checks["dtypes"].status == "warning"
    assert (checks["dtypes"].found, checks["dtypes"].expected) == (f"{floats} {dtype}", "float32")
    assert checks["forward pass"].status == "passed"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda tensor: tensor.to(torch.int8), "int8"),
        (lambda tensor: tensor.to(torch.complex64), "complex64"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda tensor: tensor.to_sparse(), "sparse_coo float32"),
        (lambda tensor: tensor.to("meta"), "meta float32"),
    ],
)
def test_a_tensor_of_no_plain_floats_fails_by_its_dtype(change, kind, state_dict, tmp_path):
    state_dict["fc.weight"] = change(state_dict["fc.weight"])
    path = saved(state_dict, tmp_path / "mine.pth")
    (found,) = failures(path).values()
    assert statuses(verify_weights(path))["dtypes"] == "failed"
    assert f"1 {kind}" in found


def test_missing_and_unexpected_names_fail_and_are_listed(state_dict, tmp_path):
    for name in ("bn1.bias", "fc.bias"):
        del state_dict[name]
    state_dict |= {"aux.0": torch.zeros(1), "aux.1": torch.zeros(1)}
    path = saved(state_dict, tmp_path / "mine.pth")
    assert failures(path) == {"names": "missing bn1.bias, fc.bias; unexpected aux (2)"}
    assert statuses(verify_weights(path))["forward pass"] == "not applicable"


def test_a_backbone_without_its_classifier_fails_by_its_names(state_dict, tmp_path):
    headless = {name: t for name, t in state_dict.items() if not name.startswith("fc.")}
    path = saved(headless, tmp_path / "mine.pth")
    assert failures(path) == {"names": "missing fc (2)"}
    without = TINY["v1b"].describe().replace("7 classes", "no classifier")
    assert verify_weights(path).variant == without
    assert status_and_words(path, "variant")[1] == f"a Res2Net like none published: {without}"


def test_a_published_backbone_is_said_to_lack_its_classifier(tmp_path):
    weights = hollow(PUBLISHED[DEFAULT].architecture)
    headless = {name: t for name, t in weights.items() if not name.startswith("fc.")}
    path = saved(headless, tmp_path / "mine.pth")
    assert verify_weights(path).variant == "Res2Net50-v1b 26w-4s, no classifier"
    assert status_and_words(path, "variant")[1] == f"{DEFAULT} without its classifier"
    with pytest.raises(CheckpointError, match="no classifier, but 2 tensors are missing"):
        r2ncli.load_model(path)


def test_wrong_shapes_fail_and_are_listed(state_dict, tmp_path):
    state_dict["bn1.bias"] = torch.zeros(3)
    found = failures(saved(state_dict, tmp_path / "mine.pth"))
    assert found == {"shapes": "bn1.bias [3], not [9]"}


def test_values_that_overflow_fail_by_the_forward_pass(state_dict, tmp_path):
    for stage in range(1, 5):
        state_dict[f"layer{stage}.0.conv3.weight"] *= 1e37
    found = failures(saved(state_dict, tmp_path / "mine.pth"))
    assert list(found) == ["forward pass"]


# --- values that no trained network has -----------------------------------------------


def status_and_words(path, name):
    """The status of one check, and what it found."""
    (check,) = (check for check in verify_weights(path).checks if check.name == name)
    return check.status, check.found


def test_a_negative_variance_fails_and_one_of_zero_is_a_warning(state_dict, tmp_path):
    state_dict["bn1.running_var"][:2] = 0
    path = saved(state_dict, tmp_path / "zero.pth")
    assert status_and_words(path, "batch norm") == (
        "warning",
        "2 channels with running variance 0",
    )
    assert verify_weights(path).ok
    state_dict["bn1.running_var"][0] = -0.5
    found = failures(saved(state_dict, tmp_path / "negative.pth"))
    assert found == {"batch norm": "bn1.running_var (1 values)"}


def test_statistics_that_look_untrained_are_a_warning(tmp_path):
    torch.manual_seed(0)
    path = saved(Res2Net(TINY["v1"]).state_dict(), tmp_path / "fresh.pth")
    verification = verify_weights(path)
    assert verification.ok
    status, words = status_and_words(path, "batch norm")
    assert status == "warning"
    count = sum(name.endswith("running_var") for name in expected_shapes(TINY["v1"]))
    assert words.startswith(
        f"{count} of {count} layers have the statistics of an untrained network"
    )
    weights = dict(reference_network(TINY["v1"]).state_dict())
    weights |= {"bn1.running_mean": torch.zeros(10), "bn1.running_var": torch.ones(10)}
    words = status_and_words(saved(weights, tmp_path / "one.pth"), "batch norm")[1]
    assert words.startswith(f"1 of {count} layers have")
    assert words.endswith("variance 1: bn1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer2.0.conv1.weight", 0.0),
        ("layer2.0.conv1.weight", 0.25),
        ("fc.weight", 0.0),
        ("bn1.running_var", 0.0),
    ],
)
def test_a_tensor_of_one_value_fails_where_none_should_be(name, value, state_dict, tmp_path):
    state_dict[name].fill_(value)
    path = saved(state_dict, tmp_path / "mine.pth")
    assert failures(path) == {"constant tensors": f"{name} (all {value:g})"}
    assert statuses(verify_weights(path))["forward pass"] != "not applicable"


@pytest.mark.parametrize("name", ["fc.bias", "layer1.0.bn1.bias", "layer1.0.bn1.running_mean"])
def test_a_tensor_of_one_value_passes_where_it_may_be(name, state_dict, tmp_path):
    state_dict[name].zero_()
    path = saved(state_dict, tmp_path / "mine.pth")
    assert status_and_words(path, "constant tensors")[0] == "passed"


def test_a_batch_norm_with_zero_weights_is_a_warning(state_dict, tmp_path):
    state_dict["layer1.0.bn3.weight"].zero_()
    assert status_and_words(saved(state_dict, tmp_path / "mine.pth"), "constant tensors") == (
        "warning",
        "batch norms whose weights are all zero: layer1.0.bn3.weight",
    )


def test_logits_of_an_unusual_scale_are_a_warning(state_dict, tmp_path):
    for factor in (1e-6, 1e6):
        scaled = {n: t * factor if n.startswith("fc.") else t for n, t in state_dict.items()}
        status, words = status_and_words(saved(scaled, tmp_path / "odd.pth"), "forward pass")
        assert status == "warning"
        assert "root mean square" in words
    assert status_and_words(saved(state_dict, tmp_path / "m.pth"), "forward pass")[0] == "passed"


# --- other libraries' names, other networks -------------------------------------------


@pytest.mark.parametrize(
    ("library", "words"),
    [
        ("timm", "names, all as published, behind the prefix 'module.'"),
        ("mmpretrain", "names, all as mmpretrain has them, behind the prefix 'module.backbone.'"),
        ("mmdetection", "names, all as mmdetection has them, behind the prefix 'module.backbone.'"),
    ],
)
def test_another_librarys_names_pass_and_are_mentioned(library, words, state_dict, tmp_path):
    renamed = names_for(library, state_dict)
    theirs = {f"module.{renamed[name]}": tensor for name, tensor in state_dict.items()}
    path = saved({"meta": {}, "state_dict": theirs}, tmp_path / "theirs.pth")
    assert failures(path) == {}
    assert status_and_words(path, "names") == ("passed", f"{len(theirs)} {words}")


def test_a_detectors_other_parts_are_grouped_and_not_listed(state_dict, tmp_path):
    weights = {
        names_for("mmdetection", state_dict)[name]: tensor
        for name, tensor in state_dict.items()
        if not name.startswith("fc.")
    }
    weights |= {f"neck.fpn_convs.{n}.conv.weight": torch.ones(2, 2) for n in range(200)}
    weights |= {f"rpn_head.{n}.weight": torch.randn(2, 2) for n in range(200)}
    path = saved({"state_dict": weights}, tmp_path / "detector.pth")
    assert failures(path)["names"] == "missing fc (2); unexpected neck (200), rpn_head (200)"
    document = verify_weights(path).as_dict()
    assert document["differences"]["missing"] == ("fc.weight", "fc.bias")
    assert len(document["differences"]["unexpected"]) == 400


def test_many_wrong_shapes_are_grouped(tmp_path):
    weights = hollow(TINY["v1"])
    for name in list(weights):
        if name.startswith("layer3.") and weights[name].dim() == 1:
            weights[name] = torch.zeros(1)
    found = failures(saved(weights, tmp_path / "mine.pth"))["shapes"]
    assert found.startswith("layer3.0.bn1.weight [1], not [")
    assert "; in all layer3.0 (" in found


def test_a_part_of_a_published_network_is_told_by_most_of_its_tensors(tmp_path):
    weights = hollow(PUBLISHED[DEFAULT].architecture)
    part = {name: t for name, t in weights.items() if not name.startswith("layer4.")}
    found = failures(saved(part, tmp_path / "part.pth"))
    assert found["variant"] == f"a part of {DEFAULT}: 428 of its tensors"
    assert found["names"] == "missing layer4.0 (30), layer4.1 (25), layer4.2 (25)"


@pytest.mark.parametrize(
    ("width", "name"), [((28, 28), "res2net_dla60"), ((32, 4), "res2next_dla60")]
)
def test_the_published_networks_with_dlas_body_are_recognised_and_declined(width, name, tmp_path):
    weights = {
        "base_layer.0.weight": torch.randn(16, 3, 7, 7),
        "level2.tree1.convs.0.weight": torch.randn(*width, 3, 3),
        "fc.weight": torch.randn(1000, 1024, 1, 1),
    }
    path = saved(weights, tmp_path / "dla.pth")
    words = f"{name}, a published network whose DLA body r2n does not support"
    assert failures(path) == {"variant": words}
    with pytest.raises(CheckpointError, match=rf"a Res2Net, found {words}"):
        r2ncli.load_model(path)


def test_the_sha256_of_a_declined_file_is_recognised(state_dict, tmp_path, monkeypatch):
    monkeypatch.setattr("r2ncli.weights.verify.digest_of", lambda path: "d88db7f9" + "0" * 56)
    path = saved(state_dict, tmp_path / "mine.pth")
    assert "res2net_dla60_4s-d88db7f9.pth" in status_and_words(path, "published list")[1]


# --- dangerous files, and files without a state dict ---------------------------------------


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_that_would_run_something_fails_by_the_name_and_nothing_has_run(
    zipped, state_dict, tmp_path
):
    mark = tmp_path / "mark"
    content = {"state_dict": state_dict, "extra": Payload(os.mkdir, str(mark))}
    path = saved(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    assert failures(path) == {
        "pickle": "refused, nothing in it was executed: it would import posix.mkdir, "
        "which a state dict never needs"
    }
    assert not mark.exists()


def test_what_holds_no_state_dict_fails_by_its_loading(tmp_path):
    path = saved([torch.zeros(1)], tmp_path / "list.pth")
    assert failures(path) == {"safe loading": "holds a list, expected a state dict of tensors"}


def test_a_file_that_is_not_there_is_an_error(hub):
    with pytest.raises(CheckpointError, match=r"no such file: absent\.pth") as caught:
        verify_weights("absent.pth")
    assert str(hub) in str(caught.value)


def test_a_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        verify_weights(tmp_path)


# --- corrupted files, and other kinds of files ----------------------------------


def h5_bytes():
    """An HDF5 file as Keras writes one."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["model_weights/conv/kernel"] = np.ones((3, 3))
    return buffer.getvalue()


def image_bytes(form):
    """An image."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, form)
    return buffer.getvalue()


def script_bytes():
    """A program that torch traced."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have torch.export
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    return buffer.getvalue()


def program_bytes():
    """A program that torch exported."""
    buffer = io.BytesIO()
    exported = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(exported, buffer)
    return buffer.getvalue()


def onnx_bytes():
    """The first fields of an ONNX model, as protocol buffers: version, producer."""
    return b"\x08\x0a\x12\x07pytorch\x1a\x052.15.0" + b"\x3a\x04\x0a\x02ab"


WEIGHTS = dict(reference_network(TINY["v1b"]).state_dict())
SAFE = safetensors_bytes(WEIGHTS)
REFUSED = "refused, nothing in it was executed: it would import "
ZIP, LEGACY = torch_bytes(WEIGHTS), torch_bytes(WEIGHTS, _use_new_zipfile_serialization=False)

CORRUPTED_OR_FOREIGN = {
    "an empty file": (lambda: b"", "container", "empty"),
    "a web page": (
        lambda: b"<!DOCTYPE html><html><body>504 Gateway Time-out</body></html>",
        "container",
        "a web page (HTML), not a checkpoint: probably a server's error message. Download the "
        "file again",
    ),
    "a server's error in XML": (
        lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "container",
        "an XML document, not a checkpoint: probably a server's error message. Download the "
        "file again",
    ),
    "a server's error in JSON": (
        lambda: b'{"error": "Invalid username or password."}',
        "container",
        "a JSON document, not a checkpoint: probably a server's error message. Download the "
        "file again",
    ),
    "plain text": (
        lambda: b"Too many users have viewed or downloaded this file recently.",
        "container",
        "text, not a checkpoint: it starts 'Too many users have viewed or downloaded'",
    ),
    "a Git LFS pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "container",
        "a Git LFS pointer, not the file itself: run git lfs pull",
    ),
    "a zip container without its end": (
        lambda: ZIP[: len(ZIP) // 2],
        "container",
        "truncated: the end of the zip container is missing. Download it again",
    ),
    "half of a file of the format before zip": (
        lambda: LEGACY[:2000],
        "pickle",
        "truncated: it ends too early. Download it again",
    ),
    "half of a safetensors file": (
        lambda: SAFE[: len(SAFE) // 2],
        "container",
        f"truncated: {len(SAFE) // 2:,} of a safetensors file's {len(SAFE):,} bytes. Download it "
        "again",
    ),
    "zeros that a download reserved": (
        lambda: bytes(100_000),
        "container",
        "not a checkpoint: it starts with zeros only, like an interrupted download",
    ),
    "random bytes": (
        lambda: np.random.default_rng(0).bytes(4096),
        "container",
        "not a checkpoint (the format is unknown)",
    ),
    "gzip": (lambda: gzip.compress(ZIP), "container", "gzip-compressed: unpack it first"),
    "a tar archive": (
        lambda: tar_bytes({"net/model.pth": torch_bytes(WEIGHTS)}),
        "container",
        "a tar archive, not a checkpoint: unpack it first",
    ),
    "a zip archive around a checkpoint": (
        lambda: zip_bytes({"net/model_pth": b""}).replace(b"model_pth", b"model.pth"),
        "container",
        "a zip archive with net/model.pth inside: unpack it first",
    ),
    "a zip archive of images": (
        lambda: zip_bytes({"a": b"", "b": b""}),
        "container",
        "a zip archive, but not one that torch.save writes",
    ),
    "an ONNX model": (
        onnx_bytes,
        "container",
        "an ONNX model, expected a PyTorch checkpoint",
    ),
    "a program's source": (
        lambda: b"import torch\n\nPlaceholder = torch.ones(1)\n",
        "container",
        "text, not a checkpoint: it starts 'import torch Placeholder = torch.ones(1)'",
    ),
    "Keras weights": (
        h5_bytes,
        "container",
        "an HDF5 file (of Keras?), not a PyTorch checkpoint",
    ),
    "a PNG": (lambda: image_bytes("PNG"), "container", "a PNG image, not a checkpoint"),
    "a JPEG": (lambda: image_bytes("JPEG"), "container", "a JPEG image, not a checkpoint"),
    "a TorchScript program": (
        script_bytes,
        "container",
        "a TorchScript program, expected a state dict of tensors",
    ),
    "an exported program": (
        program_bytes,
        "container",
        "a torch.export program, expected a state dict of tensors",
    ),
    "a whole pickled network": (
        lambda: torch_bytes(torch.nn.Sequential(torch.nn.Linear(2, 2))),
        "pickle",
        f"{REFUSED}torch.nn.modules.container.Sequential, torch.nn.modules.linear.Linear, "
        "which a state dict never needs; it holds a whole network, not its state dict: if you "
        "trust it, save only its state dict",
    ),
    "numpy values beside the tensors": (
        lambda: torch_bytes({"state_dict": WEIGHTS, "best": np.float64(0.5)}),
        "pickle",
        f"{REFUSED}numpy._core.multiarray.scalar, numpy.dtype, which a state dict never needs; it "
        "holds numpy values beside the tensors: if you trust it, save only its state dict",
    ),
    "a pickle that torch did not write": (
        lambda: pickle.dumps({"epoch": 3}),
        "pickle",
        "a pickle, but not one that torch.save writes",
    ),
    "a poisoned pickle": (
        lambda: torch_bytes({"state_dict": WEIGHTS, "x": Payload(os.mkdir, "/nonexistent")}),
        "pickle",
        f"{REFUSED}posix.mkdir, which a state dict never needs",
    ),
    "a poisoned pickle of protocol 0": (
        lambda: b"cposix\nsystem\n(S'true'\ntR.",
        "pickle",
        f"{REFUSED}posix.system, which a state dict never needs",
    ),
    "a list of tensors": (
        lambda: torch_bytes([torch.ones(1)]),
        "safe loading",
        "holds a list, expected a state dict of tensors",
    ),
    "an optimizer alone": (
        lambda: torch_bytes(torch.optim.SGD([torch.ones(2)]).state_dict()),
        "safe loading",
        "holds no state dict (its keys: 'state', 'param_groups')",
    ),
    "a corrupted safetensors header": (
        lambda: (16).to_bytes(8, "little") + b"{" + b"x" * 100,
        "safe loading",
        "corrupted, cannot be loaded: invalid JSON in its header: Expecting property name enclosed "
        "in double quotes: line 1 column 2 (char 1)",
    ),
    "torchvision's ResNet-18": (
        lambda: torch_bytes(torchvision.models.resnet18().state_dict()),
        "variant",
        "not a Res2Net: it seems to be a ResNet-18, as torchvision's and timm's are",
    ),
    "another network": (
        lambda: torch_bytes({"encoder.0.weight": torch.randn(2, 2)}),
        "variant",
        "not a Res2Net: encoder.0.weight…",
    ),
}


@pytest.mark.parametrize(
    ("make", "check", "sentence"), CORRUPTED_OR_FOREIGN.values(), ids=CORRUPTED_OR_FOREIGN
)
def test_a_corrupted_or_foreign_file_gets_the_right_sentence(make, check, sentence, tmp_path):
    path = tmp_path / "download.pth"
    path.write_bytes(make())
    found = failures(path)
    assert found == {check: sentence}
    with pytest.raises(CheckpointError):  # and nothing else loads it either
        r2ncli.load_model(path)


# --- the command ----------------------------------------------------------------------


def run(*arguments):
    """The exit code, stdout and stderr of ``r2n verify-weights``."""
    ended = CliRunner().invoke(app, ["verify-weights", *map(str, arguments)])
    return ended.exit_code, ended.stdout, ended.stderr


def test_the_command_ends_with_0_or_4_and_prints_a_table(state_dict, tmp_path):
    path = saved(state_dict, tmp_path / "mine.pth")
    code, table, errors = run(path)
    assert (code, errors) == (0, "")
    assert all(name in table for name in CHECKS)
    assert sha256(path) in table
    code, _, errors = run(path, "--sha256", "0" * 64)
    assert code == 4
    assert errors.endswith("mine.pth: failed: expected SHA-256\n")  # the table says the rest


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (["absent.pth"], 4, "no such file: absent.pth"),
        ([], 4, "nothing was downloaded"),
        (["demo", "--sha256", "12"], 2, "expected the 64 hex digits"),
        (["."], 4, "is a folder"),
    ],
)
def test_errors_are_json_documents_of_the_same_keys(arguments, code, error, hub):
    ended, out, errors = run(*arguments, "--json")
    document = json.loads(out)
    assert ended == code
    assert list(document) == KEYS
    assert document["ok"] is False
    assert error in document["error"]
    assert document["error"] in errors
    assert document["checks"] == []


def test_a_refused_file_is_a_json_document_too(tmp_path):
    path = saved({"x": Payload(os.mkdir, str(tmp_path / "mark"))}, tmp_path / "evil.pth")
    code, out, errors = run(path, "--json")
    document = json.loads(out)
    assert code == 4
    assert list(document) == KEYS
    assert (document["ok"], document["sha256"]) == (False, sha256(path))
    assert "posix.mkdir" in errors
    assert not (tmp_path / "mark").exists()
