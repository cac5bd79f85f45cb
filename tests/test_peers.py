"""What other tools get wrong, one test each, which shows that it is not ours.

The names before the colons are where the defect was seen. Some are proved at length in the
tests of a module too; here each stands in its user's words.
"""

from __future__ import annotations

import csv
import io
import os
import tomllib
from itertools import count, islice
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import r2ncli
from r2ncli.cli.app import app
from r2ncli.errors import CheckpointError, DeviceError
from r2ncli.pipeline import run
from r2ncli.predictor import open_classifier
from r2ncli.sources.walk import Input


def r2n(*arguments):
    """Run a command: its exit code, stdout and stderr."""
    result = CliRunner().invoke(app, [*map(str, arguments)], prog_name="r2n")
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def by_name(pictures, weights, **options):
    return {Path(c.path).name: c for c in r2ncli.classify(pictures, weights=weights, **options)}


# --- timm's inference script ------------------------------------------------------------------


def test_timm_an_unreadable_picture_keeps_its_own_row_and_no_other_ones_answer(
    pictures, tiny_weights
):
    before = by_name(pictures, tiny_weights)
    (pictures / "00003.jpg").write_bytes(b"no picture")
    code, stdout, _ = r2n("classify", pictures, "--weights", tiny_weights, "-o", "-")
    assert code == 7
    rows = {Path(row["path"]).name: row for row in rows_of(stdout)}
    assert (rows["00003.jpg"]["status"], rows["00003.jpg"]["index_1"]) == ("failed", "")
    for name in before.keys() - {"00003.jpg"}:
        assert int(rows[name]["index_1"]) == before[name].predictions[0].index


