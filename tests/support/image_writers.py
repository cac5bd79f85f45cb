"""Write images byte by byte, in every layout that their formats allow; no library is used."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def packed(samples: Array, bits: int) -> bytes:
    """Rows of unsigned samples [rows, count], packed from the highest bit, filled up to bytes."""
    if bits in (8, 16, 32, 64):
        return samples.astype(f">u{bits // 8}").tobytes()
    shifts = np.arange(bits - 1, -1, -1)
    single = samples.astype(np.uint64)[..., None] >> shifts.astype(np.uint64) & np.uint64(1)
    return np.packbits(single.reshape(len(samples), -1).astype(np.uint8), axis=1).tobytes()


# --- TIFF ---------------------------------------------------------------------------------

NUMBERS = {1: "B", 3: "H", 4: "I", 5: "I", 7: "B", 16: "Q"}


def tiff_file(
    pages: list[tuple[dict[int, tuple[int, list[int]]], list[bytes]]], order: str, big: bool
) -> bytes:
    """A TIFF of pages, each of tags {tag: (type, values)} and strips or tiles."""
    mark = b"II" if order == "<" else b"MM"
    out = bytearray(
        mark + struct.pack(order + "HHHQ", 43, 8, 0, 0)
        if big
        else mark + struct.pack(order + "HI", 42, 0)
    )
    link, word = (8, "Q") if big else (4, "I")
    for tags, pieces in pages:
        offsets = []
        for piece in pieces:
            offsets.append(len(out))
            out += piece + bytes(len(piece) % 2)
        tiled = 322 in tags
        tags = {**tags, 324 if tiled else 273: (16 if big else 4, offsets)}
        tags[325 if tiled else 279] = (4, [len(piece) for piece in pieces])
        entries = b""
        for tag in sorted(tags):
            kind, values = tags[tag]
            body = struct.pack(f"{order}{len(values)}{NUMBERS[kind]}", *values)
            count = len(values) // (2 if kind == 5 else 1)
            if len(body) > (8 if big else 4):
                place = len(out)
                out += body + bytes(len(body) % 2)
                body = struct.pack(order + word, place)
            entries += struct.pack(order + "HH" + word, tag, kind, count) + body.ljust(
                8 if big else 4, b"\0"
            )
        struct.pack_into(order + word, out, link, len(out))
        out += struct.pack(order + ("Q" if big else "H"), len(tags)) + entries
        link = len(out)
        out += bytes(8 if big else 4)
    return bytes(out)


def stored_bytes(samples: Array, bits: int, order: str) -> bytes:
    """Samples [rows, columns, samples] as TIFF stores them."""
    rows = samples.reshape(len(samples), -1)
    if bits == 24:
        four = rows.astype(f"{order}u4").view("u1").reshape(*rows.shape, 4)
        return four[..., :3].tobytes() if order == "<" else four[..., 1:].tobytes()
    if bits in (8, 16, 32, 64):
        return rows.astype(rows.dtype.newbyteorder(order)).tobytes()
    return packed(rows, bits)


def predicted(samples: Array, predictor: int, order: str) -> Array | bytes:
    """Samples [rows, columns, samples] as TIFF's predictors 2 and 3 store them."""
    if predictor == 2:
        first = np.zeros_like(samples[:, :1])
        return samples - np.concatenate([first, samples[:, :-1]], 1)
    size, count = samples.dtype.itemsize, samples.shape[2]
    big = samples.astype(samples.dtype.newbyteorder(">")).reshape(len(samples), -1)
    planes = np.ascontiguousarray(big).view("u1").reshape(len(samples), -1, size).transpose(0, 2, 1)
    flat = planes.reshape(len(samples), -1, count)
    return predicted(flat, 2, order).reshape(len(samples), -1).tobytes()  # type: ignore[union-attr]


def pack_bits(content: bytes) -> bytes:
    """PackBits, of runs of different bytes only."""
    pieces = [content[at : at + 128] for at in range(0, len(content), 128)]
    return b"".join(bytes([len(piece) - 1]) + piece for piece in pieces)


def reversed_bits(content: bytes) -> bytes:
    single = np.unpackbits(np.frombuffer(content, np.uint8)).reshape(-1, 8)
    return np.packbits(single[:, ::-1]).tobytes()


