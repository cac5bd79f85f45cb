"""Images inside archives: the same bytes, whatever holds them, and a row for all damage."""

from __future__ import annotations

import bz2
import gc
import gzip
import io
import lzma
import os
import struct
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.archives import tar_bytes, zip_bytes
from support.sources import outcome

import r2ncli
from r2ncli.sources import archives
from r2ncli.sources import walk as walking
from r2ncli.sources.archives import Budget
from r2ncli.sources.content import stamp_of
from r2ncli.sources.selection import Selection
from r2ncli.sources.walk import Input, Walk, find_images

RANDOM = np.random.default_rng(0)
PICTURES = {f"{n}.jpg": RANDOM.bytes(700 + 300 * n) for n in range(5)}

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".tar": bytes,
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
}
COMPRESSED = [suffix for suffix in COMPRESSORS if suffix != ".tar"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, and no file left open by a test."""
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir("/dev/fd"))
    yield tmp_path
    if sorted(os.listdir("/dev/fd")) != before:
        gc.collect()  # which takes long beside the objects of torch
    assert sorted(os.listdir("/dev/fd")) == before


def write(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    return name


def found(*paths: str, max_bytes: int = 10**9) -> list[Input]:
    return list(find_images(paths or ["."], print, Selection(max_bytes=max_bytes)))


def outcomes(*paths: str, max_bytes: int = 10**9) -> dict[str, bytes | str]:
    """What each input gives: its bytes, or why there are none."""
    return {source.name: outcome(source, max_bytes) for source in found(*paths)}


def within(archive: str, members: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{archive}!{name}": content for name, content in members.items()}


# --- what is whole ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_gives_its_members_in_stored_order(suffix: str, format: int) -> None:
    members = dict(reversed(PICTURES.items()))
    name = write("a" + suffix, COMPRESSORS[suffix](tar_bytes(members, format)))
    assert outcomes(name) == within(name, members)
    assert [source.name for source in found(name)] == list(within(name, members))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_gives_its_members_in_stored_order(method: int) -> None:
    members = dict(reversed(PICTURES.items()))
    write("a.ZIP", zip_bytes(members, method))
    assert outcomes("a.ZIP") == within("a.ZIP", members)
    assert [source.name for source in found("a.ZIP")] == list(within("a.ZIP", members))


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_the_content_says_how_a_tar_is_compressed_and_not_its_name(suffix: str) -> None:
    write("a.tar", COMPRESSORS[suffix](tar_bytes(PICTURES)))
    assert outcomes("a.tar") == within("a.tar", PICTURES)
    write("b" + suffix, tar_bytes(PICTURES))
    assert outcomes("b" + suffix) == within("b" + suffix, PICTURES)


def test_a_gz_of_several_parts_is_read_to_its_end() -> None:
    plain = tar_bytes(PICTURES)
    write("a.tar.gz", b"".join(gzip.compress(plain[n : n + 999]) for n in range(0, 99999, 999)))
    assert outcomes("a.tar.gz") == within("a.tar.gz", PICTURES)


@pytest.mark.parametrize("suffix", [*COMPRESSORS, ".zip"])
def test_a_leading_dot_slash_is_dropped_and_other_names_stay(suffix: str) -> None:
    names = ["./a.jpg", "././b.jpg", ".//c.jpg", "/d.jpg", "../e.jpg", "x/./f.jpg", "x//g.jpg"]
    members = dict.fromkeys(names, b"x")
    make = zip_bytes if suffix == ".zip" else tar_bytes
    write("a" + suffix, COMPRESSORS.get(suffix, bytes)(make(members)))
    assert [source.name for source in found("a" + suffix)] == [
        f"a{suffix}!{name}"
        for name in ("a.jpg", "b.jpg", "c.jpg", "/d.jpg", "../e.jpg", "x/./f.jpg", "x//g.jpg")
    ]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
def test_a_shard_of_webdataset_gives_its_images_alone(suffix: str) -> None:
    members = {
        f"{n:06d}.{kind}": f"{n}{kind}".encode()
        for n in range(4)
        for kind in ("jpg", "json", "cls")
    }
    make = zip_bytes if suffix == ".zip" else tar_bytes
    name = write("train-000" + suffix, COMPRESSORS.get(suffix, bytes)(make(members)))
    pictures = {key: value for key, value in members.items() if key.endswith("jpg")}
    assert outcomes(name) == within(name, pictures)


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_hidden_members_and_macosx_are_skipped(suffix: str) -> None:
    hidden = [".a.jpg", "x/._b.jpg", "__MACOSX/x/c.jpg", ".git/d.jpg", "x/.y/e.jpg"]
    members = dict.fromkeys([*hidden, "x/f.jpg"], b"x")
    write("a" + suffix, (zip_bytes if suffix == ".zip" else tar_bytes)(members))
    assert outcomes("a" + suffix) == {f"a{suffix}!x/f.jpg": b"x"}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
def test_folders_among_the_members_are_no_rows(suffix: str) -> None:
    os.makedirs("top/x.jpg")
    Path("top/x.jpg/a.jpg").write_bytes(b"x")
    if suffix == ".zip":
        with zipfile.ZipFile("a.zip", "w") as archive:
            archive.write("top/x.jpg")
            archive.write("top/x.jpg/a.jpg")
    else:
        with tarfile.open("a" + suffix, "w:gz" if suffix == ".tar.gz" else "w") as tar:
            tar.add("top")
    assert outcomes("a" + suffix) == {f"a{suffix}!top/x.jpg/a.jpg": b"x"}


@pytest.mark.parametrize("suffix", [".tar", ".tar.xz"])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_that_are_no_utf8_are_whole(suffix: str, format: int) -> None:
    long = "/".join(["d" * 90] * 6) + "/é.jpg"
    odd = os.fsdecode(b"caf\xe9/\\x41.jpg")
    write("a" + suffix, COMPRESSORS[suffix](tar_bytes({long: b"1", odd: b"2"}, format)))
    assert outcomes("a" + suffix) == {
        f"a{suffix}!{long}": b"1",
        f"a{suffix}!caf\\xe9/\\x5cx41.jpg": b"2",
    }


def test_names_in_a_zip_are_utf8_even_where_its_maker_forgot_to_say_so() -> None:
    plain = zip_bytes({"caf__.jpg": b"x", "r__sum_.jpg": b"y"})
    plain = plain.replace(b"caf__", "café".encode()).replace(b"r__sum_", b"r\x82_sum_")
    write("a.zip", plain)
    assert list(outcomes("a.zip").values()) == [b"x", b"y"]
    assert list(outcomes("a.zip")) == ["a.zip!café.jpg", "a.zip!r\\x82_sum_.jpg"]
    write("b.zip", zip_bytes({"日本.jpg": b"z"}))
    assert outcomes("b.zip") == {"b.zip!日本.jpg": b"z"}


def test_a_zip_with_something_before_it_is_read() -> None:
    write("a.zip", b"#!/bin/sh\n" * 50 + zip_bytes(PICTURES))
    assert outcomes("a.zip") == within("a.zip", PICTURES)


@pytest.mark.parametrize("suffix", [*COMPRESSORS, ".zip"])
def test_an_empty_archive_has_no_rows(suffix: str) -> None:
    make = zip_bytes if suffix == ".zip" else tar_bytes
    write("a" + suffix, COMPRESSORS.get(suffix, bytes)(make({})))
    assert outcomes("a" + suffix) == {}


def test_archives_within_a_folder_are_not_opened() -> None:
    os.mkdir("top")
    write("top/a.tar", tar_bytes(PICTURES))
    write("top/b.jpg", b"x")
    assert outcomes("top") == {"top/b.jpg": b"x"}
    assert len(outcomes("top/a.tar")) == 5


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
def test_an_empty_member_is_empty_and_one_at_max_bytes_is_whole(suffix: str) -> None:
    make = zip_bytes if suffix == ".zip" else tar_bytes
    name = write("a" + suffix, COMPRESSORS.get(suffix, bytes)(make({"a.jpg": b"", "b.jpg": b"12"})))
    assert outcomes(name, max_bytes=2) == within(name, {"a.jpg": b"", "b.jpg": b"12"})
    assert "larger than the limit of 1 bytes" in outcomes(name, max_bytes=1)[f"{name}!b.jpg"]


# --- what has no bytes of its own ---------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_links_devices_and_sparse_files_in_a_tar_are_failed_rows(suffix: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind in {
            "soft.jpg": tarfile.SYMTYPE,
            "hard.jpg": tarfile.LNKTYPE,
            "device.jpg": tarfile.CHRTYPE,
            "pipe.jpg": tarfile.FIFOTYPE,
        }.items():
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "z.jpg" if "r" not in kind.decode() else ""
            archive.addfile(info)
        info = tarfile.TarInfo("sparse.jpg")
        info.size = 512
        archive.addfile(info, io.BytesIO(b"s" * 512))
        info = tarfile.TarInfo("z.jpg")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"z"))
    plain = bytearray(buffer.getvalue())
    at = plain.index(b"sparse.jpg")
    plain[at + 156 : at + 157] = tarfile.GNUTYPE_SPARSE
    plain[at + 386 : at + 410] = b"%011o\0%011o\0" % (512, 512)  # its one piece, after a hole
    plain[at + 483 : at + 495] = b"%011o\0" % 1024
    plain[at + 148 : at + 156] = b"%06o\0 " % (sum(plain[at : at + 512]) - sum(plain[at + 148 : at + 156]) + 256)  # fmt: skip # noqa: E501
    name = write("a" + suffix, COMPRESSORS[suffix](bytes(plain)))
    assert outcomes(name) == {
        f"{name}!soft.jpg": "a link inside the archive: not followed",
        f"{name}!hard.jpg": "a link inside the archive: not followed",
        f"{name}!device.jpg": "not a regular file",
        f"{name}!pipe.jpg": "not a regular file",
        f"{name}!sparse.jpg": "not a regular file",
        f"{name}!z.jpg": b"z",
    }


# --- what is no archive, or cannot be opened ----------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("content", [b"", b"x", b"\xff\xd8" * 600, b"<html>" * 900, b"\x1f\x8b"])
def test_what_is_no_tar_is_one_failed_row(suffix: str, content: bytes) -> None:
    name = write("a" + suffix, content)
    assert outcomes(name) == {name: "not a tar archive, or its beginning is corrupted"}


@pytest.mark.parametrize("content", [b"", b"x", b"PK\3\4" * 300, b"\0" * 9999])
def test_what_is_no_zip_is_one_failed_row(content: bytes) -> None:
    name = write("a.zip", content)
    assert outcomes(name) == {name: "not a zip archive, or cut off"}


def test_a_pipe_named_like_an_archive_is_a_failed_row_and_does_not_hang() -> None:
    for name in ("a.tar", "a.zip"):
        os.mkfifo(name)
        assert outcomes(name) == {name: "cannot be read: not a regular file"}


def test_an_archive_that_is_gone_or_unreadable_is_a_failed_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = write("a.tar", tar_bytes(PICTURES))
    inputs = find_images([name], print)
    os.remove(name)
    assert [outcome(source) for source in inputs] == ["cannot be read: no such file or directory"]
    write(name, tar_bytes(PICTURES))
    rows = found(name)
    os.remove(name)
    assert {outcome(source) for source in rows} == {"cannot be read: no such file or directory"}

    write("b.zip", zip_bytes(PICTURES))
    real = os.open

    def refusing(path: str, *more: object) -> int:
        if path == "b.zip":
            raise PermissionError(13, "Permission denied", path)
        return real(path, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refusing)
    assert outcomes("b.zip") == {"b.zip": "cannot be read: permission denied"}


# --- damage: tar --------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize(
    ("beyond", "whole"),
    [
        (100, 2),  # inside the header of the third
        (512 + 400, 2),  # inside its data
        (0, 2),  # before it: no end mark
    ],
)
def test_a_tar_that_is_cut_off_keeps_what_is_whole_and_says_so(
    suffix: str, beyond: int, whole: int
) -> None:
    plain = tar_bytes(PICTURES)
    cut = plain[: plain.index(b"2.jpg\0") + beyond]
    name = write("a" + suffix, COMPRESSORS[suffix](cut))
    rows = outcomes(name)
    expected = within(name, dict(list(PICTURES.items())[:whole]))
    assert {key: rows.pop(key) for key in expected} == expected
    assert rows.pop(f"{name}!2.jpg", "ends before") == (
        "the archive ends before this member does"
        if f"{name}!2.jpg" in outcomes(name)
        else "ends before"
    )
    assert list(rows) == [name]
    assert str(rows[name]).startswith("cannot be read beyond member ")
    assert str(rows[name]).endswith(": it is cut off")


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("damage", [b"\xff", b"\0" * 512])
def test_a_corrupted_header_in_the_middle_is_a_failed_row_and_no_quiet_end(
    suffix: str, damage: bytes
) -> None:
    plain = bytearray(tar_bytes(PICTURES))
    at = plain.index(b"3.jpg\0")
    plain[at : at + len(damage)] = damage
    name = write("a" + suffix, COMPRESSORS[suffix](bytes(plain)))
    rows = outcomes(name)
    assert list(rows) == [f"{name}!{n}.jpg" for n in range(3)] + [name]
    what = "a corrupted header" if damage == b"\xff" else "more follows after its end mark"
    assert rows[name] == f"cannot be read beyond member 3: {what}"


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_second_tar_behind_the_first_is_not_lost_quietly(suffix: str) -> None:
    both = tar_bytes({"a.jpg": b"x"}) + tar_bytes({"b.jpg": b"y"})
    name = write("a" + suffix, COMPRESSORS[suffix](both))
    assert outcomes(name) == {
        f"{name}!a.jpg": b"x",
        name: "cannot be read beyond member 1: more follows after its end mark",
    }


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_compressed_tar_that_is_cut_off_says_so(suffix: str, share: float) -> None:
    whole = COMPRESSORS[suffix](tar_bytes(PICTURES))
    name = write("a" + suffix, whole[: int(len(whole) * share)])
    rows = outcomes(name)
    *read, last = rows
    assert last == name
    assert "cannot be read beyond" in str(rows[name]) or "beginning is corrupted" in str(rows[name])
    assert all(rows[key] == within(name, PICTURES)[key] for key in read)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.bz2", ".tar.xz"])
def test_a_flipped_byte_in_a_compressed_tar_is_seen_wherever_it_is(suffix: str) -> None:
    whole = COMPRESSORS[suffix](tar_bytes(PICTURES))
    for at in range(12, len(whole), 97):  # behind the time in the header of a gz
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        name = write("a" + suffix, bytes(damaged))
        assert name in outcomes(name), f"byte {at}"


def test_a_size_below_zero_does_not_send_the_reader_back() -> None:
    plain = bytearray(tar_bytes({"a.jpg": b"x" * 600, "b.jpg": b"y"}))
    for at, size in ((0, -1), (0, -512), (0, 1 << 70), (1536, -2048)):
        damaged = plain.copy()
        encoded = (size % (1 << 88)).to_bytes(11, "big")
        damaged[at + 124 : at + 136] = (b"\xff" if size < 0 else b"\x80") + encoded
        header = damaged[at : at + 148] + b" " * 8 + damaged[at + 156 : at + 512]
        damaged[at + 148 : at + 156] = b"%06o\0 " % sum(header)
        for suffix in (".tar", ".tar.gz"):
            name = write("a" + suffix, COMPRESSORS[suffix](bytes(damaged)))
            assert name in outcomes(name, max_bytes=10**6)
    pax = tar_bytes({"n" * 200: b"x"}, tarfile.PAX_FORMAT)
    name = write("p.tar", pax.replace(b" path=" + b"n" * 10, b" size=-51200000"[:16].ljust(16)))
    assert name in outcomes(name)


def test_a_long_name_that_claims_gigabytes_is_not_held() -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 1 << 33
    name = write("a.tar", info.tobuf() + bytes(9999))
    assert outcomes(name) == {name: "not a tar archive, or its beginning is corrupted"}


@pytest.mark.slow
def test_no_damage_to_a_tar_or_a_zip_is_more_than_failed_rows() -> None:
    random = np.random.default_rng(1)
    wholes = {
        "a.tar": tar_bytes({"d" * 120 + ".jpg": b"1", **PICTURES}),
        "p.tar": tar_bytes({"é" * 90 + ".jpg": b"1", **PICTURES}, tarfile.PAX_FORMAT),
        "z.zip": zip_bytes(PICTURES),
        "g.tar.gz": gzip.compress(tar_bytes(PICTURES)),
    }
    for name, whole in wholes.items():
        for _ in range(1500):
            damaged = bytearray(whole)
            for at in random.integers(0, len(damaged), random.integers(1, 8)):
                damaged[at] = random.integers(0, 256)
            start = random.integers(0, len(damaged))
            if random.random() < 0.3:
                del damaged[start : start + int(random.integers(1, 2000))]
            write(name, bytes(damaged))
            outcomes(name, max_bytes=10**6)  # raises nothing, and ends


# --- damage: zip --------------------------------------------------------------------------


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_wrong_checksum_in_a_zip_is_a_failed_row_of_that_member(method: int) -> None:
    whole = bytearray(zip_bytes({"a.jpg": b"abc" * 400, "b.jpg": b"y"}, method))
    end = whole.index(b"PK\1\2")
    whole[end + 16] ^= 1  # the directory's checksum of the first
    write("a.zip", bytes(whole))
    assert outcomes("a.zip") == {
        "a.zip!a.jpg": "cannot be read from the archive: its checksum does not match",
        "a.zip!b.jpg": b"y",
    }


def test_flipped_bytes_in_a_zip_never_give_other_bytes() -> None:
    whole = zip_bytes(PICTURES)
    expected = within("a.zip", PICTURES)
    for at in range(0, whole.index(b"PK\1\2"), 61):
        damaged = bytearray(whole)
        damaged[at] ^= 0x20
        write("a.zip", bytes(damaged))
        for name, got in outcomes("a.zip").items():
            assert got == expected[name] or isinstance(got, str)


def test_an_encrypted_member_of_a_zip_is_a_failed_row() -> None:
    whole = bytearray(zip_bytes({"a.jpg": b"x"}))
    whole[6] |= 1
    whole[whole.index(b"PK\1\2") + 8] |= 1
    write("a.zip", bytes(whole))
    assert outcomes("a.zip") == {"a.zip!a.jpg": "encrypted inside the archive"}


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_that_cannot_be_read_piece_by_piece_is_a_failed_row(method: int) -> None:
    write("a.zip", zip_bytes({"a.jpg": bytes(10**6)}, method))
    (reason,) = outcomes("a.zip").values()
    assert str(reason).endswith("inside the archive: only deflate is read")


def lying_zip(real: bytes, declared: int) -> bytes:
    whole = bytearray(zip_bytes({"a.jpg": real}))
    for at in (22, whole.index(b"PK\1\2") + 24):
        whole[at : at + 4] = struct.pack("<I", declared)
    return bytes(whole)


def test_a_zip_bomb_is_bounded_by_max_bytes_whatever_its_header_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tracemalloc

    bomb = bytes(50_000_000)
    for declared in (50_000_000, 1000):
        write("a.zip", lying_zip(bomb, declared))
        tracemalloc.start()
        try:
            (reason,) = outcomes("a.zip", max_bytes=1_000_000).values()
            assert tracemalloc.get_traced_memory()[1] < 10_000_000
        finally:
            tracemalloc.stop()
        assert reason == (
            "larger than the limit of 1,000,000 bytes"
            if declared > 1000
            else "cannot be read from the archive: its checksum does not match"
        )
    write("a.zip", lying_zip(b"x" * 5000, 4_000_000_000))  # and the other way round
    (got,) = outcomes("a.zip", max_bytes=10_000).values()
    assert got == b"x" * 5000 or isinstance(got, str)


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_tar_bomb_is_not_held(suffix: str) -> None:
    import tracemalloc

    name = write(
        "a" + suffix, COMPRESSORS[suffix](tar_bytes({"a.jpg": bytes(40_000_000), "b.jpg": b"y"}))
    )
    tracemalloc.start()
    try:
        rows = {
            s.name: outcome(s, 1000) for s in find_images([name], print, Selection(max_bytes=1000))
        }
        assert tracemalloc.get_traced_memory()[1] < 15_000_000
    finally:
        tracemalloc.stop()
    assert rows == {
        f"{name}!a.jpg": "40,000,000 bytes, larger than the limit of 1,000 bytes",
        f"{name}!b.jpg": b"y",
    }


# --- what changes meanwhile ---------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
@pytest.mark.parametrize("how", ["replaced", "cut", "rewritten"])
def test_an_archive_that_changes_while_it_is_read_gives_failed_rows(suffix: str, how: str) -> None:
    make = zip_bytes if suffix == ".zip" else tar_bytes
    name = write("a" + suffix, make(PICTURES))
    rows = found(name)
    assert rows[0].read(10**9).content == PICTURES["0.jpg"]
    if how == "replaced":
        write("new", make(dict(reversed(PICTURES.items()))))
        os.replace("new", name)
    elif how == "cut":
        os.truncate(name, 3000)
    else:
        write(name, make(dict(reversed(PICTURES.items()))))
        os.utime(name, ns=(1, 1))
    assert {outcome(source) for source in rows} == {"the archive changed while it was read"}


def test_a_compressed_tar_that_is_cut_while_it_is_read_is_a_failed_row() -> None:
    noise = {f"{n}.jpg": RANDOM.bytes(300_000) for n in range(20)}
    name = write("a.tar.gz", gzip.compress(tar_bytes(noise), 1))
    rows = find_images([name], print)
    assert next(rows).read(10**9).content == noise["0.jpg"]
    os.truncate(name, 2_000_000)
    *_, last = rows
    assert last.name == name
    assert str(outcome(last)).endswith("it is cut off")


# --- threads, memory, descriptors ---------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_threads_that_read_one_archive_at_a_time_get_the_right_bytes(suffix: str) -> None:
    members = {f"{n}.jpg": RANDOM.bytes(20_000 + n) for n in range(60)}
    name = write("a" + suffix, (zip_bytes if suffix == ".zip" else tar_bytes)(members))
    expected = within(name, members)
    with ThreadPoolExecutor(8) as pool:
        rows = found(name) * 5
        contents = pool.map(outcome, rows)
        assert all(c == expected[row.name] for c, row in zip(contents, rows, strict=True))


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_no_archive_stays_open_while_names_wait(suffix: str) -> None:
    make = zip_bytes if suffix == ".zip" else tar_bytes
    names = [write(f"{n}{suffix}", make(PICTURES)) for n in range(50)]
    before = len(os.listdir("/dev/fd"))
    rows = found(*names)
    assert len(os.listdir("/dev/fd")) == before
    assert len(rows) == 250
    assert {outcome(source) for source in rows} == set(PICTURES.values())
    assert len(os.listdir("/dev/fd")) == before


@pytest.fixture
def watched_budget(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were held after each take."""
    held: list[int] = []
    take = Budget.take

    def watched(budget: Budget, count: int) -> None:
        take(budget, count)
        held.append(budget._held)

    monkeypatch.setattr(Budget, "take", watched)
    return held


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("size", [1, 50_000, 120_000, 250_000])
@pytest.mark.slow
def test_a_compressed_tar_far_beyond_the_budget_goes_through_without_a_deadlock(
    monkeypatch: pytest.MonkeyPatch,
    tiny_weights: Path,
    watched_budget: list[int],
    batch_size: int,
    size: int,
) -> None:
    """Also where a batch is more than may be held, and where one image is."""
    monkeypatch.setattr(walking, "BYTES_AHEAD", 200_000)
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "JPEG")
    picture = buffer.getvalue()
    padded = picture + bytes(max(0, size - len(picture)))
    write("a.tar.gz", gzip.compress(tar_bytes({f"{n:03d}.jpg": padded for n in range(40)})))
    rows = list(r2ncli.classify("a.tar.gz", weights=tiny_weights, batch_size=batch_size, workers=2))
    assert [row.path for row in rows] == [f"a.tar.gz!{n:03d}.jpg" for n in range(40)]
    assert {row.error for row in rows} == {None}
    assert len(watched_budget) == 40
    assert max(watched_budget) <= max(200_000, len(padded))


