"""Finished blocks become files: whole, in order, under a final name only at the end."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from r2ncli.errors import OutputError
from r2ncli.inference import Classification, Features, Prediction
from r2ncli.writers import (
    BLOCK_ROWS,
    CsvFormat,
    Hdf5Format,
    PartialOutput,
    read_names,
    read_record,
    stream_csv,
)

LABELLED = CsvFormat(topk=2, with_wnids=True, with_labels=True)


def classified(path, *probabilities):
    """A classification with these probabilities."""
    return Classification(
        path, tuple(Prediction(i, f"n{i}", f"label {i}", p) for i, p in enumerate(probabilities))
    )


def write(output, format, rows, record=None):
    """Write all rows as one run does."""
    with PartialOutput(output, format) as partial:
        partial.begin(record or {})
        for row in rows:
            partial.append(row)
        partial.finish(record or {})


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- CSV ------------------------------------------------------------------------------


def test_the_columns_are_the_contracts():
    assert LABELLED.header() == [
        "path", "status", "error",
        "index_1", "wnid_1", "label_1", "probability_1",
        "index_2", "wnid_2", "label_2", "probability_2",
    ]  # fmt: skip
    assert CsvFormat(1, False, True).header()[3:] == ["index_1", "label_1", "probability_1"]
    assert CsvFormat(1, False, False).header()[3:] == ["index_1", "probability_1"]


def test_a_row_has_its_cells_and_a_failed_one_its_reason_only(tmp_path):
    rows = [classified("a.jpg", 0.75, 0.25), Classification("b.jpg", (), "empty file")]
    write(tmp_path / "x.csv", LABELLED, rows)
    good, failed = read_csv(tmp_path / "x.csv")
    assert good == {
        "path": "a.jpg", "status": "ok", "error": "",
        "index_1": "0", "wnid_1": "n0", "label_1": "label 0", "probability_1": "0.75",
        "index_2": "1", "wnid_2": "n1", "label_2": "label 1", "probability_2": "0.25",
    }  # fmt: skip
    assert failed.pop("path") == "b.jpg"
    assert failed.pop("status") == "failed"
    assert failed.pop("error") == "empty file"
    assert set(failed.values()) == {""}


@pytest.mark.parametrize("value", [1 / 3, 1e-30, 0.1, 1.0, 0.0, 1.1754944e-38, 0.9999999])
def test_a_probability_reads_back_as_the_same_float32(tmp_path, value):
    exact = float(np.float32(value))
    write(tmp_path / "x.csv", CsvFormat(1, False, False), [classified("a", exact)])
    text = read_csv(tmp_path / "x.csv")[0]["probability_1"]
    assert np.float32(text) == np.float32(value)
    assert len(text) <= 14


@pytest.mark.parametrize(
    "name", ['a,"b".jpg', "new\nline.jpg", "return\r.jpg", "[/b].jpg", " lead", "äöü 画像.jpg", ""]
)
def test_any_name_survives_the_csv(tmp_path, name):
    write(tmp_path / "x.csv", LABELLED, [classified(name, 0.5, 0.5), classified("z", 0.5, 0.5)])
    assert [row["path"] for row in read_csv(tmp_path / "x.csv")] == [name, "z"]
    assert list(read_names(tmp_path / "x.csv")) == [name, "z"]


def test_a_stream_begins_with_the_header_only_once_there_is_a_row(capsys):
    with pytest.raises(ZeroDivisionError):
        stream_csv((1 / 0 for _ in [1]), LABELLED, sys.stdout)
    assert capsys.readouterr().out == ""
    stream_csv([classified("a", 0.5, 0.5)] * 2, LABELLED, sys.stdout)
    assert [line[:4] for line in capsys.readouterr().out.splitlines()] == ["path", "a,ok", "a,ok"]


def test_the_record_stands_beside_a_csv(tmp_path):
    write(tmp_path / "x.csv", LABELLED, [classified("a", 1.0, 0.0)], {"precision": "fp32"})
    assert json.loads((tmp_path / "x.csv.run.json").read_text()) == {"precision": "fp32"}
    assert read_record(tmp_path / "x.csv") == {"precision": "fp32"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "x.csv.run.json"]


# --- HDF5 -----------------------------------------------------------------------------


def features(count, failed=(), shape=(5,)):
    random = np.random.default_rng(1)
    for n in range(count):
        values = random.standard_normal(shape).astype(np.float32)
        if n in failed:
            yield Features(f"p/ü{n}.jpg", {}, "empty file")
        else:
            yield Features(f"p/ü{n}.jpg", {"layer4": values, "layer1.0.bn1": values[:2]})


def test_features_paths_and_status_are_aligned(tmp_path):
    rows = list(features(600, failed=(0, 300, 599)))
    shapes = {"layer4": (5,), "layer1.0.bn1": (2,)}
    record = {"layers": ["layer4"], "precision": "bf16", "counts": {"ok": 597}, "shard": None}
    write(tmp_path / "f.h5", Hdf5Format(shapes), rows, record)
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["features/layer4"].shape == (600, 5)
        assert file["features/layer1.0.bn1"].dtype == np.float32
        assert list(file["paths"].asstr()) == [row.path for row in rows]
        for n, row in enumerate(rows):
            values = file["features/layer4"][n]
            if row.error:
                assert np.isnan(values).all()
                assert (file["status"][n], file["error"][n]) == (b"failed", b"empty file")
            else:
                np.testing.assert_array_equal(values, row.features["layer4"])
                assert (file["status"][n], file["error"][n]) == (b"ok", b"")
        assert file.attrs["precision"] == "bf16"
    assert read_record(tmp_path / "f.h5")["counts"] == {"ok": 597}
    assert read_record(tmp_path / "f.h5")["layers"] == ["layer4"]
    assert list(read_names(tmp_path / "f.h5")) == [row.path for row in rows]


def test_float16_is_stored_on_request(tmp_path):
    shapes = {"layer4": (5,), "layer1.0.bn1": (2,)}
    write(tmp_path / "f.h5", Hdf5Format(shapes, "float16"), features(3, failed=(1,)))
    with h5py.File(tmp_path / "f.h5") as file:
        assert file["features/layer4"].dtype == np.float16
        assert np.isnan(file["features/layer4"][1]).all()


def test_a_chunk_is_a_few_megabytes_at_most(tmp_path):
    for shape in [(2048,), (64, 56, 56), (256, 128, 128)]:
        rows = [Features(str(n), {"x": np.ones(shape, np.float32)}) for n in range(3)]
        write(tmp_path / "f.h5", Hdf5Format({"x": shape}), rows)
        with h5py.File(tmp_path / "f.h5") as file:
            assert np.prod(file["features/x"].chunks) * 4 <= 4_000_000
            assert (file["features/x"][...] == 1).all()
        (tmp_path / "f.h5").unlink()


def test_the_file_does_not_depend_on_how_rows_fell_into_blocks(tmp_path):
    shapes = {"layer4": (5,), "layer1.0.bn1": (2,)}
    rows = list(features(700, failed=(3,)))
    contents = []
    for flush_at in [(), (1, 2, 300), (699,)]:
        with PartialOutput(tmp_path / "f.h5", Hdf5Format(shapes)) as partial:
            partial.begin({"a": 1})
            for n, row in enumerate(rows):
                partial.append(row)
                if n in flush_at:
                    partial.flush()
            partial.finish({"a": 1})
        contents.append((tmp_path / "f.h5").read_bytes())
    assert contents[0] == contents[1] == contents[2]


# --- blocks, lock, and what is left behind ------------------------------------------------


def test_a_block_is_there_after_every_256_rows_and_the_output_only_at_the_end(tmp_path):
    output = tmp_path / "x.csv"
    with PartialOutput(output, LABELLED) as partial:
        partial.begin({"r": 1})
        assert partial.record() == {"r": 1}
        for n in range(2 * BLOCK_ROWS + 1):
            partial.append(classified(f"{n}.jpg", 0.5, 0.5))
        assert len(partial.blocks()) == 2
        assert partial.done == 2 * BLOCK_ROWS
        assert [name for name, _ in partial.names()] == [f"{n}.jpg" for n in range(512)]
        assert not output.exists()
        partial.finish({"r": 2})
    assert len(read_csv(output)) == 513
    assert not partial.folder.exists()


def test_a_block_of_large_rows_is_written_sooner(tmp_path):
    row = Features("a", {"x": np.zeros((1000, 1000), np.float32)})
    with PartialOutput(tmp_path / "f.h5", Hdf5Format({"x": (1000, 1000)})) as partial:
        partial.begin({})
        for _ in range(16):
            partial.append(row)
        assert len(partial.blocks()) == 1


def test_a_second_run_on_the_same_output_is_refused_while_the_first_lasts(tmp_path):
    with PartialOutput(tmp_path / "x.csv", LABELLED) as partial:
        partial.begin({})
        with (
            pytest.raises(OutputError, match=r"x\.csv: another r2n is writing it"),
            PartialOutput(tmp_path / "x.csv", LABELLED),
        ):
            pass
        partial.append(classified("a", 0.5, 0.5))
        partial.finish({})
    with PartialOutput(tmp_path / "x.csv", LABELLED) as again:
        again.begin({})


def test_a_run_that_ends_before_its_first_block_leaves_nothing(tmp_path):
    with PartialOutput(tmp_path / "x.csv", LABELLED) as partial:
        partial.begin({})
        partial.append(classified("a", 0.5, 0.5))
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="cannot be written: not a directory"),
        PartialOutput(tmp_path / "file" / "x.csv", LABELLED),
    ):
        pass


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from r2ncli.errors import OutputError
from r2ncli.inference import Features
from r2ncli.writers import Hdf5Format, PartialOutput
limit, rows, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with PartialOutput(out, Hdf5Format({"x": (1000,)})) as partial:
        partial.begin({})
        for n in range(rows):
            partial.append(Features(f"{n}.jpg", {"x": np.ones(1000, np.float32)}))
            if n % 100 == 99:
                partial.flush()
        partial.finish({})
except OutputError as error:
    print(error)
    sys.exit(6)
"""


