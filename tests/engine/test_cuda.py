"""The CUDA engine: most tests run it on CPU devices, some need a GPU."""

from __future__ import annotations

import gc
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import h5py
import numpy as np
import pytest
import torch
from support.engines import (
    CPU,
    FULL,
    SMALL,
    cuda_engine,
    global_state,
    noise,
    normalised,
    plain_outputs,
    pooled,
)
from support.reference_weights import TINY, reference_network, relative_error

import r2ncli
from r2ncli.architectures import PUBLISHED
from r2ncli.bench import bench
from r2ncli.engine import POOLS, cuda, pytorch
from r2ncli.engine.cuda import SLOTS, CudaEngine, suitable_batch_size
from r2ncli.engine.devices import exact_settings, out_of_memory
from r2ncli.engine.folding import FoldedNetwork
from r2ncli.engine.gpus import find_gpus, gpu_precisions
from r2ncli.errors import DeviceError
from r2ncli.options import RunOptions
from r2ncli.outputs.results import read_record, read_rows

GIB = 2**30


class LittleMemory(FoldedNetwork):
    """A real network that fails as torch does beyond `holds` images."""

    holds = 1000

    def __call__(self, pixels):
        if len(pixels) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().__call__(pixels)


@pytest.fixture
def memory(monkeypatch):
    """The class of every network that is built; its `holds` may be changed."""
    kind = type("LittleMemory", (LittleMemory,), {})
    monkeypatch.setattr(cuda, "FoldedNetwork", kind)
    return kind


# --- the same numbers, whoever calls ------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2])
def test_calls_of_many_threads_get_their_own_rows(devices):
    network = reference_network(TINY["v1"])
    run = cuda_engine(network, ["fc", "layer2"], devices=[CPU] * devices)
    batches = [noise(3, seed=seed) for seed in range(24)]
    alone = pytorch.TorchEngine(
        network, ["fc", "layer2"], "none", SMALL, precision="fp32", batch_size=3
    )
    with ThreadPoolExecutor(2 * SLOTS * devices) as threads:  # more than there are slots
        together = list(threads.map(run, batches))
    for outputs, pixels in zip(together, batches, strict=True):
        for name, rows in alone(pixels).items():
            assert np.array_equal(outputs[name], rows)


def test_reusing_a_slot_does_not_change_outputs_given_earlier():
    run = cuda_engine(outputs=["fc", "layer1"])
    pixels = noise(3)
    first = run(pixels)
    kept = {name: array.copy() for name, array in first.items()}
    for seed in range(1, 2 * SLOTS):
        run(noise(3, seed=seed))
    assert all(np.array_equal(first[name], kept[name]) for name in kept)
    assert all(array.flags.writeable and array.flags.owndata for array in first.values())
    assert np.array_equal(pixels, noise(3))


def test_a_busy_gpu_does_not_delay_the_others():
    run = cuda_engine(devices=[CPU, CPU])
    busy, go_on = threading.Event(), threading.Event()

    def wait(_module, _inputs):
        busy.set()
        assert go_on.wait(60)

    run._gpus[0]._network.modules.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as thread:
        held = thread.submit(run, noise(3))
        assert busy.wait(60)
        free = run(noise(3))
        assert not held.done()
        go_on.set()
        assert np.array_equal(held.result()["fc"], free["fc"])


def test_the_first_batches_are_spread_over_the_gpus():
    run = cuda_engine(devices=[CPU, CPU])
    slots = [run._idle.get() for _ in range(run.description.streams)]
    assert [slot.gpu for slot in slots] == run._gpus * SLOTS


def test_a_batchs_memory_outlives_its_engine():
    run = cuda_engine(batch_size=2)
    pixels = run.empty_batch(64)
    assert (pixels.shape, pixels.dtype) == ((2, 64, 64, 3), np.uint8)
    assert pixels.flags.c_contiguous
    pixels[...] = 7
    del run
    gc.collect()
    assert (pixels == 7).all()


