"""Find the part of a stored image that the network sees, and turn the result upright."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from PIL.Image import Transpose

from r2ncli.architectures import Preprocessing

Box = tuple[float, float, float, float]


def stored_box(size: tuple[int, int], orientation: int, preprocessing: Preprocessing) -> Box:
    """Return the box (left, top, right, bottom) that the network sees of an image as stored.

    `size` is (width, height), before the image is turned upright.
    """
    upright = (size[1], size[0]) if orientation in _SIDEWAYS else size
    _, to_stored = _UPRIGHT.get(orientation, _UPRIGHT[1])
    return to_stored(_crop_box(upright, preprocessing), upright)


def _crop_box(size: tuple[int, int], preprocessing: Preprocessing) -> Box:
    """Return the box that the network sees of an upright image of `size` (width, height)."""
    width, height = size
    if preprocessing.crop == "none":
        return (0.0, 0.0, float(width), float(height))
    short, target, kept = min(size), preprocessing.resize_size, preprocessing.image_size
    if preprocessing.crop == "square":
        side = short * kept / target
        left, top = (width - side) / 2, (height - side) / 2
        return (left, top, left + side, top + side)
    # as torchvision: the long side is rounded down, the margins to the nearest (ties to even)
    resized_width, resized_height = target * width // short, target * height // short
    left, top = round((resized_width - kept) / 2), round((resized_height - kept) / 2)
    x, y = width / resized_width, height / resized_height
    return (
        max(left * x, 0.0),
        max(top * y, 0.0),
        min((left + kept) * x, float(width)),
        min((top + kept) * y, float(height)),
    )


def exif_orientation(image: Image.Image) -> int:
    """Return the orientation in an image's EXIF; 1 (upright) if none can be read."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # the pixels of an image with corrupted EXIF are intact
        return 1


def turned_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return the image turned upright, given its EXIF orientation."""
    transpose, _ = _UPRIGHT.get(orientation, _UPRIGHT[1])
    return image if transpose is None else image.transpose(transpose)


# For each EXIF orientation: the transposition that turns the stored image upright, and the
# function from a box of the upright image of size (w, h) to the box in the stored image.
# Only the small result is turned, not the whole image. Unknown orientations count as 1.
_UPRIGHT: dict[int, tuple[Transpose | None, Callable[[Box, tuple[int, int]], Box]]] = {
    1: (None, lambda b, s: b),
    2: (Transpose.FLIP_LEFT_RIGHT, lambda b, s: (s[0] - b[2], b[1], s[0] - b[0], b[3])),
    3: (Transpose.ROTATE_180, lambda b, s: (s[0] - b[2], s[1] - b[3], s[0] - b[0], s[1] - b[1])),
    4: (Transpose.FLIP_TOP_BOTTOM, lambda b, s: (b[0], s[1] - b[3], b[2], s[1] - b[1])),
    5: (Transpose.TRANSPOSE, lambda b, s: (b[1], b[0], b[3], b[2])),
    6: (Transpose.ROTATE_270, lambda b, s: (b[1], s[0] - b[2], b[3], s[0] - b[0])),
    7: (Transpose.TRANSVERSE, lambda b, s: (s[1] - b[3], s[0] - b[2], s[1] - b[1], s[0] - b[0])),
    8: (Transpose.ROTATE_90, lambda b, s: (s[1] - b[3], b[0], s[1] - b[1], b[2])),
}
_SIDEWAYS = (5, 6, 7, 8)