def test_timm_a_truncated_picture_and_a_bomb_end_no_run(tmp_path, pictures, tiny_weights):
    whole = (pictures / "00000.jpg").read_bytes()
    (pictures / "00001.jpg").write_bytes(whole[: len(whole) // 2])
    header = b"P6 60000 60000 255\n"  # 3.6 billion pixels
    (pictures / "00002.ppm").write_bytes(header + b"\0" * 100)
    record = r2ncli.classify_to(tmp_path / "x.csv", pictures, weights=tiny_weights)
    assert record["counts"] == {"inputs": 21, "ok": 19, "failed": 2}


@pytest.mark.parametrize("suffix", ["webp", "bmp", "tif", "png", "gif"])
def test_timm_no_known_kind_of_picture_is_passed_over(tmp_path, tiny_weights, suffix):
    Image.new("RGB", (40, 40), "red").save(tmp_path / f"a.{suffix}")
    assert [c.error for c in r2ncli.classify(tmp_path, weights=tiny_weights)] == [None]


def test_timm_a_link_to_the_folder_above_multiplies_nothing(pictures, tiny_weights):
    os.symlink("..", pictures / "again")
    os.symlink(".", pictures / "self")
    warnings = []
    found = r2ncli.classify(pictures, weights=tiny_weights, on_warning=warnings.append)
    names = [c.path for c in found]
    assert len(names) == len(set(names))
    assert sum(name.endswith("00000.jpg") for name in names) <= 2  # itself, and below `..` once
    assert warnings


def test_timm_a_cell_is_one_number(pictures, tiny_weights):
    _, stdout, _ = r2n("classify", pictures, "--weights", tiny_weights, "-o", "-")
    for row in rows_of(stdout):
        assert 0 <= float(row["probability_2"]) <= 1
        assert 0 <= int(row["index_2"]) < 6


def test_timm_rows_come_while_more_inputs_than_memory_holds_are_still_to_come(
    pictures, tiny_weights
):
    content = (pictures / "00000.jpg").read_bytes()
    endless = (Input(f"{number}.jpg", lambda _: content) for number in count())
    pipeline = open_classifier(1, weights=tiny_weights)
    rows = run(endless, pipeline)
    assert [row.name for row in islice(rows, 300)] == [f"{number}.jpg" for number in range(300)]
    rows.close()


def test_timm_the_same_file_name_in_two_folders_is_two_rows(tmp_path, make_pictures, tiny_weights):
    make_pictures(tmp_path / "in" / "a", 2)
    make_pictures(tmp_path / "in" / "b", 2)
    names = [c.path for c in r2ncli.classify(tmp_path / "in", weights=tiny_weights)]
    assert len(set(names)) == 4


def test_timm_without_a_card_the_default_device_works(pictures, tiny_weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = r2ncli.classify_to(pictures / "x.csv", pictures, weights=tiny_weights)
    assert record["device"]["kind"] == "cpu"


def test_timm_two_pictures_of_16_bits_are_not_both_white(tmp_path, tiny_weights):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(np.ascontiguousarray(ramp.T[::-1])).save(tmp_path / "b.png")
    a, b = (c.predictions for c in r2ncli.classify(tmp_path, weights=tiny_weights))
    assert [p.probability for p in a] != [p.probability for p in b]


# --- ultralytics --------------------------------------------------------------------------------


def test_ultralytics_pictures_in_subfolders_are_found(tmp_path, make_pictures, tiny_weights):
    make_pictures(tmp_path / "one" / "two" / "three", 2)
    assert len(list(r2ncli.classify(tmp_path, weights=tiny_weights))) == 2


def test_ultralytics_probabilities_keep_every_digit(pictures, tiny_weights):
    _, stdout, _ = r2n("classify", pictures, "--weights", tiny_weights, "-o", "-")
    exact = by_name(pictures, tiny_weights)
    for row in rows_of(stdout):
        wanted = exact[Path(row["path"]).name].predictions[0].probability
        assert float(np.float32(row["probability_1"])) == wanted


def test_ultralytics_and_imagededup_a_folder_of_broken_pictures_alone_is_rows_and_exit_7(
    tmp_path, tiny_weights
):
    for number in range(20):
        (tmp_path / f"{number}.jpg").write_bytes(b"\xff\xd8 broken")
    code, stdout, stderr = r2n("classify", tmp_path, "--weights", tiny_weights, "-o", "-")
    assert code == 7
    assert [row["status"] for row in rows_of(stdout)] == ["failed"] * 20
    assert "broken" not in stdout.splitlines()[0]
    assert "20 images (20 failed)" in stderr


def test_ultralytics_only_data_is_on_stdout(pictures, tiny_weights):
    (pictures / "00000.jpg").write_bytes(b"")
    _, stdout, stderr = r2n("classify", pictures, "--weights", tiny_weights)
    assert len(rows_of(stdout)) == len(stdout.splitlines()) - 1 == 20
    assert "empty file" in stderr
    assert "20 images" in stderr


# --- THINGSvision ---------------------------------------------------------------------------------


def test_thingsvision_several_layers_come_from_one_run_with_the_names_in_the_file(
    pictures, tiny_weights
):
    Image.new("RGB", (40, 40), "red").save(pictures / "a.webp")
    out = pictures / "f.h5"
    arguments = ("--layer", "layer1", "--layer", "layer4.0.bn1", "-o", out)
    code, _, _ = r2n("extract", pictures, "--weights", tiny_weights, *arguments)
    assert code == 0
    with h5py.File(out) as file:
        assert set(file["features"]) == {"layer1", "layer4.0.bn1"}
        assert file["paths"].asstr()[-1].endswith("a.webp")
        assert len(file["paths"]) == len(file["features/layer1"]) == 21


def test_thingsvision_no_library_is_held_back_from_its_next_release():
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    for requirement in project["project"]["dependencies"]:
        versions = requirement.partition(";")[0]
        assert not any(held in versions for held in ("<", "==", "~="))
        assert "<" not in requirement


# --- clip-retrieval -------------------------------------------------------------------------------


def test_clip_retrieval_features_are_float32_unless_told(pictures, tiny_weights):
    record = r2ncli.extract_to(pictures / "f.h5", pictures, weights=tiny_weights)
    with h5py.File(pictures / "f.h5") as file:
        assert file["features/layer4"].dtype == np.float32
    assert record["dtype"] == "float32"


def test_clip_retrieval_a_folder_is_listed_once(tmp_path, make_pictures, tiny_weights, monkeypatch):
    make_pictures(tmp_path / "a" / "b", 3)
    listed = []
    real = os.scandir

    def counting(path):
        listed.append(os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", counting)
    assert len(list(r2ncli.classify(tmp_path / "a", weights=tiny_weights))) == 3
    ours = [path for path in listed if path.startswith(str(tmp_path / "a"))]
    assert sorted(ours) == [str(tmp_path / "a"), str(tmp_path / "a" / "b")]


class PowerCutError(Exception):
    """Ends a run in its middle."""


def test_clip_retrieval_what_a_killed_run_did_is_not_done_again(pictures, tiny_weights):
    def cut(progress):
        if progress.done == 13:
            raise PowerCutError

    out = pictures / "x.csv"
    with pytest.raises(PowerCutError):
        r2ncli.classify_to(out, pictures, weights=tiny_weights, on_progress=cut)
    seen = []
    r2ncli.classify_to(
        out, pictures, weights=tiny_weights, resume=True, on_progress=lambda p: seen.append(p.done)
    )
    assert seen == [14, 15, 16, 17, 18, 19, 20]


# --- hloc -----------------------------------------------------------------------------------------


def test_hloc_a_half_written_block_never_counts_as_done(pictures, tiny_weights):
    def cut(progress):
        if progress.done == 13:
            raise PowerCutError

    out = pictures / "f.h5"
    with pytest.raises(PowerCutError):
        r2ncli.extract_to(out, pictures, weights=tiny_weights, on_progress=cut)
    partial = pictures / "f.h5.partial"
    (partial / "block-00000001.npz.tmp").write_bytes(b"PK half of a block")
    assert not out.exists()
    r2ncli.extract_to(out, pictures, weights=tiny_weights, resume=True)
    with h5py.File(out) as file:
        assert len(set(file["paths"].asstr()[:])) == 20
        assert np.isfinite(file["features/layer4"][:]).all()


# --- FiftyOne and imagededup ----------------------------------------------------------------------


def test_fiftyone_a_broken_picture_takes_nothing_from_its_batch_and_is_no_zero_vector(
    pictures, tiny_weights
):
    (pictures / "00004.jpg").write_bytes(b"broken")
    options = {"weights": tiny_weights, "batch_size": 20}
    r2ncli.extract_to(pictures / "f.h5", pictures, **options)
    with h5py.File(pictures / "f.h5") as file:
        broken = np.isnan(file["features/layer4"][:]).all(axis=1)
        assert broken.tolist() == [n == 4 for n in range(20)]


def test_imagededup_the_batch_size_is_the_users(pictures, tiny_weights):
    record = r2ncli.classify_to(pictures / "x.csv", pictures, weights=tiny_weights, batch_size=3)
    assert record["batch_size"] == 3


def test_clip_features_do_not_change_with_the_batch_size(pictures, tiny_weights):
    alone, together = (
        np.array(
            [
                row.features["layer4"]
                for row in r2ncli.extract(
                    pictures, weights=tiny_weights, batch_size=size, precision="fp32"
                )
            ]
        )
        for size in (1, 20)
    )
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-6)


# --- mmpretrain and transformers ------------------------------------------------------------------


def test_mmpretrain_the_device_that_is_named_is_the_one_that_runs(pictures, tiny_weights):
    record = r2ncli.classify_to(pictures / "x.csv", pictures, weights=tiny_weights, device="cpu")
    assert record["device"]["kind"] == "cpu"
    with pytest.raises(DeviceError):
        list(r2ncli.classify(pictures, weights=tiny_weights, device="cuda:99"))


def test_transformers_a_folder_with_a_broken_and_a_turned_picture_is_taken_whole(
    tmp_path, tiny_weights
):
    upright = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    (tmp_path / "c.png").write_bytes(b"broken")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "d.png")
    a, b, c, d = r2ncli.classify(tmp_path, weights=tiny_weights, precision="fp32", topk=1)
    assert c.error
    upright_one, turned_back, turned = (p.predictions[0].probability for p in (a, b, d))
    assert abs(upright_one - turned_back) < 0.1 * abs(upright_one - turned)


# --- torch.hub, picklescan, fickling --------------------------------------------------------------


def test_torch_hub_an_altered_file_in_its_folder_is_refused_and_nothing_is_printed(hub, pictures):
    (hub / "res2net50_v1b_26w_4s-3cf99910.pth").write_bytes(b"PK\x03\x04 altered")
    code, stdout, stderr = r2n("classify", pictures)
    assert (code, stdout) == (4, "")
    assert "3cf99910" in stderr


def altered(state_dict, kind):
    """A state dict that a scanner of opcodes finds nothing wrong with."""
    state_dict = dict(state_dict)
    if kind == "a missing layer":
        return {name: t for name, t in state_dict.items() if not name.startswith("layer3.0.conv1")}
    state_dict["fc.weight"] = state_dict["fc.weight"].clone()
    state_dict["fc.weight"][0, 0] = float("nan")
    return state_dict


@pytest.mark.parametrize("kind", ["a missing layer", "NaN"])
def test_picklescan_a_damaged_network_does_not_pass_for_being_no_malware(
    tmp_path, tiny_weights, kind
):
    state_dict = altered(r2ncli.load_model(tiny_weights).state_dict(), kind)
    torch.save(state_dict, tmp_path / "a.pth")
    assert not r2ncli.verify_weights(tmp_path / "a.pth").ok


def test_picklescan_a_tampered_tensor_does_not_pass_under_the_files_own_digits(
    tmp_path, tiny_weights
):
    import hashlib

    network = r2ncli.load_model(tiny_weights)
    torch.save(network.state_dict(), tmp_path / "a.pth")
    digits = hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()[:8]
    assert r2ncli.verify_weights((tmp_path / "a.pth").rename(tmp_path / f"a-{digits}.pth")).ok
    with torch.no_grad():
        network.fc.weight[0, 0] += 1e-3
    torch.save(network.state_dict(), tmp_path / f"a-{digits}.pth")
    assert not r2ncli.verify_weights(tmp_path / f"a-{digits}.pth").ok


class Payload:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_fickling_good_and_evil_have_different_exit_codes_and_nothing_has_run(
    tmp_path, tiny_weights
):
    evil = tmp_path / "evil.pth"
    torch.save({"a": Payload(str(tmp_path / "ran"))}, evil)
    assert r2n("verify-weights", tiny_weights)[0] == 0
    code, _, stderr = r2n("verify-weights", evil)
    assert code == 4
    assert "mkdir" in stderr
    with pytest.raises(CheckpointError):
        r2ncli.load_model(evil)
    assert not (tmp_path / "ran").exists()
