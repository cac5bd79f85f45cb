"""The table of backends: which one runs on which devices, in which precisions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import r2ncli
from r2ncli import engine, predictor
from r2ncli.engine import BACKENDS, Backend, base, choose_backend, choose_precision
from r2ncli.engine.base import cpu_quotas
from r2ncli.engine.gpus import Driver, find_gpus
from r2ncli.errors import DeviceError, UsageError
from r2ncli.options import RunOptions
from r2ncli.predictor import open_predictor

OPENVINO, TORCH = BACKENDS


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that makes the driver and torch report GPUs of these models."""

    def report(*models):
        driver = Driver((13, 0), len(models), 0 if models else 100)
        monkeypatch.setattr(engine.gpus, "find_driver", lambda: driver)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(models))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(models))
        names = {f"cuda:{number}": model for number, model in enumerate(models)}
        monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _gpu: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])

    return report


# --- devices --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "torch", "openvino"])
@pytest.mark.parametrize(
    "name", ["tpu", "cuda:", "cuda:x", "cuda:-1", "cuda:01", "cuda:²", "", "CPU"]
)
def test_an_invalid_device_is_refused_with_the_valid_names(name, backend, gpus):
    gpus()
    with pytest.raises(DeviceError) as caught:
        choose_backend(backend, name)
    assert str(caught.value) == (
        f"`device` {name!r} is not valid: use auto, cpu, cuda or cuda:N (no CUDA GPU was found)"
    )
    assert caught.value.exit_code == 5


def test_an_invalid_device_is_refused_with_the_gpus_that_there_are(gpus):
    gpus("H200", "H200")
    with pytest.raises(DeviceError, match=r"\(CUDA GPUs found: cuda:0, cuda:1\)$"):
        choose_backend("auto", "tpu")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        *(("gpu", "use cuda"), ("CUDA", "use cuda"), ("0", "use cuda:0"), ("1", "use cuda:1")),
        *(("mps", "GPUs of Apple are not supported"), ("rocm", "GPUs of AMD are not tested")),
        ("cuda:0,1", "set CUDA_VISIBLE_DEVICES=0,1 and use cuda"),
    ],
)
def test_an_invalid_device_that_is_often_typed_is_refused_with_a_hint(name, hint, gpus):
    gpus()
    with pytest.raises(DeviceError) as caught:
        choose_backend("auto", name)
    assert str(caught.value) == (
        f"`device` {name!r} is not valid: {hint} (valid: auto, cpu, cuda, cuda:N; "
        "no CUDA GPU was found)"
    )


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:99"])
def test_a_gpu_on_a_machine_without_one_is_refused(name, gpus):
    gpus()
    with pytest.raises(DeviceError) as caught:
        choose_backend("auto", name)
    assert str(caught.value) == (
        f"`device` {name!r} is not available "
        "(no GPU: the NVIDIA driver shows none (CUDA error 100))"
    )


def test_a_gpu_beyond_the_last_is_refused_with_those_that_there_are(gpus):
    gpus("H200", "H200")
    with pytest.raises(DeviceError, match=r"is not available \(torch can use cuda:0, cuda:1\)$"):
        choose_backend("auto", "cuda:99")


def test_auto_is_one_gpu_and_cuda_is_every_gpu_of_the_first_ones_model(gpus):
    gpus("NVIDIA H200", "NVIDIA T4", "NVIDIA H200")
    assert find_gpus("auto") == ("cuda:0",)
    assert find_gpus("cuda") == ("cuda:0", "cuda:2")
    assert find_gpus("cuda:1") == ("cuda:1",)
    assert choose_backend("torch", "cuda") == (TORCH, ("cuda:0", "cuda:2"))
    assert choose_backend("torch", "cpu") == (TORCH, ("cpu",))


