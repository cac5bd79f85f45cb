"""What OpenVINO's engine does of its own: its graph, its streams, and what it executes."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.engines import SMALL, needs_bf16, noise, openvino_engine
from support.reference_weights import TINY, reference_network

from r2ncli.engine import base, openvino
from r2ncli.engine.graph import to_graph
from r2ncli.engine.openvino import OpenVinoEngine
from r2ncli.errors import DeviceError, UsageError
from r2ncli.model import conv_bn_pairs


def test_the_graph_ends_at_the_deepest_layer():
    network = reference_network(TINY["v1b"])
    before = ("conv1", "bn1", "layer1", "layer2")
    graph = to_graph(network, ["layer1", "layer2"], "none", SMALL, 1)
    convolutions = [node for node in graph.get_ops() if node.get_type_name() == "Convolution"]
    wanted = [conv for conv, _ in conv_bn_pairs(network) if conv.startswith(before)]
    assert len(convolutions) == len(wanted)


def test_a_row_does_not_depend_on_the_stream_or_how_many_there_are():
    network = reference_network(TINY["v1b"])
    batches = [noise(3, seed=seed) for seed in range(12)]
    one, several = (openvino_engine(network, ["fc", "layer2"], "avg", streams=n) for n in (1, 3))
    expected = [one(pixels) for pixels in batches]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(several, batches))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


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


def test_there_are_as_many_streams_as_asked_for_but_no_more_than_cores() -> None:
    description = openvino_engine(reference_network(TINY["v1"]), streams=2).description
    assert description.streams == min(2, base.cores())
    assert 1 <= description.stream_threads <= base.cores()


@needs_bf16
def test_a_precision_that_does_not_run_is_refused(monkeypatch):
    network = reference_network(TINY["v1"])
    monkeypatch.setitem(openvino._HINTS, "bf16", "f32")
    with pytest.raises(
        UsageError, match="`precision=bf16` is not supported on cpu: OpenVINO executes fp32"
    ):
        openvino_engine(network, precision="bf16")


def test_a_corrupted_graph_is_a_device_error():
    with pytest.raises(DeviceError, match="OpenVINO failed"):
        OpenVinoEngine(np.zeros(100, np.uint8), ["fc"], "fp32")


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 6, 16, 64])
def test_there_are_never_more_streams_than_cores(cores):
    assert 1 <= openvino._streams(cores) <= cores
