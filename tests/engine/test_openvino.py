"""OpenVINO gives what the plain network gives, the same bytes each time, and leaves no trace."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from engine.test_engine import (
    FULL,
    SMALL,
    global_state,
    needs_bf16,
    noise,
    normalised,
    plain_outputs,
    pooled,
    tiny,
)
from support.reference_weights import TINY, reference_input, reference_network, relative_error

from r2ncli import engine
from r2ncli.architectures import PUBLISHED, Preprocessing
from r2ncli.engine import find_backend
from r2ncli.engine import openvino as openvino_engine
from r2ncli.engine.graph import to_graph
from r2ncli.engine.openvino import OpenVinoEngine, compiled
from r2ncli.errors import DeviceError, UsageError
from r2ncli.model import conv_bn_pairs


def fp32(
    network, outputs=("fc",), pool="none", batch_size=3, preprocessing=SMALL, precision="fp32",
    streams=1,
):  # fmt: skip
    """An engine in float32."""
    graph = to_graph(network, outputs, pool, preprocessing, batch_size)
    return OpenVinoEngine(compiled(graph, precision), outputs, precision, streams=streams)


# --- the same numbers -----------------------------------------------------------------


@tiny
@pytest.mark.parametrize(("pool", "size"), [("avg", 64), ("max", 64), ("none", 57)])
def test_all_layers_at_once_are_the_plain_networks(architecture, pool, size):
    network, pixels = reference_network(architecture), noise(3, size)
    expected = plain_outputs(network, normalised(pixels))
    outputs = fp32(network, list(expected), pool, preprocessing=Preprocessing(size, size))(pixels)
    assert list(outputs) == list(expected)
    for name, array in outputs.items():
        assert array.dtype == np.float32
        assert relative_error(array, pooled(expected[name], pool)) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_each_layer_alone_is_the_plain_networks(name):
    network, pixels = reference_network(TINY[name]), noise(1)
    for layer, expected in plain_outputs(network, normalised(pixels)).items():
        outputs = fp32(network, [layer], batch_size=1)(pixels)
        assert list(outputs) == [layer]
        assert relative_error(outputs[layer], expected) < 1e-5, layer


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=[] if name == "res2net50_v1b_26w_4s" else pytest.mark.slow)
        for name in PUBLISHED
    ],
)
def test_published_networks_give_the_plain_logits(variant):
    network, pixels = reference_network(variant), noise(2, 224)
    with torch.no_grad():
        expected = network(normalised(pixels, FULL))
    outputs = fp32(network, batch_size=2, preprocessing=FULL)(pixels)
    assert relative_error(outputs["fc"], expected) < 1e-5


@pytest.mark.slow
def test_every_layer_of_the_default_network_is_the_plain_networks():
    network, pixels = reference_network("res2net50_v1b_26w_4s"), noise(1, 96)
    expected = plain_outputs(network, normalised(pixels))
    run = fp32(network, list(expected), batch_size=1, preprocessing=Preprocessing(96, 96))
    outputs = run(pixels)
    assert max(relative_error(outputs[name], expected[name]) for name in expected) < 1e-5


@needs_bf16
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=[] if name == "res2net50_v1b_26w_4s" else pytest.mark.slow)
        for name in PUBLISHED
    ],
)
def test_bfloat16_logits_are_within_a_hundredth(variant):
    network = reference_network(variant)
    pixels = (reference_input() * 58 + 124).clamp(0, 255).byte().permute(0, 2, 3, 1)
    pixels = np.ascontiguousarray(pixels.numpy())
    with torch.no_grad():
        expected = network(normalised(pixels, FULL))
    run = fp32(network, batch_size=2, preprocessing=FULL, precision="bf16")
    assert run.description.precision == "bf16"
    error = relative_error(run(pixels)["fc"], expected)
    assert 1e-5 < error < 1e-2  # float32 would be nearer


def test_outputs_come_in_the_order_they_were_asked_for():
    outputs = fp32(reference_network(TINY["v1"]), ["fc", "layer1", "layer4", "conv1"])(noise(3))
    assert list(outputs) == ["fc", "layer1", "layer4", "conv1"]


def test_normalisation_is_the_preprocessings():
    network, pixels = reference_network(TINY["v1"]), noise(3)
    other = Preprocessing(64, 64, mean=(0.1, 0.5, 0.9), std=(0.5, 0.25, 1.0))
    outputs = fp32(network, ["conv1"], preprocessing=other)(pixels)
    expected = plain_outputs(network, normalised(pixels, other))["conv1"]
    assert relative_error(outputs["conv1"], expected) < 1e-5


def test_the_graph_ends_at_the_deepest_layer():
    network = reference_network(TINY["v1b"])
    before = ("conv1", "bn1", "layer1", "layer2")
    graph = to_graph(network, ["layer1", "layer2"], "none", SMALL, 1)
    convolutions = [node for node in graph.get_ops() if node.get_type_name() == "Convolution"]
    wanted = [conv for conv, _ in conv_bn_pairs(network) if conv.startswith(before)]
    assert len(convolutions) == len(wanted)


# --- the same bytes -------------------------------------------------------------------


@tiny
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_a_row_does_not_depend_on_its_neighbours_or_its_place(architecture, precision):
    network = reference_network(architecture)
    run = fp32(network, ["fc", "layer4"], "avg", batch_size=8, precision=precision)
    pixels = noise(8)
    together = run(pixels)
    turned = run(np.ascontiguousarray(np.roll(pixels, 3, axis=0)))
    padded = pixels.copy()
    padded[1:] = 0
    alone = run(padded)
    for name, rows in together.items():
        assert np.array_equal(turned[name][3:], rows[:-3])
        assert np.array_equal(alone[name][:1], rows[:1])


def test_a_row_does_not_depend_on_the_stream_or_how_many_there_are():
    network = reference_network(TINY["v1b"])
    batches = [noise(3, seed=seed) for seed in range(12)]
    one, several = (fp32(network, ["fc", "layer2"], "avg", streams=n) for n in (1, 3))
    expected = [one(pixels) for pixels in batches]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(several, batches))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_outputs_belong_to_the_caller():
    run = fp32(reference_network(TINY["v1"]), ["fc", "layer1"])
    pixels = noise(3)
    first = run(pixels)
    kept = {name: array.copy() for name, array in first.items()}
    run(noise(3, seed=1))
    assert all(np.array_equal(first[name], kept[name]) for name in kept)
    assert all(array.flags.writeable and array.flags.c_contiguous for array in first.values())
    assert np.array_equal(pixels, noise(3))


# --- no trace -------------------------------------------------------------------------


def test_a_conversion_leaves_the_network_and_torch_as_they_were_and_prints_nothing(capfd):
    network = reference_network(TINY["v1b"])
    before, modules, state = copy.deepcopy(network.state_dict()), repr(network), global_state()
    fp32(network, ["fc", "layer2"])(noise(3))
    assert global_state() == state
    assert repr(network) == modules
    assert not any(module._forward_hooks for module in network.modules())
    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert capfd.readouterr() == ("", "")


def test_openvino_is_imported_without_its_telemetry(tmp_path):
    program = (
        "import sys, r2ncli.engine.openvino, openvino;"
        "openvino.convert_model; print('openvino_telemetry' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.split() == ["False"]
    assert list(tmp_path.iterdir()) == []


# --- what runs ------------------------------------------------------------------------


def test_the_description_says_what_runs():
    description = fp32(reference_network(TINY["v1"]), batch_size=2, streams=2).description
    assert description.backend == "openvino"
    assert description.library.startswith("openvino 20")
    assert (description.device, description.device_kind) == ("cpu", "cpu")
    assert description.device_model == engine.cpu_model() != ""
    assert description.precision == "fp32"
    assert (description.batch_size, description.streams) == (2, min(2, engine.cores()))
    assert 1 <= description.stream_threads <= engine.cores()


@needs_bf16
def test_a_precision_that_does_not_run_is_refused(monkeypatch):
    network = reference_network(TINY["v1"])
    monkeypatch.setitem(openvino_engine._HINTS, "bf16", "f32")
    with pytest.raises(UsageError, match="'bf16' on cpu: OpenVINO executes fp32"):
        fp32(network, precision="bf16")


def test_a_precision_that_the_processor_cannot_do_is_refused_with_those_it_can(monkeypatch):
    monkeypatch.setattr(engine, "cpu_has_bf16", lambda: False)
    assert openvino_engine.find_precision("auto") == "fp32"
    for name in ("bf16", "fp16", "half"):
        with pytest.raises(UsageError, match=f"'{name}' on cpu: this device does fp32$"):
            openvino_engine.find_precision(name)


def test_a_damaged_graph_is_a_device_error():
    with pytest.raises(DeviceError, match="OpenVINO failed"):
        OpenVinoEngine(np.zeros(100, np.uint8), ["fc"], "fp32")


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 6, 16, 64])
def test_there_are_never_more_streams_than_cores(cores):
    assert 1 <= openvino_engine._streams(cores) <= cores


# --- which backend --------------------------------------------------------------------


def test_auto_is_openvino_on_a_cpu_and_torch_where_it_is_not_installed(monkeypatch):
    assert find_backend("auto", "cpu") == "openvino"
    monkeypatch.setattr(engine, "cuda_cards", lambda: 0)
    assert find_backend("auto", "auto") == "openvino"
    monkeypatch.setattr(engine, "find_spec", lambda _name: None)
    assert find_backend("auto", "cpu") == "torch"
    with pytest.raises(UsageError, match="'openvino' is not installed"):
        find_backend("openvino", "cpu")


def test_auto_is_torch_where_there_is_a_card(monkeypatch):
    monkeypatch.setattr(engine, "cuda_cards", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert find_backend("auto", "auto") == find_backend("auto", "cuda:0") == "torch"
    assert find_backend("openvino", "auto") == find_backend("auto", "cpu") == "openvino"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_backend("auto", "auto") == "openvino"  # torch was built without CUDA


def test_openvino_on_a_card_is_refused():
    with pytest.raises(UsageError, match="'openvino' runs on the CPU, not on 'cuda'"):
        find_backend("openvino", "cuda")


class Driver:
    """A driver that answers with `status`, and sees two cards."""

    def __init__(self, status):
        self.status = status

    def cuInit(self, _flags):  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = 2
        return 0


@pytest.mark.parametrize(("status", "cards"), [(0, 2), (100, 0)])
def test_cards_are_counted_by_the_driver(status, cards, monkeypatch):
    monkeypatch.setattr(engine.ctypes, "CDLL", lambda _name: Driver(status))
    assert engine.cuda_cards() == cards


def test_without_a_driver_there_are_no_cards(monkeypatch):
    def no_such_library(name):
        raise OSError(name)

    monkeypatch.setattr(engine.ctypes, "CDLL", no_such_library)
    assert engine.cuda_cards() == 0
