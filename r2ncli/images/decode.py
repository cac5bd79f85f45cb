"""Decode the bytes of an image to the network's input pixels.

The rules below decide the pixels. Whoever changes one raises the version in `DecodeRules`.

- The content of a file decides its format, not its suffix.
- EXIF orientation is applied, or that of XMP where EXIF has none; for HEIC, the orientation in its
  container, as its standard says. The clean aperture of HEIC and AVIF is applied.
- Of an animation or an MPO the first frame is decoded, of a HEIC its primary image, of a TIFF the
  first page that is not a thumbnail or a mask of another, of an icon the largest image with the
  most colours.
- Transparency is composited on white, and so is the canvas of a GIF outside its first frame.
  Palettes, greyscale and CMYK become RGB. CMYK without a profile is inverted ink. A transparent
  colour of a PNG is compared in its full depth. Alpha that is 0 everywhere is none in BMP and ICO,
  and in a TIFF that does not say that its fourth sample is alpha.
- Colours are converted to sRGB: an embedded ICC profile is applied in the image's own colour space
  (RGB, greyscale, CMYK) and in eight bits, whatever its depth; to the resized pixels, but to the
  whole image before resizing if the curves of the profile are far from those of sRGB. The intent is
  relative colorimetric with black point compensation. A corrupted profile, one of another colour
  space, those of BMP and GIF, and colours declared without a profile (PNG's gAMA and cHRM,
  EXIF's tags, the code points of AVIF and HEIC) are ignored.
- Fewer than eight bits are scaled to eight. 16 bits: greyscale is v / 257, rounded; colour is the
  high byte. The depth that the file declares decides (a TIFF may have 12 bits), never the image's
  values. White of signed integers is their highest value; negative values are errors.
- 32-bit integers and floats declare no range: white is the smallest of 1 (floats only), 255
  and 65535 that is not less than any value. Larger values, negative ones and NaN are errors.
- The crop is resized in one step out of the whole image (`Image.resize(box=...)`, bilinear,
  antialiased): by default the centre 224 x 224 of a short side of 256. The pixels equal those
  of resizing first and cropping then, without the cost of resizing an image of 65,000 x 2 as a
  whole. With ``decode="exact"`` they are within one grey level of torchvision's transforms.
- With ``decode="auto"`` a JPEG whose short side is at least four times the resize target is
  decoded at 1/2, 1/4 or 1/8 of its size, never below twice that target.

A file that ends before its image data does is an error; one that lacks only what no pixel needs, as
an end marker, is whole. Metadata never costs the image: text, EXIF, XMP and profiles of any size,
number and checksum; what is corrupted of them counts as absent. What a decoder lacks is an error
that names it. So is work without bounds: scans, tiles and packets beyond those of real images.

Corruption that leaves something to decode is not seen: inside a JPEG, which its decoder repairs, in
formats without checksums, which are most, and in a plain-text PNM that is cut inside its last
number.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin
from PIL.Image import Resampling, Transpose

from r2ncli.architectures import Preprocessing
from r2ncli.errors import ImageError
from r2ncli.images.colour import conversion, opaque
from r2ncli.images.decoders import DECODERS, Codec
from r2ncli.images.decoders import DecodeRules as DecodeRules

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]


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
        image = codec.load(image, content)
        orientation = exif_orientation(image)
        if scale == 1:
            width, height = image.size
        stored = opaque(image)
        to_srgb = conversion(image.info.get("icc_profile"), image.mode, stored.mode)
    if to_srgb and to_srgb.before_resizing:
        stored, to_srgb = to_srgb.apply(stored), None
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


# --- the part that the network sees, and orientation ------------------------------------


def stored_box(size: tuple[int, int], orientation: int, preprocessing: Preprocessing) -> Box:
    """Return the box (left, top, right, bottom) that the network sees of an image as stored.

    `size` is (width, height), before the image is turned upright.
    """
    upright = (size[1], size[0]) if orientation in _SIDEWAYS else size
    _, to_stored = _UPRIGHT.get(orientation, _UPRIGHT[1])
    return to_stored(_crop_box(upright, preprocessing), upright)


def _crop_box(size: tuple[int, int], preprocessing: Preprocessing) -> Box:
    """Return the box that the network sees of an upright image of `size` (width, height)."""
    width, height = size
    if preprocessing.crop == "none":
        return (0.0, 0.0, float(width), float(height))
    short, target, kept = min(size), preprocessing.resize_size, preprocessing.image_size
    if preprocessing.crop == "square":
        side = short * kept / target
        left, top = (width - side) / 2, (height - side) / 2
        return (left, top, left + side, top + side)
    # as torchvision: the long side is rounded down, the margins to the nearest (ties to even)
    resized_width, resized_height = target * width // short, target * height // short
    left, top = round((resized_width - kept) / 2), round((resized_height - kept) / 2)
    x, y = width / resized_width, height / resized_height
    return (
        max(left * x, 0.0),
        max(top * y, 0.0),
        min((left + kept) * x, float(width)),
        min((top + kept) * y, float(height)),
    )


def exif_orientation(image: Image.Image) -> int:
    """Return the orientation in an image's EXIF; 1 (upright) if none can be read."""
    try:
        value = image.getexif().get(0x0112, 1)
        return value[0] if isinstance(value, bytes) else int(value)  # stored as a byte
    except Exception:  # the pixels of an image with corrupted EXIF are intact
        return 1


def turned_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return the image turned upright, given its EXIF orientation."""
    transpose, _ = _UPRIGHT.get(orientation, _UPRIGHT[1])
    return image if transpose is None else image.transpose(transpose)


# For each EXIF orientation: the transposition that turns the stored image upright, and the
# function from a box of the upright image of size (w, h) to the box in the stored image.
# Only the small result is turned, not the whole image. Unknown orientations count as 1.
_UPRIGHT: dict[int, tuple[Transpose | None, Callable[[Box, tuple[int, int]], Box]]] = {
    1: (None, lambda b, s: b),
    2: (Transpose.FLIP_LEFT_RIGHT, lambda b, s: (s[0] - b[2], b[1], s[0] - b[0], b[3])),
    3: (Transpose.ROTATE_180, lambda b, s: (s[0] - b[2], s[1] - b[3], s[0] - b[0], s[1] - b[1])),
    4: (Transpose.FLIP_TOP_BOTTOM, lambda b, s: (b[0], s[1] - b[3], b[2], s[1] - b[1])),
    5: (Transpose.TRANSPOSE, lambda b, s: (b[1], b[0], b[3], b[2])),
    6: (Transpose.ROTATE_270, lambda b, s: (b[1], s[0] - b[2], b[3], s[0] - b[0])),
    7: (Transpose.TRANSVERSE, lambda b, s: (s[1] - b[3], s[0] - b[2], s[1] - b[1], s[0] - b[0])),
    8: (Transpose.ROTATE_90, lambda b, s: (s[1] - b[3], b[0], s[1] - b[1], b[2])),
}
_SIDEWAYS = (5, 6, 7, 8)
