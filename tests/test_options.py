"""Every option stands once: its default, its documentation and its check."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r2ncli.errors import UsageError
from r2ncli.options import EXTRACT, Option, RunOptions, options_of


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"topk": 0}, "`topk` must be at least 1, not 0"),
        ({"topk": 2.5}, r"`topk` must be a whole number, not 2\.5 \(float\)"),
        ({"topk": "5"}, "`topk` must be a whole number, not '5'"),
        ({"topk": None}, "`topk` must be a whole number, not None"),
        ({"batch_size": "8"}, "`batch_size` must be a whole number"),
        ({"image_size": 31}, "`image_size` must be from 32 to 4096, not 31"),
        ({"timeout": float("nan")}, "`timeout` must be more than 0"),
        ({"timeout": 0}, "`timeout` must be more than 0"),
        ({"timeout": "soon"}, "`timeout` must be a number"),
        ({"no_crop": 1}, r"`no_crop` must be True or False, not 1 \(int\)"),
        ({"weights": 3}, "`weights` must be a path, not 3"),
        ({"device": Path("cpu")}, "`device` must be text"),
        ({"include": [b"*.jpg"]}, "`include` must be text, not b'"),
        ({"include": 5}, r"`include` must be text, not 5 \(int\)"),
        ({"layers": ()}, "`layers` names no layer"),
        ({"pool": "mean"}, "`pool` must be one of avg, max, none, not 'mean'"),
        ({"shard": "3/2"}, "`shard` must be I/N with I from 1 to N"),
        ({"precision": "int8"}, "`precision=int8` needs images to calibrate with"),
        ({"calibration": "photos"}, "`calibration` is for `precision=int8`"),
        ({"overwrite": True, "resume": True}, "give one of them"),
    ],
)
def test_a_value_that_does_not_fit_is_a_usage_error_that_names_the_keyword(
    given: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as raised:
        RunOptions(**given)
    assert raised.value.exit_code == 2


def test_values_are_kept_in_one_form() -> None:
    options = RunOptions(
        topk=np.int64(3), include="*.jpg", layers="fc", timeout=2, calibration="x", precision="int8"
    )
    assert (type(options.topk), options.topk) == (int, 3)
    assert (options.include, options.layers, options.calibration) == (("*.jpg",), ("fc",), ("x",))
    assert (type(options.timeout), options.timeout) == (float, 2.0)
    assert hash(options) == hash(RunOptions(**{f.name: getattr(options, f.name) for f in FIELDS}))


FIELDS = fields(RunOptions)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_option_is_documented_and_its_default_fits(field: Any) -> None:
    option: Option = field.metadata["option"]
    assert option.help[0].isupper()
    assert option.help.endswith(".")
    assert getattr(RunOptions(), field.name) == field.default
    assert not option.choices or field.default in option.choices


def test_a_command_has_the_options_that_are_its_own() -> None:
    names = [field.name for field, _ in options_of(EXTRACT, to_file=False)]
    assert "layers" in names
    assert not {"topk", "calibration", "overwrite", "dtype"} & set(names)
    assert "dtype" in [field.name for field, _ in options_of(EXTRACT, to_file=True)]