def test_a_batch_that_memory_cannot_hold_is_an_error_that_says_so():
    with pytest.raises(
        DeviceError, match=r"can be pinned for batches of 3 \(cpu:0\).*`batch_size`"
    ):
        cuda_engine().empty_batch(10**9)


def test_settings_that_change_a_gpus_values_are_set_for_a_call_and_put_back():
    backends = torch.backends
    places = (
        (backends.cudnn, "benchmark", True, False),
        (backends.cudnn, "deterministic", False, True),
        (backends.cuda.matmul, "allow_fp16_accumulation", True, False),
        (backends.cuda.matmul, "fp32_precision", "tf32", "ieee"),
        (backends.cudnn.conv, "fp32_precision", "tf32", "ieee"),
    )
    original = [getattr(place, name) for place, name, _, _ in places]
    try:
        for place, name, users, _ in places:
            setattr(place, name, users)
        with exact_settings(torch.device("cuda:0")):
            assert [getattr(place, name) for place, name, _, _ in places] == [
                ours for _, _, _, ours in places
            ]
        assert [getattr(place, name) for place, name, _, _ in places] == [
            users for _, _, users, _ in places
        ]
    finally:
        for (place, name, _, _), value in zip(places, original, strict=True):
            setattr(place, name, value)


# --- what runs ----------------------------------------------------------------------------


def test_the_gpus_are_named_by_their_numbers():
    gpus = [torch.device(f"cuda:{number}") for number in (0, 2, 3)]
    assert cuda._names(gpus[:1]) == "cuda:0"
    assert cuda._names(gpus) == "cuda:0,2,3"


@pytest.mark.parametrize(
    ("capability", "able"),
    [((9, 0), ("bf16", "fp16", "fp32")), ((7, 5), ("fp16", "fp32"))],
)
def test_a_gpus_first_precision_is_the_fastest_that_keeps_top1(capability, able, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _gpu: capability)
    assert gpu_precisions("cuda:0") == able


@pytest.mark.parametrize(
    ("model", "gib", "side", "output_bytes", "expected"),
    [
        ("NVIDIA H200", 140, 224, 4000, 512),
        ("NVIDIA H100 80GB HBM3", 79, 224, 4000, 256),
        ("NVIDIA A100-SXM4-80GB", 79, 224, 4000, 256),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.5, 224, 4000, 64),
        ("Tesla T4", 14.6, 224, 4000, 64),
        ("NVIDIA GeForce RTX 4090", 23.5, 224, 4000, 256),
        ("NVIDIA L40S", 44, 224, 4000, 256),
        ("a GPU of next year", 300, 224, 4000, 512),
        ("NVIDIA GeForce GTX 1050", 2, 224, 4000, 64),
        ("NVIDIA H100 80GB HBM3", 79, 448, 4000, 64),
        ("NVIDIA H100 80GB HBM3", 79, 256, 4000, 128),
        ("NVIDIA H100 80GB HBM3", 79, 32, 4000, 512),
        ("NVIDIA GeForce GTX 1050", 2, 4096, 4000, 1),
        ("NVIDIA H200", 140, 224, 4 * 64 * 112 * 112, 128),
        ("NVIDIA H200", 140, 224, 2**40, 1),
    ],
)
def test_the_batch_size_follows_from_gpu_and_image_size(model, gib, side, output_bytes, expected):
    assert suitable_batch_size(model, int(gib * GIB), side, output_bytes) == expected