# --- precisions -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda row: row.name)
def test_auto_is_bfloat16_only_if_the_processor_has_it(backend, monkeypatch):
    monkeypatch.setattr(base, "cpu_has_bf16", lambda: False)
    assert choose_precision("auto", backend, ("cpu",)) == "fp32"
    monkeypatch.setattr(base, "cpu_has_bf16", lambda: True)
    supported = backend.load().precisions(("cpu",))
    assert choose_precision("auto", backend, ("cpu",)) == supported[0] != "int8"
    assert [choose_precision(name, backend, ("cpu",)) for name in supported] == [*supported]


def test_an_unsupported_precision_is_refused_with_the_supported_ones(monkeypatch, gpus):
    monkeypatch.setattr(base, "cpu_has_bf16", lambda: False)
    for backend, devices, precision, supported in (
        (OPENVINO, ("cpu",), "fp16", "fp32, int8"),
        (OPENVINO, ("cpu",), "bf16", "fp32, int8"),
        (TORCH, ("cpu",), "fp16", "fp32"),
        (TORCH, ("cpu",), "int8", "fp32; `backend=openvino` supports it"),
        (TORCH, ("cuda:0",), "int8", "bf16, fp16, fp32"),
    ):
        gpus("H200")
        with pytest.raises(UsageError) as caught:
            choose_precision(precision, backend, devices)
        assert str(caught.value) == (
            f"`precision={precision}` is not supported on {devices[0]} (supported: {supported})"
        )


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
    monkeypatch.setattr(base.Path, "read_text", lambda _path: f"processor\t: 0\n{flags}\n")
    assert base.cpu_has_bf16() == has


# --- backends -------------------------------------------------------------------------


def test_auto_is_openvino_on_a_cpu_and_torch_if_it_is_not_installed(gpus, monkeypatch):
    gpus()
    assert choose_backend("auto", "cpu") == choose_backend("auto", "auto") == (OPENVINO, ("cpu",))
    monkeypatch.setattr(engine, "find_spec", lambda name: None if name == "openvino" else object())
    assert choose_backend("auto", "cpu") == (TORCH, ("cpu",))
    with pytest.raises(UsageError, match="`backend=openvino` is not installed: pip install"):
        choose_backend("openvino", "cpu")


