"""Decode BMP, DIB and ICO: every depth, palette, bit field and run-length code that they define.

Pillow takes a short grey palette for a full one, knows only some bit fields, and takes alpha that
is 0 everywhere for transparency, where Windows shows the image.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from r2ncli.errors import ImageError
from r2ncli.images.colour import eight_bits, unpacked
from r2ncli.images.decoders import Codec
from r2ncli.images.pillow import TRUNCATED, unsupported, without_pixels
from r2ncli.images.png import PNG

Array = npt.NDArray[Any]
Masks = tuple[int, int, int, int]

_RGB, _RLE8, _RLE4, _FIELDS, _FIELDS_WITH_ALPHA = 0, 1, 2, 3, 6
_COMPRESSIONS = {4: "an embedded JPEG", 5: "an embedded PNG", 11: "CMYK", 12: "CMYK", 13: "CMYK"}
_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # sizes; 12, 16 and 64 are those of OS/2
_USUAL_FIELDS: dict[int, Masks] = {
    16: (0x7C00, 0x03E0, 0x001F, 0),
    24: (0xFF0000, 0xFF00, 0xFF, 0),
    32: (0xFF0000, 0xFF00, 0xFF, 0),
}
_MOST_RUNS = 64_000_000  # bytes of run-length codes, which are decoded one by one


@dataclass(frozen=True)
class _Bitmap:
    """What the header says; `masks` are those of red, green, blue and alpha."""

    width: int
    height: int
    top_down: bool
    bits: int
    compression: int
    masks: Masks
    palette: Array
    start: int

    @property
    def stride(self) -> int:
        """Bytes of a row, which is filled up to four."""
        return (self.width * self.bits + 31) // 32 * 4


def _bitmap(content: bytes, at: int, start: int = 0, masked: bool = False) -> _Bitmap:
    """Read the header at an offset; `start` is where the pixels start, if that is known.

    With `masked`, as in icons, the height counts a mask too.
    """
    fields = content[at : at + 124].ljust(124, b"\0")
    [size] = struct.unpack_from("<I", fields)
    if size not in _HEADERS:
        raise unsupported(f"BMP with a header of {size} bytes")
    if at + size > len(content):
        raise ImageError("cannot be decoded: corrupted BMP (its header)")
    compression = colours = 0
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", fields, 4)
    else:
        width, height, _, bits = struct.unpack_from("<iiHH", fields, 4)
    if size >= 40:
        compression, _, _, _, colours = struct.unpack_from("<IIiiI", fields, 16)
    if compression not in (_RGB, _RLE8, _RLE4, _FIELDS, _FIELDS_WITH_ALPHA) or (
        compression > _RLE4 and size == 64
    ):
        what = _COMPRESSIONS.get(compression, f"compression {compression}")
        raise unsupported(
            f"BMP with {what if size != 64 else f'compression {compression} of OS/2'}"
        )
    runs = {_RLE8: 8, _RLE4: 4}.get(compression, bits)
    if bits not in (1, 2, 4, 8, 16, 24, 32) or bits != runs:
        raise unsupported(f"BMP of {bits} bits with compression {compression}")
    top_down, height = height < 0, abs(height) // (2 if masked else 1)
    if width <= 0 or not height:
        raise ImageError("cannot be decoded: corrupted BMP (its size)")
    behind = at + size
    masks: Masks = _USUAL_FIELDS.get(bits, (0, 0, 0, 0))
    if compression in (_FIELDS, _FIELDS_WITH_ALPHA):
        count = (4 if size >= 56 else 3) if size > 40 else 3 + (compression == _FIELDS_WITH_ALPHA)
        found = struct.unpack(f"<{count}I", content[at + 40 : at + 40 + 4 * count])
        red, green, blue, alpha = (*found, 0)[:4]
        masks = (red, green, blue, alpha)
        behind += 4 * count if size == 40 else 0
        if not any(masks):
            masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        if bits < 16:
            raise unsupported(f"BMP of {bits} bits with bit fields")
    entry = 3 if size == 12 else 4
    count = min(colours or 2**bits, 2**bits) if bits <= 8 else 0
    if start > behind:
        count = min(count, (start - behind) // entry)
    table = np.frombuffer(
        content[behind : behind + entry * count].ljust(entry * count, b"\0"), "u1"
    )
    palette = np.zeros((256, 3), np.uint8)
    palette[:count] = table.reshape(-1, entry)[:, 2::-1]
    if start < behind or (bits <= 8 and start == behind):  # some files do not count the palette
        start = behind + entry * (count if bits <= 8 else colours)
    return _Bitmap(width, height, top_down, bits, compression, masks, palette, start)


def _image(bitmap: _Bitmap, content: bytes) -> Image.Image:
    """Decode the pixels to mode P, RGB or RGBA."""
    usual = bitmap.masks == _USUAL_FIELDS.get(bitmap.bits)
    if bitmap.compression in (_RLE8, _RLE4):
        pixels = _from_runs(bitmap, content)
    else:
        rows = _rows(bitmap, content, bitmap.start, bitmap.stride)
        if bitmap.bits >= 24 and usual:  # as Pillow reads it, which is fast
            layout = ("raw", "BGR" if bitmap.bits == 24 else "BGRX", bitmap.stride)
            direction = 1 if bitmap.top_down else -1
            return Image.frombytes(
                "RGB", (bitmap.width, bitmap.height), rows.data, *layout, direction
            )
        if bitmap.bits > 8:
            pixels = _from_fields(bitmap, rows)
        else:
            whole = bitmap.bits == 8
            pixels = rows[:, : bitmap.width] if whole else unpacked(rows, bitmap.bits, bitmap.width)
    pixels = pixels if bitmap.top_down else pixels[::-1]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if bitmap.bits <= 8:
        image.putpalette(bitmap.palette.tobytes())
    return image


def _rows(bitmap: _Bitmap, content: bytes, start: int, stride: int) -> Array:
    """Return the rows as stored, uint8 [height, stride]; the last one may lack its filling."""
    end = start + bitmap.height * stride
    needed = end - stride + (bitmap.width * bitmap.bits + 7) // 8
    if needed > len(content):
        raise ImageError(TRUNCATED)
    stored = content[start:end].ljust(bitmap.height * stride, b"\0")
    return np.frombuffer(stored, np.uint8).reshape(bitmap.height, stride)


def _from_fields(bitmap: _Bitmap, rows: Array) -> Array:
    """Return colours, and alpha unless it is 0 everywhere, from the bits that masks select."""
    size = bitmap.bits // 8
    stored = rows[:, : bitmap.width * size].reshape(bitmap.height, bitmap.width, size)
    red, green, blue, alpha = bitmap.masks
    values = np.zeros(stored.shape[:2], np.uint32)
    for byte in range(size):
        values |= stored[..., byte].astype(np.uint32) << (8 * byte)
    channels = [_field(values, mask) for mask in (red, green, blue, alpha)]
    if not (alpha and channels[3].any()):
        channels.pop()
    return np.stack(channels, -1)


def _field(values: Array, mask: int) -> Array:
    """Return the bits that a mask selects, scaled to eight bits."""
    if not mask:
        return np.zeros(values.shape, np.uint8)
    shift = (mask & -mask).bit_length() - 1
    highest = mask >> shift
    if highest & (highest + 1):
        raise unsupported("BMP with bit fields in several parts")
    return eight_bits((values & mask) >> shift, float(highest))


def _from_runs(bitmap: _Bitmap, content: bytes) -> Array:
    """Return the indices of run-length codes; pixels that are passed over have index 0."""
    if len(content) - bitmap.start > _MOST_RUNS:
        raise unsupported("BMP with so much run-length code")
    width, height, nibbles = bitmap.width, bitmap.height, bitmap.compression == _RLE4
    indices = bytearray(width * height)
    x = y = 0
    at = bitmap.start
    while y < height:
        if at + 2 > len(content):
            if (x, y) >= (width, height - 1) and y == height - 1:
                break
            raise ImageError(TRUNCATED)
        count, value = content[at], content[at + 1]
        at += 2
        if count == 0 and value == 0:
            x, y = 0, y + 1
            continue
        if count == 0 and value == 1:
            break
        if count == 0 and value == 2:
            if at + 2 > len(content):
                raise ImageError(TRUNCATED)
            x, y, at = x + content[at], y + content[at + 1], at + 2
            continue
        if count:
            run = bytes([value >> 4, value & 15]) * 128 if nibbles else bytes([value]) * 255
            run = run[:count]
        else:
            size = (value + 1) // 2 if nibbles else value
            literal = content[at : at + size]
            if len(literal) < size:
                raise ImageError(TRUNCATED)
            run = literal
            if nibbles:
                run = bytes(n for byte in literal for n in (byte >> 4, byte & 15))[:value]
            at += size + size % 2
        seen = run[: max(width - x, 0)]
        indices[y * width + x : y * width + x + len(seen)] = seen
        x += len(run)
    return np.frombuffer(bytes(indices), np.uint8).reshape(height, width)


# --- BMP and DIB --------------------------------------------------------------------------


def _of_file(content: bytes) -> _Bitmap:
    """Read the header of a BMP, or of a DIB, which has no header of the file."""
    if not content.startswith(b"BM"):
        return _bitmap(content, 0)
    if len(content) < 26:
        raise ImageError("cannot be decoded: corrupted BMP (its header)")
    return _bitmap(content, 14, int.from_bytes(content[10:14], "little"))


def _open(content: bytes) -> Image.Image:
    bitmap = _of_file(content)
    return without_pixels(bitmap.width, bitmap.height)


def _is_dib(head: bytes) -> bool:
    """Return whether a file starts with the header of a bitmap."""
    size = int.from_bytes(head[:4], "little")
    return (
        size in _HEADERS
        and int.from_bytes(head[8:10] if size == 12 else head[12:14], "little") == 1
    )


BMP = Codec(
    lambda head: head.startswith(b"BM"),
    _open,
    lambda _header, content: _image(_of_file(content), content),
)
DIB = Codec(_is_dib, _open, BMP.load)


# --- ICO ----------------------------------------------------------------------------------


def _best_icon(content: bytes) -> int:
    """Return where the largest icon starts; of several, the one of most colours."""
    count = int.from_bytes(content[4:6], "little")
    icons: list[tuple[int, int, int, int]] = []
    for at in range(6, min(6 + 16 * count, len(content) - 15), 16):
        width, height = content[at] or 256, content[at + 1] or 256
        bits, _, start = struct.unpack_from("<HII", content, at + 6)
        icons.append((width * height, bits or 32, -at, start))
    if not icons:
        raise ImageError("cannot be decoded: corrupted ICO (no icon)")
    _, _, _, start = max(icons)
    if start + 24 > len(content):
        raise ImageError(TRUNCATED)
    return start


def _open_icon(content: bytes) -> Image.Image:
    start = _best_icon(content)
    if PNG.accept(content[start : start + 16]):
        return PNG.open(content[start:])
    bitmap = _bitmap(content, start, masked=True)
    return without_pixels(bitmap.width, bitmap.height)


def _load_icon(header: Image.Image, content: bytes) -> Image.Image:
    """Decode an icon; its mask says what is transparent if it has no alpha."""
    start = _best_icon(content)
    if PNG.accept(content[start : start + 16]):
        return PNG.load(header, content[start:])
    bitmap = _bitmap(content, start, masked=True)
    if bitmap.bits == 32 and bitmap.compression == _RGB:
        bitmap = replace(bitmap, masks=(*bitmap.masks[:3], 0xFF000000))
    image = _image(bitmap, content)
    if image.mode == "RGBA":
        return image
    mask = replace(bitmap, bits=1, start=bitmap.start + bitmap.height * bitmap.stride)
    clear = unpacked(_rows(mask, content, mask.start, mask.stride), 1, bitmap.width)[::-1]
    image = image.convert("RGB")
    image.putalpha(Image.fromarray(255 - 255 * clear))
    return image


ICO = Codec(lambda head: head.startswith(b"\0\0\1\0"), _open_icon, _load_icon)
