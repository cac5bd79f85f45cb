"""The shards of a run become one output, if all are there and were made alike."""

from __future__ import annotations

import json
import re

import h5py
import pytest
from support.results import ROW_FORMATS, SHAPES, classified, features, read_all, rows, write

import r2ncli
from r2ncli.errors import InputNotFoundError, OutputError, UsageError
from r2ncli.outputs.hdf5 import Hdf5Format
from r2ncli.outputs.record import EXECUTED
from r2ncli.outputs.results import read_record

SUFFIXES = [*ROW_FORMATS, ".h5"]
SIZES = (130, 0, 300)


def format_of(suffix):
    return Hdf5Format(SHAPES) if suffix == ".h5" else ROW_FORMATS[suffix](2, True, True)


def record(shard, inputs, **more):
    number = int(shard[0]) if shard else 0
    return {
        "fingerprint": "f",
        "shard": shard,
        "layers": [*SHAPES],
        "counts": {"inputs": inputs, "ok": inputs - 1, "failed": 1},
        "start": f"2026-01-0{9 - number}",
        "end": f"2026-02-0{9 - number}",
        **more,
    }


def all_rows(suffix):
    return list(features(430, failed=(3, 200)) if suffix == ".h5" else rows(430))


@pytest.fixture
def sharded(tmp_path):
    """A function that writes three shards of 430 rows, one of them without any."""

    def write_all(suffix, **more):
        content, paths = all_rows(suffix), []
        for number, size in enumerate(SIZES, start=1):
            paths.append(tmp_path / f"{number}{suffix}")
            taken, content = content[:size], content[size:]
            write(paths[-1], format_of(suffix), taken, record(f"{number}/3", size, **more))
        return paths

    return write_all


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_merged_shards_are_the_rows_of_all_in_shard_order(tmp_path, sharded, suffix):
    one, two, three = sharded(suffix)
    out = tmp_path / f"all{suffix}"
    merged = r2ncli.merge([three, one, two], out)
    whole = {**record(None, 430), "counts": {"inputs": 430, "ok": 427, "failed": 3},
             "start": "2026-01-06", "end": "2026-02-08"}  # fmt: skip
    assert merged == read_record(out) == whole
    write(tmp_path / f"whole{suffix}", format_of(suffix), all_rows(suffix), merged)
    assert out.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not (tmp_path / f"all{suffix}.partial").exists()
    assert [row.path for row in read_all(out)] == [row.path for row in all_rows(suffix)]


def test_a_shard_that_is_missing_or_there_twice_is_named(tmp_path, sharded):
    one, two, three = sharded(".csv")
    with pytest.raises(OutputError, match=r"shard is missing: 2/3. Give all 3"):
        r2ncli.merge([one, three], tmp_path / "all.csv")
    with pytest.raises(OutputError, match=r"1\.csv and \S*1\.csv: both are shard 1/3"):
        r2ncli.merge([one, two, three, one], tmp_path / "all.csv")
    write(tmp_path / "x.csv", format_of(".csv"), rows(9), record("2/4", 9))
    with pytest.raises(OutputError, match=r"1\.csv is one of 3 shards, \S*x\.csv of 4"):
        r2ncli.merge([one, tmp_path / "x.csv", three], tmp_path / "all.csv")
    write(tmp_path / "y.csv", format_of(".csv"), rows(9), record(None, 9))
    (tmp_path / "z.csv").write_text("a,b\n")
    for name in ("y.csv", "z.csv"):
        with pytest.raises(OutputError, match=rf"{name} was not made with `shard`"):
            r2ncli.merge([one, tmp_path / name, three], tmp_path / "all.csv")
    assert not list(tmp_path.glob("all*"))


def test_shards_of_other_settings_are_refused_and_the_settings_named(tmp_path, sharded):
    one, two, three = sharded(".csv", precision="fp32")
    (tmp_path / "2.csv.run.json").write_text(
        (tmp_path / "2.csv.run.json").read_text().replace('"f"', '"g"').replace("fp32", "bf16")
    )
    with pytest.raises(OutputError, match="cannot be merged: precision was fp32, is bf16"):
        r2ncli.merge([one, two, three], tmp_path / "all.csv")


