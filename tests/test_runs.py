"""One run from arguments to a finished file: record, resume, and what stops it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import h5py
import numpy as np
import pytest
import torch

import r2ncli
from r2ncli import runs
from r2ncli.errors import InputNotFoundError, OutputError, UsageError
from r2ncli.writers import BLOCK_ROWS


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class StopAfterError(Exception):
    """Stands for whatever ends a run in its middle."""


def stop_after(count):
    """An `on_progress` that ends the run after `count` rows."""

    def on_progress(progress):
        if progress.done >= count:
            raise StopAfterError

    return on_progress


def test_classify_to_writes_what_classify_yields(tmp_path, pictures, tiny_weights):
    (pictures / "00003.jpg").write_bytes(b"")
    record = r2ncli.classify_to(tmp_path / "x.csv", pictures, weights=tiny_weights, topk=2)
    rows = read_csv(tmp_path / "x.csv")
    expected = list(r2ncli.classify(pictures, weights=tiny_weights, topk=2))
    assert [row["path"] for row in rows] == [c.path for c in expected]
    for row, c in zip(rows, expected, strict=True):
        assert row["error"] == (c.error or "")
        for rank, p in enumerate(c.predictions, start=1):
            assert int(row[f"index_{rank}"]) == p.index
            assert row[f"label_{rank}"] == p.label
            assert float(np.float32(row[f"probability_{rank}"])) == p.probability
    assert record["counts"] == {"inputs": 20, "ok": 19, "failed": 1}
    assert json.loads((tmp_path / "x.csv.run.json").read_text()) == record


def test_extract_to_writes_what_extract_yields(tmp_path, pictures, tiny_weights):
    (pictures / "00003.jpg").write_bytes(b"")
    layers = ["layer3", "conv1.0"]
    options = {"weights": tiny_weights, "layers": layers, "pool": "none", "precision": "fp32"}
    r2ncli.extract_to(tmp_path / "f.h5", pictures, **options)
    with h5py.File(tmp_path / "f.h5") as file:
        for n, row in enumerate(r2ncli.extract(pictures, **options)):
            assert file["paths"].asstr()[n] == row.path
            for layer in layers:
                values = file["features"][layer][n]
                if row.error:
                    assert np.isnan(values).all()
                else:
                    np.testing.assert_array_equal(values, row.features[layer])


def test_the_record_says_what_ran(tmp_path, pictures, tiny_weights):
    record = r2ncli.extract_to(
        tmp_path / "f.h5", pictures, weights=tiny_weights, layers=["layer2"], precision="fp32",
        batch_size=4, workers=2, image_size=64, max_pixels=10_000,
    )  # fmt: skip
    assert record["schema"] == 1
    assert record["command"] == "extract"
    assert record["checkpoint"]["file"] == str(tiny_weights)
    assert record["checkpoint"]["sha256"] == runs_sha256(tiny_weights)
    assert record["layers"] == ["layer2"]
    assert (record["pool"], record["dtype"]) == ("avg", "float32")
    assert record["preprocessing"]["image_size"] == 64
    assert record["preprocessing"]["resize_size"] == 72
    assert record["decode_rules"]["max_pixels"] == 10_000
    assert (record["precision"], record["batch_size"], record["threads"]) == ("fp32", 4, 2)
    assert record["versions"]["r2n"] == r2ncli.__version__
    assert record["start"] <= record["end"]
    assert set(record["device"]) == {"name", "kind", "model"}


def runs_sha256(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_run_twice_gives_the_same_bytes(tmp_path, pictures, tiny_weights):
    for kind in ("csv", "jsonl", "parquet"):
        outs = [tmp_path / f"{name}.{kind}" for name in "ab"]
        for out in outs:
            r2ncli.classify_to(out, pictures, weights=tiny_weights, workers=3)
        assert outs[0].read_bytes() == outs[1].read_bytes()


def test_the_record_names_pyarrow_where_it_decides_the_bytes(tmp_path, pictures, tiny_weights):
    fingerprints = {}
    for kind in ("csv", "jsonl", "parquet"):
        record = r2ncli.classify_to(tmp_path / f"x.{kind}", pictures, weights=tiny_weights)
        assert ("pyarrow" in record["versions"]) == (kind == "parquet")
        fingerprints[kind] = record["fingerprint"]
    assert fingerprints["csv"] == fingerprints["jsonl"] != fingerprints["parquet"]


def test_parquet_without_its_library_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(UsageError, match="pip install"):
        r2ncli.classify_to(tmp_path / "x.parquet", "nowhere", weights="nothing.pth")


@pytest.mark.parametrize("stop", [1, BLOCK_ROWS, BLOCK_ROWS + 45, 599])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "h5"])
def test_a_resumed_run_ends_with_the_uninterrupted_ones_bytes(
    tmp_path, make_pictures, tiny_weights, monkeypatch, stop, kind
):
    monkeypatch.setattr(runs, "_now", lambda: "2026-01-01T00:00:00+00:00")
    folder = make_pictures(tmp_path / "many", 20)
    for n in range(20, 600):
        os.link(folder / f"{n % 20:05d}.jpg", folder / f"{n:05d}.jpg")
    (folder / "00010.jpg").unlink()
    (folder / "00010.jpg").write_bytes(b"")
    write = r2ncli.extract_to if kind == "h5" else r2ncli.classify_to
    whole, broken = tmp_path / f"whole.{kind}", tmp_path / f"broken.{kind}"
    record = write(whole, folder, weights=tiny_weights)
    with pytest.raises(StopAfterError):
        write(broken, folder, weights=tiny_weights, on_progress=stop_after(stop))
    assert not broken.exists()
    assert len(list((tmp_path / f"broken.{kind}.partial").glob("block-*"))) == -(-stop // 256)
    seen = []
    resumed = write(broken, folder, weights=tiny_weights, resume=True, on_progress=seen.append)
    assert seen[0].done == stop + 1  # what was done is not done again
    assert resumed == record
    assert record["counts"] == {"inputs": 600, "ok": 599, "failed": 1}
    assert broken.read_bytes() == whole.read_bytes()
    assert not (tmp_path / f"broken.{kind}.partial").exists()


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_interrupt_while_a_block_is_written_loses_and_doubles_nothing(
    tmp_path, pictures, tiny_weights, monkeypatch, call
):
    """`fsync` is where a signal is most likely to strike: of the record, a block, the folder."""
    calls = []
    real = os.fsync

    def interrupted_once(descriptor):
        calls.append(descriptor)
        if len(calls) == call + 2:  # the record and its folder come first
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr("r2ncli.writers.BLOCK_ROWS", 7)
    monkeypatch.setattr(os, "fsync", interrupted_once)
    out = tmp_path / "x.csv"
    with pytest.raises(KeyboardInterrupt):
        r2ncli.classify_to(out, pictures, weights=tiny_weights)
    blocks = sorted((tmp_path / "x.csv.partial").glob("block-*.csv"))
    assert sum(len(block.read_text().splitlines()) for block in blocks) == (14 if call == 3 else 7)
    r2ncli.classify_to(out, pictures, weights=tiny_weights, resume=True)
    assert [row["path"] for row in read_csv(out)] == [f"{pictures}/{n:05d}.jpg" for n in range(20)]


def test_resume_with_nothing_to_resume_starts(tmp_path, pictures, tiny_weights):
    r2ncli.classify_to(tmp_path / "x.csv", pictures, weights=tiny_weights, resume=True)
    assert len(read_csv(tmp_path / "x.csv")) == 20


def test_resume_on_a_finished_output_has_nothing_to_do(tmp_path, pictures, tiny_weights):
    for write, name in ((r2ncli.classify_to, "x.csv"), (r2ncli.extract_to, "f.h5")):
        record = write(tmp_path / name, pictures, weights=tiny_weights)
        before = (tmp_path / name).stat().st_mtime_ns
        seen = []
        again = write(
            tmp_path / name, pictures, weights=tiny_weights, resume=True, on_progress=seen.append
        )
        assert seen == []
        assert again == record
        assert (tmp_path / name).stat().st_mtime_ns == before
        assert not (tmp_path / f"{name}.partial").exists()


def test_a_suffix_in_capitals_is_the_same(tmp_path, pictures, tiny_weights):
    for write, name in ((r2ncli.classify_to, "X.CSV"), (r2ncli.extract_to, "F.H5")):
        record = write(tmp_path / name, pictures, weights=tiny_weights)
        assert write(tmp_path / name, pictures, weights=tiny_weights, resume=True) == record


@pytest.mark.parametrize("finished", [False, True])
def test_resume_refuses_another_setting_and_names_it(tmp_path, pictures, tiny_weights, finished):
    stop = None if finished else stop_after(5)
    with suppress(StopAfterError):
        r2ncli.classify_to(tmp_path / "x.csv", pictures, weights=tiny_weights, on_progress=stop)
    with pytest.raises(OutputError, match="topk was 5, is 3") as caught:
        r2ncli.classify_to(tmp_path / "x.csv", pictures, weights=tiny_weights, topk=3, resume=True)
    assert "batch_size" not in str(caught.value)
    with pytest.raises(OutputError, match="checkpoint sha256 was"):
        r2ncli.classify_to(tmp_path / "x.csv", pictures, weights="demo", resume=True)


@pytest.mark.parametrize("finished", [False, True])
def test_resume_refuses_other_inputs_and_names_the_first(
    tmp_path, pictures, tiny_weights, finished
):
    stop = None if finished else stop_after(12)
    with suppress(StopAfterError):
        r2ncli.classify_to(tmp_path / "x.csv", pictures, weights=tiny_weights, on_progress=stop)
    (pictures / "00007.jpg").rename(pictures / "00006b.jpg")
    with pytest.raises(OutputError, match=r"it has \S*00007\.jpg, here is \S*00006b\.jpg"):
        r2ncli.classify_to(tmp_path / "x.csv", pictures, weights=tiny_weights, resume=True)


def test_the_number_of_threads_may_change_on_resume(tmp_path, pictures, tiny_weights):
    out = tmp_path / "x.csv"
    with pytest.raises(StopAfterError):
        r2ncli.classify_to(out, pictures, weights=tiny_weights, on_progress=stop_after(9))
    r2ncli.classify_to(out, pictures, weights=tiny_weights, workers=7, resume=True)
    assert len(read_csv(out)) == 20


def test_an_output_that_exists_is_kept_unless_told_otherwise(tmp_path, pictures, tiny_weights):
    out = tmp_path / "x.csv"
    out.write_text("precious")
    with pytest.raises(OutputError, match=r"x\.csv exists.*--overwrite.*--resume"):
        r2ncli.classify_to(out, pictures, weights=tiny_weights)
    assert out.read_text() == "precious"
    with pytest.raises(StopAfterError):  # replaced by the final rename only
        r2ncli.classify_to(
            out, pictures, weights=tiny_weights, overwrite=True, on_progress=stop_after(9)
        )
    assert out.read_text() == "precious"
    out.unlink()
    with pytest.raises(OutputError, match=r"x\.csv\.partial exists, an unfinished run"):
        r2ncli.classify_to(out, pictures, weights=tiny_weights)
    r2ncli.classify_to(out, pictures, weights=tiny_weights, overwrite=True, topk=1)
    assert len(read_csv(out)) == 20


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("x.txt", UsageError, r"ends in \.csv or \.jsonl or \.parquet"),
        ("x.h5", UsageError, r"ends in \.csv or \.jsonl or \.parquet"),
        ("nowhere/x.csv", OutputError, "there is no folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused_first(tmp_path, name, error, match):
    with pytest.raises(error, match=match):
        r2ncli.classify_to(tmp_path / name, "nowhere", weights="nothing.pth")


def test_both_overwrite_and_resume_are_a_usage_error(tmp_path, pictures):
    with pytest.raises(UsageError, match="give one of them"):
        r2ncli.classify_to(tmp_path / "x.csv", pictures, overwrite=True, resume=True)


def test_an_output_that_another_run_finished_meanwhile_is_not_replaced(
    tmp_path, pictures, tiny_weights, monkeypatch
):
    """The first look is seconds before the lock: the weights are loaded in between."""
    open_classifier = runs.open_classifier

    def slowly(*arguments, **options):
        (tmp_path / "x.csv").write_text("of the other run")
        return open_classifier(*arguments, **options)

    monkeypatch.setattr(runs, "open_classifier", slowly)
    with pytest.raises(OutputError, match="a finished output"):
        r2ncli.classify_to(tmp_path / "x.csv", pictures, weights=tiny_weights)
    assert (tmp_path / "x.csv").read_text() == "of the other run"


def test_resume_refuses_other_labels(tmp_path, pictures, tiny_weights):
    weights = tmp_path / "tiny.pth"
    torch.save(r2ncli.load_model(tiny_weights).state_dict(), weights)
    out = tmp_path / "x.csv"
    with pytest.raises(StopAfterError):
        r2ncli.classify_to(out, pictures, weights=weights, on_progress=stop_after(9))
    (tmp_path / "tiny.json").write_text('{"labels": ["a", "b", "c", "d", "e", "f"]}')
    with pytest.raises(OutputError, match="labels_sha256 was None, is"):
        r2ncli.classify_to(out, pictures, weights=weights, resume=True)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.csv", "hello", "it has no run record of r2n"),
        ("x.h5", "hello", "it has no run record of r2n"),
    ],
)
def test_resume_on_a_foreign_file_says_so(tmp_path, pictures, tiny_weights, name, content, says):
    (tmp_path / name).write_text(content)
    write = r2ncli.classify_to if name == "x.csv" else r2ncli.extract_to
    with pytest.raises(OutputError, match=says):
        write(tmp_path / name, pictures, weights=tiny_weights, resume=True)
    assert (tmp_path / name).read_text() == content


def test_resume_on_a_damaged_output_says_so(tmp_path, pictures, tiny_weights):
    out = tmp_path / "x.csv"
    r2ncli.classify_to(out, pictures, weights=tiny_weights)
    out.write_text(out.read_text().replace("path", "name", 1))
    with pytest.raises(OutputError, match="damaged, or none of r2n's"):
        r2ncli.classify_to(out, pictures, weights=tiny_weights, resume=True)


def test_a_name_that_is_too_long_is_refused_first(tmp_path):
    for length in (246, 300):  # OUT itself fits in the first case, its record's name does not
        with pytest.raises(OutputError, match="file name too long"):
            r2ncli.classify_to(tmp_path / ("x" * length + ".csv"), "nowhere")


def test_no_image_found_leaves_nothing_behind(tmp_path, tiny_weights):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputNotFoundError, match="no image found"):
        r2ncli.classify_to(tmp_path / "x.csv", tmp_path / "empty", weights=tiny_weights)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_output_inside_the_walked_folder_is_no_input(tmp_path, pictures, tiny_weights):
    r2ncli.extract_to(pictures / "f.h5", pictures, weights=tiny_weights)
    with h5py.File(pictures / "f.h5") as file:
        assert len(file["paths"]) == 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "h5"])
def test_a_killed_run_resumes_to_the_same_rows(tmp_path, make_pictures, tiny_weights, kind):
    folder = make_pictures(tmp_path / "many", 20)
    for n in range(20, 3000):
        os.link(folder / f"{n % 20:05d}.jpg", folder / f"{n:05d}.jpg")
    write = r2ncli.extract_to if kind == "h5" else r2ncli.classify_to
    write(tmp_path / f"whole.{kind}", folder, weights=tiny_weights, batch_size=8)
    out = tmp_path / f"killed.{kind}"
    code = (
        f"import r2ncli; r2ncli.{write.__name__}({str(out)!r}, {str(folder)!r}, "
        f"weights={str(tiny_weights)!r}, batch_size=8, resume=True)"
    )
    partial = tmp_path / f"killed.{kind}.partial"
    for blocks in (1, 3, 5):  # killed when so many blocks are there, and a little later
        process = subprocess.Popen([sys.executable, "-c", code])
        while process.poll() is None and len(list(partial.glob("block-*"))) < blocks:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    write(out, folder, weights=tiny_weights, batch_size=8, resume=True)
    if kind != "h5":
        assert out.read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()
        return
    with h5py.File(out) as killed, h5py.File(tmp_path / "whole.h5") as whole:
        for name in ("paths", "status", "features/layer4"):
            np.testing.assert_array_equal(killed[name][...], whole[name][...])
