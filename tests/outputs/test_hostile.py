"""Outputs that mean harm are refused in one sentence, within bounded memory and time."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.results import (
    LABELLED,
    ROW_FORMATS,
    SHAPES,
    append,
    classified,
    features,
    read_all,
    rows,
    write,
)

import r2ncli
from r2ncli.errors import OutputError, R2NError
from r2ncli.outputs.hdf5 import Hdf5Format
from r2ncli.outputs.hdf5_reader import Hdf5Reader
from r2ncli.outputs.partial import PartialOutput, begun_record
from r2ncli.outputs.reading import RECORD_BYTES, ROW_CHARACTERS, SHOWN
from r2ncli.outputs.results import read_names, read_record

RECORD = {
    "layers": [*SHAPES],
    "counts": {"inputs": 60, "ok": 50, "failed": 10},
    "fingerprint": "f",
    "shard": "1/1",
    "start": "2026-01-01",
    "end": "2026-01-02",
}
SECRET = "root:x:0:0:a line of a system file\n" * 100


def written(folder, suffix, record=None):
    """A finished output of 60 rows, which is shard 1 of 1."""
    out = folder / f"x{suffix}"
    format = Hdf5Format(SHAPES) if suffix == ".h5" else ROW_FORMATS[suffix](2, True, True)
    content = features(60, failed=range(0, 60, 6)) if suffix == ".h5" else rows(60)
    write(out, format, content, RECORD if record is None else record)
    return out


def read_in_every_way(out):
    """What each reader of an output says, which may be nothing else than an R2NError."""
    said = []
    merged = out.with_name(f"merged{out.suffix}")
    for read in (
        lambda: read_all(out),
        lambda: list(read_names(out)),
        lambda: r2ncli.diff(out, out),
        lambda: r2ncli.merge([out], merged, overwrite=True),
        lambda: read_record(out),
    ):
        try:
            read()
            said.append(None)
        except R2NError as error:
            text = str(error)
            assert text.replace(str(out.parent), "").isprintable()
            assert len(text.replace(str(out.parent), "")) < SHOWN + 200
            said.append((type(error), text))
    return said


def refused(out):
    """Whether no rows can be read; names and the record may be whole."""
    rows, _, compared, copied, _ = read_in_every_way(out)
    merged = out.with_name(f"merged{out.suffix}")
    assert not merged.exists()
    return all(said and said[0] is OutputError for said in (rows, compared, copied))


# --- HDF5 -----------------------------------------------------------------------------


def external_storage(file, name, shape):
    path = os.path.join(os.path.dirname(file.filename), "secret")
    file.create_dataset(name, shape, "f4", external=[(path, 0, 4 * int(np.prod(shape)))])


def external_link(file, name, shape):
    with h5py.File(os.path.join(os.path.dirname(file.filename), "other.h5"), "w") as other:
        other["x"] = np.zeros(shape, "f4")
    file[name] = h5py.ExternalLink("other.h5", "/x")


def virtual(file, name, shape):
    with h5py.File(os.path.join(os.path.dirname(file.filename), "other.h5"), "w") as other:
        other["x"] = np.zeros(shape, "f4")
    layout = h5py.VirtualLayout(shape, "f4")
    layout[...] = h5py.VirtualSource("other.h5", "x", shape)
    file.create_virtual_dataset(name, layout)


def soft_link(file, name, shape):
    file["elsewhere"] = np.zeros(shape, "f4")
    file[name] = h5py.SoftLink("/elsewhere")


def with_type(dtype):
    return lambda file, name, shape: file.create_dataset(name, shape, dtype)


def with_shape(*shape, chunks=None, dtype="f4"):
    return lambda file, name, _shape: file.create_dataset(name, shape, dtype, chunks=chunks)


def compressed(file, name, _shape):
    """4 GB of zeros per row, in a few bytes."""
    file.create_dataset(name, (60, 10**9), "f4", chunks=(1, 10**9), compression="gzip")


def inflating(file, name, shape):
    file.create_dataset(name, shape, "f4", chunks=shape, compression="gzip", data=np.zeros(shape))


def recursive(file, name, _shape):
    file[name] = file["/"]


HOSTILE = {
    "external storage": external_storage,
    "external link": external_link,
    "virtual": virtual,
    "soft link": soft_link,
    "compressed": compressed,
    "inflating": inflating,
    "recursive": recursive,
    "group": lambda file, name, _shape: file.create_group(name),
    "object references": with_type(h5py.ref_dtype),
    "compound": with_type([("a", "f4"), ("b", "i4")]),
    "lists": with_type(h5py.vlen_dtype(np.int8)),
    "integers": with_type("i8"),
    "float64": with_type("f8"),
    "big-endian": with_type(">f4"),
    "strings": with_type(h5py.string_dtype()),
    "fixed strings": with_type("S8"),
    "scalar": with_shape(),
    "one row": with_shape(1, 5),
    "zero width": with_shape(60, 0),
    "exabytes": with_shape(60, 2**56, chunks=(1, 2**20)),
    "many axes": with_shape(60, *[2] * 30, chunks=(1,) * 31),
    "never written": with_shape(60, 5, chunks=(1, 5)),
    "rows without end": with_shape(2**50, 5, chunks=(1, 5)),
}
TEXTS = ("paths", "status", "error")


@pytest.mark.parametrize("name", ["features/layer4", *TEXTS])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_dataset_that_r2n_does_not_write_is_refused(tmp_path, name, kind):
    (tmp_path / "secret").write_text(SECRET)
    out = written(tmp_path, ".h5")
    with h5py.File(out, "a") as file:
        shape = file[name].shape
        del file[name]
        HOSTILE[kind](file, name, shape)
    assert refused(out)


@pytest.mark.parametrize("kind", ["external storage", "external link", "virtual", "recursive"])
def test_merge_copies_nothing_of_another_file_into_its_output(tmp_path, kind):
    (tmp_path / "secret").write_text(SECRET)
    out = written(tmp_path, ".h5")
    with h5py.File(out, "a") as file:
        del file["features/layer4"]
        HOSTILE[kind](file, "features/layer4", (60, 5))
    with pytest.raises(OutputError, match=r"x\.h5: corrupted, or not written by r2n"):
        r2ncli.merge([out], tmp_path / "all.h5")
    assert not (tmp_path / "all.h5").exists()


def tree_of(content, kind, number=0):
    """Where a B-tree is in an HDF5 file: kind 0 is of a group, kind 1 of chunks."""
    found, at = [], -1
    while (at := content.find(b"TREE", at + 1)) >= 0:
        if content[at + 4] == kind:
            found.append(at)
    return found[number]


@pytest.mark.parametrize(("kind", "number", "child"), [(0, 0, 32), (0, 1, 32), (1, 0, 56)])
@pytest.mark.parametrize("level", [1, 2, 200])
def test_a_cycle_in_a_b_tree_is_found(tmp_path, kind, number, child, level):
    """The HDF5 library follows it until the process crashes."""
    out = written(tmp_path, ".h5")
    content = bytearray(out.read_bytes())
    at = tree_of(content, kind, number)
    content[at + 5] = level
    content[at + child : at + child + 8] = struct.pack("<Q", at)
    out.write_bytes(content)
    assert refused(out)


def test_a_heap_of_zeros_is_found(tmp_path):
    """The HDF5 library reads it for ever; a power cut leaves such a page."""
    out = written(tmp_path, ".h5")
    content = bytearray(out.read_bytes())
    at = content.find(b"GCOL", content.find(b"GCOL") + 1)
    content[at + 16 : at + 4096] = bytes(4080)
    out.write_bytes(content)
    assert refused(out)


def test_a_string_that_all_rows_share_is_not_repeated_in_memory(tmp_path):
    out = written(tmp_path, ".h5")
    with h5py.File(out, "a") as file:
        del file["paths"]
        file.create_dataset("paths", data=["x" * 1_000_000] + ["y"] * 59)
        at = file["paths"].id.get_offset()
    content = bytearray(out.read_bytes())
    content[at : at + 60 * 16] = content[at : at + 16] * 60
    out.write_bytes(content)
    with pytest.raises(OutputError, match="repeat each other"):
        list(read_names(out))


def test_a_file_that_says_that_it_is_longer_is_cut_off(tmp_path):
    out = written(tmp_path, ".h5")
    os.truncate(out, out.stat().st_size - 1)
    with pytest.raises(OutputError, match=r"it should have [\d,]+ bytes, but has [\d,]+"):
        read_all(out)


def test_every_row_and_attribute_is_read_as_the_library_reads_it(tmp_path):
    """Also chunks that are a part of a row, and what a user adds to the file."""
    random_values = np.random.default_rng(0).random((10, 7, 9, 11)).astype("f4")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("x", data=random_values, chunks=(3, 4, 9, 5))
        file.create_dataset("names", data=[f"ü{n}" * (n % 50) for n in range(5000)])
        file.attrs.update({"é": "text", "none": "", "true": True, "int": -3, "float": 0.1})
        file.attrs["array"] = [1, 2]  # is left out
        expected = dict(file.attrs)
    with open(tmp_path / "x.h5", "rb") as opened:
        reader = Hdf5Reader(opened)
        found = reader.attributes()
        assert found == {key: value for key, value in expected.items() if key != "array"}
        links = reader.links()
        stored = reader.dataset(links["x"])
        for start, stop in ((0, 10), (2, 3), (2, 7), (9, 10), (4, 4)):
            np.testing.assert_array_equal(stored.rows(start, stop), random_values[start:stop])
        names = reader.dataset(links["names"])
        assert names.texts(0, 5000) == [f"ü{n}" * (n % 50) for n in range(5000)]
        assert names.texts(4001, 4003) == ["ü4001", "ü4002" * 2]


def test_a_file_that_another_program_writes_is_said_to_be_open(tmp_path):
    out = written(tmp_path, ".h5")
    with h5py.File(out, "a"):
        for read in (read_all, read_record, lambda out: r2ncli.diff(out, out)):
            with pytest.raises(OutputError, match=r"x\.h5: another program is writing it"):
                read(out)
    assert len(read_all(out)) == 60


def test_a_file_that_another_program_reads_can_be_read(tmp_path):
    out = written(tmp_path, ".h5")
    with h5py.File(out):
        assert len(read_all(out)) == 60


# --- run records ------------------------------------------------------------------------


def nested(depth):
    return "[" * depth + "]" * depth


RECORDS = {
    "empty": "",
    "text": '"x"',
    "list": "[]",
    "number": "1e999",
    "long number": "9" * 100_000,
    "nan": '{"counts": {"inputs": NaN}}',
    "deep": nested(100_000),
    "deep inside": json.dumps(RECORD | {"versions": {}})[:-2] + ', "x": ' + nested(400) + "}}",
    "lists for dicts": json.dumps({key: [[]] for key in RECORD} | {"versions": [], "device": 1}),
    "dicts for texts": json.dumps({key: {} for key in RECORD}),
    "texts for numbers": json.dumps(RECORD | {"counts": dict.fromkeys(RECORD["counts"], "60")}),
    "huge counts": json.dumps(RECORD | {"counts": dict.fromkeys(RECORD["counts"], 10**40)}),
    "true counts": json.dumps(RECORD | {"counts": dict.fromkeys(RECORD["counts"], True)}),
    "many shards": json.dumps(RECORD | {"shard": "1/999999999"}),
    "shards without end": json.dumps(RECORD | {"shard": "1/" + "9" * 5000}),
    "other digits": json.dumps(RECORD | {"shard": "\u0661/\u0661"}),
    "half a surrogate pair": json.dumps(RECORD | {"checkpoint": {"file": "\ud800"}}),
    "no UTF-8": b"\xff\xfe{}",
    "NUL": "{\0}",
    "large": "[" + "1," * RECORD_BYTES + "1]",
    "number as layer": json.dumps(RECORD | {"layers": [1]}),
}


@pytest.mark.parametrize("suffix", ROW_FORMATS)
@pytest.mark.parametrize("kind", RECORDS)
def test_a_run_record_of_any_shape_is_no_run_record(tmp_path, suffix, kind):
    out = written(tmp_path, suffix)
    content = RECORDS[kind]
    content = content if isinstance(content, bytes) else content.encode()
    out.with_name(out.name + ".run.json").write_bytes(content)
    said = read_in_every_way(out)
    assert said[3] is not None, "it was merged"
    assert said[3][0] is OutputError
    if kind not in ("many shards", "shards without end", "other digits"):
        assert read_record(out) == {}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_begun_run_record_of_any_shape_cannot_be_resumed(tmp_path, kind):
    with PartialOutput(tmp_path / "x.csv", LABELLED) as partial:
        partial.begin({"r": 1})
        append(partial, classified("a", 0.5, 0.5))
        partial.flush()
    content = RECORDS[kind]
    content = content if isinstance(content, bytes) else content.encode()
    (partial.folder / "run.json").write_bytes(content)
    record = begun_record(partial.output)
    assert record is None or kind in ("many shards", "shards without end", "other digits")
    assert len(partial.blocks()) == 1


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("layers", "[1]"), ("layers", nested(100_000)[:60_000]), ("layers", '["nowhere"]'),
        ("layers", "[]"), ("counts", '{"inputs": "x"}'), ("counts", "[1]"), ("versions", "1"),
        ("layers", np.arange(3)), ("counts", 5), ("shard", "[2]"),
    ],
)  # fmt: skip
def test_an_attribute_of_another_shape_is_refused(tmp_path, attribute, value):
    out = written(tmp_path, ".h5")
    with h5py.File(out, "a") as file:
        file.attrs[attribute] = value
    if isinstance(value, np.ndarray):  # is left out: the layers are those that are stored
        assert len(read_all(out)) == 60
    else:
        assert refused(out)


# --- text and Parquet -------------------------------------------------------------------


def test_a_line_without_end_is_not_held_in_memory(tmp_path):
    for suffix in (".csv", ".jsonl"):
        out = written(tmp_path, suffix)
        with open(out, "ab") as file:
            file.truncate(out.stat().st_size + 30 * ROW_CHARACTERS)  # zeros that take no space
            file.write(b"\n")
        with pytest.raises(OutputError, match=r"(line|row) of more than 16,000,000 characters"):
            read_all(out)


@pytest.mark.parametrize(
    "row",
    [
        '"' + "x" * 200_000 + '",ok,' + "," * 7,
        "\0,ok,,1,2,3,4,5,6,7,8",
        "a,ok,,1e999,,,0.5,0,,,0.5",
        "a,ok,," + "9" * 5000 + ",,,0.5,0,,,0.5",
        "a,ok,," + "9" * 30 + ",,,0.5,0,,,0.5",
        "a,ok,,0,,,x,0,,,0.5",
    ],
)
def test_a_csv_row_of_any_kind_is_refused(tmp_path, row):
    out = written(tmp_path, ".csv")
    header = out.read_text().splitlines()[0]
    out.write_text(f"{header}\n{row}\n")
    assert refused(out)


def test_a_csv_row_of_many_lines_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("r2ncli.outputs.reading.ROW_CHARACTERS", 10_000)
    out = written(tmp_path, ".csv")
    assert len(read_all(out)) == 60
    header = out.read_text().splitlines()[0]
    out.write_text(header + "\n" + '"a\nb",' * 10_000 + "\n")
    with pytest.raises(OutputError, match="a row of more than 10,000 characters"):
        read_all(out)


GOOD = dict(
    zip(LABELLED.header(), ["a", "ok", None, 0, "w", "l", 0.5, 1, "w", "l", 0.5], strict=True)
)


@pytest.mark.parametrize(
    "change",
    [
        *({"path": value} for value in (1, None, ["a"], {"a": 1}, "\ud800")),
        *({"status": value} for value in (1, None, ["ok"], "OK")),
        *({"error": value} for value in (1, ["a"], {"a": 1}, "\udcff")),
        *({"index_1": value} for value in (None, 1.5, "x", [1], {}, True, 2**70)),
        *({"label_1": value} for value in (1, [1], {"a": 1}, True, 0, "\ud800")),
        *({"wnid_2": value} for value in (1.5, [], {})),
        *({"probability_2": value} for value in ("x", [0.5], {}, True)),
    ],
)
def test_a_json_value_of_another_type_is_refused(tmp_path, change):
    out = written(tmp_path, ".jsonl", RECORD | {"counts": {"inputs": 1, "ok": 1, "failed": 0}})
    out.write_text(json.dumps(GOOD) + "\n")
    assert read_in_every_way(out) == [None] * 5
    (tmp_path / "merged.jsonl").unlink()
    out.write_text(json.dumps(GOOD | change) + "\n")
    *said, merged, _ = read_in_every_way(out)
    assert merged is not None
    assert any(said)


@pytest.mark.parametrize("line", [nested(100_000), "[]", "1", '"x"', "{}", "null", "NaN"])
def test_a_json_line_of_another_shape_is_refused(tmp_path, line):
    out = written(tmp_path, ".jsonl")
    out.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    assert refused(out)
    out.write_text(line + "\n")
    assert refused(out)


def test_a_header_of_very_many_columns_takes_no_memory_for_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("r2ncli.outputs.formats.CELLS_AT_ONCE", 1000)
    out = tmp_path / "x.csv"
    for topk, at_once in ((100, [4, 3]), (1000, [1] * 7)):
        format = ROW_FORMATS[".csv"](topk, False, False)
        cells = ["a", "ok", "", *["0", "0.5"] * topk]
        out.write_text("\n".join([",".join(format.header()), *[",".join(cells)] * 7]) + "\n")
        assert [len(batch) for batch in format.read(out)] == at_once


def test_a_text_that_parquet_repeats_is_not_repeated_in_memory(tmp_path):
    """A dictionary holds a megabyte once, and every row refers to it."""
    out = written(tmp_path, ".parquet")
    schema = pyarrow.parquet.read_schema(out).remove_metadata()
    text = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array(np.zeros(20_000, "i4")), pyarrow.array(["x" * 1_000_000])
    )
    columns = [
        text if name == "path" else pyarrow.nulls(20_000, type)
        for name, type in zip(schema.names, schema.types, strict=True)
    ]
    table = pyarrow.Table.from_arrays(columns, schema.names)
    pyarrow.parquet.write_table(table, out, store_schema=False)
    assert out.stat().st_size < 2_000_000
    with pytest.raises(OutputError, match="its texts are too long"):
        read_all(out)


@pytest.mark.parametrize(
    ("column", "type"),
    [
        ("path", pyarrow.int32()),
        ("index_1", pyarrow.int64()),
        ("probability_1", pyarrow.float64()),
        ("label_1", pyarrow.list_(pyarrow.string())),
        ("error", pyarrow.struct({"a": pyarrow.int8()})),
    ],
)
def test_a_parquet_column_of_another_type_is_refused(tmp_path, column, type):
    out = written(tmp_path, ".parquet")
    schema = pyarrow.parquet.read_schema(out).remove_metadata()
    place = schema.names.index(column)
    schema = schema.set(place, pyarrow.field(column, type))
    pyarrow.parquet.write_table(schema.empty_table(), out)
    assert refused(out)


# --- blocks -----------------------------------------------------------------------------


def begun(folder, format, content):
    """A partial output of one block."""
    with PartialOutput(folder / f"x{format.suffix}", format) as partial:
        partial.begin({"r": 1})
        for row in content:
            append(partial, row)
        partial.flush()
    return partial


def repacked(block, change, method=zipfile.ZIP_STORED):
    """Write an .npz block again with other members."""
    with zipfile.ZipFile(block) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(block, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def as_npy(array):
    packed = io.BytesIO()
    np.save(packed, array, allow_pickle=True)
    return packed.getvalue()


def declare(shape):
    """An array that says it has this shape, and has nothing."""

    def change(members):
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        content = header.ljust(117).encode() + b"\n"
        packed = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(content)) + content
        members["features/layer4.npy"] = packed

    return change


def other(name, array):
    """Another array at the place of one."""
    return lambda members: members.update({f"{name}.npy": as_npy(array)})


BLOCKS = {
    "declared": declare((3, 10**12)),
    "negative": declare((3, -5)),
    "not a shape": declare("x"),
    "deep": declare("(" * 3000 + ")" * 3000),
    "objects": other("paths", np.array([{}] * 3)),
    "bytes": other("paths", np.array([b"a"] * 3)),
    "numbers": other("paths", np.arange(3.0)),
    "no Unicode": other("paths", np.array([2**31 - 1] * 3, "<u4").view("<U1")),
    "not closed": declare("(3, 5"),
    "surrogates": other("paths", np.array(["\ud800"] * 3)),
    "fewer": other("paths", np.array(["a"])),
    "narrower": other("features/layer4", np.zeros((3, 4), "f4")),
    "float64": other("features/layer4", np.zeros((3, 5))),
    "missing": lambda members: members.pop("failed.npy"),
    "neither": other("failed", np.array([0.5] * 3)),
    "scalar": other("failed", np.array(True)),
    "empty": lambda members: members.update({"errors.npy": b""}),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_of_features_with_other_arrays_is_corrupted(tmp_path, kind):
    partial = begun(tmp_path, Hdf5Format(SHAPES), features(3))
    repacked(partial.blocks()[0], BLOCKS[kind])
    with PartialOutput(partial.output, Hdf5Format(SHAPES)) as resumed:
        if kind != "empty":  # the reasons are read at the end
            with pytest.raises(OutputError, match=r"block-00000000\.npz: corrupted"):
                list(resumed.names())
        with pytest.raises(OutputError, match=r"corrupted .*Give a new output to start again"):
            resumed.finish({})
    assert not partial.output.exists()
    assert len(partial.blocks()) == 1


def test_a_block_that_inflates_is_corrupted(tmp_path):
    partial = begun(tmp_path, Hdf5Format(SHAPES), features(3))
    zeros = {"features/layer4.npy": as_npy(np.zeros((3, 5), "f4")) + bytes(50_000_000)}
    repacked(partial.blocks()[0], lambda members: members.update(zeros), zipfile.ZIP_DEFLATED)
    assert partial.blocks()[0].stat().st_size < 100_000
    with pytest.raises(OutputError, match="its arrays are larger than the file"):
        list(partial.names())


@pytest.mark.parametrize("suffix", ROW_FORMATS)
def test_a_block_without_end_is_corrupted(tmp_path, suffix):
    format = ROW_FORMATS[suffix](2, True, True)
    partial = begun(tmp_path, format, rows(3))
    os.truncate(partial.blocks()[0], 30 * ROW_CHARACTERS)
    with pytest.raises(OutputError, match="corrupted"):
        list(partial.names())


# --- any change -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [*ROW_FORMATS, ".h5"])
def test_changed_bytes_raise_nothing_but_an_error_of_ours(tmp_path, suffix):
    """A small form of checks/fuzz.py."""
    out = written(tmp_path, suffix)
    content = out.read_bytes()
    chance = random.Random(suffix)
    for _ in range(80):
        changed = bytearray(content)
        for _ in range(chance.choice((1, 1, 3))):
            at = chance.randrange(len(changed) - 8)
            if chance.random() < 0.5:
                changed[at] = chance.randrange(256)
            else:
                value = chance.choice((0, 1, 2**31, 2**63, 2**64 - 1, at, len(changed)))
                changed[at : at + 8] = struct.pack("<Q", value)
        out.write_bytes(changed)
        read_in_every_way(out)
        for path in Path(tmp_path).glob("merged*"):
            if path.is_file():
                path.unlink()