def test_shards_of_other_columns_or_layers_are_refused(tmp_path, sharded):
    one, two, three = sharded(".csv")
    three.unlink()
    (tmp_path / "3.csv.run.json").unlink()
    write(three, ROW_FORMATS[".csv"](1, True, True), [classified("a", 0.5)], record("3/3", 1))
    with pytest.raises(OutputError, match="columns or layers differ"):
        r2ncli.merge([one, two, three], tmp_path / "all.csv")


def test_a_corrupted_shard_leaves_no_merged_output(tmp_path, sharded):
    one, two, three = sharded(".jsonl")
    three.write_bytes(three.read_bytes()[:-40])
    with pytest.raises(OutputError, match=r"3\.jsonl: corrupted"):
        r2ncli.merge([one, two, three], tmp_path / "all.jsonl")
    assert not (tmp_path / "all.jsonl").exists()


def test_an_output_that_exists_is_kept_unless_told_otherwise(tmp_path, sharded):
    paths, out = sharded(".csv"), tmp_path / "all.csv"
    out.write_text("precious")
    with pytest.raises(
        OutputError, match=r"exists \(a finished output\). `overwrite` merges again$"
    ):
        r2ncli.merge(paths, out)
    assert out.read_text() == "precious"
    r2ncli.merge(paths, out, overwrite=True)
    assert len(read_all(out)) == 430


def test_what_cannot_be_merged_is_a_usage_error(tmp_path, sharded):
    paths = sharded(".csv")
    with pytest.raises(UsageError, match="all shards must have the same format, got no shard"):
        r2ncli.merge([], tmp_path / "all.csv")
    with pytest.raises(UsageError, match=re.escape("the same format, got .csv and .jsonl")):
        r2ncli.merge([*paths, *sharded(".jsonl")], tmp_path / "all.csv")
    with pytest.raises(UsageError, match=r"must end in \.csv"):
        r2ncli.merge(paths, tmp_path / "all.jsonl")
    with pytest.raises(UsageError, match="is one of the shards"):
        r2ncli.merge(paths, paths[1], overwrite=True)
    with pytest.raises(InputNotFoundError, match="no such file"):
        r2ncli.merge([*paths, tmp_path / "4.csv"], tmp_path / "all.csv")


def test_shards_of_real_runs_merge_to_every_input_once(tmp_path, pictures, tiny_weights):
    for write_to, suffix in ((r2ncli.classify_to, ".parquet"), (r2ncli.extract_to, ".h5")):
        paths = [tmp_path / f"{n}{suffix}" for n in (1, 2, 3)]
        for n, path in enumerate(paths, start=1):
            write_to(path, pictures, weights=tiny_weights, shard=f"{n}/3")
        write_to(tmp_path / f"whole{suffix}", pictures, weights=tiny_weights)
        merged = r2ncli.merge(paths, tmp_path / f"all{suffix}")
        assert merged["counts"] == {"inputs": 20, "ok": 20, "failed": 0}
        assert merged["fingerprint"] == read_record(tmp_path / f"whole{suffix}")["fingerprint"]
        found = r2ncli.diff(tmp_path / f"all{suffix}", tmp_path / f"whole{suffix}", atol=1e-5)
        assert (found.different, found.compared, found.settings) == (False, 20, {})
    with h5py.File(tmp_path / "all.h5") as file:
        assert len(set(file["paths"].asstr()[:])) == 20


def test_the_fewest_images_computed_at_a_time_are_those_of_any_shard(tmp_path, sharded):
    paths = sharded(".csv", batch_size=64)
    assert "executed_batch_size" not in r2ncli.merge(paths, tmp_path / "all.csv")
    for number, executed in ((2, 32), (3, 16)):
        path = tmp_path / f"{number}.csv.run.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), EXECUTED: executed}))
    merged = r2ncli.merge(paths, tmp_path / "all.csv", overwrite=True)
    assert merged["executed_batch_size"] == 16


def test_merging_tells_how_many_rows_are_copied(tmp_path, sharded):
    done = []
    r2ncli.merge(sharded(".jsonl"), tmp_path / "all.jsonl", on_progress=done.append)
    assert done == sorted(done)
    assert done[-1] == 430
