"""Convert loaded images to eight bits without transparency, and resized pixels to sRGB."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import TiffImageFile

from r2ncli.errors import ImageError
from r2ncli.images.tiff import declared_bits, white_is_zero


def opaque(image: Image.Image) -> Image.Image:
    """Return a loaded image in eight bits, composited on white, in mode RGB, L or CMYK."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _greyscale(image)
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        colours = image.convert("LA" if grey else "RGBA")
        white = Image.new("L" if grey else "RGB", image.size, "white")
        white.paste(colours, mask=colours.getchannel("A"))
        return white
    mode = "L" if grey else "CMYK" if image.mode == "CMYK" else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _greyscale(image: Image.Image) -> Image.Image:
    """Convert greyscale of more than eight bits to eight."""
    values = np.asarray(image)
    white = _range_of(values, _declared_white(image))
    if white == 65535:
        grey = (values.astype(np.uint32) + 128) // 257
    else:
        grey = np.rint(values.astype(np.float64) * (255 / white))
    eight_bits = grey.astype(np.uint8)
    if isinstance(image, TiffImageFile) and white_is_zero(image):
        eight_bits = 255 - eight_bits
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        eight_bits[values == transparent] = 255
    return Image.fromarray(eight_bits)


def _declared_white(image: Image.Image) -> float | None:
    """Return the highest value of the declared depth; None for 32 bits, which declare no range."""
    if isinstance(image, TiffImageFile):
        bits = declared_bits(image)
        return 2.0**bits - 1 if bits <= 16 else None
    return None if image.mode == "F" else 65535.0  # Pillow scales a PGM of more than 8 bits


def _range_of(values: npt.NDArray[Any], declared: float | None) -> float:
    """Return the value that means white: the declared one, or the smallest usual one that fits."""
    low, high = float(values.min()), float(values.max())
    usual = [1.0] * (values.dtype.kind == "f") + [255.0, 65535.0]
    candidates = usual if declared is None else [declared]
    for white in candidates:
        if low >= 0 and high <= white:  # false for NaN
            return white
    raise ImageError(f"values from {low:g} to {high:g}: outside 0 to {candidates[-1]:g}")


def conversion(profile: object, stored: str, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of resized pixels to sRGB, or None if they need none.

    It is applied after resizing, to image_size x image_size pixels: converting the twelve
    million pixels of a phone's photo would take as long as decoding them. `stored` and `mode`
    are Pillow's modes of the file and of the resized pixels. A profile that is not bytes is
    ignored.
    """
    if stored == "LAB" or not isinstance(profile, bytes):  # Pillow converts LAB without a profile
        return None
    return _transform(profile, mode) if len(profile) <= _MAX_PROFILE_BYTES else None


_MAX_PROFILE_BYTES = 16_000_000  # several times the size of a printing profile; bounds the cache


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return LittleCMS's transform of a profile to sRGB.

    None if the profile is that of sRGB, is corrupted, or is of another colour space.

    The intent is relative colorimetric with black point compensation, as photo editors export
    for the web: colours inside sRGB are unchanged, and black ink becomes black. A perceptual
    table would change all colours, differently for each vendor. Profiles of a matrix and
    curves, which cameras and phones embed, have no other intent. LittleCMS uses the perceptual
    table if a profile has no colorimetric one.

    Threads may share a transform: LittleCMS stores no state in it.
    """
    try:
        transform = ImageCms.ImageCmsTransform(
            ImageCms.ImageCmsProfile(BytesIO(profile)),
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ValueError):
        return None
    if mode == "CMYK":
        return transform
    cube = np.indices((18, 18, 18), np.uint8).reshape(3, 18, -1) * np.uint8(15)
    probe = Image.fromarray(cube.transpose(1, 2, 0).copy()).convert(mode)
    moved = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    return transform if np.abs(moved).max() > 1 else None  # a difference of one is rounding