# --- too little memory --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "holds", "executed"), [(8, 8, None), (8, 7, 4), (8, 3, 2), (7, 3, 3), (5, 1, 1)]
)
def test_a_batch_that_a_gpu_cannot_hold_is_computed_in_halves(memory, batch_size, holds, executed):
    network, pixels = reference_network(TINY["v1b"]), noise(batch_size)
    expected = cuda_engine(network, ["fc", "layer3"], batch_size=batch_size)(pixels)
    memory.holds = holds
    run = cuda_engine(network, ["fc", "layer3"], batch_size=batch_size)
    assert run.description.batch_size == batch_size
    assert run.description.executed_batch_size == executed
    for _ in range(2):
        for name, rows in run(pixels).items():
            assert relative_error(rows, expected[name]) < 1e-5


def test_memory_that_runs_out_in_the_middle_loses_no_row(memory):
    network = reference_network(TINY["v1"])
    run = cuda_engine(network, batch_size=4, devices=[CPU, CPU])
    batches = [noise(4, seed=seed) for seed in range(12)]
    expected = [run(pixels)["fc"] for pixels in batches]
    assert run.description.executed_batch_size is None
    memory.holds = 1
    with ThreadPoolExecutor(run.description.streams) as threads:
        halved = [outputs["fc"] for outputs in threads.map(run, batches)]
    assert run.description.executed_batch_size == 1
    for ours, rows in zip(halved, expected, strict=True):
        assert relative_error(ours, rows) < 1e-5


def test_memory_for_not_even_one_image_is_an_error_that_names_the_device(memory):
    run = cuda_engine(batch_size=4)
    memory.holds = 0
    for _ in range(SLOTS + 1):  # no call waits for a slot that is not given back
        with pytest.raises(DeviceError, match=r"^cpu:0 \(.*\): out of memory at batch size 4; "):
            run(noise(4))
    with pytest.raises(DeviceError, match=r"^cpu:0 \(.*\): out of memory .* `batch_size`"):
        cuda_engine(batch_size=4)
    memory.holds = 1000
    assert np.isfinite(run(noise(4))["fc"]).all()


def test_outputs_of_a_call_that_failed_are_not_kept(memory):
    run = cuda_engine(outputs=["layer1", "fc"], batch_size=2)
    network = run._gpus[0]._network

    def fail(_module, _inputs):
        raise torch.OutOfMemoryError("no room for layer2")

    hook = network.modules.layer2.register_forward_pre_hook(fail)
    with pytest.raises(DeviceError):
        run(noise(2))
    hook.remove()
    assert list(run(noise(2))) == ["layer1", "fc"]
    assert vars(network._captured) == {}


def test_only_too_little_memory_halves_a_batch():
    run = cuda_engine(batch_size=4)
    for failure, kind, words in (
        (torch.AcceleratorError("unplugged"), DeviceError, r"^cpu:0 \(.*\) failed: unplugged"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ):

        def fail(_module, _inputs, failure=failure):
            raise failure

        hook = run._gpus[0]._network.modules.register_forward_pre_hook(fail)
        with pytest.raises(kind, match=words):
            run(noise(4))
        hook.remove()
    assert run.description.executed_batch_size is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("no room"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("a bug"), False),
    ],
)
def test_too_little_memory_is_known_by_its_names(error, expected):
    assert out_of_memory(error) == expected


def test_too_little_memory_within_a_capture_is_known_though_the_capture_fails_too():
    def capture():
        try:
            raise torch.OutOfMemoryError("no room")
        finally:
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error")

    with pytest.raises(torch.AcceleratorError) as caught:
        capture()
    assert out_of_memory(caught.value)


# --- a run on several devices -------------------------------------------------------------


@pytest.fixture
def two_devices(monkeypatch):
    """The backend torch is this engine, on two CPU devices."""
    monkeypatch.setattr(pytorch, "TorchEngine", partial(CudaEngine, devices=[CPU, CPU]))
    return {"backend": "torch", "device": "cpu", "precision": "fp32"}


