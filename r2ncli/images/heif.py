"""HEIC by pillow-heif and AVIF by Pillow; their container says what an image needs of the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO

from PIL import AvifImagePlugin, Image

from r2ncli.errors import ImageError
from r2ncli.images.decoders import Codec
from r2ncli.images.pillow import TRUNCATED, Factory, boxes_between, load, unlimited, unsupported

_AVIF_BRANDS = {b"avif", b"avis"}
_HEVC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_MOST_META = 16_000_000  # bytes that describe the items
_DERIVED = {b"grid", b"iovl", b"iden"}  # items that are made of others


def is_heic(head: bytes) -> bool:
    """Return whether a file's brands are those of HEIC and not of AVIF, which Pillow decodes."""
    if head[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(head[:4]), len(head))
    brands = {head[at : at + 4] for at in (8, *range(16, end, 4))}
    if head[8:12] in _AVIF_BRANDS or (brands & _AVIF_BRANDS and not brands & _HEVC_BRANDS):
        return False
    return bool(brands & (_HEVC_BRANDS | {b"mif1", b"msf1"}))


# --- the container ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Items:
    """The items of a file: images, tiles and metadata.

    Attributes
    ----------
    primary : int or None
        The item that is the image; None if there is no still image.
    kinds : dict
        The kind of each item.
    extents : dict
        Start and end of the pieces of each item.
    references : dict
        The items to which an item refers, by the kind of reference and the item.
    properties : dict
        Kind and content of the properties of each item.
    meta : (int, int)
        Where the box that holds all of these starts and ends.
    """

    primary: int | None = None
    kinds: dict[int, bytes] = field(default_factory=dict)
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    references: dict[tuple[bytes, int], list[int]] = field(default_factory=dict)
    properties: dict[int, list[tuple[bytes, bytes]]] = field(default_factory=dict)
    meta: tuple[int, int] = (0, 0)

    def size(self, item: int) -> tuple[int, int] | None:
        """Return width and height of an item before it is cropped and turned."""
        for kind, body in self.properties.get(item, []):
            if kind == b"ispe" and len(body) >= 12:
                return int.from_bytes(body[4:8]), int.from_bytes(body[8:12])
        return None

    def parts(self, item: int) -> list[int]:
        """Return the items of which an item is made, as often as they are used."""
        return self.references.get((b"dimg", item), [])

    def alpha(self, item: int) -> list[int]:
        """Return the items that hold the opacity of an item."""
        auxiliary = [
            (source, to) for (kind, source), to in self.references.items() if kind == b"auxl"
        ]
        return [source for source, to in auxiliary if item in to and self._is_alpha(source)]

    def _is_alpha(self, item: int) -> bool:
        properties = self.properties.get(item, [])
        names = [body for kind, body in properties if kind == b"auxC"]
        return any(b"alpha" in name or b"auxid:1\0" in name for name in names)


class _Numbers:
    """Reads big-endian numbers of any size one after the other."""

    def __init__(self, content: bytes, at: int, end: int) -> None:
        self.content, self.at, self.end = content, at, end

    def next(self, size: int) -> int:
        if self.at + size > self.end:
            raise ImageError(TRUNCATED)
        self.at += size
        return int.from_bytes(self.content[self.at - size : self.at])


def _items(content: bytes) -> _Items:
    """Read the items of a file."""
    for kind, start, end in boxes_between(content, 0, len(content)):
        if kind == b"meta" and end - start <= _MOST_META:
            inner = {name: (s, e) for name, s, e in boxes_between(content, start + 4, end)}
            parts = {
                name: _Numbers(content, *inner.get(name, (0, 0)))
                for name in (b"pitm", b"iinf", b"iref", b"iprp", b"iloc")
            }
            idat, _ = inner.get(b"idat", (0, 0))
            return _Items(
                _primary(parts[b"pitm"]),
                _kinds(parts[b"iinf"]),
                _extents(parts[b"iloc"], idat),
                _references(parts[b"iref"]),
                _properties(parts[b"iprp"]),
                (start, end),
            )
    return _Items()


def _primary(numbers: _Numbers) -> int | None:
    if numbers.at == numbers.end:
        return None
    version = numbers.next(4) >> 24
    return numbers.next(4 if version else 2)


def _kinds(numbers: _Numbers) -> dict[int, bytes]:
    found = {}
    if numbers.at < numbers.end:
        version = numbers.next(4) >> 24
        numbers.next(4 if version else 2)
        for _, first, last in boxes_between(numbers.content, numbers.at, numbers.end):
            entry = _Numbers(numbers.content, first, last)
            version = entry.next(4) >> 24
            if version >= 2:
                item = entry.next(4 if version > 2 else 2)
                entry.next(2)
                found[item] = numbers.content[entry.at : entry.at + 4]
    return found


def _references(numbers: _Numbers) -> dict[tuple[bytes, int], list[int]]:
    found: dict[tuple[bytes, int], list[int]] = {}
    if numbers.at < numbers.end:
        wide = 4 if numbers.next(4) >> 24 else 2
        for kind, first, last in boxes_between(numbers.content, numbers.at, numbers.end):
            entry = _Numbers(numbers.content, first, last)
            source, count = entry.next(wide), entry.next(2)
            found[kind, source] = [entry.next(wide) for _ in range(count)]
    return found


