"""Two checkpoint files are compared by their tensors, not by their containers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import saved
from typer.testing import CliRunner

from r2ncli.cli.app import app
from r2ncli.errors import CheckpointError, UsageError
from r2ncli.weights.structure import names_for
from r2ncli.weights.verify import verify_weights

KEYS = [
    *("schema", "file", "against", "equal", "different", "only_in_file", "only_in_against"),
    *("tensors_sha256", "error", "ok"),
]


@pytest.fixture
def other(state_dict, tmp_path):
    """The file of the unchanged state dict."""
    save_file(state_dict, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def test_the_same_tensors_are_equal_in_any_container_and_naming(state_dict, other, tmp_path):
    renamed = names_for("mmpretrain", state_dict)
    path = saved({"state_dict": {renamed[n]: t for n, t in state_dict.items()}}, tmp_path / "a.pth")
    comparison = verify_weights(path, against=other)
    assert comparison.ok
    assert comparison.equal == len(state_dict)
    assert len(set(comparison.tensors_sha256)) == 1
    assert comparison.different == comparison.only_in_file == comparison.only_in_against == ()


def test_differences_have_their_size_and_the_largest_comes_first(state_dict, other, tmp_path):
    state_dict["bn1.bias"][3] += 0.25
    state_dict["fc.bias"][0] -= 2
    comparison = verify_weights(saved(state_dict, tmp_path / "a.pth"), against=other)
    assert not comparison.ok
    assert comparison.equal == len(state_dict) - 2
    assert [tensor.name for tensor in comparison.different] == ["fc.bias", "bn1.bias"]
    sizes = [tensor.max_difference for tensor in comparison.different]
    assert sizes == pytest.approx([2, 0.25], rel=1e-6)
    assert comparison.different[0].file == comparison.different[0].against == "float32 [7]"


def test_other_shapes_and_nan_differ_without_a_size(state_dict, other, tmp_path):
    state_dict["fc.bias"] = torch.zeros(3)
    state_dict["bn1.bias"][0] = torch.nan
    state_dict["bn1.weight"] += 1
    comparison = verify_weights(saved(state_dict, tmp_path / "a.pth"), against=other)
    found = {tensor.name: tensor for tensor in comparison.different}
    assert list(found) == ["bn1.bias", "fc.bias", "bn1.weight"]
    assert (found["fc.bias"].file, found["fc.bias"].against) == ("float32 [3]", "float32 [7]")
    assert found["fc.bias"].max_difference is found["bn1.bias"].max_difference is None
    json.dumps(comparison.as_dict(), allow_nan=False)


def test_half_precision_differs_by_what_it_rounds(state_dict, other, tmp_path):
    half = {n: t.half() if t.is_floating_point() else t for n, t in state_dict.items()}
    comparison = verify_weights(saved(half, tmp_path / "half.pth"), against=other)
    floats = sum(tensor.is_floating_point() for tensor in state_dict.values())
    assert len(comparison.different) == floats
    assert 0 < comparison.different[0].max_difference < 1e-2
    assert comparison.different[0].file.startswith("float16 [")


def test_the_sign_of_zero_is_a_difference_of_size_0(state_dict, tmp_path):
    paths = [
        saved(state_dict | {"fc.bias": sign * torch.zeros(7)}, tmp_path / f"{sign}.pth")
        for sign in (1, -1)
    ]
    (tensor,) = verify_weights(paths[0], against=paths[1]).different
    assert (tensor.name, tensor.max_difference) == ("fc.bias", 0)


def test_a_nan_that_is_the_same_in_both_is_equal(state_dict, tmp_path):
    state_dict["fc.bias"][0] = torch.nan
    path = saved(state_dict, tmp_path / "a.pth")
    assert verify_weights(path, against=path).ok


def test_tensors_of_only_one_file_are_named(state_dict, other, tmp_path):
    del state_dict["fc.bias"]
    state_dict["aux.weight"] = torch.zeros(1)
    comparison = verify_weights(saved(state_dict, tmp_path / "a.pth"), against=other)
    assert comparison.only_in_file == ("aux.weight",)
    assert comparison.only_in_against == ("fc.bias",)
    assert not comparison.ok


def test_missing_files_and_files_that_are_not_checkpoints_are_errors(other, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        verify_weights(other, against=tmp_path / "absent.pth")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(CheckpointError, match="empty"):
        verify_weights(tmp_path / "empty.pth", against=other)


# --- the command ----------------------------------------------------------------------


def run(*arguments):
    """The exit code, stdout and stderr of ``r2n verify-weights``."""
    ended = CliRunner().invoke(app, ["verify-weights", *map(str, arguments)])
    return ended.exit_code, ended.stdout, ended.stderr


def test_the_command_ends_with_0_for_equal_and_4_for_different(state_dict, other, tmp_path):
    code, table, errors = run(other, "--against", other)
    assert (code, errors) == (0, "")
    assert str(len(state_dict)) in table
    state_dict["bn1.bias"][0] += 1
    del state_dict["fc.bias"]
    path = saved(state_dict, tmp_path / "a.pth")
    code, table, errors = run(path, "--against", other)
    assert code == 4
    assert "bn1.bias" in table
    assert "only in" in table
    assert "not the same tensors as" in errors


def test_the_json_document_has_its_schema_also_for_errors(state_dict, other, tmp_path):
    state_dict["bn1.bias"] += 1
    path = saved(state_dict, tmp_path / "a.pth")
    code, out, _ = run(path, "--against", other, "--json")
    document = json.loads(out)
    assert code == 4
    assert list(document) == KEYS
    assert document["ok"] is False
    (difference,) = document["different"]
    assert list(difference) == ["name", "file", "against", "max_difference"]
    code, out, errors = run(path, "--against", "absent.pth", "--json")
    document = json.loads(out)
    assert code == 4
    assert list(document) == KEYS
    assert "no such file: absent.pth" in document["error"]
    assert document["error"] in errors


def test_an_expected_sha256_does_not_go_with_a_comparison(other):
    code, _, errors = run(other, "--against", other, "--sha256", "0" * 64)
    assert code == 2
    assert "is for the checks of one file" in errors
    with pytest.raises(UsageError, match="`sha256` is for the checks of one file"):
        verify_weights(other, against=other, sha256="0" * 64)
