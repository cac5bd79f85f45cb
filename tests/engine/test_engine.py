"""The engine gives what the plain network gives, whatever is asked of it, and leaves no trace."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.reference_weights import KIT, TINY, reference_input, reference_network, relative_error

from r2ncli import engine
from r2ncli.architectures import PUBLISHED, Preprocessing
from r2ncli.engine import cpu_has_bf16
from r2ncli.engine.devices import exact_settings, find_devices, find_precision
from r2ncli.engine.pytorch import BATCH_SIZE, TorchEngine
from r2ncli.errors import DeviceError, UsageError
from r2ncli.model import layer_shapes

SMALL = Preprocessing(64, 64)
FULL = Preprocessing()

tiny = pytest.mark.parametrize("architecture", TINY.values(), ids=TINY)
needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="this processor has no bfloat16")


def noise(count, size=64, seed=0):
    """Seeded pixels, uint8 [count, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def normalised(pixels, preprocessing=SMALL):
    """What the plain network takes for these pixels, float32 [N, 3, H, W]."""
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    mean, std = (
        torch.tensor(given, dtype=torch.float64).view(3, 1, 1)
        for given in (preprocessing.mean, preprocessing.std)
    )
    return ((values - mean) / std).float()


def fp32(network, outputs=("fc",), pool="none", batch_size=3, preprocessing=SMALL, **options):
    """An engine on the CPU in float32."""
    options = {"precision": "fp32", "batch_size": batch_size} | options
    return TorchEngine(network, outputs, pool, preprocessing, **options)


def plain_outputs(network, x):
    """Every layer's output in the plain network, by name: float32 arrays."""
    network = copy.deepcopy(network)
    seen = {}
    for name in layer_shapes(network.architecture, x.shape[-1]):
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output.numpy().copy()})
        )
    with torch.no_grad():
        network(x)
    return seen


def pooled(array, pool):
    """`array` [N, C, H, W] over its last two axes, as `pool` says."""
    if array.ndim == 2 or pool == "none":
        return array
    return array.mean((2, 3), dtype=np.float64) if pool == "avg" else array.max((2, 3))


# --- the same numbers -----------------------------------------------------------------


@tiny
@pytest.mark.parametrize(("pool", "size"), [("avg", 64), ("max", 64), ("none", 64), ("none", 32)])
def test_all_layers_at_once_are_the_plain_networks(architecture, pool, size):
    network, pixels = reference_network(architecture), noise(3, size)
    expected = plain_outputs(network, normalised(pixels))
    outputs = fp32(network, list(expected), pool)(pixels)
    assert list(outputs) == list(expected)
    for name, array in outputs.items():
        assert array.dtype == np.float32
        assert relative_error(array, pooled(expected[name], pool)) < 1e-5, name


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("v1", "v1b") else pytest.mark.slow) for n in TINY]
)
def test_each_layer_alone_is_the_plain_networks(name):
    network, pixels = reference_network(TINY[name]), noise(1)
    for layer, expected in plain_outputs(network, normalised(pixels)).items():
        outputs = fp32(network, [layer], batch_size=1)(pixels)
        assert list(outputs) == [layer]
        assert relative_error(outputs[layer], expected) < 1e-5, layer


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[] if name in KIT[::2] else pytest.mark.slow) for name in PUBLISHED],
)
def test_published_networks_give_the_plain_logits(variant):
    network, pixels = reference_network(variant), noise(2, 224)
    with torch.no_grad():
        expected = network(normalised(pixels, FULL))
    outputs = fp32(network, ["fc"], batch_size=2, preprocessing=FULL)(pixels)
    assert relative_error(outputs["fc"], expected) < 1e-5


def test_every_layer_of_the_default_network_is_the_plain_networks():
    network, pixels = reference_network("res2net50_v1b_26w_4s"), noise(1, 96)
    expected = plain_outputs(network, normalised(pixels))
    outputs = fp32(network, list(expected), batch_size=1)(pixels)
    assert max(relative_error(outputs[name], expected[name]) for name in expected) < 1e-5


def test_outputs_come_in_the_order_they_were_asked_for():
    outputs = fp32(reference_network(TINY["v1"]), ["fc", "layer1", "layer4", "conv1"])(noise(3))
    assert list(outputs) == ["fc", "layer1", "layer4", "conv1"]


def test_normalisation_is_the_preprocessings():
    network, pixels = reference_network(TINY["v1"]), noise(3)
    other = Preprocessing(64, 64, mean=(0.1, 0.5, 0.9), std=(0.5, 0.25, 1.0))
    outputs = fp32(network, ["conv1"], preprocessing=other)(pixels)
    expected = plain_outputs(network, normalised(pixels, other))["conv1"]
    assert relative_error(outputs["conv1"], expected) < 1e-5


