"""Every check of a checkpoint file says what it found, and fails for its own reason."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest
import torch
from reference_weights import TINY, reference_network, reference_state_dict
from safetensors.torch import save_file

import r2ncli
from r2ncli.architectures import PUBLISHED
from r2ncli.errors import CheckpointError
from r2ncli.verification import CHECKS, verify_weights
from r2ncli.weights import expected_shapes

DEFAULT = "res2net50_v1b_26w_4s"


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """torch.hub's folder: an empty one of the test's own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch home"))
    folder = tmp_path / "torch home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The default network of full size with the kit's weights, named with its digits."""
    path = tmp_path_factory.mktemp("whole") / "weights.pth"
    torch.save(reference_state_dict(DEFAULT), path)
    return path.rename(path.with_name(f"{DEFAULT}-{sha256(path)[:8]}.pth"))


@pytest.fixture
def state_dict():
    """A small network's state dict, to be changed at will."""
    return dict(reference_network(TINY["v1b"]).state_dict())


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def saved(content, path, **options):
    """`content` saved by torch at `path`."""
    torch.save(content, path, **options)
    return path


def hollow(architecture):
    """A state dict of full shapes that takes no room in a file: every tensor is one zero."""
    return {
        name: torch.zeros((), dtype=torch.int64 if "num_batches" in name else None).expand(shape)
        for name, shape in expected_shapes(architecture).items()
    }


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


def test_a_whole_file_named_by_its_digits_passes(whole):
    verification = verify_weights(whole)
    assert verification.ok
    assert verification.variant == DEFAULT
    assert verification.sha256 == sha256(whole)
    assert statuses(verification) == dict.fromkeys(CHECKS, "passed") | {
        "published list": "warning"  # of the name, but not the file that was published
    }


def test_a_file_is_found_under_its_name_with_hyphens_for_underscores(state_dict, tmp_path):
    path = saved(state_dict, tmp_path / "my_small-net.pth")
    verification = verify_weights(tmp_path / "my-small_net.pth")
    assert verification.ok
    assert verification.file == str(path)


def test_a_file_in_torch_hubs_folder_is_found_by_its_name(state_dict, hub):
    path = saved(state_dict, hub / "my_net.pth")
    assert verify_weights("my-net.pth").file == str(path)


def test_the_published_file_is_known_by_its_digest_whatever_its_name(
    state_dict, tmp_path, monkeypatch
):
    monkeypatch.setattr("r2ncli.verification.sha256", lambda path: "3cf99910" + "0" * 56)
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
    assert statuses(verification) == dict.fromkeys(CHECKS, "passed") | {
        "digits in the name": "not applicable",
        "published list": "not applicable",
    }


