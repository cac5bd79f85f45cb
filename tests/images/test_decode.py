"""Bytes of pictures become pixels: colours, geometry, and what is no picture."""

from __future__ import annotations

import base64
import io
import pickle
import re
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, features
from support.icc_profiles import (
    INKS,
    PROFILES,
    SRGB,
    SRGB_CURVE,
    from_srgb_curve,
    gamma_curve,
    grey_profile,
    in_srgb,
    ink_lab,
    ink_profile,
    lab_in_srgb,
    rgb_profile,
)

from r2ncli.architectures import Preprocessing
from r2ncli.errors import ImageError
from r2ncli.images import colour, heif, pillow
from r2ncli.images import decode as decoding
from r2ncli.images import tiff as tiff_rules
from r2ncli.images.decode import DecodeRules, decode

Array = npt.NDArray[Any]

RULES = DecodeRules("exact")
IMAGENET = Preprocessing()
SIDE = 32
AS_IT_IS = Preprocessing(image_size=SIDE, resize_size=SIDE, crop="none")  # no pixel is moved
SMALL = Preprocessing(image_size=SIDE, resize_size=36)


# --- pictures, made of integers -----------------------------------------------------------


def pattern(width: int = SIDE, height: int = SIDE) -> Array:
    """uint8 [height, width, 3]: smooth enough for any codec, different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * x // max(width - 1, 1)
    green = 255 * y // max(height - 1, 1)
    blue = 40 + 160 * ((x // 5 + y // 7) % 2)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def picture(width: int = SIDE, height: int = SIDE, mode: str = "RGB") -> Image.Image:
    """The pattern in a mode of Pillow; its alpha, where it has one, falls from left to right."""
    rgb = Image.fromarray(pattern(width, height))
    if mode == "P":
        return rgb.quantize(64)
    if mode in ("RGBA", "LA"):
        ramp = np.tile(np.linspace(255, 0, width).astype(np.uint8), (height, 1))
        rgb.putalpha(Image.fromarray(ramp))
    return rgb.convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.copy().save(content, kind, **options)  # a copy: saving leaves traces in a picture
    return content.getvalue()


def decoded(content: bytes, preprocessing: Preprocessing = AS_IT_IS) -> Array:
    return decode(content, preprocessing, RULES).astype(int)


def error_of(content: bytes, rules: DecodeRules = RULES) -> str:
    with pytest.raises(ImageError) as raised:
        decode(content, AS_IT_IS, rules)
    return str(raised.value)


def heic(image: Image.Image, **options: Any) -> bytes:
    content = io.BytesIO()
    pillow_heif.from_pillow(image.copy()).save(content, **options)
    return content.getvalue()


def tiff(values: Array, bits: int, *, photometric: int = 1, sample_format: int = 1) -> bytes:
    """An uncompressed TIFF in the byte order of `values`; 12 bits are packed."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width = values.shape[:2]
    pixels = values.tobytes()
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        words = pairs[:, 0] << 12 | pairs[:, 1]
        pixels = np.stack([words >> 16, words >> 8 & 255, words & 255], -1).astype("u1").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8}
    tags[277] = values.size // (width * height)
    tags |= {278: height, 279: len(pixels), 339: sample_format}
    entries = b"".join(struct.pack(order + "HHII", *(tag, 4, 1, tags[tag])) for tag in sorted(tags))
    mark = b"II*\0" if order == "<" else b"MM\0*"
    head = mark + struct.pack(order + "I", 8 + len(pixels))
    return head + pixels + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png(values: Array, depth: int, colour: int, *more: bytes) -> bytes:
    """A PNG of big-endian `values` [height, width(, channels)], which Pillow cannot all write."""
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    body = [png_chunk(b"IHDR", header), *more, png_chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body) + png_chunk(b"IEND", b"")


def run_length_bmp() -> bytes:
    """A BMP of 32 x 32 in runs of one colour a row, which Pillow reads and does not write."""
    palette = b"".join(bytes([3 * i, 2 * i, i, 0]) for i in range(64)) + bytes(4 * 192)
    rows = b"".join(bytes([16, y, 16, y + 8, 0, 0]) for y in range(SIDE)) + b"\0\1"
    start = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + palette + rows