def test_rows_of_several_devices_come_in_input_order(pictures, tiny_weights, two_devices):
    options = {"weights": tiny_weights, "batch_size": 3, "layers": ["layer2"]}
    ours = list(r2ncli.extract(pictures, **options, **two_devices))
    assert [row.path for row in ours] == [f"{pictures}/{n:05d}.jpg" for n in range(20)]
    plain = r2ncli.extract(pictures, **options, device="cpu", backend="openvino", precision="fp32")
    for row, other in zip(ours, plain, strict=True):
        assert relative_error(row.features["layer2"], other.features["layer2"]) < 1e-5


def logits_of(out):
    """The rows of a CSV of one class, or of features, as an array."""
    if out.suffix == ".h5":
        with h5py.File(out) as file:
            return file["features/layer2"][:]
    return np.array([row.predictions[0].probability for row in read_rows(out)])


@pytest.mark.parametrize("kind", ["csv", "h5"])
@pytest.mark.parametrize(
    ("row", "executed"), [(0, 2), (9, 1)], ids=["at the start", "in the middle"]
)
def test_the_record_of_a_run_says_that_batches_were_halved(
    tmp_path, make_pictures, tiny_weights, two_devices, memory, kind, row, executed
):
    pictures = make_pictures(tmp_path / "many", 80)  # far more than are under way at a time
    write = r2ncli.classify_to if kind == "csv" else partial(r2ncli.extract_to, layers=["layer2"])
    options = {"weights": tiny_weights, "batch_size": 4, "workers": 1} | two_devices
    whole, halved = tmp_path / f"whole.{kind}", tmp_path / f"halved.{kind}"
    record = write(whole, pictures, **options)
    assert "executed_batch_size" not in record

    def run_out(progress):
        if 0 < row <= progress.done:
            memory.holds = 1

    if row == 0:
        memory.holds = 3
    again = write(halved, pictures, on_progress=run_out, **options)
    assert again["batch_size"] == 4
    assert again["executed_batch_size"] == executed
    assert read_record(halved) == again
    assert again["fingerprint"] == record["fingerprint"]
    assert relative_error(logits_of(halved), logits_of(whole)) < 1e-5


def test_a_resumed_record_keeps_that_earlier_batches_were_halved(
    tmp_path, pictures, tiny_weights, two_devices, memory
):
    options = {"weights": tiny_weights, "batch_size": 4} | two_devices
    out = tmp_path / "x.csv"

    def stop(progress):
        if progress.done >= 2:
            raise KeyboardInterrupt

    memory.holds = 3
    with pytest.raises(KeyboardInterrupt):
        r2ncli.classify_to(out, pictures, on_progress=stop, **options)
    begun = json.loads((tmp_path / "x.csv.partial" / "run.json").read_text())
    assert begun["executed_batch_size"] == 2
    memory.holds = 1000
    record = r2ncli.classify_to(out, pictures, resume=True, **options)
    assert record["executed_batch_size"] == 2
    (pictures / "00003.jpg").write_bytes(b"")
    r2ncli.classify_to(out, pictures, overwrite=True, **options)
    memory.holds = 1
    r2ncli.classify_to(out, pictures, overwrite=True, **options)
    memory.holds = 1000
    record = r2ncli.classify_to(out, pictures, retry_failed=True, **options)
    assert record["executed_batch_size"] == 1


def test_a_run_goes_on_with_another_number_of_devices(
    tmp_path, pictures, tiny_weights, two_devices, monkeypatch
):
    options = {"weights": tiny_weights, "batch_size": 4} | two_devices
    whole, out = tmp_path / "whole.csv", tmp_path / "x.csv"
    record = r2ncli.classify_to(whole, pictures, **options)

    def stop(progress):
        if progress.done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        r2ncli.classify_to(out, pictures, on_progress=stop, **options)
    monkeypatch.setattr(pytorch, "TorchEngine", partial(CudaEngine, devices=[CPU]))
    resumed = r2ncli.classify_to(out, pictures, resume=True, **options)
    assert (record["device"]["name"], resumed["device"]["name"]) == ("cpu:0,0", "cpu:0")
    assert out.read_bytes() == whole.read_bytes()


