"""A finished output is read back exactly, and a damaged or foreign one is said to be so."""

from __future__ import annotations

import json
import os

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.results import (
    LABELLED,
    ROW_FORMATS,
    SHAPES,
    classified,
    features,
    read_all,
    rows,
    write,
)

from r2ncli.errors import OutputError, UsageError
from r2ncli.outputs.formats import format_of
from r2ncli.outputs.hdf5 import Hdf5Format, open_features
from r2ncli.outputs.results import (
    read_format,
    read_names,
    read_record,
)
from r2ncli.outputs.rows import Classification, Features, Prediction


def written(folder, suffix):
    """A finished output of 300 rows with its record."""
    out = folder / f"x{suffix}"
    record = {"layers": [*SHAPES], "counts": {"inputs": 300, "ok": 257, "failed": 43}}
    if suffix == ".h5":
        write(out, Hdf5Format(SHAPES), features(300, failed=range(0, 300, 7)), record)
    else:
        write(out, ROW_FORMATS[suffix](2, True, True), rows(), record)
    return out


@pytest.mark.parametrize("suffix", ROW_FORMATS)
def test_rows_come_back_as_they_were_written(tmp_path, suffix):
    out = written(tmp_path, suffix)
    assert read_all(out) == list(rows())
    assert list(read_names(out)) == [(row.path, row.error is not None) for row in rows()]
    assert read_format(out) == ROW_FORMATS[suffix](2, True, True)
    assert read_record(out)["counts"]["inputs"] == 300


@pytest.mark.parametrize("suffix", ROW_FORMATS)
@pytest.mark.parametrize(("wnids", "labels"), [(False, False), (False, True)])
def test_columns_that_a_checkpoint_has_not_are_none(tmp_path, suffix, wnids, labels):
    out = tmp_path / f"x{suffix}"
    write(out, ROW_FORMATS[suffix](1, wnids, labels), [classified("a", 0.5)])
    expected = Prediction(0, None, "label 0" if labels else None, 0.5)
    assert read_all(out) == [Classification("a", (expected,))]
    assert read_format(out) == ROW_FORMATS[suffix](1, wnids, labels)


@pytest.mark.parametrize("suffix", ROW_FORMATS)
def test_a_probability_that_is_no_number_stays_none(tmp_path, suffix):
    write(tmp_path / f"x{suffix}", ROW_FORMATS[suffix](1, True, True), [classified("a", np.nan)])
    assert np.isnan(read_all(tmp_path / f"x{suffix}")[0].predictions[0].probability)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_come_back_as_they_were_stored(tmp_path, dtype):
    out = tmp_path / "f.h5"
    expected = list(features(300, failed=range(0, 300, 7)))
    write(out, Hdf5Format(SHAPES, dtype), expected, {"layers": [*SHAPES]})
    read = read_all(out)
    assert [(row.path, row.error) for row in read] == [(row.path, row.error) for row in expected]
    for row, was in zip(read, expected, strict=True):
        assert row.features.keys() == was.features.keys()
        for layer, values in was.features.items():
            assert row.features[layer].dtype == dtype
            np.testing.assert_array_equal(row.features[layer], values.astype(dtype))
    format = read_format(out)
    assert (format, list(format.shapes)) == (Hdf5Format(SHAPES, dtype), [*SHAPES])


def test_features_can_be_read_by_row_number_in_any_order(tmp_path):
    expected = list(features(300))
    write(tmp_path / "f.h5", Hdf5Format(SHAPES), expected)
    with open_features(tmp_path / "f.h5") as file:
        for number in (299, 0, 64, 63, 128, 5):
            np.testing.assert_array_equal(
                file[number]["layer4"], expected[number].features["layer4"]
            )