def files_of_every_format() -> dict[str, bytes]:
    """A small picture in every format and layout that is read and can be made here."""
    rgb, rgba, grey, palette = (picture(24, 20, mode) for mode in ("RGB", "RGBA", "L", "P"))
    deep = Image.fromarray(pattern(24, 20)[..., 0].astype(np.uint16) * 257)
    cmyk = rgb.convert("CMYK")
    files = {
        "jpeg": encoded(rgb, "JPEG"),
        "jpeg progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg restarts": encoded(rgb, "JPEG", restart_marker_rows=1),
        "jpeg grey": encoded(grey, "JPEG"),
        "jpeg cmyk": encoded(cmyk, "JPEG"),
        "mpo": encoded(rgb, "MPO", save_all=True, append_images=[rgb.rotate(180)]),
        "png": encoded(rgb, "PNG"),
        "png alpha": encoded(rgba, "PNG"),
        "png palette": encoded(palette, "PNG"),
        "png 16": encoded(deep, "PNG"),
        "apng": encoded(rgb, "PNG", save_all=True, append_images=[rgb.rotate(180)]),
        "gif": encoded(palette, "GIF"),
        "gif animated": encoded(palette, "GIF", save_all=True, append_images=[rgb.rotate(180)]),
        "bmp": encoded(rgb, "BMP"),
        "bmp palette": encoded(palette, "BMP"),
        "bmp runs": run_length_bmp(),
        "tiff": encoded(rgb, "TIFF"),
        "tiff 16": encoded(deep, "TIFF"),
        "tiff pages": encoded(rgb, "TIFF", save_all=True, append_images=[rgb.rotate(180)]),
        "ico": encoded(rgba, "ICO", sizes=[(24, 20)]),
        "ico bmp": encoded(rgba, "ICO", sizes=[(24, 20)], bitmap_format="bmp"),
        "ppm": encoded(rgb, "PPM"),
        "pgm": encoded(grey, "PPM"),
        "pbm": encoded(picture(24, 20, "1"), "PPM"),
        "pgm 16": encoded(deep, "PPM"),
        "heic": heic(rgb),
        "heic alpha": heic(rgba),
        "heic grey": heic(grey),
    }
    if features.check("libtiff"):
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
            files[compression] = encoded(rgb, "TIFF", compression=compression)
        files["group4"] = encoded(picture(24, 20, "1"), "TIFF", compression="group4")
    if features.check("webp"):
        files["webp"] = encoded(rgb, "WEBP")
        files["webp lossless"] = encoded(rgba, "WEBP", lossless=True)
        files["webp animated"] = encoded(
            rgb, "WEBP", save_all=True, append_images=[rgb.rotate(180)]
        )
    if features.check("avif"):
        files["avif"] = encoded(rgb, "AVIF")
        files["avif alpha"] = encoded(rgba, "AVIF")
    if features.check("jpg_2000"):
        files["jp2"] = encoded(rgb, "JPEG2000")
        files["j2k"] = encoded(grey, "JPEG2000", no_jp2=True)
        files["jp2 tiles"] = encoded(rgb, "JPEG2000", tile_size=(8, 8))
        files["jp2 lossy"] = encoded(rgb, "JPEG2000", irreversible=True, quality_layers=[8, 2])
    return files


FILES = files_of_every_format()


# --- geometry -----------------------------------------------------------------------------


def torchvision_pixels(image: Image.Image, resize: int = 256, crop: int = 224) -> Array:
    """What torchvision's evaluation transform makes of an RGB picture, before normalising."""
    from torchvision.transforms import CenterCrop, Resize

    return np.asarray(CenterCrop(crop)(Resize(resize)(image))).astype(int)


def assert_alike(ours: Array, reference: Array) -> None:
    """Within one grey level; small inputs have ties in both passes, which may add up to two."""
    difference = np.abs(ours - reference)
    assert difference.max() <= 2
    assert (difference > 1).mean() <= 0.001


@pytest.mark.parametrize(
    ("width", "height"),
    [
        *((1, 1), (1, 2), (2, 1), (3, 5), (31, 33), (223, 225), (224, 224), (256, 256)),
        *((255, 257), (257, 300), (300, 257), (640, 480), (481, 321), (333, 500), (1024, 683)),
        *((1, 100), (100, 1), (2, 301), (999, 7), (17, 1000), (1920, 1080), (511, 513)),
    ],
)
def test_pixels_are_torchvisions_within_one_grey_level(width: int, height: int) -> None:
    noise = np.random.default_rng(width * 10_000 + height)
    values = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    ours = decoded(encoded(image, "BMP"), IMAGENET)
    assert np.abs(ours - torchvision_pixels(image)).max() <= 1


@given(
    width=st.integers(1, 180),
    height=st.integers(1, 180),
    mode=st.sampled_from(["1", "L", "P", "RGB", "CMYK"]),
    image_size=st.integers(32, 256),
    margin=st.integers(0, 40),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_size_and_mode_at_any_input_size_is_torchvisions(
    width: int, height: int, mode: str, image_size: int, margin: int
) -> None:
    image = picture(width, height, mode)
    content = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    preprocessing = Preprocessing(image_size=image_size, resize_size=image_size + margin)
    reference = torchvision_pixels(image.convert("RGB"), image_size + margin, image_size)
    assert_alike(decoded(content, preprocessing), reference)


def test_another_input_size_keeps_the_ratio_of_the_resize() -> None:
    image = picture(200, 150)
    preprocessing = IMAGENET.resized(96, no_crop=False)
    assert (preprocessing.image_size, preprocessing.resize_size) == (96, 110)
    ours = decoded(encoded(image, "PNG"), preprocessing)
    assert_alike(ours, torchvision_pixels(image, 110, 96))


def test_without_a_crop_the_whole_picture_is_stretched() -> None:
    from torchvision.transforms import Resize

    image = picture(200, 90)
    ours = decoded(encoded(image, "PNG"), IMAGENET.resized(None, no_crop=True))
    whole = np.asarray(Resize((224, 224))(image)).astype(int)
    assert ours.shape == (224, 224, 3)
    assert np.abs(ours - whole).max() <= 1


@pytest.mark.parametrize("width", [100, 101, 102, 103])
def test_a_square_crop_is_centred_to_a_fraction_of_a_pixel(width: int) -> None:
    ramp = np.tile(2 * np.arange(width, dtype=np.uint8), (64, 1))  # linear: resizing keeps it
    preprocessing = Preprocessing(image_size=64, resize_size=64, crop="square")
    ours = decoded(encoded(Image.fromarray(ramp), "PNG"), preprocessing)
    expected = 2 * ((width - 64) / 2 + np.arange(64))
    assert np.abs(ours[:, :, 0] - expected).max() <= 0.5 + 1e-6


def test_a_square_crop_keeps_the_part_that_its_sizes_say() -> None:
    ramp = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    preprocessing = Preprocessing(image_size=64, resize_size=80, crop="square")
    ours = decoded(encoded(Image.fromarray(ramp), "PNG"), preprocessing)
    side = 100 * 64 / 80  # of the short side
    expected = (200 - side) / 2 + (np.arange(64) + 0.5) * side / 64 - 0.5
    assert np.abs(ours[:, :, 0] - expected).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(65_000, 2), (2, 65_000)])
