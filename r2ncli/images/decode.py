"""Decode the bytes of an image to the network's input pixels.

The rules below decide the pixels. Whoever changes one raises the version in `DecodeRules`.

- The content of a file decides its format, not its suffix.
- EXIF orientation is applied; for HEIC, the orientation in its container, as its standard says.
- Of an animation, a multipage TIFF or an MPO the first frame is decoded, of a HEIC its primary
  image.
- Transparency is composited on white; palettes, greyscale and CMYK become RGB. CMYK without a
  profile is inverted ink.
- Colours are converted to sRGB: an embedded ICC profile is applied to the resized pixels, in
  the image's own colour space (RGB, greyscale, CMYK) and in eight bits, whatever its depth.
  The intent is relative colorimetric with black point compensation. A corrupted profile, one
  of another colour space, those of BMP, GIF and JPEG 2000, which Pillow does not read, and
  colours declared without a profile (PNG's gAMA and cHRM, EXIF's tags, the code points of AVIF
  and HEIC) are ignored.
- 16 bits: greyscale is v / 257, rounded; colour is the high byte, as Pillow reads it. The
  depth that the file declares decides (a TIFF may have 12 bits), never the image's values.
- 32-bit integers and floats declare no range: white is the smallest of 1 (floats only), 255
  and 65535 that is not less than any value. Larger values, negative ones and NaN are errors,
  and so is colour of 32 bits, which Pillow cannot open.
- The crop is resized in one step out of the whole image (`Image.resize(box=...)`, bilinear,
  antialiased): by default the centre 224 x 224 of a short side of 256. The pixels equal those
  of resizing first and cropping then, without the cost of resizing an image of 65,000 x 2 as a
  whole. With ``decode="exact"`` they are within one grey level of torchvision's transforms.
- With ``decode="auto"`` a JPEG whose short side is at least four times the resize target is
  decoded at 1/2, 1/4 or 1/8 of its size, never below twice that target.

A file that ends before its image data does is an error. Corruption that leaves something to
decode is not seen: inside a JPEG, which its decoder repairs, in formats without checksums, which
are most, and in a plain-text PNM that is cut inside its last number.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin
from PIL.Image import Resampling

from r2ncli.architectures import Preprocessing
from r2ncli.errors import ImageError
from r2ncli.images.colour import conversion, opaque
from r2ncli.images.decoders import DECODERS, Codec
from r2ncli.images.geometry import exif_orientation, stored_box, turned_upright
from r2ncli.images.rules import DecodeRules as DecodeRules

Pixels = npt.NDArray[np.uint8]


def decode(content: bytes, preprocessing: Preprocessing, rules: DecodeRules) -> Pixels:
    """Decode a file of any format in `images.decoders` to the network's input.

    Returns
    -------
    uint8 array [image_size, image_size, 3]
        RGB, C-contiguous.

    Raises
    ------
    ImageError
        The file is not an image, is truncated or corrupted, or is larger than `rules` allow.
    """
    try:
        return _decode(content, preprocessing, rules)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("cannot be decoded: not enough memory") from error
    except Exception as error:  # a corrupted file can make Pillow raise anything
        raise ImageError(f"cannot be decoded: {_in_words(error)}") from error


def _in_words(error: object) -> str:
    """Return an error's message on one line, without the memory addresses of objects."""
    text = re.sub(r"<?\S*( object)? at 0x[0-9a-f]+>?", "", str(error)) or type(error).__name__
    return " ".join(text.split())


def _decode(content: bytes, preprocessing: Preprocessing, rules: DecodeRules) -> Pixels:
    image, codec = _open(content)
    with image:
        width, height = image.size
        if width * height > rules.max_pixels:
            limit = f"more than the limit of {rules.max_pixels:,}"
            raise ImageError(f"{width} x {height} pixels, {limit}")
        scale = _reduce(image, preprocessing) if rules.decode == "auto" else 1
        codec.load(image, content)
        orientation = exif_orientation(image)  # after loading, where Pillow turns a TIFF upright
        if scale == 1:
            width, height = image.size
        stored = opaque(image)
        to_srgb = conversion(image.info.get("icc_profile"), image.mode, stored.mode)
    if to_srgb is None and stored.mode == "CMYK":
        stored = stored.convert("RGB")
    # computed at full size and then scaled: the reduced size is rounded up
    box = stored_box((width, height), orientation, preprocessing)
    left, top, right, bottom = (edge / scale for edge in box)
    square = (preprocessing.image_size, preprocessing.image_size)
    resized = stored.resize(square, Resampling.BILINEAR, box=(left, top, right, bottom))
    rgb = resized.convert("RGB") if to_srgb is None else to_srgb.apply(resized)
    return np.asarray(turned_upright(rgb, orientation))


def _open(content: bytes) -> tuple[Image.Image, Codec]:
    """Read an image's header with the first decoder that accepts the file."""
    head = content[:128].ljust(16, b"\0")  # decoders read these bytes without checking the length
    unavailable = None
    for decoder in DECODERS:
        codec = decoder.codec
        if not (answer := codec.accept(head)):
            continue
        if isinstance(answer, str):
            unavailable = answer
            continue
        try:
            return codec.open(content), codec
        except ImportError as error:
            if decoder.package is None:
                raise
            raise ImageError(f"{decoder.name} support is not installed: {decoder.hint}") from error
        except (SyntaxError, IndexError, TypeError, KeyError, EOFError) as error:
            corrupted = f"corrupted {decoder.name} ({_in_words(error)})"
            raise ImageError(f"cannot be decoded: {corrupted}") from error
    if unavailable:
        raise ImageError(f"cannot be decoded: {unavailable}")
    if head.lstrip()[:1] == b"<":
        raise ImageError("not an image: a web page or other markup")
    raise ImageError("not an image of a known format")


def _reduce(image: Image.Image, preprocessing: Preprocessing) -> int:
    """Have a large JPEG decoded at 1/2, 1/4 or 1/8 of its size, and return the divisor.

    libjpeg reduces in its inverse cosine transform, at a fraction of the work. The reduced
    short side is at least twice the size that it is resized to, so that the antialiased
    resize still has two pixels for each of its own.
    """
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return 1
    width, height = image.size
    least = 2 * max(preprocessing.resize_size, preprocessing.image_size)
    for scale in (8, 4, 2):
        if min(width, height) >= scale * least:
            image.draft(None, (width // scale, height // scale))
            return scale
    return 1
