"""What the formats share: Pillow without its limit on pixels, errors, and boxes of containers."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from io import BytesIO
from typing import IO

from PIL import Image, ImageFile

from r2ncli.errors import ImageError
from r2ncli.images.decoders import Codec

Factory = Callable[[IO[bytes], str], ImageFile.ImageFile]


class _PillowsLimit:
    """Lifts Pillow's limit on pixels within a `with` block; blocks of several threads may overlap.

    Pillow has one limit for the whole process. `Image.open` is not used here, but some formats
    compare with the limit themselves: WebP when it is opened, TIFF when it is loaded.
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


without_pillows_limit = _PillowsLimit()


def unlimited(factory: Factory) -> Callable[[bytes], ImageFile.ImageFile]:
    """Return a function that opens a file of the format without Pillow's limit on pixels."""

    def open_image(content: bytes) -> ImageFile.ImageFile:
        try:
            return factory(BytesIO(content), "")
        except Image.DecompressionBombError:
            with without_pillows_limit:
                return factory(BytesIO(content), "")

    return open_image


def load(image: Image.Image, _content: bytes) -> Image.Image:
    """Decode the pixels of an opened image."""
    image.load()
    return image


def without_pixels(width: int, height: int) -> Image.Image:
    """Return an image that has a size and no pixels: what a header says."""
    image = Image.Image()
    image._size = (width, height)
    return image


TRUNCATED = "cannot be decoded: image file is truncated"


def unsupported(what: str) -> ImageError:
    """Return the error for a valid file of a kind that cannot be decoded here."""
    return ImageError(f"cannot be decoded: a {what} is not supported by this decoder")


def registered(name: str, plugin: str) -> Codec:
    """Return the codec of a format that importing `plugin` registers in Pillow as `name`."""
    import_module(f"PIL.{plugin}")
    factory, accept = Image.OPEN[name]
    assert accept is not None
    return Codec(accept, unlimited(factory), load)


_MOST_BOXES = 100_000


def boxes_between(content: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Return kind, start and end of the boxes of JPEG 2000, HEIC or AVIF between two offsets."""
    for _ in range(_MOST_BOXES):
        if at + 8 > end:
            return
        length, kind = struct.unpack_from(">I4s", content, at)
        start = at + 8
        if length == 1 and at + 16 <= end:
            length, start = int.from_bytes(content[at + 8 : at + 16]), at + 16
        following = end if length == 0 else at + length
        if following < start:
            return
        yield kind, start, min(following, end)
        at = following


# --- GIF ----------------------------------------------------------------------------------


_GIF = registered("GIF", "GifImagePlugin")


def _open_gif(content: bytes) -> Image.Image:
    """Read the size of the canvas and the first frame, which Pillow allocates when it opens it."""
    corrupted = ImageError("cannot be decoded: corrupted GIF (no image)")
    if len(content) < 13:
        raise corrupted
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    while at + 10 <= len(content) and content[at] != ord(","):
        if content[at] == ord(";"):
            raise corrupted
        if content[at] == ord("!"):  # an extension: a label, then blocks up to an empty one
            at += 2
            while at < len(content) and content[at]:
                at += 1 + content[at]
        at += 1
    if at + 10 > len(content):
        raise corrupted
    left, top, across, down = struct.unpack_from("<HHHH", content, at + 1)
    if not (across and down):
        raise corrupted
    return without_pixels(max(width, left + across), max(height, top + down))


def _load_gif(_header: Image.Image, content: bytes) -> Image.Image:
    """Decode the first frame; the canvas outside it is transparent, as browsers show it."""
    image = _GIF.open(content)
    image.load()
    box = getattr(image, "dispose_extent", None)
    if box in (None, (0, 0, *image.size)):
        return image
    canvas = Image.new("RGBA", image.size, (0, 0, 0, 0))
    canvas.paste(image.convert("RGBA").crop(box), box)
    return canvas


GIF = replace(_GIF, open=_open_gif, load=_load_gif)


# --- WebP ---------------------------------------------------------------------------------

_WEBP = registered("WEBP", "WebPImagePlugin")
_WEBP_IMAGES = (b"VP8 ", b"VP8L", b"ALPH", b"ANMF")
_WEBP_METADATA = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}  # flags in VP8X


def _open_webp(content: bytes) -> Image.Image:
    """Open a WebP; metadata and later frames that are cut off count as absent."""
    try:
        return _WEBP.open(content)
    except (OSError, SyntaxError):
        return _WEBP.open(_whole_webp(content))


def _whole_webp(content: bytes) -> bytes:
    """Return a file of the chunks that are whole; an error if one of the first image is not."""
    chunks: dict[bytes, bytes] = {}
    at = 12
    while at + 8 <= len(content) and len(chunks) < 20:
        kind, length = struct.unpack_from("<4sI", content, at)
        end = at + 8 + length
        if end > len(content) and kind in _WEBP_IMAGES and kind not in chunks:
            raise ImageError(TRUNCATED)
        if end <= len(content):
            chunks.setdefault(kind, content[at:end] + bytes(length % 2))
        at = end + length % 2
    if not any(kind in chunks for kind in _WEBP_IMAGES):
        raise ImageError(TRUNCATED)
    if (header := chunks.get(b"VP8X")) and len(header) >= 18:
        missing = sum(flag for kind, flag in _WEBP_METADATA.items() if kind not in chunks)
        chunks[b"VP8X"] = header[:8] + bytes([header[8] & ~missing]) + header[9:]
    body = b"WEBP" + b"".join(chunks.values())
    return b"RIFF" + struct.pack("<I", len(body)) + body


WEBP = replace(_WEBP, open=_open_webp)
