"""The bytes of a picture become the network's input pixels. Every decode rule is here.

- EXIF orientation is applied, in a HEIC its container's; an animation gives its first frame.
- Transparency is composited on white; palettes, greyscale and CMYK become RGB.
- Colours are sRGB: an embedded ICC profile is applied to the resized pixels, in the
  picture's own colour space (RGB, greyscale, CMYK) and in eight bits, whatever the depth was.
  A profile that is damaged or of another colour space is ignored, and so are colours that are
  declared without one (PNG's gAMA, EXIF's tags).
- 16 bits: greyscale is v / 257, rounded; colour is the high byte, as Pillow reads it. The
  file's declared depth decides (a TIFF's may be 12 bits), never the values of the picture.
- 32-bit integers and floats declare no range: the smallest of 1 (floats only), 255 and
  65535 that holds the values is taken for white.
- The crop is resized in one step out of the whole picture (`Image.resize(box=...)`,
  bilinear, antialiased): the same pixels as resize-then-crop, at no cost for a picture of
  65,000 x 2.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from io import BytesIO
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    IcoImagePlugin,
    Image,
    ImageCms,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    _imaging,
)
from PIL.Image import Resampling, Transpose
from PIL.ImageFile import ImageFile

from r2ncli.architectures import Preprocessing
from r2ncli.errors import ImageError
from r2ncli.sources.selection import MAX_BYTES

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 200_000_000


@dataclass(frozen=True)
class DecodeRules:
    """What is decoded, and how far: part of a run's fingerprint.

    Attributes
    ----------
    decode : str
        ``exact``: every pixel as Pillow decodes it at full size; ``auto``: a JPEG that is much
        larger than what the network sees is decoded at 1/2, 1/4 or 1/8 of its size; ``gpu``:
        JPEGs that a card decodes are decoded there (see `jpegs`), the others as ``exact``.
    max_pixels, max_bytes : int
        A picture, or a file, beyond it is a failed row.
    frame, orientation, alpha, profile, depth, resize : str
        What this module does, in words: a text changes when its rule does, so that a run
        under another rule is not taken for the same.
    """

    decode: str = "exact"
    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES
    frame: str = field(default="first; HEIF primary", init=False)
    orientation: str = field(default="EXIF; HEIF container", init=False)
    alpha: str = field(default="on white", init=False)
    profile: str = field(
        default="ICC to sRGB after resize; relative colorimetric; black point compensation",
        init=False,
    )
    depth: str = field(
        default="16 bits: grey v/257, colour v//256; 32 bits: 1 (float), 255 or 65535 is white",
        init=False,
    )
    resize: str = field(default="bilinear, antialiased, of the crop", init=False)


def decode(content: bytes, preprocessing: Preprocessing, rules: DecodeRules) -> Pixels:
    """The network's input for one encoded picture.

    Parameters
    ----------
    content : bytes
        An encoded picture of any kind that this module reads.

    Returns
    -------
    uint8 array [image_size, image_size, 3]
        RGB.

    Raises
    ------
    ImageError
        The bytes are no picture, end early, are damaged, or are beyond `rules`.
    """
    try:
        return _decode(content, preprocessing, rules)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("cannot be decoded: not enough memory") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
        text = re.sub(r"<?\S*( object)? at 0x[0-9a-f]+>?", "", str(error)) or type(error).__name__
        raise ImageError(f"cannot be decoded: {' '.join(text.split())}") from error


def _decode(content: bytes, preprocessing: Preprocessing, rules: DecodeRules) -> Pixels:
    with _open(content) as image:
        width, height = image.size
        if width * height > rules.max_pixels:
            raise ImageError(
                f"{width} x {height} pixels, more than --max-pixels {rules.max_pixels:,}"
            )
        scale = _reduce(image, preprocessing) if rules.decode == "auto" else 1
        _load(image, content)
        orientation = _orientation(image)  # after loading: Pillow turns a TIFF by itself
        if scale == 1:
            width, height = image.size
        opaque = _opaque(image)
        to_srgb = conversion(image.info.get("icc_profile"), image.mode, opaque.mode)
    if to_srgb is None and opaque.mode == "CMYK":
        opaque = opaque.convert("RGB")
    # of the full size, then scaled: a box of the reduced one, which is rounded up, would be off
    box = stored_box((width, height), orientation, preprocessing)
    left, top, right, bottom = (edge / scale for edge in box)
    square = (preprocessing.image_size, preprocessing.image_size)
    resized = opaque.resize(square, Resampling.BILINEAR, box=(left, top, right, bottom))
    return finished(resized, orientation, to_srgb)


def finished(
    resized: Image.Image, orientation: int, to_srgb: ImageCms.ImageCmsTransform | None
) -> Pixels:
    """The network's input: a resized picture in sRGB, and upright."""
    rgb = resized.convert("RGB") if to_srgb is None else to_srgb.apply(resized)
    transpose = _UPRIGHT.get(orientation, (None, _as_it_is))[0]
    return np.asarray(rgb if transpose is None else rgb.transpose(transpose))


