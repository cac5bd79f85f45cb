"""Triton kernels of convolutions fused with the operations after them, for [N, H, W, C].

After a convolution torch reads and writes memory again for the bias, the activation, the sum
and the concatenation. The convolutions of these networks are so narrow that this takes longer
than the products. Here one kernel reads its input once and writes its output once, in place
among the concatenated splits. `fused.py` decides what is fused.

There is no autotuning: tile sizes depend only on the shapes, so that a row has the same bits
in every run. Products are summed in float32 and rounded when they are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128  # pixels that one program computes


def stem_convolution(
    pixels: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, size: int
) -> Tensor:
    """Normalise pixels and run the first convolution (stride 2, padding size // 2) and its ReLU.

    Parameters
    ----------
    pixels : uint8 [N, H, W, 3]
        Contiguous.
    shift, scale : float32 [3]
        The network's input is (pixels - shift) / scale.
    weight : [size * size * 3, C]
        Row (y * size + x) * 3 + channel; its dtype is the output's.
    bias : float32 [C]
    size : int
        Of the kernel, odd.

    Returns
    -------
    Tensor [N, ceil(H / 2), ceil(W / 2), C]
    """
    count, height, width, _ = pixels.shape
    channels = weight.shape[1]
    out = _empty(pixels, ((count, (height + 1) // 2, (width + 1) // 2, channels)), weight)
    rows = out.numel() // channels
    columns = _columns(channels)
    _stem[_grid(rows, channels, columns)](
        *(pixels, shift, scale, weight, bias, out),
        *(rows, height, width, out.shape[1], out.shape[2], channels, size * size * 3),
        SIZE=size,
        ROWS=ROWS,
        COLUMNS=columns,
        DEPTH=32,
        # the loop is short, and prefetching single bytes would take too many registers
        **_launch(columns, weight) | {"num_warps": 8, "num_stages": 1},
    )
    return out


def spatial_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    splits: int = 1,
    addend: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Write a convolution with bias and ReLU to `out`, and its sum with `addend` to `total`.

    Parameters
    ----------
    x : [N, H, W, splits * C]
        A part of the channels of a contiguous tensor.
    weight : [splits, size, size, C, D]
        The padding keeps the size at stride 1.
    bias : float32 [splits, D]
    out : [N, ceil(H / stride), ceil(W / stride), splits * D]
        A part of the channels of a contiguous tensor.
    stride, dilation : int
    splits : int
        Number of convolutions side by side, each with its own channels.
    addend, total : Tensor or None
        As `out`; give both or neither.
    """
    _, size, _, depth, channels = weight.shape
    count, height, width, _ = x.shape
    _, out_height, out_width, _ = out.shape
    rows = count * out_height * out_width
    columns, chunk = _columns(channels), 64 if depth % 64 == 0 else 32
    beside = out if addend is None else addend, out if total is None else total
    _spatial[(*_grid(rows, channels, columns), splits)](
        *(x, weight, bias, out, *beside),
        *(rows, height, width, out_height, out_width, depth, channels, -(-depth // chunk)),
        *(tensor.stride(2) for tensor in (x, out, *beside)),
        *(stride, dilation, dilation * (size // 2)),
        SIZE=size,
        ADDED=addend is not None,
        ROWS=ROWS,
        COLUMNS=columns,
        DEPTH=chunk,
        **_launch(columns, weight),
    )


def pointwise_convolution(
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """Run a 1x1 convolution over the channels of up to three inputs, a residual sum and a ReLU.

    Parameters
    ----------
    sources : sequence of Tensor [N, H, W, C_i]
        Each is a part of the channels of a contiguous tensor; they may be different tensors.
    weight : [sum of C_i, D]
    bias : float32 [D]
    residual : Tensor [N, H, W, D] or None
        Contiguous; added before the ReLU.

    Returns
    -------
    Tensor [N, H, W, D]
    """
    channels = weight.shape[1]
    out = _empty(sources[0], (*sources[0].shape[:3], channels), weight)
    rows = out.numel() // channels
    columns = _columns(channels)
    padded = [*sources, *[sources[0]] * (3 - len(sources))]
    depths = [source.shape[3] for source in sources] + [0] * (3 - len(sources))
    _pointwise[_grid(rows, channels, columns)](
        *(*padded, weight, bias, out if residual is None else residual, out),
        *(rows, channels, *depths, *(source.stride(2) for source in padded)),
        SOURCES=len(sources),
        RESIDUAL=residual is not None,
        ROWS=ROWS,
        COLUMNS=columns,
        DEPTH=64,
        **_launch(columns, weight),
    )
    return out


def _empty(like: Tensor, shape: tuple[int, ...], weight: Tensor) -> Tensor:
    return torch.empty(shape, device=like.device, dtype=weight.dtype)


def _columns(channels: int) -> int:
    """Return how many output channels one program computes: a power of two."""
    return min(128, max(16, 1 << (channels - 1).bit_length()))


def _grid(rows: int, channels: int, columns: int) -> tuple[int, int]:
    # programs that share rows are neighbours, so that the rows are in the L2 cache
    return -(-channels // columns) * -(-rows // ROWS), 1


def _launch(columns: int, weight: Tensor) -> dict[str, Any]:
    # in half precision at most 98 KB of shared memory: two programs fit a multiprocessor of
    # Hopper, one fits Ada; float32 is only for tests, and must fit
    stages = 3 if weight.element_size() == 2 else 1
    return {
        "num_warps": 8 if columns == 128 else 4,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }


@triton.jit
def _place(channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the rows and columns of this program; columns change first."""
    across = tl.cdiv(channels, COLUMNS)
    program = tl.program_id(0)
    rows = (program // across) * ROWS + tl.arange(0, ROWS)
    columns = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    return rows, columns


@triton.jit
def _stem(
    pixels, shift, scale, weight, bias, out,
    count, height, width, out_height, out_width, channels, depth,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    rows, columns = _place(channels, ROWS, COLUMNS)
    image = rows // (out_height * out_width)
    top = (rows // out_width % out_height) * 2 - SIZE // 2
    left = (rows % out_width) * 2 - SIZE // 2
    first = (image.to(tl.int64) * height + top) * width + left
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        down, right, colour = k // 3 // SIZE, k // 3 % SIZE, k % 3
        y, x = top[:, None] + down[None, :], left[:, None] + right[None, :]
        inside = (
            (rows < count)[:, None] & (k < depth)[None, :]
            & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        )  # fmt: skip
        offset = (first[:, None] + (down * width + right)[None, :]) * 3 + colour[None, :]
        grey = tl.load(pixels + offset, mask=inside, other=0).to(tl.float32)
        low, spread = tl.load(shift + colour), tl.load(scale + colour)
        # the padding is zero after normalisation
        values = tl.where(inside, (grey - low[None, :]) / spread[None, :], 0.0)
        tile = tl.load(
            weight + k[:, None] * channels + columns[None, :],
            mask=(k < depth)[:, None] & (columns < channels)[None, :],
            other=0.0,
        )
        total = tl.dot(values.to(tile.dtype), tile, total, input_precision="ieee")
    total += tl.load(bias + columns, mask=columns < channels, other=0.0)[None, :]
    tl.store(
        out + rows.to(tl.int64)[:, None] * channels + columns[None, :],
        tl.maximum(total, 0.0).to(out.dtype.element_ty),
        mask=(rows < count)[:, None] & (columns < channels)[None, :],
    )


@triton.jit
def _spatial(
    x, weight, bias, out, addend, total,
    count, height, width, out_height, out_width, depth, channels, chunks,
    x_stride, out_stride, addend_stride, total_stride,
    stride, dilation, padding,
    SIZE: tl.constexpr, ADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(2)
    x += split * depth
    weight += split * SIZE * SIZE * depth * channels
    bias += split * channels
    rows, columns = _place(channels, ROWS, COLUMNS)
    image = rows // (out_height * out_width)
    top = (rows // out_width % out_height) * stride - padding
    left = (rows % out_width) * stride - padding
    first = (image.to(tl.int64) * height + top) * width + left
    there = (columns < channels)[None, :]
    k = tl.arange(0, DEPTH)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(SIZE * SIZE * chunks):  # one loop, so that loads are prefetched
        tap, start = step // chunks, step % chunks * DEPTH
        down, right = tap // SIZE * dilation, tap % SIZE * dilation
        y, z = top + down, left + right
        inside = (rows < count) & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        position = (first + down * width + right) * x_stride + start
        values = tl.load(
            x + position[:, None] + k[None, :],
            mask=inside[:, None] & (start + k < depth)[None, :],
            other=0.0,
        )
        tile = tl.load(
            weight + (tap * depth + start + k)[:, None] * channels + columns[None, :],
            mask=(start + k < depth)[:, None] & there,
            other=0.0,
        )
        sums = tl.dot(values, tile, sums, input_precision="ieee")
    sums += tl.load(bias + columns, mask=columns < channels, other=0.0)[None, :]
    sums = tl.maximum(sums, 0.0)
    written = (rows < count)[:, None] & there
    row = rows.to(tl.int64)[:, None]
    column = columns[None, :] + split * channels
    tl.store(out + row * out_stride + column, sums.to(out.dtype.element_ty), mask=written)
    if ADDED:
        sums += tl.load(addend + row * addend_stride + column, mask=written, other=0.0).to(
            tl.float32
        )
        tl.store(total + row * total_stride + column, sums.to(out.dtype.element_ty), mask=written)


@triton.jit
def _pointwise(
    x0, x1, x2, weight, bias, residual, out,
    count, channels, depth0, depth1, depth2, stride0, stride1, stride2,
    SOURCES: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    rows, columns = _place(channels, ROWS, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    sums = _product(
        sums, x0, weight, rows, columns, count, channels, depth0, stride0, DEPTH
    )  # fmt: skip
    if SOURCES > 1:
        weight += depth0 * channels
        sums = _product(
            sums, x1, weight, rows, columns, count, channels, depth1, stride1, DEPTH
        )  # fmt: skip
    if SOURCES > 2:
        weight += depth1 * channels
        sums = _product(
            sums, x2, weight, rows, columns, count, channels, depth2, stride2, DEPTH
        )  # fmt: skip
    sums += tl.load(bias + columns, mask=columns < channels, other=0.0)[None, :]
    written = (rows < count)[:, None] & (columns < channels)[None, :]
    offset = rows.to(tl.int64)[:, None] * channels + columns[None, :]
    if RESIDUAL:
        sums += tl.load(residual + offset, mask=written, other=0.0).to(tl.float32)
    tl.store(out + offset, tl.maximum(sums, 0.0).to(out.dtype.element_ty), mask=written)


@triton.jit
def _product(
    sums, x, weight, rows, columns, count, channels, depth, stride, DEPTH: tl.constexpr
):  # fmt: skip
    """Return `sums` plus the product of one source's rows with its part of the weights."""
    k = tl.arange(0, DEPTH)
    place = x + rows.to(tl.int64)[:, None] * stride + k[None, :]
    part = weight + k[:, None] * channels + columns[None, :]
    for start in range(0, depth, DEPTH):
        left = depth - start
        values = tl.load(
            place + start, mask=(rows < count)[:, None] & (k < left)[None, :], other=0.0
        )
        tile = tl.load(
            part + start * channels,
            mask=(k < left)[:, None] & (columns < channels)[None, :],
            other=0.0,
        )
        sums = tl.dot(values, tile, sums, input_precision="ieee")
    return sums