def test_a_very_long_picture_costs_no_more_than_another(width: int, height: int) -> None:
    # resized as torchvision does, this one would have 8,320,000 x 256 pixels
    y, x = np.mgrid[0:height, 0:width]
    halves = np.where((x < width // 2) if width > height else (y < height // 2), 0, 255)
    ours = decoded(encoded(Image.fromarray(halves.astype(np.uint8)), "PNG"), IMAGENET)
    along = ours[112, :, 0] if width > height else ours[:, 112, 0]
    assert along[0] <= 1
    assert along[-1] >= 254
    assert (np.diff(along) >= 0).all()


def test_the_result_is_a_contiguous_array_of_bytes() -> None:
    for content in (FILES["png"], encoded(picture(60, 40), "JPEG", exif=orientation(6))):
        pixels = decode(content, IMAGENET, RULES)
        assert pixels.shape == (224, 224, 3)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous


# --- stored pixels: what they are must not drift with a version of Pillow -----------------

# of a JPEG, whose decoder is not ours
JPEG_FILE = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywt"
    "QFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09P"
    "T09PT09PT09PT09PT09PT09PT0//wAARCAAeACgDASIAAhEBAxEB/8QAFwABAQEBAAAAAAAAAAAAAAAABAAFBv/EACYQ"
    "AAEEAgIBBAIDAAAAAAAAAAEAAgMRBCESMRMiI0FRFGEycYH/xAAXAQEBAQEAAAAAAAAAAAAAAAAFAwQH/8QAKREAAQMD"
    "AQYHAQAAAAAAAAAAAQACBAMRITESFCIyQVETQlJhcoGR8f/aAAwDAQACEQMRAD8A4fGxeLrcKFfKS3FJlDgNWNrS/HEj"
    "QGbPaTFjgR8D/KqpIPqtA8MHhGQe57KEeV1We7G5ceIuvpLbjAxBo7oaTsfG8d8xV9JMWIRJzI9PdrM+SSS46uwR6Rpf"
    "8zlOxpKDjY3FtO0b+VLYGIZHAsFjpShv9WlwU27QGhzlNU5AIuShQ4hiPJwsHWkpmIXO8gGu0+OETenqtpMcIb7X+X/a"
    "yvrMtYcnT5Lk8aSftBbjeauIqvtKZjhzfGBvpOjgEP7tKjxg33b/AHSzPruudrm8/sP52TsaSgQ44iHFw33pS2I8YTeq"
    "6rSlDeZIxRF29NE1Tki2V//Z"
)
# fmt: off
STORED = {
    "landscape": [
        63, 30, 164, 106, 30, 76, 148, 30, 164, 191, 30, 76, 63, 95, 200, 106, 95, 40, 148, 95,
        200, 191, 95, 40, 63, 159, 200, 106, 159, 40, 148, 159, 200, 191, 159, 40, 63, 224, 200,
        106, 224, 40, 148, 224, 200, 191, 224, 40,
    ],
    "portrait": [
        30, 64, 40, 94, 64, 200, 160, 64, 40, 225, 64, 200, 30, 104, 40, 94, 104, 200, 160, 104,
        40, 225, 104, 200, 30, 145, 68, 94, 145, 172, 160, 145, 68, 225, 145, 172, 30, 185, 169,
        94, 185, 71, 160, 185, 169, 225, 185, 71,
    ],
    "enlarged": [
        47, 8, 40, 101, 8, 40, 154, 8, 40, 207, 8, 182, 47, 87, 40, 101, 87, 40, 154, 87, 40,
        207, 87, 182, 47, 167, 40, 101, 167, 40, 154, 167, 40, 207, 167, 182, 47, 247, 40, 101,
        247, 40, 154, 247, 40, 207, 247, 182,
    ],
    "alpha": [
        112, 87, 131, 167, 122, 136, 208, 158, 218, 236, 195, 238, 112, 135, 127, 167, 161, 129,
        208, 187, 222, 236, 212, 241, 112, 184, 127, 167, 199, 129, 208, 214, 222, 236, 229,
        241, 112, 232, 127, 167, 237, 129, 208, 242, 222, 236, 247, 241,
    ],
    "16 bits": [
        63, 63, 63, 64, 64, 64, 65, 65, 65, 65, 65, 65, 103, 103, 103, 104, 104, 104, 105, 105,
        105, 105, 105, 105, 144, 144, 144, 144, 144, 144, 145, 145, 145, 145, 145, 145, 183,
        183, 183, 184, 184, 184, 184, 184, 184, 185, 185, 185,
    ],
    "jpeg": [
        62, 28, 174, 112, 27, 167, 144, 33, 61, 193, 33, 44, 44, 92, 54, 91, 97, 78, 153, 90,
        181, 207, 89, 203, 64, 166, 166, 116, 158, 178, 143, 159, 81, 190, 159, 62, 50, 217, 69,
        88, 228, 49, 158, 230, 157, 208, 223, 200,
    ],
}
# fmt: on


def stored_pictures() -> dict[str, bytes]:
    grey = (np.arange(61 * 97, dtype=np.uint32).reshape(97, 61) * 11 % 65536).astype(">u2")
    return {
        "landscape": encoded(picture(90, 60), "PNG"),
        "portrait": encoded(picture(61, 97), "BMP"),
        "enlarged": encoded(picture(7, 5), "PPM"),
        "alpha": encoded(picture(80, 50, "RGBA"), "PNG"),
        "16 bits": png(grey, 16, 0),
        "jpeg": base64.b64decode(JPEG_FILE),
    }


@pytest.mark.parametrize("name", list(STORED))
def test_pixels_are_those_that_were_stored(name: str) -> None:
    pixels = decoded(stored_pictures()[name], SMALL)[2::9, 2::9].reshape(-1).tolist()
    drift = np.abs(np.subtract(pixels, STORED[name])).max()
    assert drift <= (2 if name == "jpeg" else 0)


# --- colour -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FILES))
def test_every_format_gives_its_picture(name: str) -> None:
    if name == "bmp runs":
        row = decoded(FILES[name])[-1]  # stored from the bottom upwards
        assert row[0].tolist() == [0, 0, 0]
        assert row[-1].tolist() == [8, 16, 24]
        return
    image = picture(24, 20, "RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    if "alpha" in name or "ico" in name or name == "webp lossless":
        image = Image.fromarray(on_white(picture(24, 20, "RGBA"))).resize((SIDE, SIDE), 2)
    reference = np.asarray(image).astype(int)
    ours = decoded(FILES[name])
    if name in ("jpeg grey", "heic grey", "pgm", "j2k"):
        reference = np.asarray(image.convert("L").convert("RGB")).astype(int)
    elif name in ("png 16", "tiff 16", "pgm 16"):
        reference = reference[:, :, [0, 0, 0]]
    elif name in ("pbm", "group4"):
        assert {*ours[0, 0], *ours[-1, -1]} == {0, 255}
        assert np.abs(ours.mean() - reference.mean()) < 15
        return
    assert np.abs(ours - reference).mean() < 12


def on_white(image: Image.Image) -> npt.NDArray[np.uint8]:
    values = np.asarray(image.convert("RGBA")).astype(float)
    alpha = values[..., 3:] / 255
    return np.rint(values[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_a_lossless_picture_gives_its_own_pixels(mode: str) -> None:
    image = picture(mode=mode)
    assert (decoded(encoded(image, "PNG")) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(mode: str) -> None:
    image = picture(mode=mode)
    ours = decoded(encoded(image, "PNG"))
    assert np.abs(ours - on_white(image)).max() <= 1
    assert (ours[:, -1] == 255).all()  # wholly transparent there
    assert (ours[:, 0] == np.asarray(image.convert("RGBA"))[:, 0, :3]).all()


def test_the_colour_behind_full_transparency_does_not_shine_through() -> None:
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


EVERY_16_BITS = (np.arange(SIDE * SIDE, dtype=np.uint32) * 64 + 31).reshape(SIDE, SIDE)


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


def test_the_declared_depth_decides_and_never_the_values_of_the_picture() -> None:
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
def test_where_a_tiff_says_that_zero_is_white_it_is(bits: int) -> None:
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
    image = picture().quantize(2**bits)
    expected = np.asarray(image.convert("RGB"))
    content = encoded(image, "PNG", bits=bits)
    assert content[24:26] == bytes([bits, 3])
    assert (decoded(content) == expected).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_interlaced_png_is_the_same_picture(channels: int) -> None:
    image = picture(23, 21, {1: "L", 3: "RGB", 4: "RGBA"}[channels])
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


def test_a_jpeg_of_ycck_is_the_same_picture_as_one_of_cmyk() -> None:
    image = picture(mode="CMYK")
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


def test_the_first_picture_of_an_mpo_is_the_picture() -> None:
    first, second = Image.new("RGB", (SIDE, SIDE), "red"), Image.new("RGB", (SIDE, SIDE), "blue")
    content = encoded(first, "MPO", save_all=True, append_images=[second])
    assert np.abs(decoded(content) - [255, 0, 0]).max() <= 3
    table = content.index(b"MPF\0") + 4
    broken = content[:table] + b"\xff" * 16 + content[table + 16 :]
    assert (decoded(broken) == decoded(content)).all()


# --- ICC profiles -------------------------------------------------------------------------

MODE_OF = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
WITH_PROFILES = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 95}}
WITH_PROFILES |= {"AVIF": {"quality": 95}, "MPO": {"quality": 95}}


@pytest.mark.parametrize("kind", list(WITH_PROFILES))
@pytest.mark.parametrize("name", ["display p3", "adobe rgb"])
def test_a_wide_gamut_picture_keeps_its_colours(name: str, kind: str) -> None:
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    image = picture()
    stored = decoded(encoded(image, kind, **WITH_PROFILES[kind]))
    ours = decoded(encoded(image, kind, icc_profile=PROFILES[name], **WITH_PROFILES[kind]))
    assert np.abs(ours - in_srgb(stored, name)).max() <= 1
    assert np.abs(ours - stored).max() > 20


def test_the_deepest_red_of_a_phone_is_not_a_paler_one() -> None:
    stored = Image.new("RGB", (SIDE, SIDE), (234, 51, 35))  # sRGB's red, as Display P3 has it
    ours = decoded(encoded(stored, "PNG", icc_profile=PROFILES["display p3"]))
    assert np.abs(ours - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("name", ["display p3", "adobe rgb", "grey 1.8"])
def test_a_profile_is_applied_to_the_resized_pixels(name: str) -> None:
    mode = MODE_OF[PROFILES[name][16:20]]
    image = picture(90, 60, mode)
    stored = decoded(encoded(image, "PNG"), SMALL)
    ours = decoded(encoded(image, "PNG", icc_profile=PROFILES[name]), SMALL)
    assert np.abs(ours - in_srgb(stored, name)).max() <= 1


def test_a_profile_and_an_orientation_go_together() -> None:
    for value in range(1, 9):
        options = {"exif": orientation(value), "icc_profile": PROFILES["adobe rgb"]}
        stored = decoded(encoded(picture(75, 50), "PNG", exif=orientation(value)), SMALL)
        ours = decoded(encoded(picture(75, 50), "PNG", **options), SMALL)
        assert np.abs(ours - in_srgb(stored, "adobe rgb")).max() <= 1


def test_greyscale_of_every_depth_has_its_profile_applied() -> None:
    profile = PROFILES["grey 1.8"]
    ramp = np.tile(np.arange(SIDE, dtype=np.uint8) * 8, (SIDE, 1))
    deep = png(
        ramp.astype(">u2") * 257, 16, 0, png_chunk(b"iCCP", b"x\0\0" + zlib.compress(profile))
    )
    expected = in_srgb(ramp, "grey 1.8")[..., None]
    for content in (encoded(Image.fromarray(ramp), "PNG", icc_profile=profile), deep):
        assert np.abs(decoded(content) - expected).max() <= 1
    bits = decoded(encoded(picture(mode="1"), "PNG", icc_profile=profile))
    assert {*bits.reshape(-1)} == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_picture_with_a_profile_is_composited_on_white_first(mode: str) -> None:
    name = "grey 1.8" if mode == "LA" else "display p3"
    image = picture(mode=mode)
    options = {"transparency": 3} if mode == "P" else {}
    stored = decoded(encoded(image, "PNG", **options))
    ours = decoded(encoded(image, "PNG", icc_profile=PROFILES[name], **options))
    expected = in_srgb(stored[..., :1] if mode == "LA" else stored, name)
    assert np.abs(ours - expected).max() <= 1
    assert (ours[stored.min(-1) == 255] == 255).all()  # white stays white


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_inks_are_what_their_profile_says(kind: str) -> None:
    for ink, expected in zip(INKS, lab_in_srgb(ink_lab(INKS, 0)), strict=True):
        image = Image.new("CMYK", (SIDE, SIDE), tuple(int(255 * part) for part in ink))
        ours = decoded(encoded(image, kind, icc_profile=ink_profile()))
        assert np.abs(ours - expected).max() <= 2, ink


def test_black_ink_that_is_only_dark_grey_becomes_black() -> None:
    image = Image.new("CMYK", (SIDE, SIDE), (255, 255, 255, 255))
    ours = decoded(encoded(image, "TIFF", icc_profile=ink_profile(darkest=20)))
    assert ours.max() <= 2


SRGB_TABLE = np.rint(from_srgb_curve(np.arange(1024) / 1023) * 65535).astype(">u2").tobytes()
SRGB_BY_ANY_NAME = {
    "LittleCMS's": ("RGB", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    "a formula": ("RGB", rgb_profile(SRGB, SRGB_CURVE)),
    "a table": ("RGB", rgb_profile(SRGB, b"curv" + struct.pack(">II", 0, 1024) + SRGB_TABLE)),
    "grey": ("L", grey_profile(SRGB_CURVE)),
}


@pytest.mark.parametrize("name", list(SRGB_BY_ANY_NAME))
def test_with_a_profile_that_is_srgb_nothing_changes(name: str) -> None:
    mode, profile = SRGB_BY_ANY_NAME[name]
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    plain = decoded(encoded(image, "PNG"), SMALL)
    assert (decoded(encoded(image, "PNG", icc_profile=profile), SMALL) == plain).all()


def test_srgb_with_another_curve_is_another_space() -> None:
    image = Image.new("RGB", (SIDE, SIDE), (20, 20, 20))
    ours = decoded(encoded(image, "PNG", icc_profile=rgb_profile(SRGB, gamma_curve(2.2))))
    assert np.abs(ours - to_srgb(20, 2.2)).max() <= 1
    assert ours.max() < 20


def to_srgb(value: int, gamma: float) -> float:
    return float(255 * (1.055 * ((value / 255) ** gamma) ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *(("L", "display p3"), ("L", "ink"), ("RGB", "grey 1.8"), ("RGB", "ink")),
        *(("CMYK", "adobe rgb"), ("CMYK", "grey 1.8"), ("LAB", "display p3"), ("I;16", "ink")),
    ],
)
def test_a_profile_of_another_colour_space_is_ignored(mode: str, name: str) -> None:
    deep = Image.fromarray(EVERY_16_BITS.astype(np.uint16))
    image = (
        deep if mode == "I;16" else Image.frombytes(mode, (16, 16), bytes(range(256)) * len(mode))
    )
    if mode == "CMYK":
        image = picture(mode=mode)
    plain = decoded(encoded(image, "TIFF"))
    assert (decoded(encoded(image, "TIFF", icc_profile=PROFILES[name])) == plain).all()


def test_a_damaged_profile_is_ignored() -> None:
    image, profile = picture(), PROFILES["display p3"]
    plain = decoded(encoded(image, "PNG"))
    for damaged in (
        *(profile[:cut] for cut in (1, 20, 100, 130, 200)),
        *(profile[:36] + b"nope" + profile[40:], profile.replace(b"rTRC", b"xxxx")),
        *(bytes(len(profile)), profile[:128] + b"\xff" * 300, b"\xff" * 300),
    ):
        assert (decoded(encoded(image, "PNG", icc_profile=damaged)) == plain).all()


def test_a_profile_that_no_one_uses_up_to_its_last_byte_is_not_kept() -> None:
    huge = PROFILES["adobe rgb"].ljust(colour._MAX_PROFILE_BYTES + 1, b"\0")
    assert colour.conversion(huge, "RGB", "RGB") is None
    assert colour.conversion(huge[:-1], "RGB", "RGB") is not None
    colour._transform.cache_clear()


def test_one_transform_serves_many_threads_and_few_are_kept() -> None:
    gammas = [1.2 + n / 20 for n in range(20)]
    profiles = [rgb_profile(SRGB, gamma_curve(gamma)) for gamma in gammas]
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    contents = [encoded(Image.fromarray(noise), "PNG", icc_profile=each) for each in profiles]
    alone = [decoded(content) for content in contents]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(decoded, contents[-8:] * 20 + contents))
    for pixels, expected in zip(together, alone[-8:] * 20 + alone, strict=True):
        assert (pixels == expected).all()
    kept = colour._transform.cache_info()
    assert kept.maxsize is not None
    assert kept.currsize <= kept.maxsize < len(profiles)


# --- EXIF ---------------------------------------------------------------------------------


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(("width", "height"), [(75, 50), (48, 83)])
def test_a_turned_picture_is_put_upright_first(
    kind: str, value: int, width: int, height: int
) -> None:
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    content = encoded(picture(width, height), kind, exif=orientation(value))
    with Image.open(io.BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert (upright.width, upright.height) == ((height, width) if value > 4 else (width, height))
    reference = torchvision_pixels(upright, SMALL.resize_size, SMALL.image_size)
    assert_alike(decoded(content, SMALL), reference)


def test_a_compressed_tiff_is_put_upright_once() -> None:
    if not features.check("libtiff"):
        pytest.skip("this Pillow has no libtiff")
    image = picture()
    content = encoded(image, "TIFF", exif=orientation(6), compression="tiff_lzw")
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert (decoded(content) == np.asarray(upright)).all()


@pytest.mark.filterwarnings("ignore")  # Pillow's asides about metadata; r2n ignores them too
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"no exif at all",
        b"Exif\0\0" + b"\xff" * 40,
        b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03" + b"\xff" * 9,  # cut within an entry
        b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0abc\0\0\0\0\0",  # orientation is a text
        b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x63\0\0\0\0\0\0\0",  # orientation 99
    ],
)
def test_damaged_exif_is_harmless(kind: str, exif: bytes) -> None:
    image = picture()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    ours = decoded(encoded(image, kind, exif=exif, **lossless))
    assert np.abs(ours - decoded(encoded(image, kind, **lossless))).max() == 0


# --- HEIC, an extra -----------------------------------------------------------------------


@pytest.mark.parametrize("value", range(1, 9))
def test_a_turned_heic_is_put_upright_once(value: int) -> None:
    image = picture(72, 48)
    content = heic(image, exif=orientation(value).tobytes(), quality=90)
    image.info["exif"] = orientation(value).tobytes()
    upright = ImageOps.exif_transpose(image)
    assert upright.width == (48 if value > 4 else 72)
    reference = torchvision_pixels(upright, SMALL.resize_size, SMALL.image_size)
    ours = decoded(content, SMALL)
    assert np.abs(ours - reference)[..., :2].mean() < 4  # a lossy codec, of blue most
    assert np.abs(ours[::-1, ::-1] - reference)[..., :2].mean() > 40


def test_the_container_of_a_heic_says_how_it_lies_and_its_exif_does_not() -> None:
    content = heic(picture(72, 48), exif=orientation(6).tobytes())
    turn = content.index(b"irot") + 4
    lying = content[:turn] + b"\0" + content[turn + 1 :]  # EXIF still says 6
    assert np.abs(decoded(lying) - decoded(heic(picture(72, 48)))).max() <= 2


def test_a_heic_of_several_pictures_gives_its_primary_one() -> None:
    several = pillow_heif.HeifFile()
    for name in ("red", "green", "blue"):
        several.add_from_pillow(Image.new("RGB", (64, 64), name))
    content = io.BytesIO()
    several.save(content, primary_index=2)
    assert np.abs(decoded(content.getvalue()) - [0, 0, 255]).max() <= 4


def test_a_heic_of_a_phone_keeps_its_colours() -> None:
    stored = decoded(heic(picture(), quality=95))
    ours = decoded(heic(picture(), quality=95, icc_profile=PROFILES["display p3"]))
    assert np.abs(ours - in_srgb(stored, "display p3")).max() <= 1


def test_a_heic_of_ten_bits_of_grey_is_read_by_its_depth() -> None:
    deep = Image.fromarray(EVERY_16_BITS.repeat(2, 0).repeat(2, 1).astype(np.uint16))
    assert np.abs(decoded(heic(deep, quality=100))[..., 0] - EVERY_16_BITS / 257).max() <= 3


@pytest.mark.parametrize(
    ("major", "compatible", "is_heif"),
    [
        (b"heic", [b"mif1", b"heic"], True),
        (b"heix", [], True),
        (b"heic", [b"mif1", b"avif"], True),
        (b"mif1", [b"mif1", b"heic"], True),
        (b"mif1", [b"mif1"], True),
        (b"msf1", [b"hevc"], True),
        (b"mif1", [b"avif", b"heic"], True),
        (b"mif1", [b"mif1", b"avif", b"miaf"], False),
        (b"avif", [b"mif1", b"heic"], False),
        (b"avis", [b"msf1"], False),
        (b"mp42", [b"isom", b"mp42"], False),
        (b"qt  ", [], False),
    ],
)
def test_the_brands_tell_heic_from_avif(
    major: bytes, compatible: list[bytes], is_heif: bool
) -> None:
    brands = b"".join(compatible)
    head = struct.pack(">I4s4sI", 16 + len(brands), b"ftyp", major, 0) + brands + b"heic"
    assert heif.is_heic(head) == is_heif


def test_the_content_of_a_file_decides_between_heic_and_avif() -> None:
    generic = FILES["heic"].replace(b"ftypheic", b"ftypmif1", 1)
    assert (decoded(generic) == decoded(FILES["heic"])).all()
    if features.check("avif"):
        generic = FILES["avif"].replace(b"ftypavif", b"ftypmif1", 1)
        assert (decoded(generic) == decoded(FILES["avif"])).all()


def test_without_the_extra_a_heic_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert error_of(FILES["heic"]) == "HEIC support is not installed: pip install 'r2ncli[heic]'"
    assert decoded(FILES["png"]).shape == (SIDE, SIDE, 3)


def test_the_extra_is_imported_when_first_met_and_leaves_pillow_as_it_was() -> None:
    program = (
        "import pickle, sys; from concurrent.futures import ThreadPoolExecutor\n"
        "from PIL import Image; Image.init()\n"
        "from r2ncli.architectures import Preprocessing\n"
        "from r2ncli.images.decode import DecodeRules, decode\n"
        "png, heic = pickle.load(sys.stdin.buffer)\n"
        "read = lambda content: decode(content, Preprocessing(), DecodeRules('exact')).mean()\n"
        "read(png); assert 'pillow_heif' not in sys.modules\n"
        "known = dict(Image.OPEN), dict(Image.SAVE), dict(Image.EXTENSION)\n"
        "with ThreadPoolExecutor(8) as threads: print(*set(threads.map(read, [heic] * 32)))\n"
        "assert 'pillow_heif' in sys.modules\n"
        "assert known == (Image.OPEN, Image.SAVE, Image.EXTENSION)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps([FILES["png"], FILES["heic"]]),
        capture_output=True,
        check=True,
    )
    assert float(done.stdout) == decode(FILES["heic"], IMAGENET, RULES).mean()
    assert done.stderr == b""


# --- large JPEGs, reduced while they are decoded ---------------------------------------------

AUTO = DecodeRules("auto")


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse shapes with fine grain, as a camera gives them."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    grain = random.normal(0, 6, smooth.shape)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(144, 200), (145, 171), (301, 288), (577, 611), (700, 149)])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2, "progressive": True}])
def test_a_reduced_jpeg_differs_by_less_than_a_grey_level_in_the_mean(
    size: tuple[int, int], orientation: int, options: dict[str, Any]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photograph(*size), "JPEG", quality=95, exif=exif, **options)
    for preprocessing in (SMALL, Preprocessing(SIDE, 36, crop="none")):
        whole = decode(content, preprocessing, RULES).astype(int)
        reduced = decode(content, preprocessing, AUTO).astype(int)
        difference = reduced - whole
        assert np.abs(difference).mean() < 1
        assert np.abs(difference.mean((0, 1))).max() < 0.5  # nothing has moved or changed colour
        assert np.abs(difference).max() <= 16


@pytest.mark.parametrize(("short", "decoded_at"), [(143, 143), (144, 72), (288, 72), (576, 72)])
def test_a_jpeg_is_reduced_while_its_short_side_is_twice_what_it_is_resized_to(
    monkeypatch: pytest.MonkeyPatch, short: int, decoded_at: int
) -> None:
    loaded: list[int] = []
    codec = pillow.JPEG

    def watched(image: Image.Image, content: bytes) -> None:
        codec.load(image, content)
        loaded.append(min(image.size))

    [row] = [row for row in decoding.DECODERS if row.name == "JPEG"]
    monkeypatch.setitem(vars(row), "codec", replace(codec, load=watched))
    content = encoded(photograph(short + 50, short), "JPEG")
    decode(content, SMALL, AUTO)
    decode(content, SMALL, RULES)
    assert loaded == [decoded_at, short]


def test_only_jpegs_are_reduced() -> None:
    image = photograph(400, 300)
    for kind in ("PNG", "WEBP", "TIFF"):
        content = encoded(image, kind)
        assert (decode(content, SMALL, AUTO) == decode(content, SMALL, RULES)).all()


def test_a_reduced_jpeg_that_ends_early_or_is_too_large_is_a_failed_row() -> None:
    content = encoded(photograph(600, 600), "JPEG")
    assert "truncated" in error_of(content[: len(content) // 2], AUTO)
    limited = DecodeRules("auto", max_pixels=600 * 600 - 1)
    assert "600 x 600 pixels" in error_of(content, limited)


def test_a_cmyk_and_a_grey_jpeg_are_reduced_too() -> None:
    for mode in ("CMYK", "L"):
        content = encoded(photograph(600, 500).convert(mode), "JPEG", quality=95)
        whole, reduced = (decode(content, SMALL, r).astype(int) for r in (RULES, AUTO))
        assert np.abs(whole - reduced).mean() < 1


# --- what is no picture, or only a part of one --------------------------------------------


def cuts(content: bytes) -> list[int]:
    step = max(1, len(content) // 120)
    return sorted({*range(0, len(content), step), *range(max(0, len(content) - 40), len(content))})


@pytest.mark.filterwarnings("ignore")  # Pillow's asides about metadata; r2n ignores them too
@pytest.mark.parametrize("name", list(FILES))
def test_a_truncated_file_is_an_error_or_has_all_its_pixels(name: str) -> None:
    content = FILES[name]
    whole = decoded(content)
    lost = 0
    for cut in cuts(content):
        try:
            pixels = decoded(content[:cut])
        except ImageError:
            lost = cut
            continue
        assert (pixels == whole).all(), f"cut at {cut} of {len(content)}"
        assert cut > len(content) // 5, "no picture has all its pixels there"
    assert lost > len(content) // 5


def test_a_jpeg_2000_that_ends_between_two_tiles_is_an_error() -> None:
    if not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    content = FILES["jp2 tiles"]
    tiles = [match.start() for match in re.finditer(b"\xff\x90\x00\x0a", content)]
    assert len(tiles) == 9
    for tile in tiles:
        assert "truncated" in error_of(content[:tile])


def test_a_png_with_a_broken_stream_is_an_error() -> None:
    content = encoded(picture(64, 64), "PNG")
    start = content.index(b"IDAT") + 4
    stream = bytearray(zlib.compress(b"".join(b"\0" + row.tobytes() for row in pattern(64, 64))))
    for broken in (2, len(stream) // 3, len(stream) // 2):
        damaged = bytes(stream[:broken]) + bytes(b ^ 255 for b in stream[broken : broken + 8])
        damaged += bytes(stream[broken + 8 :])
        assert "data stream" in error_of(
            content[: start - 8] + png_chunk(b"IDAT", damaged) + png_chunk(b"IEND", b"")
        )


@pytest.mark.parametrize("name", list(FILES))
def test_bytes_after_the_end_are_no_harm(name: str) -> None:
    content = FILES[name]
    another = b"" if name.startswith("jp2") else content  # Pillow reads boxes up to a JP2's end
    for more in (b"\0" * 100, b"the end", another):
        assert (decoded(content + more) == decoded(content)).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (b"holiday in Norway\n", "not an image of a known format"),
        (b"P", "not an image of a known format"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page or other markup"),
        (b"\n  <svg xmlns='http://www.w3.org/2000/svg'/>", "a web page or other markup"),
        (b"\0" * 1000, "not an image of a known format"),
        (b"%PDF-1.7", "not an image of a known format"),
        (b"PK\x03\x04" + bytes(100), "not an image of a known format"),
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"BM", "BMP"),
        (b"GIF89a", "GIF"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"II*\0", "TIFF"),
        (b"P6 0 5 255 ", "PPM"),
    ],
)
def test_what_is_no_picture_says_so(content: bytes, reason: str) -> None:
    assert reason in error_of(content)


def test_a_format_that_pillow_knows_and_we_do_not_is_none() -> None:
    assert error_of(encoded(picture(), "TGA")) == "not an image of a known format"


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    stream = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    reason = error_of(b"\x89PNG\r\n\x1a\n" + stream)
    assert reason == "60000 x 60000 pixels, more than the limit of 200,000,000"


@pytest.mark.parametrize("name", ["png", "jpeg", "tiff", "gif", "bmp", "ico", "ppm"])
def test_a_picture_beyond_max_pixels_is_refused_and_one_at_it_is_not(name: str) -> None:
    decode(FILES[name], AS_IT_IS, DecodeRules("exact", max_pixels=24 * 20))
    reason = error_of(FILES[name], DecodeRules("exact", max_pixels=24 * 20 - 1))
    assert reason == "24 x 20 pixels, more than the limit of 479"


def test_an_icon_larger_than_its_directory_says_is_measured_itself() -> None:
    content = encoded(picture(24, 20, "RGBA"), "ICO", sizes=[(24, 20)])
    assert content[6:8] == bytes([24, 20])
    lying = content[:6] + bytes([8, 8]) + content[8:]
    with pytest.warns(UserWarning, match="expected size"):
        assert "24 x 20" in error_of(lying, DecodeRules("exact", max_pixels=100))


def test_pillows_own_limit_on_pixels_is_neither_used_nor_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # 480 pixels are beyond twice of it
    monkeypatch.setattr(tiff_rules, "_LARGE", 100)
    names = [name for name in FILES if not name.startswith("ico")]
    with ThreadPoolExecutor(4) as threads:
        shapes = list(threads.map(lambda name: decoded(FILES[name]).shape, names * 4))
    assert set(shapes) == {(SIDE, SIDE, 3)}
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TIFF", "PNG", "BMP"])
def test_a_picture_within_max_pixels_is_decoded_without_a_warning(kind: str) -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    side = 10_000
    assert Image.MAX_IMAGE_PIXELS < side * side < RULES.max_pixels
    content = encoded(Image.new("1", (side, side), 1), kind)
    assert (decoded(content) == 255).all()  # a warning would be an error


@pytest.mark.filterwarnings("ignore")  # Pillow's asides about metadata; r2n ignores them too
@pytest.mark.parametrize("name", list(FILES))
def test_an_error_reads_the_same_twice_and_names_no_address(name: str) -> None:
    content = FILES[name]
    for cut in cuts(content)[::7]:
        texts = set()
        for _ in range(2):
            try:
                decode(content[:cut], AS_IT_IS, RULES)
            except ImageError as error:
                texts.add(str(error))
        assert len(texts) <= 1
        for text in texts:
            assert text.isprintable()
            assert "0x" not in text
            assert len(text) < 200


def test_an_exception_that_names_an_object_loses_its_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(f"cannot identify {io.BytesIO()!r} at all")

    monkeypatch.setattr(decoding, "opaque", fail)
    assert error_of(FILES["png"]) == "cannot be decoded: cannot identify at all"


def test_too_little_memory_is_this_pictures_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decoding, "opaque", fail)
    assert error_of(FILES["png"]) == "cannot be decoded: not enough memory"


def test_libtiff_does_not_write_to_stderr_by_itself() -> None:
    if not features.check("libtiff"):
        pytest.skip("this Pillow has no libtiff")
    content = bytearray(FILES["tiff_lzw"])
    content[20:60] = b"\xff" * 40
    program = (
        "import sys; from r2ncli.architectures import Preprocessing\n"
        "from r2ncli.images.decode import DecodeRules, ImageError, decode\n"
        "try: decode(sys.stdin.buffer.read(), Preprocessing(), DecodeRules('exact'))\n"
        "except ImageError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        input=bytes(content),
        capture_output=True,
        check=True,
    )
    assert b"cannot be decoded" in done.stdout
    assert done.stderr == b""


def test_threads_do_not_disturb_each_other() -> None:
    names = [name for name in FILES for _ in range(3)]
    alone = {name: decoded(FILES[name]) for name in FILES}
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda name: decoded(FILES[name]), names))
    for name, pixels in zip(names, together, strict=True):
        assert (pixels == alone[name]).all(), name


def test_a_tiff_keeps_to_its_own_orientation_tag() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112] = 3
    image = picture()
    ours = decoded(encoded(image, "TIFF", tiffinfo=tags))
    assert (ours == np.asarray(image.rotate(180))).all()
