"""The pipeline gives one row for each input, in order, whatever its neighbours do."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import r2ncli
from r2ncli.engine.base import EngineDescription, empty_pixels
from r2ncli.errors import CheckpointError, DeviceError, InputNotFoundError, UsageError
from r2ncli.images.decode import DecodeRules, decode
from r2ncli.options import RunOptions
from r2ncli.pipeline import run, top_classes
from r2ncli.predictor import LOGITS, Predictor, open_predictor
from r2ncli.sources.walk import file_input

backends = pytest.mark.parametrize("backend", ["torch", "openvino"])


def probabilities(classifications):
    """Every probability by path and class index."""
    return {(c.path, p.index): p.probability for c in classifications for p in c.predictions}


def test_rows_come_in_input_order_however_long_each_decode_takes(pictures, tiny_weights):
    Image.effect_noise((3000, 2500), 50).save(pictures / "00003.jpg")  # slow among quick ones
    found = [c.path for c in r2ncli.classify(pictures, weights=tiny_weights, workers=4)]
    assert found == [f"{pictures}/{n:05d}.jpg" for n in range(20)]


@backends
def test_a_classification_is_the_softmax_of_the_plain_network(pictures, tiny_weights, backend):
    network = r2ncli.load_model(tiny_weights)
    preprocessing = r2ncli.Preprocessing(32, 36)
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    for c in r2ncli.classify(
        pictures, weights=tiny_weights, precision="fp32", topk=6, backend=backend, device="cpu"
    ):
        pixels = decode(Path(c.path).read_bytes(), preprocessing, DecodeRules("exact"))
        batch = ((torch.tensor(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]
        with torch.inference_mode():
            expected = network(batch).softmax(1)[0]
        assert [p.index for p in c.predictions] == expected.argsort(descending=True).tolist()
        for p in c.predictions:
            assert p.probability == pytest.approx(float(expected[p.index]), rel=1e-4)
            assert p.label == ["ant", "bee", "cow", "doe", "eel", "fox"][p.index]
            assert p.wnid is None


@backends
def test_features_are_what_a_hook_on_the_plain_network_sees(pictures, tiny_weights, backend):
    network = r2ncli.load_model(tiny_weights)
    preprocessing = r2ncli.Preprocessing(32, 36)
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    seen = {}
    for name in ("layer1.0.bn1", "layer3"):
        network.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: seen.update({name: output[0].numpy().copy()})
        )
    rows = r2ncli.extract(
        pictures, weights=tiny_weights, layers=["layer3", "layer1.0.bn1"], pool="none",
        precision="fp32", backend=backend, device="cpu",
    )  # fmt: skip
    for row in rows:
        pixels = decode(Path(row.path).read_bytes(), preprocessing, DecodeRules("exact"))
        with torch.inference_mode():
            network(((torch.tensor(pixels) / 255 - mean) / std).permute(2, 0, 1)[None])
        assert list(row.features) == ["layer3", "layer1.0.bn1"]
        for name, values in row.features.items():
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, seen[name], atol=1e-5)


@backends
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_row_does_not_depend_on_batch_or_threads(
    pictures, tiny_weights, batch_size, workers, backend
):
    options = {"weights": tiny_weights, "precision": "fp32", "topk": 6, "backend": backend}
    usual = probabilities(r2ncli.classify(pictures, **options))
    other = probabilities(
        r2ncli.classify(pictures, batch_size=batch_size, workers=workers, **options)
    )
    alone = probabilities(r2ncli.classify(pictures / "00004.jpg", **options))
    assert usual.keys() == other.keys()
    assert len(usual) == 20 * 6
    assert max(abs(usual[key] - other[key]) for key in usual) < 1e-5
    assert max(abs(usual[key] - alone[key]) for key in alone) < 1e-5


@backends
def test_a_row_does_not_depend_on_where_a_batch_begins(pictures, tiny_weights, backend):
    options = {"weights": tiny_weights, "topk": 6, "batch_size": 8, "backend": backend}
    usual = probabilities(r2ncli.classify(pictures, **options))
    (pictures / "00000.jpg").unlink()
    (pictures / "00007.jpg").unlink()
    shifted = probabilities(r2ncli.classify(pictures, **options))
    assert len(shifted) == 18 * 6
    assert all(usual[key] == shifted[key] for key in shifted)


def test_a_broken_image_keeps_its_row_and_leaves_its_neighbours_alone(pictures, tiny_weights):
    before = list(r2ncli.classify(pictures, weights=tiny_weights))
    whole = (pictures / "00005.jpg").read_bytes()
    (pictures / "00005.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "00011.jpg").write_text("not a picture")
    after = list(r2ncli.classify(pictures, weights=tiny_weights))
    assert [c.path for c in after] == [c.path for c in before]
    for n in range(20):
        if n in (5, 11):
            assert after[n].predictions == ()
            assert after[n].error
        else:
            assert after[n] == before[n]
    assert "runcated" in after[5].error


@backends
def test_the_same_images_give_the_same_rows_each_time(pictures, tiny_weights, backend):
    options = {"weights": tiny_weights, "batch_size": 3, "backend": backend, "layers": ["layer2"]}
    first, second = (list(r2ncli.extract(pictures, **options)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.path == other.path
        assert np.array_equal(one.features["layer2"], other.features["layer2"])


def test_rows_come_in_input_order_from_several_streams(pictures):
    class SlowFirst(CountingEngine):
        def __call__(self, pixels):
            first = len(self.batches) == 0
            outputs = super().__call__(pixels)
            if first:
                while len(self.batches) < 3:  # two others overtake it
                    time.sleep(0.001)
            return outputs

    engine = SlowFirst(4, streams=3)
    inputs = [file_input(str(path), path.name) for path in sorted(pictures.iterdir())]
    batches = list(run(inputs, counting_predictor(engine), everything))
    names = [name for batch in batches for name in batch.names]
    assert names == [source.name for source in inputs]
    alone = run(inputs, counting_predictor(CountingEngine(4)), everything)
    for one, other in zip(batches, alone, strict=True):
        np.testing.assert_array_equal(one.columns[LOGITS], other.columns[LOGITS])


def test_a_folder_of_broken_images_only_gives_only_failed_rows(tmp_path, tiny_weights):
    for n in range(19):
        (tmp_path / f"{n}.jpg").write_bytes(b"")
    rows = list(r2ncli.extract(tmp_path, weights=tiny_weights))
    assert len(rows) == 19
    assert {row.error for row in rows} == {"empty file"}
    assert all(row.features == {} for row in rows)


def test_topk_is_clamped_to_the_classes_and_must_be_positive(pictures, tiny_weights):
    assert len(next(r2ncli.classify(pictures, weights=tiny_weights, topk=99)).predictions) == 6
    with pytest.raises(UsageError, match="`topk` must be at least 1"):
        r2ncli.classify(pictures, weights=tiny_weights, topk=0)


def ranked(logits, topk):
    """Indices and probabilities of each row's `topk` highest logits, as `classify` keeps them."""
    kept = top_classes(topk)({LOGITS: np.array(logits, dtype=np.float32)})
    return kept["index"].tolist(), kept["probability"].tolist()