def test_a_run_over_a_compressed_tar_resumes(
    monkeypatch: pytest.MonkeyPatch, tiny_weights: Path, pictures: Path
) -> None:
    """Nobody reads what is done already, and nothing of it is held."""
    members = {path.name: path.read_bytes() + bytes(5000) for path in sorted(pictures.iterdir())}
    write("a.tar.gz", gzip.compress(tar_bytes(members)))
    monkeypatch.setattr(walking, "BYTES_AHEAD", 9000)

    def stop(progress: r2ncli.Progress) -> None:
        if progress.done >= 11:
            raise ZeroDivisionError

    options = {"weights": tiny_weights, "batch_size": 4}
    r2ncli.classify_to("whole.csv", "a.tar.gz", **options)
    with pytest.raises(ZeroDivisionError):
        r2ncli.classify_to("x.csv", "a.tar.gz", on_progress=stop, **options)
    r2ncli.classify_to("x.csv", "a.tar.gz", resume=True, **options)
    assert Path("x.csv").read_bytes() == Path("whole.csv").read_bytes()
    r2ncli.classify_to("x.csv", "a.tar.gz", resume=True, **options)  # nothing left to do


def test_who_waits_for_room_stops_when_the_walk_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "BYTES_AHEAD", 1500)
    write("a.tar.gz", gzip.compress(tar_bytes(PICTURES)))
    with Walk(["a.tar.gz"], print) as walk:
        kept = [next(iter(walk))]
        time.sleep(0.05)
        assert walk.found <= 2
    assert "r2n-walk" not in {thread.name for thread in threading.enumerate()}
    assert kept[0].read(10**9).content == PICTURES["0.jpg"]