def test_old_files_without_batch_counters_pass(state_dict, tmp_path):
    old = {n: t for n, t in state_dict.items() if not n.endswith("num_batches_tracked")}
    path = saved(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert failures(path) == {}


def test_the_embedded_demonstration_checkpoint_passes():
    from r2ncli.checkpoints import find_checkpoint

    assert failures(find_checkpoint("demo")) == {}


def test_the_document_has_its_schema(state_dict, tmp_path):
    path = saved(state_dict, tmp_path / "mine.pth")
    document = json.loads(json.dumps(verify_weights(path).as_dict()))
    assert document["schema"] == 1
    assert list(document) == ["schema", "file", "sha256", "variant", "checks", "ok"]
    assert document["file"] == str(path)
    assert document["sha256"] == sha256(path)
    assert document["ok"] is True
    assert [check["name"] for check in document["checks"]] == list(CHECKS)
    for check in document["checks"]:
        assert list(check) == ["name", "status", "found", "expected"]
        assert check["status"] in ("passed", "failed", "warning", "not applicable")


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x80\x02N."])
def test_every_check_is_listed_once_and_in_order_though_the_file_is_broken(content, tmp_path):
    path = tmp_path / "mine.pth"
    path.write_bytes(content)
    verification = verify_weights(path)
    assert [check.name for check in verification.checks] == list(CHECKS)
    assert not verification.ok
    assert verification.variant is None
    assert statuses(verification)["forward pass"] == "not applicable"


def test_it_is_the_librarys_verify_weights():
    assert r2ncli.verify_weights is verify_weights


# --- bytes that are not those of the name ---------------------------------------------


def test_one_flipped_bit_fails_by_the_digits(whole, tmp_path):
    path = tmp_path / whole.name
    shutil.copy(whole, path)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    found = failures(path)
    assert found == {"digits in the name": f"SHA-256 {sha256(path)[:8]}…"}


def test_a_truncated_file_fails_by_its_container(whole, tmp_path):
    path = tmp_path / whole.name
    path.write_bytes(whole.read_bytes()[:1_000_000])
    found = failures(path)
    assert found["container"] == "truncated: a zip container without its end. Download it again"
    assert set(found) == {"container", "digits in the name"}


def test_a_web_page_fails_by_its_container(tmp_path):
    path = tmp_path / PUBLISHED[DEFAULT].file
    path.write_bytes(b"<!DOCTYPE html><html><body>504 Gateway Time-out</body></html>")
    found = failures(path)
    assert found["container"].startswith("a web page (HTML), not a checkpoint")
    assert set(found) == {"container", "digits in the name", "published list"}


def test_a_file_of_a_published_name_with_other_content_fails_by_digits_and_list(tmp_path):
    weights = hollow(PUBLISHED[DEFAULT].architecture)
    path = saved(weights, tmp_path / PUBLISHED[DEFAULT].file)
    checks = {check.name: check for check in verify_weights(path).checks}
    assert set(failures(path)) == {"digits in the name", "published list"}
    assert checks["digits in the name"].expected == "3cf99910"
    assert checks["digits in the name"].found == f"SHA-256 {sha256(path)[:8]}…"
    assert checks["published list"].found == f"not the published {DEFAULT}"
    assert checks["published list"].expected == PUBLISHED[DEFAULT].file


def test_hyphens_in_a_published_name_excuse_nothing(state_dict, tmp_path):
    path = saved(state_dict, tmp_path / PUBLISHED[DEFAULT].file.replace("_", "-"))
    assert {"digits in the name", "published list", "variant"} <= set(failures(path))


# --- another network than the name says -----------------------------------------------


@pytest.mark.parametrize("separator", ["-", "_"])
def test_a_v1_file_under_a_v1b_name_fails_by_its_variant(separator, tmp_path):
    path = saved(hollow(PUBLISHED["res2net50_26w_4s"].architecture), tmp_path / "weights.pth")
    name = f"{DEFAULT}-{sha256(path)[:8]}.pth".replace("_", separator)
    path = path.rename(tmp_path / name)
    assert failures(path) == {"variant": "res2net50_26w_4s"}
    checks = {check.name: check for check in verify_weights(path).checks}
    assert checks["variant"].expected == f"{DEFAULT}, by its name"


def test_a_fine_tuned_head_under_its_networks_name_is_a_warning(state_dict, tmp_path):
    weights = hollow(PUBLISHED[DEFAULT].architecture)
    weights |= {"fc.weight": torch.zeros(7, 2048), "fc.bias": torch.zeros(7)}
    verification = verify_weights(saved(weights, tmp_path / f"{DEFAULT}.pth"))
    assert verification.ok
    assert verification.variant == "Res2Net50-v1b 26w-4s, 7 classes"
    assert statuses(verification)["variant"] == "warning"


def test_tensors_of_something_else_fail_by_their_variant(tmp_path):
    path = saved({"stem.weight": torch.ones(2), "head.bias": torch.ones(1)}, tmp_path / "m.pth")
    assert failures(path) == {"variant": "no Res2Net: stem.weight, head.bias…"}
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
def test_a_tensor_that_is_no_plain_float_fails_by_its_dtype(change, kind, state_dict, tmp_path):
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
    assert failures(path) == {
        "names": "missing bn1.bias; missing fc.bias; unexpected aux.0 and 1 more"
    }
    assert statuses(verify_weights(path))["forward pass"] == "not applicable"


def test_a_backbone_without_its_classifier_fails_by_its_names(state_dict, tmp_path):
    headless = {name: t for name, t in state_dict.items() if not name.startswith("fc.")}
    found = failures(saved(headless, tmp_path / "mine.pth"))
    assert found == {"names": "missing fc.weight; missing fc.bias"}


def test_wrong_shapes_fail_and_are_listed(state_dict, tmp_path):
    state_dict["bn1.bias"] = torch.zeros(3)
    found = failures(saved(state_dict, tmp_path / "mine.pth"))
    assert found == {"shapes": "bn1.bias [3], not [9]"}


def test_values_that_overflow_fail_by_the_forward_pass(state_dict, tmp_path):
    for stage in range(1, 5):
        state_dict[f"layer{stage}.0.conv3.weight"].fill_(1e38)
    found = failures(saved(state_dict, tmp_path / "mine.pth"))
    assert list(found) == ["forward pass"]


# --- files that are dangerous, or no checkpoint ---------------------------------------


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_that_asks_to_run_something_fails_by_its_name_and_nothing_has_run(
    zipped, state_dict, tmp_path
):
    mark = tmp_path / "mark"
    content = {"state_dict": state_dict, "extra": Payload(str(mark))}
    path = saved(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    assert failures(path) == {
        "safe loading": "refused, nothing of it was executed: it asks for posix.mkdir, "
        "which a state dict never needs"
    }
    assert not mark.exists()


def test_what_holds_no_state_dict_fails_by_its_loading(tmp_path):
    path = saved([torch.zeros(1)], tmp_path / "list.pth")
    assert failures(path) == {"safe loading": "holds a list, expected a state dict of tensors"}


def test_a_file_that_is_not_there_is_an_error(tmp_path, hub):
    with pytest.raises(CheckpointError, match=r"no such file: .*absent\.pth") as caught:
        verify_weights(tmp_path / "absent.pth")
    assert str(hub) in str(caught.value)


def test_a_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        verify_weights(tmp_path)