def test_another_size_than_the_preprocessings_is_the_batchs_own():
    network, pixels = reference_network(TINY["v1b"]), noise(3, 57)
    expected = plain_outputs(network, normalised(pixels))
    outputs = fp32(network, ["layer4", "fc"])(pixels)
    assert all(relative_error(outputs[name], expected[name]) < 1e-5 for name in outputs)


# --- a row is its own -----------------------------------------------------------------


@tiny
def test_a_row_does_not_depend_on_its_neighbours_or_its_place(architecture):
    run = fp32(reference_network(architecture), ["fc", "layer4"], "avg", batch_size=8)
    pixels = noise(8)
    together = run(pixels)
    turned = run(np.ascontiguousarray(np.roll(pixels, 3, axis=0)))
    padded = pixels.copy()
    padded[1:] = 0
    alone = run(padded)
    for name, rows in together.items():
        assert relative_error(turned[name][3:], rows[:-3]) < 1e-6
        assert relative_error(alone[name][:1], rows[:1]) < 1e-6


def test_the_same_batch_gives_the_same_bytes():
    run = fp32(reference_network(TINY["v1b"]), ["fc", "layer2"])
    first, second = run(noise(3)), run(noise(3))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_outputs_belong_to_the_caller():
    run = fp32(reference_network(TINY["v1"]), ["fc", "layer1"])
    pixels = noise(3)
    first = run(pixels)
    kept = {name: array.copy() for name, array in first.items()}
    run(noise(3, seed=1))
    assert all(np.array_equal(first[name], kept[name]) for name in kept)
    assert all(array.flags.writeable and array.flags.c_contiguous for array in first.values())
    assert np.array_equal(pixels, noise(3))


@pytest.mark.parametrize("layer", ["fc", "layer2", "bn1", "conv1"])
def test_the_given_network_is_left_as_it_was(layer):
    network = reference_network(TINY["v1b"])
    before, modules = copy.deepcopy(network.state_dict()), repr(network)
    fp32(network, [layer])(noise(3))
    assert repr(network) == modules
    assert not any(module._forward_hooks for module in network.modules())
    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


# --- bfloat16 -------------------------------------------------------------------------


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
    run = fp32(network, ["fc"], batch_size=2, preprocessing=FULL, precision="bf16")
    assert run.description.precision == "bf16"
    outputs = run(pixels)
    assert outputs["fc"].dtype == np.float32
    assert relative_error(outputs["fc"], expected) < 1e-2


# --- no trace -------------------------------------------------------------------------


def global_state():
    """What torch lets a library change behind everyone's back."""
    backends = torch.backends
    return {
        "generic": backends.fp32_precision,
        "cuda": backends.cuda.matmul.fp32_precision,
        "cudnn": backends.cudnn.conv.fp32_precision,
        "mkldnn convolutions": backends.mkldnn.conv.fp32_precision,
        "mkldnn products": backends.mkldnn.matmul.fp32_precision,
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "random": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "benchmark": backends.cudnn.benchmark,
        "deterministic convolutions": backends.cudnn.deterministic,
        "sums in fp16": backends.cuda.matmul.allow_fp16_accumulation,
    }


@pytest.fixture
def fp32_settings():
    """Puts torch's float32 settings back after a test that changes them."""
    places = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)
    generic, before = torch.backends.fp32_precision, [place.fp32_precision for place in places]
    yield
    torch.backends.fp32_precision = generic
    for place, precision in zip(places, before, strict=True):
        place.fp32_precision = precision


def test_a_call_leaves_torchs_global_state_as_it_was():
    before = global_state()
    fp32(reference_network(TINY["v1b"]))(noise(3))
    assert global_state() == before


def test_a_call_in_a_setting_of_the_users_own_leaves_it_as_it_was(fp32_settings):
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    before = global_state()
    with torch.no_grad():
        fp32(reference_network(TINY["v1b"]))(noise(3))
        assert not torch.is_grad_enabled()
    assert global_state() == before


def test_a_setting_that_a_backend_inherits_is_still_inherited_after_a_call(fp32_settings):
    torch.backends.fp32_precision = "bf16"
    fp32(reference_network(TINY["v1"]))(noise(3))
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
    run, meanwhile = fp32(network), []
    run._network.modules.layer1.register_forward_hook(lambda *_: meanwhile.append(global_state()))
    assert relative_error(run(pixels)["fc"], expected) < 1e-5
    assert [state["mkldnn convolutions"] for state in meanwhile] == ["ieee"]
    assert [state["mkldnn products"] for state in meanwhile] == ["ieee"]


