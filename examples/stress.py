"""What no test has the time for: runs that are killed, and a million pictures.

    python examples/stress.py kill --kills 50 --pictures 5000
    python examples/stress.py many --inputs 1000000

Every command prints one JSON document at its end and exits with 1 if a promise is broken.
`kill` sends SIGKILL to runs at random moments, resumes them each time, and compares what
they end with with an uninterrupted run's. `many` compares the resident memory of a run over
so many pictures with that of a run over a thousand.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
import typer
from PIL import Image

import r2ncli
from r2ncli import runs, weights  # noqa: F401  now, not in every forked run
from r2ncli.engine import pytorch  # noqa: F401

app = typer.Typer(add_completion=False, no_args_is_help=True)

FORMATS = ("csv", "jsonl", "parquet", "h5")
NETWORK: dict[str, Any] = {"weights": "demo", "image_size": 32, "batch_size": 64}


@app.command()
def kill(
    kills: Annotated[int, typer.Option(help="SIGKILLs a format.")] = 50,
    pictures: Annotated[int, typer.Option(help="Pictures a run.")] = 5000,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    format: Annotated[list[str] | None, typer.Option(help="csv, jsonl, parquet, h5.")] = None,
) -> None:
    """Kill runs at random moments, resume them, and compare what they end with."""
    moments = random.Random(seed)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="r2n-stress-") as scratch:
        folder = hard_links(Path(scratch, "pictures"), pictures, folders=10)
        for kind in format or FORMATS:
            whole, killed = Path(scratch, f"whole.{kind}"), Path(scratch, f"killed.{kind}")
            start = time.monotonic()
            wait(forked(lambda out=whole: write(out, folder)))
            took = time.monotonic() - start
            done = finished = different = 0
            while done < kills:
                child = forked(lambda out=killed: write(out, folder, resume=True))
                time.sleep(moments.uniform(0, took / 2))
                os.kill(child, signal.SIGKILL)
                if wait(child) == -signal.SIGKILL:
                    done += 1
                if killed.exists() and not Path(f"{killed}.partial").exists():
                    finished += 1
                    different += not same_rows(whole, killed)
                    Path(f"{killed}.run.json").unlink(missing_ok=True)
                    killed.unlink()
            wait(forked(lambda out=killed: write(out, folder, resume=True)))
            different += not same_rows(whole, killed)
            report[kind] = {
                "kills": done,
                "finished_runs": finished + 1,
                "different_from_uninterrupted": different,
                "rows": len(names(killed)),
                "rows_twice": len(names(killed)) - len(set(names(killed))),
                "uninterrupted_seconds": round(took, 1),
            }
            print(kind, report[kind], flush=True)
    bad = any(
        one["different_from_uninterrupted"] or one["rows_twice"] or one["rows"] != pictures
        for one in report.values()
    )
    print(json.dumps({"command": "kill", "pictures": pictures, "seed": seed, "formats": report}))
    raise typer.Exit(int(bad))


@app.command()
def many(
    inputs: Annotated[int, typer.Option(help="Pictures of the long run.")] = 1_000_000,
    format: Annotated[str, typer.Option(help="csv, jsonl, parquet, h5.")] = "csv",
    scratch: Annotated[
        Path | None, typer.Option(help="A folder for links and outputs, removed at the end.")
    ] = None,
) -> None:
    """Compare the memory of a long run with that of a run over a thousand pictures."""
    report: dict[str, Any] = {"command": "many", "format": format}
    with tempfile.TemporaryDirectory(prefix="r2n-stress-", dir=scratch) as room:
        for count in (1000, inputs):
            folder = hard_links(Path(room, f"pictures-{count}"), count, folders=-(-count // 1000))
            out = Path(room, f"{count}.{format}")
            start = time.monotonic()
            child = forked(lambda out=out, folder=folder: write(out, folder))
            _, status, usage = os.wait4(child, 0)
            report[f"{count}_inputs"] = {
                "exit_code": os.waitstatus_to_exitcode(status),
                "rows": len(names(out)),
                "seconds": round(time.monotonic() - start, 1),
                "peak_resident_mb": round(usage.ru_maxrss / 1000),
            }
            print(report[f"{count}_inputs"], flush=True)
            shutil.rmtree(folder)
    few, long = report["1000_inputs"], report[f"{inputs}_inputs"]
    report["more_mb"] = long["peak_resident_mb"] - few["peak_resident_mb"]
    print(json.dumps(report))
    whole = (few["rows"], long["rows"]) == (1000, inputs)
    raise typer.Exit(int(not whole or report["more_mb"] > 100))


def write(out: Path, folder: Path, resume: bool = False) -> None:
    """One run, as the command line makes it."""
    run = r2ncli.extract_to if out.suffix == ".h5" else r2ncli.classify_to
    more: dict[str, Any] = {"layers": ["layer3"]} if out.suffix == ".h5" else {}
    run(out, folder, resume=resume, **NETWORK, **more)


def hard_links(folder: Path, count: int, folders: int) -> Path:
    """A tree of `count` pictures: hard links to 25 small files, one of them broken."""
    values = np.random.default_rng(0)
    files = folder.with_name(folder.name + "-files")
    files.mkdir(parents=True)
    for number in range(25):
        coarse = Image.fromarray(values.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((50, 40)).save(files / f"{number}.jpg")
    (files / "24.jpg").write_bytes(b"\xff\xd8 broken")
    for number in range(count):
        below = folder / f"{number % folders:04d}"
        if number < folders:
            below.mkdir(parents=True)
        os.link(files / f"{number % 25}.jpg", below / f"{number:07d}.jpg")
    return folder


def forked(action: Callable[[], None]) -> int:
    """The process id of a child that does one thing, with everything imported already."""
    child = os.fork()
    if child:
        return child
    try:
        action()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)


def wait(child: int) -> int:
    """A child's exit code; a signal is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def names(out: Path) -> list[str]:
    """The names in a finished output, in order."""
    from r2ncli.results import read_names

    return [name for name, _ in read_names(out)]


def same_rows(one: Path, other: Path) -> bool:
    """Whether two outputs are equal, times aside."""
    if one.suffix != ".h5":
        return one.read_bytes() == other.read_bytes()
    with h5py.File(one) as a, h5py.File(other) as b:
        keys = ("paths", "status", "error", "features/layer3")
        return all(
            np.array_equal(a[key][...], b[key][...], equal_nan=key[0] == "f") for key in keys
        )


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    app()
