"""What holds for every engine: the plain network's numbers, whatever is asked for, and no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.engines import (
    ENGINES,
    FULL,
    global_state,
    needs_bf16,
    noise,
    normalised,
    plain_outputs,
    pooled,
    tiny,
)
from support.reference_weights import KIT, TINY, reference_input, reference_network, relative_error

from r2ncli.architectures import DEFAULT_NETWORK, PUBLISHED, Architecture, Preprocessing
from r2ncli.engine import POOLS, base, openvino
from r2ncli.engine.base import Engine

OpenEngine = Callable[..., Engine]

every_engine = pytest.mark.parametrize("open_engine", ENGINES.values(), ids=ENGINES)


def cases(fast: dict[str, tuple[str, ...]], names: tuple[str, ...]) -> pytest.MarkDecorator:
    """Parametrise over the engines and `names`; what is not in `fast` is slow."""
    return pytest.mark.parametrize(
        ("open_engine", "name"),
        [
            pytest.param(
                open_engine,
                name,
                marks=[] if name in fast.get(kind, ()) else pytest.mark.slow,
                id=f"{kind}-{name}",
            )
            for kind, open_engine in ENGINES.items()
            for name in names
        ],
    )


# --- the same numbers -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "pool", "size"),
    [
        *(
            (kind, name, pool, size)
            for kind, odd in (("torch", 32), ("openvino", 57))
            for name in TINY
            for pool, size in (("avg", 64), ("max", 64), ("none", odd))
        ),
        *(("cuda", "v1b", pool, 64) for pool in POOLS),
    ],
)
def test_all_layers_at_once_are_the_plain_networks(
    kind: str, name: str, pool: str, size: int
) -> None:
    network, pixels = reference_network(TINY[name]), noise(3, size)
    expected = plain_outputs(network, normalised(pixels))
    run = ENGINES[kind](network, list(expected), pool, preprocessing=Preprocessing(size, size))
    outputs = run(pixels)
    assert list(outputs) == list(expected)
    for layer, array in outputs.items():
        assert array.dtype == np.float32
        assert relative_error(array, pooled(expected[layer], pool)) < 1e-5, layer


@cases({"torch": ("v1b",)}, tuple(TINY))
def test_each_layer_alone_is_the_plain_networks(open_engine: OpenEngine, name: str) -> None:
    network, pixels = reference_network(TINY[name]), noise(1)
    for layer, expected in plain_outputs(network, normalised(pixels)).items():
        outputs = open_engine(network, [layer], batch_size=1)(pixels)
        assert list(outputs) == [layer]
        assert relative_error(outputs[layer], expected) < 1e-5, layer


@cases({"torch": KIT[::2], "openvino": (DEFAULT_NETWORK,)}, tuple(PUBLISHED))
def test_published_networks_give_the_plain_logits(open_engine: OpenEngine, name: str) -> None:
    network, pixels = reference_network(name), noise(2, 224)
    with torch.no_grad():
        expected = network(normalised(pixels, FULL))
    outputs = open_engine(network, batch_size=2, preprocessing=FULL)(pixels)
    assert relative_error(outputs["fc"], expected) < 1e-5


@cases({"torch": (DEFAULT_NETWORK,)}, (DEFAULT_NETWORK,))
def test_every_layer_of_the_default_network_is_the_plain_networks(
    open_engine: OpenEngine, name: str
) -> None:
    network, pixels = reference_network(name), noise(1, 96)
    expected = plain_outputs(network, normalised(pixels))
    run = open_engine(network, list(expected), batch_size=1, preprocessing=Preprocessing(96, 96))
    outputs = run(pixels)
    assert max(relative_error(outputs[name], expected[name]) for name in expected) < 1e-5


@every_engine
def test_outputs_come_in_the_order_they_were_asked_for(open_engine: OpenEngine) -> None:
    asked = ["fc", "layer1", "layer4", "conv1"]
    outputs = open_engine(reference_network(TINY["v1"]), asked)(noise(3))
    assert list(outputs) == asked


@every_engine
def test_mean_and_standard_deviation_are_those_of_the_preprocessing(
    open_engine: OpenEngine,
) -> None:
    network, pixels = reference_network(TINY["v1"]), noise(3)
    other = Preprocessing(64, 64, mean=(0.1, 0.5, 0.9), std=(0.5, 0.25, 1.0))
    outputs = open_engine(network, ["conv1"], preprocessing=other)(pixels)
    expected = plain_outputs(network, normalised(pixels, other))["conv1"]
    assert relative_error(outputs["conv1"], expected) < 1e-5


@needs_bf16
@pytest.mark.parametrize("kind", ["torch", "openvino"])
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=[] if name == DEFAULT_NETWORK else pytest.mark.slow)
        for name in PUBLISHED
    ],
)
def test_bfloat16_logits_are_within_a_hundredth(kind: str, variant: str) -> None:
    network = reference_network(variant)
    bytes_of_noise = (reference_input() * 58 + 124).clamp(0, 255).byte().permute(0, 2, 3, 1)
    pixels = np.ascontiguousarray(bytes_of_noise.numpy())
    with torch.no_grad():
        expected = network(normalised(pixels, FULL))
    run = ENGINES[kind](network, batch_size=2, preprocessing=FULL, precision="bf16")
    assert run.description.precision == "bf16"
    outputs = run(pixels)
    assert outputs["fc"].dtype == np.float32
    assert 1e-5 < relative_error(outputs["fc"], expected) < 1e-2  # float32 would be nearer


# --- rows are independent -----------------------------------------------------------------


@tiny
@pytest.mark.parametrize(
    ("kind", "precision", "tolerance"),
    [
        ("torch", "fp32", 1e-6),
        ("cuda", "fp32", 1e-6),
        ("openvino", "fp32", 0.0),
        pytest.param("openvino", "bf16", 0.0, marks=needs_bf16),
    ],
)
def test_a_row_does_not_depend_on_its_neighbours_or_its_place(
    architecture: Architecture, kind: str, precision: str, tolerance: float
) -> None:
    network = reference_network(architecture)
    run = ENGINES[kind](network, ["fc", "layer4"], "avg", batch_size=8, precision=precision)
    pixels = noise(8)
    together = run(pixels)
    turned = run(np.ascontiguousarray(np.roll(pixels, 3, axis=0)))
    padded = pixels.copy()
    padded[1:] = 0
    alone = run(padded)
    for name, rows in together.items():
        assert relative_error(turned[name][3:], rows[:-3]) <= tolerance
        assert relative_error(alone[name][:1], rows[:1]) <= tolerance


@every_engine
def test_the_same_batch_gives_the_same_bytes(open_engine: OpenEngine) -> None:
    run = open_engine(reference_network(TINY["v1b"]), ["fc", "layer2"])
    first, second = run(noise(3)), run(noise(3))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@every_engine
def test_outputs_belong_to_the_caller(open_engine: OpenEngine) -> None:
    run = open_engine(reference_network(TINY["v1"]), ["fc", "layer1"])
    pixels = noise(3)
    first = run(pixels)
    kept = {name: array.copy() for name, array in first.items()}
    for seed in range(1, 6):  # more batches than an engine has buffers
        run(noise(3, seed=seed))
    assert all(np.array_equal(first[name], kept[name]) for name in kept)
    assert all(array.flags.writeable and array.flags.c_contiguous for array in first.values())
    assert np.array_equal(pixels, noise(3))


# --- nothing is left changed ------------------------------------------------------------


@every_engine
@pytest.mark.parametrize("layer", ["fc", "layer2", "bn1", "conv1"])
def test_the_given_network_is_left_as_it_was(open_engine: OpenEngine, layer: str) -> None:
    network = reference_network(TINY["v1b"])
    before, modules = copy.deepcopy(network.state_dict()), repr(network)
    open_engine(network, [layer])(noise(3))
    assert repr(network) == modules
    assert not any(module._forward_hooks for module in network.modules())
    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@every_engine
def test_an_engine_leaves_torchs_global_state_as_it_was_and_prints_nothing(
    open_engine: OpenEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    before = global_state()
    open_engine(reference_network(TINY["v1b"]), ["fc", "layer2"])(noise(3))
    assert global_state() == before
    assert capfd.readouterr() == ("", "")


@every_engine
def test_another_default_dtype_changes_nothing(open_engine: OpenEngine) -> None:
    network, pixels = reference_network(TINY["v1"]), noise(3)
    expected = open_engine(network)(pixels)["fc"]
    torch.set_default_dtype(torch.float64)
    try:
        outputs = open_engine(network)(pixels)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert outputs["fc"].dtype == np.float32
    assert np.array_equal(outputs["fc"], expected)


# --- what runs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "library"),
    [
        ("torch", f"torch {torch.__version__}"),
        ("openvino", openvino.library()),
        ("cuda", f"torch {torch.__version__}"),
    ],
)
def test_the_description_says_what_runs(kind: str, library: str) -> None:
    description = ENGINES[kind](reference_network(TINY["v1"])).description
    assert description.library == library
    assert description.backend == library.split()[0]
    assert description.device_kind == "cpu"
    assert description.device_model == base.cpu_model() != ""
    assert (description.precision, description.batch_size) == ("fp32", 3)
    assert description.executed_batch_size is None
