"""What bench measures, not how fast it is: a benchmark is no test."""

from __future__ import annotations

import sys
from io import BytesIO
from types import SimpleNamespace

import pytest
from PIL import Image

from r2ncli import bench as benchmark
from r2ncli.bench import bench, generated_jpegs
from r2ncli.errors import CheckpointError, InputNotFoundError, UsageError
from r2ncli.options import RunOptions


@pytest.mark.slow
def test_every_precision_and_batch_size_is_measured_once(pictures, tiny_weights):
    report = bench(
        [pictures], weights=tiny_weights, precisions=["fp32", "fp32"], batch_sizes=[1, 3],
        seconds=0.02,
    )  # fmt: skip
    assert [(m.precision, m.batch_size) for m in report.model] == [("fp32", 1), ("fp32", 3)]
    for speed in report.model:
        assert 0 < speed.latency_p50_ms <= speed.latency_p90_ms
        assert speed.latency_p90_ms <= speed.latency_p95_ms <= speed.latency_p99_ms
        assert speed.images_per_second > 0
        assert speed.flops_per_second > 0
        assert speed.matmul_share > 0
    assert report.peak_resident_mb > 100  # torch alone is more


@pytest.mark.slow
def test_every_stage_is_measured_and_the_slowest_is_the_bottleneck(pictures, tiny_weights):
    report = bench([pictures], weights=tiny_weights, precisions=["fp32"], seconds=0.02)
    rates = {stage.stage: stage.images_per_second for stage in report.stages}
    assert list(rates) == ["read+decode", "forward", "write", "whole"]
    assert rates.pop("whole") > 0
    assert report.bottleneck == min(rates, key=rates.get)
    assert report.weights != "random"


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.slow
def test_the_backend_that_was_named_is_measured(tiny_weights, backend):
    report = bench(
        options=RunOptions(device="cpu", backend=backend), weights=tiny_weights, batch_sizes=[1],
        precisions=["fp32"], seconds=0.01,
    )  # fmt: skip
    assert report.engine.backend == backend


@pytest.mark.slow
def test_without_weights_they_are_random_and_said_so():
    report = bench(precisions=["fp32"], batch_sizes=[1], seconds=0.01)
    assert report.weights == "random"
    assert report.images == "64 generated JPEGs of 500 x 375"


def test_generated_images_are_the_same_each_time_and_sized_like_photographs(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (generated_jpegs(tmp_path / name, count=3) for name in "ab")
    contents = [source.read(1_000_000).content for source in first]
    assert contents == [source.read(1_000_000).content for source in second]
    assert len(set(contents)) == 3
    with Image.open(BytesIO(contents[0])) as image:
        assert image.size == (500, 375)
    assert 40_000 < len(contents[0]) < 160_000


def test_bench_never_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("R2N_WEIGHTS_BASE_URL", "http://127.0.0.1:9/")
    with pytest.raises(CheckpointError, match="nothing was downloaded"):
        bench(weights="res2net50_v1b_26w_4s", seconds=0.01)


@pytest.mark.parametrize(
    "options", [{"seconds": float("nan")}, {"seconds": 0}, {"batch_sizes": [0]}]
)
def test_what_cannot_be_measured_is_a_usage_error(tiny_weights, options):
    with pytest.raises(UsageError):
        bench(weights=tiny_weights, **{"seconds": 0.01, **options})


def test_a_folder_without_images_is_an_error(tmp_path, tiny_weights):
    with pytest.raises(InputNotFoundError):
        bench([tmp_path], weights=tiny_weights, seconds=0.01)


def test_one_path_is_a_sequence_of_one(pictures, tiny_weights):
    report = bench(
        str(pictures), weights=tiny_weights, precisions=["fp32"], batch_sizes=[1], seconds=0.01
    )
    assert report.images == f"20 images of {pictures}"


def test_int8_cannot_be_measured_and_the_error_says_why(tiny_weights):
    with pytest.raises(UsageError, match="bench does not quantise"):
        bench(weights=tiny_weights, precisions=["fp32", "int8"], seconds=0.01)


@pytest.mark.parametrize(("platform", "mb"), [("linux", 102.4), ("darwin", 0.1)])
def test_peak_memory_is_in_megabytes(monkeypatch, platform, mb):
    resource = SimpleNamespace(
        RUSAGE_SELF=0, getrusage=lambda _who: SimpleNamespace(ru_maxrss=100_000)
    )
    monkeypatch.setitem(sys.modules, "resource", resource)
    monkeypatch.setattr(benchmark.sys, "platform", platform)
    assert benchmark._peak_resident_mb() == pytest.approx(mb)


def test_peak_memory_is_unknown_where_the_system_does_not_report_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert benchmark._peak_resident_mb() is None


@pytest.mark.slow
def test_the_json_document_has_its_schema(tiny_weights):
    document = bench(
        weights=tiny_weights, precisions=["fp32"], batch_sizes=[1], seconds=0.01
    ).as_dict()
    assert document["schema"] == 3
    assert {"bottleneck", "images"} <= set(document)
