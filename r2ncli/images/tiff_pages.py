"""Find the page of a TIFF that is decoded, and read how its samples are stored."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from r2ncli.errors import ImageError
from r2ncli.images.pillow import TRUNCATED, unsupported

Array = npt.NDArray[Any]

_MOST_SAMPLES = 16  # per pixel
_MOST_STRIPS, _MOST_STREAMS = 2**20, 2**17  # of bytes, of JPEG

_TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4"}
_TYPES |= {10: "i4", 11: "f4", 12: "f8", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
_RATIONALS = (5, 10)  # types of two numbers

NO_COMPRESSION, CCITT, OLD_JPEG, JPEG = 1, (2, 3, 4, 32771), 6, 7
BYTES_BY_LIBTIFF = (
    5,
    8,
    32773,
    32946,
    34925,
    50000,
)  # these give back the bytes that were compressed
_COMPRESSIONS = {9: "JBIG", 10: "JBIG", 32766: "NeXT", 32809: "ThunderScan", 33003: "JPEG 2000"}
_COMPRESSIONS |= {33005: "JPEG 2000", 34661: "JBIG", 34676: "SGILog", 34677: "SGILog24"}
_COMPRESSIONS |= {
    34712: "JPEG 2000",
    34887: "LERC",
    34933: "PNG",
    34892: "lossy DNG",
    50001: "WebP",
}
_COMPRESSIONS |= {50002: "JPEG XL", 52546: "JPEG XL"}

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
CIELAB, ICCLAB = 8, 9
COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3, 9: 3}  # samples by photometric interpretation
_PHOTOMETRICS = {4: "a transparency mask", 10: "ITU L*a*b*", 32803: "camera raw data"}
_PHOTOMETRICS |= {32844: "LogL", 32845: "LogLuv", 34892: "camera raw data"}


# --- directories --------------------------------------------------------------------------


@dataclass(frozen=True)
class Tags:
    """The tags of one page, and the offset of the next page.

    Tags whose values lie outside the file are in `lost`: an error only if one is asked for.
    """

    values: dict[int, Array]
    lost: frozenset[int]
    order: str
    next: int

    def get(self, tag: int) -> Array | None:
        """Return the values of a tag, or None if the page has none."""
        if tag in self.lost:
            raise ImageError(TRUNCATED)
        return self.values.get(tag)

    def number(self, tag: int, default: int) -> int:
        """Return the first value of a tag."""
        values = self.get(tag)
        return default if values is None else int(values[0])


def _directory(content: bytes, order: str, big: bool, at: int) -> Tags:
    """Read the directory at an offset."""
    entry, counter = (20, "Q") if big else (12, "H")
    start = at + struct.calcsize(counter)
    if at < 8 or start > len(content):
        raise ImageError("cannot be decoded: corrupted TIFF (no directory)")
    [count] = struct.unpack_from(order + counter, content, at)
    count = min(count, 65535)  # more than that only in a corrupted BigTIFF
    values, lost = {}, set()
    for where in range(start, min(start + count * entry, len(content) - entry + 1), entry):
        tag, kind, length = struct.unpack_from(order + ("HHQ" if big else "HHI"), content, where)
        if kind not in _TYPES or not length:
            continue
        number = np.dtype(order + _TYPES[kind])
        length *= 1 + (kind in _RATIONALS)
        place = where + (12 if big else 8)
        if length * number.itemsize > (8 if big else 4):
            [place] = struct.unpack_from(order + ("Q" if big else "I"), content, place)
        if place + length * number.itemsize > len(content):
            lost.add(tag)
        elif tag not in values:
            values[tag] = np.frombuffer(content, number, length, place)
    end = start + count * entry
    following = content[end : end + (8 if big else 4)]
    later = int.from_bytes(following, "little" if order == "<" else "big")
    return Tags(values, frozenset(lost), order, later)


def _page_tags(content: bytes) -> Tags:
    """Return the tags of the first page that is not a thumbnail or a mask of another page."""
    order = "<" if content[:2] == b"II" else ">"
    big = 43 in (content[2], content[3])
    first = struct.unpack_from(
        order + ("Q" if big else "I"), content.ljust(16, b"\0"), 8 if big else 4
    )
    waiting: list[int] = [*first]
    seen: set[int] = set()
    pages: list[Tags] = []
    while waiting and len(seen) < 100:
        at = waiting.pop(0)
        if at in seen:
            continue
        seen.add(at)
        try:
            page = _directory(content, order, big, at)
            if not _is_reduced(page):
                return page
            within = page.get(330)
        except ImageError:
            if not pages:
                raise
            continue
        pages.append(page)
        waiting = [page.next, *waiting] if page.next else waiting
        waiting += [] if within is None else [int(offset) for offset in within[:20]]
    return pages[0]


def _is_reduced(page: Tags) -> bool:
    """Return whether a page says that it is a smaller copy or a mask of another one."""
    return bool(page.number(254, 0) & 5) or page.number(255, 1) == 2


# --- the layout of a page -----------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """How the samples of a page are stored.

    Attributes
    ----------
    bits, kind : int, str
        Depth of a sample; ``u``, ``i`` or ``f``.
    planes : int
        1 if the samples of a pixel lie together, else the number of samples.
    columns, rows : int
        Size of a strip or tile in pixels.
    per_pixel : int
        Samples of a pixel in one plane.
    """

    tags: Tags
    width: int
    height: int
    bits: int
    kind: str
    samples: int
    planes: int
    photometric: int
    compression: int
    columns: int
    rows: int
    tiled: bool

    @property
    def per_pixel(self) -> int:
        return self.samples // self.planes

    @property
    def across(self) -> int:
        return -(-self.width // self.columns)

    @property
    def down(self) -> int:
        return -(-self.height // self.rows)

    @property
    def subsampling(self) -> tuple[int, int]:
        """Pixels that share one pair of chroma samples: across, down."""
        if self.photometric != YCBCR or self.compression == JPEG:
            return (1, 1)
        values = self.tags.get(530)
        return (2, 2) if values is None or len(values) < 2 else (int(values[0]), int(values[1]))


def page_of(content: bytes) -> Page:
    """Read the header of the page that is decoded; refuse what is not supported."""
    tags = _page_tags(content)
    width, height = tags.number(256, 0), tags.number(257, 0)
    if not (width and height):
        raise ImageError("cannot be decoded: corrupted TIFF (no size)")
    compression = tags.number(259, 1)
    samples = tags.number(277, 3 if compression == OLD_JPEG else 1)
    photometric = tags.number(262, _guessed_photometric(samples, compression))
    if compression == OLD_JPEG:
        photometric = YCBCR if samples == 3 else BLACK_IS_ZERO
    if compression not in (NO_COMPRESSION, *CCITT, OLD_JPEG, JPEG, *BYTES_BY_LIBTIFF):
        name = _COMPRESSIONS.get(compression, f"unknown ({compression})")
        raise unsupported(f"TIFF with {name} compression")
    if photometric not in COLOURS:
        name = _PHOTOMETRICS.get(photometric, f"unknown colours ({photometric})")
        raise unsupported(f"TIFF of {name}")
    depths, kinds = tags.get(258), tags.get(339)
    bits = 1 if depths is None else int(depths[0])
    kind = {1: "u", 2: "i", 3: "f", 4: "u"}.get(1 if kinds is None else int(kinds[0]), "?")
    mixed = any(v is not None and (v[:samples] != v[0]).any() for v in (depths, kinds))
    known = bits in (16, 32, 64) if kind == "f" else bits in (*range(1, 17), 24, 32, 64)
    known &= kind == "u" or bits in (8, 16, 32, 64)
    if not COLOURS[photometric] <= samples <= _MOST_SAMPLES or not known or mixed or kind == "?":
        numbers = {"u": "integers", "i": "signed integers", "f": "floats"}.get(
            kind, "other numbers"
        )
        depth = "different depths" if mixed else f"{bits} bits"
        raise unsupported(f"TIFF of {samples} samples of {depth} ({numbers})")
    planar = tags.number(284, 1) == 2 and samples > 1
    tiled = tags.get(322) is not None and tags.get(323) is not None
    columns = tags.number(322, 0) if tiled else width
    rows = tags.number(323, 0) if tiled else min(tags.number(278, height) or height, height)
    if not (columns and rows):
        raise ImageError("cannot be decoded: corrupted TIFF (no size of its tiles)")
    page = Page(
        *(tags, width, height, bits, kind, samples, samples if planar else 1),
        *(photometric, compression, columns, rows, tiled),
    )
    if page.across * columns * page.down * rows > 4 * width * height + 2**22:
        raise unsupported("TIFF whose tiles are much larger than its image")
    if page.across * page.down * page.planes > (
        _MOST_STREAMS if compression == JPEG else _MOST_STRIPS
    ):
        raise unsupported("TIFF of so many strips or tiles")
    return page


def _guessed_photometric(samples: int, compression: int) -> int:
    """Return what libtiff assumes where the photometric interpretation is missing."""
    if samples >= 3:
        return RGB
    return WHITE_IS_ZERO if compression in CCITT else BLACK_IS_ZERO