def _properties(numbers: _Numbers) -> dict[int, list[tuple[bytes, bytes]]]:
    content = numbers.content
    known: list[tuple[bytes, bytes]] = []
    found: dict[int, list[tuple[bytes, bytes]]] = {}
    for kind, first, last in boxes_between(content, numbers.at, numbers.end):
        if kind == b"ipco":
            known = [(name, content[s:e]) for name, s, e in boxes_between(content, first, last)]
        elif kind == b"ipma":
            entry = _Numbers(content, first, last)
            version_and_flags = entry.next(4)
            item_size = 4 if version_and_flags >> 24 else 2
            index_size = 2 if version_and_flags & 1 else 1
            for _ in range(entry.next(4)):
                item = entry.next(item_size)
                for _ in range(entry.next(1)):
                    index = entry.next(index_size) & (2 ** (8 * index_size - 1) - 1)
                    if 0 < index <= len(known):
                        found.setdefault(item, []).append(known[index - 1])
    return found


def _extents(numbers: _Numbers, idat: int) -> dict[int, list[tuple[int, int]]]:
    found: dict[int, list[tuple[int, int]]] = {}
    if numbers.at == numbers.end:
        return found
    version = numbers.next(4) >> 24
    sizes = numbers.next(2)
    offset_size, length_size, base_size = sizes >> 12, sizes >> 8 & 15, sizes >> 4 & 15
    index_size = sizes & 15 if version else 0
    for _ in range(numbers.next(4 if version == 2 else 2)):
        item = numbers.next(4 if version == 2 else 2)
        method = numbers.next(2) & 15 if version else 0
        numbers.next(2)
        base = numbers.next(base_size) + (idat if method == 1 else 0)
        for _ in range(numbers.next(2)):
            numbers.next(index_size)
            start, length = base + numbers.next(offset_size), numbers.next(length_size)
            if method < 2:  # else inside another item
                found.setdefault(item, []).append((start, start + length))
    return found


def _checked(content: bytes, items: _Items) -> bytes:
    """Raise an error if data of the image, its tiles or its opacity lies outside the file.

    The file is returned with zeros for metadata that is cut off.
    """
    if items.primary is None:
        return content
    waiting, needed = [items.primary, *items.alpha(items.primary)], set()
    while waiting:
        item = waiting.pop()
        if item not in needed:
            needed.add(item)
            parts = items.parts(item)
            waiting += parts
            canvas, sizes = items.size(item), [items.size(part) for part in parts]
            pixels = sum(size[0] * size[1] for size in sizes if size)
            if canvas and pixels > 4 * canvas[0] * canvas[1] + 2**22:
                raise unsupported("image whose tiles are much larger than itself")
    if any(end > len(content) for item in needed for _, end in items.extents.get(item, [])):
        raise ImageError(TRUNCATED)
    last = max((end for pieces in items.extents.values() for _, end in pieces), default=0)
    return content.ljust(min(last, len(content) + _MOST_META), b"\0")


# --- HEIC ---------------------------------------------------------------------------------


def _open_heic(content: bytes) -> Image.Image:
    """Open the primary image, which libheif crops and turns upright."""
    from pillow_heif import HeifImageFile  # optional and slow to import

    factory: Factory = HeifImageFile
    items = _items(content)
    boxes = {kind for kind, _, _ in boxes_between(content, 0, len(content))}
    if items.primary is None and b"moov" in boxes:
        raise unsupported("HEIC sequence without a still image")
    content = _checked(content, items)
    try:
        return factory(BytesIO(content), "")
    except Exception:
        parts = [] if items.primary is None else [items.primary, *items.parts(items.primary)]
        others = {items.kinds.get(part, b"hvc1") for part in parts} - _DERIVED - {b"hvc1", b"lhv1"}
        if others:
            name = min(others).decode("latin-1")
            raise unsupported(f"HEIF of images of kind '{name}'") from None
        raise


HEIC = Codec(is_heic, _open_heic, load)


# --- AVIF ---------------------------------------------------------------------------------

_open_by_pillow = unlimited(AvifImagePlugin.AvifImageFile)


def _open_avif(content: bytes) -> Image.Image:
    """Open an AVIF; corrupted EXIF counts as absent."""
    items = _items(content)
    content = _checked(content, items)
    try:
        return _open_by_pillow(content)
    except Exception:
        start, end = items.meta
        without = content[start:end].replace(b"Exif\0", b"free\0")
        if without == content[start:end]:
            raise
        return _open_by_pillow(content[:start] + without + content[end:])


def _load_avif(image: Image.Image, content: bytes) -> Image.Image:
    """Decode the pixels within the clean aperture, which libavif leaves to its caller."""
    image.load()
    items = _items(content)
    if items.primary is None or items.size(items.primary) != image.size:
        return image
    for kind, body in items.properties.get(items.primary, []):
        box = _clean_aperture(image.size, body) if kind == b"clap" else None
        if box:
            cropped = image.crop(box)
            cropped.info = image.info
            return cropped
    return image


def _clean_aperture(size: tuple[int, int], body: bytes) -> tuple[int, int, int, int] | None:
    """Return the box of a clean aperture in whole pixels; None if it is not valid."""
    numbers = [int.from_bytes(body[at : at + 4], signed=True) for at in range(0, 32, 4)]
    if len(body) < 32 or min(numbers[1::2]) <= 0:
        return None
    width, height, right, down = (n / d for n, d in zip(numbers[::2], numbers[1::2], strict=True))
    left, top = (size[0] - width) / 2 + right, (size[1] - height) / 2 + down
    box = (left, top, left + width, top + height)
    whole = all(edge.is_integer() for edge in box)
    inside = 0 <= left < box[2] <= size[0] and 0 <= top < box[3] <= size[1]
    return (int(box[0]), int(box[1]), int(box[2]), int(box[3])) if whole and inside else None


AVIF = Codec(AvifImagePlugin._accept, _open_avif, _load_avif)
