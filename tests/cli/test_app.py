"""The command line: thin, calm, and with exit codes that tell what happened."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import h5py
import pytest
import typer
from support.processes import heed_interrupts
from typer.testing import CliRunner

import r2ncli
from r2ncli.cli.app import app
from r2ncli.cli.boundary import boundary

WARM = {**os.environ, "PYTHONWARNINGS": "ignore", "NO_COLOR": "1"}
WARM.pop("R2N_WEIGHTS", None)


@dataclass(frozen=True)
class Ended:
    """What a command printed, and its exit code."""

    stdout: str
    stderr: str
    code: int


@pytest.fixture
def r2n(monkeypatch, recwarn):
    """Run the command in this process: importing torch for each would take minutes."""
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments, cwd=None, env=None, check=None):
        for name, value in (env or {}).items():
            monkeypatch.setenv(name, value)
        if cwd is not None:
            monkeypatch.chdir(cwd)
        result = CliRunner().invoke(app, [*map(str, arguments)], prog_name="r2n")
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert check is None or result.exit_code == check, (result.exit_code, result.output)
        return Ended(result.stdout, result.stderr, result.exit_code)

    return run


def in_a_terminal(*arguments, columns=80, cwd=None, stop_when=None, **more):
    """Run the command with a terminal on stdout and stderr: what a person sees, and the code."""
    primary, secondary = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in WARM.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "r2ncli", *map(str, arguments)],
        stdin=secondary, stdout=secondary, stderr=secondary, cwd=cwd, close_fds=True,
        env={**environment, "TERM": "xterm", **more}, preexec_fn=heed_interrupts,
    )  # fmt: skip
    os.close(secondary)
    seen = b""
    with suppress(OSError):
        while piece := os.read(primary, 4096):
            seen += piece
            if stop_when and stop_when in seen:
                process.send_signal(signal.SIGINT)
                stop_when = None
    os.close(primary)
    return seen.decode(), process.wait()


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


# --- classify ---------------------------------------------------------------------------


def test_classify_to_a_pipe_is_csv_and_the_rest_is_on_stderr(r2n, pictures, tiny_weights):
    ended = r2n("classify", pictures, "--weights", tiny_weights, "--topk", 2, check=0)
    rows = rows_of(ended.stdout)
    assert [row["path"] for row in rows] == [f"{pictures}/{n:05d}.jpg" for n in range(20)]
    expected = list(r2ncli.classify(pictures, weights=tiny_weights, topk=2))
    assert [row["label_1"] for row in rows] == [c.predictions[0].label for c in expected]
    assert "label_3" not in rows[0]
    assert re.fullmatch(r"20 images in \S+ s.*, cpu, \S+\n", ended.stderr)


def test_no_path_means_the_current_folder(r2n, pictures, tiny_weights):
    ended = r2n("classify", "--weights", tiny_weights, cwd=pictures, check=0)
    assert [row["path"] for row in rows_of(ended.stdout)] == [f"{n:05d}.jpg" for n in range(20)]


def test_classify_to_a_file_says_where(r2n, tmp_path, pictures, tiny_weights):
    out = tmp_path / "x.csv"
    ended = r2n("classify", pictures, "--weights", tiny_weights, "-o", out, check=0)
    assert ended.stdout == ""
    assert ended.stderr.strip().endswith(f"-> {out}")
    assert len(rows_of(out.read_text())) == 20
    assert json.loads((tmp_path / "x.csv.run.json").read_text())["command"] == "classify"
    ended = r2n("classify", pictures, "--weights", tiny_weights, "-o", out, check=6)
    assert "--overwrite" in ended.stderr
    assert "--resume" in ended.stderr
    r2n("classify", pictures, "--weights", tiny_weights, "-o", out, "--resume", check=0)
    r2n("classify", pictures, "--weights", tiny_weights, "-o", out, "--overwrite", check=0)


def test_failed_images_can_be_tried_again(r2n, tmp_path, pictures, tiny_weights):
    whole = (pictures / "00003.jpg").read_bytes()
    for command, name in (("classify", "x.jsonl"), ("extract", "f.h5")):
        (pictures / "00003.jpg").write_bytes(b"")
        arguments = (command, pictures, "--weights", tiny_weights, "-o", tmp_path / name)
        r2n(*arguments, check=7)
        r2n(*arguments, "--retry-failed", check=7)
        (pictures / "00003.jpg").write_bytes(whole)
        r2n(*arguments, "--retry-failed", check=0)
        ended = r2n(*arguments, "--retry-failed", check=0)
        assert ended.stderr.splitlines()[-1].endswith("nothing left to do")


def test_failed_images_are_rows_sentences_and_exit_7(r2n, pictures, tiny_weights):
    (pictures / "00003.jpg").write_bytes(b"")
    ended = r2n("classify", pictures, "--weights", tiny_weights, "-q", check=7)
    assert rows_of(ended.stdout)[3]["error"] == "empty file"
    assert ended.stderr == f"{pictures}/00003.jpg: empty file\n"


def test_many_failures_do_not_flood_the_terminal(r2n, tmp_path, tiny_weights):
    for n in range(50):
        (tmp_path / f"{n:02d}.jpg").write_bytes(b"")
    ended = r2n("classify", tmp_path, "--weights", tiny_weights, check=7)
    assert ended.stderr.count("empty file") == 20
    assert "more images failed; their rows say why" in ended.stderr
    assert "50 images (50 failed)" in ended.stderr


def test_a_terminal_gets_a_line_a_image(pictures, tiny_weights):
    (pictures / "00001.jpg").write_bytes(b"")
    seen, code = in_a_terminal("classify", "-q", "--weights", tiny_weights, cwd=pictures)
    lines = seen.replace("\r\n", "\n").splitlines()
    assert code == 7
    assert re.fullmatch(r"00000\.jpg  [a-f]\w\w \d+\.\d %(, [a-f]\w\w \d+\.\d %){4}", lines[0])
    assert lines[1] == "\x1b[31m00001.jpg  failed: empty file\x1b[0m"
    assert len(lines) == 20
    assert "empty file" not in "".join(lines[2:])


def test_names_cannot_act_on_the_terminal(r2n, pictures, tiny_weights):
    (pictures / "00000.jpg").rename(pictures / "a\x1b[31m[bold]\nb.jpg")
    (pictures / "\x07[red]z.jpg").write_bytes(b"")
    seen, _ = in_a_terminal("classify", "-q", "--weights", tiny_weights, cwd=pictures, NO_COLOR="1")
    assert "\x1b" not in seen
    assert "a\\x1b[31m[bold]\\x0ab.jpg  " in seen
    assert "\\x07[red]z.jpg  failed: empty file" in seen
    ended = r2n("classify", "--weights", tiny_weights, cwd=pictures, check=7)
    assert "\\x07[red]z.jpg: empty file" in ended.stderr


def test_data_goes_to_the_pipe_while_the_progress_is_on_the_terminal(
    tmp_path, make_pictures, tiny_weights
):
    folder = make_pictures(tmp_path / "p", 20)
    primary, secondary = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "r2ncli", "classify", folder, "--weights", tiny_weights],
        stdout=subprocess.PIPE, stderr=secondary, env={**WARM, "TERM": "xterm"},
    ) as process:  # fmt: skip
        os.close(secondary)
        rows = rows_of(process.stdout.read().decode())
        seen = b""
        with suppress(OSError):
            while piece := os.read(primary, 4096):
                seen += piece
    os.close(primary)
    assert [row["path"] for row in rows] == [f"{folder}/{n:05d}.jpg" for n in range(20)]
    assert b"20 images in" in seen
    assert b",ok,," not in seen


def test_a_closed_pipe_ends_quietly(tmp_path, make_pictures, tiny_weights):
    folder = make_pictures(tmp_path / "p", 20)
    for n in range(20, 2000):
        os.link(folder / f"{n % 20:05d}.jpg", folder / f"{n:05d}.jpg")
    with subprocess.Popen(
        [sys.executable, "-m", "r2ncli", "classify", folder, "--weights", tiny_weights, "-q"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=WARM,
    ) as process:  # fmt: skip
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


@pytest.mark.parametrize(
    ("redirection", "code", "rows"),
    [
        ("-o x.csv 2>&-", 0, 20),  # stderr is only talk
        ("-o x.csv 2>/dev/full", 0, 20),
        ("-o x.csv 2>&1 | true; exit ${PIPESTATUS[0]}", 0, 20),
        ("-o x.csv >&-", 0, 20),
        (">&-", 6, None),
        (">/dev/full", 6, None),
    ],
)
def test_closed_and_full_streams(pictures, tiny_weights, redirection, code, rows):
    command = f"{sys.executable} -m r2ncli classify . --weights {tiny_weights} {redirection}"
    ended = subprocess.run(
        ["bash", "-c", command], cwd=pictures, env=WARM, capture_output=True, check=False
    )
    assert ended.returncode == code, ended.stderr
    assert b"Traceback" not in ended.stderr
    assert b"Exception ignored" not in ended.stderr
    if rows:
        assert len(rows_of((pictures / "x.csv").read_text())) == rows


def test_a_table_into_a_closed_pipe_ends_quietly(tiny_weights):
    command = f"{sys.executable} -m r2ncli verify-weights {tiny_weights} | true"
    ended = subprocess.run(
        ["bash", "-c", command + "; exit ${PIPESTATUS[0]}"],
        env=WARM, capture_output=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_csv_is_utf8_whatever_the_locale_says(pictures, tiny_weights):
    (pictures / "00000.jpg").rename(pictures / "é.jpg")
    ended = subprocess.run(
        [sys.executable, "-m", "r2ncli", "classify", "é.jpg", "--weights", tiny_weights],
        cwd=pictures, env={**WARM, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True,
    )  # fmt: skip
    assert rows_of(ended.stdout.decode())[0]["path"] == "é.jpg"


def test_weights_whose_name_is_no_utf8_work(r2n, tmp_path, pictures, tiny_weights):
    weights = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")
    shutil.copy(tiny_weights, weights)
    r2n("classify", pictures, "--weights", weights, "-o", tmp_path / "x.csv", check=0)
    record = json.loads((tmp_path / "x.csv.run.json").read_text())
    assert record["checkpoint"]["file"].endswith("\\xff.safetensors")
    shown = r2n("verify-weights", weights, check=0).stdout
    assert "\\xff.safetensors" in "".join(shown.split())  # a long folder's name is wrapped


def test_names_that_are_no_utf8_are_written_as_hex(r2n, pictures, tiny_weights):
    os.rename(pictures / "00000.jpg", os.fsencode(pictures) + b"/\xff\\x.jpg")
    ended = r2n("classify", pictures, "--weights", tiny_weights, check=0)
    assert rows_of(ended.stdout)[-1]["path"] == f"{pictures}/\\xff\\x5cx.jpg"


# --- extract ------------------------------------------------------------------------------


def test_extract_writes_features_h5_and_says_the_precision(r2n, tmp_path, pictures, tiny_weights):
    ended = r2n("extract", pictures, "--weights", tiny_weights, cwd=tmp_path, check=0)
    assert ended.stdout == ""
    with h5py.File(tmp_path / "features.h5") as file:
        assert file["features/layer4"].shape == (20, 64)
        precision = file.attrs["precision"]
    assert f", {precision} -> features.h5" in ended.stderr
    assert ("--precision fp32 gives full precision" in ended.stderr) == (precision != "fp32")


def test_extract_takes_several_layers_pool_and_dtype(r2n, tmp_path, pictures, tiny_weights):
    r2n(
        "extract", pictures, "--weights", tiny_weights, "--layer", "layer3", "--layer", "layer2.0",
        "--pool", "none", "--dtype", "float16", "-o", "f.h5", cwd=tmp_path, check=0,
    )  # fmt: skip
    with h5py.File(tmp_path / "f.h5") as file:
        assert sorted(file["features"]) == ["layer2.0", "layer3"]
        assert file["features/layer2.0"].shape == (20, 64, 4, 4)
        assert file["features/layer2.0"].dtype == "float16"


def test_list_layers_prints_names_and_shapes(r2n, tiny_weights):
    ended = r2n("extract", "--list-layers", "--weights", tiny_weights, check=0)
    lines = [line.split(maxsplit=1) for line in ended.stdout.splitlines()]
    assert ["layer4", "64 x 1 x 1"] in lines
    assert ["fc", "6"] in lines
    assert [name for name, _ in lines] == list(dict(lines))


# --- what goes wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["classify", "nowhere"], 3, "no such file or folder: nowhere"),
        (["classify", "empty"], 3, "no image found"),
        (["classify", "--topk", "0"], 2, "--topk must be at least 1"),
        (["classify", "--topk", "many"], 2, "--topk"),
        (["classify", "--no-such-option"], 2, "--no-such-option"),
        (["nonsense"], 2, "nonsense"),
        (["classify", "-o", "x.h5"], 2, "must end in .csv"),
        (["extract", "-o", "x.csv"], 2, "must end in .h5"),
        (["extract", "--layer", "layr3"], 2, "Did you mean layer3"),
        (["extract", "--list-layers", "--image-size", "-5"], 2, "from 32 to 4096"),
        (["verify-weights", "/dev/zero"], 4, "not a regular file"),
        (["classify", "--weights", "/dev/zero"], 4, "not a regular file"),
        (["bench", "nowhere"], 3, "no such file or folder: nowhere"),
        (["bench", "-j", "-1"], 2, "--workers must be at least 1"),
        (["extract", "--pool", "mean"], 2, "'mean' is not one of"),
        (["classify", "--precision", "int4"], 2, "'int4' is not one of"),
        (["classify", "--decode", "fast"], 2, "'fast' is not one of"),
        (["classify", "--decode", "gpu"], 2, "'gpu' is not one of 'auto', 'exact'"),
        (["classify", "--overwrite"], 2, "-o"),
        (["classify", "--retry-failed"], 2, "-o"),
        (["classify", "--retry-failed", "--resume", "-o", "x.csv"], 2, "give one of them"),
        (["classify", "--retry-failed", "-o", "x.csv"], 6, "no finished output"),
        (
            ["classify", "--device", "tpu"],
            5,
            "--device 'tpu' is not valid: use auto, cpu",
        ),
        (["classify", "--device", "cuda:99"], 5, "cuda:99"),
        (["classify", "--weights", "nothing.pth"], 4, "no such weights: 'nothing.pth'"),
        (["classify", "--weights", "page.pth"], 4, "web page"),
        (["classify", "-o", "nowhere/x.csv"], 6, "there is no folder nowhere"),
        (["verify-weights", "nothing.pth"], 4, "no such file: nothing.pth"),
        (["bench", "--seconds", "0"], 2, "--seconds must be more than 0"),
        (["bench", "--weights", "res2net50_v1b_26w_4s"], 4, "nothing was downloaded"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_exit_code(
    r2n, tmp_path, pictures, tiny_weights, arguments, code, says
):
    (pictures / "empty").mkdir()
    (pictures / "page.pth").write_text("<!DOCTYPE html><html>404</html>")
    environment = {"R2N_WEIGHTS": str(tiny_weights), "TORCH_HOME": str(tmp_path)}
    before = sorted(path.name for path in pictures.iterdir())
    ended = r2n(*arguments, cwd=pictures, env=environment, check=code)
    assert says in " ".join(re.sub("[│╭╮╰╯─]", "", ended.stderr).split())
    assert ended.stdout == ""
    if code != 2:
        assert len(ended.stderr.splitlines()) == 1
    assert sorted(path.name for path in pictures.iterdir()) == before


def test_with_no_network_the_message_says_what_to_do(r2n, tmp_path, pictures):
    environment = {
        "R2N_WEIGHTS_BASE_URL": "http://127.0.0.1:9/", "TORCH_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    ended = r2n("classify", pictures, env=environment, check=4)
    assert "http://127.0.0.1:9/res2net50_v1b_26w_4s-3cf99910.pth" in ended.stderr
    assert str(tmp_path / "home" / "hub" / "checkpoints") in ended.stderr
    assert re.search(r"weights[ =]\"?demo", ended.stderr)
    assert list((tmp_path / "home" / "hub" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_what_was_done_and_says_how_to_go_on(
    tmp_path, make_pictures, tiny_weights, number, code
):
    folder = make_pictures(tmp_path / "p", 20)
    for n in range(20, 20_000):
        os.link(folder / f"{n % 20:05d}.jpg", folder / f"{n:05d}.jpg")
    command = [sys.executable, "-m", "r2ncli", "classify", folder, "--weights", tiny_weights]
    with subprocess.Popen(
        [*command, "-o", "x.csv"],
        cwd=tmp_path,
        env=WARM,
        stderr=subprocess.PIPE,
        preexec_fn=heed_interrupts,
    ) as process:
        while process.poll() is None and not list(tmp_path.glob("x.csv.partial/block-*.csv")):
            time.sleep(0.01)
        process.send_signal(number)
        error = process.stderr.read().decode()
        assert process.wait() == code
    assert error == (
        "r2n: interrupted: finished rows are kept in x.csv.partial; continue with --resume\n"
    )
    assert not (tmp_path / "x.csv").exists()


def test_ctrl_c_at_a_terminal_leaves_no_traceback(tmp_path, make_pictures, tiny_weights):
    folder = make_pictures(tmp_path / "p", 20)
    for n in range(20, 20_000):
        os.link(folder / f"{n % 20:05d}.jpg", folder / f"{n:05d}.jpg")
    seen, code = in_a_terminal(
        "classify", folder, "--weights", tiny_weights, "-o", "x.csv",
        cwd=tmp_path, stop_when=b"of 20,000",
    )  # fmt: skip
    assert code == 130
    assert "Traceback" not in seen
    assert "continue with --resume" in seen


# --- diff and merge -------------------------------------------------------------------------


@pytest.fixture
def compared(r2n, tmp_path, pictures, tiny_weights):
    """Two results: of the second a picture is broken, one more is there; and features."""
    arguments = ("classify", pictures, "--weights", tiny_weights, "--precision", "fp32", "-q")
    r2n(*arguments, "-o", tmp_path / "a.csv", check=0)
    (pictures / "00003.jpg").write_bytes(b"")
    os.link(pictures / "00004.jpg", pictures / "[new].jpg")
    r2n(*arguments, "--topk", 3, "-o", tmp_path / "b.parquet", check=7)
    r2n("extract", *arguments[1:], "-o", tmp_path / "f.h5", check=7)
    return tmp_path


def test_diff_says_what_differs_and_exits_8(r2n, compared):
    ended = r2n("diff", "a.csv", "b.parquet", cwd=compared, env={"COLUMNS": "400"}, check=8)
    said = " ".join(ended.stdout.split())
    assert "a.csv and b.parquet: 19 rows compared" in said
    assert re.search(r"only in B 1 \S*\[new\]\.jpg", said)
    assert re.search(r"failed in one 1 \S*00003\.jpg", said)
    assert re.search(r"settings that differ A B \S+ topk 5 3$", said)
    assert "only in A" not in said  # calm: what is as it was is not told
    assert ended.stderr == ""


def test_diff_of_equal_results_is_one_line_and_exits_0(r2n, compared):
    for name, count in (("a.csv", 20), ("f.h5", 20)):
        ended = r2n("diff", name, name, cwd=compared, check=0)
        assert ended.stdout == f"{name} and {name}: {count:,} rows compared, equal\n"


def test_diff_as_json_has_a_stable_schema(r2n, compared):
    document = json.loads(r2n("diff", "a.csv", "b.parquet", "--json", cwd=compared, check=8).stdout)
    assert list(document) == [
        "schema", "a", "b", "kind", "atol", "different", "rows", "only_in_a", "only_in_b",
        "status_changed", "top1_changed", "beyond_atol", "largest", "settings",
    ]  # fmt: skip
    assert document["rows"] == {"a": 20, "b": 21, "compared": 19}
    assert document["settings"] == {"topk": {"a": 5, "b": 3}}
    document = json.loads(r2n("diff", "f.h5", "f.h5", "--json", cwd=compared, check=0).stdout)
    assert document["largest"] == {"layer4": {"difference": 0.0, "path": None}}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["diff", "a.csv", "f.h5"], 2, "f.h5 holds features and a.csv classes"),
        (["diff", "a.csv", "nowhere.csv"], 3, "no such file: nowhere.csv"),
        (["diff", "a.csv", "a.csv.run.json"], 2, "the name must end in .csv"),
        (["diff", "a.csv", "a.csv", "--atol", "-1"], 2, "--atol must be at least 0"),
        (["merge", "a.csv", "-o", "x.csv"], 6, "a.csv was not made with --shard"),
        (["merge", "a.csv", "-o", "x.h5"], 2, "must end in .csv"),
        (["merge", "a.csv", "b.parquet", "-o", "x.csv"], 2, "must have the same format"),
    ],
)
def test_results_that_do_not_fit_are_one_sentence(r2n, compared, arguments, code, says):
    ended = r2n(*arguments, cwd=compared, check=code)
    assert says in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""
    assert not (compared / "x.csv").exists()


def test_shards_are_merged(r2n, tmp_path, pictures, tiny_weights):
    for n in (1, 2):
        arguments = ("--weights", tiny_weights, "--shard", f"{n}/2", "-o", tmp_path / f"{n}.csv")
        r2n("classify", pictures, *arguments, check=0)
    ended = r2n("merge", "2.csv", "1.csv", "-o", "all.csv", cwd=tmp_path, check=0)
    assert ended.stderr == "20 images of 2 shards -> all.csv\n"
    assert (
        "--overwrite merges again"
        in r2n("merge", "2.csv", "1.csv", "-o", "all.csv", check=6).stderr
    )
    r2n("merge", "2.csv", "1.csv", "-o", "all.csv", "--overwrite", check=0)
    paths = [row["path"] for row in rows_of((tmp_path / "all.csv").read_text())]
    assert sorted(paths) == [f"{pictures}/{n:05d}.jpg" for n in range(20)]


# --- verify-weights and bench ---------------------------------------------------------------


def test_verify_weights_prints_a_table_and_json(r2n, tiny_weights):
    ended = r2n("verify-weights", tiny_weights, check=0)
    assert "forward pass" in ended.stdout
    document = json.loads(r2n("verify-weights", tiny_weights, "--json", check=0).stdout)
    assert document["ok"] is True
    assert {check["status"] for check in document["checks"]} <= {
        "passed", "failed", "warning", "not applicable",
    }  # fmt: skip


def test_verify_weights_names_the_reason_and_exits_4(r2n, tmp_path, tiny_weights):
    altered = tmp_path / "tiny-00000000.safetensors"
    altered.write_bytes(tiny_weights.read_bytes())
    ended = r2n("verify-weights", altered, check=4)
    assert "failed: hash prefix" in ended.stderr
    document = json.loads(r2n("verify-weights", altered, "--json", check=4).stdout)
    assert document["ok"] is False


@pytest.mark.slow
def test_bench_prints_tables_and_json(r2n, pictures, tiny_weights):
    arguments = ("bench", pictures, "--weights", tiny_weights, "--seconds", "0.05", "-b", "2", "-q")
    ended = r2n(*arguments, "--precision", "fp32", check=0)
    assert "read+decode" in ended.stdout
    assert "bottleneck" in ended.stdout
    document = json.loads(r2n(*arguments, "--json", check=0).stdout)
    assert {stage["stage"] for stage in document["stages"]} == {
        "read+decode", "forward", "write", "whole",
    }  # fmt: skip
    assert all(speed["images_per_second"] > 0 for speed in document["model"])


# --- help -----------------------------------------------------------------------------------


def test_version(r2n):
    assert r2n("--version", check=0).stdout == f"r2n {r2ncli.__version__}\n"


def test_the_command_works_in_another_thread_than_the_main_one(pictures, tiny_weights):
    ended = []
    thread = threading.Thread(  # signals belong to the main one
        target=lambda: ended.append(
            CliRunner().invoke(app, ["classify", str(pictures), "--weights", str(tiny_weights)])
        )
    )
    thread.start()
    thread.join()
    assert ended[0].exit_code == 0


# --- what a first user tries ------------------------------------------------------------------


def test_help_of_a_command_is_shown_by_name(r2n):
    for command in ("classify", "verify-weights"):
        assert r2n("help", command, check=0).stdout == r2n(command, "--help", check=0).stdout
    assert "Checkpoints" in r2n("help", check=0).stdout
    assert r2n("-V", check=0).stdout == r2n("--version", check=0).stdout


def test_help_shows_defaults_and_choices(r2n):
    shown = " ".join(r2n("classify", "--help", check=0, env={"COLUMNS": "160"}).stdout.split())
    assert "[default: auto]" in shown
    assert re.search(r"--backend\s+auto\|\w+\|\w+", shown)
    assert "<bool>" not in shown.replace("--help", "")[: shown.index("--help")]


@pytest.mark.parametrize(
    ("typed", "suggested"),
    [("--weards", "--weights"), ("--topK", "--topk"), ("--model", None), ("--verbose", None)],
)
def test_an_unknown_option_is_answered_with_a_near_one_or_none(r2n, typed, suggested):
    said = r2n("classify", typed, "x", check=2).stderr
    _, _, answer = said.rpartition(typed)  # worded by the library, and so by its release
    assert re.findall(r"--[a-z-]+", answer) == ([suggested] if suggested else [])


def test_stdout_may_be_json_lines(r2n, pictures, tiny_weights):
    arguments = ("classify", pictures, "--weights", tiny_weights, "--topk", 2, "-q")
    lines = r2n(*arguments, "--format", "jsonl", check=0).stdout.splitlines()
    rows = rows_of(r2n(*arguments, check=0).stdout)
    assert [json.loads(line)["path"] for line in lines] == [row["path"] for row in rows]
    assert [str(json.loads(line)["index_1"]) for line in lines] == [row["index_1"] for row in rows]
    assert "--format" in r2n(*arguments, "--format", "csv", "-o", "x.csv", check=2).stderr


@pytest.mark.parametrize("arguments", ["-h", "classify -h", "--show-completion", "-V"])
def test_help_into_a_closed_pipe_is_no_error(arguments):
    command = f"{sys.executable} -m r2ncli {arguments} | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(
        ["bash", "-c", command],
        env={**WARM, "SHELL": "/bin/bash"},
        capture_output=True,
        check=False,
    )
    assert b"Traceback" not in ended.stderr
    assert (ended.returncode, ended.stdout) == (0, b"")


def test_ctrl_c_while_the_program_is_loaded_is_130():
    """The interrupt strikes in the first import of the command line."""
    program = (
        "import os, signal, sys, r2ncli.__main__ as main\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'r2ncli.cli':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "main.main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=WARM, capture_output=True, check=False, preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (130, b"r2n: interrupted\n")


def test_a_fresh_run_over_an_empty_shard_tells_of_no_images(r2n, tmp_path, pictures, tiny_weights):
    name = pictures / "00000.jpg"
    shards = [r2n("classify", name, "--weights", tiny_weights, "--shard", f"{n}/2",
                  "-o", tmp_path / f"{n}.csv", check=0).stderr for n in (1, 2)]  # fmt: skip
    assert sorted(said.split()[0] for said in shards) == ["0", "1"]
    assert not any("nothing left" in said for said in shards)


def test_an_empty_list_is_no_image_found(r2n, tmp_path, tiny_weights):
    (tmp_path / "empty.txt").touch()
    ended = r2n("classify", "@empty.txt", "--weights", tiny_weights, cwd=tmp_path, check=3)
    assert "no image found" in ended.stderr
    assert "empty.txt" in ended.stderr


@pytest.mark.parametrize("columns", [60, 80])
def test_result_lines_fit_the_terminal(tmp_path, make_pictures, tiny_weights, columns):
    folder = make_pictures(tmp_path / "a folder with a rather long name" / "and another one", 3)
    seen, code = in_a_terminal(
        "classify", folder, "-q", "--weights", tiny_weights, columns=columns, cwd=tmp_path
    )
    lines = seen.replace("\r\n", "\n").splitlines()
    assert code == 0
    assert len(lines) == 3
    assert all(len(line) <= columns and "…" in line and ".jpg  " in line for line in lines)


def test_a_first_run_says_what_it_prepares(tmp_path, pictures, tiny_weights):
    seen, code = in_a_terminal(
        "classify", "--weights", tiny_weights, "-o", tmp_path / "x.csv", cwd=pictures
    )
    assert code == 0
    assert "preparing the network" in seen
    assert seen.index("preparing the network") < seen.index("20 images in")


def test_the_shell_completes_values(tmp_path):
    def completed(line):
        environment = {**WARM, "_R2N_COMPLETE": "complete_bash", "COMP_WORDS": line,
                       "COMP_CWORD": str(len(line.split(" ")) - 1)}  # fmt: skip
        ended = subprocess.run(
            [sys.executable, "-m", "r2ncli"], env=environment, capture_output=True, check=False
        )
        return ended.stdout.decode().split()

    assert completed("r2n classify --precision b") == ["bf16"]
    assert completed("r2n classify --device cu") == ["cuda", "cuda:0"]
    assert "res2net50_v1b_26w_4s" in completed("r2n classify --weights res2net50")
    assert completed("r2n extract --pool m") == ["max"]
    assert "layer3.0" in completed("r2n extract --layer layer3")


def test_layers_of_a_published_network_need_no_checkpoint(r2n, tmp_path):
    environment = {"TORCH_HOME": str(tmp_path)}
    ended = r2n("extract", "--list-layers", env=environment, check=0)
    assert ["layer3", "1024 x 14 x 14"] in [
        line.split(maxsplit=1) for line in ended.stdout.splitlines()
    ]


@pytest.mark.parametrize("encoding", ["latin-1", "cp437", "ascii"])
def test_help_can_be_written_in_every_encoding(encoding):
    done = subprocess.run(
        [sys.executable, "-m", "r2ncli", "classify", "--help"],
        capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert "Classify images" in done.stdout.decode()


@pytest.mark.parametrize(
    "words", ["can't start new thread", "plugin.cpp:921: Resource temporarily unavailable"]
)
def test_a_system_that_allows_no_more_threads_is_said(words, capsys):
    def command():
        raise RuntimeError(words)

    with pytest.raises(typer.Exit) as ended:
        boundary(command)()
    assert ended.value.exit_code == 5
    assert "no more threads" in capsys.readouterr().err


def test_another_runtime_error_stays_a_bug():
    def command():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        boundary(command)()
