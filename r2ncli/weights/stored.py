"""Describe the tensors of a checkpoint file, without reading their values.

A description says which dtype and layout a tensor has, and which bytes of the file hold it. It
is checked against the size of the file here, so that what is loaded cannot be larger.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from r2ncli.errors import CheckpointError
from r2ncli.weights.containers import safetensors_header, shown

DIMENSIONS = 16  # of a tensor; torch itself computes with up to 64, networks need 5
MOST_ELEMENTS = 1 << 48  # of a tensor without values; far from an overflow of 64 bits

# bytes of one element, by torch's name of the dtype
DTYPES = {
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32", "qint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "qint8", "quint8"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"), 1),
    "float8_e8m0fnu": 1,
    "complex128": 16,
}
_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "BOOL": "bool",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
}


# dtypes of the storages that pickles name
_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
    "Bool": "bool",
    "QUInt8": "quint8",
    "QInt8": "qint8",
    "QInt32": "qint32",
    "Untyped": "uint8",
}
_COMPRESSED = ("sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")

Places = dict[str, tuple[int, int]]  # where each storage starts in the file, and its bytes


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A name that a pickle would import."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """Consecutive elements of one dtype in a file; `key` says which, `first` where they start."""

    key: str
    dtype: str
    count: int
    first: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor of a file that is not loaded.

    Without `storage` it has no values (``meta``), or they are in `parts`: those of a sparse tensor
    are its indices and its values. A quantised tensor has a `quantizer`: its scale and zero point,
    or its axis, with both as tensors in `parts`. `error` says why it cannot be loaded.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    first: int = 0
    storage: Storage | None = None
    layout: str = "strided"
    parts: tuple[StoredTensor, ...] = ()
    quantizer: tuple[Any, ...] = ()
    error: str | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of its elements; a sparse tensor counts as a dense one."""
        meta = self.storage is None and not self.parts
        return 0 if meta else math.prod(self.shape) * DTYPES[self.dtype]

    def unfit(self, places: Places) -> str | None:
        """Return why it cannot be loaded from a file with these storages, or None."""
        if self.error is None and self.storage is not None:
            storage, (_, size) = self.storage, places.get(self.storage.key, (0, -1))
            needed = (storage.first + storage.count) * DTYPES[storage.dtype]
            if size < 0:
                return "its storage is not in the file"
            if needed > size:
                return f"its storage claims {needed:,} bytes, and has {size:,} in the file"
        return next((why for part in self.parts if (why := part.unfit(places))), self.error)


def storage_of(reference: Any) -> Storage:
    """Return the storage that a pickle refers to.

    Raises
    ------
    ValueError
        It is none.
    """
    if type(reference) is tuple and len(reference) in (5, 6) and reference[0] == "storage":
        _, kind, key, _, count, *view = reference
        name = kind.name if isinstance(kind, Global) else ""
        dtype = _STORAGES.get(name.rpartition(".")[2].removesuffix("Storage"))
        first = 0
        if view and type(view[0]) is tuple and len(view[0]) == 3:  # before torch 0.4
            _, first, count = view[0]
        numbers = type(first) is int and type(count) is int
        if dtype and isinstance(key, str) and numbers and min(first, count) >= 0:
            if max(first, count) > MOST_ELEMENTS:
                raise ValueError("a storage claims more elements than any file has")
            return Storage(key, dtype, count, first)
    raise ValueError("it refers to something other than a storage of a known dtype")


def rebuilt(function: str, arguments: tuple[Any, ...]) -> StoredTensor:
    """Return the tensor that a function of ``torch._utils`` would build; see `StoredTensor.error`.

    Raises
    ------
    ValueError
        The arguments are not those of a tensor.
    """
    try:
        return _REBUILDS[function.removeprefix("torch._utils.")](*arguments)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"it calls {function} with what describes no tensor") from error


