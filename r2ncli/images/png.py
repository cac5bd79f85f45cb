"""PNG: only the chunks that pixels need are decoded, and transparent colours have full depth.

Pillow stops at any chunk that it cannot read, and compares the colour of tRNS with samples that it
has scaled to eight bits already.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

from r2ncli.errors import ImageError
from r2ncli.images.decoders import Codec
from r2ncli.images.pillow import TRUNCATED, unlimited, unsupported

_MAGIC = b"\x89PNG\r\n\x1a\n"
_MOST_PROFILE = 16_000_000  # bytes, uncompressed
_MOST_TEXT = 1_000_000
_MOST_CHUNKS = 1_000_000
_KEPT = (b"IHDR", b"PLTE", b"IDAT")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_open_by_pillow = unlimited(PngImagePlugin.PngImageFile)


def _chunks(content: bytes) -> tuple[bytes, dict[bytes, bytes], list[tuple[bytes, bytes]]]:
    """Return the file as Pillow is to read it, the first chunk of each other kind, and the texts.

    Ancillary chunks with a wrong checksum count as absent.
    """
    kept, others = [_MAGIC], dict[bytes, bytes]()
    texts: list[tuple[bytes, bytes]] = []
    at, end, seen_data = 8, 8, False
    while at + 8 <= len(content):
        if len(kept) + len(texts) > _MOST_CHUNKS:
            raise ImageError("cannot be decoded: too many chunks")
        length, kind = int.from_bytes(content[at : at + 4]), content[at + 4 : at + 8]
        end = at + 12 + length
        if kind == b"CgBI":
            raise unsupported("PNG of Apple's own kind (CgBI)")
        if kind == b"IEND":
            break
        if kind in _KEPT:
            if kind != b"PLTE" or not seen_data:
                kept.append(content[at:end])
            seen_data |= kind == b"IDAT"
        elif end <= len(content) and (kind in _TEXTS or kind not in others):
            body = content[at + 8 : end - 4]
            if zlib.crc32(kind + body) == int.from_bytes(content[end - 4 : end]):
                if kind in _TEXTS:
                    texts.append((kind, body))
                else:
                    others[kind] = body
            elif kind == b"tRNS":
                raise ImageError("cannot be decoded: corrupted PNG (checksum of tRNS)")
        at = end
    if not seen_data:
        raise ImageError(
            TRUNCATED if len(kept) > 1 else "cannot be decoded: corrupted PNG (no header)"
        )
    if end <= len(content):
        kept.append(b"\0\0\0\0IEND\xaeB`\x82")
    return b"".join(kept), others, texts


def _open(content: bytes) -> Image.Image:
    """Read the header; profile, EXIF and XMP are ignored if they are corrupted."""
    needed, others, texts = _chunks(content)
    image = _open_by_pillow(needed)
    if not image.tile or not image.mode:
        raise ImageError("cannot be decoded: corrupted PNG (its header)")
    if (key := others.get(b"tRNS")) and image.mode != "P":
        image.info["colour key"] = key
    elif key:
        image.info["transparency"] = key[:256]
    profile = _inflated(others.get(b"iCCP", b""), _MOST_PROFILE + 1)
    if 0 < len(profile) <= _MOST_PROFILE:
        image.info["icc_profile"] = profile
    if b"eXIf" in others:
        image.info["exif"] = b"Exif\0\0" + others[b"eXIf"]
    for kind, body in texts:
        _keep_orientation(image, kind, body)
    return image


def _inflated(body: bytes, most: int) -> bytes:
    """Return what a chunk holds compressed after a name, `most` bytes of it; none if corrupted."""
    _, _, rest = body.partition(b"\0")
    try:
        return zlib.decompressobj().decompress(rest[1:], most)
    except zlib.error:
        return b""


def _keep_orientation(image: Image.Image, kind: bytes, body: bytes) -> None:
    """Keep the texts in which Pillow looks for an orientation: XMP, and ImageMagick's EXIF."""
    keyword, _, rest = body.partition(b"\0")
    if keyword == b"XML:com.adobe.xmp" and kind == b"iTXt" and len(rest) > 2:
        text = rest[2:].split(b"\0", 2)[-1]
        image.info["xmp"] = _inflated(b"\0\0" + text, _MOST_TEXT) if rest[0] else text
    elif keyword == b"Raw profile type exif" and kind != b"iTXt":
        text = _inflated(body, _MOST_TEXT) if kind == b"zTXt" else rest[:_MOST_TEXT]
        image.info["Raw profile type exif"] = text.decode("latin-1")


# --- pixels -------------------------------------------------------------------------------


def _load(image: Image.Image, content: bytes) -> Image.Image:
    """Decode the pixels; a transparent colour becomes white."""
    depth, colour_type = content[24], content[25]
    image.load()
    key = image.info.get("colour key", b"")
    if len(key) >= (6 if image.mode == "RGB" else 2) and image.mode in ("1", "L", "I;16", "RGB"):
        samples = [*struct.unpack(">3H", key[:6].ljust(6, b"\0"))]
        return _with_key_white(image, content, depth, samples)
    if (depth, colour_type) == (16, 4):  # which Pillow loads as colour
        return _like(image, Image.merge("LA", [image.getchannel("R"), image.getchannel("A")]))
    return image


def _with_key_white(image: Image.Image, content: bytes, depth: int, key: list[int]) -> Image.Image:
    """Return the image with the pixels white that have the colour of tRNS in full depth."""
    highest = 2**depth - 1
    if image.mode == "I;16":
        image.info["transparency"] = key[0]
        return image
    if image.mode == "RGB":
        pixels = np.array(image)
        wanted = np.array(key) & highest
        same = (pixels == wanted >> (depth - 8)).all(-1)
        if depth == 16 and same.any():
            again = _open_by_pillow(_chunks(content)[0])
            again.tile = [again.tile[0]._replace(args="RGB;16L")]  # the low bytes
            again.load()
            same &= (np.asarray(again) == wanted & 255).all(-1)
        pixels[same] = 255
        return _like(image, Image.fromarray(pixels))
    pixels = np.array(image.convert("L"))
    pixels[pixels == (key[0] & highest) * 255 // highest] = 255
    return _like(image, Image.fromarray(pixels))


def _like(image: Image.Image, pixels: Image.Image) -> Image.Image:
    """Return these pixels with the metadata of an image."""
    pixels.info = image.info
    return pixels


PNG = Codec(PngImagePlugin._accept, _open, _load)
