"""Pickles and checkpoint files made of single opcodes, as no library writes them."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

STOP = b"."
EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE = b"}", b"]", b")"
REDUCE, BUILD, APPEND, SETITEM, TUPLE1 = b"R", b"b", b"a", b"s", b"\x85"


class Payload:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        return self.call


def text(value: str) -> bytes:
    """The opcode that pushes a string; lone surrogates are kept."""
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    """The opcode that pushes a whole number."""
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def real(value: float) -> bytes:
    """The opcode that pushes a float."""
    return b"G" + struct.pack(">d", value)


def name(module: str, attribute: str) -> bytes:
    """The opcode that imports a name."""
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*parts: bytes) -> bytes:
    """The opcodes that push a tuple."""
    return b"(" + b"".join(parts) + b"t"


def put(slot: int) -> bytes:
    """The opcode that remembers what is on the stack."""
    return b"r" + struct.pack("<I", slot)


def get(slot: int) -> bytes:
    """The opcode that pushes what was remembered."""
    return b"j" + struct.pack("<I", slot)


def call(function: bytes, *arguments: bytes) -> bytes:
    """The opcodes that call a function."""
    return function + tuple_of(*arguments) + REDUCE


def ordered_dict(*entries: bytes) -> bytes:
    """The opcodes that push an OrderedDict; `entries` are its keys and values in turn."""
    return call(name("collections", "OrderedDict")) + b"(" + b"".join(entries) + b"u"


def dict_of(*entries: bytes) -> bytes:
    """The opcodes that push a dict; `entries` are its keys and values in turn."""
    return EMPTY_DICT + b"(" + b"".join(entries) + b"u"


def pickled(*opcodes: bytes) -> bytes:
    """A whole pickle."""
    return b"\x80\x02" + b"".join(opcodes) + STOP


def storage(kind: str = "FloatStorage", key: str = "0", count: int = 16) -> bytes:
    """The opcodes that push a storage of the file."""
    parts = (text("storage"), name("torch", kind), text(key), text("cpu"), number(count))
    return tuple_of(*parts) + b"Q"


def shape_of(*sizes: int) -> bytes:
    """The opcodes that push a tuple of whole numbers."""
    return tuple_of(*map(number, sizes))


def tensor(
    *sizes: int,
    stride: tuple[int, ...] | None = None,
    offset: int = 0,
    of: bytes | None = None,
    hooks: bytes = b"",
    more: bytes = b"",
) -> bytes:
    """The opcodes that push a tensor of these sizes; `more` are arguments at the end."""
    if stride is None:
        stride = tuple(1 for _ in sizes)
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        of or storage(),
        number(offset),
        shape_of(*sizes),
        shape_of(*stride),
        b"\x89",
        hooks or ordered_dict(),
        more,
    )


def quantised(
    *sizes: int, stride: tuple[int, ...], quantizer: bytes, kind: str = "QUInt8Storage"
) -> bytes:
    """The opcodes that push a quantised tensor."""
    return call(
        name("torch._utils", "_rebuild_qtensor"),
        storage(kind),
        number(0),
        shape_of(*sizes),
        shape_of(*stride),
        quantizer,
        b"\x89",
        ordered_dict(),
    )


def sparse(layout: str, *parts: bytes) -> bytes:
    """The opcodes that push a sparse tensor; the last of `parts` is its shape."""
    return call(
        name("torch._utils", "_rebuild_sparse_tensor"),
        call(name("torch.serialization", "_get_layout"), text(f"torch.{layout}")),
        tuple_of(*parts),
    )


def zipped(
    pickle: bytes,
    storages: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """A checkpoint in the container of torch.save; without `storages` it has 64 zeros."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
        for key, values in (storages or {"0": bytes(64)}).items():
            archive.writestr(f"archive/data/{key}", values)
    return content.getvalue()


def legacy(pickle: bytes, storages: Mapping[str, tuple[int, bytes]] | None = None) -> bytes:
    """A checkpoint in the format before torch 1.6: of each storage its count and its bytes."""
    if storages is None:
        storages = {"0": (16, bytes(64))}
    keys = pickled(EMPTY_LIST, b"(", *map(text, storages), b"e")
    parts = [pickled(number(0x1950A86A20F9469CFC6C)), pickled(number(1001)), pickled(EMPTY_DICT)]
    values = [struct.pack("<Q", count) + content for count, content in storages.values()]
    return b"".join([*parts, pickle, keys, *values])


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    return struct.pack("<Q", len(header)) + header + data
