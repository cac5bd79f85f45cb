"""Which JPEGs a card decodes: by the format that their header declares, and by nothing else.

The others go to the CPU, and so does every file with something unusual in its header: what
is right there is known, and a row must not depend on what a card's driver makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL.ImageCms import ImageCmsTransform

from r2ncli.images.colour import conversion
from r2ncli.images.decode import header_rules
from r2ncli.images.rules import DecodeRules


@dataclass(frozen=True)
class Jpeg:
    """A JPEG for a card.

    Attributes
    ----------
    content : bytes
        The file.
    encoded : bytes
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
    encoded: bytes
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
        except Exception:  # Pillow raises whatever a damaged header makes it: the CPU says so
            return None
    elif profiles:
        start, end = profiles[0]
        if content[start + 13 : start + 14] != b"\1" or start > segments[_SOF0][0][0]:
            return None  # one of several, without the others
        mode = "L" if grey else "RGB"
        to_srgb = conversion(content[start + 14 : end], mode, mode)
    encoded = content
    for start, end in reversed(segments.get(_APP1, ())):
        encoded = encoded[: start - 4] + encoded[end:]
    return Jpeg(content, encoded, size, grey, orientation, to_srgb)


_SOF0, _DHT, _SOS, _DQT, _DRI, _COM = 0xC0, 0xC4, 0xDA, 0xDB, 0xDD, 0xFE
_APP1, _APP2, _APP14 = 0xE1, 0xE2, 0xEE
_PROFILE = b"ICC_PROFILE\0"  # and a number, and the number of segments that it is in
_NEEDED = {_SOF0, _DHT, _DQT, _SOS}
_USUAL = {*_NEEDED, _DRI, _COM, *range(0xE0, 0xF0)}

_MOST_A_SIDE = 16384
_MOST_PIXELS = 1 << 26  # 192 MB as RGB: offsets in it fit into 32 bits
_MOST_TIMES_AS_HIGH = 100  # Pillow 12.2 resizes what is higher in two steps


def _segments(content: bytes) -> dict[int, list[tuple[int, int]]]:
    """Where the segments up to the first scan's header begin and end, by their markers."""
    segments: dict[int, list[tuple[int, int]]] = {}
    at, last, marker = 2, len(content) - 4, 0
    while at < last and content[at] == 0xFF and marker != _SOS:
        marker = content[at + 1]
        start, at = at + 4, at + 2 + (content[at + 2] << 8 | content[at + 3])
        segments.setdefault(marker if start <= at else 0, []).append((start, at))
    return segments


def _may_be_turned(metadata: list[bytes]) -> bool:
    """Whether Pillow could find an orientation other than 1 in EXIF and XMP.

    A look for its bytes, many times quicker than to read either: not everywhere where they
    are they mean it, but it is nowhere where they are not.
    """
    if sum(held.startswith(b"Exif") for held in metadata) > 1:  # one in two pieces
        return True
    return any(
        held.count(tag) != sum(held.count(tag + upright) for upright in uprights)
        for held in metadata
        for tag, uprights in _ORIENTATION.items()
    )


_ORIENTATION = {  # as big-endian and little-endian EXIF begin it, and XMP; and how 1 goes on
    b"\1\x12": (b"\0\3\0\0\0\1\0\1",),
    b"\x12\1": (b"\3\0\1\0\0\0\1\0",),
    b"tiff:Orientation": (b'="1"', b">1<"),
}


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
