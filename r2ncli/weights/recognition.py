"""Recognise which other network a state dict seems to be, from the names of a few tensors.

Only names and shapes are used: nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]

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