def _strided(
    storage: Storage,
    first: Any,
    shape: Any,
    stride: Any,
    requires_grad: object = False,
    hooks: Any = None,
    metadata: Any = None,
    *,
    dtype: str | None = None,
) -> StoredTensor:
    dtype = dtype or storage.dtype
    size = DTYPES[dtype]
    count = storage.count * DTYPES[storage.dtype] // size
    error = layout_error(shape, stride, first, count)
    if hooks:
        error = error or "it has hooks, which a checkpoint never needs"
    if metadata and any(metadata.values()):
        error = error or "its values are to be conjugated or negated: save them as they are"
    if error:
        return StoredTensor(dtype, (), error=error)
    typed = Storage(storage.key, dtype, count, storage.first * DTYPES[storage.dtype] // size)
    return StoredTensor(dtype, tuple(shape), tuple(stride), first, typed)


def _strided_of_dtype(
    storage: Storage,
    first: Any,
    shape: Any,
    stride: Any,
    requires_grad: object,
    hooks: Any,
    dtype: Global,
    metadata: Any = None,
) -> StoredTensor:
    kind = dtype.name.removeprefix("torch.")
    return _strided(storage, first, shape, stride, requires_grad, hooks, metadata, dtype=kind)


def _parameter(data: StoredTensor, requires_grad: object, hooks: Any) -> StoredTensor:
    return replace(data, error=data.error or ("it has hooks" if hooks else None))


def _parameter_with_state(
    data: StoredTensor, requires_grad: object, hooks: Any, state: Any
) -> StoredTensor:
    tensor = _parameter(data, requires_grad, hooks)
    if not state:
        return tensor
    from torch.nn import Parameter

    for part in state if isinstance(state, tuple) else (state,):
        for name in part or ():
            if not isinstance(name, str) or hasattr(Parameter, name):
                error = f"it would replace {shown(name)} of a Parameter"
                return replace(tensor, error=tensor.error or error)
    return tensor


def _sparse(layout: str, data: Any) -> StoredTensor:
    layout = layout.removeprefix("torch.")
    count = 2 if layout == "sparse_coo" else 3 if layout in _COMPRESSED else 0
    parts, shape = tuple(data[:count]), data[count]
    if not count or not all(type(part) is StoredTensor and part.storage for part in parts):
        raise ValueError
    error = layout_error(shape, (0,) * len(shape), 0, None)
    if any(part.quantizer for part in parts):
        error = error or "it is quantised and sparse"
    return StoredTensor(
        parts[-1].dtype, () if error else tuple(shape), layout=layout, parts=parts, error=error
    )


def _quantised(
    storage: Storage,
    first: Any,
    shape: Any,
    stride: Any,
    quantizer: Any,
    requires_grad: object = False,
    hooks: Any = None,
) -> StoredTensor:
    tensor = _strided(storage, first, shape, stride, requires_grad, hooks)
    scheme, scale, zero_point, *rest = quantizer
    name = scheme.name.removeprefix("torch.")
    known = tensor.dtype in ("qint8", "quint8", "qint32")
    if name == "per_tensor_affine":
        known &= type(scale) is float and math.isfinite(scale) and scale > 0
        known &= type(zero_point) is int and abs(zero_point) < 1 << 31
        if known:
            return replace(tensor, quantizer=(scale, zero_point))
    elif name == "per_channel_affine":
        parts, (axis,) = (scale, zero_point), rest
        known &= type(axis) is int and 0 <= axis < len(tensor.shape)
        for part in parts:
            known &= type(part) is StoredTensor and part.storage is not None
            known = known and part.shape == tensor.shape[axis : axis + 1]
        if known or tensor.error:
            return replace(tensor, quantizer=(axis,), parts=parts)
    error = f"its quantisation ({shown(name)[1:-1]}) is not sound or not supported"
    return replace(tensor, error=tensor.error or error)


def _meta(dtype: Global, shape: Any, stride: Any, requires_grad: object = False) -> StoredTensor:
    kind = dtype.name.removeprefix("torch.")
    error = layout_error(shape, stride, 0, None)
    DTYPES[kind]  # KeyError if unknown
    return StoredTensor(kind, () if error else tuple(shape), error=error)


_REBUILDS: dict[str, Callable[..., StoredTensor]] = {
    "_rebuild_tensor": _strided,
    "_rebuild_tensor_v2": _strided,
    "_rebuild_tensor_v3": _strided_of_dtype,
    "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter_with_state,
    "_rebuild_sparse_tensor": _sparse,
    "_rebuild_qtensor": _quantised,
    "_rebuild_meta_tensor_no_storage": _meta,
}


def layout_error(shape: Any, stride: Any, first: Any, count: int | None) -> str | None:
    """Return what is wrong with a tensor of this layout in a storage of `count` elements, or None.

    Nothing may be outside of the storage, and there may be no more elements than it has. A tensor
    without values has no `count`.
    """
    if len(shape) != len(stride) or len(shape) > DIMENSIONS:
        return f"it has {len(shape):,} dimensions and {len(stride):,} strides"
    numbers = (*shape, *stride, first)
    if not all(type(number) is int for number in numbers):
        return "its shape is not one of whole numbers"
    if min(numbers) < 0:
        return "its shape, its strides or its offset is negative"
    if max(numbers) > MOST_ELEMENTS or math.prod(filter(None, shape)) > MOST_ELEMENTS:
        return "it claims more elements than any file has"
    elements = math.prod(shape)
    last = first + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if count is not None and elements and (elements > count or last >= count):
        reached = max(elements, last + 1)
        return f"it needs a storage of {reached:,} elements, and its storage has {count:,}"
    return None


def safetensors_content(path: Path) -> tuple[dict[str, StoredTensor], Places]:
    """Return the tensors of a safetensors file, and the place of each storage in the file.

    Raises
    ------
    CheckpointError
        The header does not describe the bytes of the file.
    """
    header = safetensors_header(path)
    if header is None:
        raise CheckpointError(f"{path}: corrupted, cannot be loaded: its header is empty")
    start, size = 8 + len(header), path.stat().st_size
    tensors: dict[str, StoredTensor] = {}
    places: Places = {}
    try:
        described = _safetensors_header(header)
        for name, tensor in sorted(described.items()):
            tensors[name], place = _described(name, tensor)
            places[name] = start + place[0], place[1]
    except _HeaderError as error:
        raise CheckpointError(f"{path}: corrupted, cannot be loaded: {error}") from error
    end = start
    for name, (begin, length) in sorted(places.items(), key=lambda place: place[1]):
        if begin != end:
            raise CheckpointError(
                f"{path}: corrupted, cannot be loaded: the bytes of {shown(name)} overlap others "
                "or follow a gap"
            )
        end += length
    if end != size:
        raise CheckpointError(
            f"{path}: corrupted, cannot be loaded: it has {size:,} bytes, and its tensors end "
            f"after {end:,}"
        )
    return tensors, places


class _HeaderError(ValueError):
    """What a safetensors header has instead of the description of a tensor."""


def _safetensors_header(header: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise _HeaderError("a key of its header is there twice")
        return found

    try:
        described = json.loads(header, object_pairs_hook=once)
    except _HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise _HeaderError(f"invalid JSON in its header: {str(error)[:80]}") from error
    notes = described.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise _HeaderError("__metadata__ in its header is not an object of strings")
    return cast(dict[str, Any], described)


def _described(name: str, tensor: Any) -> tuple[StoredTensor, tuple[int, int]]:
    """Return a tensor of a safetensors header, and the start and length of its bytes."""
    try:
        dtype = _SAFETENSORS_DTYPES[tensor["dtype"]]
        shape, (begin, end) = tuple(tensor["shape"]), tensor["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _HeaderError(
            f"{shown(name)} in its header has no known dtype, shape or offsets"
        ) from error
    error_found = layout_error(shape, (0,) * len(shape), 0, None)
    if error_found or type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise _HeaderError(
            f"{shown(name)}: {error_found or 'its offsets are no place in the file'}"
        )
    count = math.prod(shape)
    if count * DTYPES[dtype] != end - begin:
        raise _HeaderError(f"{shown(name)} of {count:,} {dtype} elements has {end - begin:,} bytes")
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    storage = Storage(name, dtype, count)
    return StoredTensor(dtype, shape, tuple(steps), 0, storage), (begin, end - begin)
