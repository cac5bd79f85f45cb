"""Which JPEGs a card decodes: by the format that their header declares, and by nothing else.

The others go to the CPU, and so does every file with something unusual in its header: what
is right there is known, and a row must not depend on what a card's driver makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL.ImageCms import ImageCmsTransform

from r2ncli.images import DecodeRules, header_rules


@dataclass(frozen=True)
class Jpeg:
    """A JPEG for a card.

    Attributes
    ----------
    content : bytes
        The file.
    encoded : bytearray
        The file without EXIF, by which a decoder would turn the picture.
    size : tuple of int
        Width and height as stored.
    grey : bool
        Greyscale.
    orientation : int
        EXIF's.
    to_srgb : ImageCmsTransform or None
        What its profile asks for, after resizing.
    """

    content: bytes
    encoded: bytearray
    size: tuple[int, int]
    grey: bool
    orientation: int
    to_srgb: ImageCmsTransform | None


def for_card(content: bytes, rules: DecodeRules) -> Jpeg | None:
    """The JPEG that a card decodes, or None where `content` is for the CPU.

    A card takes baseline JPEGs (8 bits, Huffman, one scan), greyscale or YCbCr of 4:4:4,
    4:2:2, 4:4:0 or 4:2:0, that end with their end marker, within `rules` and 16384 pixels a
    side. Progressive ones are the CPU's: nvJPEG decodes most of each there too, one after
    the other, where the decode threads do it side by side.
    """
    if content[:2] != b"\xff\xd8" or content[-2:] != b"\xff\xd9":
        return None
    marked = _segments(content)
    if marked is None:
        return None
    segments, scan = marked
    frames = [content[start:end] for marker, start, end in segments if marker == _SOF0]
    adobe = [content[start:end] for marker, start, end in segments if marker == _APP14]
    if len(frames) != 1 or not {_DQT, _DHT} <= {marker for marker, _, _ in segments}:
        return None
    size = _size(frames[0], scan, adobe)
    if size is None or not _fits(size, rules):
        return None
    exif = [(start - 4, end) for marker, start, end in segments if marker == _APP1]
    encoded = bytearray(content)
    for start, end in reversed(exif):
        del encoded[start:end]
    orientation, to_srgb = 1, None
    if exif or any(_is_profile(content, *segment) for segment in segments):
        try:
            orientation, to_srgb = header_rules(content)
        except Exception:  # Pillow raises whatever a damaged header makes it: the CPU says so
            return None
    grey = frames[0][5] == 1
    return Jpeg(content, encoded, size, grey, orientation, to_srgb)


_SOF0, _DHT, _SOS, _DQT, _DRI, _COM = 0xC0, 0xC4, 0xDA, 0xDB, 0xDD, 0xFE
_APPLICATION = range(0xE0, 0xF0)
_APP1, _APP2, _APP14 = 0xE1, 0xE2, 0xEE

_MOST_A_SIDE = 16384
_MOST_PIXELS = 1 << 26  # 192 MB as RGB: offsets in it fit into 32 bits
_MOST_TIMES_AS_HIGH = 100  # Pillow 12.2 resizes what is higher in two steps

Segment = tuple[int, int, int]  # marker, start and end of what it holds


def _segments(content: bytes) -> tuple[list[Segment], bytes] | None:
    """The segments before the first scan, and the scan's header; None for an unusual layout."""
    segments: list[Segment] = []
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4])
        start, at = at + 4, at + 2 + length
        if length < 2 or at > len(content):
            return None
        if marker == _SOS:
            return segments, content[start:at]
        if marker not in _APPLICATION and marker not in (_SOF0, _DHT, _DQT, _DRI, _COM):
            return None
        segments.append((marker, start, at))
    return None


def _size(frame: bytes, scan: bytes, adobe: list[bytes]) -> tuple[int, int] | None:
    """Width and height of a frame in the one scan that follows it, if a card decodes such."""
    if len(frame) < 6 or len(frame) != 6 + 3 * frame[5] or frame[0] != 8:
        return None
    height, width, components = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5]), frame[5]
    if not scan or scan[0] != components or len(scan) != 4 + 2 * components:
        return None
    sampling = tuple(frame[7::3])
    if components == 1:
        return (width, height) if sampling == (0x11,) else None
    # libjpeg's rules for what three components are, where all of them say YCbCr
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


def _is_profile(content: bytes, marker: int, start: int, end: int) -> bool:
    return marker == _APP2 and content[start:end].startswith(b"ICC_PROFILE\0")
