"""Metadata costs no image, and a file is whole if all data that its pixels need is there."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, features
from support.icc_profiles import PROFILES, in_srgb
from support.image_files import (
    FILES,
    SIDE,
    SMALL,
    decoded,
    encoded,
    error_of,
    heic,
    pattern,
    png_chunk,
    sample,
    tiled_heic,
)

TRUNCATED = "cannot be decoded: image file is truncated"


def with_chunk(new: bytes, before: bytes = b"IDAT") -> bytes:
    content = encoded(sample(), "PNG")
    at = content.index(before) - 4
    return content[:at] + new + content[at:]


# --- metadata -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME", b"gAMA", b"acTL"])
@pytest.mark.parametrize("where", [b"IDAT", b"IEND"])
def test_no_chunk_beside_the_pixels_costs_a_png(kind: bytes, where: bytes) -> None:
    plain = decoded(encoded(sample(), "PNG"))
    large = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2_000_000))
    for body in (b"", b"\xff" * 30, large, b"a\0\0" + zlib.compress(bytes(2_000_000))):
        chunk = png_chunk(kind, body)
        for stored in (chunk, chunk[:-1] + b"?", chunk * 70):
            assert (decoded(with_chunk(stored, where)) == plain).all()


def test_a_chunk_of_an_unknown_kind_is_passed_over() -> None:
    plain = decoded(encoded(sample(), "PNG"))
    assert (decoded(with_chunk(png_chunk(b"s\1IT", b"\0"))) == plain).all()


def test_a_large_profile_of_a_png_is_applied_and_a_broken_one_is_not() -> None:
    profile = PROFILES["display p3"].ljust(1_500_000, b"\0")
    profile = struct.pack(">I", len(profile)) + profile[4:]
    stored = b"p\0\0" + zlib.compress(profile)
    plain = decoded(encoded(sample(), "PNG"))
    ours = decoded(with_chunk(png_chunk(b"iCCP", stored)))
    assert np.abs(ours - in_srgb(plain, "display p3")).max() <= 1
    for broken in (png_chunk(b"iCCP", stored)[:-1] + b"?", png_chunk(b"iCCP", stored[:200])):
        assert (decoded(with_chunk(broken)) == plain).all()


def test_an_orientation_in_any_text_of_a_png_is_applied() -> None:
    xmp = b'<x tiff:Orientation="3"/>'
    exif = (
        "\nexif\n  26\n" + (b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\3\0\0\0\0\0\0").hex()
    )
    turned = decoded(encoded(sample(), "PNG"))[::-1, ::-1]
    for chunk in (
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
        png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(exif.encode())),
    ):
        for where in (b"IDAT", b"IEND"):
            assert (decoded(with_chunk(chunk, where)) == turned).all()


@pytest.mark.filterwarnings("ignore")  # Pillow warns about metadata, which r2n ignores
@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE])
def test_no_segment_of_an_application_costs_a_jpeg(marker: int) -> None:
    content = encoded(sample(), "JPEG", quality=95)
    plain = decoded(content)
    for body in (
        b"",
        b"JFIF\0",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"ICC_PROFILE\0",
        b"ICC_PROFILE\0\1\2" + bytes(50),
        b"Photoshop 3.0\x008BIM",
        b"MPF\0",
        b"FPXR\0",
    ):
        segment = struct.pack(">BBH", 255, marker, 2 + len(body)) + body
        assert (decoded(content[:2] + segment + content[2:]) == plain).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "HEIC"])
def test_broken_exif_xmp_and_profiles_count_as_absent(kind: str) -> None:
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")

    def stored(**options: Any) -> bytes:
        if kind == "HEIC":
            return heic(sample(), **options)
        return encoded(sample(), kind, **options)

    good = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\1\0\0\0\0\0\0"
    plain = decoded(stored())
    content = stored(exif=good, icc_profile=PROFILES["adobe rgb"])
    for found, broken in ((b"MM\0*\0\0\0\x08", b"??\0*\xff\xff\xff\xff"), (b"acsp", b"????")):
        if found in content:
            spoiled = content.replace(found, broken)
            content = spoiled if kind != "PNG" else content
    if kind != "PNG":  # whose profile is compressed; see above
        assert np.abs(decoded(content) - plain).max() <= 1


# --- whole files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"quality": 20}]
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_marker_is_whole(mode: str, options: dict[str, Any]) -> None:
    content = encoded(sample(120, 90, mode), "JPEG", **options)
    assert content.endswith(b"\xff\xd9")
    whole = decoded(content, SMALL)
    trailer = b"\0\0\1\n\x0e\0\0\0Image_UTC_Data" + bytes(range(256)) * 40
    for end in (b"", b"\xff", bytes(4096), trailer):
        assert (decoded(content[:-2] + end, SMALL) == whole).all()
    for cut in (4, 8, 40, 200):
        assert error_of(content[:-cut]) == TRUNCATED
    assert error_of(content[: len(content) * 2 // 3]) == TRUNCATED


def test_a_progressive_jpeg_that_ends_between_two_scans_is_truncated() -> None:
    content = encoded(sample(120, 90), "JPEG", progressive=True)
    scans = [n for n in range(len(content)) if content[n : n + 2] == b"\xff\xda"]
    assert len(scans) > 5
    for scan in scans[1:]:
        assert error_of(content[:scan]) == TRUNCATED


def test_a_tiled_heic_with_all_its_data_is_whole_and_any_other_is_not() -> None:
    rgb = pattern(256, 192)
    content, ends = tiled_heic(rgb)
    plain = decoded(encoded(Image.fromarray(rgb), "PNG"), SMALL)
    assert np.abs(decoded(content, SMALL) - plain).mean() < 3
    assert ends[-1] == len(content)
    for cut in (*ends[:-1], len(content) - 1, len(content) // 2):
        assert error_of(content[:cut]) == TRUNCATED


def test_a_heic_without_all_of_its_opacity_is_truncated() -> None:
    content = heic(sample(mode="RGBA"))
    assert error_of(content[:-1]) == TRUNCATED


@pytest.mark.parametrize("lossless", [True, False])
def test_a_webp_whose_metadata_alone_is_cut_off_is_whole(lossless: bool) -> None:
    if not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    content = encoded(sample(mode="RGBA"), "WEBP", lossless=lossless, xmp=b"<x/>" * 60)
    whole = decoded(content)
    for cut in (1, 100, 240):
        assert (decoded(content[:-cut]) == whole).all()
    for size in (30, len(content) + 100):  # what the file says of its own size
        assert (decoded(content[:4] + struct.pack("<I", size) + content[8:]) == whole).all()
    assert error_of(content[:-300]) == TRUNCATED


def test_a_heic_whose_metadata_alone_is_cut_off_is_whole() -> None:
    content = heic(sample(), xmp=b"<x/>" * 60)
    for cut in (1, 100, 240):
        assert (decoded(content[:-cut]) == decoded(content)).all()
    assert error_of(content[:-250]) == TRUNCATED


def test_a_jpeg_2000_without_its_end_marker_is_whole() -> None:
    if not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    for name in ("jp2", "j2k", "jp2 tiles"):
        content = FILES[name]
        assert content.endswith(b"\xff\xd9")
        assert (decoded(content[:-2]) == decoded(content)).all()
        assert error_of(content[:-3]) == TRUNCATED


def tiff_of_one_strip(compression: int, data: bytes, length: int, **more: int) -> bytes:
    """A TIFF of 32 x 32 pixels whose image data is the end of the file."""
    tags = {256: SIDE, 257: SIDE, 258: 8, 259: compression, 262: 1, 277: 1, 278: SIDE, 279: length}
    tags |= {int(tag[1:]): value for tag, value in more.items()}
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    tags |= {tag: start for tag in (273, 513) if tag == 273 or tag in tags}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


@pytest.mark.parametrize("compression", [1, 8])
def test_a_tiff_without_the_length_of_its_strip_is_whole_until_it_is_cut(compression: int) -> None:
    grey = pattern()[..., 0]
    data = grey.tobytes() if compression == 1 else zlib.compress(grey.tobytes(), 1)
    for length in (0, len(data)):
        content = tiff_of_one_strip(compression, data, length)
        assert (decoded(content) == grey[..., None]).all()
        for cut in (9, len(data) // 2, len(data) - 1):
            assert error_of(content[:-cut])


def test_a_jpeg_of_the_old_style_in_a_tiff_is_whole_until_it_is_cut() -> None:
    jpeg = encoded(sample(mode="L"), "JPEG", quality=95)
    content = tiff_of_one_strip(6, jpeg, len(jpeg), t513=0, t514=len(jpeg))
    assert np.abs(decoded(content) - decoded(jpeg)).max() <= 2
    for cut in (1, 9, len(jpeg) // 2):
        assert error_of(content[:-cut]) == TRUNCATED
