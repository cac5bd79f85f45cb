"""The table of decoders: one row for each image format.

The suffixes that a walk tries, the versions in the run record, the libraries that a retry may
find newly installed, and the advice on what to install all come from this table. A new format is a
new row. Importing this module imports no decoder: a row loads its decoder when it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Codec:
    """The functions that decode one format.

    `accept` takes the first 128 bytes of a file and returns whether they are of this format; a
    text means that they are, but that this installation cannot decode it. `open` takes the whole
    file, reads its header and returns an image without pixels. `load` takes that image and the
    whole file, and decodes the pixels.
    """

    accept: Callable[[bytes], bool | str]
    open: Callable[[bytes], Image]
    load: Callable[[Image, bytes], object]


@dataclass(frozen=True)
class Library:
    """A library whose version can change pixels; `name` is its key in the run record.

    If one that `may_be_absent` is not installed, whole formats fail and nothing else changes. So
    it may be added between a run and a retry of the failed rows.
    """

    name: str
    version: Callable[[], str | None]
    may_be_absent: bool = False


@dataclass(frozen=True)
class Decoder:
    """A format, as error messages name it, and what decodes it.

    Attributes
    ----------
    suffixes : tuple of str
        Suffixes under which a walk finds it, in lower case.
    load : callable
        Imports what decodes the format and returns its functions.
    libraries : tuple of Library
        The libraries that decide its pixels.
    package : str or None
        The package that decodes it, where it is optional.
    """

    name: str
    suffixes: tuple[str, ...]
    load: Callable[[], Codec]
    libraries: tuple[Library, ...]
    package: str | None = None

    @cached_property
    def codec(self) -> Codec:
        """The functions that decode the format, loaded once."""
        return self.load()

    @property
    def hint(self) -> str:
        """The command that installs it."""
        return f"pip install {self.package}"


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _libjpeg_version() -> str | None:
    from PIL import features

    return features.version("libjpeg_turbo") or features.version("jpg")


def _littlecms_version() -> str | None:
    from PIL import features

    return features.version("littlecms2")


def _by_pillow(format_name: str, plugin: str) -> Callable[[], Codec]:
    """Return a function that loads a format that needs no rules beyond Pillow's."""

    def load() -> Codec:
        from r2ncli.images.pillow import registered

        return registered(format_name, plugin)

    return load


def _by_rules_of(module: str, name: str) -> Callable[[], Codec]:
    """Return a function that loads a format with rules of its own in a module of `images`."""

    def load() -> Codec:
        codec: Codec = getattr(import_module(f"r2ncli.images.{module}"), name)
        return codec

    return load


_PILLOW = Library("pillow", lambda: version("pillow"))
_LIBJPEG = Library("libjpeg", _libjpeg_version, may_be_absent=True)
_LITTLECMS = Library("littlecms2", _littlecms_version)  # converts colours and decodes no format
_PILLOW_HEIF = Library("pillow-heif", lambda: installed_version("pillow-heif"), may_be_absent=True)

_BASE = (_PILLOW, _LITTLECMS)

DECODERS = (  # in the order in which a file's first bytes are compared
    Decoder(
        "JPEG",
        (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
        _by_rules_of("pillow", "JPEG"),
        (_PILLOW, _LIBJPEG, _LITTLECMS),
    ),
    Decoder("PNG", (".png", ".apng"), _by_pillow("PNG", "PngImagePlugin"), _BASE),
    Decoder("WEBP", (".webp",), _by_pillow("WEBP", "WebPImagePlugin"), _BASE),
    Decoder("GIF", (".gif",), _by_pillow("GIF", "GifImagePlugin"), _BASE),
    Decoder("BMP", (".bmp",), _by_pillow("BMP", "BmpImagePlugin"), _BASE),
    Decoder("TIFF", (".tif", ".tiff"), _by_rules_of("tiff", "TIFF"), _BASE),
    Decoder(
        "HEIC",
        (".heic", ".heif", ".hif", ".heics"),
        _by_rules_of("heif", "HEIC"),
        (*_BASE, _PILLOW_HEIF),
        package="pillow-heif",
    ),
    Decoder("AVIF", (".avif", ".avifs"), _by_pillow("AVIF", "AvifImagePlugin"), _BASE),
    Decoder(
        "JPEG 2000",
        (".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
        _by_rules_of("pillow", "JPEG_2000"),
        _BASE,
    ),
    Decoder("ICO", (".ico",), _by_rules_of("pillow", "ICO"), _BASE),
    Decoder("PPM", (".ppm", ".pgm", ".pbm", ".pnm"), _by_pillow("PPM", "PpmImagePlugin"), _BASE),
    Decoder("DIB", (".dib",), _by_pillow("DIB", "BmpImagePlugin"), _BASE),
)

SUFFIXES = tuple(suffix for decoder in DECODERS for suffix in decoder.suffixes)


def decoder_versions() -> dict[str, str | None]:
    """Return the versions of the libraries that decide pixels, for the run record.

    Returns
    -------
    dict
        The version of each library by its name; None if it is not installed.
    """
    libraries = {library.name: library for decoder in DECODERS for library in decoder.libraries}
    return {name: library.version() for name, library in libraries.items()}


def may_be_added() -> frozenset[str]:
    """Return the names of libraries that may be installed between a run and a retry."""
    libraries = [library for decoder in DECODERS for library in decoder.libraries]
    return frozenset(library.name for library in libraries if library.may_be_absent)
