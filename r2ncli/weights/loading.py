"""A checkpoint as tensors: load it safely, unwrap it, identify it, build the network.

A pickle's opcodes are looked at before anything is loaded, and every load is
``weights_only=True``: nothing in a file is executed. What a network is, is
read from its tensors and never from its file's name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from r2ncli.architectures import (
    DEMO,
    EXPANSION,
    PUBLISHED,
    Architecture,
    Preprocessing,
    PublishedNetwork,
)
from r2ncli.errors import CheckpointError
from r2ncli.model import Res2Net
from r2ncli.weights.checkpoints import (
    Labels,
    checked_sha256,
    find_checkpoint,
    labels_of,
    preprocessing_of,
    read_metadata,
)
from r2ncli.weights.containers import container
from r2ncli.weights.download import OnProgress
from r2ncli.weights.naming import read_naming
from r2ncli.weights.pickles import check_pickles
from r2ncli.weights.recognition import seems_to_be

StateDict = dict[str, Tensor]
Weights = str | os.PathLike[str] | None

WRAPPERS = (
    *("state_dict", "model", "model_state_dict", "net", "network", "module", "weights", "params"),
    *("state_dict_ema", "model_ema"),  # where an average of the weights is all there is
)
COUNTER = "num_batches_tracked"  # absent from old checkpoints, and without any effect
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, loaded: its network and what its file says of it.

    `variant` is the published network's name, ``demo``, or the architecture in words.
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
    """Find, check and load what `weights` means (see `find_checkpoint` and `Res2Net`).

    Raises
    ------
    CheckpointError
        The checkpoint is absent, altered, or no Res2Net.
    """
    path = find_checkpoint(weights, download=download, on_progress=on_progress)
    container(path)
    return load_file(path, checked_sha256(path), output_stride)


def load_file(path: Path, digest: str, output_stride: int = 32) -> Checkpoint:
    """Load the checkpoint `path`, whose SHA-256 is `digest`.

    Raises
    ------
    CheckpointError
        It is no Res2Net.
    """
    state_dict = load_state_dict(path)
    architecture = identify(state_dict, path)
    metadata = read_metadata(path)
    return Checkpoint(
        path=path,
        sha256=digest,
        # a file may call itself demo; only its tensors can make it a published network
        variant=DEMO if metadata.get("variant") == DEMO else variant_name(architecture),
        network=build(architecture, state_dict, output_stride),
        labels=labels_of(metadata, architecture.classes, path),
        preprocessing=preprocessing_of(metadata, path),
    )


def load_model(path_or_name: str | os.PathLike[str], *, output_stride: int = 32) -> Res2Net:
    """The plain network of a checkpoint: in eval mode, float32, on the CPU.

    Parameters
    ----------
    path_or_name : str or path
        A checkpoint file, a published network's name (downloaded if it must be), or
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
        The checkpoint is absent, altered, or no Res2Net.
    """
    return load_checkpoint(path_or_name, output_stride=output_stride).network


def load_state_dict(path: Path) -> StateDict:
    """The tensors of a checkpoint file by the published names, whatever library's it has.

    Raises
    ------
    CheckpointError
        The file cannot be read, asks to execute something, or holds no state dict.
    """
    tensors = load_tensors(path)
    official = read_naming(tensors).official
    return {official[name]: tensor for name, tensor in tensors.items()}


def load_tensors(path: Path) -> StateDict:
    """The tensors of a checkpoint file by the names they have there, out of their wrapper.

    Raises
    ------
    CheckpointError
        As `load_state_dict`.
    """
    loaded = _load(path)
    for _ in WRAPPERS:  # one around the other; no further, for a dict can hold itself
        if isinstance(loaded, Mapping):
            inner = (loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping))
            loaded = next(inner, loaded)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(loaded).__name__}, expected a state dict of tensors"
        )
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(repr(key) for key in list(loaded)[:5])
        raise CheckpointError(f"{path}: holds no state dict (its keys: {keys or 'none'})")
    return tensors


def tensors_sha256(state_dict: StateDict) -> str:
    """A SHA-256 over the tensors alone: the same however and wherever they are packed.

    It takes in the tensors in the order of their names' UTF-8 bytes (containers keep
    different orders): of each a JSON line ``["name", "dtype", [shape]]``, then its values'
    bytes, little-endian, in C order. Sparse tensors count as dense ones; of one without
    values (meta) the line alone counts.
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


