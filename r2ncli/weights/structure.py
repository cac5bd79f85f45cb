"""Find out which network a state dict is, from the names, shapes and dtypes of its tensors.

The name of a file plays no part in it. Other libraries' names for the tensors of a Res2Net are
translated: timm uses the published ones. mmpretrain and mmdetection differ in two ways: a deep
stem is called `stem`, and names start with ``backbone.`` or, in mmpretrain, ``head.``. (Read from
mmpretrain 1.2.0 and mmdetection 3.3.0.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from r2ncli.architectures import EXPANSION, PUBLISHED, Architecture, PublishedNetwork
from r2ncli.errors import CheckpointError
from r2ncli.model import Res2Net

StateDict = dict[str, Tensor]
Shapes = Mapping[str, Sequence[int]]

CLASSIFIER = ("fc.weight", "fc.bias")
COUNTER = "num_batches_tracked"  # absent from old checkpoints, and without any effect
MOST_CHANNELS = 1 << 20  # the widest layer of the published networks has 2,048
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
        if sum(layers) * splits > len(state_dict):
            return None  # most of its tensors are missing, and building it would take long
        first = state_dict["layer1.0.convs.0.weight"]
        cardinality = first.shape[0] // first.shape[1]
        # the smallest whole base width whose rounded-down splits have these widths
        base_width = max(
            -(-width // cardinality * 64 // plane)
            for width, plane in zip(widths, planes, strict=True)
        )
        deep = "conv1.6.weight" in state_dict
        stem = ("conv1.0.weight", "conv1.3.weight", "conv1.6.weight") if deep else ("conv1.weight",)
        if max(*planes, *widths, *(state_dict[name].shape[0] for name in stem)) > MOST_CHANNELS:
            return None
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


# --- other libraries' names -----------------------------------------------------------

MARK = "layer1.0.conv1.weight"  # in every Res2Net of every library; text before it is the prefix

OFFICIAL, TIMM, MMPRETRAIN, MMDETECTION = "official", "timm", "mmpretrain", "mmdetection"
LIBRARIES = (OFFICIAL, TIMM, MMPRETRAIN, MMDETECTION)

_DEEP_STEM = ("conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1")
_STEMS = {
    MMPRETRAIN: tuple(f"stem.{i}.{part}" for i in range(3) for part in ("conv", "bn")),
    MMDETECTION: tuple(f"stem.{i}" for i in (0, 1, 3, 4, 6, 7)),
}
_BACKBONE, _CLASSIFIER = "backbone.", "head."


@dataclass(frozen=True)
class Naming:
    """The names under which a state dict holds a Res2Net.

    `library` is one of `LIBRARIES` (``official`` is timm's too); `prefix` stands before the
    names of the backbone: ``module.``, ``backbone.`` or nothing; `official` gives for each name
    the published one, and for a name that is no part of a Res2Net that name without the prefix.
    """

    library: str
    prefix: str
    official: dict[str, str]


def read_naming(names: Iterable[str]) -> Naming:
    """Recognise which library's names these are; `names` are all those of a state dict.

    The names of another network stay as they are. No two names become the same: a name whose
    new form is taken stays as it is.
    """
    found = tuple(names)
    marks = [name for name in found if name == MARK or name.endswith("." + MARK)]
    prefix = min(marks, key=len).removesuffix(MARK) if marks else ""
    plain = {name.removeprefix(prefix) for name in found}
    library = OFFICIAL
    for other, stem in _STEMS.items():
        if f"{stem[0]}.weight" in plain and marks:
            library = other
    outside = prefix.removesuffix(_BACKBONE) + _CLASSIFIER + "fc."
    if marks and library == OFFICIAL and any(name.startswith(outside) for name in found):
        library = MMPRETRAIN
    renamed = dict(zip(_STEMS.get(library, ()), _DEEP_STEM, strict=False))

    official: dict[str, str] = {}
    taken = set(found)
    for name in found:
        if marks and name.startswith(outside):
            new = "fc." + name.removeprefix(outside)
        else:
            module, dot, leaf = name.removeprefix(prefix).rpartition(".")
            new = renamed.get(module, module) + dot + leaf
        official[name] = new if new == name or new not in taken else name
        taken.add(official[name])
    return Naming(library, prefix, official)


def names_for(library: str, official: Iterable[str]) -> dict[str, str]:
    """Return `library`'s name for each published name of a network.

    `official` are the names of a whole state dict, because the name of ``bn1`` depends on the
    stem. mmdetection has no classifiers: ``fc`` gets mmpretrain's name. `read_naming` of the
    values gives the published names.

    Raises
    ------
    ValueError
        `library` is not one of `LIBRARIES`.
    """
    if library not in LIBRARIES:
        raise ValueError(f"library {library!r}: expected one of {', '.join(LIBRARIES)}")
    found = tuple(official)
    if library in (OFFICIAL, TIMM):
        return {name: name for name in found}
    deep = "conv1.0.weight" in found
    renamed = dict(zip(_DEEP_STEM, _STEMS[library], strict=True)) if deep else {}
    names = {}
    for name in found:
        module, dot, leaf = name.rpartition(".")
        part = _CLASSIFIER if module == "fc" else _BACKBONE
        names[name] = part + renamed.get(module, module) + dot + leaf
    return names


# --- other networks -------------------------------------------------------------------

# the first of these names that a state dict has, with any prefix, decides
_SIGNATURES = (
    (r"layer1\.0\.se\.(fc1|conv_reduce)\.weight|layer1\.0\.se_module\.fc1\.weight", "an SE-ResNet"),
    (r"class_token|encoder_layer_0\.ln_1\.weight", "torchvision's vision transformer"),
    (r"visual\.(conv1|class_embedding|proj).*", "a CLIP model"),
    (r"(layers\.0\.blocks|features\.1)\.0\.attn\.relative_position_.*", "a Swin transformer"),
    (r"blocks\.0\.attn\.(qkv|q_proj)\.weight|blocks\.0\.gamma_1", "a vision transformer, timm's"),
    (r"stages\.0\.blocks\.0\.conv_dw\.weight|features\.1\.0\.layer_scale", "a ConvNeXt"),
    (r"conv_stem\.weight", "an EfficientNet or MobileNetV3, timm's"),
    (r"features\.1\.0\.block\.0\.0\.weight", "torchvision's EfficientNet"),
    (r"features\.1\.conv\.0\.0\.weight", "torchvision's MobileNetV2"),
    (r"features\.denseblock1\.denselayer1\.norm1\.weight", "a DenseNet"),
    (r"features\.0\.weight", "a VGG or an AlexNet"),
    (r"(model\.)?0\.conv\.weight|model\.\d+\.cv1\.conv\.weight", "a YOLO, ultralytics'"),
)


def published_dla(shapes: Shapes) -> str | None:
    """Return the name of the published Res2Net with a DLA body that these tensors are, or None."""
    for name, shape in shapes.items():
        if name.endswith("level2.tree1.convs.0.weight") and len(shape) == 4:
            return "res2net_dla60" if shape[0] == shape[1] else "res2next_dla60"
    return None


def seems_to_be(shapes: Shapes) -> str | None:
    """Return which network other than a Res2Net these tensors seem to be; None if unknown."""
    dla = published_dla(shapes)
    if dla is not None:
        return f"{dla}, a published network whose DLA body r2n does not support"
    for signature, network in _SIGNATURES:
        if any(re.search(rf"(^|\.)({signature})$", name) for name in shapes):
            return network
    return _resnet(shapes)


def _resnet(shapes: Shapes) -> str | None:
    mark = "layer1.0.conv1.weight"
    start = next((name.removesuffix(mark) for name in shapes if name.endswith(mark)), None)
    if start is None or f"{start}layer1.0.convs.0.weight" in shapes:
        return None
    block = re.compile(rf"{re.escape(start)}layer[1-4]\.\d+")
    blocks = {match[0] for name in shapes if (match := block.match(name))}
    bottleneck = f"{start}layer1.0.conv3.weight" in shapes
    depth = 2 + len(blocks) * (3 if bottleneck else 2)
    deep = "-D" if f"{start}conv1.0.weight" in shapes else ""
    second = shapes.get(f"{start}layer1.0.conv2.weight", ())
    if bottleneck and len(second) == 4 and second[0] != second[1]:
        return f"a ResNeXt-{depth}{deep} of {second[0] // second[1]} groups"
    if bottleneck and len(second) == 4 and second[0] > 64:
        return f"a Wide ResNet-{depth}"
    return f"a ResNet-{depth}{deep}, as torchvision's and timm's are"


def by_block(names: Iterable[str], most: int = 6) -> str:
    """Return names grouped by block: ``layer3.5 (32), neck (16), fc.bias``.

    With more than `most` blocks, names are grouped by stage; at most `most` groups are shown.
    """
    found = list(names)
    for pattern in (r"layer\d\.\d+|[^.]+", r"[^.]+"):
        groups: dict[str, list[str]] = {}
        for name in found:
            match = re.match(pattern, name)
            groups.setdefault(match[0] if match else name, []).append(name)
        if len(groups) <= most:
            break
    shown = [
        members[0] if len(members) == 1 else f"{group} ({len(members)})"
        for group, members in groups.items()
    ]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more
