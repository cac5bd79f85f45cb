"""JPEGs that a GPU decodes, and functions that change the bytes of one."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from support.icc_profiles import PROFILES, SRGB, SRGB_CURVE, rgb_profile

SOF0 = b"\xff\xc0"


def jpeg(size: tuple[int, int] = (32, 32), mode: str = "RGB", **options: Any) -> bytes:
    """A JPEG of a gradient with a corner of its own."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 7 % 256, y * 5 % 256, (x * y) % 200], -1).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(rgb).convert(mode).save(content, "JPEG", **options)
    return content.getvalue()


def patched(content: bytes, start: int, new: bytes) -> bytes:
    return content[:start] + new + content[start + len(new) :]


def frame(content: bytes) -> int:
    """Where the frame header's content begins."""
    return content.index(SOF0) + 4


def with_segment(content: bytes, marker: int, held: bytes) -> bytes:
    """With one more segment at its beginning."""
    segment = bytes([0xFF, marker]) + (len(held) + 2).to_bytes(2) + held
    return content[:2] + segment + content[2:]


def with_size(content: bytes, width: int, height: int) -> bytes:
    return patched(content, frame(content) + 1, height.to_bytes(2) + width.to_bytes(2))


def sampled_upright(**options: Any) -> bytes:
    """4:4:0: a 4:2:2 file of as many blocks either way, declared to be the other."""
    content = jpeg((32, 32), subsampling="4:2:2", **options)
    return patched(content, frame(content) + 7, b"\x12")


FOR_GPU: dict[str, Callable[[], bytes]] = {
    "4:4:4": lambda: jpeg(subsampling="4:4:4"),
    "4:2:2": lambda: jpeg((33, 20), subsampling="4:2:2"),
    "4:2:0": lambda: jpeg((17, 41), subsampling="4:2:0"),
    "4:4:0": sampled_upright,
    "grey": lambda: jpeg((19, 23), "L"),
    "quality 5": lambda: jpeg((50, 40), quality=5),
    "quality 100": lambda: jpeg((50, 40), quality=100),
    "optimized tables": lambda: jpeg((50, 40), optimize=True),
    "restart intervals": lambda: jpeg((70, 50), restart_marker_blocks=2),
    "a comment": lambda: jpeg(comment=b"taken by nobody"),
    "one pixel": lambda: jpeg((1, 1)),
    "an sRGB profile": lambda: jpeg(icc_profile=rgb_profile(SRGB, SRGB_CURVE)),
    "another profile": lambda: jpeg((40, 30), icc_profile=PROFILES["display p3"]),
    "Adobe's YCbCr": lambda: with_segment(jpeg(), 0xEE, b"Adobe\0d\0\0\0\0\1"),
}
