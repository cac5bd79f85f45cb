"""Decode TIFF: libtiff undoes the compression, and the samples are interpreted here.

Pillow knows a fixed list of combinations of byte order, depth, kind and arrangement of samples, and
reads some that are not in it wrongly without an error. Here each property of the samples is applied
by itself, so that every combination is either right or refused.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin, _imaging

from r2ncli.errors import ImageError
from r2ncli.images.colour import eight_bits, unpacked
from r2ncli.images.decoders import Codec
from r2ncli.images.jpeg import pixels_of_stream
from r2ncli.images.pillow import TRUNCATED, unsupported, without_pillows_limit, without_pixels
from r2ncli.images.tiff_pages import (
    BYTES_BY_LIBTIFF,
    CCITT,
    CIELAB,
    CMYK,
    COLOURS,
    ICCLAB,
    JPEG,
    NO_COMPRESSION,
    OLD_JPEG,
    PALETTE,
    RGB,
    WHITE_IS_ZERO,
    YCBCR,
    Page,
    page_of,
)

Array = npt.NDArray[Any]

_LARGE = 50_000_000  # pixels, less than Pillow's limit


def _open(content: bytes) -> Image.Image:
    """Read the header of a TIFF."""
    page = page_of(content)
    return without_pixels(page.width, page.height)


# --- strips and tiles ---------------------------------------------------------------------


def _extents(page: Page, content: bytes, plane: int) -> list[tuple[int, int]]:
    """Return where each strip or tile of a plane starts, and how many bytes it has.

    Tiles are found under the tags of strips too. Lengths of zero or without a tag end where
    the next one starts. Raises `ImageError` if one lies outside the file.
    """
    starts = page.tags.get(324 if page.tiled and 324 in page.tags.values else 273)
    counts = page.tags.get(325 if page.tiled and 325 in page.tags.values else 279)
    each = page.across * page.down
    within = slice(plane * each, (plane + 1) * each)
    if starts is None or len(starts) < within.stop:
        raise ImageError(TRUNCATED)
    offsets = starts[within].astype(np.int64)
    following = np.append(np.unique(starts.astype(np.int64)), len(content))
    ends = following[np.searchsorted(following, offsets, "right").clip(max=len(following) - 1)]
    lengths = np.maximum(ends - offsets, 0)
    if counts is not None and len(counts) >= within.stop:
        given = counts[within].astype(np.int64)
        lengths = np.where(given > 0, given, lengths)
    if page.compression != NO_COMPRESSION and (offsets + lengths > len(content)).any():
        raise ImageError(TRUNCATED)
    if (offsets <= 0).any() or (offsets >= len(content)).any():
        raise ImageError(TRUNCATED)
    return list(zip(offsets.tolist(), lengths.tolist(), strict=True))


def _samples(page: Page, content: bytes, wanted: list[int]) -> Array:
    """Return the wanted samples, [height, width, samples], in the byte order of this machine."""
    planes = []
    for plane in wanted if page.planes > 1 else [0]:
        within = _extents(page, content, plane)
        heights = [page.rows] * len(within)
        if not page.tiled:
            heights[-1] = page.height - page.rows * (page.down - 1)
        if page.compression == JPEG:
            stacked = _from_jpeg(page, content, within, heights)
        elif page.subsampling != (1, 1):
            stacked = _from_units(page, content, within, heights)
        else:
            row_bytes = -(-page.columns * page.per_pixel * page.bits // 8)
            stacked = _from_bytes(page, _rows(page, content, within, heights, row_bytes))
        if page.tiled:
            grid = stacked.reshape(page.down, page.across, page.rows, page.columns, -1)
            stacked = grid.swapaxes(1, 2).reshape(page.down * page.rows, -1, page.per_pixel)
        planes.append(stacked[: page.height, : page.width])
    if page.planes > 1:
        return np.concatenate(planes, axis=-1)
    return planes[0] if wanted == list(range(page.samples)) else planes[0][..., wanted]


def _rows(
    page: Page, content: bytes, extents: list[tuple[int, int]], heights: list[int], row_bytes: int
) -> Array:
    """Return the uncompressed bytes of strips or tiles, stacked: uint8 [rows, row_bytes]."""
    if page.compression != NO_COMPRESSION:
        return _by_libtiff(page, content, extents, heights, row_bytes)
    pieces = []
    for (start, _), height in zip(extents, heights, strict=True):
        if start + height * row_bytes > len(content):
            raise ImageError(TRUNCATED)
        pieces.append(np.frombuffer(content, np.uint8, height * row_bytes, start))
    rows = (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).reshape(-1, row_bytes)
    if page.tags.number(266, 1) == 2:
        rows = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)).reshape(-1, 8)[:, ::-1])[
            rows
        ]
    return rows


def _by_libtiff(
    page: Page, content: bytes, extents: list[tuple[int, int]], heights: list[int], row_bytes: int
) -> Array:
    """Have libtiff undo the compression of strips or tiles; it is told that they are grey bytes.

    The file that it gets has one strip for each strip or tile, one below the other.
    """
    black_and_white = page.compression in CCITT
    if black_and_white and (page.bits, page.samples) != (1, 1):
        raise unsupported("TIFF with CCITT compression of more than one bit")
    pieces = [content[start : start + length] for start, length in extents]
    starts = 8 + np.cumsum([0] + [len(piece) for piece in pieces])
    if starts[-1] > 2**32 - 2**24:
        raise unsupported("TIFF with more than 4 GB of compressed data")
    rows = sum(heights)
    tags = {256: [page.columns if black_and_white else row_bytes], 257: [rows]}
    tags |= {258: [1 if black_and_white else 8], 259: [page.compression], 262: [1], 277: [1]}
    tags |= {266: [page.tags.number(266, 1)], 278: [heights[0]]}
    tags |= {273: starts[:-1].tolist(), 279: [len(piece) for piece in pieces]}
    tags |= {tag: [page.tags.number(tag, 0)] for tag in (292, 293) if page.tags.number(tag, 0)}
    table = int(starts[-1])
    entries, values = b"", b""
    for tag in sorted(tags):
        packed = struct.pack(f"<{len(tags[tag])}I", *tags[tag])
        if len(packed) > 4:
            values, packed = (
                values + packed,
                struct.pack("<I", table + 6 + 12 * len(tags) + len(values)),
            )
        entries += struct.pack("<HHI", tag, 4, len(tags[tag])) + packed
    head = b"II*\0" + struct.pack("<I", table)
    file = b"".join([head, *pieces, struct.pack("<H", len(tags)), entries, bytes(4), values])
    image = TiffImagePlugin.TiffImageFile(BytesIO(file), "")
    try:
        _load_by_pillow(image)
    except OSError:
        if page.compression in _OPTIONAL and not _is_built_in(page.compression):
            name = _OPTIONAL[page.compression]
            raise unsupported(f"TIFF with {name} compression") from None
        raise
    if black_and_white:
        return np.packbits(np.asarray(image), axis=1)
    return np.asarray(image)


_OPTIONAL = {34925: "LZMA", 50000: "Zstandard"}  # in libtiff


def _is_built_in(compression: int) -> bool:
    """Return whether this libtiff has a compression that not all have."""
    try:
        return bool(ctypes.CDLL(_imaging.__file__).TIFFIsCODECConfigured(compression))
    except (AttributeError, OSError):  # this Pillow hides its libtiff
        return True


def _load_by_pillow(image: Image.Image) -> None:
    """Decode an image with libtiff, without Pillow's limit on pixels."""
    _silence_libtiff()
    if image.width * image.height < _LARGE:
        image.load()
    else:
        with without_pillows_limit:
            image.load()


