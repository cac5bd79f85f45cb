"""int8 is calibrated with the user's images, once, is near fp32, and runs only on request."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support.engines import SMALL, global_state, noise, tiny
from support.reference_weights import TINY, reference_network, relative_error

import r2ncli
from r2ncli.architectures import Preprocessing
from r2ncli.engine import quantization
from r2ncli.engine.folding import folded
from r2ncli.engine.graph import to_graph
from r2ncli.engine.openvino import OpenVinoEngine, compiled
from r2ncli.engine.quantization import MOST_IMAGES, choose_sample, decoded, quantized, spread
from r2ncli.errors import DeviceError, InputNotFoundError, OutputError, UsageError
from r2ncli.images.decode import DecodeRules
from r2ncli.model import conv_bn_pairs
from r2ncli.options import RunOptions
from r2ncli.outputs import results
from r2ncli.predictor import open_predictor

RULES = DecodeRules("exact")
SIZE = Preprocessing(image_size=32, resize_size=36)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R2N_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def never_again(monkeypatch):
    """Fail where a network is quantised after this was called."""

    def forbid():
        def again(*_arguments):
            raise AssertionError("quantised again")

        monkeypatch.setattr(quantization, "quantized", again)

    return forbid


def int8(network, pixels, batch_size=3):
    graph = quantized(to_graph(folded(network), ["fc"], "avg", SMALL, 1), pixels)
    graph.reshape([batch_size, *pixels.shape[1:]])
    return graph


def ignore(_warning):
    pass


def open_classifier(**options):
    return open_predictor(("fc",), RunOptions(**options))


# --- the numbers ------------------------------------------------------------------------


@pytest.mark.slow
@tiny
def test_every_convolution_runs_in_int8_and_the_logits_are_near(architecture):
    network, pixels = reference_network(architecture), noise(3)
    graph = to_graph(network, ["fc"], "avg", SMALL, 3)
    exact = OpenVinoEngine(compiled(graph, "fp32"), ["fc"], "fp32")
    run = OpenVinoEngine(compiled(int8(network, noise(20, seed=1)), "int8"), ["fc"], "int8")
    assert run.description.precision == "int8"
    convolutions = [
        node.rt_info["runtimePrecision"].astype(str)
        for node in run._network.get_runtime_model().get_ops()
        if node.rt_info["layerType"].astype(str) == "Convolution"
    ]
    assert len(convolutions) == len(list(conv_bn_pairs(network)))
    assert set(convolutions) <= {"u8", "i8"}
    error = relative_error(run(pixels)["fc"], exact(pixels)["fc"])
    assert 1e-5 < error < 0.1  # float32 would be nearer


def test_folding_batch_norms_changes_a_copy_and_not_what_it_computes():
    network, pixels = reference_network(TINY["v1b"]), noise(3)
    before = repr(network)
    plain, without = (
        OpenVinoEngine(compiled(to_graph(each, ["fc"], "avg", SMALL, 3), "fp32"), ["fc"], "fp32")
        for each in (network, folded(network))
    )
    assert relative_error(without(pixels)["fc"], plain(pixels)["fc"]) < 1e-5
    assert repr(network) == before
    assert "BatchNorm2d" in before
    assert "BatchNorm2d" not in repr(folded(network))


@pytest.mark.slow
def test_the_same_images_give_the_same_network():
    network, pixels = reference_network(TINY["v1b"]), noise(12)
    first, second = (
        [
            (node.get_friendly_name(), node.data.tobytes())
            for node in int8(network, pixels).get_ordered_ops()
            if node.get_type_name() == "Constant"
        ]
        for _ in range(2)
    )
    assert sorted(data for _, data in first) == sorted(data for _, data in second)


def test_a_network_that_is_not_quantised_is_not_taken_for_int8():
    graph = to_graph(reference_network(TINY["v1"]), ["fc"], "avg", SMALL, 1)
    with pytest.raises(
        UsageError, match="`precision=int8` is not supported on cpu: OpenVINO executes fp32"
    ):
        OpenVinoEngine(compiled(graph, "int8"), ["fc"], "int8")


def test_quantising_prints_nothing_changes_nothing_and_leaves_no_file(tmp_path, monkeypatch, capfd):
    for name in ("HOME", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(quantization.tempfile, "tempdir", None)
    before = global_state(), logging.getLoggerClass()
    int8(reference_network(TINY["v1"]), noise(4))
    assert (global_state(), logging.getLoggerClass()) == before
    assert "nncf" not in sys.modules
    assert capfd.readouterr() == ("", "")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_nncf_says_of_a_failure_is_a_device_error():
    graph = to_graph(folded(reference_network(TINY["v1"])), ["fc"], "avg", SMALL, 1)
    with pytest.raises(DeviceError, match="NNCF failed to quantise the network: "):
        quantized(graph, noise(2, 40))  # of another size than the graph's


# --- the sample -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 299, 300, 301, 600, 601, 1_000, 5_000, 12_345])
def test_a_sample_is_spread_evenly_over_all_images(count):
    taken = spread(iter(range(count)), MOST_IMAGES)
    assert len(taken) == min(count, MOST_IMAGES)
    assert taken == sorted(set(taken))
    gaps = np.diff([*taken, count])
    assert len(taken) == 0 or taken[0] == 0
    assert len(taken) == 0 or gaps.max() <= 3 * count / len(taken)


def test_a_sample_is_known_by_its_images_and_not_by_their_names(pictures, tmp_path):
    first = choose_sample(pictures, RULES, 2, ignore)
    pictures.rename(tmp_path / "elsewhere")
    assert choose_sample([tmp_path / "elsewhere"], RULES, 1, ignore).sha256 == first.sha256
    (tmp_path / "elsewhere" / "00003.jpg").unlink()
    assert choose_sample([tmp_path / "elsewhere"], RULES, 1, ignore).sha256 != first.sha256


def test_a_sample_may_be_an_archive(pictures, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted(pictures.iterdir()):
            archive.write(path, path.name)
    zipped = choose_sample(str(tmp_path / "all.zip"), RULES, 2, ignore)
    assert zipped.sha256 == choose_sample(pictures, RULES, 2, ignore).sha256
    assert decoded(zipped, SIZE, ignore).shape == (20, 32, 32, 3)


def test_images_that_fail_are_left_out_with_a_sentence(pictures):
    (pictures / "00007.jpg").write_bytes(b"no picture")
    (pictures / "00008.jpg").write_bytes(b"")
    said = []
    sample = choose_sample(pictures, RULES, 2, said.append)
    pixels = decoded(sample, SIZE, said.append)
    assert pixels.shape == (18, 32, 32, 3)
    assert len(said) == 1
    assert "leaves out 2 of 20 images that cannot be used, such as " in said[0]
    assert "00007.jpg: not an image of a known format" in said[0]


def test_a_sample_that_changes_between_two_looks_is_refused(pictures):
    sample = choose_sample(pictures, RULES, 2, ignore)
    (pictures / "00007.jpg").write_bytes((pictures / "00008.jpg").read_bytes())
    with pytest.raises(InputNotFoundError, match="changed while they were read"):
        decoded(sample, SIZE, ignore)


def test_without_a_usable_image_there_is_no_calibration(tmp_path, tiny_weights):
    options = {"weights": tiny_weights, "precision": "int8"}
    with pytest.raises(InputNotFoundError, match=r"no image can be used$"):
        open_classifier(calibration=tmp_path, **options)
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(InputNotFoundError, match=r"used: .*a\.jpg: not an image"):
        open_classifier(calibration=tmp_path, **options)
    with pytest.raises(InputNotFoundError, match="no such file or folder"):
        open_classifier(calibration=tmp_path / "missing", **options)


# --- what is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "int8"}, "needs images to calibrate with: add `calibration`"),
        ({"calibration": "."}, "`calibration` is for `precision=int8`"),
        ({"calibration": ".", "precision": "bf16"}, "`calibration` is for `precision=int8`"),
        (
            {"calibration": ".", "precision": "int8", "backend": "torch"},
            "is not supported on cpu .*; `backend=openvino` supports it",
        ),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(options, sentence, pictures, tiny_weights):
    with pytest.raises(UsageError, match=sentence):
        r2ncli.classify(pictures, weights=tiny_weights, **options)


def test_features_are_never_int8(pictures, tiny_weights, tmp_path):
    options = {"weights": tiny_weights, "precision": "int8"}
    with pytest.raises(UsageError, match="calibration"):
        r2ncli.extract(pictures, layers=["fc"], **options)
    with pytest.raises(UsageError, match="calibration"):
        r2ncli.extract_to(tmp_path / "f.h5", pictures, **options)


def test_without_nncf_the_extra_is_named(pictures, tiny_weights, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match=r"pip install nncf"):
        open_classifier(weights=tiny_weights, precision="int8", calibration=pictures)


def test_auto_is_never_int8(tiny_weights):
    assert open_classifier(weights=tiny_weights).engine.description.precision in ("bf16", "fp32")


# --- in a run ---------------------------------------------------------------------------


def test_a_run_records_int8_and_the_samples_digest(pictures, tiny_weights, tmp_path, never_again):
    options = {"weights": tiny_weights, "precision": "int8"}
    out = tmp_path / "out.csv"
    said = []
    options |= {"on_quantising": said.append, "on_warning": pytest.fail}
    record = r2ncli.classify_to(out, pictures, calibration=[pictures], **options)
    assert said == [20]
    assert record["precision"] == "int8"
    sample = choose_sample(pictures, RULES, 1, ignore)
    assert record["calibration"] == {"sha256": sample.sha256, "images": 20}
    assert json.loads(Path(f"{out}.run.json").read_text()) == record

    never_again()
    assert r2ncli.classify_to(out, pictures, calibration=pictures, resume=True, **options) == record
    assert said == [20]
    exact = r2ncli.classify(pictures, weights=tiny_weights, precision="fp32")
    for ours, theirs in zip(results.read_rows(out), exact, strict=True):
        assert ours.predictions[0].probability == pytest.approx(
            next(
                each.probability
                for each in theirs.predictions
                if each.index == ours.predictions[0].index
            ),
            abs=0.1,
        )


@pytest.mark.slow
def test_another_sample_is_another_entry_of_the_cache_and_cannot_resume(
    pictures, tiny_weights, tmp_path, make_pictures, never_again
):
    other = make_pictures(tmp_path / "other", 5, seed=1)
    options = {"weights": tiny_weights, "precision": "int8"}
    out = tmp_path / "out.csv"
    r2ncli.classify_to(out, pictures, calibration=pictures, **options)
    with pytest.raises(OutputError, match="calibration sha256 was "):
        r2ncli.classify_to(out, pictures, calibration=other, resume=True, **options)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    never_again()
    open_classifier(calibration=other, **options)
    with pytest.raises(AssertionError, match="quantised again"):
        open_classifier(calibration=[other, pictures], **options)


@pytest.mark.slow
def test_a_warm_run_imports_neither_torch_nor_nncf(pictures, tiny_weights, tmp_path):
    program = (
        "import sys; from r2ncli.cli.app import app\n"
        "try: app()\n"
        "finally: print('torch' in sys.modules, 'nncf' in sys.modules, file=sys.stderr)"
    )
    arguments = [
        *("classify", str(pictures), "--weights", str(tiny_weights), "-q", "--device", "cpu"),
        *("--precision", "int8", "--calibration", str(pictures)),
    ]
    runs = [
        subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True, text=True, check=True, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(r2ncli.__file__).parents[1])},
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [run.stderr.split()[-2:] for run in runs] == [["True", "False"], ["False", "False"]]
    assert "quantising" not in runs[0].stderr  # -q
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.count(",ok,") == 20
