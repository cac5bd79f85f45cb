"""Decide from a JPEG's header whether a GPU decodes it.

All other files go to the CPU, and so does every JPEG with something unusual in its header:
the CPU's result is known, and a row must not depend on a GPU's driver.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL.ImageCms import ImageCmsTransform

from r2ncli.images.colour import conversion
from r2ncli.images.decode import header_rules
from r2ncli.images.rules import DecodeRules


@dataclass(frozen=True)
class Jpeg:
    """A JPEG that a GPU decodes.

    Attributes
    ----------
    content : bytes
        The file.
    encoded : bytes
        The file without EXIF, so that the decoder does not turn the image.
    size : tuple of int
        Width and height as stored.
    grey : bool
        Whether it is greyscale.
    orientation : int
        The EXIF orientation.
    to_srgb : ImageCmsTransform or None
        The transform of the resized pixels to sRGB.
    """

    content: bytes
    encoded: bytes
    size: tuple[int, int]
    grey: bool
    orientation: int
    to_srgb: ImageCmsTransform | None


def for_gpu(content: bytes, rules: DecodeRules) -> Jpeg | None:
    """The JPEG that a GPU decodes, or None if `content` is for the CPU.

    A GPU decodes baseline JPEGs (8 bits, Huffman, one scan) that are greyscale or YCbCr with
    4:4:4, 4:2:2, 4:4:0 or 4:2:0 sampling, end with their end marker, and are within `rules` and
    16384 pixels a side. Progressive JPEGs go to the CPU: nvJPEG decodes most of each on the CPU
    too, one image after the other, while r2n's decode threads work in parallel.
    """
    if content[:2] != b"\xff\xd8" or content[-2:] != b"\xff\xd9":
        return None
    segments = _segments(content)
    if not _NEEDED <= segments.keys() <= _USUAL or len(segments[_SOF0]) > 1:
        return None
    frame, scan = (content[slice(*segments[marker][0])] for marker in (_SOF0, _SOS))
    adobe = [content[start:end] for start, end in segments.get(_APP14, ())]
    size = _size(frame, scan, adobe)
    if size is None or not _fits(size, rules):
        return None
    grey = frame[5] == 1
    metadata = [content[start:end] for start, end in segments.get(_APP1, ())]
    profiles = [part for part in segments.get(_APP2, ()) if content.startswith(_PROFILE, part[0])]
    orientation, to_srgb = 1, None
    if _may_be_turned(metadata) or len(profiles) > 1:
        try:
            orientation, to_srgb = header_rules(content)
        except Exception:  # a corrupted header can raise anything; the CPU reports it
            return None
    elif profiles:
        start, end = profiles[0]
        if content[start + 13 : start + 14] != b"\1" or start > segments[_SOF0][0][0]:
            return None  # a part of a profile whose other parts are missing
        mode = "L" if grey else "RGB"
        to_srgb = conversion(content[start + 14 : end], mode, mode)
    encoded = content
    for start, end in reversed(segments.get(_APP1, ())):
        encoded = encoded[: start - 4] + encoded[end:]
    return Jpeg(content, encoded, size, grey, orientation, to_srgb)


_SOF0, _DHT, _SOS, _DQT, _DRI, _COM = 0xC0, 0xC4, 0xDA, 0xDB, 0xDD, 0xFE
_APP1, _APP2, _APP14 = 0xE1, 0xE2, 0xEE
_PROFILE = b"ICC_PROFILE\0"  # then this part's number and the number of parts
_NEEDED = {_SOF0, _DHT, _DQT, _SOS}
_USUAL = {*_NEEDED, _DRI, _COM, *range(0xE0, 0xF0)}

_MOST_A_SIDE = 16384
_MOST_PIXELS = 1 << 26  # 192 MB as RGB, so that offsets fit into 32 bits
_MOST_TIMES_AS_HIGH = 100  # Pillow 12.2 resizes higher images in two steps


def _segments(content: bytes) -> dict[int, list[tuple[int, int]]]:
    """The start and end of each segment up to the first scan's header, by its marker."""
    segments: dict[int, list[tuple[int, int]]] = {}
    at, last, marker = 2, len(content) - 4, 0
    while at < last and content[at] == 0xFF and marker != _SOS:
        marker = content[at + 1]
        start, at = at + 4, at + 2 + (content[at + 2] << 8 | content[at + 3])
        segments.setdefault(marker if start <= at else 0, []).append((start, at))
    return segments


def _may_be_turned(metadata: list[bytes]) -> bool:
    """Whether EXIF or XMP may hold an orientation other than 1.

    A fast byte search. It may report an orientation that is not there but never misses one.
    """
    if sum(held.startswith(b"Exif") for held in metadata) > 1:  # EXIF in two parts
        return True
    return any(
        held.count(tag) != sum(held.count(tag + upright) for upright in uprights)
        for held in metadata
        for tag, uprights in _ORIENTATION.items()
    )


_ORIENTATION = {  # its first bytes in big-endian EXIF, little-endian EXIF and XMP; then those of 1
    b"\1\x12": (b"\0\3\0\0\0\1\0\1",),
    b"\x12\1": (b"\3\0\1\0\0\0\1\0",),
    b"tiff:Orientation": (b'="1"', b">1<"),
}


def _size(frame: bytes, scan: bytes, adobe: list[bytes]) -> tuple[int, int] | None:
    """Width and height of a frame with a single scan, or None if a GPU does not decode it."""
    if len(frame) < 6 or len(frame) != 6 + 3 * frame[5] or frame[0] != 8:
        return None
    height, width, components = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5]), frame[5]
    if not scan or scan[0] != components or len(scan) != 4 + 2 * components:
        return None
    sampling = tuple(frame[7::3])
    if components == 1:
        return (width, height) if sampling == (0x11,) else None
    # three components that all of libjpeg's rules take for YCbCr
    if components != 3 or frame[6::3] == b"RGB":
        return None
    if any(len(block) < 12 or block[:5] != b"Adobe" or block[11] != 1 for block in adobe):
        return None
    return (width, height) if sampling in _SAMPLINGS else None


_SAMPLINGS = {(luma, 0x11, 0x11) for luma in (0x11, 0x21, 0x12, 0x22)}


def _fits(size: tuple[int, int], rules: DecodeRules) -> bool:
    width, height = size
    return (
        0 < width <= _MOST_A_SIDE
        and 0 < height <= _MOST_A_SIDE
        and height <= _MOST_TIMES_AS_HIGH * width
        and width * height <= min(rules.max_pixels, _MOST_PIXELS)
    )
