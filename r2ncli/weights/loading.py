"""Load a checkpoint's tensors safely, unwrap them and build the network.

A pickle's opcodes are checked before anything is loaded, and every load is
``weights_only=True``: nothing in a file is executed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from r2ncli.architectures import DEMO, PUBLISHED, Architecture, Preprocessing, published
from r2ncli.errors import CheckpointError
from r2ncli.model import Res2Net, layer_shapes
from r2ncli.weights.checkpoints import (
    CheckpointFile,
    Labels,
    Weights,
    open_checkpoint,
    requested_weights,
)
from r2ncli.weights.containers import container
from r2ncli.weights.download import OnProgress
from r2ncli.weights.naming import read_naming
from r2ncli.weights.pickles import check_pickles
from r2ncli.weights.structure import COUNTER, StateDict, identify, kind_of, variant_name

WRAPPERS = (
    *("state_dict", "model", "model_state_dict", "net", "network", "module", "weights", "params"),
    *("state_dict_ema", "model_ema"),  # files that hold only an average of the weights
)


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

    A wrapper around them (``{"state_dict": …}`` and the like) is removed.

    Raises
    ------
    CheckpointError
        As `load_state_dict`.
    """
    loaded = _load(path)
    for _ in WRAPPERS:  # they can be nested; a limit, because a dict can hold itself
        if isinstance(loaded, Mapping):
            inner = (loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping))
            loaded = next(inner, loaded)
    if not isinstance(loaded, Mapping):
        kind = type(loaded).__name__
        raise CheckpointError(f"{path}: holds a {kind}, expected a state dict of tensors")
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(repr(key) for key in list(loaded)[:5])
        raise CheckpointError(f"{path}: holds no state dict (its keys: {keys or 'none'})")
    return tensors


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


def _load(path: Path) -> object:
    kind = container(path)
    check_pickles(path, kind)
    try:
        if kind == "safetensors":
            from safetensors.torch import load as read_bytes

            # from bytes: the path may not be UTF-8; sorted: the library's order changes by run
            return dict(sorted(read_bytes(path.read_bytes()).items()))
        with (
            open(path, "rb") as file,  # with a path, torch looks at its suffix
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            warnings.simplefilter("ignore")  # torch warns about files that it then refuses
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        raise CheckpointError(
            f"{path}: refused, nothing in it was executed: torch cannot read its pickle safely "
            f"({found.strip().partition(chr(10))[0]})"
        ) from error
    except EOFError as error:
        raise CheckpointError(f"{path}: truncated: it ends too early. Download it again") from error
    except Exception as error:  # a corrupted container fails in many ways
        first_sentence = re.split(r"\. |\n", str(error))[0] or type(error).__name__
        raise CheckpointError(f"{path}: corrupted, cannot be loaded: {first_sentence}") from error


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
