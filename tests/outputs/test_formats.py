"""Every format keeps names, values and failures exactly, whatever the blocks were."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet
import pytest
from support.results import (
    LABELLED,
    ROW_FORMATS,
    append,
    batch_of,
    classified,
    features,
    read_csv,
    write,
)

from r2ncli.errors import UsageError
from r2ncli.outputs.formats import (
    GROUP_CELLS,
    CsvFormat,
    Hdf5Format,
    JsonlFormat,
    ParquetFormat,
    format_of,
)
from r2ncli.outputs.partial import PartialOutput
from r2ncli.outputs.results import read_names, read_record
from r2ncli.outputs.rows import Classification, Features, Prediction

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
    assert list(read_names(tmp_path / "x.csv")) == [(name, False), ("z", False)]


def test_lines_begin_with_the_header_only_once_there_is_a_row():
    batch = batch_of([classified("a", 0.5, 0.5)] * 2, LABELLED)
    lines = LABELLED.head() + LABELLED.pack([batch])
    assert [line[:4] for line in lines.decode().splitlines()] == ["path", "a,ok", "a,ok"]


def test_the_record_stands_beside_a_csv(tmp_path):
    write(tmp_path / "x.csv", LABELLED, [classified("a", 1.0, 0.0)], {"precision": "fp32"})
    assert json.loads((tmp_path / "x.csv.run.json").read_text()) == {"precision": "fp32"}
    assert read_record(tmp_path / "x.csv") == {"precision": "fp32"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "x.csv.run.json"]


# --- JSONL and Parquet ------------------------------------------------------------------


def read_jsonl(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = path.read_bytes().decode("utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text[:-1].split("\n")]


def read_parquet(path):
    return pyarrow.parquet.read_table(path).to_pylist()


READERS = {".jsonl": read_jsonl, ".parquet": read_parquet}


@pytest.mark.parametrize("suffix", READERS)
def test_every_format_has_the_same_names_and_null_where_csv_is_empty(tmp_path, suffix):
    rows = [classified("a.jpg", 0.75, 0.25), Classification("b.jpg", (), "empty file")]
    write(tmp_path / f"x{suffix}", ROW_FORMATS[suffix](2, True, True), rows)
    good, failed = READERS[suffix](tmp_path / f"x{suffix}")
    assert list(good) == list(failed) == LABELLED.header()
    assert list(good.values())[:3] == ["a.jpg", "ok", None]
    assert list(good.values())[3:] == [0, "n0", "label 0", 0.75, 1, "n1", "label 1", 0.25]
    assert list(failed.values()) == ["b.jpg", "failed", "empty file", *[None] * 8]
    assert json.loads((tmp_path / f"x{suffix}.run.json").read_text()) == {}


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("value", [1 / 3, 1e-30, 0.1, 1.0, 0.0, 1e-45, 0.9999999])
def test_every_format_gives_the_float32_back(tmp_path, suffix, value):
    exact = float(np.float32(value))
    write(tmp_path / f"x{suffix}", ROW_FORMATS[suffix](1, False, False), [classified("a", exact)])
    assert np.float32(READERS[suffix](tmp_path / f"x{suffix}")[0]["probability_1"]) == exact


def test_jsonl_is_text_that_people_can_read(tmp_path):
    rows = [classified('é"\n\u2028.jpg', float(np.float32(0.1))), classified("b", float("nan"))]
    write(tmp_path / "x.jsonl", JsonlFormat(1, False, True), rows)
    assert (tmp_path / "x.jsonl").read_text().split("\n") == [
        '{"path": "é\\"\\n\u2028.jpg", "status": "ok", "error": null, "index_1": 0, '
        '"label_1": "label 0", "probability_1": 0.1}',
        '{"path": "b", "status": "ok", "error": null, "index_1": 0, "label_1": "label 0", '
        '"probability_1": null}',
        "",
    ]
    assert [row["path"] for row in read_jsonl(tmp_path / "x.jsonl")] == ['é"\n\u2028.jpg', "b"]


@pytest.mark.parametrize("suffix", ROW_FORMATS)
def test_half_of_a_surrogate_pair_in_a_label_is_escaped(tmp_path, suffix):
    row = Classification("a", (Prediction(0, None, "half \ud83d", 1.0),))
    write(tmp_path / f"x{suffix}", ROW_FORMATS[suffix](1, False, True), [row])
    read = read_csv if suffix == ".csv" else READERS[suffix]
    assert read(tmp_path / f"x{suffix}")[0]["label_1"] == "half \\xed\\xa0\\xbd"


def test_parquet_has_the_types_and_row_groups_of_a_fixed_size(tmp_path):
    format = ParquetFormat(1000, True, True)  # of so many columns that few rows make a group
    rows = [classified(str(n), *np.full(1000, 0.5)) for n in range(60)]
    write(tmp_path / "x.parquet", format, rows)
    file = pyarrow.parquet.ParquetFile(tmp_path / "x.parquet")
    types = [str(field.type) for field in file.schema_arrow]
    assert types[:7] == ["string"] * 3 + ["int32", "string", "string", "float"]
    sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert sizes == [GROUP_CELLS // 4003, 60 - GROUP_CELLS // 4003]


def test_without_pyarrow_parquet_says_what_to_install(monkeypatch):
    format_of(Path("x.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    with pytest.raises(UsageError, match=r"pip install pyarrow$"):
        format_of(Path("x.parquet"))


@pytest.mark.parametrize("suffix", ROW_FORMATS)
def test_rows_do_not_depend_on_how_they_fell_into_blocks(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("r2ncli.outputs.formats.GROUP_CELLS", 11 * 100)  # seven row groups
    rows = [classified(f"{n}.jpg", n / 700, 1 - n / 700) for n in range(700)]
    contents = set()
    for flush_at in [(), (1, 2, 300), (699,)]:
        with PartialOutput(tmp_path / f"x{suffix}", ROW_FORMATS[suffix](2, True, True)) as partial:
            partial.begin({})
            for n, row in enumerate(rows):
                append(partial, row)
                if n in flush_at:
                    partial.flush()
            assert [name for name, *_ in partial.names()] == [row.path for row in rows][
                : partial.done
            ]
            partial.finish({})
        contents.add((tmp_path / f"x{suffix}").read_bytes())
    assert len(contents) == 1


# --- HDF5 -----------------------------------------------------------------------------


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
    assert list(read_names(tmp_path / "f.h5")) == [(row.path, bool(row.error)) for row in rows]


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
                append(partial, row)
                if n in flush_at:
                    partial.flush()
            partial.finish({"a": 1})
        contents.append((tmp_path / "f.h5").read_bytes())
    assert contents[0] == contents[1] == contents[2]