def test_a_full_disk_is_one_sentence_and_keeps_the_finished_blocks(tmp_path):
    """Blocks of 400 kB fit below the limit; the joined file does not."""
    out = tmp_path / "f.h5"
    ended = full_disk(out, limit=500_000, rows=700)
    assert ended.returncode == 6, ended.stderr
    assert "cannot be written: file too large" in ended.stdout
    assert "--resume" in ended.stdout
    assert ended.stderr == ""
    left = sorted(path.name for path in (tmp_path / "f.h5.partial").iterdir())
    assert left == [*(f"block-{n:08d}.npz" for n in range(7)), "lock", "run.json"]
    assert not out.exists()


def test_a_disk_that_is_full_from_the_first_block_on_leaves_nothing(tmp_path):
    ended = full_disk(tmp_path / "f.h5", limit=100_000, rows=700)
    assert ended.returncode == 6, ended.stderr
    assert "cannot be written: file too large" in ended.stdout
    assert ended.stderr == ""
    assert list(tmp_path.iterdir()) == []


def full_disk(out, limit, rows):
    """Write `rows` rows, a block every hundred, where no file may exceed `limit` bytes."""
    command = [sys.executable, "-c", FULL_DISK, str(limit), str(rows), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_output_has_ordinary_permissions(tmp_path):
    write(tmp_path / "x.csv", LABELLED, [classified("a", 0.5, 0.5)])
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "x.csv").stat().st_mode & 0o777 == 0o666 & ~umask