def header_rules(content: bytes) -> tuple[int, ImageCms.ImageCmsTransform | None]:
    """What the header of a greyscale or RGB picture asks for: its orientation, and its profile.

    Raises
    ------
    ImageError
        Its header cannot be read.
    """
    with _open(content) as image:
        profile = image.info.get("icc_profile")
        return _orientation(image), conversion(profile, image.mode, image.mode)


# --- open ---------------------------------------------------------------------------

_PLUGINS = (
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
    GifImagePlugin,
    BmpImagePlugin,
    TiffImagePlugin,
    AvifImagePlugin,
    Jpeg2KImagePlugin,
    IcoImagePlugin,
    PpmImagePlugin,
)  # importing one registers its formats
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF", "JPEG2000", "ICO", "PPM")


def _open(content: bytes) -> Image.Image:
    """As `Image.open`, for these formats and without its process-wide limit on pixels."""
    head = content[:128].ljust(16, b"\0")  # formats look at it without asking how long it is
    refused = None
    for name in _FORMATS:
        factory, accept = (
            (_heif_image, _is_heif) if name == "HEIF" else Image.OPEN.get(name, (None, None))
        )
        if factory is None or accept is None or not (answer := accept(head)):
            continue
        if isinstance(answer, str):  # a format that this Pillow was built without
            refused = answer
            continue
        if name == "JPEG":
            factory = JpegImagePlugin.JpegImageFile  # a broken table of an MPO's others is no harm
        try:
            try:
                return factory(BytesIO(content), "")
            except Image.DecompressionBombError:
                if name == "ICO":  # it is decoded while it is opened
                    raise
                with _without_pillows_limit:
                    return factory(BytesIO(content), "")
        except (SyntaxError, IndexError, TypeError, KeyError, EOFError) as error:
            if str(error) == "unknown pixel mode" and name == "TIFF":
                raise ImageError(
                    f"cannot be decoded: a TIFF of {_layout(content)}, which Pillow cannot open"
                ) from error
            reason = str(error) or type(error).__name__
            raise ImageError(f"cannot be decoded: a damaged {name} ({reason})") from error
    if refused:
        raise ImageError(f"cannot be decoded: {refused}")
    if head.lstrip()[:1] == b"<":
        raise ImageError("not an image: a web page or other markup")
    raise ImageError("not an image of a known format")


