"""JPEG 2000: Pillow decodes the components, and the boxes of the file say here what they are.

Pillow wraps white of more than eight bits in colour to black, shifts fewer bits instead of scaling
them, misplaces subsampled components of odd size, and ignores the definitions of channels.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, Jpeg2KImagePlugin

from r2ncli.errors import ImageError
from r2ncli.images.colour import eight_bits
from r2ncli.images.decoders import Codec
from r2ncli.images.pillow import TRUNCATED, boxes_between, unsupported, without_pixels

Array = npt.NDArray[Any]

_SIZE, _CODING, _TILE_PART, _END = 0xFF51, 0xFF52, 0xFF90, 0xFFD9  # markers
_CMYK, _BILEVEL, _SRGB, _GREY, _SYCC = 12, 15, 16, 17, 18  # enumerated colour spaces
_COLOURS = {_CMYK: 4, _BILEVEL: 1, _SRGB: 3, _GREY: 1, _SYCC: 3}
_MOST_PACKETS = 10_000_000  # a real image of 200 million pixels has less than a million


@dataclass(frozen=True)
class _Codestream:
    """The components, from the header of a codestream.

    Pillow takes `subsampled` components for Y'CbCr and returns RGB.
    """

    start: int
    width: int
    height: int
    depths: tuple[int, ...]
    subsampled: bool


@dataclass(frozen=True)
class _Boxes:
    """What a file says of its components; each is None or empty if it does not.

    Attributes
    ----------
    palette : array [entries, columns] or None
        With the depth of each column in `palette_depths`.
    mapping : tuple of (component, type, column)
        How channels are made with the palette; type 1 uses it.
    channels : tuple of (channel, type, association)
        Type 0 is a colour, and the association its number from 1; types 1 and 2 are opacity.
    """

    space: int | None = None
    profile: bytes | None = None
    palette: Array | None = None
    palette_depths: tuple[int, ...] = ()
    mapping: tuple[tuple[int, int, int], ...] = ()
    channels: tuple[tuple[int, int, int], ...] = ()


# --- the codestream -----------------------------------------------------------------------


def _codestream(content: bytes, start: int) -> _Codestream:
    """Read the header at an offset; refuse what Pillow decodes wrongly."""
    if content[start : start + 4] != b"\xff\x4f\xff\x51" or start + 42 > len(content):
        raise ImageError("cannot be decoded: corrupted JPEG 2000 (its header)")
    fields = struct.unpack_from(">8IH", content, start + 8)
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, count = fields
    width, height = right - left, bottom - top
    components = content[start + 42 : start + 42 + 3 * count]
    if min(width, height, count, tile_width, tile_height) <= 0 or len(components) < 3 * count:
        raise ImageError("cannot be decoded: corrupted JPEG 2000 (its header)")
    if count > 4:
        raise unsupported(f"JPEG 2000 of {count} components")
    depths = tuple((depth & 127) + 1 for depth in components[::3])
    steps = {*components[1::3], *components[2::3]}
    all_steps = list(zip(components[1::3], components[2::3], strict=True))
    if steps != {1} and (count != 3 or all_steps[0] != (1, 1) or all_steps[1] != all_steps[2]):
        raise unsupported("JPEG 2000 of subsampled components in this arrangement")
    if any(depth & 128 for depth in components[::3]):
        raise unsupported("JPEG 2000 of signed integers")
    if max(depths) > (16 if count == 1 else 8):
        raise unsupported(f"JPEG 2000 of {count} components of {max(depths)} bits")
    edges = [left, top, right, bottom, tile_left, tile_top]
    if tile_width < width or tile_height < height:
        edges += [tile_width, tile_height]
    if 0 in steps or any(edge % step for edge in edges for step in steps):
        raise unsupported("JPEG 2000 whose subsampling does not divide its size")
    _refuse_much_work(content, start, count, (width, height), (tile_width, tile_height))
    return _Codestream(start, width, height, depths, steps != {1})


def _segments(content: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Return marker and offset of the segments of a main header."""
    at = start + 2
    while at + 4 <= len(content):
        marker, length = struct.unpack_from(">HH", content, at)
        yield marker, at
        if marker == _TILE_PART:
            return
        at += 2 + length


