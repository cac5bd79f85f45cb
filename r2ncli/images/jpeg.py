"""JPEG: what libjpeg cannot decode, files without an end marker, and a bound on the scans."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, JpegImagePlugin

from r2ncli.errors import ImageError
from r2ncli.images.decoders import Codec
from r2ncli.images.pillow import TRUNCATED, unlimited, unsupported

_MOST_WORK = 4_000_000_000  # scans x pixels; a real image of 200 million pixels has half of it
_FEW_SCANS = 20  # no limit needed
_LARGE, _MOST_SEGMENTS, _MOST_SKIPPED = 4_000_000, 100_000, 1_000_000

_SOF = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_KINDS = {0xC3: "lossless", 0xC7: "lossless", 0xCB: "lossless", 0xCF: "lossless"}
_KINDS |= {0xC5: "hierarchical", 0xC6: "hierarchical", 0xCD: "hierarchical", 0xCE: "hierarchical"}
_KINDS |= {0xC9: "arithmetic-coded", 0xCA: "arithmetic-coded"}
_SOS, _EOI = b"\xff\xda", b"\xff\xd9"
_NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # in coded data: neither stuffed nor RST

# The class itself, not the registered function: that one reads the table of an MPO's other
# images, and a corrupted table must not lose the first image.
_open_by_pillow = unlimited(JpegImagePlugin.JpegImageFile)


def _open(content: bytes) -> Image.Image:
    """Read the header; a corrupted segment that decides no pixel counts as absent."""
    if len(content) > _LARGE:  # Pillow takes minutes for a header of millions of segments
        _segments(content)
    try:
        image = _open_by_pillow(content)
    except Exception:
        _refuse_unsupported(content)
        image = _open_by_pillow(_without_metadata(content))
    if not image.tile:
        raise ImageError(TRUNCATED)
    _bound_work(image, content)
    return image


def _bound_work(image: ImageFile.ImageFile, content: bytes) -> None:
    """Refuse a file whose scans would take minutes to decode."""
    if "progressive" not in image.info and _has_one_scan(image, content):
        return
    if content.count(_SOS) <= _FEW_SCANS:  # other data may contain these bytes too
        return
    scans, width, height = len(_scans(content).coded), *image.size
    if scans * width * height > _MOST_WORK:
        raise ImageError(f"cannot be decoded: {scans} scans of {width} x {height} pixels, too many")


def _has_one_scan(image: ImageFile.ImageFile, content: bytes) -> bool:
    """Return whether the first scan, behind whose header Pillow stands, has all components."""
    count = {"L": 1, "RGB": 3}.get(image.mode, 4)
    assert image.fp is not None
    header = image.fp.tell() - 6 - 2 * count
    return content[header : header + 3] == bytes([0, 6 + 2 * count, count])


def _segments(content: bytes) -> list[tuple[int, int, int]]:
    """Return marker, start and end of each segment up to and with the first start of scan."""
    found: list[tuple[int, int, int]] = []
    at = skipped = 2
    while 0 <= at <= len(content) - 4:
        if content[at] != 0xFF or content[at + 1] in (0x00, 0xFF):
            following = content.find(b"\xff", at + 1)
            skipped += following - at
            at = following
            continue
        if len(found) > _MOST_SEGMENTS or skipped > _MOST_SKIPPED:
            raise ImageError("cannot be decoded: too many segments before the image data")
        marker = content[at + 1]
        if marker == 0x01 or 0xD0 <= marker <= 0xD9:
            at += 2
            continue
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4])
        found.append((marker, at, end))
        if marker == 0xDA:
            break
        at = end
    return found


def _refuse_unsupported(content: bytes) -> None:
    """Raise an error that names what libjpeg cannot decode, if the header declares such."""
    for marker, start, _ in _segments(content):
        if marker not in _SOF or start + 10 > len(content):
            continue
        bits, components = content[start + 4], content[start + 9]
        height = int.from_bytes(content[start + 5 : start + 7])
        if marker in _KINDS:
            raise unsupported(f"{_KINDS[marker]} JPEG")
        if bits != 8:
            raise unsupported(f"JPEG of {bits} bits")
        if components not in (1, 3, 4):
            raise unsupported(f"JPEG of {components} components")
        if height == 0:
            raise unsupported("JPEG whose height is declared after its image data")


def _without_metadata(content: bytes) -> bytes:
    """Return the file without the segments of applications and comments, but Adobe's and JFIF's."""
    pieces, at = [content[:2]], 2
    for marker, start, end in _segments(content):
        body = content[start + 4 : end]
        adobe = marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12
        jfif = marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14
        if (0xE0 <= marker <= 0xEF or marker == 0xFE) and not (adobe or jfif):
            pieces.append(content[at:start])
            at = end
    return b"".join([*pieces, content[at:]])


def _load(image: Image.Image, content: bytes) -> Image.Image:
    """Decode the pixels, at the reduced size that has been asked for."""
    assert isinstance(image, JpegImagePlugin.JpegImageFile)
    size, tile, config = image.size, image.tile, image.decoderconfig
    try:
        image.load()
    except OSError:
        _refuse_unsupported(content)
        found = _scans(content)
        if content[found.end : found.end + 2] == _EOI:
            raise
        if not found.complete:
            raise ImageError(TRUNCATED) from None

        def decoded(more: bytes) -> Image.Image:
            again = _open_by_pillow(_without_metadata(content[: found.end].rstrip(b"\xff")) + more)
            again._size, again.tile = size, tile
            again.decoderconfig = config
            again.load()
            return again

        whole = decoded(_EOI)
        endings = _other_endings(content[: found.end])
        if any(decoded(more + _EOI).tobytes() != whole.tobytes() for more in endings):
            raise ImageError(TRUNCATED) from None
        whole.info = image.info
        return whole
    return image


# --- the scans of a file ------------------------------------------------------------------


@dataclass(frozen=True)
class _Scans:
    """The scans of a file, whether they hold the whole image, and where the last one ends."""

    coded: list[bytes]
    complete: bool
    end: int


def _other_endings(content: bytes) -> list[bytes]:
    """Return coded data that may follow a file without an end marker, with restart markers.

    If the pixels depend on what follows, some of the image's own data is missing.
    """
    last, number = max((content.rfind(b"\xff%c" % (0xD0 + n)), n + 1) for n in range(8))
    number = number if last >= 0 else 0
    pieces = (bytes(range(1, 255)) * 4, bytes(range(254, 0, -1)) * 4)
    markers = [b"\xff%c" % (0xD0 + (number + n) % 8) for n in range(16)]
    return [b"".join(piece + marker for marker in markers) + piece for piece in pieces]


def _scans(content: bytes) -> _Scans:
    """Find all scans up to the end marker, or up to the last one that the image needs."""
    segments = _segments(content)
    frames = [(marker, content[start:end]) for marker, start, end in segments if marker in _SOF]
    if not frames or segments[-1][0] != 0xDA:
        return _Scans([], False, len(content))
    marker, frame = frames[0]
    progressive = marker == 0xC2
    missing = {component: [1] * 64 for component in frame[10::3]}
    scans: list[bytes] = []
    _, start, end = segments[-1]
    while True:
        scan = content[start + 4 : end]
        scans.append(scan)
        if len(scan) >= 4 + 2 * scan[0]:
            first, last, low = scan[-3], min(scan[-2], 63), scan[-1] & 15
            for component in scan[1 : 1 + 2 * scan[0] : 2]:
                if component in missing:
                    for band in range(first, last + 1) if progressive else range(64):
                        missing[component][band] = low if progressive else 0
        complete = not any(any(bands) for bands in missing.values())
        following = _NEXT_MARKER.search(content, end)
        while following and content[following.start() + 1] not in (0xDA, 0xD9):
            skipped = following.start() + 2
            length = int.from_bytes(content[skipped : skipped + 2])
            if content[following.start() + 1] not in _BETWEEN_SCANS or skipped + length > len(
                content
            ):
                break
            after = _NEXT_MARKER.search(content, skipped + length)
            if complete and (after is None or content[after.start() + 1] not in (0xDA, 0xD9)):
                break
            following = after
        if following is None or content[following.start() + 1] != 0xDA:
            return _Scans(scans, complete, following.start() if following else len(content))
        start = following.start()
        end = start + 2 + int.from_bytes(content[start + 2 : start + 4])


_BETWEEN_SCANS = {0xC4, 0xCC, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)}


# --- streams inside other formats ---------------------------------------------------------


def pixels_of_stream(
    stream: bytes, tables: bytes, transform: int, most: int
) -> npt.NDArray[np.uint8]:
    """Decode a stream of another format, which says itself what the components are.

    Parameters
    ----------
    stream : bytes
        A JPEG file, or one without the tables that all streams share.
    tables : bytes
        The segments that all streams share.
    transform : int
        1 if three components are Y'CbCr and become RGB; 0 if they stay what they are.
    most : int
        Refuse a stream of more pixels, or of many scans.

    Returns
    -------
    uint8 array [height, width, components]
    """
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])
    content = _without_colour_hints(stream)
    content = content[:2] + adobe + tables + content[2:]
    image = _open(content)
    if image.width * image.height > most or content.count(_SOS) > _FEW_SCANS:
        raise ImageError("cannot be decoded: a JPEG stream of too many pixels or scans")
    pixels = np.asarray(_load(image, content))
    if pixels.ndim == 2:
        return pixels[..., None]
    return 255 - pixels if pixels.shape[2] == 4 else pixels  # Pillow inverts four components


def _without_colour_hints(stream: bytes) -> bytes:
    """Return a stream without the segments by which libjpeg guesses what the components are."""
    pieces, at = [stream[:2]], 2
    for marker, start, end in _segments(stream):
        if marker in (0xE0, 0xEE):
            pieces.append(stream[at:start])
            at = end
    return b"".join([*pieces, stream[at:]])


JPEG = Codec(JpegImagePlugin._accept, _open, _load)