def identify(state_dict: StateDict, source: Path) -> Architecture:
    """The architecture whose names and shapes `state_dict` has.

    Raises
    ------
    CheckpointError
        The tensors are not a Res2Net's; the message names what differs.
    """
    architecture = guess_architecture(state_dict)
    if architecture is None:
        other = seems_to_be(shapes_of(state_dict))
        found = f"names such as {', '.join(list(state_dict)[:3]) or 'none'}"
        raise CheckpointError(
            f"{source}: these tensors are no Res2Net's ({f'but {other}' if other else found})"
        )
    differences = compare(architecture, state_dict)
    if differences:
        raise CheckpointError(
            f"{source}: looks like {architecture.describe()}, but {differences.describe()}"
        )
    return architecture


def guess_architecture(state_dict: StateDict) -> Architecture | None:
    """The architecture that a few shapes suggest; None where they are no Res2Net's."""
    if any(0 in tensor.shape for tensor in state_dict.values()):
        return None
    try:
        layers: list[int] = []
        planes: list[int] = []
        widths: list[int] = []
        for stage in range(1, 5):
            blocks = {
                int(match[1])
                for name in state_dict
                if (match := re.match(rf"layer{stage}\.(\d+)\.", name))
            }
            layers.append(len(blocks))
            planes.append(state_dict[f"layer{stage}.0.conv3.weight"].shape[0] // EXPANSION)
            widths.append(state_dict[f"layer{stage}.0.bns.0.weight"].shape[0])
        splits = sum(bool(re.match(r"layer1\.0\.convs\.\d+\.weight", name)) for name in state_dict)
        first = state_dict["layer1.0.convs.0.weight"]
        cardinality = first.shape[0] // first.shape[1]
        # the smallest whole base width whose rounded-down splits are these widths
        base_width = max(
            -(-width // cardinality * 64 // plane)
            for width, plane in zip(widths, planes, strict=True)
        )
        deep = "conv1.6.weight" in state_dict
        stem = ("conv1.0.weight", "conv1.3.weight", "conv1.6.weight") if deep else ("conv1.weight",)
        return Architecture(
            layers=(layers[0], layers[1], layers[2], layers[3]),
            base_width=base_width,
            scale=splits + 1,
            cardinality=cardinality,
            stem=tuple(state_dict[name].shape[0] for name in stem),
            # a first stage may need no shortcut, the strided ones always do
            average_pool_shortcut="layer2.0.downsample.2.weight" in state_dict,
            stage_planes=(planes[0], planes[1], planes[2], planes[3]),
            # where there is no classifier, what differs is then said
            classes=state_dict["fc.weight"].shape[0] if "fc.weight" in state_dict else 1000,
        )
    except (KeyError, IndexError, ZeroDivisionError, ValueError):
        return None


@dataclass(frozen=True)
class Differences:
    """What differs between a state dict and an architecture's; false where nothing does.

    `shapes` holds a name, the shape found and the one expected; `kinds` a name and what the
    tensor is instead of plain floats.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[tuple[str, list[int], list[int]], ...]
    kinds: tuple[tuple[str, str], ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.kinds)

    def describe(self) -> str:
        """One phrase, naming the first of each kind."""
        differences = {
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "of another shape": [f"{n}: {found}, not {wanted}" for n, found, wanted in self.shapes],
            "not of plain floats": [f"{name}: {kind}" for name, kind in self.kinds],
        }
        return ", ".join(
            f"{len(names)} tensors are {how} ({names[0]}, …)"
            if len(names) > 1
            else f"1 tensor is {how} ({names[0]})"
            for how, names in differences.items()
            if names
        )


def compare(architecture: Architecture, state_dict: StateDict) -> Differences:
    """What differs between a state dict's names and shapes and an architecture's."""
    expected = expected_shapes(architecture)
    return Differences(
        missing=tuple(n for n in expected if n not in state_dict and not n.endswith(COUNTER)),
        unexpected=tuple(n for n in state_dict if n not in expected),
        shapes=tuple(
            (name, list(tensor.shape), list(expected[name]))
            for name, tensor in state_dict.items()
            if name in expected and tuple(tensor.shape) != expected[name]
        ),
        kinds=tuple(
            (name, kind)
            for name, tensor in state_dict.items()
            if (kind := kind_of(tensor)) not in FLOATS
            and not (name.endswith(COUNTER) and kind in ("int64", "int32"))
        ),
    )


def shapes_of(state_dict: StateDict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def kind_of(tensor: Tensor) -> str:
    """Its dtype, after what else is unusual in it: ``sparse_coo float32``, ``meta int8``."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        kind = f"{str(tensor.layout).removeprefix('torch.')} {kind}"
    return f"meta {kind}" if tensor.is_meta else kind


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an architecture's state dict, in the published order."""
    with torch.device("meta"):
        network = Res2Net(architecture)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def nearest_published(state_dict: StateDict) -> tuple[PublishedNetwork, int] | None:
    """The published network most of whose tensors these are, and how many; at least half."""
    found = shapes_of(state_dict)
    if not any(".convs." in name for name in found):
        return None
    best: tuple[PublishedNetwork, int] | None = None
    for network in PUBLISHED.values():
        expected = expected_shapes(network.architecture)
        count = sum(found.get(name) == shape for name, shape in expected.items())
        if 2 * count >= len(expected) and (best is None or count > best[1]):
            best = network, count
    return best


def variant_name(architecture: Architecture) -> str:
    """The published network's name, or the architecture in words."""
    for network in PUBLISHED.values():
        if network.architecture == architecture:
            return network.name
    return architecture.describe()


def build(architecture: Architecture, state_dict: StateDict, output_stride: int = 32) -> Res2Net:
    """The network with these weights: in eval mode, float32, on the CPU."""
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
            from safetensors.torch import load

            # by its bytes, for a name may be no UTF-8; sorted, for its order changes by run
            return dict(sorted(load(path.read_bytes()).items()))
        with (
            open(path, "rb") as file,  # by a path torch minds suffixes
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            warnings.simplefilter("ignore")  # torch's, on what it then refuses
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, nothing of it was executed: {_refusal(str(error))}"
        ) from error
    except EOFError as error:
        raise CheckpointError(f"{path}: truncated: it ends too early. Download it again") from error
    except Exception as error:  # a damaged container fails in many ways, none of them ours
        first_sentence = re.split(r"\. |\n", str(error))[0] or type(error).__name__
        raise CheckpointError(f"{path}: damaged, cannot be loaded: {first_sentence}") from error


def _refusal(message: str) -> str:
    """What torch's safe loader would not have, from its long message."""
    reason = message.partition("WeightsUnpickler error:")[2] or message
    return f"torch cannot read its pickle safely ({reason.strip().partition(chr(10))[0]})"


# --- the published networks, by name --------------------------------------------------


def published_network(name: str, weights: Weights = None, output_stride: int = 32) -> Res2Net:
    """The published network `name` in eval mode: with these weights, or untrained (None).

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


def res2net50_v1b_26w_4s(weights: Weights = None, *, output_stride: int = 32) -> Res2Net:
    """Res2Net50-v1b 26w-4s, 1000 classes."""
    return published_network("res2net50_v1b_26w_4s", weights, output_stride)


def res2net101_v1b_26w_4s(weights: Weights = None, *, output_stride: int = 32) -> Res2Net:
    """Res2Net101-v1b 26w-4s, 1000 classes."""
    return published_network("res2net101_v1b_26w_4s", weights, output_stride)


def res2net50_26w_4s(weights: Weights = None, *, output_stride: int = 32) -> Res2Net:
    """Res2Net50 26w-4s, 1000 classes."""
    return published_network("res2net50_26w_4s", weights, output_stride)


def res2net50_48w_2s(weights: Weights = None, *, output_stride: int = 32) -> Res2Net:
    """Res2Net50 48w-2s, 1000 classes."""
    return published_network("res2net50_48w_2s", weights, output_stride)


def res2net50_14w_8s(weights: Weights = None, *, output_stride: int = 32) -> Res2Net:
    """Res2Net50 14w-8s, 1000 classes."""
    return published_network("res2net50_14w_8s", weights, output_stride)


def res2net50_26w_6s(weights: Weights = None, *, output_stride: int = 32) -> Res2Net:
    """Res2Net50 26w-6s, 1000 classes."""
    return published_network("res2net50_26w_6s", weights, output_stride)


def res2net50_26w_8s(weights: Weights = None, *, output_stride: int = 32) -> Res2Net:
    """Res2Net50 26w-8s, 1000 classes."""
    return published_network("res2net50_26w_8s", weights, output_stride)


def res2net101_26w_4s(weights: Weights = None, *, output_stride: int = 32) -> Res2Net:
    """Res2Net101 26w-4s, 1000 classes."""
    return published_network("res2net101_26w_4s", weights, output_stride)


def res2next50(weights: Weights = None, *, output_stride: int = 32) -> Res2Net:
    """Res2NeXt50 4w-4s, 1000 classes."""
    return published_network("res2next50", weights, output_stride)