def test_another_default_dtype_changes_nothing():
    network, pixels = reference_network(TINY["v1"]), noise(3)
    expected = fp32(network)(pixels)["fc"]
    torch.set_default_dtype(torch.float64)
    try:
        outputs = fp32(network)(pixels)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert outputs["fc"].dtype == np.float32
    assert np.array_equal(outputs["fc"], expected)


def test_engines_in_several_threads_do_not_mix_their_outputs():
    networks = [reference_network(TINY[name]) for name in ("v1", "v1b")]
    pixels = noise(3)
    expected = [fp32(network)(pixels)["fc"] for network in networks]
    same = []

    def repeat(network, logits):
        run = fp32(network)
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
    run, meanwhile, all_at_once = fp32(reference_network(TINY["v1"])), [], threading.Barrier(3)

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


# --- devices and precisions -----------------------------------------------------------


def test_the_description_says_what_runs():
    description = fp32(reference_network(TINY["v1"]), batch_size=None).description
    assert description.backend == "torch"
    assert description.library == f"torch {torch.__version__}"
    assert (description.device, description.device_kind) == ("cpu", "cpu")
    assert description.device_model == engine.cpu_model() != ""
    assert description.precision == "fp32"
    assert description.batch_size == BATCH_SIZE


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:", "cuda:x", "cuda:-1", "cuda:01", "", "CPU"])
def test_an_unknown_device_is_refused_with_those_there_are(name):
    with pytest.raises(DeviceError, match=r"expected auto, cpu") as caught:
        find_devices(name)
    assert repr(name) in str(caught.value)
    assert caught.value.exit_code == 5


def test_a_number_that_is_no_decimal_is_an_unknown_device():
    with pytest.raises(DeviceError, match="no device 'cuda:²'"):
        find_devices("cuda:²")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:99"])
def test_a_card_where_there_is_none_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=f"{name}'.* sees 0 CUDA cards. There are: cpu$"):
        find_devices(name)
    assert find_devices("auto") == (torch.device("cpu"),)


def test_a_card_beyond_the_last_is_refused_with_those_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=r"sees 2 CUDA cards\. There are: cpu, cuda:0, cuda:1$"):
        find_devices("cuda:99")


def test_auto_is_one_card_and_cuda_is_all_of_the_first_ones_model(monkeypatch):
    models = ["NVIDIA H200", "NVIDIA T4", "NVIDIA H200"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: models[card.index])
    first, second, third = (torch.device(f"cuda:{card}") for card in range(3))
    assert find_devices("auto") == (first,)
    assert find_devices("cuda") == (first, third)
    assert find_devices("cuda:1") == (second,)
    assert find_devices("cpu") == (torch.device("cpu"),)


@pytest.mark.parametrize(
    ("has_bf16", "able"), [(True, ["bf16", "fp32"]), (False, ["fp32"])], ids=["bf16", "plain"]
)
def test_a_precision_that_the_processor_cannot_do_is_refused_with_those_it_can(
    has_bf16, able, monkeypatch
):
    monkeypatch.setattr(engine, "cpu_has_bf16", lambda: has_bf16)
    cpu = torch.device("cpu")
    assert find_precision("auto", cpu) == able[0]
    for name in ("fp32", "bf16", "fp16", "int8", "half"):
        if name in able:
            assert find_precision(name, cpu) == name
        else:
            with pytest.raises(UsageError, match=f"'{name}' on cpu.* {', '.join(able)}$"):
                find_precision(name, cpu)


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 fma", True),
        ("flags\t\t: fpu amx_tile amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu avx512f avx2 fma", False),
        ("bugs\t\t: spectre_v1", False),
    ],
)
def test_bfloat16_in_hardware_is_read_from_the_processors_flags(flags, has, monkeypatch):
    monkeypatch.setattr(engine, "_cpuinfo", lambda: ["processor\t: 0", flags])
    assert cpu_has_bf16() == has


def test_an_engine_that_cannot_be_is_refused_before_it_is_built():
    network = reference_network(TINY["v1"])
    with pytest.raises(UsageError, match="fp16"):
        fp32(network, precision="fp16")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (torch.OutOfMemoryError("no room"), "out of memory at batch size 3. .*--batch-size"),
        (torch.AcceleratorError("unplugged"), "failed: unplugged"),
    ],
    ids=["memory", "device"],
)
def test_a_device_that_fails_is_an_error_that_names_it(failure, words):
    def fail(_module, _inputs):
        raise failure

    run = fp32(reference_network(TINY["v1"]))
    run._network.modules.layer3.register_forward_pre_hook(fail)
    with pytest.raises(DeviceError, match=rf"^cpu \(.*\).*{words}"):
        run(noise(3))