def _layout(content: bytes) -> str:
    """The samples of a TIFF's pixel, of which Pillow knows no such mode."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(content[: 16 if content[2] == 43 else 8])
    file = BytesIO(content)
    file.seek(tags.next)
    tags.load(file)
    samples, bits = tags.get(_SAMPLES, 1), tags.get(_BITS, (1,))
    numbers = "floats" if 3 in tags.get(_SAMPLE_FORMAT, (1,)) else "integers"
    return f"{samples} x {max(bits)} bits ({numbers})"


def _is_heif(head: bytes) -> bool:
    """Whether the brands of a file are HEIF's, and not those of AVIF, which is Pillow's."""
    if head[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(head[:4]), len(head))
    brands = {head[at : at + 4] for at in (8, *range(16, end, 4))}
    if head[8:12] in _AVIF_BRANDS or (brands & _AVIF_BRANDS and not brands & _HEVC_BRANDS):
        return False
    return bool(brands & (_HEVC_BRANDS | {b"mif1", b"msf1"}))


_AVIF_BRANDS = {b"avif", b"avis"}
_HEVC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}


def _heif_image(file: IO[bytes], name: str | bytes) -> ImageFile:
    """The primary image, which libheif turns upright by itself."""
    try:
        from pillow_heif import HeifImageFile  # an extra, and slow to import: when first met
    except ImportError as error:
        raise ImageError("HEIC is read by an extra: pip install 'r2ncli[heic]'") from error
    factory: Callable[[IO[bytes], str | bytes], ImageFile] = HeifImageFile
    return factory(file, name)


def _load(image: Image.Image, content: bytes) -> None:
    """Decode all of an opened picture."""
    if isinstance(image, Jpeg2KImagePlugin.Jpeg2KImageFile):
        end = content.rfind(b"\xff\xd9")
        if end < 0 or content.find(b"\xff\x90\x00\x0a", end) >= 0:
            # one that ends between two tiles would be decoded without the others
            raise ImageError("cannot be decoded: image file is truncated")
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        image.load()
        return
    _silence_libtiff()
    if image.width * image.height < _LARGE:
        image.load()
    else:
        with _without_pillows_limit:
            image.load()


def _reduce(image: Image.Image, preprocessing: Preprocessing) -> int:
    """Have an opened JPEG decoded at 1/2, 1/4 or 1/8 of its size, if that is enough; the divisor.

    libjpeg does so in its inverse cosine transform, at a fraction of the work. Enough is a
    short side of twice what it is resized to: the antialiased resize still has two pixels
    for each of its own.
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


class _PillowsLimit:
    """Pillow's own limit on pixels, one for the whole process, set aside in a `with` block.

    `Image.open` is not used here, but its formats look at the limit too: TIFF when it is
    loaded, WebP when it is opened.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limit: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1

    def __exit__(self, *_exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                Image.MAX_IMAGE_PIXELS = self._limit


_without_pillows_limit = _PillowsLimit()
_LARGE = 50_000_000  # pixels, less than Pillow's limit


@cache
def _silence_libtiff() -> None:
    """libtiff tells stderr what is wrong with a file; here its row says it."""
    try:
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)
    except (AttributeError, OSError):  # a Pillow that hides its libtiff, or has none
        return


# --- colour -------------------------------------------------------------------------


def _opaque(image: Image.Image) -> Image.Image:
    """The loaded picture in eight bits, without transparency, as RGB, L or CMYK."""
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
    """Greyscale of more than eight bits in eight."""
    values = np.asarray(image)
    white = _range_of(values, _declared_white(image))
    if white == 65535:
        grey = (values.astype(np.uint32) + 128) // 257
    else:
        grey = np.rint(values.astype(np.float64) * (255 / white))
    eight_bits = grey.astype(np.uint8)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0:
        eight_bits = 255 - eight_bits  # white is zero: of eight bits and fewer Pillow turns it
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        eight_bits[values == transparent] = 255
    return Image.fromarray(eight_bits)


_BITS, _PHOTOMETRIC, _SAMPLES, _SAMPLE_FORMAT = 258, 262, 277, 339  # tags of TIFF


def _declared_white(image: Image.Image) -> float | None:
    """The highest value of a file's depth; None for 32 bits, which say nothing of a range."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = int(image.tag_v2[_BITS][0])
        return 2.0**bits - 1 if bits <= 16 else None
    return None if image.mode == "F" else 65535.0  # a PGM of over 8 bits is scaled by Pillow


def _range_of(values: npt.NDArray[Any], declared: float | None) -> float:
    """What stands for white."""
    low, high = float(values.min()), float(values.max())
    if declared is not None:
        candidates = [declared]
    else:
        candidates = [1.0] * (values.dtype.kind == "f") + [255.0, 65535.0]
    for white in candidates:
        if low >= 0 and high <= white:  # false for NaN
            return white
    raise ImageError(f"values from {low:g} to {high:g}: outside 0 to {candidates[-1]:g}")