# --- GPUs --------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
needs_two_gpus = pytest.mark.skipif(
    not torch.cuda.is_available() or len(find_gpus("cuda")) < 2,
    reason="there are no two GPUs of one model",
)


TOLERANCES = {"fp32": 1e-4, "fp16": 3e-3, "bf16": 1e-2}  # relative to the plain network in fp32


def gpu_engine(network=None, outputs=("fc",), pool="none", name="auto", **options):
    """An engine in float32, of GPUs."""
    devices = [torch.device(gpu) for gpu in find_gpus(name)]
    return cuda_engine(network, outputs, pool, **{"devices": devices} | options)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_gpu_gives_the_logits_of_every_published_network(name):
    network, pixels = reference_network(name), noise(2, 224)
    with torch.no_grad():
        expected = network(normalised(pixels, FULL))
    for precision in gpu_precisions(find_gpus("auto")[0]):
        run = gpu_engine(network, batch_size=2, preprocessing=FULL, precision=precision)
        assert run.description.precision == precision
        assert relative_error(run(pixels)["fc"], expected) < TOLERANCES[precision], precision


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rows_of_several_batches_on_gpus_come_in_input_order(pictures, tiny_weights, precision):
    options = {"weights": tiny_weights, "batch_size": 3, "layers": ["layer2"]}
    ours = list(r2ncli.extract(pictures, device="cuda", precision=precision, **options))
    assert [row.path for row in ours] == [f"{pictures}/{n:05d}.jpg" for n in range(20)]
    plain = list(r2ncli.extract(pictures, device="cpu", precision="fp32", **options))
    for number, row in enumerate(ours):
        errors = [relative_error(row.features["layer2"], p.features["layer2"]) for p in plain]
        assert np.argmin(errors) == number
        assert errors[number] < TOLERANCES[precision]


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_row_does_not_depend_on_its_neighbours_or_its_place_in_the_batch(precision):
    run = gpu_engine(
        reference_network("res2net50_v1b_26w_4s"), preprocessing=FULL,
        batch_size=8, precision=precision,
    )  # fmt: skip
    pixels = noise(8, 224)
    expected = run(pixels)["fc"]
    for shift in range(8):
        assert np.array_equal(run(np.roll(pixels, shift, axis=0))["fc"][shift], expected[0])
    others = noise(8, 224, seed=1)
    others[2] = pixels[5]
    assert np.array_equal(run(others)["fc"][2], expected[5])


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("architecture", TINY.values(), ids=TINY)
@pytest.mark.parametrize("pool", POOLS)
def test_a_gpu_gives_every_layer(architecture, pool):
    network, pixels = reference_network(architecture), noise(3)
    expected = plain_outputs(network, normalised(pixels))
    outputs = gpu_engine(network, list(expected), pool)(pixels)
    assert list(outputs) == list(expected)
    for layer, array in outputs.items():
        assert relative_error(array, pooled(expected[layer], pool)) < 1e-4, layer


@pytest.mark.cuda
@needs_gpu
def test_a_replay_gives_what_the_network_gives_without_a_graph():
    run = gpu_engine(reference_network(TINY["v1b"]), ["fc", "layer2"], batch_size=8)
    (gpu,) = run._gpus
    assert isinstance(gpu._graph, torch.cuda.CUDAGraph)
    pixels = noise(8)
    outputs = run(pixels)
    with torch.inference_mode(), exact_settings(gpu._device):
        plain = gpu._network(torch.from_numpy(pixels).to(gpu._device))
    for name, rows in outputs.items():
        assert relative_error(rows, plain[name].cpu()) < 1e-6


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("from_pinned", [True, False], ids=["pinned", "pageable"])
def test_batches_that_overlap_on_a_gpu_do_not_mix(from_pinned):
    run = gpu_engine(reference_network(TINY["v1b"]), ["fc", "layer1"], name="cuda", batch_size=64)
    batches = [noise(64, seed=seed) for seed in range(8)]
    expected = [run(pixels) for pixels in batches]

    def repeat(thread):
        pixels = run.empty_batch(64) if from_pinned else np.empty((64, 64, 64, 3), np.uint8)
        for number in range(40):
            pixels[...] = batches[(thread + number) % 8]
            outputs = run(pixels)
            for name, rows in expected[(thread + number) % 8].items():
                assert np.array_equal(outputs[name], rows)

    count = run.description.streams + 2
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(repeat, range(count)))


