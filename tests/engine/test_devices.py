"""Devices and precisions by name, and the backends for them."""

from __future__ import annotations

import pytest
import torch

from r2ncli import engine
from r2ncli.engine import cpu_has_bf16, find_backend
from r2ncli.engine.devices import find_devices, find_precision
from r2ncli.errors import DeviceError, UsageError

# --- devices --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:", "cuda:x", "cuda:-1", "cuda:01", "", "CPU"])
def test_an_unknown_device_is_refused_with_those_there_are(name):
    with pytest.raises(DeviceError, match=r"expected auto, cpu") as caught:
        find_devices(name)
    assert repr(name) in str(caught.value)
    assert caught.value.exit_code == 5


def test_a_device_number_must_be_in_decimal_digits():
    with pytest.raises(DeviceError, match="no device 'cuda:²'"):
        find_devices("cuda:²")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:99"])
def test_a_gpu_where_there_is_none_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=f"{name}'.* sees 0 CUDA cards. There are: cpu$"):
        find_devices(name)
    assert find_devices("auto") == (torch.device("cpu"),)


def test_a_gpu_beyond_the_last_is_refused_with_those_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=r"sees 2 CUDA cards\. There are: cpu, cuda:0, cuda:1$"):
        find_devices("cuda:99")


def test_auto_is_one_gpu_and_cuda_is_all_of_the_first_ones_model(monkeypatch):
    models = ["NVIDIA H200", "NVIDIA T4", "NVIDIA H200"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: models[card.index])
    first, second, third = (torch.device(f"cuda:{card}") for card in range(3))
    assert find_devices("auto") == (first,)
    assert find_devices("cuda") == (first, third)
    assert find_devices("cuda:1") == (second,)
    assert find_devices("cpu") == (torch.device("cpu"),)


# --- precisions -----------------------------------------------------------------------


@pytest.mark.parametrize(("has_bf16", "able"), [(True, ["bf16", "fp32"]), (False, ["fp32"])])
def test_auto_is_bfloat16_only_where_the_processor_has_it(has_bf16, able, monkeypatch):
    monkeypatch.setattr(engine, "cpu_has_bf16", lambda: has_bf16)
    cpu = torch.device("cpu")
    assert find_precision("auto", cpu) == able[0]
    assert [find_precision(name, cpu) for name in able] == able


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


# --- backends -------------------------------------------------------------------------


def test_auto_is_openvino_on_a_cpu_and_torch_where_it_is_not_installed(monkeypatch):
    assert find_backend("auto", "cpu") == "openvino"
    monkeypatch.setattr(engine, "cuda_cards", lambda: 0)
    assert find_backend("auto", "auto") == "openvino"
    monkeypatch.setattr(engine, "find_spec", lambda _name: None)
    assert find_backend("auto", "cpu") == "torch"
    with pytest.raises(UsageError, match="'openvino' is not installed"):
        find_backend("openvino", "cpu")


def test_auto_is_torch_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(engine, "cuda_cards", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert find_backend("auto", "auto") == find_backend("auto", "cuda:0") == "torch"
    assert find_backend("openvino", "auto") == find_backend("auto", "cpu") == "openvino"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_backend("auto", "auto") == "openvino"  # torch was built without CUDA


def test_openvino_on_a_gpu_is_refused():
    with pytest.raises(UsageError, match="'openvino' runs on the CPU, not on 'cuda'"):
        find_backend("openvino", "cuda")


class Driver:
    """A driver that answers with `status`, and sees two GPUs."""

    def __init__(self, status):
        self.status = status

    def cuInit(self, _flags):  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = 2
        return 0


@pytest.mark.parametrize(("status", "cards"), [(0, 2), (100, 0)])
def test_gpus_are_counted_by_the_driver(status, cards, monkeypatch):
    monkeypatch.setattr(engine.ctypes, "CDLL", lambda _name: Driver(status))
    assert engine.cuda_cards() == cards


def test_without_a_driver_there_are_no_gpus(monkeypatch):
    def no_such_library(name):
        raise OSError(name)

    monkeypatch.setattr(engine.ctypes, "CDLL", no_such_library)
    assert engine.cuda_cards() == 0
