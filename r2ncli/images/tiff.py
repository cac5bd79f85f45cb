"""TIFF: the depth that it declares, libtiff's messages, and Pillow's limit on pixels."""

from __future__ import annotations

import ctypes
from functools import cache
from io import BytesIO

from PIL import Image, TiffImagePlugin, _imaging

from r2ncli.errors import ImageError
from r2ncli.images.decoders import Codec
from r2ncli.images.pillow import registered, without_pillows_limit

_LARGE = 50_000_000  # pixels, less than Pillow's limit
_BITS, _PHOTOMETRIC, _SAMPLES, _SAMPLE_FORMAT = 258, 262, 277, 339  # tags

_PILLOWS = registered("TIFF", "TiffImagePlugin")


def _open(content: bytes) -> Image.Image:
    """Open a TIFF; if Pillow does not know the layout, the error names it."""
    try:
        return _PILLOWS.open(content)
    except SyntaxError as error:
        if str(error) != "unknown pixel mode":
            raise
        raise ImageError(
            f"cannot be decoded: a TIFF of {_layout(content)}, which Pillow cannot open"
        ) from error


def _layout(content: bytes) -> str:
    """Return the number, depth and kind of a pixel's samples, in words."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(content[: 16 if content[2] == 43 else 8])
    file = BytesIO(content)
    file.seek(tags.next)
    tags.load(file)
    samples, bits = tags.get(_SAMPLES, 1), tags.get(_BITS, (1,))
    numbers = "floats" if 3 in tags.get(_SAMPLE_FORMAT, (1,)) else "integers"
    return f"{samples} x {max(bits)} bits ({numbers})"


def _load(image: Image.Image, _content: bytes) -> None:
    """Decode the pixels of an opened TIFF; Pillow turns it upright."""
    _silence_libtiff()
    if image.width * image.height < _LARGE:
        image.load()
    else:
        with without_pillows_limit:
            image.load()


@cache
def _silence_libtiff() -> None:
    """Keep libtiff from writing errors to stderr; they are in the row of the image."""
    try:
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)
    except (AttributeError, OSError):  # this Pillow hides its libtiff, or has none
        return


def declared_bits(image: TiffImagePlugin.TiffImageFile) -> int:
    """Return the bits of a sample, as the header declares them."""
    return int(image.tag_v2[_BITS][0])


def white_is_zero(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Return whether 0 means white. Pillow inverts such an image only up to eight bits."""
    return image.tag_v2.get(_PHOTOMETRIC) == 0


TIFF = Codec(_PILLOWS.accept, _open, _load)
