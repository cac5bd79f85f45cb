"""Convert a torch network to an OpenVINO graph from uint8 pixels to the wanted outputs.

The network's own forward pass runs once with nodes of the graph instead of tensors: torch
passes each function that is called with one to `GraphTensor`. So `model.py` stays the only
description of the network, a hook can take any module's output, and the graph has only what
the wanted outputs need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812, as the field calls it

from r2ncli.architectures import Preprocessing
from r2ncli.model import Res2Net
from r2ncli.openvino_import import Model, Node, Output
from r2ncli.openvino_import import opset15 as ops


def to_graph(
    network: Res2Net,
    outputs: Sequence[str],
    pool: str,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    keep_nan: bool = False,
) -> Model:
    """Convert `network`, in eval mode, float32 and on the CPU, to a graph; it is not changed.

    `outputs` are names of modules (`layer_shapes`); `pool` is ``avg`` or ``max`` over height and
    width, or ``none``. The graph takes uint8 [batch_size, H, W, 3] and gives a float32 array
    for each of `outputs`, in their order.

    OpenVINO's ReLU turns NaN into 0. With `keep_nan`, all outputs of an image are NaN if a ReLU
    before them gets one; that takes time, and only networks that `may_overflow` need it.
    """
    size = preprocessing.image_size
    pixels = ops.parameter([batch_size, size, size, 3], np.uint8, name="pixels")
    shift, scale = np.array((preprocessing.mean, preprocessing.std), dtype=np.float32) * 255
    values = ops.divide(ops.subtract(ops.convert(pixels, "f32"), shift), scale)
    seen: dict[str, Output] = {}
    nan: list[Output] = []  # for each ReLU so far, which images have NaN in its input

    def see(name: str, output: Output) -> None:
        pooled = _pooled(output, pool)
        seen[name] = _with_nan(pooled, [*nan, _has_nan(output)]) if keep_nan else pooled

    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: see(name, output.output)
        )
        for name in outputs
    ]
    if keep_nan:
        hooks += [
            module.register_forward_pre_hook(
                lambda _module, inputs: nan.append(_has_nan(inputs[0].output))
            )
            for module in network.modules()
            if isinstance(module, torch.nn.ReLU)
        ]
    try:
        with torch.no_grad():
            network(GraphTensor(ops.transpose(values, [0, 3, 1, 2]).output(0)))
    finally:
        for hook in hooks:
            hook.remove()
    return Model([ops.result(seen[name], name=name) for name in outputs], [pixels], "Res2Net")


def may_overflow(network: Res2Net, preprocessing: Preprocessing) -> bool:
    """Return whether a network whose weights are finite may give NaN or infinity inside.

    A black, a white and a random image pass through it. In a trained network no value is beyond a
    few thousand, so that no image can reach the largest float, 3e38, unless one of these is near.
    """
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), generator=random).float()
    pixels[0], pixels[1] = 0, 255
    shift, scale = 255 * torch.tensor((preprocessing.mean, preprocessing.std), dtype=torch.float32)
    largest = [torch.zeros(())]
    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, output: largest.append(output.abs().max())
        )
        for module in network.modules()
        if not list(module.children())
    ]
    try:
        with torch.inference_mode():
            network((pixels - shift.view(3, 1, 1)) / scale.view(3, 1, 1))
    finally:
        for hook in hooks:
            hook.remove()
    return not bool(torch.stack(largest).max() < 1e30)  # NaN is not less either


def _has_nan(output: Output) -> Output:
    """Return 1 for each image of a batch whose values [N, ...] have NaN among them, or 0: [N]."""
    axes = list(range(1, len(output.shape)))
    return ops.reduce_max(ops.convert(ops.is_nan(output), "f32"), axes).output(0)


def _with_nan(output: Output, nan: Sequence[Output]) -> Output:
    """Return [N, ...] with NaN for the images that one of `nan` [N] has as 1."""
    found = ops.reduce_max(ops.concat([ops.unsqueeze(one, 0) for one in nan], 0), [0])
    added = ops.select(ops.greater(found, np.float32(0)), np.float32(np.nan), np.float32(0))
    shape = [int(output.shape[0]), *[1] * (len(output.shape) - 1)]
    return ops.add(output, ops.reshape(added, shape, False)).output(0)


def _pooled(output: Output, pool: str) -> Output:
    if len(output.shape) != 4 or pool == "none":
        return output
    reduce = ops.reduce_mean if pool == "avg" else ops.reduce_max
    return reduce(output, [2, 3]).output(0)


class GraphTensor:
    """Stands for a tensor [N, C, H, W] or [N, C] in a forward pass that builds a graph."""

    def __init__(self, output: Output) -> None:
        self.output = output

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        _types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> GraphTensor:
        return cls(_NODES[function](*args, **(kwargs or {})).output(0))

    def __add__(self, other: GraphTensor) -> GraphTensor:
        return GraphTensor(ops.add(self.output, other.output).output(0))

    def dim(self) -> int:
        return len(self.output.shape)

    def chunk(self, chunks: int, dim: int) -> list[GraphTensor]:
        return [GraphTensor(part) for part in ops.split(self.output, dim, chunks).outputs()]


def _constant(tensor: Tensor, shape: Sequence[int] | None = None) -> Node:
    array = tensor.detach().numpy()  # which the graph keeps: a copy would take as much memory
    return ops.constant(array if shape is None else array.reshape(shape), shared_memory=True)


def _conv2d(
    x: GraphTensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Node:
    where = (list(stride), list(padding), list(padding), list(dilation))
    if groups == 1:
        product = ops.convolution(x.output, _constant(weight), *where)
    else:
        grouped = (groups, weight.shape[0] // groups, *weight.shape[1:])
        product = ops.group_convolution(x.output, _constant(weight, grouped), *where)
    return product if bias is None else ops.add(product, _constant(bias, (1, -1, 1, 1)))


def _max_pool2d(
    x: GraphTensor, kernel: int, stride: int, padding: int, dilation: int, **_defaults: bool
) -> Node:
    pads = [padding, padding]
    return ops.max_pool(x.output, [stride] * 2, [dilation] * 2, pads, pads, [kernel] * 2)


def _avg_pool2d(
    x: GraphTensor,
    kernel: int,
    stride: int,
    padding: int,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: None,
) -> Node:
    assert divisor_override is None
    rounding = "ceil_torch" if ceil_mode else "floor"
    pads = [padding, padding]
    return ops.avg_pool(
        x.output, [stride] * 2, pads, pads, [kernel] * 2, not count_include_pad, rounding
    )


# the functions that a forward pass in eval mode calls, with the arguments that `model` gives
_NODES: dict[Callable[..., Any], Callable[..., Node]] = {
    torch.conv2d: _conv2d,
    F.batch_norm: lambda x, mean, variance, weight, bias, training, momentum, eps: (
        ops.batch_norm_inference(
            x.output, *map(_constant, (weight, bias, mean, variance)), epsilon=eps
        )
    ),
    F.relu: lambda x, inplace=False: ops.relu(x.output),
    F.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: lambda x, _size: ops.reduce_mean(x.output, [2, 3], keep_dims=True),
    F.linear: lambda x, weight, bias: ops.add(
        ops.matmul(x.output, _constant(weight), False, True), _constant(bias)
    ),
    torch.cat: lambda tensors, dim: ops.concat([tensor.output for tensor in tensors], dim),
    torch.flatten: lambda x, _start: ops.reshape(x.output, [0, -1], special_zero=True),
}