def conversion(profile: object, stored: str, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What brings resized pixels of `mode` to sRGB; None where there is nothing to do.

    It is applied after resizing, to image_size x image_size pixels: converting a phone's
    twelve million would take as long again as decoding them.
    """
    if stored == "LAB" or not isinstance(profile, bytes):  # LAB became RGB without a profile's help
        return None
    return _transform(profile, mode) if len(profile) <= _MAX_PROFILE_BYTES else None


_MAX_PROFILE_BYTES = 16_000_000  # several times a printing press's; what is cached is bounded


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """LittleCMS's transform; None for sRGB by any name, and for a profile that is damaged or
    of another colour space.

    Relative colorimetric with black point compensation, as photographers' tools convert for
    the web: colours that sRGB has stay what they are, and ink's black is black. A perceptual
    table would move them all, each maker's in another way. Profiles of a matrix and curves,
    which cameras and phones embed, know no other intent. LittleCMS takes the perceptual
    table where a profile has no colorimetric one.

    A transform may be used from many threads: LittleCMS keeps nothing in it.
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
    return transform if np.abs(moved).max() > 1 else None  # one grey level is rounding


# --- geometry -----------------------------------------------------------------------

Box = tuple[float, float, float, float]


def stored_box(size: tuple[int, int], orientation: int, preprocessing: Preprocessing) -> Box:
    """What the network sees of a picture stored with `size` (width, height): left to bottom."""
    upright = (size[1], size[0]) if orientation in _SIDEWAYS else size
    _, to_stored = _UPRIGHT.get(orientation, (None, _as_it_is))
    return to_stored(_crop_box(upright, preprocessing), upright)


def _crop_box(size: tuple[int, int], preprocessing: Preprocessing) -> Box:
    """The part of a picture of `size` (width, height) that the network sees."""
    width, height = size
    if preprocessing.crop == "none":
        return (0.0, 0.0, float(width), float(height))
    short, target, kept = min(size), preprocessing.resize_size, preprocessing.image_size
    if preprocessing.crop == "square":
        side = short * kept / target
        left, top = (width - side) / 2, (height - side) / 2
        return (left, top, left + side, top + side)
    # as torchvision: the resized long side rounded down, the margins to the nearest (ties to even)
    resized_width, resized_height = target * width // short, target * height // short
    left, top = round((resized_width - kept) / 2), round((resized_height - kept) / 2)
    x, y = width / resized_width, height / resized_height
    return (
        max(left * x, 0.0),
        max(top * y, 0.0),
        min((left + kept) * x, float(width)),
        min((top + kept) * y, float(height)),
    )


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a damaged EXIF block is no reason to refuse the pixels
        return 1


def _as_it_is(box: Box, _size: tuple[int, int]) -> Box:
    return box


# For each EXIF orientation: what turns the stored picture upright, and a box of the upright
# picture of size (w, h) in the stored one. Turning the small result costs nothing.
_UPRIGHT: dict[int, tuple[Transpose, Callable[[Box, tuple[int, int]], Box]]] = {
    2: (Transpose.FLIP_LEFT_RIGHT, lambda b, s: (s[0] - b[2], b[1], s[0] - b[0], b[3])),
    3: (Transpose.ROTATE_180, lambda b, s: (s[0] - b[2], s[1] - b[3], s[0] - b[0], s[1] - b[1])),
    4: (Transpose.FLIP_TOP_BOTTOM, lambda b, s: (b[0], s[1] - b[3], b[2], s[1] - b[1])),
    5: (Transpose.TRANSPOSE, lambda b, s: (b[1], b[0], b[3], b[2])),
    6: (Transpose.ROTATE_270, lambda b, s: (b[1], s[0] - b[2], b[3], s[0] - b[0])),
    7: (Transpose.TRANSVERSE, lambda b, s: (s[1] - b[3], s[0] - b[2], s[1] - b[1], s[0] - b[0])),
    8: (Transpose.ROTATE_90, lambda b, s: (s[1] - b[3], b[0], s[1] - b[1], b[2])),
}
_SIDEWAYS = (5, 6, 7, 8)
