"""One run from arguments to a finished file: record, resume, and what stops it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from PIL import features
from support.results import read_csv

import r2ncli
from r2ncli import runs
from r2ncli.engine import openvino as openvino_engine
from r2ncli.engine.base import cores
from r2ncli.errors import InputNotFoundError, OutputError, UsageError
from r2ncli.images.decode import DecodeRules
from r2ncli.outputs import plans
from r2ncli.outputs.partial import BLOCK_ROWS
from r2ncli.outputs.results import read_record
from r2ncli.outputs.rows import Batch


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
    assert record["schema"] == runs.SCHEMA
    assert record["command"] == "extract"
    assert record["checkpoint"]["file"] == str(tiny_weights)
    assert record["checkpoint"]["sha256"] == runs_sha256(tiny_weights)
    assert record["layers"] == ["layer2"]
    assert (record["pool"], record["dtype"]) == ("avg", "float32")
    assert record["preprocessing"]["image_size"] == 64
    assert record["preprocessing"]["resize_size"] == 72
    assert record["decode_rules"]["max_pixels"] == 10_000
    assert (record["precision"], record["batch_size"], record["threads"]) == ("fp32", 4, 2)
    assert 1 <= record["streams"] <= cores()
    assert 1 <= record["stream_threads"] <= cores()
    assert record["versions"]["r2n"] == r2ncli.__version__
    assert record["start"] <= record["end"]
    assert set(record["device"]) == {"name", "kind", "model"}


def test_the_rules_of_decoding_and_the_decoders_decide_the_fingerprint(
    tmp_path, pictures, tiny_weights
):
    record = r2ncli.classify_to(tmp_path / "a.csv", pictures, weights=tiny_weights)
    rules = record["decode_rules"]
    assert rules == asdict(DecodeRules("auto"))
    assert rules.keys() == {"version", "decode", "max_pixels", "max_bytes"}
    assert record["versions"]["littlecms2"] == features.version("littlecms2")
    assert record["versions"]["pillow-heif"] == version("pillow-heif")
    deciding = [("decode_rules", rule) for rule in rules]
    deciding += [("versions", name) for name in ("pillow", "libjpeg", "littlecms2", "pillow-heif")]
    for group, name in deciding:
        other = {**record, group: {**record[group], name: "another"}}
        assert runs.fingerprint(other) != record["fingerprint"], name


def runs_sha256(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_record_says_which_library_ran_in_which_precision(tmp_path, pictures, tiny_weights):
    record = r2ncli.classify_to(
        tmp_path / "x.csv", pictures, weights=tiny_weights, backend="openvino", precision="fp32"
    )
    assert (record["backend"], record["precision"]) == ("openvino", "fp32")
    assert record["versions"]["engine"].startswith("openvino 20")


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


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(1, marks=pytest.mark.slow),
        BLOCK_ROWS,
        BLOCK_ROWS + 45,
        pytest.param(599, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "h5"])
def test_a_resumed_run_ends_with_the_uninterrupted_ones_bytes(
    tmp_path, make_pictures, tiny_weights, monkeypatch, stop, kind
):
    monkeypatch.setattr(plans, "_now", lambda: "2026-01-01T00:00:00+00:00")
    folder = make_pictures(tmp_path / "many", 20)
    for n in range(20, 600):
        os.link(folder / f"{n % 20:05d}.jpg", folder / f"{n:05d}.jpg")
    (folder / "00010.jpg").unlink()
    (folder / "00010.jpg").write_bytes(b"")
    write = r2ncli.extract_to if kind == "h5" else r2ncli.classify_to
    whole, broken = tmp_path / f"whole.{kind}", tmp_path / f"broken.{kind}"
    options = {"weights": tiny_weights, "batch_size": 8}
    record = write(whole, folder, **options)
    with pytest.raises(StopAfterError):
        write(broken, folder, on_progress=stop_after(stop), **options)
    assert not broken.exists()
    kept = 8 * -(-stop // 8)  # whole batches
    blocks = list((tmp_path / f"broken.{kind}.partial").glob("block-*"))
    assert len(blocks) == -(-kept // BLOCK_ROWS)
    seen = []
    resumed = write(broken, folder, weights=tiny_weights, resume=True, on_progress=seen.append)
    # what was done is not done again
    assert sum(progress.rows for progress in seen) == 600 - kept
    assert seen == [] or (seen[0].done - seen[0].rows, seen[-1].done) == (kept, 600)
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

    list(r2ncli.classify(pictures, weights=tiny_weights))  # an entry of the cache is synced too
    monkeypatch.setattr("r2ncli.outputs.partial.BLOCK_ROWS", 7)
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


@pytest.mark.parametrize("kind", ["csv", "h5"])
@pytest.mark.parametrize("finished", [False, True])
def test_resume_takes_the_batch_size_that_was_begun_with(
    tmp_path, pictures, tiny_weights, kind, finished
):
    write, out = (r2ncli.extract_to if kind == "h5" else r2ncli.classify_to), tmp_path / f"x.{kind}"
    stop = None if finished else stop_after(7)
    with suppress(StopAfterError):
        write(out, pictures, weights=tiny_weights, batch_size=3, on_progress=stop)
    record = write(out, pictures, weights=tiny_weights, resume=True)
    assert (record["batch_size"], record["counts"]["ok"]) == (3, 20)
    with pytest.raises(OutputError, match="batch_size was 3, is 4"):
        write(out, pictures, weights=tiny_weights, batch_size=4, resume=True)


def test_failed_rows_are_tried_again_with_the_batch_size_of_the_others(
    tmp_path, pictures, tiny_weights
):
    (pictures / "00003.jpg").write_bytes(b"")
    out = tmp_path / "x.csv"
    r2ncli.classify_to(out, pictures, weights=tiny_weights, batch_size=3)
    record = r2ncli.classify_to(out, pictures, weights=tiny_weights, retry_failed=True)
    assert (record["batch_size"], record["counts"]["failed"]) == (3, 1)


@pytest.mark.parametrize("batch_size", [None, "8", 0, -1, 2.5, [8]])
def test_a_batch_size_that_cannot_be_is_not_taken(tmp_path, pictures, tiny_weights, batch_size):
    out = tmp_path / "x.csv"
    with pytest.raises(StopAfterError):
        r2ncli.classify_to(out, pictures, weights=tiny_weights, on_progress=stop_after(5))
    begun = tmp_path / "x.csv.partial" / "run.json"
    record = json.loads(begun.read_text())
    begun.write_text(json.dumps(record | {"batch_size": batch_size}))
    resumed = r2ncli.classify_to(out, pictures, weights=tiny_weights, resume=True)
    assert resumed["batch_size"] == record["batch_size"]


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
    with pytest.raises(OutputError, match=r"it has \S*00007\.jpg, now there is \S*00006b\.jpg"):
        r2ncli.classify_to(tmp_path / "x.csv", pictures, weights=tiny_weights, resume=True)


@pytest.mark.parametrize("finished", [False, True])
def test_resume_refuses_an_image_that_was_replaced_under_its_name(
    tmp_path, pictures, tiny_weights, finished
):
    out = tmp_path / "x.csv"
    stop = None if finished else stop_after(12)
    options = {"weights": tiny_weights, "batch_size": 4}
    with suppress(StopAfterError):
        r2ncli.classify_to(out, pictures, on_progress=stop, **options)
    shutil.copyfile(pictures / "00008.jpg", pictures / "00007.jpg")
    with pytest.raises(OutputError, match=r"00007\.jpg changed since it was read: it had"):
        r2ncli.classify_to(out, pictures, resume=True, **options)
    r2ncli.classify_to(out, pictures, overwrite=True, **options)
    (tmp_path / "x.csv.inputs").unlink()
    (pictures / "00007.jpg").touch()
    r2ncli.classify_to(out, pictures, resume=True, **options)  # only names are known


def test_an_output_of_inputs_without_files_leaves_no_stamps_of_an_earlier_one(
    tmp_path, pictures, tiny_weights
):
    out = tmp_path / "x.csv"
    r2ncli.classify_to(out, pictures, weights=tiny_weights)
    assert (tmp_path / "x.csv.inputs").stat().st_size == 20 * 16
    r2ncli.classify_to(
        out, "http://127.0.0.1:9/a.jpg", weights=tiny_weights, overwrite=True, timeout=0.2
    )
    assert not (tmp_path / "x.csv.inputs").exists()


def test_resume_refuses_another_backend(tmp_path, pictures, tiny_weights):
    options = {"weights": tiny_weights, "device": "cpu", "precision": "fp32"}
    r2ncli.classify_to(tmp_path / "x.csv", pictures, backend="torch", **options)
    with pytest.raises(OutputError, match="backend was torch, is openvino"):
        r2ncli.classify_to(tmp_path / "x.csv", pictures, backend="openvino", resume=True, **options)


def test_the_number_of_threads_may_change_on_resume(tmp_path, pictures, tiny_weights):
    out = tmp_path / "x.csv"
    with pytest.raises(StopAfterError):
        r2ncli.classify_to(out, pictures, weights=tiny_weights, on_progress=stop_after(9))
    r2ncli.classify_to(out, pictures, weights=tiny_weights, workers=7, resume=True)
    assert len(read_csv(out)) == 20


def test_the_number_of_streams_is_recorded_and_may_change_on_resume(
    tmp_path, pictures, tiny_weights, monkeypatch
):
    out, whole = tmp_path / "x.csv", tmp_path / "whole.csv"
    r2ncli.classify_to(whole, pictures, weights=tiny_weights, backend="openvino")
    with pytest.raises(StopAfterError):
        r2ncli.classify_to(
            out, pictures, weights=tiny_weights, backend="openvino", on_progress=stop_after(9)
        )
    monkeypatch.setattr(openvino_engine, "_streams", lambda _cores: 1)
    record = r2ncli.classify_to(
        out, pictures, weights=tiny_weights, backend="openvino", resume=True
    )
    assert (record["streams"], record["stream_threads"]) == (1, cores())
    assert out.read_bytes() == whole.read_bytes()


def test_an_output_that_exists_is_kept_unless_told_otherwise(tmp_path, pictures, tiny_weights):
    out = tmp_path / "x.csv"
    out.write_text("precious")
    with pytest.raises(OutputError, match=r"x\.csv exists.*`overwrite`"):
        r2ncli.classify_to(out, pictures, weights=tiny_weights)
    assert out.read_text() == "precious"
    with pytest.raises(StopAfterError):  # replaced by the final rename only
        r2ncli.classify_to(
            out, pictures, weights=tiny_weights, overwrite=True, on_progress=stop_after(9)
        )
    assert out.read_text() == "precious"
    out.unlink()
    with pytest.raises(OutputError, match=r"x\.csv\.partial exists \(an unfinished run\)"):
        r2ncli.classify_to(out, pictures, weights=tiny_weights)
    r2ncli.classify_to(out, pictures, weights=tiny_weights, overwrite=True, topk=1)
    assert len(read_csv(out)) == 20


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("x.txt", UsageError, r"must end in \.csv, \.jsonl or \.parquet"),
        ("x.h5", UsageError, r"must end in \.csv, \.jsonl or \.parquet"),
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
    open_predictor = runs.open_predictor

    def slowly(*arguments, **options):
        (tmp_path / "x.csv").write_text("of the other run")
        return open_predictor(*arguments, **options)

    monkeypatch.setattr(runs, "open_predictor", slowly)
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
        ("x.csv", "hello", "its run record is missing"),
        ("x.h5", "hello", "its run record is missing"),
    ],
)
def test_resume_on_a_foreign_file_says_so(tmp_path, pictures, tiny_weights, name, content, says):
    (tmp_path / name).write_text(content)
    write = r2ncli.classify_to if name == "x.csv" else r2ncli.extract_to
    with pytest.raises(OutputError, match=says):
        write(tmp_path / name, pictures, weights=tiny_weights, resume=True)
    assert (tmp_path / name).read_text() == content


def test_resume_on_a_corrupted_output_says_so(tmp_path, pictures, tiny_weights):
    out = tmp_path / "x.csv"
    r2ncli.classify_to(out, pictures, weights=tiny_weights)
    out.write_text(out.read_text().replace("path", "name", 1))
    with pytest.raises(OutputError, match="corrupted, or not written by r2n"):
        r2ncli.classify_to(out, pictures, weights=tiny_weights, resume=True)


def test_a_name_that_is_too_long_is_refused_first(tmp_path):
    for length in (246, 300):  # OUT itself fits in the first case, its record's name does not
        with pytest.raises(OutputError, match="file name too long"):
            r2ncli.classify_to(tmp_path / ("x" * length + ".csv"), "nowhere")


@pytest.mark.parametrize("option", [None, "overwrite", "resume", "retry_failed"])
@pytest.mark.parametrize("name", ["block-00000000.csv.tmp", "run.json", "joined.csv"])
def test_no_run_follows_a_link_in_its_partial_folder(
    tmp_path, pictures, tiny_weights, option, name
):
    out, victim = tmp_path / "x.csv", tmp_path / "victim"
    (pictures / "00003.jpg").write_bytes(b"")
    if option == "retry_failed":
        r2ncli.classify_to(out, pictures, weights=tiny_weights)
    (tmp_path / "x.csv.partial").mkdir()
    (tmp_path / "x.csv.partial" / name).symlink_to(victim)
    victim.write_text("precious")
    with pytest.raises(OutputError, match=f"x.csv.partial: holds '{name}', which is not a regular"):
        r2ncli.classify_to(
            out, pictures, weights=tiny_weights, **({option: True} if option else {})
        )
    assert victim.read_text() == "precious"
    assert (tmp_path / "x.csv.partial" / name).is_symlink()


def test_a_forged_batch_size_takes_no_memory(tmp_path, pictures, tiny_weights):
    out = tmp_path / "x.csv"
    r2ncli.classify_to(out, pictures, weights=tiny_weights)
    beside = tmp_path / "x.csv.run.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"batch_size": 10**9}))
    record = r2ncli.classify_to(out, pictures, weights=tiny_weights, resume=True)
    assert record["batch_size"] == 10**9  # it is the finished one's: nothing was computed


def test_rows_that_cannot_be_kept_hide_no_other_error(
    tmp_path, pictures, tiny_weights, monkeypatch
):
    def full(*_):
        raise OutputError("no space left on device")

    monkeypatch.setattr("r2ncli.outputs.partial.PartialOutput.flush", full)
    with pytest.raises(StopAfterError):
        r2ncli.classify_to(
            tmp_path / "x.csv", pictures, weights=tiny_weights, on_progress=stop_after(5)
        )


def test_no_image_found_leaves_nothing_behind(tmp_path, tiny_weights):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputNotFoundError, match="no image found"):
        r2ncli.classify_to(tmp_path / "x.csv", tmp_path / "empty", weights=tiny_weights)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_output_inside_the_walked_folder_is_no_input(tmp_path, pictures, tiny_weights):
    r2ncli.extract_to(pictures / "f.h5", pictures, weights=tiny_weights)
    with h5py.File(pictures / "f.h5") as file:
        assert len(file["paths"]) == 20


# --- the failed rows again ----------------------------------------------------------------


KINDS = ["csv", "jsonl", "parquet", "h5"]


def writer(kind):
    return r2ncli.extract_to if kind == "h5" else r2ncli.classify_to


@pytest.fixture
def mended(tmp_path, make_pictures, tiny_weights, monkeypatch):
    """A function that leaves a finished output with failed rows whose pictures are whole now."""
    monkeypatch.setattr(plans, "_now", lambda: "2026-01-01T00:00:00+00:00")
    monkeypatch.setattr("r2ncli.outputs.partial.BLOCK_ROWS", 7)
    folder = make_pictures(tmp_path / "some", 40)
    broken = {folder / f"{n:05d}.jpg": b"" for n in (0, 1, 17, 30, 39)}

    def write(kind):
        for path in broken:
            broken[path] = path.read_bytes()
            path.write_bytes(b"")
        out = tmp_path / f"out.{kind}"
        record = writer(kind)(out, folder, weights=tiny_weights, batch_size=4)
        assert record["counts"]["failed"] == 5
        for path, content in broken.items():
            path.write_bytes(content)
        writer(kind)(tmp_path / f"fresh.{kind}", folder, weights=tiny_weights, batch_size=4)
        return out, folder

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_failed_rows_tried_again_give_a_fresh_runs_bytes(tmp_path, mended, tiny_weights, kind):
    out, folder = mended(kind)
    record = writer(kind)(out, folder, weights=tiny_weights, batch_size=4, retry_failed=True)
    assert out.read_bytes() == (tmp_path / f"fresh.{kind}").read_bytes()
    assert record == read_record(tmp_path / f"fresh.{kind}") == read_record(out)
    assert record["counts"] == {"inputs": 40, "ok": 40, "failed": 0}
    assert not (tmp_path / f"out.{kind}.partial").exists()


@pytest.mark.parametrize("kind", ["parquet", "h5"])
def test_only_failed_images_are_opened_again(mended, tiny_weights, kind):
    out, folder = mended(kind)
    for n in range(40):
        if n not in (0, 1, 17, 30, 39):
            (folder / f"{n:05d}.jpg").write_bytes(b"")  # would be a failed row
    record = writer(kind)(out, folder, weights=tiny_weights, batch_size=4, retry_failed=True)
    assert record["counts"]["failed"] == 0


@pytest.mark.parametrize(
    ("kind", "stop"), [("csv", 1), ("csv", 35), *((kind, 18) for kind in KINDS)]
)
def test_an_interrupted_retry_keeps_the_output_and_goes_on(
    tmp_path, mended, tiny_weights, kind, stop
):
    out, folder = mended(kind)
    before = out.read_bytes()
    options = {"weights": tiny_weights, "batch_size": 4, "retry_failed": True}
    with pytest.raises(StopAfterError):
        writer(kind)(out, folder, on_progress=stop_after(stop), **options)
    assert out.read_bytes() == before
    seen = []
    writer(kind)(out, folder, on_progress=seen.append, **options)
    assert seen[0].done > stop  # what was done is not done again
    first = seen[0].done - seen[0].rows
    assert sum(progress.rows for progress in seen) == 40 - first
    assert out.read_bytes() == (tmp_path / f"fresh.{kind}").read_bytes()


def test_what_fails_again_stays_a_failed_row(mended, tiny_weights):
    out, folder = mended("csv")
    (folder / "00017.jpg").write_bytes(b"no picture")
    record = r2ncli.classify_to(out, folder, weights=tiny_weights, batch_size=4, retry_failed=True)
    assert record["counts"] == {"inputs": 40, "ok": 39, "failed": 1}
    assert [row["path"] for row in read_csv(out)] == [f"{folder}/{n:05d}.jpg" for n in range(40)]
    assert read_csv(out)[17]["error"] not in ("", "empty file")


def test_with_nothing_failed_there_is_nothing_to_retry(tmp_path, pictures, tiny_weights):
    out = tmp_path / "x.csv"
    record = r2ncli.classify_to(out, pictures, weights=tiny_weights)
    (pictures / "00003.jpg").unlink()
    seen = []
    again = r2ncli.classify_to(
        out, pictures, weights=tiny_weights, retry_failed=True, on_progress=seen.append
    )
    assert (again, seen) == (record, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pictures",
        "x.csv",
        "x.csv.inputs",
        "x.csv.run.json",
    ]


@pytest.mark.parametrize("change", ["less", "more", "renamed"])
def test_a_retry_refuses_other_inputs_and_keeps_the_output(mended, tiny_weights, change):
    out, folder = mended("jsonl")
    before = out.read_bytes()
    last = folder / "00039.jpg"
    if change == "less":
        last.unlink()
    else:
        last.rename(folder / "00040.jpg") if change == "renamed" else os.link(
            last, folder / "00040.jpg"
        )
    with pytest.raises(OutputError, match="the inputs changed: it has"):
        r2ncli.classify_to(out, folder, weights=tiny_weights, batch_size=4, retry_failed=True)
    assert out.read_bytes() == before


def test_a_retry_may_raise_a_limit_and_change_nothing_else(tmp_path, pictures, tiny_weights):
    out = tmp_path / "x.csv"
    shutil.copy(pictures / "00000.jpg", pictures / "00003.jpg")
    size = max(path.stat().st_size for path in pictures.iterdir())
    options = {"weights": tiny_weights, "max_bytes": size - 1}
    assert r2ncli.classify_to(out, pictures, **options)["counts"]["failed"] > 0
    with pytest.raises(OutputError, match="topk was 5, is 3"):
        r2ncli.classify_to(out, pictures, **options, topk=3, retry_failed=True)
    with pytest.raises(OutputError, match=r"max_bytes was \d+, is 10"):
        r2ncli.classify_to(out, pictures, weights=tiny_weights, max_bytes=10, retry_failed=True)
    record = r2ncli.classify_to(
        out, pictures, weights=tiny_weights, max_bytes=size, retry_failed=True
    )
    assert record["counts"]["failed"] == 0
    assert record["decode_rules"]["max_bytes"] == size


def test_a_retry_may_follow_a_decoder_that_was_added(mended, tiny_weights):
    out, folder = mended("csv")
    path = out.with_name("out.csv.run.json")
    record = json.loads(path.read_text())
    for libjpeg, fits in (("1.2", False), (None, True)):
        path.write_text(
            json.dumps(
                {
                    **record,
                    "versions": {**record["versions"], "libjpeg": libjpeg},
                    "fingerprint": "",
                }
            )
        )
        retry = {"weights": tiny_weights, "batch_size": 4, "retry_failed": True}
        if fits:
            assert r2ncli.classify_to(out, folder, **retry)["counts"]["failed"] == 0
        else:
            with pytest.raises(OutputError, match=r"versions libjpeg was 1\.2"):
                r2ncli.classify_to(out, folder, **retry)


def test_what_changes_colours_is_no_decoder_that_was_added():
    assert plans._keeps_ok_rows("versions pillow-heif", None, "1.0")
    assert not plans._keeps_ok_rows("versions littlecms2", None, "2.16")
    assert not plans._keeps_ok_rows("versions pillow-heif", "1.0", "1.1")


def test_a_retry_needs_a_finished_output(tmp_path, pictures, tiny_weights):
    with pytest.raises(OutputError, match="there is no finished output"):
        r2ncli.classify_to(tmp_path / "x.csv", pictures, weights=tiny_weights, retry_failed=True)
    (tmp_path / "x.csv").write_text("hello")
    with pytest.raises(OutputError, match="its run record is missing"):
        r2ncli.classify_to(tmp_path / "x.csv", pictures, weights=tiny_weights, retry_failed=True)


def test_few_rows_wait_however_far_apart_the_failed_ones_are(monkeypatch):
    """The rows that are kept are read no further than they are used."""
    read = []

    def batches(_out, _start):
        for n in range(1000):
            read.append(n)
            errors = [None] * 10 if n < 999 else [*[None] * 9, "broken"]
            yield Batch([str(10 * n + row) for row in range(10)], errors, {})

    monkeypatch.setattr(plans, "read_batches", batches)
    plan = plans.Retried.__new__(plans.Retried)
    plan.output, plan._begun = SimpleNamespace(output=Path("x")), False
    tried = iter([Batch(["9999"], [None], {})])
    for n, batch in enumerate(plan.batches(tried)):
        assert (batch.names[0], [*batch.errors], len(read)) == (str(10 * n), [None] * 10, n + 1)
    assert n == 999


@pytest.mark.parametrize("then", ["resume", "retry_failed"])
def test_a_compressed_archive_is_walked_to_its_end_with_room_for_one_image(
    tmp_path, pictures, tiny_weights, monkeypatch, then
):
    """Who still holds the picture before would wait for ever: the next is read once it is gone."""
    smallest = min(path.stat().st_size for path in pictures.iterdir())
    monkeypatch.setattr("r2ncli.sources.walk.BYTES_AHEAD", smallest * 3 // 2)
    archive, out = tmp_path / "a.tar.gz", tmp_path / "x.csv"
    whole = (pictures / "00007.jpg").read_bytes()
    options = {"weights": tiny_weights, "batch_size": 2, "workers": 1}
    for content, more in ((bytes(len(whole)), {}), (whole, {then: True})):
        (pictures / "00007.jpg").write_bytes(content)
        if not (then == "resume" and more):  # a changed archive is not resumed
            with tarfile.open(archive, "w:gz") as file:
                file.add(pictures, "p")
        if then == "resume" and not more:
            with pytest.raises(StopAfterError):
                r2ncli.classify_to(out, archive, on_progress=stop_after(9), **options)
        else:
            counts = r2ncli.classify_to(out, archive, **more, **options)["counts"]
    assert counts == {"inputs": 20, "ok": 20 - (then == "resume"), "failed": then == "resume"}
    assert r2ncli.classify_to(out, archive, **{then: True}, **options)["counts"] == counts


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
