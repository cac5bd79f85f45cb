"""Each kernel gives what torch's separate functions give, at sizes that fit no tile."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from support.kernels import DEVICE, RUNS_KERNELS
from torch.nn import functional as F  # noqa: N812, as the field calls it

pytest.importorskip("triton")

from r2ncli.engine.kernels import (
    pointwise_convolution,
    spatial_convolution,
    stem_convolution,
)

pytestmark = RUNS_KERNELS


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(shape).to(DEVICE)


def assert_close(ours, expected):
    assert ours.shape == expected.shape
    assert ((ours - expected).abs().max() / expected.abs().max()).item() < 1e-5


def channels_last(convolved):
    return convolved.permute(0, 2, 3, 1)


@pytest.mark.parametrize("shape", [(2, 13, 11), (1, 32, 32), (3, 8, 33)])
@pytest.mark.parametrize(("size", "channels"), [(3, 20), (3, 32), (7, 64)])
def test_the_stem_normalises_convolves_and_rectifies(shape, size, channels):
    pixels = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8).to(DEVICE)
    shift, scale = (torch.tensor(v).to(DEVICE) for v in ([99.5, 110.0, 120], [50.0, 60, 70]))
    weight, bias = normal(channels, 3, size, size), normal(channels)
    kernel = weight.permute(2, 3, 1, 0).reshape(-1, channels).contiguous()
    normalised = ((pixels - shift) / scale).permute(0, 3, 1, 2)
    expected = F.relu(F.conv2d(normalised, weight, bias, stride=2, padding=size // 2))
    ours = stem_convolution(pixels, shift, scale, kernel, bias, size)
    assert_close(ours, channels_last(expected))


@pytest.mark.parametrize("channels", [16, 18, 40, 64])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (1, 4)])
def test_splits_are_convolved_side_by_side(channels, stride, dilation):
    x = normal(2, 13, 11, 3 * channels + 5)[..., : 3 * channels]
    weight, bias = normal(3, channels, channels, 3, 3), normal(3, channels)
    expected = F.conv2d(
        x.permute(0, 3, 1, 2),
        weight.flatten(0, 1),
        bias.flatten(),
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=3,
    )
    out = torch.full((*channels_last(expected).shape[:3], 4 * channels), 9.0, device=DEVICE)
    kernel = weight.permute(0, 3, 4, 2, 1).contiguous()
    part = out[..., channels:]
    spatial_convolution(x, kernel, bias, part, stride=stride, dilation=dilation, splits=3)
    assert_close(part, channels_last(F.relu(expected)))
    assert (out[..., :channels] == 9).all()  # nothing beside its own part is written


@pytest.mark.parametrize(("depth", "channels"), [(16, 16), (13, 150), (70, 24)])
def test_the_sum_with_the_next_split_is_written_beside_the_convolution(depth, channels):
    x, others = normal(2, 9, 7, depth), normal(2, 9, 7, channels + 3)
    weight, bias = normal(channels, depth, 3, 3), normal(channels)
    expected = channels_last(F.relu(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1)))
    out, total = (torch.empty(expected.shape, device=DEVICE) for _ in range(2))
    addend = others[..., 3:]
    kernel = weight.permute(2, 3, 1, 0)[None].contiguous()
    spatial_convolution(x, kernel, bias[None], out, addend=addend, total=total)
    assert_close(out, expected)
    assert_close(total, expected + addend)


@pytest.mark.parametrize("depths", [(48,), (64, 17), (33, 16, 130)])
@pytest.mark.parametrize("channels", [8, 64, 150])
@pytest.mark.parametrize("has_residual", [True, False])
def test_a_pointwise_convolution_reads_its_sources_where_they_lie(depths, channels, has_residual):
    wide = normal(2, 13, 11, sum(depths) + 7)
    sources = list(wide[..., 7:].split(depths, dim=3))
    weight, bias = normal(sum(depths), channels), normal(channels)
    residual = normal(2, 13, 11, channels) if has_residual else None
    expected = wide[..., 7:] @ weight + bias + (0 if residual is None else residual)
    assert_close(pointwise_convolution(sources, weight, bias, residual), F.relu(expected))


# the interpreter multiplies the bits of bfloat16 as if they were integers
on_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU")


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.cuda, on_gpu])]
)
def test_half_precision_is_summed_in_float32_and_rounded_once(dtype):
    x, weight = normal(1, 8, 16, 640).to(dtype), normal(640, 32).to(dtype)
    bias, residual = normal(32), normal(1, 8, 16, 32).to(dtype)
    exact = F.relu(x.double() @ weight.double() + bias.double() + residual.double())
    ours = pointwise_convolution([x], weight, bias, residual)
    assert ours.dtype == dtype
    half_a_step = exact.abs() * torch.finfo(dtype).eps / 2
    assert ((ours.double() - exact).abs() <= half_a_step * 1.01 + 1e-4).all()


COMPILE = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from r2ncli.engine import kernels

def shared(kernel, capability, columns, **constants):
    pointers = {"pixels": "*u8", "bias": "*fp32", "shift": "*fp32", "scale": "*fp32"}
    constants |= {"ROWS": kernels.ROWS, "COLUMNS": columns}
    places = ("x", "x0", "x1", "x2", "weight", "out", "addend", "total", "residual")
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        of_pointer = pointers.get(name, "*fp16" if name in places else None)
        signature[name] = of_pointer or "i32"
        if of_pointer or name.startswith(("depth", "channels", "stride0", "stride1", "stride2")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = kernels._launch(columns, torch.empty(0, dtype=torch.float16))
    if kernel is kernels._stem:
        options |= {"num_warps": 8, "num_stages": 1}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled.metadata.shared

capability = int(sys.argv[1])
print(json.dumps([
    shared(kernels._stem, capability, 32, SIZE=3, DEPTH=32),
    shared(kernels._stem, capability, 64, SIZE=7, DEPTH=32),
    *(
        shared(kernels._spatial, capability, columns, SIZE=3, ADDED=columns < 128, DEPTH=depth)
        for columns, depth in ((32, 32), (64, 64), (128, 64))
    ),
    *(
        shared(kernels._pointwise, capability, 128, SOURCES=n, RESIDUAL=n == 2, DEPTH=64)
        for n in (2, 3)
    ),
]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_every_kernel_compiles_for_gpus_within_their_shared_memory(capability, tmp_path):
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kilobytes = [number / 1024 for number in json.loads(done.stdout)]
    assert 0 < max(kilobytes) <= 99  # what the smallest of these GPUs give a program