@pytest.mark.cuda
@needs_gpu
def test_a_batchs_memory_is_pinned_where_a_gpu_reads_it():
    run = gpu_engine()
    assert torch.from_numpy(run.empty_batch(64)).is_pinned()
    assert all(pinned.is_pinned() for pinned in run._idle.get().pinned.values())


@pytest.mark.cuda
@needs_gpu
def test_other_threads_may_use_a_gpu_while_a_graph_is_captured():
    stop, rounds = threading.Event(), []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                rounds.append(torch.ones(1_000_000 + len(rounds), device="cuda").sum().item())

    with ThreadPoolExecutor(1) as thread:
        working = thread.submit(work)
        outputs = [gpu_engine()(noise(3))["fc"] for _ in range(5)]
        stop.set()
        working.result()
    assert rounds
    assert all(np.array_equal(rows, outputs[0]) for rows in outputs)


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_built_again_gives_the_same_bytes(precision):
    network, pixels = reference_network("res2net50_v1b_26w_4s"), noise(8, 224)
    options = {"batch_size": 8, "preprocessing": FULL, "precision": precision}
    first, second = (gpu_engine(network, **options)(pixels)["fc"] for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.cuda
@needs_gpu
def test_a_gpu_leaves_torchs_global_state_as_it_was():
    before = global_state(), torch.cuda.current_device(), torch.cuda.current_stream()
    gpu_engine(name="cuda")(noise(3))
    after = global_state(), torch.cuda.current_device(), torch.cuda.current_stream()
    assert after == before


@pytest.mark.cuda
@needs_gpu
def test_a_gpu_with_little_memory_computes_in_halves():
    network, pixels = reference_network("res2net50_v1b_26w_4s"), noise(256, 224)
    options = {"batch_size": 256, "preprocessing": FULL, "precision": "fp16"}
    expected = gpu_engine(network, **options)(pixels)["fc"]
    gc.collect()
    torch.cuda.empty_cache()
    memory = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.5 * GIB / memory, 0)
    try:
        run = gpu_engine(network, **options)
        assert run.description.executed_batch_size < 256
        assert relative_error(run(pixels)["fc"], expected) < 3e-3
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


@pytest.mark.cuda
@needs_two_gpus
def test_several_gpus_give_the_same_rows():
    network = reference_network(TINY["v1b"])
    run, alone = gpu_engine(network, name="cuda"), gpu_engine(network, name="cuda:0")
    assert run.description.device_kind == alone.description.device_kind == "cuda"
    assert run.description.device_model == alone.description.device_model
    batches = [noise(3, seed=seed) for seed in range(24)]
    with ThreadPoolExecutor(run.description.streams) as threads:
        together = [outputs["fc"] for outputs in threads.map(run, batches)]
    for rows, pixels in zip(together, batches, strict=True):
        assert np.array_equal(rows, alone(pixels)["fc"])


@pytest.mark.cuda
@needs_gpu
def test_bench_measures_all_gpus_together(pictures, tiny_weights):
    report = bench(
        [pictures], options=RunOptions(device="cuda"), weights=tiny_weights, precisions=["fp32"],
        batch_sizes=[2], seconds=0.02,
    )  # fmt: skip
    assert report.engine.streams == SLOTS * len(find_gpus("cuda"))
    assert all(speed.matmul_share > 0 for speed in report.model)
