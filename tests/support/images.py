"""Images made of integers, in every format that is read and can be made here."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pillow_heif
from PIL import Image, features

Array = npt.NDArray[Any]

SIDE = 32


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
    image.copy().save(content, kind, **options)  # a copy: saving leaves traces in an image
    return content.getvalue()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def heic(image: Image.Image, **options: Any) -> bytes:
    content = io.BytesIO()
    pillow_heif.from_pillow(image.copy()).save(content, **options)
    return content.getvalue()


def run_length_bmp() -> bytes:
    """A BMP of 32 x 32 in runs of one colour a row, which Pillow reads and does not write."""
    palette = b"".join(bytes([3 * i, 2 * i, i, 0]) for i in range(64)) + bytes(4 * 192)
    rows = b"".join(bytes([16, y, 16, y + 8, 0, 0]) for y in range(SIDE)) + b"\0\1"
    start = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + palette + rows


def files_of_every_format() -> dict[str, bytes]:
    """A small image in every format and layout that is read and can be made here."""
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
