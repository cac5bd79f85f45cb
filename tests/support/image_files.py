"""Small image files of every format, made of integers, and how tests decode them."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pillow_heif
import pytest
from PIL import Image, features

from r2ncli.architectures import Preprocessing
from r2ncli.errors import ImageError
from r2ncli.images.decode import DecodeRules, decode

Array = npt.NDArray[Any]
RULES = DecodeRules("exact")
IMAGENET = Preprocessing()
SIDE = 32
AS_IT_IS = Preprocessing(image_size=SIDE, resize_size=SIDE, crop="none")  # no pixel is moved
SMALL = Preprocessing(image_size=SIDE, resize_size=36)


def pattern(width: int = SIDE, height: int = SIDE) -> Array:
    """uint8 [height, width, 3]: smooth enough for any codec, different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * x // max(width - 1, 1)
    green = 255 * y // max(height - 1, 1)
    blue = 40 + 160 * ((x // 5 + y // 7) % 2)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def sample(width: int = SIDE, height: int = SIDE, mode: str = "RGB") -> Image.Image:
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
    image.copy().save(content, kind, **options)  # a copy: saving leaves traces in an image
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
    """A small image in every format and layout that is read and can be made here."""
    rgb, rgba, grey, palette = (sample(24, 20, mode) for mode in ("RGB", "RGBA", "L", "P"))
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
        "pbm": encoded(sample(24, 20, "1"), "PPM"),
        "pgm 16": encoded(deep, "PPM"),
        "heic": heic(rgb),
        "heic alpha": heic(rgba),
        "heic grey": heic(grey),
    }
    if features.check("libtiff"):
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
            files[compression] = encoded(rgb, "TIFF", compression=compression)
        files["group4"] = encoded(sample(24, 20, "1"), "TIFF", compression="group4")
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


def torchvision_pixels(image: Image.Image, resize: int = 256, crop: int = 224) -> Array:
    """What torchvision's evaluation transform makes of an RGB image, before normalising."""
    from torchvision.transforms import CenterCrop, Resize

    return np.asarray(CenterCrop(crop)(Resize(resize)(image))).astype(int)


def assert_alike(ours: Array, reference: Array) -> None:
    """Within one grey level; small inputs have ties in both passes, which may add up to two."""
    difference = np.abs(ours - reference)
    assert difference.max() <= 2
    assert (difference > 1).mean() <= 0.001


def on_white(image: Image.Image) -> npt.NDArray[np.uint8]:
    values = np.asarray(image.convert("RGBA")).astype(float)
    alpha = values[..., 3:] / 255
    return np.rint(values[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


EVERY_16_BITS = (np.arange(SIDE * SIDE, dtype=np.uint32) * 64 + 31).reshape(SIDE, SIDE)


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif
