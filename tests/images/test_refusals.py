"""Work without bounds is refused, and what a decoder lacks is named and not called corrupted."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, features
from support.image_files import (
    FILES,
    decoded,
    encoded,
    error_of,
    heic,
    pattern,
    sample,
    tiff,
    tiled_heic,
)
from support.image_writers import bmp_file, bmp_header, box, jp2_file, tiff_file

from r2ncli.images import jpeg

# --- work -----------------------------------------------------------------------------------


def with_more_scans(content: bytes, count: int) -> bytes:
    """A JPEG whose last scan is repeated."""
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * count + b"\xff\xd9"


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_of_many_scans_of_many_pixels_is_refused(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    content = encoded(sample(64, 48, mode), "JPEG", progressive=True)
    scans = len(jpeg._scans(content).coded)
    many = with_more_scans(content, 30)
    assert len(jpeg._scans(many).coded) == scans + 30
    monkeypatch.setattr(jpeg, "_MOST_WORK", 64 * 48 * (scans + 29))
    assert error_of(many) == f"cannot be decoded: {scans + 30} scans of 64 x 48 pixels, too many"
    monkeypatch.setattr(jpeg, "_MOST_WORK", 64 * 48 * (scans + 30))
    assert decoded(many).any()


def test_scans_of_data_behind_the_image_and_in_its_metadata_are_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jpeg, "_MOST_WORK", 24 * 20 * 20)
    content = FILES["jpeg progressive"]
    segment = b"\xff\xe1\x03\xea" + b"\xff\xda" * 500
    video = b"\xff\xda\0\x0c" * 1000
    assert (decoded(content[:2] + segment + content[2:] + video) == decoded(content)).all()


def test_a_jpeg_of_a_header_of_millions_of_segments_is_refused() -> None:
    content = FILES["jpeg"]
    for filling in (b"\xff\xfe\0\2", b"\0"):
        long = content[:20] + filling * (6_000_000 // len(filling)) + content[20:]
        assert error_of(long) == "cannot be decoded: too many segments before the image data"


def test_no_example_comes_near_the_bound_on_scans() -> None:
    for name, content in FILES.items():
        if "jpeg" in name and content.startswith(b"\xff\xd8"):
            assert len(jpeg._scans(content).coded) <= 10
    assert jpeg._MOST_WORK >= 20 * 200_000_000  # twice what progressive files have at the limit


def test_tiles_that_are_much_larger_than_the_image_are_refused() -> None:
    tags = {256: (4, [8]), 257: (4, [8]), 258: (3, [8]), 259: (3, [8]), 262: (3, [1])}
    tags |= {277: (3, [1]), 322: (4, [16384]), 323: (4, [16384])}
    content = tiff_file([(tags, [zlib.compress(bytes(100))])], "<", False)
    assert "tiles are much larger" in error_of(content)
    whole, _ = tiled_heic(np.tile(pattern(64, 64), (2, 2, 1)))
    at = whole.index(b"ispe") + 8
    huge = whole[:at] + struct.pack(">II", 8192, 8192) + whole[at + 8 :]
    assert "tiles are much larger" in error_of(huge)


def test_a_jpeg_2000_that_promises_millions_of_packets_is_refused() -> None:
    if not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    content = FILES["j2k"]
    layers = content.index(b"\xff\x52") + 6
    many = content[:layers] + b"\xff\xff" + content[layers + 2 :]
    size = content.index(b"\xff\x51") + 6
    tiles = many[: size + 16] + struct.pack(">II", 1, 1) + many[size + 24 :]
    assert error_of(tiles).endswith("packets, too many")


def test_a_gif_whose_first_frame_is_huge_is_refused_before_it_is_allocated() -> None:
    content = bytearray(FILES["gif"])
    at = content.index(b",", 13 + (6 << (content[10] & 7)))  # behind the palette
    content[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    assert error_of(bytes(content)).startswith("65535 x 65535 pixels, more than the limit")


# --- words ----------------------------------------------------------------------------------


def jpeg_of(marker: int, bits: int = 8, height: int | None = None) -> Callable[[], bytes]:
    """A JPEG whose frame says something else."""

    def changed() -> bytes:
        content = bytearray(FILES["jpeg"])
        at = content.index(b"\xff\xc0")
        content[at + 1], content[at + 4] = marker, bits
        if height is not None:
            content[at + 5 : at + 7] = struct.pack(">H", height)
        return bytes(content)

    return changed


def tiff_with(compression: int = 1, photometric: int = 1) -> Callable[[], bytes]:
    def changed() -> bytes:
        content = tiff(pattern()[..., 0], 8, photometric=photometric)
        entry = struct.pack("<HHII", 259, 4, 1, 1)
        return content.replace(entry, struct.pack("<HHII", 259, 4, 1, compression))

    return changed


def bmp_with(compression: int, size: int = 40) -> Callable[[], bytes]:
    header = bmp_header(size, 8, 8, 24, compression, (), 0, 192)
    return lambda: bmp_file(header, b"", bytes(192))


def heic_sequence() -> bytes:
    """A HEIC with a track of images and no still one."""
    start = struct.pack(">I", 20) + b"ftyphevc\0\0\0\0hevc"
    return start + struct.pack(">I", 16) + b"moov" + struct.pack(">I", 8) + b"trak" + bytes(50)


def jp2_of(space: int) -> Callable[[], bytes]:
    colour = box(b"colr", struct.pack(">BBBI", 1, 0, 0, space))
    stream = FILES.get("j2k", b"")
    return lambda: jp2_file(stream, (24, 20), [8], colour)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (jpeg_of(0xC1, bits=12), "JPEG of 12 bits"),
        (jpeg_of(0xC3), "lossless JPEG"),
        (jpeg_of(0xC5), "hierarchical JPEG"),
        (jpeg_of(0xCB), "lossless JPEG"),
        (jpeg_of(0xC0, height=0), "JPEG whose height is declared after its image data"),
        (tiff_with(34887), "TIFF with LERC compression"),
        (tiff_with(50002), "TIFF with JPEG XL compression"),
        (tiff_with(50001), "TIFF with WebP compression"),
        (tiff_with(34712), "TIFF with JPEG 2000 compression"),
        (tiff_with(34661), "TIFF with JBIG compression"),
        (tiff_with(12345), "TIFF with unknown (12345) compression"),
        (tiff_with(photometric=32803), "TIFF of camera raw data"),
        (tiff_with(photometric=32845), "TIFF of LogLuv"),
        (bmp_with(4), "BMP with an embedded JPEG"),
        (bmp_with(5), "BMP with an embedded PNG"),
        (bmp_with(4, 64), "BMP with compression 4 of OS/2"),
        (heic_sequence, "HEIC sequence without a still image"),
        (jp2_of(14), "JPEG 2000 of colour space 14"),
    ],
)
def test_a_sound_file_of_a_kind_that_cannot_be_decoded_is_not_called_corrupted(
    content: Callable[[], bytes], what: str
) -> None:
    expected = f"cannot be decoded: a {what} is not supported by this decoder"
    assert error_of(content()) == expected


def test_a_heif_of_another_codec_is_named() -> None:
    content = heic(Image.new("RGB", (64, 64)))
    reason = error_of(content.replace(b"hvc1", b"j2k1").replace(b"hvcC", b"j2kH"))
    assert reason == (
        "cannot be decoded: a HEIF of images of kind 'j2k1' is not supported by this decoder"
    )
