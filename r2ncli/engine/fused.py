"""The network rewritten for a CUDA GPU: few kernels for each block.

Widths are padded with zeros to multiples that suit tensor cores and wide loads (26 to 32, 52
to 64). This is exact, because a padded channel is zero in every layer. A block's first 1x1
convolution writes all splits side by side. Each 3x3 convolution reads its split in place,
writes its part of the concatenation, and the sum that the next one reads. The last 1x1
convolution reads these parts, the split that skips the 3x3 convolutions, and the input of the
shortcut's convolution. So there is no concatenation, and the shortcut needs no kernel of its own.

If a requested layer is inside the stem or a block, this part runs as in `folding`, so that its
hook sees the output of the plain network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from r2ncli.architectures import Preprocessing
from r2ncli.engine.folding import FoldedNetwork, normalisation
from r2ncli.engine.kernels import pointwise_convolution, spatial_convolution, stem_convolution
from r2ncli.model import Bottle2neck, Res2Net

ALIGNMENT = 16  # channels that tensor cores process together

Activations = Callable[[Tensor], Tensor]  # [N, H, W, C] in and out, contiguous


class FusedNetwork:
    """An `InferenceNetwork` that runs the kernels in `kernels`; parameters as `FoldedNetwork`.

    It runs on CUDA GPUs, and on the CPU in Triton's interpreter.
    """

    def __init__(
        self,
        network: Res2Net,
        outputs: Sequence[str],
        pool: str,
        preprocessing: Preprocessing,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._folded = FoldedNetwork(network, outputs, pool, preprocessing, device, dtype)
        steps = [
            *_stem(network, self._folded, outputs, preprocessing, device, dtype),
            *_stages(network, self._folded, outputs, device, dtype),
            *_head(self._folded),
        ]
        last = max(i for i, step in enumerate(steps) if any(map(step.has, outputs)))
        self._steps = steps[: last + 1]
        self._outputs = tuple(outputs)

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        x = pixels
        for step in self._steps:
            x = step.run(x)
            for name in step.gives:
                if name in self._outputs:
                    self._folded.capture(name, x.permute(0, 3, 1, 2))
        return self._folded.captured()


@dataclass(frozen=True)
class _Step:
    """A part of the forward pass.

    Attributes
    ----------
    run : callable
        Takes the output of the step before.
    modules : tuple of str
        Names of the modules that it runs; their hooks keep their outputs.
    gives : tuple of str
        Names of the modules whose output is the output of this step, but whose hooks do not run.
    """

    run: Activations
    modules: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()

    def has(self, output: str) -> bool:
        return output in self.gives or any(_within(output, module) for module in self.modules)


def _within(output: str, module: str) -> bool:
    return output == module or output.startswith(f"{module}.")


def _stem(
    network: Res2Net,
    folded: FoldedNetwork,
    outputs: Sequence[str],
    preprocessing: Preprocessing,
    device: torch.device,
    dtype: torch.dtype,
) -> list[_Step]:
    modules = folded.modules
    max_pool = _Step(_module(modules.maxpool), ("maxpool",))
    if any(_within(output, module) for output in outputs for module in ("conv1", "bn1")):
        parts = nn.Sequential(modules.conv1, modules.bn1, modules.relu)
        run = _module(parts)
        plain = _Step(lambda pixels: run(folded.normalised(pixels)), ("conv1", "bn1", "relu"))
        return [plain, max_pool]

    layers = [network.conv1, network.bn1]
    if isinstance(network.conv1, nn.Sequential):
        layers = [*network.conv1, network.bn1]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    (first_weight, first_bias), *others = map(_folded, convolutions, norms)
    first_kernel = first_weight.permute(2, 3, 1, 0).flatten(0, 2).to(device, dtype).contiguous()
    first_bias = first_bias.to(device)
    rest = [
        (weight.permute(2, 3, 1, 0)[None].to(device, dtype).contiguous(), bias[None].to(device))
        for weight, bias in others
    ]
    shift, scale = normalisation(preprocessing, device)
    size = first_weight.shape[-1]

    def stem(pixels: Tensor) -> Tensor:
        x = stem_convolution(pixels, shift, scale, first_kernel, first_bias, size)
        for weight, bias in rest:
            out = x.new_empty((*x.shape[:3], weight.shape[-1]))
            spatial_convolution(x, weight, bias, out)
            x = out
        return x

    return [_Step(stem, gives=("relu",)), max_pool]


def _stages(
    network: Res2Net,
    folded: FoldedNetwork,
    outputs: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
) -> list[_Step]:
    steps = []
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        blocks = cast(nn.Sequential, network.get_submodule(stage))
        for number, block in enumerate(blocks):
            name = f"{stage}.{number}"
            ends = (stage,) if number == len(blocks) - 1 else ()
            if any(output.startswith(f"{name}.") for output in outputs):
                run = _module(folded.modules.get_submodule(name))
                steps.append(_Step(run, (name,), ends))
            else:
                run = _block(cast(Bottle2neck, block), device, dtype)
                steps.append(_Step(run, (), (name, *ends)))
    return steps


def _head(folded: FoldedNetwork) -> list[_Step]:
    modules = folded.modules
    return [
        _Step(lambda x: cast(Tensor, modules.avgpool(x.permute(0, 3, 1, 2))), ("avgpool",)),
        _Step(lambda x: cast(Tensor, modules.fc(x.flatten(1))), ("fc",)),
    ]


def _module(module: nn.Module) -> Activations:
    """Wrap a module that takes channels-first maps; in memory channels stay last."""

    def run(x: Tensor) -> Tensor:
        out: Tensor = module(x.permute(0, 3, 1, 2))
        return out.permute(0, 2, 3, 1).contiguous()

    return run


def _block(block: Bottle2neck, device: torch.device, dtype: torch.dtype) -> Activations:
    """Return a function that runs one block, from its input to its last ReLU."""
    between = [cast(nn.Conv2d, conv) for conv in block.convs]  # the 3x3 ones
    width = between[0].out_channels
    padded = -(-width // ALIGNMENT) * ALIGNMENT
    splits = len(between) + 1
    stride, dilation = between[0].stride[0], between[0].dilation[0]
    first = block.first

    def padded_splits(values: Tensor) -> Tensor:
        """Pad each split of [splits * width, …] with zeros to [splits * padded, …]."""
        apart = values.reshape(-1, width, *values.shape[1:])
        zeros = apart.new_zeros((apart.shape[0], padded - width, *apart.shape[2:]))
        return torch.cat((apart, zeros), dim=1).flatten(0, 1)

    reducing, reducing_bias = _folded(block.conv1, block.bn1)
    reducing = padded_splits(reducing[:, :, 0, 0]).T
    reducing_bias = padded_splits(reducing_bias)

    spatial = torch.zeros(len(between), 3, 3, padded, padded)
    spatial_bias = torch.zeros(len(between), padded)
    for i, (conv, bn) in enumerate(zip(between, block.bns, strict=True)):
        weight, bias = _folded(conv, cast(nn.BatchNorm2d, bn))
        spatial[i, :, :, :width, :width] = _dense(weight, conv.groups).permute(2, 3, 1, 0)
        spatial_bias[i, :width] = bias

    expanding, expanding_bias = _folded(block.conv3, block.bn3)
    expanding = padded_splits(expanding[:, :, 0, 0].T)
    shortcut: Activations | None = None
    if block.downsample is not None:
        *pools, projection, bn = block.downsample
        weight, bias = _folded(cast(nn.Conv2d, projection), cast(nn.BatchNorm2d, bn))
        expanding = torch.cat((expanding, weight[:, :, 0, 0].T))
        expanding_bias = expanding_bias + bias
        shortcut = _shortcut(pools, cast(nn.Conv2d, projection).stride[0])

    reducing, spatial, expanding = (
        weight.to(device, dtype).contiguous() for weight in (reducing, spatial, expanding)
    )
    reducing_bias, spatial_bias, expanding_bias = (
        bias.to(device).contiguous() for bias in (reducing_bias, spatial_bias, expanding_bias)
    )
    pool = _module(block.pool) if first else None

    def run(x: Tensor) -> Tensor:
        reduced = pointwise_convolution([x], reducing, reducing_bias)
        split = [reduced[..., i * padded : (i + 1) * padded] for i in range(splits)]
        shape = [reduced.shape[0], *(-(-size // stride) for size in reduced.shape[1:3])]
        parts = reduced.new_empty((*shape, (splits - 1) * padded))
        if pool is not None:
            spatial_convolution(
                reduced[..., : (splits - 1) * padded],
                *(spatial, spatial_bias, parts),
                stride=stride,
                dilation=dilation,
                splits=splits - 1,
            )
            around = pool(split[-1])
        else:
            around = split[-1]
            carried = split[0]
            for i in range(splits - 1):
                more = i + 2 < splits
                total = reduced.new_empty((*shape, padded)) if more else None
                spatial_convolution(
                    carried,
                    spatial[i : i + 1],
                    spatial_bias[i : i + 1],
                    parts[..., i * padded : (i + 1) * padded],
                    dilation=dilation,
                    addend=split[i + 1] if more else None,
                    total=total,
                )
                carried = carried if total is None else total
        if shortcut is None:
            return pointwise_convolution([parts, around], expanding, expanding_bias, x)
        return pointwise_convolution([parts, around, shortcut(x)], expanding, expanding_bias)

    return run


def _shortcut(pools: Sequence[nn.Module], stride: int) -> Activations:
    """Return a function for the input of the shortcut's 1x1 convolution."""
    if not pools:
        return lambda x: x[:, ::stride, ::stride].contiguous()
    if isinstance(pools[0], nn.AvgPool2d) and pools[0].kernel_size == 1:
        return lambda x: x
    return _module(nn.Sequential(*pools))


def _folded(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Fold a batch norm into its convolution; return weight and bias, float32 on the CPU."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        *(conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    )
    return weight.detach(), bias.detach()


def _dense(weight: Tensor, groups: int) -> Tensor:
    """Expand a grouped weight [D, C / groups, …] with zeros to a full one [D, C, …]."""
    if groups == 1:
        return weight
    depth = weight.shape[1]
    dense = weight.new_zeros((weight.shape[0], depth * groups, *weight.shape[2:]))
    for group, part in enumerate(weight.chunk(groups)):
        rows = slice(group * part.shape[0], (group + 1) * part.shape[0])
        dense[rows, group * depth : (group + 1) * depth] = part
    return dense