def test_only_some_rows_of_features_are_in_memory_at_once(tmp_path):
    """By construction: a slab holds few rows, and one where rows are large."""
    for shape, most in (((5,), 64), ((1000, 100), 10), ((2000, 1000), 1)):
        many = (Features(str(n), {"x": np.zeros(shape, np.float32)}) for n in range(most + 1))
        write(tmp_path / "f.h5", Hdf5Format({"x": shape}), many)
        with open_features(tmp_path / "f.h5") as file:
            row = file[0]["x"]
            assert len(row.base) == most
        (tmp_path / "f.h5").unlink()


@pytest.mark.parametrize("suffix", [*ROW_FORMATS, ".h5"])
def test_a_shard_without_rows_is_a_whole_output(tmp_path, suffix):
    out = tmp_path / f"x{suffix}"
    format = Hdf5Format(SHAPES) if suffix == ".h5" else ROW_FORMATS[suffix](2, True, True)
    write(out, format, [], {"counts": {"inputs": 0}, "layers": [*SHAPES]})
    assert read_all(out) == list(read_names(out)) == []
    if suffix != ".jsonl":  # where no row tells no columns
        assert read_format(out) == format


def cut_a_line(out):
    out.write_bytes(out.read_bytes()[: out.read_bytes().rindex(b"\n", 0, -1) + 1])


def cut_a_digit(out):
    out.write_bytes(out.read_bytes()[:-2])


def cut_in_half(out):
    os.truncate(out, out.stat().st_size // 2)


def lose_a_column(out):
    out.write_bytes(out.read_bytes().replace(b"index_2", b"index_3"))


def empty(out):
    out.write_bytes(b"")


def another_status(out):
    out.write_bytes(out.read_bytes().replace(b"failed", b"fooled", 1))


DAMAGES = [
    *((suffix, damage) for suffix in (*ROW_FORMATS, ".h5") for damage in (cut_in_half, empty)),
    *((suffix, damage) for suffix in (".csv", ".jsonl") for damage in (cut_a_line, cut_a_digit)),
    *((suffix, damage) for suffix in (".csv", ".jsonl") for damage in (another_status,)),
    *((suffix, lose_a_column) for suffix in ROW_FORMATS),
]


@pytest.mark.parametrize(("suffix", "damage"), DAMAGES)
def test_a_corrupted_output_is_said_to_be_so(tmp_path, suffix, damage):
    out = written(tmp_path, suffix)
    damage(out)
    for read in (read_all, lambda out: list(read_names(out))):
        with pytest.raises(OutputError, match=r"x\.\w+: corrupted, or not written by r2n \(.+\)"):
            read(out)


def test_features_without_their_names_are_none_of_ours(tmp_path):
    for missing in ("paths", "status", "error", "features", "features/layer4"):
        out = written(tmp_path, ".h5")
        with h5py.File(out, "a") as file:
            del file[missing]
        with pytest.raises(OutputError, match="not written by r2n"):
            read_all(out)
        out.unlink()
    out = written(tmp_path, ".h5")
    with h5py.File(out, "a") as file:
        del file["status"]
        file["status"] = ["ok"]
    with pytest.raises(OutputError, match="one dataset has 1 rows, another 300"):
        read_all(out)


def test_a_foreign_table_is_none_of_ours(tmp_path):
    table = pyarrow.table({"path": ["a"], "label": ["cat"]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("path,label\na,cat\n")
    (tmp_path / "x.jsonl").write_text('{"path": "a"}\n')
    (tmp_path / "y.jsonl").write_text("[1, 2]\n")
    for name in ("x.parquet", "x.csv", "x.jsonl", "y.jsonl"):
        with pytest.raises(OutputError, match="its columns are not those of an output of r2n"):
            read_format(tmp_path / name)
    (tmp_path / "z.jsonl").write_text(
        json.dumps(dict.fromkeys(LABELLED.header())) + "\n" + json.dumps({"path": 1}) + "\n"
    )
    with pytest.raises(OutputError, match="not written by r2n"):
        read_all(tmp_path / "z.jsonl")


def test_another_suffix_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"must end in \.csv, \.jsonl, \.parquet or \.h5"):
        format_of(tmp_path / "x.txt")
