"""Every depth, mode and transparency becomes eight bits of RGB."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, features
from support.image_files import (
    EVERY_16_BITS,
    SIDE,
    decoded,
    encoded,
    error_of,
    on_white,
    pattern,
    png,
    png_chunk,
    sample,
    tiff,
)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_a_lossless_image_gives_its_own_pixels(mode: str) -> None:
    image = sample(mode=mode)
    assert (decoded(encoded(image, "PNG")) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(mode: str) -> None:
    image = sample(mode=mode)
    ours = decoded(encoded(image, "PNG"))
    assert np.abs(ours - on_white(image)).max() <= 1
    assert (ours[:, -1] == 255).all()  # wholly transparent there
    assert (ours[:, 0] == np.asarray(image.convert("RGBA"))[:, 0, :3]).all()


def test_the_colour_of_transparent_pixels_is_not_seen() -> None:
    clear = np.zeros((SIDE, SIDE, 4), np.uint8)
    clear[..., 0] = 200
    assert (decoded(encoded(Image.fromarray(clear), "PNG")) == 255).all()


def test_a_transparent_palette_entry_is_white() -> None:
    indices = np.tile(np.arange(SIDE, dtype=np.uint8) % 4, (SIDE, 1))
    image = Image.fromarray(indices)
    image = image.convert("P")
    image.putdata(indices.reshape(-1).tolist())
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    expected = np.array([[10, 20, 30], [255, 255, 255], [70, 80, 90], [100, 110, 120]])
    for kind in ("PNG", "GIF"):
        assert (decoded(encoded(image, kind, transparency=1))[0, :4] == expected).all()
    half = encoded(image, "PNG", transparency=bytes([255, 255, 0, 128]))
    expected = np.array([[10, 20, 30], [40, 50, 60], [255, 255, 255], [177, 182, 187]])
    assert np.abs(decoded(half)[0, :4] - expected).max() <= 1


def test_a_transparent_grey_or_colour_is_white() -> None:
    grey = np.tile(np.arange(SIDE, dtype=np.uint8), (SIDE, 1))
    ours = decoded(encoded(Image.fromarray(grey), "PNG", transparency=7))
    assert ours[0, 6:9, 0].tolist() == [6, 255, 8]
    colour = np.stack([grey, grey, grey + 1], -1)
    ours = decoded(encoded(Image.fromarray(colour), "PNG", transparency=(7, 7, 8)))
    assert ours[0, 6:9].tolist() == [[6, 6, 7], [255, 255, 255], [8, 8, 9]]
    deep = grey.astype(np.uint16) * 1000
    ours = decoded(encoded(Image.fromarray(deep), "PNG", transparency=7000))
    assert ours[0, 6:9, 0].tolist() == [round(6000 / 257), 255, round(8000 / 257)]


def test_cmyk_becomes_rgb() -> None:
    image = Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0))
    for content in (encoded(image, "JPEG", quality=95), encoded(image, "TIFF")):
        assert np.abs(decoded(content) - [255, 0, 0]).max() <= 3


def test_sixteen_bits_of_grey_are_divided_by_257_and_rounded() -> None:
    expected = np.rint(EVERY_16_BITS / 257).astype(int)
    files = {
        "png": png(EVERY_16_BITS.astype(">u2"), 16, 0),
        "tiff, little-endian": tiff(EVERY_16_BITS.astype("<u2"), 16),
        "tiff, big-endian": tiff(EVERY_16_BITS.astype(">u2"), 16),
        "tiff, signed": tiff((EVERY_16_BITS // 2).astype("<i2"), 16, sample_format=2),
        "pgm": b"P5 32 32 65535\n" + EVERY_16_BITS.astype(">u2").tobytes(),
    }
    for name, content in files.items():
        ours = decoded(content)
        grey = np.rint((EVERY_16_BITS // 2) / 257) if name == "tiff, signed" else expected
        assert (ours == np.asarray(grey)[..., None]).all(), name


def test_the_declared_depth_decides_and_never_the_values_of_the_image() -> None:
    dark = np.full((SIDE, SIDE), 200)
    for content in (
        png(dark.astype(">u2"), 16, 0),
        tiff(dark.astype("<u2"), 16),
        tiff(dark.astype("<i2"), 16, sample_format=2),
        b"P5 32 32 65535\n" + dark.astype(">u2").tobytes(),
    ):
        assert (decoded(content) == 1).all()


def test_a_tiff_of_twelve_bits_is_scaled_by_4095() -> None:
    values = (np.arange(SIDE * SIDE, dtype="<u2") * 4 % 4096).reshape(SIDE, SIDE)
    ours = decoded(tiff(values, 12))
    assert (ours == np.rint(values / 4095 * 255)[..., None]).all()


def test_a_pgm_of_ten_bits_is_scaled_by_its_highest_value() -> None:
    values = np.arange(SIDE * SIDE, dtype=">u2").reshape(SIDE, SIDE)
    ours = decoded(b"P5 32 32 1023\n" + values.tobytes())
    assert np.abs(ours - np.rint(values / 1023 * 255)[..., None]).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_zero_is_white_if_a_tiff_declares_it(bits: int) -> None:
    values = np.tile(np.arange(SIDE) * 8 * (257 if bits == 16 else 1), (SIDE, 1))
    ours = decoded(tiff(values.astype(f"<u{bits // 8}"), bits, photometric=0))
    assert ours[0, :, 0].tolist() == [255 - 8 * x for x in range(SIDE)]


def test_sixteen_bits_of_colour_are_the_high_byte() -> None:
    values = np.stack([EVERY_16_BITS, EVERY_16_BITS[::-1], EVERY_16_BITS // 2], -1)
    ours = decoded(png(values.astype(">u2"), 16, 2))
    assert (ours == values >> 8).all()


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_floats_have_the_smallest_range_that_holds_them(white: float) -> None:
    values = np.linspace(0, white, SIDE * SIDE, dtype="<f4").reshape(SIDE, SIDE)
    ours = decoded(tiff(values, 32, sample_format=3))
    assert np.abs(ours - (values / white * 255)[..., None]).max() <= 0.51


@pytest.mark.parametrize("white", [255, 65535])
def test_integers_of_32_bits_have_the_smallest_range_that_holds_them(white: int) -> None:
    values = np.linspace(0, white, SIDE * SIDE).astype("<i4").reshape(SIDE, SIDE)
    ours = decoded(tiff(values, 32, sample_format=2))
    assert np.abs(ours - (values / white * 255)[..., None]).max() <= 0.51


@pytest.mark.parametrize("value", [-1.0, 65536.0, float("nan"), float("inf")])
def test_numbers_without_a_known_range_are_an_error(value: float) -> None:
    values = np.full((SIDE, SIDE), 0.5, dtype="<f4")
    values[3, 3] = value
    assert "outside 0 to 65535" in error_of(tiff(values, 32, sample_format=3))


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_colour_of_32_bits_is_an_error_that_says_so(white: float) -> None:
    floats = (pattern() / 255 * white).astype("<f4")
    reason = error_of(tiff(floats, 32, photometric=2, sample_format=3))
    assert reason == "cannot be decoded: a TIFF of 3 x 32 bits (floats), which Pillow cannot open"
    reason = error_of(tiff(floats.astype("<i4"), 32, photometric=2, sample_format=2))
    assert reason == "cannot be decoded: a TIFF of 3 x 32 bits (integers), which Pillow cannot open"


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_greyscale_of_fewer_than_eight_bits_is_stretched_to_eight(depth: int) -> None:
    values = np.tile(np.arange(SIDE) % 2**depth, (SIDE, 1))
    bits = values[..., None] >> np.arange(depth)[::-1] & 1
    packed = np.packbits(bits.reshape(SIDE, -1).astype(np.uint8), axis=1)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, 0, 0, 0, 0)
    content = png(packed, depth, 0)
    start = content.index(b"IDAT") - 4
    content = content[:8] + png_chunk(b"IHDR", header) + content[start:]
    assert (decoded(content) == (values * 255 // (2**depth - 1))[..., None]).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_of_every_depth_give_their_colours(bits: int) -> None:
    image = sample().quantize(2**bits)
    expected = np.asarray(image.convert("RGB"))
    content = encoded(image, "PNG", bits=bits)
    assert content[24:26] == bytes([bits, 3])
    assert (decoded(content) == expected).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_interlaced_png_gives_the_same_pixels(channels: int) -> None:
    image = sample(23, 21, {1: "L", 3: "RGB", 4: "RGBA"}[channels])
    values = np.asarray(image)
    rows = []
    steps = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
    for top, left, down, right in [*steps, (1, 0, 2, 1)]:  # Adam7
        rows += [b"\0" + row.tobytes() for row in values[top::down, left::right]]
    header = struct.pack(">IIBBBBB", 23, 21, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 1)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"".join(rows)))
    content = b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")
    assert (decoded(content) == decoded(encoded(image, "PNG"))).all()
    assert "truncated" in error_of(content[: len(content) // 2])


def test_a_jpeg_in_ycck_equals_one_in_cmyk() -> None:
    image = sample(mode="CMYK")
    ink = Image.merge("RGB", image.split()[:3]).convert("YCbCr")
    given = Image.merge("CMYK", [*map(ImageOps.invert, ink.split()), image.getchannel("K")])
    content = encoded(given, "JPEG", quality=98, subsampling=0)
    transform = content.index(b"Adobe") + 11
    assert content[transform] == 0  # CMYK
    ycck = content[:transform] + b"\2" + content[transform + 1 :]
    cmyk = encoded(image, "JPEG", quality=98, subsampling=0)
    assert np.abs(decoded(ycck) - decoded(cmyk)).max() <= 8
    assert np.abs(decoded(ycck) - decoded(encoded(image, "TIFF"))).mean() < 2


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    first = Image.new("RGB", (SIDE, SIDE), (250, 0, 0))
    more = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ((0, 250, 0), (0, 0, 250))]
    content = encoded(first, kind, save_all=True, append_images=more)
    with Image.open(io.BytesIO(content)) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert np.abs(decoded(content) - [250, 0, 0]).max() <= 4


def test_the_first_image_of_an_mpo_is_decoded() -> None:
    first, second = Image.new("RGB", (SIDE, SIDE), "red"), Image.new("RGB", (SIDE, SIDE), "blue")
    content = encoded(first, "MPO", save_all=True, append_images=[second])
    assert np.abs(decoded(content) - [255, 0, 0]).max() <= 3
    table = content.index(b"MPF\0") + 4
    broken = content[:table] + b"\xff" * 16 + content[table + 16 :]
    assert (decoded(broken) == decoded(content)).all()
