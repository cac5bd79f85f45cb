"""What a person sees fits the terminal and cannot act on it."""

from __future__ import annotations

import json

import pytest

from r2ncli.cli.terminal import Report, image_line, plain, print_json
from r2ncli.outputs.rows import Classification, Prediction


@pytest.mark.parametrize(("width", "classes"), [(46, 3), (45, 2), (34, 2), (33, 1), (5, 1)])
def test_a_line_has_as_many_classes_as_the_width_holds(width, classes):
    """Wide characters take two columns; one class is always there."""
    predictions = [
        Prediction(n, None, label, 0.25) for n, label in enumerate(["画像画像", "bee", "cow"])
    ]
    line = image_line(Classification("0.jpg", tuple(predictions)), width)
    assert line.count("25.0 %") == classes
    assert line.startswith("0.jpg  画像画像 25.0 %")


def test_a_network_without_labels_shows_class_numbers():
    line = image_line(Classification("a", (Prediction(7, None, None, 0.5),)), 80)
    assert line == "a  class 7 50.0 %"


def test_control_characters_are_escaped_and_letters_of_any_script_kept():
    assert plain("a\x1b[31m\r\n\x07é画") == "a\\x1b[31m\\x0d\\x0a\\x07é画"


@pytest.mark.parametrize("quiet", [False, True])
def test_quantising_is_told_as_progress_is_and_not_to_who_wants_quiet(quiet, capsys):
    Report("classify", quiet).quantising(300)
    expected = "quantising with 300 images; the next run finds the result in the cache\n"
    assert capsys.readouterr() == ("", "" if quiet else expected)


def test_json_has_no_control_characters_and_reads_back(capsys):
    document = {"name": "a\0\x1b\x7f\x9b\ud800é"}
    print_json(document)
    shown = capsys.readouterr().out
    assert shown == '{\n  "name": "a\\u0000\\u001b\\u007f\\u009b\\ud800é"\n}\n'
    assert json.loads(shown) == document