def test_names_that_look_like_archives_are_said_by_their_suffix() -> None:
    for name in ("a.tar", "A.TAR", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tbz2", "a.tar.xz", "a.zip"):
        assert archives.is_archive(name)
    for name in ("a.gz", "tar", "a.tar.jpg", "a.7z", "a.tar.zst", "zip"):
        assert not archives.is_archive(name)


def test_an_image_of_another_shard_holds_back_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for ever: any two of them are more than may be held."""
    monkeypatch.setattr(walking, "BYTES_AHEAD", 1500)
    members = {f"{number}.jpg": bytes(1000) for number in range(12)}
    Path("a.tar.gz").write_bytes(gzip.compress(tar_bytes(members)))
    found = []
    for index in (1, 2, 3):
        with Walk(["a.tar.gz"], print, Selection(shard=(index, 3))) as walk:
            for source in walk:
                found.append(source.name)
                del source
    assert sorted(found) == sorted(f"a.tar.gz!{name}" for name in members)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
def test_a_member_carries_the_size_and_time_of_its_archive(suffix: str) -> None:
    content = zip_bytes(PICTURES) if suffix == ".zip" else tar_bytes(PICTURES)
    name = write("a" + suffix, gzip.compress(content) if suffix == ".tar.gz" else content)
    os.utime(name, ns=(5, 1234567891))
    for source in find_images([f"./{name}"], print):
        assert source.path == f"./{name}"
        assert source.read(10**9).stamp == (os.path.getsize(name), 1234567891)
        assert source.read(10**9).stamp == stamp_of(source.path)
