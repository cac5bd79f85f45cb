"""The checks run: runs that are killed, corrupted files, and the comparison with other tools."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from support.scripts import CHECKS, example

EXTRAS = ("timm", "nncf", "pyarrow", "pillow_heif", "fsspec", "onnx", "onnxscript")


@pytest.mark.parametrize("name", ["stress", "fuzz", "compare_peers"])
def test_help_needs_no_extra(name: str) -> None:
    program = (
        "import os, runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({EXTRAS}))\n"
        "script = sys.argv[1]\n"
        "sys.path[0] = os.path.dirname(script)\n"
        "sys.argv[:] = [script, '--help']\n"
        "runpy.run_path(script, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", program, str(CHECKS / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: " in done.stdout


# --- stress -----------------------------------------------------------------------------


def stress(*arguments: str, script: str = "stress.py") -> dict[str, Any]:
    """The document that the script ends with; it must end well."""
    command = [sys.executable, str(CHECKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "h5"])
def test_runs_that_are_killed_at_random_moments_end_as_an_uninterrupted_one(kind: str) -> None:
    document = stress("kill", "--kills", "4", "--images", "1000", "--format", kind)
    assert document["formats"][kind]["kills"] == 4


@pytest.mark.slow
def test_five_thousand_images_take_no_more_memory_than_one_thousand() -> None:
    assert stress("many", "--inputs", "5000")["more_mb"] < 100


@pytest.mark.slow
def test_two_thousand_corrupted_files_break_nothing() -> None:
    report: dict[str, Any] = stress("files", "--count", "2000", "--jobs", "1")
    assert report["broken"] == []
    assert sum(sum(outcomes.values()) for outcomes in report["formats"].values()) == 2000
    for kind, outcomes in report["formats"].items():
        assert outcomes.keys() == {"decoded", "failed"}, kind
    assert len(report["formats"]) >= 10


@pytest.mark.slow
def test_files_that_end_the_process_are_named_and_the_rest_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = example("stress", monkeypatch)
    nothing = script.Corruption(originals=None, seed=0, max_pixels=1)  # ends it at once
    outcomes, troubles, _ = script.watch(range(7, 13, 3), script.decode_files, nothing)
    assert outcomes == []
    assert troubles == [{"number": n, "what": "ends the process: 1"} for n in (7, 10)]


# --- fuzz -------------------------------------------------------------------------------


@pytest.mark.slow
def test_mutants_of_every_kind_of_file_give_no_other_error_than_ours() -> None:
    report = stress("--count", "60", script="fuzz.py")
    for kind, found in report["kinds"].items():
        assert found["mutants"] == 60, kind
        assert {"read", "refused"} & found.keys(), kind


# --- compare_peers ------------------------------------------------------------------------


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return example("compare_peers", monkeypatch)


def compare_peers(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHECKS / "compare_peers.py"), "--rounds", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peers", "compared"),
    [("timm_best,model", {"timm_best", "r2n"}), ("r2n_extract", {"r2n", "r2n_extract"})],
)
def test_peers_are_compared_on_the_same_images_in_turns(peers: str, compared: set[str]) -> None:
    done = compare_peers("--images", "4", "--seconds", "0.1", "--peers", peers)
    assert done.returncode == 0, (done.stdout, done.stderr)
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["ratios"]["r2n"]) == compared
    assert report["ratios"]["r2n"]["r2n"] == [1.0]
    assert report["processor"]["model"] in done.stdout.splitlines()[0]
    assert ({"r2n model", "r2n whole"} < set(report["images_per_second"])) == ("model" in peers)


def test_peers_that_nobody_knows_are_refused_with_those_there_are() -> None:
    done = compare_peers("--peers", "tim")
    assert done.returncode == 2
    assert "timm_default" in done.stderr


@pytest.mark.parametrize("has_bf16", [True, False])
def test_timm_computes_in_bfloat16_only_where_the_processor_does(
    has_bf16: bool, peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from r2ncli.engine import base as engine

    monkeypatch.setattr(engine, "cpu_has_bf16", lambda: has_bf16)
    found = peers.processor()
    assert found["bfloat16_in_hardware"] == has_bf16
    assert peers.best_settings().bf16 == has_bf16
    assert found["model"] == engine.cpu_model()
    assert found["cores"] == engine.cores()


@pytest.mark.parametrize("absent", ["timm", "nncf"])
def test_a_peer_whose_library_is_absent_is_left_out_or_refused(
    absent: str, peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str, real: Callable[[str], object] = peers.find_spec) -> object:
        return None if name == absent else real(name)

    monkeypatch.setattr(peers, "find_spec", find_spec)
    of_it = {name for name, library in peers.LIBRARIES.items() if library == absent}
    assert peers.chosen_peers(None) == {*peers.PEERS, peers.MODEL} - of_it
    for name in of_it:
        with pytest.raises(peers.typer.BadParameter, match=f"{absent} is not installed"):
            peers.chosen_peers(name)
