"""Decode every combination that the image formats allow, and compare with the true pixels.

    python tests/checks/image_table.py
    python tests/checks/image_table.py --format TIFF --format PNG

Each cell is a small image of one format, colour type, depth, layout, byte order, compression and
transparency, written byte by byte or by an encoder other than Pillow, whose pixels are known. What
the network sees of it must be equal within 1.5 grey levels in the mean, or the error must say what
is not supported. Anything else is garbled. Prints a table in Markdown and then one JSON document;
ends with exit code 1 if a cell is garbled.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import lzma
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.icc_profiles import lab_in_srgb
from support.image_writers import (
    bmp_file,
    bmp_header,
    bmp_rows,
    bmp_runs,
    box,
    gif_file,
    ico_file,
    jp2_file,
    pack_bits,
    packed,
    png_chunk,
    png_file,
    reversed_bits,
    tiff_file,
    tiff_pieces,
)

from r2ncli.architectures import Preprocessing
from r2ncli.errors import ImageError
from r2ncli.images.decode import DecodeRules, decode

Array = npt.NDArray[Any]
Tags = dict[int, tuple[int, list[int]]]

WIDTH, HEIGHT, SIDE = 37, 29, 32
CLOSE = 1.5  # grey levels, in the mean


@dataclass(frozen=True)
class Cell:
    """One file; `truth` is its pixels on white, [height, width, 3] of 0 to 255.

    Without a truth the file must be refused.
    """

    format: str
    name: str
    content: bytes
    truth: Array | None


def scene() -> tuple[Array, Array]:
    """RGB and alpha, uint8: a gradient with black, white and coloured boxes."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    rgb = np.stack([x * 255 // (WIDTH - 1), y * 255 // (HEIGHT - 1), 255 - (x + y) * 3], -1).astype(
        np.uint8
    )
    rgb[2:10, 3:12], rgb[2:10, 14:22] = 255, 0
    rgb[14:22, 4:14], rgb[16:26, 20:33] = [250, 20, 30], [20, 60, 240]
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[20:, :12], alpha[:6, 25:] = 0, 128
    return rgb, alpha


RGB, ALPHA = scene()
GREY = RGB[..., 0]
SMOOTH = np.stack(
    np.meshgrid(np.arange(60, 60 + 4 * WIDTH, 4), np.arange(70, 70 + 3 * HEIGHT, 3)), -1
)
SMOOTH = np.dstack([SMOOTH, 250 - SMOOTH.mean(-1)]).astype(np.uint8)  # for decimated chroma


def on_white(colours: Array, alpha: Array) -> Array:
    """Colours of 0 to 255 on white; alpha of 0 to 255."""
    part = alpha[..., None] / 255
    return colours * part + 255 * (1 - part)


def three(values: Array) -> Array:
    """Three channels of greyscale."""
    grey = values if values.ndim == 3 else values[..., None]
    return grey.repeat(3, -1) if grey.shape[2] == 1 else grey


def scaled(values: Array, bits: int) -> tuple[Array, Array]:
    """Values of 0 to 255 in a depth, and what these are of 0 to 255."""
    highest = 2**bits - 1
    kind = np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32
    stored = np.rint(values / 255 * highest)
    return stored.astype(kind), stored * 255 / highest


# --- TIFF ---------------------------------------------------------------------------------


def tiff_pixels() -> Iterator[tuple[str, Array, int, Tags, Array]]:
    """Name, samples [height, width, samples], bits, tags and truth of every kind of pixel."""

    def tags(photometric: int, kind: int = 1, extra: list[int] | None = None) -> Tags:
        return {262: (3, [photometric]), 339: (3, [kind]), **({338: (3, extra)} if extra else {})}

    for bits in (1, 2, 4, 6, 8, 10, 12, 14, 16, 24):
        stored, truth = scaled(GREY[..., None], bits)
        yield f"grey {bits}", stored, bits, tags(1), three(truth)
        yield (
            f"grey {bits} white is zero",
            (2**bits - 1 - stored).astype(stored.dtype),
            bits,
            tags(0),
            three(truth),
        )
        stored, truth = scaled(RGB, bits)
        yield f"RGB {bits}", stored, bits, tags(2), truth
    numbers: list[tuple[str, int, float, int]] = [
        ("i1", 8, 127, 2),
        ("i2", 16, 32767, 2),
        ("i4", 32, 65535, 2),
        ("u4", 32, 65535, 1),
    ]
    numbers += [
        ("f2", 16, 1, 3),
        ("f4", 32, 1, 3),
        ("f4", 32, 255, 3),
        ("f4", 32, 65535, 3),
        ("f8", 64, 1, 3),
        ("u8", 64, 65535, 1),
    ]
    for dtype, bits, white, kind in numbers:
        values = RGB / 255 * white
        stored = (values if kind == 3 else np.rint(values)).astype(dtype)
        truth = stored.astype(float) * 255 / white
        yield (
            f"grey {dtype} to {white:g}",
            stored[..., :1],
            bits,
            tags(1, kind),
            three(truth[..., :1]),
        )
        yield f"RGB {dtype} to {white:g}", stored, bits, tags(2, kind), truth
    for bits, meaning, colours in itertools.product((8, 12, 16), (0, 1, 2), (GREY[..., None], RGB)):
        part = ALPHA[..., None] / 255 if meaning == 1 else 1.0
        samples, _ = scaled(np.concatenate([colours * part, ALPHA[..., None]], -1), bits)
        name = f"{'grey' if colours.shape[2] == 1 else 'RGB'} {bits} extra {meaning}"
        truth = three(colours) if meaning == 0 else on_white(three(colours), ALPHA)
        yield name, samples, bits, tags(1 if colours.shape[2] == 1 else 2, 1, [meaning]), truth
    for bits, wide in itertools.product((1, 2, 4, 8), (True, False)):
        index, table = palette_of(bits)
        padded = np.zeros((2**bits, 3), int)
        padded[: len(table)] = table
        entries = (padded.T * (257 if wide else 1)).reshape(-1).tolist()
        yield (
            f"palette {bits} of {16 if wide else 8}",
            index[..., None],
            bits,
            {**tags(3), 320: (3, entries)},
            table[index],
        )
    for bits in (8, 16):
        ink = np.concatenate([255 - RGB, np.full((HEIGHT, WIDTH, 1), 40)], -1)
        samples, _ = scaled(ink, bits)
        truth = (255 - ink[..., :3]) * (1 - ink[..., 3:] / 255)
        yield f"CMYK {bits}", samples, bits, tags(5), truth
        more = np.concatenate([samples, samples[..., :1]], -1)
        yield f"CMYK {bits} extra 0", more, bits, tags(5, 1, [0]), truth
    ycc, truth = ycbcr_of(RGB, 1, 1)
    yield "YCbCr 8", ycc, 8, {**tags(6), 530: (3, [1, 1])}, truth
    grey = GREY.astype(int)
    lab = np.stack([grey // 2 + 60, grey // 16, 20 - grey // 10], -1)
    truth = lab_in_srgb((lab * [100 / 255, 1, 1]).reshape(-1, 3)).reshape(HEIGHT, WIDTH, 3)
    yield "CIELAB 8", lab.astype(np.uint8), 8, tags(8), truth
    yield "ICCLAB 8", (lab + np.array([0, 128, 128])).astype(np.uint8), 8, tags(9), truth


def palette_of(bits: int) -> tuple[Array, Array]:
    """Indices and a palette of colours, without grey."""
    count = 2**bits
    table = np.stack(
        [np.linspace(255, 0, count), np.linspace(10, 250, count), np.arange(count) * 91 % 256], -1
    )
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return ((x // 2 + y // 2 * 19) % count).astype(np.uint8), np.rint(table).astype(np.uint8)


def ycbcr_of(rgb: Array, across: int, down: int) -> tuple[Array, Array]:
    """Y'CbCr whose chroma is that of blocks of pixels, and what it is in RGB."""
    r, g, b = np.moveaxis(rgb.astype(float), -1, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    ycc = np.stack([y, 128 + (b - y) / 1.772, 128 + (r - y) / 1.402], -1)
    ycc[..., 1:] = (
        ycc[::down, ::across, 1:].repeat(down, 0).repeat(across, 1)[: len(rgb), : rgb.shape[1]]
    )
    stored = np.rint(ycc.clip(0, 255)).astype(np.uint8)
    y, cb, cr = np.moveaxis(stored.astype(float), -1, 0)
    cb, cr = cb - 128, cr - 128
    truth = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1)
    return stored, truth.clip(0, 255)


def lzw(content: bytes) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.lzw_encode(content))


def zstd(content: bytes) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.zstd_encode(content))


COMPRESSIONS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "none": (1, bytes),
    "Deflate": (8, zlib.compress),
    "PackBits": (32773, pack_bits),
    "LZMA": (34925, lzma.compress),
    "LZW": (5, lzw),
    "Zstandard": (50000, zstd),
}


def base_tags(samples: Array, bits: int, compression: int) -> Tags:
    height, width, count = samples.shape
    sizes: Tags = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * count),
        259: (3, [compression]),
    }
    return {**sizes, 277: (3, [count])}


