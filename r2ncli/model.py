"""The Res2Net network (Gao et al., arXiv:1904.01169), with the published key names.

In each bottleneck block, the 3x3 convolution is replaced by a hierarchy of smaller ones, one
per split of the channels: each takes its split plus the output of the one before it.
State-dict names and their order are those of the published checkpoints, and the
top-level children stand in forward order, so that code written for the published class
(``net.relu(net.bn1(net.conv1(x)))``, layer getters, forward hooks) works unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn

from r2ncli.architectures import EXPANSION, Architecture
from r2ncli.errors import UsageError

# the dilations of layer3 and layer4 with each output stride
DILATIONS = {32: (1, 1), 16: (1, 2), 8: (2, 4)}


class Bottle2neck(nn.Module):
    """One block: 1x1, `scale` hierarchical 3x3 convolutions, 1x1, and the shortcut.

    Parameters
    ----------
    in_channels : int
        Channels of the input, float [N, in_channels, H, W].
    planes : int
        The output is float [N, 4 * planes, H / stride, W / stride].
    stride, dilation : int
        Stride and dilation of the 3x3 convolutions.
    downsample : nn.Sequential or None
        The shortcut, where the input's shape differs from the output's.
    first : bool
        Whether the block is the first of a stage. Such a block adds nothing from split to
        split, and its last split goes through a 3x3 average pool. (The paper's section 3.1
        does not say so; the published networks do so, in layer1 too.)
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        architecture: Architecture,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Sequential | None = None,
        first: bool = False,
    ) -> None:
        super().__init__()
        width, scale = architecture.split_width(planes), architecture.scale
        self.conv1 = nn.Conv2d(in_channels, width * scale, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width * scale)
        if first:
            self.pool = nn.AvgPool2d(3, stride, padding=1)
        groups = architecture.cardinality
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
            for _ in range(scale - 1)
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(scale - 1))
        self.conv3 = nn.Conv2d(width * scale, planes * EXPANSION, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * EXPANSION)
        self.relu = nn.ReLU()  # not in place: hooks on batch norms keep their tensors
        self.downsample = downsample
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        splits = self.relu(self.bn1(self.conv1(x))).chunk(len(self.convs) + 1, dim=1)

        outputs: list[Tensor] = []
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            carried = splits[i] if self.first or i == 0 else splits[i] + outputs[-1]
            outputs.append(self.relu(bn(conv(carried))))
        outputs.append(self.pool(splits[-1]) if self.first else splits[-1])

        out: Tensor = self.relu(self.bn3(self.conv3(torch.cat(outputs, dim=1))) + shortcut)
        return out