def tiff_pieces(
    samples: Array,
    bits: int,
    *,
    order: str,
    planar: int,
    layout: str,
    predictor: int,
    compress: Any,
) -> tuple[dict[int, tuple[int, list[int]]], list[bytes]]:
    """The tags of the layout, and the strips or tiles, of samples [height, width, samples]."""
    height, width = samples.shape[:2]
    planes = np.split(samples, samples.shape[2], 2) if planar == 2 else [samples]
    tags: dict[int, tuple[int, list[int]]] = {}
    blocks: list[Array] = []
    if layout == "tiles":
        tags = {322: (3, [16]), 323: (3, [32])}
        for plane in planes:
            whole = np.pad(plane, ((0, -height % 32), (0, -width % 16), (0, 0)))
            blocks += [
                whole[y : y + 32, x : x + 16]
                for y in range(0, height, 32)
                for x in range(0, width, 16)
            ]
    else:
        rows = height if layout == "one strip" else 7
        tags = {278: (4, [rows])}
        for plane in planes:
            blocks += [plane[y : y + rows] for y in range(0, height, rows)]
    pieces = []
    for block in blocks:
        stored = block if predictor == 1 else predicted(block, predictor, order)
        body = stored if isinstance(stored, bytes) else stored_bytes(stored, bits, order)
        pieces.append(compress(body))
    return tags, pieces


# --- PNG ----------------------------------------------------------------------------------


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def filtered(rows: Array, step: int, kind: int) -> bytes:
    """Rows of bytes with one of PNG's five filters."""
    rows = rows.astype(int)
    left = np.pad(rows, ((0, 0), (step, 0)))[:, : rows.shape[1]]
    up = np.pad(rows, ((1, 0), (0, 0)))[:-1]
    corner = np.pad(up, ((0, 0), (step, 0)))[:, : rows.shape[1]]
    estimate = left + up - corner
    distances = np.abs(np.stack([estimate - left, estimate - up, estimate - corner]))
    paeth = np.where(
        (distances[0] <= distances[1]) & (distances[0] <= distances[2]),
        left,
        np.where(distances[1] <= distances[2], up, corner),
    )
    guess = [np.zeros_like(rows), left, up, (left + up) // 2, paeth][kind]
    values = ((rows - guess) % 256).astype(np.uint8)
    return b"".join(bytes([kind]) + row.tobytes() for row in values)


ADAM7 = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)


def png_file(
    samples: Array,
    depth: int,
    colour: int,
    *chunks: bytes,
    interlaced: bool = False,
    kind: int = 0,
    pieces: int = 1,
) -> bytes:
    """A PNG of samples [height, width, channels] with one filter, in several IDAT chunks."""
    height, width, channels = samples.shape
    step = max(1, depth * channels // 8)
    body = b""
    for top, left, down, right in ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = samples[top::down, left::right]
        if part.size:
            flat = packed(part.reshape(len(part), -1), depth)
            body += filtered(np.frombuffer(flat, np.uint8).reshape(len(part), -1), step, kind)
    stream = zlib.compress(body)
    size = -(-len(stream) // pieces)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    data = [png_chunk(b"IDAT", stream[at : at + size]) for at in range(0, len(stream), size)]
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + b"".join([*chunks, *data])
        + png_chunk(b"IEND", b"")
    )


# --- BMP ----------------------------------------------------------------------------------


def bmp_header(
    size: int,
    width: int,
    height: int,
    bits: int,
    compression: int,
    masks: tuple[int, ...],
    colours: int,
    length: int,
) -> bytes:
    """The header of a bitmap, with the masks behind it where it has no room for them."""
    if size == 12:
        return struct.pack("<IHHHH", 12, width, height, 1, bits)
    header = struct.pack(
        "<IiiHHIIiiII", size, width, height, 1, bits, compression, length, 2835, 2835, colours, 0
    )
    if masks and size == 40:
        return header + struct.pack(f"<{len(masks)}I", *masks)
    inside = struct.pack(f"<{len(masks)}I", *masks)[: size - 40]
    return (header + inside).ljust(size, b"\0")[:size]


def bmp_rows(values: Array, bits: int, top_down: bool) -> bytes:
    """Rows of indices or pixels [height, width], each filled up to four bytes."""
    if bits <= 8:
        flat = np.frombuffer(packed(values, bits), np.uint8).reshape(len(values), -1)
    else:
        flat = (
            values.astype("<u4")
            .view(np.uint8)
            .reshape(*values.shape, 4)[..., : bits // 8]
            .reshape(len(values), -1)
        )
    filled = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 4)))
    return (filled if top_down else filled[::-1]).tobytes()


