"""A checkpoint with NaN or infinity is refused; an image whose output has them is a failed row."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import error_of
from support.extras import needs
from torch import Tensor

import r2ncli
from r2ncli.engine.base import cpu_precisions
from r2ncli.engine.graph import may_overflow
from r2ncli.errors import CheckpointError
from r2ncli.pipeline import kept, top_classes
from r2ncli.weights.convert import convert
from r2ncli.weights.loading import load_model

ENGINES = [
    (backend, precision) for backend in ("torch", "openvino") for precision in cpu_precisions()
]
NOT_FINITE = "the network's output is not finite"
Change = Callable[[dict[str, Tensor]], None]


@pytest.fixture
def changed(tiny_weights: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """A function that writes the tiny checkpoint with a change in its tensors."""

    def write(change: Change) -> Path:
        state_dict = load_file(tiny_weights)
        change(state_dict)
        preprocessing = {"image_size": 32, "resize_size": 36}
        path = tmp_path / "changed.safetensors"
        save_file(state_dict, path, {"r2n": json.dumps({"preprocessing": preprocessing})})
        return path

    return write


def set_value(name: str, value: float) -> Change:
    def change(state_dict: dict[str, Tensor]) -> None:
        state_dict[name].view(-1)[0] = value

    return change


# --- a checkpoint ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["layer3.0.bn1.running_var", "conv1.0.weight", "fc.bias"])
def test_a_checkpoint_with_a_value_that_is_not_finite_is_refused_by_its_tensor(
    name: str, value: float, changed: Callable[[Change], Path]
) -> None:
    path = changed(set_value(name, value))
    text = error_of(load_model, path)
    assert f"the tensor {name} has 1 value that is not finite" in text
    assert name in error_of(convert, path, path.with_name("out.pth"))


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_classify_and_extract_refuse_it_too(
    backend: str, changed: Callable[[Change], Path], pictures: Path
) -> None:
    path = changed(set_value("layer3.0.bn1.running_var", float("nan")))
    for run in (r2ncli.classify, r2ncli.extract):
        with pytest.raises(CheckpointError, match=r"layer3\.0\.bn1\.running_var"):
            run(pictures, weights=path, backend=backend)


def test_a_value_that_float32_cannot_hold_is_refused(
    changed: Callable[[Change], Path],
) -> None:
    def change(state_dict: dict[str, Tensor]) -> None:
        state_dict["fc.weight"] = state_dict["fc.weight"].double()
        state_dict["fc.weight"][1, 2] = 1e300

    assert "the tensor fc.weight has 1 value" in error_of(load_model, changed(change))


# --- an image ----------------------------------------------------------------------------


def overflow_in_the_classifier(state_dict: dict[str, Tensor]) -> None:
    state_dict["fc.weight"][:] = 3e38


def overflow_inside(state_dict: dict[str, Tensor]) -> None:
    for name in state_dict:
        if name.endswith("bn3.weight"):
            state_dict[name] *= 1e25


def overflow_of_both_signs(state_dict: dict[str, Tensor]) -> None:
    state_dict["layer2.0.conv1.weight"] = 3e38 * state_dict["layer2.0.conv1.weight"].sign()


def root_of_a_negative_number(state_dict: dict[str, Tensor]) -> None:
    state_dict["layer2.0.bn1.running_var"] -= 10


OVERFLOWS = (
    overflow_in_the_classifier, overflow_inside, overflow_of_both_signs, root_of_a_negative_number,
)  # fmt: skip


@pytest.mark.parametrize("change", OVERFLOWS)
@pytest.mark.parametrize(("backend", "precision"), ENGINES)
def test_an_image_whose_output_is_not_finite_is_a_failed_row_in_every_backend(
    backend: str,
    precision: str,
    change: Change,
    changed: Callable[[Change], Path],
    pictures: Path,
) -> None:
    path = changed(change)
    rows = list(
        r2ncli.classify(pictures, weights=path, backend=backend, precision=precision, max=3)
    )
    assert [row.error for row in rows] == [NOT_FINITE] * 3
    assert all(row.predictions == () for row in rows)


@pytest.mark.parametrize("pool", ["avg", "max", "none"])
@pytest.mark.parametrize(("backend", "precision"), ENGINES)
@pytest.mark.slow
def test_only_the_layers_that_are_asked_for_decide(
    backend: str,
    precision: str,
    pool: str,
    changed: Callable[[Change], Path],
    pictures: Path,
) -> None:
    path = changed(root_of_a_negative_number)

    def errors(layers: Sequence[str]) -> set[str | None]:
        rows = r2ncli.extract(
            pictures, weights=path, backend=backend, precision=precision, layers=layers, pool=pool,
            max=2,
        )  # fmt: skip
        return {row.error for row in rows}

    assert errors(["conv1", "layer1"]) == {None}
    assert errors(["layer2.0.bn1"]) == {NOT_FINITE}
    assert errors(["layer1", "layer3"]) == {NOT_FINITE}


def test_a_network_that_overflows_is_not_quantised(
    changed: Callable[[Change], Path], pictures: Path
) -> None:
    needs("int8", "nncf")
    path = changed(overflow_inside)
    with pytest.raises(CheckpointError, match="cannot be quantised"):
        r2ncli.classify(pictures, weights=path, precision="int8", calibration=pictures)


def test_a_usual_network_is_executed_without_checks_inside(tiny_weights: Path) -> None:
    network = load_model(tiny_weights)
    assert not may_overflow(network, r2ncli.Preprocessing())


@pytest.mark.parametrize("change", OVERFLOWS[1:])
def test_a_network_that_may_overflow_is_known(
    change: Change, changed: Callable[[Change], Path]
) -> None:
    assert may_overflow(load_model(changed(change)), r2ncli.Preprocessing())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_image_that_fails_leaves_its_neighbours_alone(value: float) -> None:
    logits = np.arange(12, dtype=np.float32).reshape(3, 4)
    alone = top_classes(2)({"fc": logits})
    broken = logits.copy()
    broken[1, 2] = value
    errors: list[str | None] = [None, None]  # the last row is padding
    columns = kept({"fc": broken}, errors, top_classes(2))
    assert errors == [None, NOT_FINITE]
    for name, column in columns.items():
        assert np.array_equal(column[0], alone[name][0])
    first: list[str | None] = ["truncated", "truncated", None]
    kept({"fc": broken}, first, top_classes(2))
    assert first == ["truncated", "truncated", None]


def test_a_value_that_is_too_large_for_float16_fails_its_row(
    changed: Callable[[Change], Path], pictures: Path, tmp_path: Path
) -> None:
    def change(state_dict: dict[str, Tensor]) -> None:
        state_dict["layer4.0.bn3.bias"] += 1e5

    path = changed(change)
    for dtype, error in (
        ("float32", ""), ("float16", "the network's output is too large for float16"),
    ):  # fmt: skip
        output = tmp_path / f"{dtype}.h5"
        r2ncli.extract_to(output, pictures, weights=path, dtype=dtype, max=2)
        with h5py.File(output) as file:
            assert list(file["error"].asstr()) == [error] * 2
            assert np.isfinite(file["features/layer4"][:]).all() == (dtype == "float32")