def test_equal_logits_are_ranked_by_their_index():
    assert ranked([[1, 3, 3, 0], [2, 2, 2, 2], [0, 1, 2, 3]], 4)[0] == [
        [1, 2, 0, 3],
        [0, 1, 2, 3],
        [3, 2, 1, 0],
    ]
    assert ranked([[1, 3, 3, 3, 3, 3], [5, 4, 4, 4, 4, 4]], 2)[0] == [[1, 2], [0, 1]]


def test_the_highest_logits_are_those_of_a_full_sort():
    random = np.random.default_rng(0)
    for logits in (random.normal(size=(50, 1000)), random.integers(0, 9, (50, 40))):
        logits = logits.astype(np.float32)
        for topk in (1, 5, 40):
            full = np.argsort(-logits, axis=1, kind="stable")[:, :topk]
            assert ranked(logits, topk)[0] == full.tolist()


def test_what_is_no_number_comes_last():
    assert ranked([[np.nan, 1, np.nan, 2]], 3)[0] == [[3, 1, 0]]


def test_huge_logits_do_not_overflow():
    assert ranked([[1e4, -1e4]], 2)[1] == [[1.0, 0.0]]


def test_progress_tells_every_batch_its_failures_and_the_total(pictures, tiny_weights):
    (pictures / "00002.jpg").write_bytes(b"")
    seen = []
    options = {"weights": tiny_weights, "batch_size": 8, "on_progress": seen.append}
    list(r2ncli.classify(pictures, **options))
    assert [(p.rows, p.done, p.failed) for p in seen] == [(8, 8, 1), (8, 16, 1), (4, 20, 1)]
    assert [p.failures for p in seen] == [((f"{pictures}/00002.jpg", "empty file"),), (), ()]
    assert (seen[-1].found, seen[-1].walk_ended) == (20, True)


