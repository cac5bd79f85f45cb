"""Tell which other network a state dict seems to be, from the names of a few tensors.

Only names and shapes are used: nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]

# the first of these names that a state dict has, with any prefix, decides
_SIGNATURES = (
    (r"layer1\.0\.conv2\.fc1\.weight", "a ResNeSt"),
    (r"layer1\.0\.se\.(fc1|conv_reduce)\.weight|layer1\.0\.se_module\.fc1\.weight", "an SE-ResNet"),
    (r"level2\.tree1\.conv2\.weight", "a DLA"),
    (r"class_token|encoder_layer_0\.ln_1\.weight", "torchvision's vision transformer"),
    (r"visual\.(conv1|class_embedding|proj).*", "a CLIP model"),
    (r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table", "a Swin transformer"),
    (r"blocks\.0\.attn\.(qkv|q_proj)\.weight|blocks\.0\.gamma_1", "a vision transformer, timm's"),
    (r"embeddings\.cls_token", "a vision transformer, of transformers"),
    (r"features\.1\.0\.attn\.relative_position_bias_table", "torchvision's Swin transformer"),
    (r"stages\.0\.blocks\.0\.conv_dw\.weight", "a ConvNeXt, timm's"),
    (r"features\.1\.0\.layer_scale", "torchvision's ConvNeXt"),
    (r"downsample_layers\.0\.0\.weight", "a ConvNeXt"),
    (r"_blocks\.0\._bn1\.weight", "an EfficientNet"),
    (r"conv_stem\.weight", "an EfficientNet or MobileNetV3, timm's"),
    (r"features\.1\.block\.0\.0\.weight", "torchvision's MobileNetV3"),
    (r"features\.1\.0\.block\.0\.0\.weight", "torchvision's EfficientNet"),
    (r"features\.1\.conv\.0\.0\.weight", "torchvision's MobileNetV2"),
    (r"features\.denseblock1\.denselayer1\.norm1\.weight", "a DenseNet"),
    (r"features\.3\.squeeze\.weight", "a SqueezeNet"),
    (r"features\.0\.weight", "a VGG or an AlexNet"),
    (r"Mixed_5b\.branch1x1\.conv\.weight", "an Inception-v3"),
    (r"inception3a\.branch1\.conv\.weight", "a GoogLeNet"),
    (r"stage2\.0\.branch1\.0\.weight", "a ShuffleNet-v2"),
    (r"stage2\.0\.branches\.0\.0\.conv1\.weight", "an HRNet"),
    (r"s1\.b1\.conv1\.conv\.weight|trunk_output\.block1\..*", "a RegNet"),
    (r"(model\.)?0\.conv\.weight|model\.\d+\.cv1\.conv\.weight", "a YOLO, ultralytics'"),
    (r"(layers|h)\.0\.(self_attn\.q_proj|attn\.c_attn)\.weight", "a language model"),
    (r"encoder\.layer\.0\.attention\.self\.query\.weight", "a BERT-like language model"),
    (r"model\.diffusion_model\..*", "a Stable Diffusion model"),
)
_DEPTHS = {  # by the blocks of the four stages, and whether they are bottlenecks
    ((2, 2, 2, 2), False): 18,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}


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
    blocks = [
        len({name[len(stage) :].partition(".")[0] for name in shapes if name.startswith(stage)})
        for stage in (f"{start}layer{number}." for number in range(1, 5))
    ]
    bottleneck = f"{start}layer1.0.conv3.weight" in shapes
    depth = _DEPTHS.get(((blocks[0], blocks[1], blocks[2], blocks[3]), bottleneck))
    if depth is None:
        return f"a ResNet of {blocks} blocks"
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
