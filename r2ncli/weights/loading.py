"""Load a checkpoint's tensors safely, unwrap them and build the network.

A file is described first (see `pickles` and `stored`); then the bytes of the state dict's tensors
are read, and nothing else. No unpickler runs, so nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2ncli.architectures import (
    DEMO,
    PUBLISHED,
    Architecture,
    Preprocessing,
    cpu_batch_size,
    published,
)
from r2ncli.errors import CheckpointError, escaped
from r2ncli.model import Res2Net, layer_shapes
from r2ncli.weights.checkpoints import (
    CheckpointFile,
    Labels,
    Weights,
    open_checkpoint,
    requested_weights,
)
from r2ncli.weights.containers import container, reading, shown
from r2ncli.weights.download import OnProgress
from r2ncli.weights.opcodes import kind_of_value
from r2ncli.weights.pickles import Content, read_pickles
from r2ncli.weights.stored import DTYPES, Storage, StoredTensor, safetensors_content
from r2ncli.weights.structure import (
    COUNTER,
    StateDict,
    identify,
    kind_of,
    read_naming,
    variant_name,
)

WRAPPERS = (
    *("state_dict", "model", "model_state_dict", "net", "network", "module", "weights", "params"),
    *("state_dict_ema", "model_ema"),  # files that hold only an average of the weights
)

LONGEST_NAME = 500  # characters; the longest of the published networks have 42
# Of the largest layer for a batch on a CPU: 64 channels of 256 x 256 for 8 images, which the
# published networks have at an image size of 512; at 224 they have a fifth of it.
MOST_VALUES = 8 * 64 * 256 * 256
MOST_TENSORS = 50_000  # the largest published network has 2,300


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: its network, and the metadata of its file.

    `variant` is the published network's name, ``demo``, or the architecture in words; `network`
    is in eval mode, float32, on the CPU; `sha256` is that of the file, as 64 hex digits.
    """

    path: Path
    sha256: str
    variant: str
    network: Res2Net
    labels: Labels | None
    preprocessing: Preprocessing


def load_checkpoint(
    weights: Weights = None,
    *,
    download: bool = True,
    on_progress: OnProgress | None = None,
    output_stride: int = 32,
) -> Checkpoint:
    """Find, check and load a checkpoint (see `find_checkpoint` and, for the stride, `Res2Net`).

    Raises
    ------
    CheckpointError
        The checkpoint is absent, altered, or not a Res2Net.
    """
    found = open_checkpoint(weights, download=download, on_progress=on_progress)
    return load(found, output_stride)


def load(file: CheckpointFile, output_stride: int = 32) -> Checkpoint:
    """Load the tensors of a checkpoint file and build its network.

    Raises
    ------
    CheckpointError
        It is not a Res2Net.
    """
    state_dict = load_state_dict(file.path)
    architecture = identify(state_dict, file.path)
    check_work(architecture, file.preprocessing.image_size, file.path)
    # a file may call itself demo; only its tensors can make it a published network
    demo = file.metadata.get("variant") == DEMO
    return Checkpoint(
        path=file.path,
        sha256=file.sha256,
        variant=DEMO if demo else variant_name(architecture),
        network=build(architecture, state_dict, output_stride),
        labels=file.labels(architecture.classes),
        preprocessing=file.preprocessing,
    )


def check_work(architecture: Architecture, image_size: int, path: Path) -> None:
    """Check that a network does not need far more memory for an image than the published ones.

    Raises
    ------
    CheckpointError
        Its largest layer gives more than `MOST_VALUES` values for a batch.
    """
    largest = architecture.largest_output(image_size)
    limit = MOST_VALUES // cpu_batch_size(image_size)
    if largest > limit:
        raise CheckpointError(
            f"{path}: its largest layer gives {largest:,} values per image at the image size of "
            f"{image_size} that it asks for, more than the limit of {limit:,}. Give its metadata "
            "a smaller image_size; the option `image_size` can then ask for a larger one"
        )


def load_model(path_or_name: str | os.PathLike[str], *, output_stride: int = 32) -> Res2Net:
    """Load a checkpoint's network: in eval mode, float32, on the CPU.

    Parameters
    ----------
    path_or_name : str or path
        A checkpoint file, a published network's name (downloaded if necessary), or
        ``demo``.
    output_stride : int
        32, 16 or 8 (see `Res2Net`).

    Returns
    -------
    Res2Net
        Takes float32 [N, 3, H, W], RGB normalised by mean and standard deviation, and
        gives logits [N, classes].

    Raises
    ------
    CheckpointError
        The checkpoint is absent, altered, or not a Res2Net.
    """
    return load_checkpoint(path_or_name, output_stride=output_stride).network