def tiff_cells(own: bool) -> Iterator[Cell]:
    """Every kind of pixel in every layout; without `own` also those of other encoders."""
    counter = itertools.count()
    layouts = ("one strip", "strips", "tiles")
    for name, samples, bits, tags, truth in tiff_pixels():
        kinds = ["none", "Deflate", "PackBits"] if own else list(COMPRESSIONS)
        for order, layout, planar, packing in itertools.product("<>", layouts, (1, 2), kinds):
            if planar == 2 and samples.shape[2] == 1:
                continue
            predictors = [1]
            if packing in ("Deflate", "LZW") and bits in (8, 16, 32, 64) and 320 not in tags:
                predictors.append(3 if samples.dtype.kind == "f" else 2)
            for predictor in predictors:
                number, pack = COMPRESSIONS[packing]
                big = next(counter) % 3 == 0
                layout_tags, pieces = tiff_pieces(
                    samples,
                    bits,
                    order=order,
                    planar=planar,
                    layout=layout,
                    predictor=predictor,
                    compress=pack,
                )
                entries = {
                    **base_tags(samples, bits, number),
                    **tags,
                    **layout_tags,
                    284: (3, [planar]),
                }
                entries |= {317: (3, [predictor])} if predictor > 1 else {}
                entries[339] = (3, entries[339][1] * samples.shape[2])
                parts = (
                    name,
                    order,
                    layout,
                    f"planar {planar}",
                    packing,
                    f"predictor {predictor}",
                    "Big" * big,
                )
                yield Cell(
                    "TIFF", ", ".join(parts), tiff_file([(entries, pieces)], order, big), truth
                )
    yield from tiff_corners()
    if not own:
        yield from tiff_cells_of_encoders()


def one_page(samples: Array, bits: int, tags: Tags, order: str = "<") -> tuple[Tags, list[bytes]]:
    layout, pieces = tiff_pieces(
        samples, bits, order=order, planar=1, layout="strips", predictor=1, compress=bytes
    )
    return {**base_tags(samples, bits, 1), **tags, **layout}, pieces


