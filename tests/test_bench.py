"""What bench measures, not how fast it is: a benchmark is no test."""

from __future__ import annotations

from io import BytesIO

import pytest
from PIL import Image

from r2ncli.bench import bench, generated_jpegs
from r2ncli.errors import CheckpointError, InputNotFoundError, UsageError


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


def test_every_stage_is_measured_and_the_slowest_binds(pictures, tiny_weights):
    report = bench([pictures], weights=tiny_weights, precisions=["fp32"], seconds=0.02)
    rates = {stage.stage: stage.images_per_second for stage in report.stages}
    assert list(rates) == ["read+decode", "forward", "write", "whole"]
    assert rates.pop("whole") > 0
    assert report.binding_stage == min(rates, key=rates.get)
    assert report.weights != "random"


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_the_backend_that_was_named_is_measured(tiny_weights, backend):
    options = {"device": "cpu", "batch_sizes": [1], "precisions": ["fp32"], "seconds": 0.01}
    assert bench(weights=tiny_weights, backend=backend, **options).engine.backend == backend


def test_without_weights_they_are_random_and_said_so():
    report = bench(precisions=["fp32"], batch_sizes=[1], seconds=0.01)
    assert report.weights == "random"
    assert report.pictures == "64 generated JPEGs of 500 x 375"


def test_generated_pictures_are_the_same_each_time_and_sized_like_photographs(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (generated_jpegs(tmp_path / name, count=3) for name in "ab")
    contents = [source.read(1_000_000).content for source in first]
    assert contents == [source.read(1_000_000).content for source in second]
    assert len(set(contents)) == 3
    with Image.open(BytesIO(contents[0])) as picture:
        assert picture.size == (500, 375)
    assert 40_000 < len(contents[0]) < 160_000


def test_bench_never_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("R2N_WEIGHTS_BASE_URL", "http://127.0.0.1:9/")
    with pytest.raises(CheckpointError, match="nothing was downloaded"):
        bench(weights="res2net50_v1b_26w_4s", seconds=0.01)


@pytest.mark.parametrize(
    "options", [{"seconds": float("nan")}, {"seconds": 0}, {"batch_sizes": [0]}, {"workers": 0}]
)
def test_what_cannot_be_measured_is_a_usage_error(tiny_weights, options):
    with pytest.raises(UsageError):
        bench(weights=tiny_weights, **{"seconds": 0.01, **options})


def test_a_folder_without_pictures_is_an_error(tmp_path, tiny_weights):
    with pytest.raises(InputNotFoundError):
        bench([tmp_path], weights=tiny_weights, seconds=0.01)