def load_state_dict(path: Path) -> StateDict:
    """Return the tensors of a checkpoint file by the published names, whatever names it uses.

    Raises
    ------
    CheckpointError
        The file cannot be read, would execute something, or holds no state dict.
    """
    tensors = load_tensors(path)
    official = read_naming(tensors).official
    return {official[name]: tensor for name, tensor in tensors.items()}


def load_tensors(path: Path) -> StateDict:
    """Return the tensors of a checkpoint file by the names they have in the file.

    A wrapper around them (``{"state_dict": …}`` and the like) is removed; what else is in the
    file is not read. Control characters in names are escaped.

    Raises
    ------
    CheckpointError
        The file cannot be read, would execute something, or holds no state dict; or a tensor
        is not within the file.
    """
    kind = container(path)
    if kind == "safetensors":
        tensors, places = safetensors_content(path)
        content = Content((), tensors, places)
    else:
        content = read_pickles(path, kind)
    described = _state_dict(content.value, path)
    _check_amount(described, path)
    storages: dict[str, Tensor] = {}
    with reading(path) as file:

        def read(storage: Storage) -> Tensor:
            if storage.key not in storages:
                flat = _bytes(file, *content.places[storage.key])
                storages[storage.key] = _swapped(flat, storage) if content.big_endian else flat
            size = DTYPES[storage.dtype]
            first, end = storage.first * size, (storage.first + storage.count) * size
            return storages[storage.key][first:end]

        loaded = {}
        for name, stored in described.items():
            try:
                loaded[name] = _tensor(stored, read)
            except (RuntimeError, ValueError, OverflowError) as error:
                first_sentence = re.split(r"\. |\n", str(error))[0]
                raise CheckpointError(
                    f"{path}: corrupted, cannot be loaded: the tensor {shown(name)}: "
                    f"{first_sentence}"
                ) from error
    return loaded