def test_errors_come_at_the_call_and_not_with_the_first_row(pictures, tiny_weights):
    with pytest.raises(InputNotFoundError, match="nowhere"):
        r2ncli.classify(["nowhere"], weights=tiny_weights)
    with pytest.raises(CheckpointError, match="no such weights"):
        r2ncli.classify(pictures, weights="nothing.pth")
    with pytest.raises(DeviceError, match="tpu"):
        r2ncli.classify(pictures, weights=tiny_weights, device="tpu")
    for options in (
        {"precision": "fp8"}, {"pool": "mean"}, {"decode": "fast"}, {"backend": "jax"},
        {"batch_size": 0}, {"workers": 0}, {"image_size": 8}, {"layers": ["layr3"]},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            r2ncli.extract(pictures, weights=tiny_weights, **options)


def test_an_option_that_cannot_be_is_refused_before_any_weights_are_looked_for(pictures):
    with pytest.raises(UsageError, match="backend"):
        r2ncli.classify(pictures, weights="nothing.pth", backend="jax")
    with pytest.raises(DeviceError, match="tpu"):
        r2ncli.classify(pictures, weights="nothing.pth", device="tpu")


def test_decoding_on_a_gpu_is_refused_with_the_ways_there_are(pictures):
    with pytest.raises(UsageError, match="`decode` must be one of auto, exact, not 'gpu'"):
        r2ncli.classify(pictures, decode="gpu")


def test_a_wrong_layer_gets_the_nearest_right_ones(pictures, tiny_weights):
    with pytest.raises(UsageError, match=r"no layer 'layr3'\. Did you mean layer3"):
        r2ncli.extract(pictures, weights=tiny_weights, layers=["layr3"])


def test_one_layer_may_be_a_plain_name_and_none_is_an_error(pictures, tiny_weights):
    row = next(r2ncli.extract(pictures, weights=tiny_weights, layers="layer3"))
    assert list(row.features) == ["layer3"]
    with pytest.raises(UsageError, match="`layers` names no layer"):
        r2ncli.extract(pictures, weights=tiny_weights, layers=[])


def test_too_large_a_batch_is_a_device_error(pictures, tiny_weights):
    with pytest.raises(DeviceError, match="batch"):
        list(r2ncli.classify(pictures, weights=tiny_weights, batch_size=10**12))


def test_no_image_is_an_error_that_says_what_was_looked_for(tmp_path, tiny_weights):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(InputNotFoundError, match=r"no image found .*jpg"):
        list(r2ncli.classify(tmp_path, weights=tiny_weights))


def test_image_size_and_no_crop_reach_the_network(pictures, tiny_weights):
    for size, side in ((64, 2), (96, 3)):
        rows = r2ncli.extract(pictures, weights=tiny_weights, image_size=size, pool="none")
        assert next(rows).features["layer4"].shape == (64, side, side)
    wide = pictures / "wide.png"
    Image.linear_gradient("L").resize((400, 40)).save(wide)
    cropped, stretched = (
        next(r2ncli.extract(wide, weights=tiny_weights, no_crop=no_crop)).features["layer4"]
        for no_crop in (False, True)
    )
    assert not np.allclose(cropped, stretched)


def test_leaving_early_ends_every_thread(pictures, tiny_weights):
    before = threading.active_count()
    results = r2ncli.classify(pictures, weights=tiny_weights, batch_size=2)
    next(results)
    assert threading.active_count() > before
    results.close()
    deadline = time.monotonic() + 60
    while threading.active_count() > before:  # the close itself waits for nobody
        assert time.monotonic() < deadline
        time.sleep(0.01)


class CountingEngine:
    """Gives each picture's mean, and keeps what batches it was given."""

    def __init__(self, batch_size, streams=1):
        self.description = EngineDescription("test", "", "cpu", "", "fp32", batch_size, streams)
        self.batches = []

    def empty_batch(self, side):
        return empty_pixels(self.description.batch_size, side)

    def __call__(self, pixels):
        self.batches.append(pixels.shape)
        return {LOGITS: pixels.reshape(len(pixels), -1).mean(1, dtype=np.float32)[:, None]}


def everything(outputs):
    """Keep all outputs of a batch."""
    return outputs


def counting_predictor(engine, workers=3):
    return Predictor(
        engine, r2ncli.Preprocessing(32, 32), DecodeRules("exact"), workers, Path("x"), "", "", 1,
        None, "avg", {LOGITS: (1,)},
    )  # fmt: skip


def test_every_batch_has_the_engines_size(pictures):
    engine = CountingEngine(8)
    inputs = [file_input(str(path), path.name) for path in sorted(pictures.iterdir())]
    batches = list(run(inputs, counting_predictor(engine), everything))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    assert engine.batches == [(8, 32, 32, 3)] * 3


def test_only_a_few_batches_are_under_way_however_many_images_there_are(pictures):
    inputs = [file_input(str(path), path.name) for path in sorted(pictures.iterdir())]
    taken = 0

    def many():
        nonlocal taken
        for taken in range(1, 2001):
            yield inputs[taken % 20]

    predictor = counting_predictor(CountingEngine(8))
    batches = run(many(), predictor, everything)
    under_way = [taken - 8 * given for given, _ in enumerate(batches)]
    assert taken == 2000
    assert max(under_way) <= 8 * (3 + -(-2 * predictor.workers // 8))


def test_an_engine_that_fails_ends_the_run_with_its_error(pictures):
    class FailingEngine(CountingEngine):
        def __call__(self, pixels):
            if len(self.batches) == 1:
                raise DeviceError("the card fell out")
            return super().__call__(pixels)

    inputs = [file_input(str(path), path.name) for path in sorted(pictures.iterdir())]
    batches = run(inputs, counting_predictor(FailingEngine(8)), everything)
    with pytest.raises(DeviceError, match="fell out"):
        list(batches)


def test_a_predictor_says_what_really_runs(tiny_weights):
    options = RunOptions(weights=tiny_weights, precision="fp32", batch_size=5)
    predictor = open_predictor(["layer4"], options)
    description = predictor.engine.description
    assert (description.precision, description.batch_size) == ("fp32", 5)
    assert description.device == "cpu" or description.device.startswith("cuda")
    assert predictor.shapes == {"layer4": (64,)}
    assert len(predictor.sha256) == 64


def test_a_keyword_that_nobody_knows_is_an_error(pictures, tiny_weights):
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        r2ncli.classify(pictures, weights=tiny_weights, batchsize=3)
