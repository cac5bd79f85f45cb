"""Convert samples of any depth to eight bits, remove transparency, and convert colours to sRGB."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from r2ncli.errors import ImageError

Array = npt.NDArray[Any]


_ROWS = 256  # converted at once, to bound the memory


# --- depth --------------------------------------------------------------------------------


def unpacked(rows: Array, bits: int, count: int) -> Array:
    """Return samples of 1 to 15 bits that are packed from the highest bit of each byte.

    Parameters
    ----------
    rows : uint8 array [rows, bytes]
    bits : int
        Bits of a sample.
    count : int
        Samples in a row.

    Returns
    -------
    uint8 or uint16 array [rows, count]
    """
    if bits in (1, 2, 4):
        shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
        values = rows[:, :, None] >> shifts & np.uint8(2**bits - 1)
        return values.reshape(len(rows), -1)[:, :count]
    samples = np.zeros((len(rows), count), np.uint16)
    first = np.arange(count) * bits  # the position of a sample's first bit
    last = rows.shape[1] - 1
    for at in range(0, len(rows), _ROWS):
        block = rows[at : at + _ROWS].astype(np.uint32)
        window = block[:, first // 8] << 16
        window |= block[:, np.minimum(first // 8 + 1, last)] << 8
        window |= block[:, np.minimum(first // 8 + 2, last)]
        samples[at : at + _ROWS] = window >> (24 - bits - first % 8) & (2**bits - 1)
    return samples


def eight_bits(values: Array, white: float | None) -> npt.NDArray[np.uint8]:
    """Return samples in eight bits; `white` is the value that means white, if one is declared.

    Of 16 bits, greyscale ([height, width] or [height, width, 1]) is rounded, and colour is the high
    byte. Without a declared white it is the smallest usual one that holds all values.

    Raises
    ------
    ImageError
        A value is negative, not finite, or more than white.
    """
    if white is None or values.dtype.kind != "u":
        white = _white_of(values, white)
    if values.dtype == np.uint8 and white == 255:
        return values
    is_colour = values.shape[2:] not in ((), (1,))
    whole = np.empty(values.shape, np.uint8)
    for at in range(0, len(values), _ROWS):
        rows = values[at : at + _ROWS]
        if values.dtype == np.uint16 and white == 65535 and is_colour:
            whole[at : at + _ROWS] = rows >> 8
        elif values.dtype.kind != "f" and white == 65535:
            whole[at : at + _ROWS] = (rows.astype(np.uint32) + 128) // 257
        else:
            whole[at : at + _ROWS] = np.rint(rows * np.float64(255 / white))
    return whole


def _white_of(values: Array, declared: float | None) -> float:
    """Return the value that means white: the declared one, or the smallest usual one that fits."""
    low, high = float(values.min()), float(values.max())
    usual = [1.0] * (values.dtype.kind == "f") + [255.0, 65535.0]
    candidates = usual if declared is None else [declared]
    for white in candidates:
        if low >= 0 and high <= white:  # false for NaN
            return white
    raise ImageError(f"values from {low:g} to {high:g}: outside 0 to {candidates[-1]:g}")


# --- transparency -------------------------------------------------------------------------


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
    """Convert greyscale that Pillow holds in more than eight bits; it scales integers to 16."""
    values = np.asarray(image)
    grey = eight_bits(values, None if image.mode == "F" else 65535.0)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey)


# --- ICC profiles -------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion:
    """The transform of an image's colours to sRGB, and whether it comes before resizing.

    Converting the twelve million pixels of a phone's photo would take as long as decoding them, so
    that it is done after resizing, to image_size x image_size pixels, if the mean of two colours
    is nearly the same before and after. With the curves of inks, of old displays and of linear
    light, black lines on white would come out too dark or too light.
    """

    transform: ImageCms.ImageCmsTransform
    before_resizing: bool

    def apply(self, image: Image.Image) -> Image.Image:
        """Return an image in sRGB."""
        converted = self.transform.apply(image)
        assert converted is not None
        return converted


def conversion(profile: object, stored: str, mode: str) -> Conversion | None:
    """Return the conversion to sRGB, or None if none is needed.

    `stored` and `mode` are Pillow's modes of the file and of the pixels to convert. A profile that
    is not bytes is ignored.
    """
    if stored == "LAB" or not isinstance(profile, bytes):  # Pillow converts LAB without a profile
        return None
    return _conversion(profile, mode) if len(profile) <= _MAX_PROFILE_BYTES else None


_MAX_PROFILE_BYTES = 16_000_000  # several times the size of a printing profile; bounds the cache
_MOST_BENT = 4  # grey levels


@lru_cache(maxsize=16)
def _conversion(profile: bytes, mode: str) -> Conversion | None:
    """Return the conversion of a profile; the transforms of the latest profiles are kept."""
    transform = _transform(profile, mode)
    if transform is None:
        return None
    ramp = np.arange(256, dtype=np.uint8)
    if mode == "CMYK":
        zero = np.zeros_like(ramp)
        ramps = np.stack([np.stack([zero] * 3 + [ramp], -1), np.stack([ramp] * 3 + [zero], -1)])
    else:
        ramps = np.stack([ramp] * len(mode), -1).reshape(1, 256, -1)
    converted = transform.apply(Image.frombytes(mode, (256, len(ramps)), ramps.tobytes()))
    levels = np.asarray(converted).astype(float)
    straight = np.linspace(levels[:, 0], levels[:, -1], 256, axis=1)
    bent = np.abs(levels - straight).mean((1, 2)).max()
    return Conversion(transform, bool(bent > _MOST_BENT))


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
