"""The functions that Python users call: their keywords, and what an empty list means."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import pytest
from support.api_stub import STUB, stub

import r2ncli
from r2ncli.api import LISTENERS
from r2ncli.errors import R2NError
from r2ncli.options import CLASSIFY, EXTRACT, options_of

FUNCTIONS = [
    (r2ncli.classify, CLASSIFY, False),
    (r2ncli.extract, EXTRACT, False),
    (r2ncli.classify_to, CLASSIFY, True),
    (r2ncli.extract_to, EXTRACT, True),
]


@pytest.mark.parametrize(("function", "command", "to_file"), FUNCTIONS)
def test_help_shows_every_keyword_with_its_default(function, command, to_file):
    parameters = inspect.signature(function).parameters
    for field, option in options_of(command, to_file=to_file):
        assert parameters[field.name].default == field.default
        assert f"\n{field.name}\n" in function.__doc__
        assert option.help.split()[0] in function.__doc__
    for name in LISTENERS:
        assert parameters[name].default is None
    assert "options" not in parameters
    assert "Raises\n------" in function.__doc__


def test_the_stub_for_type_checkers_is_what_would_be_generated():
    assert STUB.read_text(encoding="utf-8") == stub(), "run: python tests/support/api_stub.py"


def test_an_explicit_empty_list_is_no_input(tmp_path, pictures, tiny_weights, monkeypatch):
    monkeypatch.chdir(pictures)
    assert list(r2ncli.classify([], weights=tiny_weights)) == []
    assert list(r2ncli.extract((), weights=tiny_weights)) == []
    record = r2ncli.classify_to(tmp_path / "x.csv", [], weights=tiny_weights)
    assert record["counts"] == {"inputs": 0, "ok": 0, "failed": 0}
    assert (tmp_path / "x.csv").read_text().startswith("path,status,")
    assert len(list(r2ncli.classify(weights=tiny_weights))) == 20
    assert len(list(r2ncli.classify(None, weights=tiny_weights))) == 20


def test_a_pattern_given_as_text_is_one_pattern(tmp_path, pictures, tiny_weights):
    options = {"weights": tiny_weights, "include": "0000*.jpg"}
    record = r2ncli.classify_to(tmp_path / "x.csv", pictures, **options)
    assert record["inputs"]["include"] == ["0000*.jpg"]
    assert record["counts"]["inputs"] == 10
    again = r2ncli.classify_to(
        tmp_path / "x.csv", pictures, weights=tiny_weights, include=["0000*.jpg"], resume=True
    )
    assert again == record


def test_a_wrong_type_is_an_error_of_r2n_at_the_call(pictures):
    for wrong in ({"topk": 2.5}, {"batch_size": "8"}, {"include": 1}, {"weights": 1}):
        with pytest.raises(R2NError):
            r2ncli.classify(pictures, **wrong)


@pytest.mark.parametrize("name", ["tpok", "batchsize", "dtype"])
def test_an_unknown_keyword_is_a_type_error_that_names_a_near_one(pictures, name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'") as raised:
        r2ncli.classify(pictures, **{name: 3})
    assert ("did you mean 'topk'?" in str(raised.value)) == (name == "tpok")


def test_paths_may_be_one_path_or_any_path_like(pictures: Path, tiny_weights: Path):
    for paths in (pictures, str(pictures), [pictures], (os.fspath(pictures),)):
        assert len(list(r2ncli.classify(paths, weights=tiny_weights))) == 20
