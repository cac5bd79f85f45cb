"""The limits of decoding, its mode, and the version of its rules."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_PIXELS = 200_000_000
MAX_BYTES = 512_000_000


@dataclass(frozen=True)
class DecodeRules:
    """How images are decoded, and up to which size: part of a run's fingerprint.

    Attributes
    ----------
    decode : str
        ``exact``: every pixel as Pillow decodes it at full size; ``auto``: a JPEG that is much
        larger than the network's input is decoded at 1/2, 1/4 or 1/8 of its size.
    max_pixels, max_bytes : int
        A larger image or file becomes a failed row.
    version : int
        Version of the rules in `images.decode`. Raise it whenever the pixels of any image
        change, so that a run is not resumed under other rules. Records without a version
        were written before there was one.
    """

    decode: str
    max_pixels: int = MAX_PIXELS
    max_bytes: int = MAX_BYTES
    version: int = field(default=2, init=False)
