"""A pickle is refused by the names that it would import, however it hides them."""

from __future__ import annotations

import argparse
import builtins
import functools
import importlib
import io
import os
import pickle
import shutil
import subprocess
import zipfile
from collections import OrderedDict
from contextlib import suppress

import pytest
import torch
from support.pickles import Payload

from r2ncli.errors import CheckpointError
from r2ncli.weights.containers import container
from r2ncli.weights.loading import load_state_dict
from r2ncli.weights.opcodes import ALLOWED, requests
from r2ncli.weights.pickles import check_pickles
from r2ncli.weights.verify import verify_weights


def asked(content):
    """The names that `content` asks for."""
    return list(requests(io.BytesIO(content)).names)


def refusal(path):
    """Why `path` is refused."""
    with pytest.raises(CheckpointError) as caught:
        check_pickles(path, container(path))
    assert caught.value.exit_code == 4
    return str(caught.value).removeprefix(f"{path}: ")


REFUSED = "refused, nothing in it was executed: it would import {}, which a state dict never needs"


# --- names, however they are written --------------------------------------------------


def unicode(text):
    """The opcode that pushes a short string."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


MODULE, NAME = unicode("posix"), unicode("mkdir")
HIDDEN = {
    "GLOBAL": b"\x80\x02cposix\nmkdir\nX\1\0\0\0d\x85R.",
    "STACK_GLOBAL": b"\x80\x04" + MODULE + NAME + b"\x93" + unicode("d") + b"\x85R.",
    "names from the memo": b"\x80\x04"
    + NAME + b"\x94" + MODULE + b"\x940" + b"0h\x01h\x00\x93" + unicode("d") + b"\x85R.",
    "names put and got by number": b"\x80\x04"
    + MODULE + b"q\x07" + NAME + b"r\x2c\x01\0\0" + b"00" + b"g7\nj\x2c\x01\0\0\x93"
    + unicode("d") + b"\x85R.",
    "a memo written twice": b"\x80\x04"
    + unicode("collections") + b"q\x00" + b"0" + MODULE + b"q\x000" + b"h\x00" + NAME
    + b"\x93" + unicode("d") + b"\x85R.",
    "a duplicated string": b"\x80\x04" + NAME + MODULE + b"2q\x0000q\x010"
    + b"h\x00h\x01\x93" + unicode("d") + b"\x85R.",
    "old strings": b"S'posix'\nU\x05mkdir\x93(S'd'\ntR.",
    "INST": b"(S'd'\niposix\nmkdir\n.",
    "OBJ": b"(cposix\nmkdir\nS'd'\no.",
    "behind marks": b"\x80\x04(K\1K\2((1" + b"t0"
    + MODULE + NAME + b"\x93" + unicode("d") + b"\x85R.",
    "after an unpacked list": b"\x80\x04](K\1K\2e0"
    + MODULE + NAME + b"\x93" + unicode("d") + b"\x85R.",
    "before garbage": b"\x80\x04" + MODULE + NAME + b"\x93" + unicode("d") + b"\x85R\xff\xff",
    "before the file's end": b"\x80\x04" + MODULE + NAME + b"\x93" + unicode("d") + b"\x85R",
}  # fmt: skip


@pytest.mark.parametrize("content", HIDDEN.values(), ids=HIDDEN)
def test_a_name_is_found_however_it_is_hidden(content, tmp_path, monkeypatch):
    assert asked(content) == ["posix.mkdir"]

    monkeypatch.chdir(tmp_path)  # what was looked at is live
    with suppress(pickle.UnpicklingError, EOFError, TypeError, IndexError):
        pickle.loads(content)
    assert (tmp_path / "d").is_dir()


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"\x80\x02\x82\x07.", ["the extension registry's number 7"]),
        (b"\x80\x02\x84\x07\0\0\0.", ["the extension registry's number 7"]),
        # the module is what an allowed function returns: no look can know it
        (
            b"\x80\x04c_codecs\nencode\n" + unicode("a") + b"\x85R" + NAME + b"\x93.",
            ["_codecs.encode", "a name that it computes"],
        ),
        (b"\x80\x02c__builtin__\neval\n.", ["builtins.eval"]),
        (b"\x80\x02ccollections\nOrderedDict.fromkeys\n.", ["collections.OrderedDict.fromkeys"]),
        (b"\x80\x04" + unicode("torch") + unicode("serialization.os.system") + b"\x93.",
         ["torch.serialization.os.system"]),
    ],
)  # fmt: skip
def test_what_has_no_plain_name_is_never_allowed(content, names):
    assert asked(content) == names
    assert requests(io.BytesIO(content)).refused == tuple(n for n in names if n not in ALLOWED)
    assert names[-1] not in ALLOWED


@pytest.mark.parametrize("protocol", range(6))
def test_names_are_the_same_in_every_protocol(protocol):
    content = pickle.dumps(OrderedDict(a=argparse.Namespace(b=1)), protocol)
    found = [name for name in asked(content) if not name.startswith(("copyreg.", "builtins."))]
    assert found == ["collections.OrderedDict", "argparse.Namespace"]


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_truncated_pickle_is_an_expected_error(cut):
    whole = pickle.dumps({"a": [1, 2.5, "x" * 10, OrderedDict(b=(1,))]}, 2)
    assert requests(io.BytesIO(whole[:-cut])).broken is not None
    assert requests(io.BytesIO(whole)).broken is None


# --- files ----------------------------------------------------------------------------

PAYLOADS = {
    "posix.system": (os.system, "mkdir {mark}"),
    "builtins.eval": (eval, "__import__('os').mkdir({mark!r})"),
    "builtins.exec": (exec, "import os; os.mkdir({mark!r})"),
    "subprocess.Popen": (subprocess.Popen, ["mkdir", "{mark}"]),
    "shutil.copyfile": (shutil.copyfile, __file__, "{mark}"),
    "functools.partial": (functools.partial, os.mkdir, "{mark}"),
    "torch.hub.load": (torch.hub.load, "{mark}", "network"),
    "importlib.import_module": (importlib.import_module, "os"),
    "builtins.getattr": (getattr, "{mark}", "join"),
    "pickle.loads": (pickle.loads, b"cposix\nmkdir\n(S'{mark}'\ntR."),
    "torch.serialization.load": (torch.serialization.load, "{mark}"),
    "torch.storage._load_from_bytes": (torch.storage._load_from_bytes, b"{mark}"),
    "io.open": (open, "{mark}", "w"),
}


def written(part, mark):
    """An argument with the place of the mark filled in."""
    if isinstance(part, str):
        return part.format(mark=mark)
    if isinstance(part, bytes):
        return part.replace(b"{mark}", mark.encode())
    return [written(inner, mark) for inner in part] if isinstance(part, list) else part


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_payload_is_refused_by_its_name_and_nothing_has_run(name, zipped, tmp_path):
    mark = tmp_path / "mark"
    function, *arguments = PAYLOADS[name]
    arguments = [written(argument, str(mark)) for argument in arguments]
    path = tmp_path / "evil.pth"
    content = {"state_dict": {"w": torch.ones(2)}, "extra": Payload(function, *arguments)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    reason = refusal(path)
    assert reason.startswith("refused, nothing in it was executed: it would import ")
    assert name in reason
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_state_dict(path)
    assert not mark.exists()


def test_a_live_payload_would_have_left_its_mark(tmp_path):
    for number, name in enumerate(("posix.system", "builtins.eval", "shutil.copyfile")):
        mark = tmp_path / str(number)
        function, *arguments = PAYLOADS[name]
        arguments = [written(argument, str(mark)) for argument in arguments]
        pickle.loads(pickle.dumps(Payload(function, *arguments)))
        assert mark.exists()


def test_dangerous_names_are_named_before_those_of_harmless_files(tmp_path):
    decoys = [torch.nn.Linear(1, 1), torch.nn.Conv2d(1, 1, 1), torch.nn.ReLU()]
    path = tmp_path / "evil.pth"
    torch.save([*decoys, Payload(os.system, "true")], path)
    assert "it would import posix.system, torch.nn.modules" in refusal(path)


def rewritten(path, **members):
    """A zip container with more members, or with others in place of its own."""
    with zipfile.ZipFile(path) as archive:
        own = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**own, **members}.items():
            archive.writestr(name, content)
    return path


EVIL = pickle.dumps(Payload(os.system, "true"), 2)


@pytest.mark.parametrize(
    "member", ["weights/extra.pkl", "weights/EXTRA.PICKLE", "x", "weights/data/9"]
)
def test_a_second_pickle_in_a_zip_is_checked_whatever_its_name(member, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.ones(2)}, path)
    rewritten(path, **{member: EVIL})
    assert refusal(path) == REFUSED.format(f"posix.system (in its member {member})")


def test_a_second_member_of_the_same_name_is_checked_too(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("weights/data.pkl", EVIL)
    assert refusal(path) == REFUSED.format("posix.system")


def test_a_compressed_member_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weights/data.pkl", EVIL)
    assert refusal(path) == (
        "refused, nothing in it was executed: its member 'weights/data.pkl' is compressed, which "
        "torch.save never does"
    )


def test_every_pickle_of_the_format_before_zip_is_checked(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}, {}, [])]
    assert whole.startswith(parts[0] + parts[1])
    for place in range(1, 5):
        path.write_bytes(b"".join([*parts[:place], EVIL, *parts[place + 1 :]]))
        assert refusal(path) == REFUSED.format("posix.system")


def test_tensors_whose_bytes_start_like_a_pickle_are_tensors(tmp_path):
    path = tmp_path / "weights.pth"
    start = torch.frombuffer(bytearray(b"\x80\x02cposix\nsystem\n"), dtype=torch.uint8)
    torch.save({"w": torch.cat([start[:2], torch.full((500,), 255, dtype=torch.uint8)])}, path)
    assert "posix.system" not in check_pickles(path, "zip")
    torch.save({"w": torch.cat([start, torch.tensor([46], dtype=torch.uint8)])}, path)
    assert "posix.system" in refusal(path)  # a whole pickle is one, wherever it is


@pytest.mark.parametrize("opcode", [b"\x8d", b"\x8e"])
def test_a_string_that_claims_a_huge_length_takes_no_memory(opcode, tmp_path):
    path = tmp_path / "mine.pth"
    path.write_bytes(b"\x80\x04" + opcode + (1 << 62).to_bytes(8, "little") + b"x.")
    assert refusal(path) == "truncated: it ends too early. Download it again"


def test_a_pickle_too_large_to_be_a_checkpoints_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("r2ncli.weights.pickles.LIMIT", 50)
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.ones(2)}, path)
    assert "its pickle cannot be read (it has" in refusal(path)


def test_a_file_that_torch_wrote_without_checksums_is_accepted(tmp_path):
    path = tmp_path / "weights.pth"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(2)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert "torch.FloatStorage" in check_pickles(path, container(path))
    assert list(load_state_dict(path)) == ["w"]
    (check,) = (c for c in verify_weights(path).checks if c.name == "stored checksums")
    assert (check.status, check.found) == ("not applicable", "the file has none")


def test_a_pickle_that_torch_did_not_write_is_refused(tmp_path):
    path = tmp_path / "mine.pth"
    path.write_bytes(pickle.dumps({"a": [1.0]}))
    assert refusal(path) == "a pickle, but not one that torch.save writes"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_everything_that_state_dicts_need_is_allowed(zipped, tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(1, 1, 4, 4)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    floats = [torch.float64, torch.float16, torch.bfloat16]
    content = {
        "model": network.state_dict(),
        "parameters": dict(network.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "others": [torch.ones(2).to(dtype) for dtype in floats],
        "sparse": torch.ones(2).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "rng": torch.get_rng_state(),
        "shape": torch.Size([1]),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "args": argparse.Namespace(lr=0.1, tags={"a"}, raw=b"x"),
    }
    path = tmp_path / "training.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert set(check_pickles(path, container(path))) <= ALLOWED
    assert len(load_state_dict(path)) == 7


def test_what_is_allowed_is_allowed_by_torch_too():
    from torch._weights_only_unpickler import _get_allowed_globals

    known = {name for name in ALLOWED if not name.startswith("torch.cuda.")}
    assert known - set(_get_allowed_globals()) == {"argparse.Namespace"}


def test_nothing_that_is_allowed_leads_to_python_code():
    for name in ALLOWED:
        assert not name.startswith(("os.", "posix.", "subprocess.", "importlib.", "_pickle."))
    dangerous = {"eval", "exec", "open", "getattr", "__import__", "compile", "setattr", "map"}
    assert not {f"builtins.{name}" for name in dangerous} & ALLOWED
    assert dangerous <= set(dir(builtins))
