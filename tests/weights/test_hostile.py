"""A checkpoint that means harm is refused, in little time and memory, and its tensor is named."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import pickles as p
from support.checkpoints import error_of, saved
from support.networks import TINY_ARCHITECTURE

from r2ncli.errors import CheckpointError
from r2ncli.model import Res2Net
from r2ncli.weights.checkpoints import open_checkpoint
from r2ncli.weights.loading import load_checkpoint, load_state_dict, load_tensors
from r2ncli.weights.opcodes import requests
from r2ncli.weights.structure import guess_architecture
from r2ncli.weights.verify import verify_weights

AFFINE = p.name("torch", "per_tensor_affine")


def refusal(content: bytes, path: Path) -> str:
    """Why a file with this content is refused, by everything that loads it."""
    path.write_bytes(content)
    text = error_of(load_state_dict, path)
    found = verify_weights(path)
    assert not found.ok
    assert text.removeprefix(f"{path}: ") in {check.found for check in found.failures}
    assert len(text) < 600
    return text.removeprefix(f"{path}: ")


def of_tensor(opcodes: bytes) -> bytes:
    """A pickle of a state dict with one tensor, called a."""
    return p.pickled(p.dict_of(p.text("a"), opcodes))


def test_the_plain_tensor_that_the_others_are_variants_of_loads(tmp_path: Path) -> None:
    values = struct.pack("<16f", *range(16))
    for number, content in enumerate(
        (
            p.zipped(of_tensor(p.tensor(2, 3, stride=(4, 1), offset=1)), {"0": values}),
            p.legacy(of_tensor(p.tensor(2, 3, stride=(4, 1), offset=1)), {"0": (16, values)}),
        )
    ):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(content)
        assert load_tensors(path)["a"].tolist() == [[1, 2, 3], [5, 6, 7]]
    loaded = torch.load(tmp_path / "0.pth", weights_only=True)["a"]
    assert torch.equal(loaded, load_tensors(tmp_path / "0.pth")["a"])


# --- tensors that are not within their storage ----------------------------------------

OUTSIDE = {
    "one element repeated": (p.tensor(2_500_000_000, stride=(0,)), "2,500,000,000 elements"),
    "more elements than 64 bits": (p.tensor(2**62, stride=(0,)), "more elements than any file"),
    "a product beyond 64 bits": (
        p.tensor(2**40, 2**40, stride=(0, 0)), "more elements than any file"
    ),
    "a negative size": (p.tensor(-4), "is negative"),
    "a negative stride": (p.tensor(4, stride=(-1,)), "is negative"),
    "a negative offset": (p.tensor(4, offset=-1), "is negative"),
    "an offset beyond the storage": (p.tensor(4, offset=13), "a storage of 17 elements"),
    "a stride beyond the storage": (p.tensor(2, stride=(2**40,)), "its storage has 16"),
    "a number of 2,000 digits": (p.tensor(10**200), "more elements than any file"),
    "fewer strides than sizes": (p.tensor(2, 2, stride=(1,)), "2 dimensions and 1 strides"),
    "a hundred dimensions": (p.tensor(*[1] * 100), "100 dimensions"),
    "no elements of an absurd shape": (
        p.tensor(0, 2**62, 2**62, stride=(1, 1, 1)), "more elements than any file"
    ),
    "a storage larger than the file": (
        p.tensor(100_000, of=p.storage(count=100_000)), "claims 400,000 bytes, and has 64"
    ),
    "a storage of absurd size": (p.tensor(1, of=p.storage(count=2**60)), "more elements than any"),
    "a storage of negative size": (p.tensor(1, of=p.storage(count=-1)), "something other than a"),
    "a storage that is not there": (p.tensor(1, of=p.storage(key="9")), "is not in the file"),
    "a storage outside the archive's folder": (
        p.tensor(1, of=p.storage(key="../version", count=1)), "is not in the file"
    ),
    "a wider dtype than the storage has": (
        p.tensor(16, of=p.storage("DoubleStorage")), "claims 128 bytes, and has 64"
    ),
    "a quantised tensor beyond its storage": (
        p.quantised(2, stride=(2**40,), quantizer=p.tuple_of(AFFINE, p.real(1.0), p.number(0))),
        "its storage has 16",
    ),
    "an infinite scale": (
        p.quantised(
            4, stride=(1,), quantizer=p.tuple_of(AFFINE, p.real(float("inf")), p.number(0))
        ),
        "is not sound or not supported",
    ),
    "an axis beyond the shape": (
        p.quantised(
            4, stride=(1,),
            quantizer=p.tuple_of(
                p.name("torch", "per_channel_affine"), p.tensor(4), p.tensor(4), p.number(9)
            ),
        ),
        "is not sound or not supported",
    ),
    "fewer scales than channels": (
        p.quantised(
            4, stride=(1,),
            quantizer=p.tuple_of(
                p.name("torch", "per_channel_affine"), p.tensor(2), p.tensor(4), p.number(0)
            ),
        ),
        "is not sound or not supported",
    ),
    "a sparse tensor that is dense in memory": (
        p.sparse(
            "sparse_coo",
            p.tensor(1, 1, stride=(1, 1), of=p.storage("LongStorage", count=8)),
            p.tensor(1),
            p.shape_of(10**10),
        ),
        "the tensors claim 40,000,000,000 bytes",
    ),
    "a sparse tensor with an index outside": (
        p.sparse("sparse_coo", p.tensor(1, 1, stride=(1, 1), of=p.storage("LongStorage", "1", 1)),
                 p.tensor(1), p.shape_of(4)),
        "'a'",
    ),
    "compressed rows that are none": (
        p.sparse("sparse_csr", *[p.tensor(2, of=p.storage("LongStorage", "1", 2))] * 2,
                 p.tensor(2), p.shape_of(1, 10**9)),
        "the tensors claim 4,000,000,000 bytes",
    ),
    "block-sparse rows that are none": (
        p.sparse("sparse_bsr", *[p.tensor(2, of=p.storage("LongStorage", "1", 2))] * 2,
                 p.tensor(2), p.shape_of(1, 4)),
        "'a'",
    ),
    "a conjugated view": (
        p.tensor(2, of=p.storage("ComplexFloatStorage", count=8),
                 more=p.dict_of(p.text("conj"), b"\x88")),
        "conjugated or negated",
    ),
    "a negated view": (
        p.tensor(2, more=p.dict_of(p.text("neg"), b"\x88")), "conjugated or negated"
    ),
    "hooks": (p.tensor(2, hooks=p.ordered_dict(p.number(1), p.number(2))), "it has hooks"),
    "an absurd tensor without values": (
        p.call(p.name("torch._utils", "_rebuild_meta_tensor_no_storage"),
               p.name("torch", "float32"), p.shape_of(2**62), p.shape_of(1), b"\x89"),
        "more elements than any file",
    ),
    "a replaced method of a parameter": (
        p.call(p.name("torch._utils", "_rebuild_parameter_with_state"), p.tensor(2), b"\x89",
               p.ordered_dict(), p.dict_of(p.text("detach"), p.number(1))),
        "it would replace 'detach' of a Parameter",
    ),
    "replaced hooks of a parameter": (
        p.call(p.name("torch._utils", "_rebuild_parameter_with_state"), p.tensor(2), b"\x89",
               p.ordered_dict(), p.dict_of(p.text("_backward_hooks"), p.number(1))),
        "it would replace '_backward_hooks' of a Parameter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize(("opcodes", "reason"), OUTSIDE.values(), ids=OUTSIDE)
def test_a_tensor_that_is_not_within_its_storage_is_refused_by_its_name(
    opcodes: bytes, reason: str, container: str, tmp_path: Path
) -> None:
    content = of_tensor(opcodes)
    longs = struct.pack("<2q", 7, 9)
    if container == "zip":
        file = p.zipped(content, {"0": bytes(64), "1": longs})
    elif reason in ("claims 400,000 bytes, and has 64", "claims 128 bytes, and has 64"):
        pytest.skip("its storages have their counts twice, which the next test is about")
    else:
        kind = "LongStorage" if b"torch\nLongStorage" in content else "FloatStorage"
        storages = {"0": (16, bytes(64))} if b"FloatStorage" in content else {}
        if b"ComplexFloatStorage" in content:
            storages = {"0": (8, bytes(64))}
        elif b"QUInt8" in content:
            storages = {"0": (16, bytes(16))}
        elif kind == "LongStorage" and b"X\x01\x00\x00\x001" in content:
            storages["1"] = (2, longs)
        elif kind == "LongStorage":
            pytest.skip("two dtypes of one storage")
        elif b"../version" in content or b"X\x01\x00\x00\x009" in content:
            storages = {}
        file = p.legacy(content, storages)
    found = refusal(file, tmp_path / "mine.pth")
    # in the format before zip, a storage has one dtype
    assert reason in found or (container == "legacy" and "its storage claims" in found)
    assert "the tensor" in found or "storage" in found


@pytest.mark.parametrize("count", [17, 2**40, 2**61, 2**64 - 1])
def test_a_storage_of_the_format_before_zip_that_is_larger_than_the_file_is_truncated(
    count: int, tmp_path: Path
) -> None:
    content = p.legacy(of_tensor(p.tensor(4)), {"0": (count, bytes(64))})
    assert refusal(content, tmp_path / "old.pth").startswith("truncated")


def test_many_tensors_that_share_a_storage_take_no_more_memory_than_the_file(
    tmp_path: Path,
) -> None:
    size = 1 << 20
    one = p.tensor(size, of=p.storage(count=size))
    entries = b"".join(p.text(f"t{number}") + one for number in range(40))
    content = p.zipped(p.pickled(p.dict_of(entries)), {"0": bytes(4 * size)})
    assert "the tensors claim" in refusal(content, tmp_path / "shared.pth")


def test_tied_weights_still_load(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    path = saved({"a": weight, "b": weight, "c": weight.T, "d": weight[1:]}, tmp_path / "tied.pth")
    loaded = load_tensors(path)
    assert torch.equal(loaded["c"], weight.T)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


# --- what a pickle may do ---------------------------------------------------------------


def nested(opcodes: bytes, depth: int) -> bytes:
    return b"N" + opcodes * depth


ORDERED = p.ordered_dict(p.text("a"), p.tensor(4))
BAD_PICKLES = {
    "a deep tuple": (p.dict_of(p.text("x"), nested(p.TUPLE1, 20_000)), "containers deep"),
    "a deep tuple as a key": (p.dict_of(nested(p.TUPLE1, 20_000), p.number(1)), "deep"),
    "deep lists": (p.EMPTY_LIST * 20_000 + p.APPEND * 19_999, "containers deep"),
    "a list that holds itself": (p.EMPTY_LIST + p.put(0) + p.get(0) + p.APPEND, "holds itself"),
    "a dict that holds itself": (
        p.EMPTY_DICT + p.put(0) + p.text("state_dict") + p.get(0) + p.SETITEM, "holds itself"
    ),
    "lists that hold each other": (
        p.EMPTY_LIST + p.put(0) + p.EMPTY_LIST + p.put(1) + p.get(0) + p.APPEND
        + p.APPEND + p.get(1) + p.get(0) + p.APPEND,
        "holds itself",
    ),
    "lists that hold the one before twice": (
        p.EMPTY_LIST + b"".join(
            p.put(i) + p.EMPTY_LIST + p.get(i) + p.APPEND + p.get(i) + p.APPEND for i in range(60)
        ),
        "containers deep",
    ),
    "a replaced method of a dict": (
        p.ordered_dict() + p.dict_of(p.text("get"), p.number(1)) + p.BUILD, "the attribute 'get'"
    ),
    "another replaced method": (
        ORDERED + p.dict_of(p.text("items"), p.number(1)) + p.BUILD, "the attribute 'items'"
    ),
    "a replaced class": (
        ORDERED + p.dict_of(p.text("__class__"), p.name("torch", "Tensor")) + p.BUILD,
        "the attribute '__class__'",
    ),
    "a state that is no dict": (ORDERED + p.text("abc") + p.BUILD, "the attribute 'abc'"),
    "attributes of a tensor": (
        p.tensor(4) + p.dict_of(p.text("grad"), p.number(1)) + p.BUILD, "of a Tensor"
    ),
    "a class of options with another class": (
        p.name("argparse", "Namespace") + p.EMPTY_TUPLE + b"\x81"
        + p.dict_of(p.text("__class__"), p.number(1)) + p.BUILD,
        "the attribute '__class__'",
    ),
    "an entry of a tensor": (p.tensor(4) + p.text("k") + p.number(1) + p.SETITEM, "of a Tensor"),
    "an element for a dict": (p.EMPTY_DICT + p.number(1) + p.APPEND, "it appends to a dict"),
    "an empty tensor of any size": (
        p.call(p.name("torch", "Tensor"), p.number(10**10)), "it would call torch.Tensor"
    ),
    "an empty storage of any size": (
        p.call(p.name("torch.storage", "UntypedStorage"), p.number(10**11)), "it would call torch."
    ),
    "a slow codec": (
        p.call(p.name("_codecs", "encode"), p.text("a" * 100_000), p.text("idna")),
        "it would call _codecs.encode",
    ),
    "a tensor from nothing": (
        p.call(p.name("torch._utils", "_rebuild_tensor_v2")), "what describes no tensor"
    ),
    "a call of a number": (p.number(1) + p.EMPTY_TUPLE + p.REDUCE, "it would call a int"),
    "a string of four gigabytes": (b"X\xff\xff\xff\xffabc", "truncated"),
    "a number of two gigabytes": (b"\x8b\xff\xff\xff\x7fabc", "truncated"),
    "a string of many gigabytes": (b"\x8d" + struct.pack("<Q", 1 << 62) + b"abc", "truncated"),
    "a memo without this number": (p.get(5), "cannot be read"),
    "nothing on the stack": (p.APPEND, "cannot be read"),
    "a mark that is not there": (b"t", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("container", [p.zipped, p.legacy])
@pytest.mark.parametrize(("opcodes", "reason"), BAD_PICKLES.values(), ids=BAD_PICKLES)
def test_a_pickle_that_is_no_state_dicts_is_refused(
    opcodes: bytes, reason: str, container: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    content = container(p.pickled(opcodes))
    assert reason in refusal(content, tmp_path / "mine.pth")


COPIES = (
    p.EMPTY_LIST + b"("
    + b"".join(p.EMPTY_LIST + b"(" + p.text("k") + b"Ne" for _ in range(1000))
    + b"e" + p.put(0)
    + (p.name("collections", "OrderedDict") + p.get(0) + p.TUPLE1 + p.REDUCE + b"0") * 100 + b"N"
)  # fmt: skip


@pytest.mark.parametrize("opcodes", [b"N" * 30_000, COPIES], ids=["many", "much work each"])
def test_a_pickle_of_more_work_than_any_checkpoint_is_refused(opcodes: bytes) -> None:
    found = requests(io.BytesIO(p.pickled(opcodes)), 20_000)
    assert found.unfit == "its pickle has more than 2,000,000 opcodes"
    assert found.opcodes < 30_000


KEYS = {
    "NaN": p.real(float("nan")),
    "a huge number": b"\x8b" + struct.pack("<I", 1_000_000) + b"\x7f" * 1_000_000,
    "a tuple": p.tuple_of(p.text("a"), p.text("b")),
    "a tensor": p.tensor(4),
    "None": b"N",
    "bytes": p.call(p.name("_codecs", "encode"), p.text("a"), p.text("latin1")),
    "a list": p.EMPTY_LIST,
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_tensor_under_a_key_that_is_no_name_is_no_tensor_of_a_state_dict(
    key: bytes, tmp_path: Path
) -> None:
    content = p.zipped(p.pickled(p.dict_of(key, p.tensor(4))))
    assert refusal(content, tmp_path / "keys.pth").startswith("holds no state dict (its keys: ")


def test_control_characters_and_surrogates_in_a_tensors_name_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "names.pth"
    path.write_bytes(p.zipped(of_tensor(p.tensor(4)).replace(p.text("a"), p.text("\x1b]\ud800"))))
    assert list(load_tensors(path)) == [r"\x1b]\xed\xa0\x80"]
    assert all(check.describe().isprintable() for check in verify_weights(path).checks)


def test_a_name_of_a_megabyte_is_refused_and_not_printed(tmp_path: Path) -> None:
    content = p.zipped(of_tensor(p.tensor(4)).replace(p.text("a"), p.text("a" * 1_000_000)))
    assert "a name of 1,000,000 characters" in refusal(content, tmp_path / "long.pth")


def test_an_imported_name_of_a_megabyte_is_not_printed_whole(tmp_path: Path) -> None:
    content = p.zipped(p.pickled(p.name("a" * 1_000_000, "b")))
    assert "it would import aaa" in refusal(content, tmp_path / "long.pth")


def test_more_tensors_than_any_network_has_are_refused(tmp_path: Path) -> None:
    entries = b"".join(p.text(f"{number:x}") + p.get(0) for number in range(60_000))
    content = p.pickled(p.tensor(4) + p.put(0) + b"0" + p.dict_of(entries))
    assert "has 60,000 tensors" in refusal(p.zipped(content), tmp_path / "many.pth")


def test_a_training_checkpoint_with_everything_usual_in_it_loads(tmp_path: Path) -> None:
    network = Res2Net(TINY_ARCHITECTURE)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    content = {
        "state_dict": network.state_dict(),
        "parameters": dict(network.named_parameters()),
        "optimizers": [optimizer.state_dict()],
        "schedules": [{"base_lrs": schedule.base_lrs}],
        "loss": [0.5 / (step + 1) for step in range(20_000)],
        "settings": {"a": {"b": {"c": [{"d": (1, 2.5, None, True, 10**30, b"x")}]}}},
        "counts": OrderedDict(a=torch.Size([1]), b=torch.device("cpu"), c=torch.float16),
    }
    for zipped in (True, False):
        path = tmp_path / f"training{zipped}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        loaded = load_tensors(path)
        assert all(torch.equal(loaded[k], v) for k, v in network.state_dict().items())
        assert verify_weights(path).failures == ()


# --- containers -------------------------------------------------------------------------


def changed_zip(tmp_path: Path, change: str) -> bytes:
    """A sound zip container with one lie in it."""
    path = tmp_path / "sound.pth"
    saved({"w": torch.ones(64), "v": torch.zeros(64)}, path)
    content = bytearray(path.read_bytes())
    entries = [at for at in range(len(content)) if content[at : at + 4] == b"PK\1\2"]
    of_names = {bytes(content[at + 46 : at + 46 + content[at + 28]]): at for at in entries}
    first, second = of_names[b"sound/data/0"], of_names[b"sound/data/1"]
    if change == "size":
        struct.pack_into("<II", content, first + 20, 1 << 30, 1 << 30)
    elif change == "two sizes":
        struct.pack_into("<I", content, first + 24, 1 << 30)
    elif change == "overlap":
        struct.pack_into("<II", content, first + 20, 400, 400)
    elif change == "same place":
        content[second + 42 : second + 46] = content[first + 42 : first + 46]
    elif change == "beyond":
        struct.pack_into("<I", content, first + 42, 1 << 30)
    elif change == "encrypted":
        content[first + 8] |= 1
    elif change == "directory":
        end = content.rindex(b"PK\5\6")
        struct.pack_into("<I", content, end + 12, 1 << 30)
        struct.pack_into("<Q", content, content.rindex(b"PK\6\6") + 40, 1 << 40)
    elif change == "prefix":
        content[:0] = content[:1000]
    return bytes(content)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("size", "claims 1,073,741,824 bytes, more than the file has"),
        ("two sizes", "has two sizes"),
        ("overlap", "overlap"),
        ("same place", "has another name or method"),
        ("beyond", "is not where the archive's directory says"),
        ("encrypted", "is encrypted, which torch.save never does"),
        ("directory", "its directory is not where the archive says"),
        ("prefix", "its directory is not where the archive says"),
    ],
)
def test_a_zip_container_with_a_lie_in_it_is_refused(
    change: str, reason: str, tmp_path: Path
) -> None:
    assert reason in refusal(changed_zip(tmp_path, change), tmp_path / "lie.pth")


def test_two_members_of_the_same_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    saved({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("weights/data/0", bytes(8))
    assert "two members with the name 'weights/data/0'" in refusal(path.read_bytes(), path)


def test_a_compressed_storage_is_refused(tmp_path: Path) -> None:
    content = p.zipped(of_tensor(p.tensor(4)), {"0": bytes(10**8)}, zipfile.ZIP_DEFLATED)
    assert "is compressed, which torch.save never does" in refusal(content, tmp_path / "small.pth")


def test_a_directory_of_a_million_members_is_refused_unread(tmp_path: Path) -> None:
    entry = b"PK\1\2" + bytes(42)
    directory = entry * 200_000
    end = b"PK\5\6" + bytes(8) + struct.pack("<II", len(directory), 4) + bytes(2)
    path = tmp_path / "members.pth"
    path.write_bytes(b"PK\3\4" + directory + end)
    assert "its directory has 9,200,000 bytes, larger than the limit" in error_of(
        load_state_dict, path
    )


def header_of(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


def described(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "another dtype": (header_of(a=described("F64")), "'a' of 4 float64 elements has 16 bytes"),
    "an unknown dtype": (header_of(a=described("F4")), "'a' in its header has no known dtype"),
    "a dtype that is no text": (
        header_of(a=described(["F32"])),
        "'a' in its header has no known dtype",
    ),
    "a negative size": (header_of(a=described(shape=(-4,))), "is negative"),
    "a fraction": (header_of(a=described(shape=(4.0,))), "whole numbers"),
    "a truth value": (header_of(a=described(shape=(True, 4))), "whole numbers"),
    "a product beyond 64 bits": (header_of(a=described(shape=(2**33, 2**33))), "more elements"),
    "a shape that is no list": (header_of(a=described(shape=4)), "no known dtype"),
    "offsets in reverse": (
        header_of(a=described(offsets=(16, 0))),
        "its offsets are no place in the file",
    ),
    "three offsets": (header_of(a=described(offsets=(0, 8, 16))), "no known dtype"),
    "overlapping tensors": (
        header_of(a=described(), b=described(offsets=(0, 16))),
        "overlap others or follow a gap",
    ),
    "a gap": (
        header_of(
            a=described(shape=(2,), offsets=(0, 8)), b=described(shape=(1,), offsets=(12, 16))
        ),
        "overlap others or follow a gap",
    ),
    "bytes behind the last tensor": (
        header_of(a=described(shape=(2,), offsets=(0, 8))),
        "its tensors end after",
    ),
    "a key twice": (b'{"a": 1, "a": 2}', "a key of its header is there twice"),
    "deep JSON": (b'{"a":' * 100_000, "corrupted"),
    "a number of 5,000 digits": (b'{"a": ' + b"1" * 5000 + b"}", "invalid JSON"),
    "notes that are no text": (b'{"__metadata__": {"a": 1}}', "not an object of strings"),
    "no JSON": (b"{" + b"\xff" * 100, "corrupted"),
}


@pytest.mark.parametrize(("header", "reason"), HEADERS.values(), ids=HEADERS)
def test_a_safetensors_header_that_does_not_describe_the_file_is_refused(
    header: bytes, reason: str, tmp_path: Path
) -> None:
    assert reason in refusal(p.safetensors(header, bytes(16)), tmp_path / "mine.safetensors")


def test_a_safetensors_file_with_an_empty_header_is_refused(tmp_path: Path) -> None:
    content = bytes(8) + b'{"a": 1}'
    assert "its header is empty" in refusal(content, tmp_path / "mine.safetensors")


def test_a_large_safetensors_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(p.safetensors(b'{"a": [' + b"[]," * 4_000_000 + b"[]]}"))
    assert "header has 12,000,011 bytes, larger than the limit" in error_of(load_state_dict, path)
    assert "larger than the limit" in error_of(open_checkpoint, path)


# --- metadata ---------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return saved(Res2Net(TINY_ARCHITECTURE).eval().state_dict(), tmp_path / "tiny.pth")


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (b'{"a": "' + b"x" * 9_000_000 + b'"}', "has more than 8,000,000 bytes"),
        (b'{"a": ' * 500 + b"1" + b"}" * 500, "nested more than 32 deep"),
        (b'{"a": ' * 100_000, "is not JSON"),
        (b'{"labels": ["' + b"x" * 2000 + b'"]}', "has 2,000 characters"),
        (b'{"preprocessing": {"image_size": 4096, "resize_size": 4096}}', "its largest layer"),
        (b'{"preprocessing": {"image_size": 64, "resize_size": 2000}}', "16 times image_size"),
        (b'{"preprocessing": {"resize_size": ' + b"9" * 4000 + b"}}", "more than a million pixels"),
        (b'{"preprocessing": {"std": [1e-300, 1, 1]}}', "std from 0.0001"),
        (b'{"preprocessing": {"mean": [1e300, 1, 1]}}', "mean from -1000"),
        (b'{"preprocessing": {"mean": ' + b"[" * 30 + b"]" * 30 + b"}}", "finite numbers"),
    ],
)
def test_metadata_that_asks_for_too_much_is_refused(
    metadata: bytes, reason: str, tiny: Path
) -> None:
    tiny.with_suffix(".json").write_bytes(metadata)
    text = error_of(load_checkpoint, tiny)
    assert reason in text
    assert len(text) < 600


def test_a_pipe_or_a_device_beside_a_checkpoint_is_no_metadata(tiny: Path) -> None:
    os.mkfifo(tiny.with_suffix(".json"))
    tiny.with_name("tiny.pth.json").symlink_to("/dev/zero")
    assert open_checkpoint(tiny).metadata == {}


def test_a_checkpoint_with_the_longest_possible_name_has_no_metadata(tiny: Path) -> None:
    path = tiny.rename(tiny.with_name("t" * 251 + ".pth"))
    assert open_checkpoint(path).metadata == {}


def test_a_network_far_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    state_dict = {
        f"layer{stage}.{block}.{part}": torch.zeros(4, 1, 1, 1)
        for stage in range(1, 5)
        for block in range(200)
        for part in ("conv3.weight", "bns.0.weight")
    }
    state_dict["conv1.weight"] = torch.zeros(1, 3, 7, 7)
    state_dict |= {
        f"layer1.0.convs.{split}.weight": torch.zeros(4, 4, 3, 3) for split in range(200)
    }
    assert guess_architecture(state_dict) is None
    with pytest.raises(CheckpointError, match="expected the tensors of a Res2Net"):
        load_checkpoint(saved(state_dict, tmp_path / "deep.pth"))


# --- memory -------------------------------------------------------------------------------

BOUNDED = """
import os, resource, sys, torch, safetensors.torch
from pathlib import Path
from r2ncli.weights.loading import load_state_dict
from r2ncli.errors import CheckpointError
for name in sys.argv[1:]:
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, name
        continue
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = used + 4 * os.path.getsize(name) + 500_000_000
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        load_state_dict(Path(name))
    except CheckpointError as error:
        print(str(error)[:300])
        sys.stdout.flush()
        os._exit(0)
    os._exit(1)
