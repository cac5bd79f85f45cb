"""Two results are compared by name: what one lacks, what changed, and by how much."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from support.results import ROW_FORMATS, SHAPES, classified, features, rows, write

from r2ncli import diff
from r2ncli.errors import InputNotFoundError, OutputError, UsageError
from r2ncli.outputs import diff as comparison
from r2ncli.outputs.hdf5 import Hdf5Format
from r2ncli.outputs.rows import Classification, Features, Prediction


def result(path, content, record=None):
    """A finished output of these rows."""
    format = Hdf5Format(SHAPES) if path.suffix == ".h5" else ROW_FORMATS[path.suffix](2, True, True)
    write(path, format, content, record)
    return path


def shuffled(content):
    content = list(content)
    random.Random(0).shuffle(content)
    return content


@pytest.mark.parametrize("suffix", ROW_FORMATS)
@pytest.mark.parametrize("order", [list, shuffled])
def test_equal_rows_are_equal_in_every_format_and_order(tmp_path, suffix, order):
    a = result(tmp_path / "a.csv", rows())
    found = diff(a, result(tmp_path / f"b{suffix}", order(rows())))
    assert not found.different
    assert (found.rows_a, found.rows_b, found.compared) == (300, 300, 257)
    assert found.largest["probability"].difference == 0
    assert found.kind == "rows"


@pytest.mark.parametrize("order", [list, shuffled])
def test_equal_features_are_equal_in_every_order(tmp_path, order):
    a = result(tmp_path / "a.h5", features(300, failed=(5,)))
    found = diff(a, result(tmp_path / "b.h5", order(features(300, failed=(5,)))))
    assert (found.different, found.compared, found.kind) == (False, 299, "features")
    assert found.top1_changed is None
    assert {name: one.difference for name, one in found.largest.items()} == dict.fromkeys(SHAPES, 0)


def test_what_rows_do_not_share_is_told(tmp_path):
    first = [classified(name, 0.75, 0.25) for name in "abcdef"]
    failed = Classification("b", (), "empty file")
    swapped = Classification("c", first[2].predictions[::-1])
    further = classified("d", 0.5, 0.375)
    new = classified("z", 1.0, 0.0)
    found = diff(
        result(tmp_path / "a.csv", first),
        result(tmp_path / "b.jsonl", [first[0], failed, swapped, further, first[4], new]),
    )
    assert found.different
    assert found.only_in_a == comparison.Names(1, ("f",))
    assert found.only_in_b == comparison.Names(1, ("z",))
    assert found.status_changed == comparison.Names(1, ("b",))
    assert found.top1_changed == comparison.Names(1, ("c",))
    assert found.beyond_atol == comparison.Names(1, ("d",))
    assert found.largest == {"probability": comparison.Largest(0.25, "d")}
    assert found.compared == 4


@pytest.mark.parametrize(("atol", "different"), [(0.0, True), (0.24, True), (0.25, False)])
def test_values_within_the_tolerance_are_equal(tmp_path, atol, different):
    a = result(tmp_path / "a.csv", [classified("d", 0.75, 0.25)])
    b = result(tmp_path / "b.csv", [classified("d", 0.5, 0.25)])
    found = diff(a, b, atol=atol)
    assert found.different == different
    assert found.largest["probability"].difference == 0.25


def test_only_classes_that_both_rows_have_are_compared(tmp_path):
    a, b = (
        Classification("x", (Prediction(0, None, None, 0.5), Prediction(other, None, None, p)))
        for other, p in ((1, 0.25), (2, 0.125))
    )
    found = diff(result(tmp_path / "a.csv", [a]), result(tmp_path / "b.csv", [b]))
    assert (found.different, found.largest["probability"].difference) == (False, 0)


def test_features_tell_the_largest_difference_of_each_layer(tmp_path):
    first, second = list(features(200)), list(features(200))
    second[150].features["layer4"][3] += 2
    values = np.array([np.nan, 0], np.float32)
    second[7] = Features(first[7].path, {**first[7].features, "layer1.0.bn1": values})
    found = diff(result(tmp_path / "a.h5", first), result(tmp_path / "b.h5", shuffled(second)))
    assert found.beyond_atol.count == 2
    assert found.largest["layer4"].path == first[150].path
    assert found.largest["layer4"].difference == pytest.approx(2)
    assert found.largest["layer1.0.bn1"] == comparison.Largest(np.inf, first[7].path)
    document = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert document["largest"]["layer1.0.bn1"] == {"difference": None, "path": first[7].path}


def test_values_that_are_no_number_in_both_are_equal(tmp_path):
    row = Features("x", {"layer4": np.array([np.nan, np.inf, -np.inf, 0, 1], np.float32),
                         "layer1.0.bn1": np.zeros(2, np.float32)})  # fmt: skip
    found = diff(result(tmp_path / "a.h5", [row]), result(tmp_path / "b.h5", [row]))
    assert not found.different


def test_a_repeated_name_is_matched_by_its_occurrence(tmp_path):
    content = (("x", 0.5, 0.5), ("y", 0.5, 0.5), ("x", 0.25, 0.25), ("x", 0.75, 0.25))
    first = [classified(*row) for row in content]
    second = [first[0], first[2], first[1], first[3], first[3]]
    found = diff(result(tmp_path / "a.csv", first), result(tmp_path / "b.csv", second))
    assert (found.only_in_b, found.compared) == (comparison.Names(1, ("x",)), 4)
    assert found.beyond_atol.count == 0
    found = diff(tmp_path / "a.csv", result(tmp_path / "c.csv", [first[2], *first[:2], first[3]]))
    assert (found.compared, found.beyond_atol) == (4, comparison.Names(2, ("x", "x")))


def test_nothing_waits_while_the_names_agree():
    """Rows are read no further than the one that is compared."""
    read = []

    def side(letter):
        for n in range(5000):
            read.append((letter, n))
            yield comparison._Row(str(n), False, n)

    for n, (a, b) in enumerate(comparison._matched(side("a"), side("b"))):
        assert (a.content, b.content, len(read)) == (n, n, 2 * n + 2)


def test_settings_that_differ_are_named(tmp_path):
    records = [
        {"fingerprint": device, "device": {"model": device}, "topk": 5, "classes": 6, "versions": v}
        for device, v in (("cpu", {"r2n": "1"}), ("card", {"r2n": "1", "pyarrow": "26"}))
    ]
    a = result(tmp_path / "a.csv", rows(9), records[0])
    found = diff(a, result(tmp_path / "b.csv", rows(9), records[1]))
    assert found.settings == {"device model": ("cpu", "card")}
    assert not found.different
    assert found.as_dict()["settings"] == {"device model": {"a": "cpu", "b": "card"}}
    (tmp_path / "b.csv.run.json").unlink()
    assert diff(a, tmp_path / "b.csv").settings is None


def test_results_of_a_mode_of_decoding_that_was_removed_can_be_compared(tmp_path):
    then, now = (
        {"fingerprint": mode, "decode_rules": {"decode": mode}} for mode in ("gpu", "auto")
    )
    then["versions"] = {"torchcodec": "0.16"}
    found = diff(
        result(tmp_path / "a.csv", rows(9), then), result(tmp_path / "b.csv", rows(9), now)
    )
    assert found.settings == {"decode_rules decode": ("gpu", "auto")}
    assert not found.different


def test_what_cannot_be_compared_is_a_usage_error(tmp_path):
    six = result(tmp_path / "a.csv", rows(9), {"classes": 6})
    ten = result(tmp_path / "b.csv", rows(9), {"classes": 10})
    with pytest.raises(UsageError, match=r"is of 6 classes and \S+ of 10"):
        diff(six, ten)
    layers = result(tmp_path / "f.h5", features(3))
    with pytest.raises(UsageError, match=r"f\.h5 holds features and .*a\.csv classes"):
        diff(six, layers)
    other = tmp_path / "g.h5"
    write(other, Hdf5Format({"layer4": (5,)}), features(3))
    with pytest.raises(UsageError, match=r"g\.h5 has layer4 \[5\]: features of other layers"):
        diff(layers, other)
    with pytest.raises(UsageError, match="`atol` must be at least 0, not nan"):
        diff(six, six, atol=float("nan"))
    with pytest.raises(UsageError, match="the name must end in"):
        diff(six, tmp_path / "b.txt")
    with pytest.raises(InputNotFoundError, match=r"no such file: .*c\.csv"):
        diff(six, tmp_path / "c.csv")
    other.write_bytes(b"hello")
    with pytest.raises(OutputError, match=r"g\.h5: corrupted, or not written by r2n"):
        diff(layers, other)