@cache
def _silence_libtiff() -> None:
    """Keep libtiff from writing errors to stderr; they are in the row of the image."""
    try:
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)
    except (AttributeError, OSError):  # this Pillow hides its libtiff, or has none
        return


def _from_bytes(page: Page, rows: Array) -> Array:
    """Return the samples of rows of bytes, [rows, columns, samples of a pixel]."""
    shape = (len(rows), page.columns, page.per_pixel)
    predictor = page.tags.number(317, 1) if page.compression in BYTES_BY_LIBTIFF else 1
    whole = page.bits in (8, 16, 32, 64)
    if (
        predictor not in (1, 2, 3)
        or (predictor == 2 and not (whole and page.kind != "f"))
        or (predictor == 3 and page.kind != "f")
    ):
        raise unsupported(f"TIFF with predictor {predictor} of {page.bits} bits")
    if predictor == 3:
        size = page.bits // 8
        summed = np.cumsum(rows.reshape(len(rows), -1, page.per_pixel), 1, np.uint8)
        planes = summed.reshape(len(rows), size, -1)  # the highest bytes first, in either order
        together = np.ascontiguousarray(planes.transpose(0, 2, 1)).view(f">f{size}")
        return together.astype(f"f{size}").reshape(shape)
    if whole:
        stored = np.dtype(f"{page.tags.order}{page.kind}{page.bits // 8}")
        samples = (
            np.ascontiguousarray(rows).view(stored).astype(stored.newbyteorder("="), copy=False)
        )
        samples = samples.reshape(shape)
        return samples if predictor == 1 else np.cumsum(samples, 1, samples.dtype)
    if page.bits == 24:
        byte = rows[:, : page.columns * page.per_pixel * 3].reshape(*shape, 3).astype(np.uint32)
        low, middle, high = (0, 1, 2) if page.tags.order == "<" else (2, 1, 0)
        return byte[..., low] | byte[..., middle] << 8 | byte[..., high] << 16
    return unpacked(rows, page.bits, page.columns * page.per_pixel).reshape(shape)


