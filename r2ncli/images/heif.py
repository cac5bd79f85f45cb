"""Decode HEIC with pillow-heif; the container's brands distinguish HEIC from AVIF."""

from __future__ import annotations

from io import BytesIO

from PIL import Image

from r2ncli.images.decoders import Codec
from r2ncli.images.pillow import Factory, load

_AVIF_BRANDS = {b"avif", b"avis"}
_HEVC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}


def is_heic(head: bytes) -> bool:
    """Return whether a file's brands are those of HEIC and not of AVIF, which Pillow decodes."""
    if head[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(head[:4]), len(head))
    brands = {head[at : at + 4] for at in (8, *range(16, end, 4))}
    if head[8:12] in _AVIF_BRANDS or (brands & _AVIF_BRANDS and not brands & _HEVC_BRANDS):
        return False
    return bool(brands & (_HEVC_BRANDS | {b"mif1", b"msf1"}))


def _open(content: bytes) -> Image.Image:
    """Open the primary image, which libheif turns upright."""
    from pillow_heif import HeifImageFile  # optional and slow to import

    factory: Factory = HeifImageFile
    return factory(BytesIO(content), "")


HEIC = Codec(is_heic, _open, load)