def tiff_corners() -> Iterator[Cell]:
    """Subsampled chroma, bits in reverse, missing and unusual tags, orientations, thumbnails."""
    for across, down in itertools.product((1, 2, 4), (1, 2, 4)):
        stored, truth = ycbcr_of(RGB, across, down)
        for packing, rows in itertools.product(("none", "Deflate"), (HEIGHT, 8)):
            number, pack = COMPRESSIONS[packing]
            pieces = [
                pack(ycbcr_units(stored[y : y + rows], across, down))
                for y in range(0, HEIGHT, rows)
            ]
            tags = {
                **base_tags(stored, 8, number),
                262: (3, [6]),
                278: (4, [rows]),
                530: (3, [across, down]),
            }
            if (across, down) == (2, 2):
                del tags[530]  # the default
            yield Cell(
                "TIFF",
                f"YCbCr {across} x {down}, {packing}, {rows} rows",
                tiff_file([(tags, pieces)], "<", False),
                truth,
            )
    for bits, colours in itertools.product((1, 2, 4, 8, 16), (GREY[..., None], RGB)):
        samples, truth = scaled(colours, bits)
        photometric = 1 if colours.shape[2] == 1 else 2
        tags, pieces = one_page(samples, bits, {262: (3, [photometric]), 266: (3, [2])})
        content = tiff_file([(tags, [reversed_bits(piece) for piece in pieces])], "<", False)
        yield Cell("TIFF", f"{bits} bits x {colours.shape[2]}, fill order 2", content, three(truth))
    for turn in range(1, 9):
        across = RGB.swapaxes(0, 1)
        upright = [RGB, RGB[:, ::-1], RGB[::-1, ::-1], RGB[::-1], across, np.rot90(RGB, -1)]
        upright += [across[::-1, ::-1], np.rot90(RGB)]
        page = one_page(RGB, 8, {262: (3, [2]), 274: (3, [turn])})
        yield Cell("TIFF", f"orientation {turn}", tiff_file([page], "<", False), upright[turn - 1])
    for order, big in itertools.product("<>", (False, True)):
        red = np.zeros((8, 8, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
        small, whole = (
            one_page(red, 8, {262: (3, [2]), 254: (4, [1])}),
            one_page(RGB, 8, {262: (3, [2])}),
        )
        yield Cell(
            "TIFF", f"thumbnail first {order} {big}", tiff_file([small, whole], order, big), RGB
        )
        yield Cell(
            "TIFF", f"thumbnail second {order} {big}", tiff_file([whole, small], order, big), RGB
        )
        tags, pieces = one_page(GREY[..., None], 8, {})
        yield Cell(
            "TIFF",
            f"no photometric {order} {big}",
            tiff_file([(tags, pieces)], order, big),
            three(GREY),
        )
        layout, pieces = tiff_pieces(
            RGB, 8, order=order, planar=1, layout="tiles", predictor=1, compress=bytes
        )
        content = tiff_file(
            [({**base_tags(RGB, 8, 1), 262: (3, [2]), **layout}, pieces)], order, big
        )
        for new, old in ((324, 273), (325, 279)):
            found = content.rindex(struct.pack(order + "HH", new, 16 if big and new == 324 else 4))
            content = content[:found] + struct.pack(order + "H", old) + content[found + 2 :]
        yield Cell("TIFF", f"tiles under StripOffsets {order} {big}", content, RGB)
        wrong = one_page(RGB, 8, {262: (3, [32803])})
        yield Cell("TIFF", f"camera raw {order} {big}", tiff_file([wrong], order, big), None)


def ycbcr_units(stored: Array, across: int, down: int) -> bytes:
    """Y of each block of pixels, then its Cb and Cr."""
    height, width = stored.shape[:2]
    whole = np.pad(stored, ((0, -height % down), (0, -width % across), (0, 0)), "edge")
    blocks = whole.reshape(
        whole.shape[0] // down, down, whole.shape[1] // across, across, 3
    ).swapaxes(1, 2)
    luma = blocks[..., 0].reshape(*blocks.shape[:2], -1)
    return np.concatenate([luma, blocks[:, :, 0, 0, 1:]], -1).tobytes()


def tiff_cells_of_encoders() -> Iterator[Cell]:
    """TIFFs by tifffile, with its compressions."""
    import imagecodecs
    import tifffile

    for photometric, tile, planar in itertools.product(
        ("minisblack", "rgb"), (None, (16, 32)), ("contig", "separate")
    ):
        values = (
            GREY
            if photometric == "minisblack"
            else RGB
            if planar == "contig"
            else np.moveaxis(RGB, -1, 0).copy()
        )
        for compression in (
            "zlib",
            "lzw",
            "packbits",
            "zstd",
            "lzma",
            "jpeg",
            "webp",
            "lerc",
            "jpegxl",
            "jpeg2000",
            "png",
        ):
            for order in "<>":
                out = io.BytesIO()
                options = {"planarconfig": planar} if photometric == "rgb" else {}
                try:
                    tifffile.imwrite(
                        out,
                        values,
                        photometric=photometric,
                        tile=tile,
                        compression=compression,
                        byteorder=order,
                        **options,
                    )
                    truth = tifffile.imread(io.BytesIO(out.getvalue()))
                except Exception:  # tifffile does not write this combination
                    continue
                truth = np.moveaxis(truth, 0, -1) if truth.shape[0] == 3 else truth
                yield Cell(
                    "TIFF",
                    f"tifffile {photometric} {tile} {planar} {compression} {order}",
                    out.getvalue(),
                    three(truth),
                )
    for subsampling, tile in itertools.product(((1, 1), (2, 1), (2, 2)), (None, (32, 32))):
        out = io.BytesIO()
        options = {"compressionargs": {"level": 95}, "subsampling": subsampling, "tile": tile}
        tifffile.imwrite(out, RGB, photometric="ycbcr", compression="jpeg", **options)
        truth = tifffile.imread(io.BytesIO(out.getvalue()))
        yield Cell("TIFF", f"tifffile JPEG YCbCr {subsampling} {tile}", out.getvalue(), truth)
    black = GREY > 100
    for number, encode in (
        (2, imagecodecs.ccittrle_encode),
        (3, imagecodecs.ccittfax3_encode),
        (4, imagecodecs.ccittfax4_encode),
    ):
        for photometric, order in itertools.product((0, 1), "<>"):
            bits = black if photometric == 0 else ~black
            try:
                piece = bytes(encode(np.packbits(bits, axis=1)))
            except Exception:
                continue
            tags = {
                **base_tags(bits[..., None], 1, number),
                262: (3, [photometric]),
                278: (4, [HEIGHT]),
            }
            content = tiff_file([(tags, [piece])], order, False)
            yield Cell(
                "TIFF",
                f"CCITT {number}, photometric {photometric} {order}",
                content,
                three(~black * 255.0),
            )


# --- PNG ----------------------------------------------------------------------------------

PNG_KINDS = ((0, (1, 2, 4, 8, 16)), (2, (8, 16)), (3, (1, 2, 4, 8)), (4, (8, 16)), (6, (8, 16)))


def png_cells(own: bool) -> Iterator[Cell]:
    """Every colour type, depth, filter, interlacing and transparency."""
    for colour, depths in PNG_KINDS:
        for depth, interlaced, kind, keyed in itertools.product(
            depths, (False, True), range(5), (0, 1, 2)
        ):
            chunks: list[bytes] = []
            if keyed and colour in (4, 6):
                continue
            if colour == 3:
                index, table = palette_of(depth)
                samples, alpha = index[..., None], np.full(len(table), 255)
                chunks = [png_chunk(b"PLTE", table.tobytes())]
                if keyed:
                    alpha[1] = 0 if keyed == 1 else 90
                    chunks.append(png_chunk(b"tRNS", bytes(alpha[:2].astype(np.uint8))))
                truth = on_white(table[index], alpha[index])
            else:
                channels = {
                    0: GREY[..., None],
                    2: RGB,
                    4: np.dstack([GREY, ALPHA]),
                    6: np.dstack([RGB, ALPHA]),
                }
                samples, truth = scaled(channels[colour], depth)
                if depth == 16:
                    samples = samples + (
                        np.arange(samples.size, dtype=np.uint16).reshape(samples.shape) % 100
                    )
                    samples = np.where(samples < 200, 65535, samples).astype(np.uint16)
                    truth = samples / 257
                if colour in (4, 6):
                    truth = on_white(three(truth[..., :-1]), truth[..., -1])
                truth = three(truth)
                if keyed:  # the second key has another low byte, and matches fewer pixels
                    key = samples[5, 5].astype(int) if keyed == 1 else samples[20, 8].astype(int)
                    same = (samples == key).all(-1)
                    chunks = [png_chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))]
                    truth = np.where(same[..., None], 255, truth)
            content = png_file(
                samples, depth, colour, *chunks, interlaced=interlaced, kind=kind, pieces=1 + kind
            )
            name = f"type {colour} depth {depth} Adam7 {interlaced} filter {kind} tRNS {keyed}"
            yield Cell("PNG", name, content, truth)
    for kind in (
        b"tEXt",
        b"zTXt",
        b"iTXt",
        b"iCCP",
        b"gAMA",
        b"cHRM",
        b"eXIf",
        b"tIME",
        b"pHYs",
        b"sBIT",
        b"vpAg",
    ):
        for body in (b"", b"\xff" * 40, b"name\0\0" + zlib.compress(bytes(2_000_000))):
            yield Cell(
                "PNG",
                f"chunk {kind.decode()} of {len(body)}",
                png_file(RGB, 8, 2, png_chunk(kind, body)),
                RGB,
            )
            broken = png_chunk(kind, body)[:-1] + b"?"
            yield Cell(
                "PNG",
                f"chunk {kind.decode()} of {len(body)}, checksum",
                png_file(RGB, 8, 2, broken),
                RGB,
            )


# --- BMP and ICO --------------------------------------------------------------------------