def _refuse_much_work(
    content: bytes, start: int, count: int, size: tuple[int, int], tile: tuple[int, int]
) -> None:
    """Refuse a header that promises more packets than a real image has."""
    coding = next((at for marker, at in _segments(content, start) if marker == _CODING), None)
    if coding is None or coding + 14 > len(content):
        raise ImageError("cannot be decoded: corrupted JPEG 2000 (its header)")
    layers = int.from_bytes(content[coding + 6 : coding + 8])
    levels = min(content[coding + 9], 32)
    given = content[coding + 14 : coding + 15 + levels] if content[coding + 4] & 1 else b""
    precincts = 0
    for level in range(levels + 1):
        across, down = (given[level] & 15, given[level] >> 4) if level < len(given) else (15, 15)
        each = 1
        for whole, part, exponent in zip(size, tile, (across, down), strict=True):
            each *= -(-whole // min(part, max(whole, 1)))  # tiles
            each *= -(-(min(part, whole) >> (levels - level)) // 2**exponent) or 1
        precincts += each
    if precincts * layers * count > _MOST_PACKETS:
        raise ImageError(f"cannot be decoded: {precincts * layers * count:,} packets, too many")


def _whole(content: bytes, codestream: _Codestream) -> bytes:
    """Return the codestream with an end marker; an error if a part of a tile is not in the file."""
    fields = struct.unpack_from(">8I", content, codestream.start + 8)
    right, bottom, _, _, tile_width, tile_height, tile_left, tile_top = fields
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    at = next((at for m, at in _segments(content, codestream.start) if m == _TILE_PART), None)
    seen: dict[int, int] = {}
    promised: dict[int, int] = {}
    while at is not None and at + 12 <= len(content):
        marker, _, tile, length, _, parts = struct.unpack_from(">HHHIBB", content, at)
        if marker != _TILE_PART:
            break
        seen[tile] = seen.get(tile, 0) + 1
        promised[tile] = max(promised.get(tile, 1), parts)
        if length == 0:  # up to the end marker
            length = content.rfind(b"\xff\xd9") - at
        if length < 12 or at + length > len(content):
            raise ImageError(TRUNCATED)
        at += length
    if len(seen) < tiles or any(seen[tile] < count for tile, count in promised.items()):
        raise ImageError(TRUNCATED)
    return content[codestream.start : at] + b"\xff\xd9"


# --- the boxes of a file ------------------------------------------------------------------


def _read(content: bytes) -> tuple[_Codestream, _Boxes | None]:
    """Read the headers of a file, or of a codestream, which has no boxes."""
    if content.startswith(b"\xff\x4f"):
        return _codestream(content, 0), None
    header: list[tuple[bytes, bytes]] = []
    for kind, start, end in boxes_between(content, 0, len(content)):
        if kind == b"jp2h":
            inner = boxes_between(content, start, end)
            header += [(name, content[first:last]) for name, first, last in inner]
        elif kind == b"jp2c":
            return _codestream(content, start), _boxes(header)
    raise ImageError(TRUNCATED)


def _boxes(header: list[tuple[bytes, bytes]]) -> _Boxes:
    """Read the boxes that say what the components are."""
    space: int | None = None
    profile: bytes | None = None
    palette: Array | None = None
    depths: tuple[int, ...] = ()
    mapping: tuple[tuple[int, int, int], ...] = ()
    channels: tuple[tuple[int, int, int], ...] = ()
    for kind, body in header:
        if kind == b"colr" and body[:1] == b"\1" and space is None and profile is None:
            space = int.from_bytes(body[3:7])
            if space not in _COLOURS:
                raise unsupported(f"JPEG 2000 of colour space {space}")
        elif kind == b"colr" and body[:1] == b"\2" and space is None and profile is None:
            profile = body[3:]
        elif kind == b"pclr" and len(body) > 3:
            depths = tuple((depth & 127) + 1 for depth in body[3 : 3 + body[2]])
            if max(depths) > 16 or any(depth & 128 for depth in body[3 : 3 + body[2]]):
                raise unsupported("JPEG 2000 with such a palette")
            row = np.dtype([(str(n), ">u2" if d > 8 else "u1") for n, d in enumerate(depths)])
            entries = np.frombuffer(body, row, int.from_bytes(body[:2]), 3 + body[2])
            palette = np.stack([entries[str(n)].astype(np.uint16) for n in range(len(depths))], -1)
        elif kind == b"cmap":
            mapping = tuple(struct.iter_unpack(">HBB", body[: len(body) // 4 * 4]))
        elif kind == b"cdef":
            channels = tuple(struct.iter_unpack(">HHH", body[2 : 2 + (len(body) - 2) // 6 * 6]))
    return _Boxes(space, profile, palette, depths, mapping, channels)


# --- the pixels ---------------------------------------------------------------------------


def _open(content: bytes) -> Image.Image:
    codestream, _ = _read(content)
    return without_pixels(codestream.width, codestream.height)


def _load(_header: Image.Image, content: bytes) -> Image.Image:
    """Decode the components and combine them as the boxes say."""
    codestream, boxes = _read(content)
    components = _components(_whole(content, codestream), codestream)
    channels = _channels(components, codestream.depths, boxes or _Boxes())
    colours, alpha, multiplied = _assigned(channels, boxes)
    pixels = np.stack(colours, -1)
    if codestream.subsampled and boxes and boxes.space != _SYCC:
        raise unsupported("JPEG 2000 of subsampled components that are not Y'CbCr")
    if boxes and boxes.space == _SYCC and not codestream.subsampled:
        pixels = np.array(Image.fromarray(pixels, "YCbCr").convert("RGB"))
    if alpha is not None and multiplied:
        white = pixels.astype(np.uint16) + (255 - alpha[..., None])
        pixels, alpha = np.minimum(white, 255).astype(np.uint8), None
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[len(colours)]
    size = (codestream.width, codestream.height)
    image = Image.frombytes(mode, size, np.ascontiguousarray(pixels).tobytes())
    if alpha is not None and mode != "CMYK":
        image.putalpha(Image.fromarray(np.ascontiguousarray(alpha)))
    if boxes and boxes.profile:
        image.info["icc_profile"] = boxes.profile
    return image


def _components(stream: bytes, codestream: _Codestream) -> list[Array]:
    """Return the values of each component; Pillow has shifted them to 8 or 16 bits."""
    image = Jpeg2KImagePlugin.Jpeg2KImageFile(BytesIO(stream), "")
    image.load()
    values = np.asarray(image)
    planes = [values] if values.ndim == 2 else list(np.moveaxis(values, -1, 0))
    full = 16 if image.mode == "I;16" else 8
    return [plane >> (full - d) for plane, d in zip(planes, codestream.depths, strict=True)]


def _channels(components: list[Array], depths: tuple[int, ...], boxes: _Boxes) -> list[Array]:
    """Return channels of eight bits, by the palette if there is one."""
    if boxes.palette is None:
        return [eight_bits(c, 2.0**d - 1) for c, d in zip(components, depths, strict=True)]
    channels = []
    for component, kind, column in boxes.mapping or [(0, 1, n) for n in range(4)]:
        if kind == 0:
            channels.append(eight_bits(components[component], 2.0 ** depths[component] - 1))
        elif column < boxes.palette.shape[1]:
            entries = eight_bits(boxes.palette[:, column], 2.0 ** boxes.palette_depths[column] - 1)
            channels.append(entries[np.minimum(components[component], len(entries) - 1)])
    return channels


def _assigned(
    channels: list[Array], boxes: _Boxes | None
) -> tuple[list[Array], Array | None, bool]:
    """Return the channels of colours in their order, that of opacity, and if it is multiplied in.

    Without definitions of channels, one more than the colours is opacity, as elsewhere.
    """
    count = 3 if len(channels) >= 3 else 1
    if boxes and boxes.profile:
        count = {b"GRAY": 1, b"RGB ": 3, b"CMYK": 4}.get(boxes.profile[16:20], count)
    elif boxes and boxes.space is not None:
        count = _COLOURS[boxes.space]
    order, alpha, multiplied = list(range(count)), None, False
    if boxes and boxes.channels:
        for channel, kind, association in boxes.channels:
            if channel >= len(channels):
                continue
            if kind == 0 and 1 <= association <= count:
                order[association - 1] = channel
            elif kind in (1, 2) and association == 0:
                alpha, multiplied = channels[channel], kind == 2
    elif len(channels) == count + 1 and count != 4 and channels[-1].any():
        alpha = channels[-1]
    if len(channels) < count:
        raise unsupported(f"JPEG 2000 of {len(channels)} channels in this colour space")
    return [channels[n] for n in order], alpha, multiplied


JPEG_2000 = Codec(Jpeg2KImagePlugin._accept, _open, _load)
