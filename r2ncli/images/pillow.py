"""Open the formats that Pillow decodes, without its process-wide limit on pixels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from io import BytesIO
from typing import IO

from PIL import IcoImagePlugin, Image, JpegImagePlugin

from r2ncli.errors import ImageError
from r2ncli.images.decoders import Codec

Factory = Callable[[IO[bytes], str], Image.Image]


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


def unlimited(factory: Factory) -> Callable[[bytes], Image.Image]:
    """Return a function that opens a file of the format without Pillow's limit on pixels."""

    def open_image(content: bytes) -> Image.Image:
        try:
            return factory(BytesIO(content), "")
        except Image.DecompressionBombError:
            with without_pillows_limit:
                return factory(BytesIO(content), "")

    return open_image


def load(image: Image.Image, _content: bytes) -> None:
    """Decode the pixels of an opened image."""
    image.load()


def registered(name: str, plugin: str) -> Codec:
    """Return the codec of a format that importing `plugin` registers in Pillow as `name`."""
    import_module(f"PIL.{plugin}")
    factory, accept = Image.OPEN[name]
    assert accept is not None
    return Codec(accept, unlimited(factory), load)


# --- formats with a rule of their own --------------------------------------------------

# The class itself, not the registered function: that one reads the table of an MPO's other
# images, and a corrupted table must not lose the first image.
JPEG = replace(registered("JPEG", "JpegImagePlugin"), open=unlimited(JpegImagePlugin.JpegImageFile))


def _load_jpeg_2000(image: Image.Image, content: bytes) -> None:
    """Decode a JPEG 2000; refuse one that ends between two tiles, which OpenJPEG leaves blank."""
    end = content.rfind(b"\xff\xd9")
    if end < 0 or content.find(b"\xff\x90\x00\x0a", end) >= 0:
        raise ImageError("cannot be decoded: image file is truncated")
    image.load()


JPEG_2000 = replace(registered("JPEG2000", "Jpeg2KImagePlugin"), load=_load_jpeg_2000)

# within Pillow's limit, because Pillow decodes an icon while it opens it
ICO = replace(
    registered("ICO", "IcoImagePlugin"),
    open=lambda content: IcoImagePlugin.IcoImageFile(BytesIO(content), ""),
)
