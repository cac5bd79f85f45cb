"""Which GPUs torch can use, and why it can use none: with stubs of the driver and of torch."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

import r2ncli
from r2ncli.engine import gpus
from r2ncli.engine.gpus import Driver, find_driver, usable_gpus, why_no_gpu

TORCH = f"torch {torch.__version__}"


class Library:
    """A driver's library that supports CUDA 12.4, answers `status`, and sees two GPUs."""

    def __init__(self, status: int) -> None:
        self.status = status

    def cuDriverGetVersion(self, version):  # noqa: N802
        version._obj.value = 12040
        return 0

    def cuInit(self, _flags):  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = 2
        return 0


@pytest.mark.parametrize(("status", "count"), [(0, 2), (100, 0)])
def test_the_driver_says_its_version_and_counts_its_gpus(status, count, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Library(status))
    assert find_driver() == Driver((12, 4), count, status)


@pytest.mark.parametrize("library", [OSError("no such library"), object()])
def test_a_library_that_is_absent_or_another_is_no_driver(library, monkeypatch):
    def load(_name):
        if isinstance(library, OSError):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert find_driver() is None


ONE_GPU, NO_GPU = Driver((13, 0), 1, 0), Driver((13, 0), 0, 100)


@pytest.fixture
def machine(monkeypatch):
    """Return a function that stubs the driver and torch, and what it says then."""

    def stub(
        driver=ONE_GPU, *, cuda="13.0", hip=None, visible=None, available=True,
        capability=(9, 0), built=("sm_75", "sm_80", "sm_90"), platform="linux",
    ):  # fmt: skip
        monkeypatch.setattr(gpus, "find_driver", lambda: driver)
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _gpu: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _gpu: "NVIDIA Stub")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [*built])
        return why_no_gpu()

    return stub


def test_a_gpu_that_torch_can_use_has_no_reason(machine):
    assert machine() is None
    assert r2ncli.why_no_gpu() is None


@pytest.mark.parametrize(
    ("stubs", "reason"),
    [
        ({"driver": None}, "there is no NVIDIA driver"),
        ({"driver": None, "platform": "darwin"}, "GPUs of Apple are not supported"),
        ({"driver": None, "hip": "6.4"}, f"{TORCH} is built for ROCm, which is not tested"),
        (
            {"driver": NO_GPU, "visible": ""},
            "CUDA_VISIBLE_DEVICES is '', which shows none",
        ),
        ({"driver": NO_GPU}, "the NVIDIA driver shows none (CUDA error 100)"),
        (
            {"cuda": None},
            f"{TORCH} is built without CUDA: install the build for CUDA that "
            "https://pytorch.org/get-started/locally names",
        ),
        (
            {"driver": Driver((12, 4), 1, 0)},
            f"the NVIDIA driver is too old: it supports CUDA 12.4, and {TORCH} needs CUDA 13.0. "
            "Update the driver to 580 or newer, or install a torch that is built for CUDA 12",
        ),
        (
            {"available": False},
            f"{TORCH} cannot use the 1 that the NVIDIA driver shows",
        ),
        (
            {"capability": (6, 1)},
            f"{TORCH} has no kernels for NVIDIA Stub (compute capability 6.1; it has them for "
            "sm_75, sm_80, sm_90)",
        ),
    ],
)
def test_what_is_in_the_way_is_said(stubs, reason, machine):
    assert machine(**stubs) == reason


def test_a_driver_of_a_newer_minor_or_major_version_is_fine(machine):
    assert machine(Driver((13, 2), 1, 0)) is None
    assert machine(Driver((14, 0), 1, 0)) is None
    assert machine(Driver((12, 0), 1, 0), cuda="12.8") is None


@pytest.mark.parametrize(
    ("capability", "built", "usable"),
    [
        *(((8, 6), ["sm_80"], True), ((8, 0), ["sm_86"], False), ((9, 0), ["sm_80"], False)),
        *(((12, 1), ["sm_120"], True), ((9, 0), ["sm_90a"], True), ((10, 0), ["sm_90"], False)),
        *(((10, 0), ["compute_90"], True), ((7, 0), ["sm_75", "compute_75"], False)),
        ((9, 0), ["nonsense", ""], False),
    ],
)
def test_a_gpu_is_usable_if_torch_has_kernels_that_run_on_it(machine, capability, built, usable):
    machine(capability=capability, built=built)
    assert usable_gpus() == (("cuda:0",) if usable else ())