class Res2Net(nn.Module):
    """A Res2Net classifier.

    Takes RGB images, float [N, 3, H, W], normalised by the ImageNet mean and standard
    deviation (`Preprocessing`), and gives logits [N, classes]. H and W are 32 or more.

    Parameters
    ----------
    architecture : Architecture
        The network's shape. Convolutions start with He initialisation (fan-out).
    output_stride : int
        Input size over the size of layer4's output: 32 as published, 16 or 8. Below 32 the
        last stages dilate their convolutions instead of striding. The state dict is the
        same, so published weights can be loaded.

    Raises
    ------
    UsageError
        `output_stride` has another value.
    """

    def __init__(self, architecture: Architecture, output_stride: int = 32) -> None:
        super().__init__()
        if output_stride not in DILATIONS:
            raise UsageError(f"`output_stride` {output_stride!r}: expected 32, 16 or 8")
        self.architecture = architecture
        self.output_stride = output_stride
        self.conv1 = _stem(architecture.stem)
        self.bn1 = nn.BatchNorm2d(architecture.stem[-1])
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = [architecture.stem[-1], *(EXPANSION * p for p in architecture.stage_planes)]
        dilation3, dilation4 = DILATIONS[output_stride]
        self.layer1 = _stage(architecture, 0, channels[0])
        self.layer2 = _stage(architecture, 1, channels[1])
        self.layer3 = _stage(architecture, 2, channels[2], (1, dilation3))
        self.layer4 = _stage(architecture, 3, channels[3], (dilation3, dilation4))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[4], architecture.classes)
        for module in self.modules():
            # on the meta device this has no effect, but imports torch's compiler
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """Return the four stages' feature maps: [C2, C3, C4, C5] in detectors.

        Each is float [N, channels, H / stride, W / stride]. The strides are 4, 8, 16 and 32,
        but at most `output_stride`.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features


def conv_bn_pairs(network: Res2Net) -> Iterator[tuple[str, str]]:
    """Yield the names of each convolution and of the batch norm that takes its output.

    A compiled form of the network folds the batch norm into the convolution.
    """
    if len(network.architecture.stem) == 3:
        yield from [("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1")]
    else:
        yield "conv1", "bn1"
    for name, module in network.named_modules():
        if not isinstance(module, Bottle2neck):
            continue
        yield f"{name}.conv1", f"{name}.bn1"
        yield from ((f"{name}.convs.{i}", f"{name}.bns.{i}") for i in range(len(module.convs)))
        yield f"{name}.conv3", f"{name}.bn3"
        if module.downsample is not None:
            last = len(module.downsample) - 1
            yield f"{name}.downsample.{last - 1}", f"{name}.downsample.{last}"


def layer_shapes(architecture: Architecture, image_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each layer's output for one image, by its name in `named_modules()`.

    A layer is a module that gives exactly one tensor in a forward pass; a block's `relu`
    runs several times and is not a layer. Shapes have no batch axis: (C, H, W) or (C,).
    """
    with torch.device("meta"):
        network = Res2Net(architecture).eval()
        pixels = torch.empty(1, 3, image_size, image_size)
    seen: dict[str, list[tuple[int, ...]]] = {}
    for name, module in network.named_modules():
        if name:
            seen[name] = []
            module.register_forward_hook(
                lambda _module, _inputs, output, shapes=seen[name]: shapes.append(
                    tuple(output.shape[1:])
                )
            )
    network(pixels)
    return {name: shapes[0] for name, shapes in seen.items() if len(shapes) == 1}


def forward_flops(architecture: Architecture, image_size: int) -> int:
    """Return the floating-point operations of one image's forward pass.

    Only convolutions and the classifier are counted; a multiply-add is two operations.
    """
    with torch.device("meta"):
        network = Res2Net(architecture)
    shapes = layer_shapes(architecture, image_size)
    return sum(
        2 * module.weight[0].numel() * prod(shapes[name])
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    )


def _stem(channels: tuple[int, ...]) -> nn.Module:
    """Build the stem: one 7x7 convolution (v1) or three 3x3 ones (v1b), the first of stride 2."""
    if len(channels) == 1:
        return nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False)
    first, second, third = channels
    return nn.Sequential(
        nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1, bias=False),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.Conv2d(second, third, 3, padding=1, bias=False),
    )


def _stage(
    architecture: Architecture, number: int, in_channels: int, dilations: tuple[int, int] = (1, 1)
) -> nn.Sequential:
    """Build one stage, whose first block strides and changes the number of channels.

    `dilations` are those of the stage before and of this one. Where they differ, the stage
    dilates instead of striding, and its first block has the dilation of the stage before.
    """
    planes, blocks = architecture.stage_planes[number], architecture.layers[number]
    out_channels = planes * EXPANSION
    first_dilation, dilation = dilations
    stride = 2 if number > 0 and dilation == first_dilation else 1
    downsample = None
    if number > 0 or in_channels != out_channels:
        projection_stride = 1 if architecture.average_pool_shortcut else stride
        shortcut: list[nn.Module] = [
            nn.Conv2d(in_channels, out_channels, 1, projection_stride, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        if architecture.average_pool_shortcut:
            shortcut.insert(0, _shortcut_pool(stride, dilation))
        downsample = nn.Sequential(*shortcut)
    first = Bottle2neck(
        in_channels, planes, architecture, stride, first_dilation, downsample, first=True
    )
    rest = [
        Bottle2neck(out_channels, planes, architecture, dilation=dilation)
        for _ in range(blocks - 1)
    ]
    return nn.Sequential(first, *rest)


def _shortcut_pool(stride: int, dilation: int) -> nn.Module:
    """Build the average pool before a shortcut's convolution; 2x2 where the stage dilates."""
    if dilation > 1:  # as in timm: the zeros beyond the right and lower edges count
        return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, stride=1))
    return nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