def test_auto_is_torch_on_a_gpu(gpus, monkeypatch):
    gpus("H200", "H200")
    assert (
        choose_backend("auto", "auto") == choose_backend("auto", "cuda:0") == (TORCH, ("cuda:0",))
    )
    assert choose_backend("openvino", "auto") == (OPENVINO, ("cpu",))
    assert choose_backend("auto", "cpu") == (OPENVINO, ("cpu",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # torch without CUDA
    said = []
    assert choose_backend("auto", "auto", said.append) == (OPENVINO, ("cpu",))
    assert len(said) == 1
    assert said[0].startswith("a GPU is there, but is not used: torch ")


def test_auto_on_a_machine_without_a_gpu_says_nothing_and_does_not_ask_torch(gpus, monkeypatch):
    gpus()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("torch was asked"))
    said = []
    assert choose_backend("auto", "auto", said.append) == (OPENVINO, ("cpu",))
    assert said == []


def test_openvino_on_a_gpu_is_refused():
    with pytest.raises(
        UsageError, match=r"`backend=openvino` does not run on `device=cuda` \(it runs on: cpu\)"
    ):
        choose_backend("openvino", "cuda")


def test_the_devices_are_looked_up_once_for_a_run(tiny_weights, monkeypatch):
    asked = []

    def count(backend, device, on_warning):
        asked.append(device)
        return choose_backend(backend, device, on_warning)

    monkeypatch.setattr(predictor, "choose_backend", count)
    open_predictor(("fc",), RunOptions(weights=tiny_weights, device="cpu", backend="torch"))
    assert asked == ["cpu"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"device": "gpu"}, DeviceError),
        ({"precision": "fp16"}, UsageError),
        ({"backend": "torch", "precision": "int8", "calibration": "nowhere"}, UsageError),
    ],
)
def test_what_needs_no_weights_is_checked_before_they_are_opened(options, error, monkeypatch):
    monkeypatch.setattr(predictor, "open_checkpoint", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(error):
        open_predictor(("fc",), RunOptions(**{"device": "cpu"} | options))


DUMMY = """
import numpy as np
from r2ncli.engine.base import EngineDescription, ReadyNetwork, empty_pixels

def precisions(devices):
    return ("fp16",)

class Engine:
    description = EngineDescription("dummy", "dummy 1.0", "cpu", "none", "fp16", 4)

    def empty_batch(self, side):
        return empty_pixels(4, side)

    def __call__(self, pixels):
        return {"fc": np.tile(np.arange(6, dtype=np.float32), (4, 1))}

def open_network(setup):
    return ReadyNetwork(Engine(), "dummy", 6, {"fc": (6,)})
"""
WITH_DUMMY = """
import r2ncli.engine as engine
engine.BACKENDS = (engine.Backend("dummy", "dummy", ("cpu",), "dummy"), *engine.BACKENDS)
from r2ncli.cli.app import app
app()
"""


def test_a_new_backend_is_one_new_row(pictures, tiny_weights, tmp_path):
    (tmp_path / "dummy.py").write_text(DUMMY)
    path = os.pathsep.join([str(tmp_path), str(Path(r2ncli.__file__).parents[1])])

    def r2n(*arguments):
        return subprocess.run(
            [sys.executable, "-c", WITH_DUMMY, *map(str, arguments)],
            capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
        ).stdout  # fmt: skip

    assert "auto|dummy|openvino|torch" in r2n("classify", "--help")
    out = tmp_path / "out.csv"
    for backend in ("auto", "dummy"):
        options = ("--backend", backend, "--device", "cpu", "--weights", tiny_weights)
        r2n("classify", pictures, *options, "-o", out, "--overwrite", "-q")
        record = json.loads(Path(f"{out}.run.json").read_text())
        assert (record["backend"], record["precision"]) == ("dummy", "fp16")
        assert out.read_text().count(",fox,") == 20


@pytest.mark.parametrize("row", BACKENDS, ids=lambda row: row.name)
def test_every_row_is_installed_and_names_its_module(row):
    assert isinstance(row, Backend)
    assert row.installed
    assert row.runs_on("cpu")
    assert callable(row.load().open_network)


# --- cores ------------------------------------------------------------------------------


@pytest.fixture
def control_groups(tmp_path, monkeypatch):
    """Return a function that writes the control groups of this process, and the quotas found."""

    def written(of_process, files):
        for name, content in {"proc/self/cgroup": of_process, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return cpu_quotas(tmp_path)

    return written


@pytest.mark.parametrize(
    ("of_process", "files", "quotas"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, [1.5]),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, []),
        ("0::/\n", {}, []),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, [0.5]),
        (
            "4:memory:/x\n1:cpu,cpuacct:/docker/1\n",
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",  # as seen in the container
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            [3.0],
        ),
        (
            "1:cpu:/\n",
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            [],
        ),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "nonsense\n"}, []),
    ],
)
def test_a_containers_quota_is_found(control_groups, of_process, files, quotas):
    assert control_groups(of_process, files) == quotas


def test_a_system_without_control_groups_has_no_quota(tmp_path):
    assert cpu_quotas(tmp_path) == []


@pytest.mark.parametrize(
    ("quotas", "asked", "expected"),
    [
        *(([], "", 8), ([1.5], "", 2), ([0.1], "", 1), ([100.0], "", 8), ([3.0, 6.0], "", 3)),
        *(([], "2", 2), ([], "3,2", 3), ([], "16", 8), ([1.0], "4", 1), ([], "0", 1), ([], "x", 8)),
    ],
)
def test_cores_are_limited_by_the_quota_and_by_omp_num_threads(
    monkeypatch, quotas, asked, expected
):
    monkeypatch.setattr(base, "cpu_quotas", lambda: quotas)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert base.cores() == expected
