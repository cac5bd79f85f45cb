"""A container is recognised by its bytes, and other kinds of files are named."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
from support.checkpoints import error_of

from r2ncli.errors import CheckpointError
from r2ncli.weights.containers import broken_members, container, reading, safetensors_header


def zipped(*names: str) -> bytes:
    """A zip archive with members of these names."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names or ("archive/data.pkl",):
            archive.writestr(name, bytes(2000))
    return content.getvalue()


def safetensors(header: object = None, data: bytes = b"") -> bytes:
    text = json.dumps(header or {}).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (zipped(), "zip"),
        (pickle.dumps({"a": [1]}, protocol=2), "pickle"),
        (pickle.dumps({"a": [1]}, protocol=4), "pickle"),
        (safetensors(), "safetensors"),
    ],
)
def test_containers_are_told_by_their_content(tmp_path: Path, content: bytes, kind: str) -> None:
    for name in ("a.pth", "a.safetensors", "a"):
        (tmp_path / name).write_bytes(content)
        assert container(tmp_path / name) == kind


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html>\n<html>504</html>", "a web page"),
        (b"\xef\xbb\xbf\n <HTML><head>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (gzip.compress(zipped()), "unpack it first"),
        (zipped()[:1000], "truncated"),
        (zipped()[:-30], "truncated"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a checkpoint"),
        (bytes(1000), "not a checkpoint"),
        (b"{}", "not a checkpoint"),
        (b"\x80", "not a checkpoint"),
    ],
)
def test_the_error_for_another_kind_of_file_says_what_it_is(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    text = error_of(container, path)
    assert text.startswith(f"{path}: ")
    assert reason in text


def test_a_folder_or_a_missing_file_is_no_checkpoint(tmp_path: Path) -> None:
    assert error_of(container, tmp_path) == f"{tmp_path}: is a folder, not a checkpoint file"
    text = error_of(container, tmp_path / "a.pth")
    assert text == f"{tmp_path}/a.pth: cannot be read: no such file or directory"


def test_a_folder_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "b.pth").touch()
    (tmp_path / "a.txt").touch()
    assert error_of(container, tmp_path).endswith(
        "is a folder, not a checkpoint file; it contains b.pth"
    )
    (tmp_path / "data.pkl").touch()
    assert "an unpacked one: download the file again" in error_of(container, tmp_path)


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    assert error_of(container, tmp_path / "pipe.pth").endswith("cannot be read: not a regular file")
    with pytest.raises(CheckpointError, match="not a regular file"), reading(Path("/dev/null")):
        pass


def test_a_pickle_of_an_old_protocol_is_recognised_by_its_first_import(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.pth"
    for content in (b"cposix\nsystem\n(S'true'\ntR.", b"(cposix\nsystem\nS'true'\no."):
        path.write_bytes(content)
        assert container(path) == "pickle"
    path.write_bytes(b"(S'true'\niposix\nsystem\n.")  # text, as far as its first bytes go
    assert "text, not a checkpoint: it starts \"(S'true' iposix" in error_of(container, path)


def test_only_a_safetensors_file_has_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(safetensors({"a": {}}, bytes(16)))
    assert safetensors_header(path) == b'{"a": {}}'
    for other in (b"", zipped(), bytes(8) + b"{" * 100, b"\xff" * 8 + b"{", b'{"a": 1}{"b": 2}'):
        path.write_bytes(other)
        assert safetensors_header(path) is None


def test_a_safetensors_file_without_its_end_is_truncated(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    whole = safetensors(header, bytes(16))
    path = tmp_path / "a.safetensors"
    path.write_bytes(whole)
    assert container(path) == "safetensors"
    for cut in (1, 16, 20):
        path.write_bytes(whole[:-cut])
        assert f"truncated: {len(whole) - cut} of a safetensors file's" in error_of(container, path)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a/data.pkl", "a/constants.pkl"], "a TorchScript program"),
        (["a/archive_format", "a/models/model.json"], "a torch.export program"),
        (["config.json", "model.weights.h5"], "a Keras model"),
        (["net/weights.pth", "net/readme.txt"], "with net/weights.pth inside: unpack it first"),
        (["photo.jpg"], "a zip archive, but not one that torch.save writes"),
    ],
)
def test_another_zip_archive_is_recognised_by_its_members(
    tmp_path: Path, names: list[str], reason: str
) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(zipped(*names))
    assert reason in error_of(container, path)


def test_a_zip_archive_with_a_corrupted_directory_is_corrupted(tmp_path: Path) -> None:
    whole = bytearray(zipped())
    whole[whole.index(b"PK\x01\x02")] ^= 1
    path = tmp_path / "a.pth"
    path.write_bytes(whole)
    assert "corrupted: the zip container cannot be listed" in error_of(container, path)


def test_members_that_do_not_match_their_checksum_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(zipped("a/data.pkl", "a/data/0"))
    assert broken_members(path) == (2, [])
    content = bytearray(path.read_bytes())
    content[content.rindex(b"a/data/0", 0, content.index(b"PK\x01\x02")) + 100] ^= 1
    path.write_bytes(content)
    assert broken_members(path) == (2, ["a/data/0"])


def test_an_archive_without_checksums_has_none_to_check(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    content = bytearray(zipped("a/data.pkl"))
    for start in (14, content.index(b"PK\x01\x02") + 16):
        content[start : start + 4] = bytes(4)
    path.write_bytes(content)
    assert broken_members(path) == (0, [])


@pytest.mark.parametrize(
    ("mark", "offset", "byte"),
    [
        (b"PK\x01\x02", 8, 1),  # encrypted
        (b"PK\x01\x02", 10, 99),  # a compression that does not exist
        (b"PK\x01\x02", 42, 200),  # not where the list says
        (b"PK\x03\x04", 30, 0xFF),  # another name in its place
    ],
)
def test_a_member_that_cannot_be_read_counts_as_corrupted(
    tmp_path: Path, mark: bytes, offset: int, byte: int
) -> None:
    content = bytearray(zipped("a/data.pkl"))
    content[content.index(mark) + offset] = byte
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    assert container(path) == "zip"
    assert broken_members(path) == (1, ["a/data.pkl"])
