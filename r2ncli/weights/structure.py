"""Find out which Res2Net a state dict is, from the names, shapes and dtypes of its tensors.

The name of a file plays no part in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from r2ncli.architectures import EXPANSION, PUBLISHED, Architecture, PublishedNetwork
from r2ncli.errors import CheckpointError
from r2ncli.model import Res2Net
from r2ncli.weights.recognition import seems_to_be

StateDict = dict[str, Tensor]

CLASSIFIER = ("fc.weight", "fc.bias")
COUNTER = "num_batches_tracked"  # absent from old checkpoints, and without any effect
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Mismatches:
    """How a state dict does not fit an architecture; false where it fits.

    `shapes` are names with the shape found and the shape expected; `kinds` are names with the
    dtype or layout of a tensor that does not hold plain floats.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[tuple[str, list[int], list[int]], ...]
    kinds: tuple[tuple[str, str], ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.kinds)

    def describe(self) -> str:
        """Return one phrase that names the first mismatch of each kind."""
        mismatches = {
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "of another shape": [f"{n}: {found}, not {wanted}" for n, found, wanted in self.shapes],
            "not of plain floats": [f"{name}: {kind}" for name, kind in self.kinds],
        }
        return ", ".join(
            f"{len(names)} tensors are {how} ({names[0]}, …)"
            if len(names) > 1
            else f"1 tensor is {how} ({names[0]})"
            for how, names in mismatches.items()
            if names
        )


def identify(state_dict: StateDict, source: Path) -> Architecture:
    """Return the architecture whose names and shapes `state_dict` has.

    Raises
    ------
    CheckpointError
        The tensors are not those of a Res2Net; the message names what differs.
    """
    architecture = guess_architecture(state_dict)
    if architecture is None:
        other = seems_to_be(shapes_of(state_dict))
        found = other or f"names such as {', '.join(list(state_dict)[:3]) or 'none'}"
        raise CheckpointError(f"{source}: expected the tensors of a Res2Net, found {found}")
    mismatches = find_mismatches(architecture, state_dict)
    if mismatches:
        found = f"looks like {architecture.describe()}, but {mismatches.describe()}"
        raise CheckpointError(f"{source}: {found}")
    return architecture


def guess_architecture(state_dict: StateDict) -> Architecture | None:
    """Return the architecture that a few shapes suggest; None where they are not a Res2Net's.

    Its number of classes is 0 where the state dict has no classifier.
    """
    if any(0 in tensor.shape for tensor in state_dict.values()):
        return None
    try:
        stages = range(1, 5)
        blocks = {found[0] for name in state_dict if (found := re.match(r"layer\d\.\d+\.", name))}
        layers = [sum(block.startswith(f"layer{stage}.") for block in blocks) for stage in stages]
        planes = [state_dict[f"layer{n}.0.conv3.weight"].shape[0] // EXPANSION for n in stages]
        widths = [state_dict[f"layer{n}.0.bns.0.weight"].shape[0] for n in stages]
        splits = sum(bool(re.match(r"layer1\.0\.convs\.\d+\.weight", name)) for name in state_dict)
        first = state_dict["layer1.0.convs.0.weight"]
        cardinality = first.shape[0] // first.shape[1]
        # the smallest whole base width whose rounded-down splits have these widths
        base_width = max(
            -(-width // cardinality * 64 // plane)
            for width, plane in zip(widths, planes, strict=True)
        )
        deep = "conv1.6.weight" in state_dict
        stem = ("conv1.0.weight", "conv1.3.weight", "conv1.6.weight") if deep else ("conv1.weight",)
        classifier = [state_dict[name] for name in CLASSIFIER if name in state_dict]
        return Architecture(
            layers=(layers[0], layers[1], layers[2], layers[3]),
            base_width=base_width,
            scale=splits + 1,
            cardinality=cardinality,
            stem=tuple(state_dict[name].shape[0] for name in stem),
            # the first stage may have no shortcut, the stages that stride always have one
            average_pool_shortcut="layer2.0.downsample.2.weight" in state_dict,
            stage_planes=(planes[0], planes[1], planes[2], planes[3]),
            classes=classifier[0].shape[0] if classifier else 0,
        )
    except (KeyError, IndexError, ZeroDivisionError, ValueError):
        return None


def find_mismatches(architecture: Architecture, state_dict: StateDict) -> Mismatches:
    """Return how the names, shapes and dtypes of a state dict do not fit an architecture."""
    expected = expected_shapes(architecture)
    return Mismatches(
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
    """Return the shape of each tensor by its name."""
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def kind_of(tensor: Tensor) -> str:
    """Return a tensor's dtype, after its layout where that is unusual: ``sparse_coo float32``."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        kind = f"{str(tensor.layout).removeprefix('torch.')} {kind}"
    return f"meta {kind}" if tensor.is_meta else kind


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of an architecture's state dict, in the published order."""
    with torch.device("meta"):  # torch warns about layers without outputs
        network = Res2Net(replace(architecture, classes=architecture.classes or 1))
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def nearest_published(state_dict: StateDict) -> tuple[PublishedNetwork, int] | None:
    """Return the published network that shares most tensors with `state_dict`, and how many.

    None where that is fewer than half of the network's tensors.
    """
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
    """Return the published network's name, or the architecture in words."""
    names = (name for name, network in PUBLISHED.items() if network.architecture == architecture)
    return next(names, architecture.describe())


def in_words(architecture: Architecture) -> str:
    """Return how an architecture relates to the published ones, as a phrase."""
    name = variant_name(replace(architecture, classes=1000))
    if name not in PUBLISHED:
        return f"a Res2Net like none published: {architecture.describe()}"
    if not architecture.classes:
        return f"{name} without its classifier"
    if architecture.classes != 1000:
        return f"a Res2Net like {name}, with {architecture.classes} classes"
    return name
