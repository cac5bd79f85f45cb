"""What torch's engine does of its own: settings, threads, streams, and failures."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.engines import (
    global_state,
    needs_bf16,
    noise,
    normalised,
    plain_outputs,
    torch_engine,
)
from support.reference_weights import TINY, reference_network, relative_error

from r2ncli.architectures import Preprocessing
from r2ncli.engine.devices import exact_settings
from r2ncli.engine.pytorch import TorchEngine
from r2ncli.errors import DeviceError


def test_a_batch_may_have_another_size_than_the_preprocessing():
    network, pixels = reference_network(TINY["v1b"]), noise(3, 57)
    expected = plain_outputs(network, normalised(pixels))
    outputs = torch_engine(network, ["layer4", "fc"])(pixels)
    assert all(relative_error(outputs[name], expected[name]) < 1e-5 for name in outputs)


# --- nothing is left changed ------------------------------------------------------------


@pytest.fixture
def fp32_settings():
    """Puts torch's float32 settings back after a test that changes them."""
    places = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)
    generic, before = torch.backends.fp32_precision, [place.fp32_precision for place in places]
    yield
    torch.backends.fp32_precision = generic
    for place, precision in zip(places, before, strict=True):
        place.fp32_precision = precision


def test_a_call_in_a_setting_of_the_users_own_leaves_it_as_it_was(fp32_settings):
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    before = global_state()
    with torch.no_grad():
        torch_engine(reference_network(TINY["v1b"]))(noise(3))
        assert not torch.is_grad_enabled()
    assert global_state() == before


def test_a_setting_that_a_backend_inherits_is_still_inherited_after_a_call(fp32_settings):
    torch.backends.fp32_precision = "bf16"
    torch_engine(reference_network(TINY["v1"]))(noise(3))
    assert torch.backends.mkldnn.conv.fp32_precision == "bf16"
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.mkldnn.conv.fp32_precision == "ieee"


def test_calls_that_overlap_leave_the_setting_as_it_was(fp32_settings):
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    cpu = torch.device("cpu")
    first, second = exact_settings(cpu), exact_settings(cpu)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.backends.mkldnn.conv.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert torch.backends.mkldnn.conv.fp32_precision == "bf16"


def test_float32_is_float32_though_the_user_allows_less(fp32_settings):
    network, pixels = reference_network(TINY["v1b"]), noise(3)
    expected = plain_outputs(network, normalised(pixels))["fc"]
    torch.backends.fp32_precision = "bf16"
    run, meanwhile = torch_engine(network), []
    run._network.modules.layer1.register_forward_hook(lambda *_: meanwhile.append(global_state()))
    assert relative_error(run(pixels)["fc"], expected) < 1e-5
    assert [state["mkldnn convolutions"] for state in meanwhile] == ["ieee"]
    assert [state["mkldnn products"] for state in meanwhile] == ["ieee"]


def test_engines_in_several_threads_do_not_mix_their_outputs():
    networks = [reference_network(TINY[name]) for name in ("v1", "v1b")]
    pixels = noise(3)
    expected = [torch_engine(network)(pixels)["fc"] for network in networks]
    same = []

    def repeat(network, logits):
        run = torch_engine(network)
        same.append(all(np.array_equal(run(pixels)["fc"], logits) for _ in range(10)))

    threads = [
        threading.Thread(target=repeat, args=pair) for pair in zip(networks, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True, True]


@pytest.fixture
def three_threads():
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)  # as `one_thread` has it


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_the_bytes_do_not_depend_on_how_many_threads_torch_has(precision, request):
    network = reference_network(TINY["v1b"])
    batches = [noise(3, 96, seed) for seed in range(9)]

    def run():
        return TorchEngine(
            network, ["fc", "layer2"], "avg", Preprocessing(96, 96),
            precision=precision, batch_size=3,
        )  # fmt: skip

    one = run()
    expected = [one(pixels) for pixels in batches]
    request.getfixturevalue("three_threads")
    several = run()
    assert (one.description.streams, several.description.streams) == (1, 3)
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(several, batches))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_stream_is_one_thread_and_other_threads_keep_what_they_had(three_threads):
    run, meanwhile, all_at_once = (
        torch_engine(reference_network(TINY["v1"])),
        [],
        threading.Barrier(3),
    )

    def look(*_arguments):
        all_at_once.wait()
        meanwhile.append((torch.get_num_threads(), threading.get_ident()))

    run._network.modules.layer1.register_forward_hook(look)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(run, [noise(3)] * 3))
    assert [count for count, _ in meanwhile] == [1, 1, 1]
    assert len({thread for _, thread in meanwhile}) == 3
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as another:
        assert another.submit(torch.get_num_threads).result() == 3


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (torch.OutOfMemoryError("no room"), "out of memory at batch size 3. .*`batch_size`"),
        (torch.AcceleratorError("unplugged"), "failed: unplugged"),
    ],
    ids=["memory", "device"],
)
def test_a_device_that_fails_is_an_error_that_names_it(failure, words):
    def fail(_module, _inputs):
        raise failure

    run = torch_engine(reference_network(TINY["v1"]))
    run._network.modules.layer3.register_forward_pre_hook(fail)
    with pytest.raises(DeviceError, match=rf"^cpu \(.*\).*{words}"):
        run(noise(3))
