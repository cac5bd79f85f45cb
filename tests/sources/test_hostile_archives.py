"""Archives that mean harm: small files that would cost minutes, or gigabytes, to read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from support.archives import tar_bytes, tar_header, zip_bytes
from support.sources import outcome

from r2ncli.sources import archives
from r2ncli.sources.selection import Selection
from r2ncli.sources.walk import find_images
from r2ncli.web import unpack

IMAGE = tar_bytes({"z.jpg": b"z"})
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".tar.gz": lambda content: gzip.compress(content, 9),
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
}
MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("here")


def outcomes(name: str, content: bytes, max_bytes: int = 10**6) -> dict[str, bytes | str]:
    """What each input in an archive gives; in little memory."""
    Path(name).write_bytes(content)
    tracemalloc.start()
    try:
        found = find_images([name], print, Selection(max_bytes=max_bytes))
        rows = {source.name: outcome(source, max_bytes) for source in found}
        assert tracemalloc.get_traced_memory()[1] < 30 * MIB
    finally:
        tracemalloc.stop()
    return rows


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of bytes that came out of each decompressor, piece by piece."""
    read = unpack.Unpacked.readinto
    pieces: list[int] = []

    def counted(self: unpack.Unpacked, buffer: memoryview) -> int:
        pieces.append(read(self, buffer))
        return pieces[-1]

    monkeypatch.setattr(unpack.Unpacked, "readinto", counted)
    return pieces


# --- sparse files -------------------------------------------------------------------------


def pax(records: dict[str, str], after: bytes) -> bytes:
    """A pax header with these records, before the header `after`."""
    lines = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        size = len(body) + len(str(len(body) + 3))
        size = len(body) + len(str(size))
        lines += str(size).encode() + body
    padded = lines + bytes(-len(lines) % 512)
    return tar_header("p", len(lines), tarfile.XHDTYPE) + padded + after


def sparse_of_old_gnu(blocks: int) -> bytes:
    """A sparse file whose map goes on over so many blocks."""
    header = bytearray(tar_header("s.jpg", 0, tarfile.GNUTYPE_SPARSE))
    header[482] = 1
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    piece = (b"%011o\0%011o\0" % (512, 0)) * 21
    more = (piece + b"\1" + bytes(7)) * (blocks - 1) + piece + bytes(8)
    return bytes(header) + more


