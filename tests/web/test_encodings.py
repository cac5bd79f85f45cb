"""Answers that come compressed although nobody asked for it: undone, within the limits."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.archives import tar_bytes
from support.servers import Server, content, encoded, in_turn
from support.sources import outcome

from r2ncli.sources.selection import Selection
from r2ncli.sources.walk import find_images
from r2ncli.web.unpack import Unpacked, unpacker_of
from r2ncli.weights import download

BODY = os.urandom(3000) + bytes(300_000)


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


PACKED = {
    "gzip": gzip.compress(BODY),
    "x-gzip": gzip.compress(BODY),
    "GZIP": gzip.compress(BODY[:99]) + gzip.compress(BODY[99:]),
    "deflate": zlib.compress(BODY),
    "Deflate": raw_deflate(BODY),
    "identity": BODY,
    "gzip, identity": gzip.compress(BODY),
}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def read(url: str, max_bytes: int = 10**6) -> bytes | str:
    (source,) = find_images([url], print, Selection(timeout=20))
    return outcome(source, max_bytes)


@pytest.mark.parametrize("encoding", PACKED)
def test_an_encoding_is_undone(server: Server, encoding: str) -> None:
    server.answers["/x.jpg"] = encoded(PACKED[encoding], encoding)
    assert read(server.at("/x.jpg")) == BODY
    assert server.headers[0]["Accept-Encoding"] == "identity"


def test_a_plain_file_that_is_called_compressed_is_read_as_it_is(server: Server) -> None:
    for body in (b"\xff\xd8\xff\xe0 an image", b"\xff", b"\x1f", b""):
        server.answers["/x.jpg"] = encoded(body, "gzip")
        assert read(server.at("/x.jpg")) == (body or "empty file")


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_what_comes_out_is_bounded_by_the_limit_of_a_file(
    server: Server, encoding: str, pack: Any
) -> None:
    server.answers["/x.jpg"] = encoded(pack(bytes(50_000_000)), encoding)
    tracemalloc.start()
    try:
        text = read(server.at("/x.jpg"), 1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert text == "larger than the limit of 1,000,000 bytes"


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, br", "br, gzip", "x\x7f"])
def test_an_encoding_that_is_not_undone_is_named(server: Server, encoding: str) -> None:
    server.answers["/x.jpg"] = encoded(b"x", encoding)
    assert "only gzip and deflate are undone" in str(read(server.at("/x.jpg")))
    assert server.asked["/x.jpg"] == 1


def test_an_answer_that_cannot_be_unpacked_is_a_failed_row(server: Server) -> None:
    cut = PACKED["gzip"][:-9]
    flipped = bytearray(PACKED["gzip"])
    flipped[-6] ^= 1
    for body, encoding in ((cut, "gzip"), (bytes(flipped), "gzip"), (b"\xff\xd8", "deflate")):
        server.answers["/x.jpg"] = encoded(body, encoding)
        assert str(read(server.at("/x.jpg"))).startswith("the answer cannot be unpacked (")


def test_a_tar_with_an_encoding_is_read_as_it_comes(server: Server) -> None:
    members = {f"{n}.jpg": os.urandom(3000) for n in range(6)}
    server.answers["/a.tar.gz"] = encoded(gzip.compress(tar_bytes(members)), "gzip")
    found = find_images([server.at("/a.tar.gz")], print)
    assert [outcome(source) for source in found] == list(members.values())


def test_a_download_with_an_encoding_is_whole_and_is_not_continued_in_the_middle(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "FIRST_PAUSE_SECONDS", 0.01)
    name = f"x-{hashlib.sha256(BODY).hexdigest()[:8]}.pth"
    packed = PACKED["gzip"]
    server.answers["/x.pth"] = in_turn(
        content(packed[:2000], claim=len(packed), **{"Content-Encoding": "gzip"}),
        content(
            packed[2000:],
            206,
            **{"Content-Encoding": "gzip", "Content-Range": f"bytes 2000-{len(packed) - 1}/*"},
        ),
        encoded(packed, "gzip"),
    )
    path = download.download_file(server.at("/x.pth"), tmp_path / name)
    assert path.read_bytes() == BODY


# --- streams ------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 16])
def test_streams_that_follow_each_other_are_one_however_they_are_read(pack: Any, size: int) -> None:
    import io

    packed = pack(BODY[:3100]) + pack(b"") + pack(BODY[3100:4100])
    padding = b"" if pack is bz2.compress else bytes(12)
    make = unpacker_of(packed[:6])
    assert make
    stream = Unpacked(io.BytesIO(packed + padding), make)  # type: ignore[arg-type]
    pieces = list(iter(lambda: stream.read(size), b""))
    assert b"".join(pieces) == BODY[:4100]  # type: ignore[arg-type]
    assert all(len(piece or b"") <= size for piece in pieces)