def _state_dict(value: Any, path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a state dict that may have wrappers around it."""
    for _ in WRAPPERS:  # they can be nested
        if isinstance(value, dict):
            inner = (value[key] for key in WRAPPERS if isinstance(value.get(key), dict))
            value = next(inner, value)
    if not isinstance(value, dict):
        found = kind_of_value(value)
        raise CheckpointError(f"{path}: holds a {found}, expected a state dict of tensors")
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in value.items():
        if isinstance(tensor, StoredTensor) and isinstance(key, str | int):
            name = escaped(str(key))
            if len(name) > LONGEST_NAME:
                raise CheckpointError(
                    f"{path}: the tensor {shown(name)} has a name of {len(name):,} characters, "
                    f"longer than the limit of {LONGEST_NAME:,}"
                )
            tensors[name] = tensor
    if not tensors:
        keys = ", ".join(shown(getattr(key, "kind", key)) for key in list(value)[:5])
        raise CheckpointError(f"{path}: holds no state dict (its keys: {keys or 'none'})")
    return tensors


def _check_amount(tensors: Mapping[str, StoredTensor], path: Path) -> None:
    """Check that tensors take about as much memory as the file has bytes.

    Several can share one storage, and a sparse tensor is small in the file.
    """
    if len(tensors) > MOST_TENSORS:
        raise CheckpointError(
            f"{path}: has {len(tensors):,} tensors, more than the limit of {MOST_TENSORS:,}"
        )
    limit = path.stat().st_size * 3 // 2 + 16_000_000
    total = 0
    for name, tensor in tensors.items():
        total += tensor.nbytes
        if total > limit:
            raise CheckpointError(
                f"{path}: refused, nothing in it was executed: the tensor {shown(name)}: with it "
                f"the tensors claim {total:,} bytes, the file has {path.stat().st_size:,}"
            )


def _bytes(file: BufferedReader, start: int, size: int) -> Tensor:
    """Read bytes of a file into a tensor uint8 [size], without a copy."""
    flat = torch.empty(size, dtype=torch.uint8)
    file.seek(start)
    if file.readinto(flat.numpy().data) != size:
        raise ValueError("the file ends before its values do")
    return flat


def _swapped(flat: Tensor, storage: Storage) -> Tensor:
    """Return the bytes of a storage of the other byte order in this machine's order."""
    size = DTYPES[storage.dtype] // (2 if storage.dtype.startswith("complex") else 1)
    if sys.byteorder == "little" and size > 1:
        flat[: len(flat) // size * size].numpy().view(f"u{size}").byteswap(inplace=True)
    return flat


def _tensor(stored: StoredTensor, read: Callable[[Storage], Tensor]) -> Tensor:
    """Load one tensor; `read` returns the bytes of a storage, uint8 [N]."""
    if stored.layout != "strided":
        *indices, values = (_tensor(part, read) for part in stored.parts)
        layout, shape = getattr(torch, stored.layout), list(stored.shape)
        if layout == torch.sparse_coo:
            return torch.sparse_coo_tensor(indices[0], values, shape, check_invariants=True)
        build: Callable[..., Tensor] = torch.sparse_compressed_tensor
        return build(*indices, values, shape, layout=layout, check_invariants=True)
    if stored.storage is None:
        return torch.empty(stored.shape, dtype=getattr(torch, stored.dtype), device="meta")
    dtype = stored.dtype.removeprefix("q") if stored.quantizer else stored.dtype
    flat = read(stored.storage).view(getattr(torch, dtype))
    start = flat.storage_offset() + stored.first
    tensor = flat.as_strided(stored.shape, stored.stride, start)
    if not stored.quantizer:
        return tensor
    if not stored.parts:
        return torch._make_per_tensor_quantized_tensor(tensor, *stored.quantizer)
    scales, zero_points = (_tensor(part, read) for part in stored.parts)
    return torch._make_per_channel_quantized_tensor(
        tensor, scales.double(), zero_points.long(), stored.quantizer[0]
    )


def tensors_sha256(state_dict: StateDict) -> str:
    """Return a SHA-256 of the tensors only: the same in every container and file order.

    It covers the tensors in the order of their names' UTF-8 bytes: of each a JSON line
    ``["name", "dtype", [shape]]``, then the bytes of its values, little-endian, in C order.
    Sparse tensors count as dense ones; a tensor without values (meta) adds only its line.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict, key=lambda name: name.encode("utf-8", "surrogatepass")):
        tensor = state_dict[name].detach()
        line = json.dumps([name, kind_of(tensor), list(tensor.shape)])
        digest.update(f"{line}\n".encode())
        if not tensor.is_meta:
            tensor = tensor.dequantize() if tensor.is_quantized else tensor.to_dense()
            flat = tensor.contiguous().view(-1) if tensor.dim() else tensor.reshape(1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def build(architecture: Architecture, state_dict: StateDict, output_stride: int = 32) -> Res2Net:
    """Build the network with these weights: in eval mode, float32, on the CPU."""
    with torch.device("meta"):
        network = Res2Net(architecture, output_stride)
    weights = {name: torch.tensor(0) for name in network.state_dict() if name.endswith(COUNTER)}
    for name, tensor in state_dict.items():
        whole = tensor.detach().contiguous()
        weights[name] = whole if name.endswith(COUNTER) else whole.float()
    network.load_state_dict(weights, strict=True, assign=True)  # without copying float32
    return network.eval()


# --- the published networks ----------------------------------------------------------


def list_layers(
    weights: Weights = None,
    image_size: int | None = None,
    *,
    on_progress: OnProgress | None = None,
) -> dict[str, tuple[int, ...]]:
    """Return the output shape of each layer for one image, by the layer's name.

    A published network needs no checkpoint for it: nothing is downloaded.

    `image_size` is the height and width of the network's input in pixels; None means the
    checkpoint's own.

    Raises
    ------
    CheckpointError
        The checkpoint is absent or not a Res2Net.
    """
    if network := published(requested_weights(weights)):
        return layer_shapes(network.architecture, image_size or Preprocessing().image_size)
    checkpoint = load_checkpoint(weights, on_progress=on_progress)
    size = image_size or checkpoint.preprocessing.image_size
    return layer_shapes(checkpoint.network.architecture, size)


def published_network(name: str, weights: Weights = None, output_stride: int = 32) -> Res2Net:
    """Build the network `PUBLISHED[name]` in eval mode; without `weights` it is untrained.

    Raises
    ------
    CheckpointError
        The weights are absent, or another network's (another class count is fine).
    """
    architecture = PUBLISHED[name].architecture
    if weights is None:
        return Res2Net(architecture, output_stride).eval()
    checkpoint = load_checkpoint(weights, output_stride=output_stride)
    found = checkpoint.network.architecture
    if replace(found, classes=architecture.classes) != architecture:
        raise CheckpointError(f"{checkpoint.path}: holds {found.describe()}, expected {name}")
    return checkpoint.network


@cache  # each call returns the same function, so that it can be pickled
def builder(name: str) -> Callable[..., Res2Net]:
    """Return the function ``r2ncli.NAME`` that builds the published network `name`."""

    def build_published(weights: Weights = None, *, output_stride: int = 32) -> Res2Net:
        return published_network(name, weights, output_stride)

    build_published.__name__ = build_published.__qualname__ = name
    build_published.__module__ = "r2ncli"
    build_published.__doc__ = f"""Build {PUBLISHED[name].architecture.describe()}, in eval mode.

    Parameters
    ----------
    weights : str, path or None
        A checkpoint file or ``"{name}"``, the official weights; None gives an untrained
        network.
    output_stride : int
        32, 16 or 8 (see `Res2Net`).

    Raises
    ------
    CheckpointError
        The weights are absent, or another network's (another class count is fine).
    """
    return build_published