FIELDS_16 = (
    (0x7C00, 0x3E0, 0x1F),
    (0xF800, 0x7E0, 0x1F),
    (0xF00, 0xF0, 0xF),
    (0x1F, 0x3E0, 0x7C00),
    (0xE000, 0x1C00, 0x300),
)
FIELDS_16 += ((0x7C00, 0x3E0, 0x1F, 0x8000), (0xF00, 0xF0, 0xF, 0xF000))  # type: ignore[assignment]
FIELDS_32 = (
    (0xFF0000, 0xFF00, 0xFF),
    (0xFF, 0xFF00, 0xFF0000),
    (0xFF000000, 0xFF0000, 0xFF00),
    (0x3FF00000, 0xFFC00, 0x3FF),
)
FIELDS_32 += (
    (0x7C00, 0x3E0, 0x1F),
    (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
    (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
)  # type: ignore[assignment]
FIELDS_32 += ((0xFF000000, 0xFF0000, 0xFF00, 0xFF), (0x3FF00000, 0xFFC00, 0x3FF, 0xC0000000))  # type: ignore[assignment]


def fields(colours: list[Array], masks: tuple[int, ...]) -> tuple[Array, list[Array]]:
    """Pixels whose bits are the channels, and what these are of 0 to 255."""
    values, truth = np.zeros((HEIGHT, WIDTH), np.uint32), []
    for channel, mask in zip(colours, masks, strict=False):
        shift = (mask & -mask).bit_length() - 1
        stored, true = scaled(channel, (mask >> shift).bit_length())
        values |= stored.astype(np.uint32) << shift
        truth.append(true)
    return values, truth


def bmp_cells(own: bool) -> Iterator[Cell]:
    """Every header, depth, palette, bit field, run-length code and direction."""
    rgb = [RGB[..., n] for n in range(3)]
    for size, down in itertools.product((12, 40, 52, 56, 64, 108, 124), (1, -1)):
        if size == 12 and down < 0:
            continue
        entry = 3 if size == 12 else 4
        for bits, short in itertools.product((1, 2, 4, 8), (None, "colours", "grey", "grey steps")):
            if short and size == 12:
                continue
            index, table = palette_of(bits)
            if short:
                count = max(2, 2**bits * 3 // 4) if bits > 1 else 2
                step = 1 if short == "grey" else 255 // (count - 1)
                table = (
                    table[:count]
                    if short == "colours"
                    else np.repeat(np.arange(count)[:, None] * step, 3, 1)
                )
                index = index % count
            body = b"".join(bytes([*map(int, row[::-1])]) + bytes(entry - 3) for row in table)
            rows = bmp_rows(index, bits, down < 0)
            header = bmp_header(
                size, WIDTH, HEIGHT * down, bits, 0, (), len(table) if short else 0, len(rows)
            )
            yield Cell(
                "BMP",
                f"header {size} palette {bits} {short} {down}",
                bmp_file(header, body, rows),
                table[index],
            )
            if bits in (4, 8) and down > 0 and size >= 40:
                for literal in (False, True):
                    runs = bmp_runs(index, bits, literal)
                    header = bmp_header(
                        size, WIDTH, HEIGHT, bits, 2 if bits == 4 else 1, (), len(table), len(runs)
                    )
                    content = bmp_file(header, body, runs)
                    yield Cell(
                        "BMP",
                        f"header {size} RLE{bits} {short} literal {literal}",
                        content,
                        table[index],
                    )
        for bits, usual in ((16, FIELDS_16[0]), (24, FIELDS_32[0]), (32, FIELDS_32[0])):
            if size == 12 and bits != 24:
                continue
            values, truth = fields(rgb, usual)
            rows = bmp_rows(
                values | (np.uint32(0x5000000) if bits == 32 else np.uint32(0)), bits, down < 0
            )
            header = bmp_header(size, WIDTH, HEIGHT * down, bits, 0, (), 0, len(rows))
            yield Cell(
                "BMP",
                f"header {size} RGB {bits} {down}",
                bmp_file(header, b"", rows),
                np.stack(truth, -1),
            )
        for bits, all_masks in ((16, FIELDS_16), (32, FIELDS_32)):
            for masks, alpha in itertools.product(all_masks, ("gradient", "zero", "opaque")):
                if (
                    size in (12, 64)
                    or (len(masks) == 3 and alpha != "opaque")
                    or (len(masks) == 4 and size == 52)
                ):
                    continue
                part = {"gradient": ALPHA, "zero": ALPHA * 0, "opaque": ALPHA * 0 + 255}[alpha]
                values, truth = fields([*rgb, part], masks)
                rows = bmp_rows(values, bits, down < 0)
                compression = 6 if size == 40 and len(masks) == 4 else 3
                header = bmp_header(
                    size, WIDTH, HEIGHT * down, bits, compression, masks, 0, len(rows)
                )
                seen = on_white(
                    np.stack(truth[:3], -1),
                    truth[3] if len(truth) > 3 and alpha != "zero" else part * 0 + 255,
                )
                name = f"header {size} fields {bits} {[hex(m) for m in masks]} alpha {alpha} {down}"
                yield Cell("BMP", name, bmp_file(header, b"", rows), seen)
    for compression in (4, 5, 11):
        header = bmp_header(40, WIDTH, HEIGHT, 24, compression, (), 0, 99)
        yield Cell("BMP", f"compression {compression}", bmp_file(header, b"", bytes(4000)), None)


def ico_cells(own: bool) -> Iterator[Cell]:
    """Icons as bitmaps with masks, and as PNG."""
    clear = ALPHA == 0
    mask = bmp_rows(clear.astype(np.uint8), 1, False)
    seen = np.where(clear, 0, 255)
    for bits in (1, 4, 8):
        index, table = palette_of(bits)
        body = b"".join(bytes([*map(int, row[::-1]), 0]) for row in table)
        header = bmp_header(40, WIDTH, 2 * HEIGHT, bits, 0, (), 0, 0)
        icon = header + body + bmp_rows(index, bits, False) + mask
        yield Cell(
            "ICO",
            f"palette {bits}",
            ico_file([(WIDTH, HEIGHT, bits, icon)]),
            on_white(table[index], seen),
        )
        grey = np.repeat(np.arange(2**bits)[:, None] * 255 // (2**bits - 1), 3, 1)
        body = b"".join(bytes([*map(int, row), 0]) for row in grey)
        icon = header + body + bmp_rows(index, bits, False) + mask
        yield Cell(
            "ICO",
            f"grey palette {bits}",
            ico_file([(WIDTH, HEIGHT, bits, icon)]),
            on_white(grey[index], seen),
        )
    values, _ = fields([RGB[..., n] for n in range(3)], (0xFF0000, 0xFF00, 0xFF))
    for bits, alpha in ((24, None), (32, ALPHA), (32, ALPHA * 0), (32, ALPHA * 0 + 255)):
        header = bmp_header(40, WIDTH, 2 * HEIGHT, bits, 0, (), 0, 0)
        pixels = values if alpha is None else values | alpha.astype(np.uint32) << 24
        icon = header + bmp_rows(pixels, bits, False) + mask
        true = seen if alpha is None or not alpha.any() else alpha
        best = ico_file([(WIDTH, HEIGHT, bits, icon), (8, 8, 32, icon)])
        yield Cell(
            "ICO",
            f"{bits} bits, alpha {'none' if alpha is None else alpha.max()}",
            best,
            on_white(RGB, true),
        )
    small = png_file(np.dstack([RGB, ALPHA]), 8, 6)
    for order in (0, 1):
        icons = [
            (WIDTH, HEIGHT, 32, small),
            (WIDTH, HEIGHT, 4, header + bmp_rows(pixels * 0, 32, False) + mask),
        ]
        yield Cell(
            "ICO",
            f"PNG, place {order}",
            ico_file(icons[::-1] if order else icons),
            on_white(RGB, ALPHA),
        )


# --- GIF and PPM --------------------------------------------------------------------------


def gif_cells(own: bool) -> Iterator[Cell]:
    """Palettes of every size, frames smaller than the canvas, interlacing, transparency."""
    for bits, local, interlaced, clear, version in itertools.product(
        range(1, 9), (False, True), (False, True), (None, 1), (b"87a", b"89a")
    ):
        index, table = palette_of(bits)
        for canvas, at in (((WIDTH, HEIGHT), (0, 0)), ((WIDTH + 8, HEIGHT + 5), (3, 2))):
            truth = np.full((canvas[1], canvas[0], 3), 255)
            seen = table[index].astype(int)
            seen[index == clear] = 255
            truth[at[1] : at[1] + HEIGHT, at[0] : at[0] + WIDTH] = seen
            content = gif_file(
                index,
                table,
                canvas=canvas,
                at=at,
                local=local,
                interlaced=interlaced,
                transparent=clear,
                version=version,
            )
            yield Cell(
                "GIF",
                f"{bits} bits, local {local}, {interlaced}, clear {clear}, {canvas} {version!r}",
                content,
                truth,
            )


def ppm_cells(own: bool) -> Iterator[Cell]:
    """Plain and raw bitmaps, greyscale and colour, of every depth."""
    size = f"{WIDTH} {HEIGHT}"
    black = (GREY < 128).astype(np.uint8)
    truth = three(255.0 - black * 255)
    yield Cell(
        "PPM",
        "P1",
        f"P1\n{size}\n".encode() + b" ".join(b"%d" % v for v in black.reshape(-1)),
        truth,
    )
    yield Cell("PPM", "P4", f"P4\n{size}\n".encode() + packed(black, 1), truth)
    for highest in (1, 3, 15, 100, 127, 255, 256, 1000, 1023, 4095, 32767, 65535):
        for channels, plain, raw in ((GREY, "P2", "P5"), (RGB, "P3", "P6")):
            stored = np.rint(channels / 255 * highest).astype(int)
            true = three(stored * 255 / highest)
            text = b" ".join(b"%d" % v for v in stored.reshape(-1))
            yield Cell(
                "PPM",
                f"{plain} to {highest}",
                f"{plain}\n# made\n{size} {highest}\n".encode() + text,
                true,
            )
            body = stored.astype(">u2" if highest > 255 else "u1").tobytes()
            yield Cell(
                "PPM",
                f"{raw} to {highest}",
                f"{raw}\n# made\n{size}\n{highest}\n".encode() + body,
                true,
            )


# --- formats of other encoders ------------------------------------------------------------


def jpeg_cells(own: bool) -> Iterator[Cell]:
    """JPEGs by OpenCV and imagecodecs, decoded by them too."""
    import cv2
    import imagecodecs

    chroma = {"444": 0x111111, "422": 0x211111, "420": 0x221111, "440": 0x121111, "411": 0x411111}
    for values, progressive, restart, quality in itertools.product(
        (GREY, RGB), (0, 1), (0, 1, 3), (30, 75, 97)
    ):
        for name, sampling in chroma.items() if values is RGB else [("grey", 0x111111)]:
            options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive]
            options += [
                cv2.IMWRITE_JPEG_RST_INTERVAL,
                restart,
                cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
                sampling,
            ]
            content = cv2.imencode(".jpg", values[..., ::-1] if values is RGB else values, options)[
                1
            ].tobytes()
            truth = three(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED))[
                ..., ::-1
            ]
            label = f"{name} progressive {progressive} restart {restart} quality {quality}"
            yield Cell("JPEG", label, content, truth)
            if quality == 75:
                bare = content[:2] + content[20:]  # without JFIF
                yield Cell("JPEG", f"{label}, no JFIF", bare, truth)
                empty = content[:2] + b"\xff\xe0\0\7JFIF\0" + content[20:]
                yield Cell("JPEG", f"{label}, empty JFIF", empty, truth)
                yield Cell("JPEG", f"{label}, no EOI", content[:-2], truth)
                for marker in (0xE1, 0xE2, 0xED, 0xEE, 0xFE):
                    for body in (
                        b"",
                        b"Exif\0\0II*\0\xff\xff\xff\xff",
                        b"ICC_PROFILE\0\1",
                        b"Photoshop 3.0\x008BIM",
                    ):
                        more = struct.pack(">BBH", 255, marker, len(body) + 2) + body
                        yield Cell(
                            "JPEG",
                            f"{label}, segment {marker:x} {body!r}",
                            content[:2] + more + content[2:],
                            truth,
                        )
    for space, outer in itertools.product(("rgb", "ycbcr"), ("rgb", "ycbcr")):
        try:
            content = bytes(
                imagecodecs.jpeg8_encode(RGB, 95, colorspace=space, outcolorspace=outer)
            )
            truth = imagecodecs.jpeg8_decode(content, outcolorspace="rgb")
        except Exception:
            continue
        if space == "rgb":
            yield Cell("JPEG", f"{space} stored as {outer}", content, truth)
    ink = np.dstack([RGB, 255 - GREY // 3])  # inverted, as Adobe stores it
    for outer in ("cmyk", "ycck"):
        content = bytes(imagecodecs.jpeg8_encode(ink, 97, colorspace="cmyk", outcolorspace=outer))
        stored = imagecodecs.jpeg8_decode(content, outcolorspace="cmyk").astype(float)
        yield Cell("JPEG", f"CMYK as {outer}", content, stored[..., :3] * stored[..., 3:] / 255)
    for bits in (12, 16):
        deep = RGB.astype(np.uint16) << (bits - 8)
        lossless = bits == 16
        content = bytes(imagecodecs.jpeg8_encode(deep, 95, bitspersample=bits, lossless=lossless))
        yield Cell("JPEG", f"{bits} bits", content, None)
    for values in (GREY, RGB):
        for predictor in range(1, 8):
            try:
                content = bytes(
                    imagecodecs.jpeg8_encode(values, lossless=True, predictor=predictor)
                )
            except Exception:
                continue
            yield Cell("JPEG", f"lossless {values.ndim} {predictor}", content, three(values))


# Y'CbCr by OpenJPEG: subsampling across and down, width and height
SUBSAMPLED = {
    (2, 1, 16, 12): (
        "|4;u>051Rl0000G0000C00000000000000G0000C000000000000RdB0S5vB2Lb{AQUDA9000310R#j90smY"
        "82S7kbNKpTf015yA0002E00IA#$J9m;+pbu?q(qWN&I0S&_wKM0q7kntxt|@{tOdu&7&L!O?;pq1Dih7gK9l"
        "gt7Tvx6+2L;d-J3F+vpdJsC;<GUbm!XHC^cYx8MlqAycFArU%)yv2f|bUkT#tg{Lu42jr?dKg>0=de;!wl&%"
        "k^mz<eY?2|yuldB&-DbS+#huz|<+KNJi~bxXkc1VB180GJ{i35GzTI)5!&0<nO<4#;oM#Yg|y"
    ),
    (2, 2, 16, 12): (
        "|4;u>051Rl0000G0000C00000000000000G0000C000000000000RdB0S5vC2Lb~BQUDA9000310R#j90smY"
        "82S7kbNKpTf015yA0001%00IA#$J9m;+pbu?q(qWN&I0S&_wKM0q7kntxt|@{tOdu&7&L!O?;pq17y*8r8m%"
        "gL*mF6wf5+4q4o8m&9SEyc^vsA=z&bPs!c+i|Hk}*%(DOiz{AeMCY^^eX9#@agz<eS=`2s))KpgZ2-wr<;?;"
        "ODS0>FGCzzDz_^lb9i4n7{$KMH)$|Je"
    ),
    (1, 2, 16, 12): (
        "|4;u>051Rl0000G0000C00000000000000G0000C000000000000RdB0S5sB2LS^AQUDA9000310R#j90smY"
        "82S7kbNKpTf015yA0002000IA#$J9m;+pbu?q(qWN&I0S&_wKM0q7kntxt|@{tOdu&7&L!O?;pq1Dgks_CO`"
        "{Yx-yQCb=&6G&^G!Z1AoWVCJr-*hW)I2D!Y2OsX6CMR9L{*z&bPs!c+i|Hk}*%(DOiz{AeMCY^^eX9#@agz&"
        "a!kkTd{<Hh&Jg4nWje|9>pNd?LVnBtQtjHGk=ZaSlMoR!k4IF$9f;|Je"
    ),
    (4, 4, 16, 12): (
        "|4;u>051Rl0000G0000C00000000000000G0000C000000000000RdB0S5#G2LuHFQUDA9000310R#j90smY"
        "82S7kbNKpTf015yA0001W00IA#$J9m;+pbu?q(qWN&I0S&_wKM0q7kntxt|@{tOdu&7&L!O?;pq13ImvR%-h"
        "G*3Je`0cVECdGzY>|0FXAF8~o7oK#lxpA%$$MGJhUdkI%sQ0iXmR4heq>!SjTGApi{m|9=7h*#"
    ),
    (2, 2, 15, 11): (
        "|4;u>051Rl0000F0000B00000000000000F0000B000000000000RdB0S5vC2Lb~BQUDA9000310R#j90smY"
        "82S7kbNKpTf015yA0001w00IA#$J9m;+pbu?q(qWN&I0S&_wKM0q7knahp-pkrVIA;;duN@`G3dM7y*8r8m%"
        "gL*mF6wf5+4q4o8m&9SEyc^vsA=z!Ja{KnTDhJAnUx0=`tWF_j)yiNJg!K=}ed2tXY42Hy@p8}A&z`2xUvBE"
        "Sg18}w}Q*A6}&)jtY+&;Qu"
    ),
    (1, 1, 15, 11): (
        "|4;u>051Rl0000F0000B00000000000000F0000B000000000000RdB0S5sA2LS>9QUDA9000310R#j90smY"
        "82S7kbNKpTf015yA0002d00IA#$J9m;+pbu?q(qWN&I0S&_wKM0q7knahp-pkrVIA;;duN@`G3dMN)yfap!1"
        "zIASepyt=`kE?cysm4S75s^od+C{XN7<(C8+!><P!zNC7K^k&_J9PrKAMGoiW2Xm2YHVW1oKekSwEDCb(7CC"
        "{CpKfn^e6F>;SB0GTpe*(T#wK0_*SBbzAKsq!4m>U>9o*Q^9OIZ>-uN^fX@D$6y6)+By04EpSQ!A1<{r`VBC"
        "j9z;S2q8D32~tTx*mW3*#"
    ),
}


def jp2_cells(own: bool) -> Iterator[Cell]:
    """JPEG 2000 by imagecodecs, with boxes written here."""
    import imagecodecs

    def stream(samples: Array, bits: int, **options: Any) -> bytes:
        return bytes(
            imagecodecs.jpeg2k_encode(
                samples, level=0, codecformat="j2k", bitspersample=bits, **options
            )
        )

    channels = {1: GREY[..., None], 2: np.dstack([GREY, ALPHA]), 3: RGB, 4: np.dstack([RGB, ALPHA])}
    for count, bits, container, reversible, mct in itertools.product(
        (1, 2, 3, 4),
        (1, 2, 4, 7, 8, 9, 10, 12, 15, 16),
        ("j2k", "jp2"),
        (True, False),
        (True, False),
    ):
        if count < 3 and mct:
            continue
        samples, truth = scaled(channels[count], bits)
        if not reversible and bits < 8:
            continue
        try:
            content = stream(
                samples[..., 0] if count == 1 else samples, bits, reversible=reversible, mct=mct
            )
        except Exception:
            continue
        seen = three(truth[..., : 1 if count < 3 else 3])
        if container == "jp2":
            space = struct.pack(">BBBI", 1, 0, 0, 17 if count < 3 else 16)
            parts = [(n, 0, n + 1) for n in range(count - (count % 2 == 0))]
            parts += [(count - 1, 1, 0)] if count % 2 == 0 else []
            definition = struct.pack(">H", count) + b"".join(
                struct.pack(">HHH", *part) for part in parts
            )
            boxes = box(b"colr", space) + box(b"cdef", definition)
            content = jp2_file(content, (WIDTH, HEIGHT), [bits] * count, boxes)
        seen = on_white(seen, truth[..., -1]) if count % 2 == 0 else seen
        yield Cell(
            "JPEG 2000",
            f"{container} {count} x {bits}, reversible {reversible}, mct {mct}",
            content,
            seen,
        )
    colour = box(b"colr", struct.pack(">BBBI", 1, 0, 0, 16))
    for order in itertools.permutations(range(3)):
        definition = struct.pack(">H", 3) + b"".join(
            struct.pack(">HHH", n, 0, order[n] + 1) for n in range(3)
        )
        samples = RGB[..., list(order)]
        content = jp2_file(
            stream(samples, 8, mct=False),
            (WIDTH, HEIGHT),
            [8] * 3,
            colour + box(b"cdef", definition),
        )
        yield Cell("JPEG 2000", f"channels in the order {order}", content, RGB)
    for kind, place in itertools.product((1, 2), range(4)):
        colours = list(np.moveaxis(RGB, -1, 0))
        if kind == 2:
            colours = [np.rint(c * (ALPHA / 255)).astype(np.uint8) for c in colours]
        planes = [*colours[:place], ALPHA, *colours[place:]]
        parts = [(n + (n >= place), 0, n + 1) for n in range(3)] + [(place, kind, 0)]
        definition = struct.pack(">H", 4) + b"".join(struct.pack(">HHH", *part) for part in parts)
        content = stream(np.stack(planes, -1), 8, mct=False)
        content = jp2_file(content, (WIDTH, HEIGHT), [8] * 4, colour + box(b"cdef", definition))
        yield Cell(
            "JPEG 2000", f"alpha of kind {kind} in place {place}", content, on_white(RGB, ALPHA)
        )
    more = jp2_file(stream(np.dstack([RGB, ALPHA]), 8, mct=False), (WIDTH, HEIGHT), [8] * 4, colour)
    yield Cell("JPEG 2000", "a fourth channel without a meaning", more, on_white(RGB, ALPHA))
    for bits, depth, columns in itertools.product((1, 2, 4, 8), (8, 12, 16), (3, 4)):
        index, table = palette_of(bits)
        entries, true = scaled(np.hstack([table, table[:, :1]])[:, :columns], depth)
        body = entries.astype(">u2" if depth > 8 else "u1").tobytes()
        palette = struct.pack(">HB", len(table), columns) + bytes([depth - 1] * columns) + body
        mapping = b"".join(struct.pack(">HBB", 0, 1, n) for n in range(columns))
        boxes = colour + box(b"pclr", palette) + box(b"cmap", mapping)
        seen = true[:, :3]
        if columns == 4:
            parts = [(n, 0, n + 1) for n in range(3)] + [(3, 1, 0)]
            boxes += box(
                b"cdef",
                struct.pack(">H", 4) + b"".join(struct.pack(">HHH", *part) for part in parts),
            )
            seen = on_white(true[:, :3], true[:, 3])
        content = jp2_file(stream(index, bits, mct=False), (WIDTH, HEIGHT), [bits], boxes)
        yield Cell("JPEG 2000", f"palette {bits} of {columns} x {depth}", content, seen[index])
    stored, truth = ycbcr_of(RGB, 1, 1)
    ycc = box(b"colr", struct.pack(">BBBI", 1, 0, 0, 18))
    yield Cell(
        "JPEG 2000",
        "sYCC",
        jp2_file(stream(stored, 8, mct=False), (WIDTH, HEIGHT), [8] * 3, ycc),
        truth,
    )
    ink = np.dstack([255 - RGB, GREY // 3])
    cmyk = box(b"colr", struct.pack(">BBBI", 1, 0, 0, 12))
    truth = RGB * (1 - ink[..., 3:] / 255)
    yield Cell(
        "JPEG 2000",
        "CMYK",
        jp2_file(stream(ink, 8, mct=False), (WIDTH, HEIGHT), [8] * 4, cmyk),
        truth,
    )
    for space in (0, 1, 3, 4, 9, 11, 13, 14, 19, 20, 21, 24):
        other = box(b"colr", struct.pack(">BBBI", 1, 0, 0, space))
        content = jp2_file(stream(RGB, 8, mct=False), (WIDTH, HEIGHT), [8] * 3, other)
        yield Cell("JPEG 2000", f"colour space {space}", content, None)
    for (across, down, width, height), text in SUBSAMPLED.items():
        y, x = np.mgrid[0:height, 0:width]
        rgb = np.stack([60 + 8 * x, 70 + 9 * y, 190 - 3 * x - 5 * y], -1).astype(np.uint8)
        truth, content = ycbcr_of(rgb, across, down)[1], base64.b85decode(text)
        name = f"Y'CbCr {across} x {down} of {width} x {height}"
        yield Cell("JPEG 2000", name, jp2_file(content, (width, height), [8] * 3, ycc), truth)
        if across > 1:
            yield Cell("JPEG 2000", f"{name}, codestream", content, truth)
    for tile, levels in itertools.product(((8, 8), (16, 32), (5, 7)), (1, 3)):
        for values in (GREY, RGB):
            try:
                content = stream(values, 8, tile=tile, resolutions=levels)
            except Exception:
                continue
            yield Cell(
                "JPEG 2000",
                f"tiles {tile}, {levels} resolutions, {values.ndim}",
                content,
                three(values),
            )
            yield Cell(
                "JPEG 2000",
                f"tiles {tile}, {levels} resolutions, {values.ndim}, no EOC",
                content[:-2],
                three(values),
            )


def webp_cells(own: bool) -> Iterator[Cell]:
    """WebP by imagecodecs, with metadata chunks written here."""
    import imagecodecs

    for values, lossless in itertools.product((RGB, np.dstack([RGB, ALPHA])), (True, False)):
        for level in (40, 80, 95):
            content = bytes(imagecodecs.webp_encode(values, level, lossless=lossless))
            true = imagecodecs.webp_decode(content)
            truth = on_white(true[..., :3], true[..., 3]) if true.shape[2] == 4 else true
            yield Cell("WebP", f"{values.shape[2]} lossless {lossless} {level}", content, truth)
            if content[12:16] == b"VP8X":
                continue
            for flag, kind in ((32, b"ICCP"), (8, b"EXIF"), (4, b"XMP ")):
                body = b"\xff" * 21
                chunk = kind + struct.pack("<I", len(body)) + body + b"\0"
                size = struct.pack("<I", WIDTH - 1)[:3] + struct.pack("<I", HEIGHT - 1)[:3]
                extended = (
                    b"VP8X"
                    + struct.pack("<II", 10, flag | (16 if values.shape[2] == 4 else 0))
                    + size
                )
                image = content[12:]
                inner = extended + (chunk + image if kind == b"ICCP" else image + chunk)
                whole = b"RIFF" + struct.pack("<I", 4 + len(inner)) + b"WEBP" + inner
                yield Cell(
                    "WebP",
                    f"{values.shape[2]} lossless {lossless} {level} broken {kind!r}",
                    whole,
                    truth,
                )


def avif_cells(own: bool) -> Iterator[Cell]:
    """AVIF by imagecodecs, with a clean aperture written here."""
    import imagecodecs

    shapes = {"grey": GREY, "RGB": SMOOTH, "RGBA": np.dstack([SMOOTH, ALPHA])}
    for (name, values), bits, pixels in itertools.product(
        shapes.items(), (8, 10, 12), ("yuv444", "yuv422", "yuv420", "yuv400")
    ):
        if (name == "grey") != (pixels == "yuv400"):
            continue
        stored = scaled(values, bits)[0]
        content = bytes(
            imagecodecs.avif_encode(stored, 95, bitspersample=bits, pixelformat=pixels, speed=8)
        )
        true = imagecodecs.avif_decode(content).astype(float) * 255 / (2**bits - 1)
        truth = on_white(true[..., :3], true[..., 3]) if name == "RGBA" else three(true)
        yield Cell("AVIF", f"{name} {bits} {pixels}", content, truth)
        for left, top, width, height in ((4, 2, 20, 16), (0, 0, 37, 28), (17, 11, 20, 18)):
            body = struct.pack(
                ">8i",
                width,
                1,
                height,
                1,
                2 * left + width - WIDTH,
                2,
                2 * top + height - HEIGHT,
                2,
            )
            cropped = with_property(content, box(b"clap", body))
            part = truth[top : top + height, left : left + width]
            yield Cell("AVIF", f"{name} {bits} {pixels} clap {left, top}", cropped, part)

        for angle in range(1, 4):
            turned = with_property(content, box(b"irot", bytes([angle])))
            yield Cell(
                "AVIF", f"{name} {bits} {pixels} irot {angle}", turned, np.rot90(truth, angle)
            )
            body = struct.pack(">8i", 20, 1, 16, 1, 8 + 20 - WIDTH, 2, 4 + 16 - HEIGHT, 2)
            both = with_property(
                with_property(content, box(b"clap", body)), box(b"irot", bytes([angle]))
            )
            part = np.rot90(truth[2:18, 4:24], angle)
            yield Cell("AVIF", f"{name} {bits} {pixels} clap, irot {angle}", both, part)


def with_property(content: bytes, new: bytes) -> bytes:
    """A HEIF file whose first item has one more property; offsets into the file are moved."""
    properties = content.index(b"ipco") - 4
    length = int.from_bytes(content[properties : properties + 4])
    count, at = 0, properties + 8
    while at < properties + length:
        count, at = count + 1, at + int.from_bytes(content[at : at + 4])
    out = bytearray(content)
    links = content.index(b"ipma")
    assert content[links + 4 : links + 8] == bytes(4)  # version 0: short numbers
    out[links + 14 : links + 15] = bytes([content[links + 14] + 1])
    end = links + 15 + content[links + 14]
    out[end:end] = bytes([128 | (count + 1)])
    out[properties + length : properties + length] = new
    moved = len(new) + 1
    for kind, more in ((b"ipco", len(new)), (b"ipma", 1), (b"iprp", moved), (b"meta", moved)):
        place = bytes(out).index(kind) - 4
        out[place : place + 4] = (int.from_bytes(out[place : place + 4]) + more).to_bytes(4, "big")
    table = bytes(out).index(b"iloc") + 4
    assert bytes(out[table : table + 6]) == b"\0\0\0\0\x44\0"
    entry = table + 8
    for _ in range(int.from_bytes(out[table + 6 : table + 8])):
        for extent in range(int.from_bytes(out[entry + 4 : entry + 6])):
            place = entry + 6 + 8 * extent
            out[place : place + 4] = (int.from_bytes(out[place : place + 4]) + moved).to_bytes(
                4, "big"
            )
        entry += 6 + 8 * int.from_bytes(out[entry + 4 : entry + 6])
    return bytes(out)


def heic_cells(own: bool) -> Iterator[Cell]:
    """HEIC by libheif, lossless where it can be."""
    import pillow_heif

    for bits, chroma, kind in itertools.product((8, 10, 12), (444, 422, 420), ("RGB", "RGBA")):
        values = np.dstack([SMOOTH, ALPHA]) if kind == "RGBA" else SMOOTH
        stored = values if bits == 8 else values.astype(np.uint16) * 257
        pillow_heif.options.SAVE_HDR_TO_12_BIT = bits == 12
        image = pillow_heif.from_bytes(
            kind if bits == 8 else f"{kind};16", (WIDTH, HEIGHT), stored.tobytes()
        )
        out = io.BytesIO()
        image.save(out, quality=-1, chroma=chroma, matrix_coefficients=0 if chroma == 444 else 6)
        pillow_heif.options.SAVE_HDR_TO_12_BIT = False
        truth = on_white(SMOOTH, ALPHA) if kind == "RGBA" else SMOOTH
        yield Cell("HEIC", f"{kind} {bits} {chroma}", out.getvalue(), truth)


# --- the check ----------------------------------------------------------------------------

CELLS: dict[str, Callable[[bool], Iterator[Cell]]] = {
    "TIFF": tiff_cells,
    "PNG": png_cells,
    "BMP": bmp_cells,
    "ICO": ico_cells,
    "GIF": gif_cells,
    "PPM": ppm_cells,
    "JPEG": jpeg_cells,
    "JPEG 2000": jp2_cells,
    "WebP": webp_cells,
    "AVIF": avif_cells,
    "HEIC": heic_cells,
}
OWN = ("TIFF", "PNG", "BMP", "ICO", "GIF", "PPM")  # written without a library
AS_A_WHOLE = Preprocessing(image_size=SIDE, resize_size=SIDE, crop="none")
RULES = DecodeRules("exact")


def verdict(cell: Cell) -> tuple[str, str]:
    """Return equal, refused or garbled, and why."""
    try:
        pixels = decode(cell.content, AS_A_WHOLE, RULES)
    except ImageError as error:
        refused = "not supported by this decoder" in str(error)
        return "refused" if refused else "garbled", str(error)
    if cell.truth is None:
        return "garbled", "decoded, but its true pixels are not known"
    true = Image.fromarray(np.rint(cell.truth).clip(0, 255).astype(np.uint8))
    wanted = np.asarray(true.resize((SIDE, SIDE), Image.Resampling.BILINEAR)).astype(float)
    difference = float(np.abs(pixels - wanted).mean())
    return "equal" if difference <= CLOSE else "garbled", f"{difference:.2f} grey levels"


def check(formats: list[str], own: bool, every: int = 1) -> dict[str, Any]:
    """Decode the cells and return the document."""
    counts: dict[str, Counter[str]] = {}
    garbled, reasons = [], Counter[str]()
    for name in formats:
        counts[name] = Counter()
        for cell in itertools.islice(CELLS[name](own), 0, None, every):
            result, why = verdict(cell)
            counts[name]["cells"] += 1
            counts[name][result] += 1
            if result == "garbled":
                garbled.append({"format": name, "cell": cell.name, "why": why})
            if result == "refused":
                reasons[why] += 1
    return {
        "schema": 1,
        "formats": counts,
        "garbled": garbled,
        "refused": dict(reasons.most_common()),
    }


def main(
    format: Annotated[
        list[str] | None, typer.Option(help="Formats to check; all by default.")
    ] = None,
    own: Annotated[
        bool, typer.Option(help="Only files that are written without a library.")
    ] = False,
    every: Annotated[int, typer.Option(help="Take every so many cells.")] = 1,
) -> None:
    """Decode every combination that the image formats allow, and compare with the true pixels."""
    formats = format or list(OWN if own else CELLS)
    document = check(formats, own, every)
    columns = ("cells", "equal", "refused", "garbled")
    print("| format | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns), sep="\n")
    total = Counter[str]()
    for name, found in document["formats"].items():
        total.update(found)
        print(f"| {name} | " + " | ".join(f"{found[column]:,}" for column in columns) + " |")
    print("| **all** | " + " | ".join(f"{total[column]:,}" for column in columns) + " |")
    print(json.dumps(document))
    raise typer.Exit(1 if document["garbled"] else 0)


if __name__ == "__main__":
    typer.run(main)