def bmp_runs(values: Array, bits: int, literal: bool) -> bytes:
    """Run-length codes of indices [height, width], from the bottom."""
    out = b""
    for row in values[::-1].tolist():
        if literal and len(row) >= 3:
            body = bytes(row) if bits == 8 else packed(np.array([row]), 4)
            out += bytes([0, len(row)]) + body + bytes(len(body) % 2)
        else:
            for index in row:
                out += bytes([1, index if bits == 8 else index << 4])
        out += b"\0\0"
    return out + b"\0\1"


def bmp_file(header: bytes, palette: bytes, pixels: bytes) -> bytes:
    start = 14 + len(header) + len(palette)
    return (
        b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + palette + pixels
    )


def ico_file(icons: list[tuple[int, int, int, bytes]]) -> bytes:
    """An ICO of images (width, height, bits, content)."""
    at = 6 + 16 * len(icons)
    table = b""
    for width, height, bits, content in icons:
        table += struct.pack("<BBBBHHII", width, height, 0, 0, 1, bits, len(content), at)
        at += len(content)
    return (
        struct.pack("<HHH", 0, 1, len(icons)) + table + b"".join(content for *_, content in icons)
    )


# --- GIF ----------------------------------------------------------------------------------


def gif_codes(indices: bytes, bits: int) -> bytes:
    """LZW of the GIF kind that never grows: the table is cleared in time."""
    size, clear = bits + 1, 1 << bits
    codes: list[int] = []
    for number, index in enumerate(indices):
        if number % (clear - 2 if clear > 2 else 1) == 0:
            codes.append(clear)
        codes.append(index)
    codes.append(clear + 1)
    value = width = 0
    out = bytearray()
    for code in codes:
        value |= code << width
        width += size
        while width >= 8:
            out.append(value & 255)
            value, width = value >> 8, width - 8
    out += bytes([value & 255]) if width else b""
    blocks = [bytes(out[at : at + 255]) for at in range(0, len(out), 255)]
    return bytes([bits]) + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def gif_file(
    indices: Array,
    palette: Array,
    *,
    canvas: tuple[int, int],
    at: tuple[int, int] = (0, 0),
    local: bool = False,
    interlaced: bool = False,
    transparent: int | None = None,
    version: bytes = b"89a",
    more: bytes = b"",
) -> bytes:
    """A GIF of one frame; `palette` has a power of two colours."""
    bits = max(2, int(len(palette) - 1).bit_length())
    flags = int(len(palette) - 1).bit_length() - 1
    table = palette.astype(np.uint8).tobytes()
    out = b"GIF" + version + struct.pack("<HHBBB", *canvas, 0 if local else 128 | flags, 0, 0)
    out += b"" if local else table
    if transparent is not None:
        out += bytes([0x21, 0xF9, 4, 1, 0, 0, transparent, 0])
    height, width = indices.shape
    kind = (64 if interlaced else 0) | (128 | flags if local else 0)
    out += b"," + struct.pack("<HHHHB", *at, width, height, kind) + (table if local else b"")
    rows = indices
    if interlaced:
        rows = np.concatenate([indices[0::8], indices[4::8], indices[2::4], indices[1::2]])
    return out + gif_codes(rows.astype(np.uint8).tobytes(), bits) + more + b";"


# --- JPEG 2000 ----------------------------------------------------------------------------


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def jp2_file(codestream: bytes, size: tuple[int, int], depths: list[int], boxes: bytes) -> bytes:
    """A JP2 around a codestream, with these boxes behind the header of the image."""
    same = len({*depths}) == 1
    header = struct.pack(
        ">IIHBBBB", size[1], size[0], len(depths), depths[0] - 1 if same else 255, 7, 0, 0
    )
    inner = box(b"ihdr", header) + (b"" if same else box(b"bpcc", bytes(d - 1 for d in depths)))
    start = b"\0\0\0\x0cjP  \r\n\x87\n" + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    return start + box(b"jp2h", inner + boxes) + box(b"jp2c", codestream)