SPARSE = {
    "0.0": pax({"GNU.sparse.size": "9", "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "9"}, b""),
    "0.1": pax({"GNU.sparse.map": "0,1," * 200_000 + "0,1", "GNU.sparse.size": "9"}, b""),
    "1.0": pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, b""),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_the_map_of_a_sparse_file_in_pax_headers_is_not_built(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"9999999999\n" + b"0\n1\n" * 50_000  # what 1.0 has before the content
    member = tar_header("s.jpg", len(data)) + data + bytes(-len(data) % 512)
    rows = outcomes("a.tar", SPARSE[kind] + member + IMAGE)
    assert rows == {"a.tar!s.jpg": "not a regular file", "a.tar!z.jpg": b"z"}


def test_the_map_of_a_sparse_file_of_old_gnu_is_passed_over() -> None:
    rows = outcomes("a.tar", sparse_of_old_gnu(50) + IMAGE)
    assert rows == {"a.tar!s.jpg": "not a regular file", "a.tar!z.jpg": b"z"}


def test_the_map_of_a_sparse_file_without_end_is_a_corrupted_header(work: list[int]) -> None:
    endless = gzip.compress(IMAGE[:1024] + sparse_of_old_gnu(200_000))
    assert len(endless) < 400_000
    rows = outcomes("a.tar.gz", endless)
    assert rows == {
        "a.tar.gz!z.jpg": b"z",
        "a.tar.gz": "cannot be read beyond member 1: a corrupted header (the map of a sparse file "
        "is too long)",
    }
    assert sum(work) < 4 * MIB


# --- headers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["-512", "-1", "9" * 30, "1e9", "+5", "", "0x10", "5\0", "\u0665"]
)
def test_a_size_in_a_pax_header_that_is_no_plain_number_is_a_corrupted_header(value: str) -> None:
    content = IMAGE[:1024] + pax({"size": value}, tar_header("s.jpg", 5) + bytes(512))
    rows = outcomes("a.tar", content)
    assert rows["a.tar"] == "cannot be read beyond member 1: a corrupted header"


@pytest.mark.parametrize(
    "record",
    [b"99999 a=b\n", b"5 ab\n", b"x a=b\n", b"0 a=b\n", b"-5 a=b\n", b"7 a=bc", b"8a=bcdef"],
)
def test_a_malformed_record_of_a_pax_header_is_a_corrupted_header(record: bytes) -> None:
    header = tar_header("p", len(record), tarfile.XHDTYPE) + record + bytes(-len(record) % 512)
    rows = outcomes("a.tar", IMAGE[:1024] + header + IMAGE)
    assert rows["a.tar"] == "cannot be read beyond member 1: a corrupted header"


@pytest.mark.parametrize("type", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_of_gigabytes_or_without_end_are_corrupted(type: bytes, work: list[int]) -> None:
    large = IMAGE[:1024] + tar_header("p", 5 << 30, type) + bytes(50 * MIB)
    many = IMAGE[:1024] + (tar_header("p", 0, type)) * 100_000
    for content in (large, many):
        rows = outcomes("a.tar.gz", gzip.compress(content))
        assert str(rows["a.tar.gz"]).startswith("cannot be read beyond member 1: a corrupted head")
    assert sum(work) < 4 * MIB


def test_records_for_all_members_are_kept_and_those_for_one_are_not() -> None:
    shared = tar_header("g", 0, tarfile.XGLTYPE)
    content = shared + pax({"path": "long.jpg"}, IMAGE[:1024]) + IMAGE
    assert outcomes("a.tar", content) == {"a.tar!long.jpg": b"z", "a.tar!z.jpg": b"z"}


# --- bombs --------------------------------------------------------------------------------


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the bytes that may be skipped few, so that a small bomb is one."""
    monkeypatch.setattr(archives, "SKIPPED_BYTES", MIB // 4)


BOMBS = {
    "before the first member": bytes(16 * MIB),
    "in a member that is not read": tar_header("x.txt", 16 * MIB) + bytes(16 * MIB),
    "in a hidden member": tar_header(".x.jpg", 16 * MIB) + bytes(16 * MIB),
    "in an image above the limit": tar_header("x.jpg", 16 * MIB) + bytes(16 * MIB),
    "behind the end": IMAGE + bytes(16 * MIB),
    "in empty members": tar_header("x.txt", 0) * (16 * MIB // 512),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("place", BOMBS)
@pytest.mark.usefixtures("little")
@pytest.mark.slow
def test_a_bomb_is_not_read_to_its_end(place: str, suffix: str, work: list[int]) -> None:
    name = f"a{suffix}"
    rows = outcomes(name, COMPRESSORS[suffix](BOMBS[place]))
    assert "that are no image to read came out of" in str(rows[name])
    assert sum(work) < 15 * MIB


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.usefixtures("little")
def test_what_compresses_well_beside_images_is_no_bomb(suffix: str) -> None:
    line = '{"caption": "a red bicycle", "number": %d}\n'
    members = {
        f"{n:06d}.json": "".join(line % (n * m) for m in range(20, 40)).encode()
        for n in range(1500)
    }
    name = f"a{suffix}"
    content = COMPRESSORS[suffix](tar_bytes({**members, "z.jpg": b"z"}))
    assert len(content) < 2 * MIB / 6
    assert outcomes(name, content) == {f"{name}!z.jpg": b"z"}


def test_the_memory_that_an_xz_file_asks_for_is_bounded() -> None:
    packed = lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16}])
    at = packed.index(b"\x21\x01") + 2  # the size of the dictionary, and the header's checksum
    changed = bytearray(packed)
    changed[at] = 36
    size = (changed[12] + 1) * 4
    changed[12 + size - 4 : 12 + size] = struct.pack("<I", zlib.crc32(changed[12 : 12 + size - 4]))
    rows = outcomes("a.tar.xz", bytes(changed))
    assert rows == {"a.tar.xz": "not a tar archive, or its beginning is corrupted"}


# --- zip ----------------------------------------------------------------------------------


def overlapping_zip(count: int) -> bytes:
    """A zip whose members all are the same bytes."""
    whole = zip_bytes({"a.jpg": bytes(900_000)})
    end = whole.index(b"PK\1\2")
    entry = whole[end : whole.index(b"PK\5\6")]
    entries = b"".join(entry[:46] + b"%c.jpg" % (97 + n) + entry[51:] for n in range(count))
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(entries), end, 0)
    return whole[:end] + entries + tail


def test_members_of_a_zip_that_overlap_are_refused() -> None:
    rows = outcomes("a.zip", overlapping_zip(20))
    assert len(rows) == 20
    assert set(rows.values()) == {"it overlaps another member of the archive"}
    assert outcomes("b.zip", overlapping_zip(1)) == {"b.zip!a.jpg": bytes(900_000)}


def test_members_side_by_side_do_not_overlap_even_where_the_directory_has_another_order() -> None:
    whole = zip_bytes({f"{n}.jpg": b"x" * n for n in range(5)}, zipfile.ZIP_STORED)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        listed = archive.infolist()
    assert archives._overlapping(listed[::-1]) == set()


def test_a_member_that_says_it_is_too_large_is_not_decompressed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("a.zip").write_bytes(zip_bytes({"a.jpg": bytes(5000)}))
    (source,) = find_images(["a.zip"], print)
    monkeypatch.setattr(zipfile, "ZipExtFile", None)
    assert outcome(source, 4999) == "larger than the limit of 4,999 bytes"