"""
HEAVY: dict[str, Callable[[], bytes]] = {
    "millions of lists": lambda: p.zipped(p.pickled(b"]" * 1_900_000)),
    "millions of dicts": lambda: p.zipped(p.pickled(b"}" * 1_900_000)),
    "millions of sets": lambda: p.zipped(p.pickled(b"\x8f" * 1_900_000)),
    "millions of memos": lambda: p.zipped(
        p.pickled(b"N", *(p.put(number) for number in range(1_900_000)))
    ),
    "a header of lists": lambda: p.safetensors(b'{"a": [' + b"[]," * 2_600_000 + b"[]]}"),
    "a header of objects": lambda: p.safetensors(b'{"a": [' + b"{}," * 2_600_000 + b"{}]}"),
    "a directory of members": lambda: (
        b"PK\3\4"
        + (b"PK\1\2" + bytes(24) + b"\1" + bytes(17) + b"a") * 160_000
        + b"PK\5\6"
        + bytes(8)
        + struct.pack("<II", 47 * 160_000, 4)
        + bytes(2)
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_made_to_fill_the_memory_take_little_of_it(tmp_path: Path) -> None:
    for number, make in enumerate(HEAVY.values()):
        (tmp_path / f"{number}.pth").write_bytes(make())
    paths = sorted(tmp_path.glob("*.pth"))
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [line.partition(": ")[2] for line in done.stdout.splitlines()]
    assert len(found) == len(HEAVY)
    assert not any("memory" in reason.lower() for reason in found), found


# --- what is sound still loads ------------------------------------------------------------


def quantised_tensors() -> dict[str, torch.Tensor]:
    values = torch.linspace(-1, 1, 12).reshape(3, 4)
    scales, zeros = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2])
    return {
        "tensor": torch.quantize_per_tensor(values, 0.1, 10, torch.quint8),
        "signed": torch.quantize_per_tensor(values, 0.05, -3, torch.qint8),
        "channels": torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8),
    }


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_quantised_sparse_and_unusual_tensors_load_as_torch_loads_them(
    zipped: bool, tmp_path: Path
) -> None:
    values = torch.tensor([[0.0, 1.5], [2.5, 0.0]])
    content = {
        **quantised_tensors(),
        "coo": values.to_sparse(),
        "csr": values.to_sparse_csr(),
        "csc": values.to_sparse_csc(),
        "bsr": torch.eye(4).to_sparse_bsr((2, 2)),
        "bsc": torch.eye(4).to_sparse_bsc((2, 2)),
        "meta": torch.empty(3, 4, device="meta"),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "transposed": values.T,
        "part": torch.arange(20)[3:9:2],
        "parameter": torch.nn.Parameter(values),
        "complex": torch.complex(values, values),
        "flags": torch.tensor([True, False]),
        **{str(dtype): torch.ones(3).to(dtype) for dtype in (
            torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32,
            torch.uint8, torch.complex128,
        )},
    }  # fmt: skip
    if zipped:  # torch.load cannot read these in the format before zip
        content |= {str(dtype): torch.ones(3).to(dtype) for dtype in (
            torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
        )}  # fmt: skip
    path = tmp_path / "unusual.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    theirs, ours = torch.load(path, weights_only=True), load_tensors(path)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        other = theirs[name].detach()
        assert (tensor.dtype, tensor.shape, tensor.layout) == (
            other.dtype,
            other.shape,
            other.layout,
        )
        assert tensor.is_meta == other.is_meta
        if tensor.is_quantized:
            assert torch.equal(tensor.int_repr(), other.int_repr())
            assert torch.equal(tensor.dequantize(), other.dequantize())
        elif not tensor.is_meta:
            dense = [part.to_dense().contiguous().reshape(-1) for part in (tensor, other)]
            assert dense[0].view(torch.uint8).equal(dense[1].view(torch.uint8))


def test_a_big_endian_checkpoint_loads(tmp_path: Path) -> None:
    values = struct.pack(">16f", *range(16))
    content = p.zipped(of_tensor(p.tensor(3, offset=2)), {"0": values})
    path = tmp_path / "big.pth"
    path.write_bytes(content.replace(b"little", b"big"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", of_tensor(p.tensor(3, offset=2)))
        archive.writestr("archive/byteorder", "big")
        archive.writestr("archive/data/0", values)
    assert load_tensors(path)["a"].tolist() == [2, 3, 4]


def test_every_dtype_of_safetensors_loads_as_its_library_loads_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    content = {
        str(dtype): torch.ones(2, 3).to(dtype)
        for dtype in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
            torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.uint32,
            torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
        )
    }  # fmt: skip
    content |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 2)}
    path = tmp_path / "all.safetensors"
    save_file(content, path)
    ours, theirs = load_tensors(path), load_file(path)
    assert list(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
        both = [part.reshape(-1).view(torch.uint8) for part in (tensor, theirs[name])]
        assert torch.equal(*both)