def _from_units(
    page: Page, content: bytes, extents: list[tuple[int, int]], heights: list[int]
) -> Array:
    """Return Y'CbCr whose chroma is subsampled: units of several Y, one Cb and one Cr."""
    across, down = page.subsampling
    if page.planes > 1 or page.bits != 8 or not {across, down} <= {1, 2, 4} or page.samples != 3:
        raise unsupported("TIFF of subsampled Y'CbCr in this arrangement")
    units = -(-page.columns // across)
    size = across * down + 2
    lines = [-(-height // down) for height in heights]
    rows = _rows(page, content, extents, lines, units * size)
    if page.compression in BYTES_BY_LIBTIFF and page.tags.number(317, 1) != 1:
        raise unsupported("TIFF of subsampled Y'CbCr with a predictor")
    parts = rows.reshape(len(rows), units, size)
    shape = (len(rows) * down, units * across, 1)
    luma = parts[..., :-2].reshape(len(rows), units, down, across).swapaxes(1, 2).reshape(shape)
    chroma = parts[..., -2:].repeat(down, 0).repeat(across, 1)
    whole = np.concatenate([luma, chroma], -1)[:, : page.columns]
    if heights[-1] % down or page.rows % down:  # each strip is filled up to whole units
        kept = [np.arange(h) + down * sum(lines[:n]) for n, h in enumerate(heights)]
        whole = whole[np.concatenate(kept)]
    return whole


def _from_jpeg(
    page: Page, content: bytes, extents: list[tuple[int, int]], heights: list[int]
) -> Array:
    """Return the samples of strips or tiles that are JPEG streams; Y'CbCr becomes RGB."""
    if page.bits != 8 or page.kind != "u":
        raise unsupported(f"TIFF with JPEG compression of {page.bits} bits")
    tables = page.tags.get(347)
    shared = b"" if tables is None else tables.tobytes()[2:-2]
    transform = 1 if page.photometric == YCBCR and page.planes == 1 else 0
    pieces = []
    for (start, length), height in zip(extents, heights, strict=True):
        stream = content[start : start + length]
        most = 4 * page.columns * page.rows + 2**16
        pixels = pixels_of_stream(stream, shared, transform, most)
        tall, wide, count = pixels.shape
        if tall < height or wide < page.columns or count != page.per_pixel:
            raise ImageError("cannot be decoded: corrupted TIFF (the size of a JPEG stream)")
        pieces.append(pixels[:height, : page.columns])
    return np.concatenate(pieces)


# --- meaning of the samples ---------------------------------------------------------------


def _load(_header: Image.Image, content: bytes) -> Image.Image:
    """Decode the pixels; the orientation and the ICC profile go with them."""
    page = page_of(content)
    image = _by_old_jpeg(page, content) if page.compression == OLD_JPEG else _image(page, content)
    profile, xmp = page.tags.values.get(34675), page.tags.values.get(700)
    if profile is not None:
        image.info["icc_profile"] = profile.tobytes()
    if xmp is not None:
        image.info["xmp"] = xmp.tobytes()
    if 274 in page.tags.values:
        image.getexif()[274] = page.tags.number(274, 1)
    return image


def _by_old_jpeg(page: Page, content: bytes) -> Image.Image:
    """Decode JPEG of the old style: a whole JPEG file, or with libtiff, which knows other forms."""
    start, length = page.tags.number(513, 0), page.tags.number(514, 0)
    extents = [(start, length)] if start else []
    if page.tags.get(273) is not None or page.tags.get(324) is not None:
        extents += _extents(page, content, 0)
    if any(start + length > len(content) for start, length in extents):
        raise ImageError(TRUNCATED)
    for start, length in extents:
        try:
            stream = content[start : start + length or None]
            pixels = pixels_of_stream(stream, b"", 1, page.width * page.height)
        except Exception:  # only tables, or only a part of the image
            continue
        if pixels.shape[:2] == (page.height, page.width) and pixels.shape[2] in (1, 3):
            return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image = TiffImagePlugin.TiffImageFile(BytesIO(content), "")
    if image.tag_v2.get(256) != page.width or image.tag_v2.get(254, 0) & 5:
        raise unsupported("TIFF of JPEG of the old style after its first page")
    image.tag_v2.pop(274, None)  # turned upright later, as every image
    _load_by_pillow(image)
    return image.convert("RGB") if image.mode != "L" else image.copy()


def _image(page: Page, content: bytes) -> Image.Image:
    """Return the page in eight bits: L, LA, RGB, RGBA, CMYK or LAB."""
    count = COLOURS[page.photometric]
    extra = page.tags.get(338)
    # without the tag, a sample after RGB is alpha, as Pillow and libtiff take it
    meanings = [2] * (page.photometric == RGB) if extra is None else extra.tolist()
    found = [n for n, meaning in enumerate(meanings) if meaning in (1, 2, 999)]
    found = [n for n in found[:1] if count + n < page.samples]
    samples = _samples(page, content, [*range(count), *(count + n for n in found)])
    colours, alpha, associated = samples[..., :count], None, False
    if found:
        alpha = eight_bits(samples[..., count], _white(page))
        associated = meanings[found[0]] == 1
        if extra is None and not alpha.any():
            alpha = None
    if page.photometric == PALETTE:
        pixels = _palette(page, colours[..., 0])
    elif page.photometric == YCBCR and (page.compression != JPEG or page.planes > 1):
        pixels = _from_ycbcr(page, colours)
    elif page.photometric in (CIELAB, ICCLAB):
        if page.bits != 8:
            raise unsupported(f"TIFF of L*a*b* of {page.bits} bits")
        stored = colours ^ np.array([0, 128, 128], np.uint8) if page.photometric == 9 else colours
        return Image.frombytes("LAB", (page.width, page.height), stored.astype(np.uint8).tobytes())
    else:
        pixels = eight_bits(colours, _white(page))
    if page.photometric == WHITE_IS_ZERO:
        pixels = 255 - pixels
    if page.photometric == CMYK:
        if page.tags.number(332, 1) != 1:
            raise unsupported("TIFF of inks other than CMYK")
        if alpha is not None and not associated:
            pixels = (pixels.astype(np.uint16) * alpha[..., None] // 255).astype(np.uint8)
        return Image.frombytes("CMYK", (page.width, page.height), pixels.tobytes())
    if alpha is not None and associated:  # the colours have been multiplied by it already
        white = pixels.astype(np.uint16) + (255 - alpha[..., None])
        pixels, alpha = np.minimum(white, 255).astype(np.uint8), None
    image = Image.fromarray(
        np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    )
    if alpha is not None:
        image.putalpha(Image.fromarray(np.ascontiguousarray(alpha)))
    return image


def _white(page: Page) -> float | None:
    """Return the highest value of the declared depth; None for 32 bits, which declare no range."""
    if page.kind == "f" or page.bits >= 32:
        return None
    return float(2 ** (page.bits - (page.kind == "i")) - 1)


def _palette(page: Page, indices: Array) -> Array:
    """Return the colours of a palette; one whose entries all fit into a byte has bytes."""
    entries = page.tags.get(320)
    if entries is None or len(entries) < 3 or page.kind != "u" or page.bits > 16:
        raise ImageError("cannot be decoded: corrupted TIFF (its palette)")
    table = entries[: len(entries) // 3 * 3].reshape(3, -1).T
    table = (table >> 8 if table.max() > 255 else table).astype(np.uint8)
    return table[np.minimum(indices, len(table) - 1)]


def _from_ycbcr(page: Page, samples: Array) -> Array:
    """Return RGB by the coefficients and reference levels that the page declares."""
    if page.bits != 8 or page.kind != "u":
        raise unsupported(f"TIFF of Y'CbCr of {page.bits} bits")
    luma, reference = page.tags.get(529), page.tags.get(532)
    red, green, blue = (0.299, 0.587, 0.114)
    if luma is not None and len(luma) == 6 and luma[1::2].all():
        red, green, blue = (luma[::2] / luma[1::2]).tolist()
    low, high = np.array([0, 128, 128]), np.array([255, 255, 255])
    if reference is not None and len(reference) == 12 and reference[1::2].all():
        levels = reference[::2] / reference[1::2]
        if (levels[1::2] > levels[::2]).all():
            low, high = levels[::2], levels[1::2]
    scale = np.array([255, 127, 127]) / (high - low)
    whole = np.empty(samples.shape, np.uint8)
    for at in range(0, len(samples), 256):  # rows at once, to bound the memory
        y, cb, cr = np.moveaxis((samples[at : at + 256] - low) * scale, -1, 0)
        r, b = y + cr * (2 - 2 * red), y + cb * (2 - 2 * blue)
        g = (y - red * r - blue * b) / green
        whole[at : at + 256] = np.rint(np.stack([r, g, b], -1).clip(0, 255))
    return whole


TIFF = Codec(lambda head: TiffImagePlugin._accept(head), _open, _load)
