"""Long checks, for which the tests have no time: killed runs, corrupted files, a million images.

    python tests/checks/stress.py kill --kills 50 --images 5000
    python tests/checks/stress.py files --count 100000
    python tests/checks/stress.py many --inputs 1000000

Every command ends with one JSON document, and with exit code 1 if a check fails.
`kill` sends SIGKILL to runs at random moments, resumes them each time, and compares what
they end with with an uninterrupted run's. `files` puts corrupted files through the decoder:
each must give pixels or an ImageError. `many` compares the resident memory of a run over so
many images with that of a run over a thousand.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Annotated, Any
from zlib import crc32

import h5py
import numpy as np
import typer
from corruption import corrupt, watch
from PIL import Image, ImageCms

import r2ncli
from r2ncli import runs  # noqa: F401  now, not in every forked run
from r2ncli.architectures import Preprocessing
from r2ncli.errors import ImageError
from r2ncli.images.decode import DecodeRules, decode
from r2ncli.outputs.results import read_names

app = typer.Typer(add_completion=False, no_args_is_help=True)

FORMATS = ("csv", "jsonl", "parquet", "h5")
NETWORK: dict[str, Any] = {"weights": "demo", "image_size": 32, "batch_size": 64}


@app.command()
def kill(
    kills: Annotated[int, typer.Option(help="Number of SIGKILLs per format.")] = 50,
    images: Annotated[int, typer.Option(help="Number of images per run.")] = 5000,
    seed: Annotated[int, typer.Option(help="Seed of the random moments.")] = 0,
    format: Annotated[list[str] | None, typer.Option(help="csv, jsonl, parquet or h5.")] = None,
) -> None:
    """Kill runs at random moments, resume them, and compare what they end with."""
    moments = random.Random(seed)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="r2n-stress-") as scratch:
        folder = hard_links(Path(scratch, "images"), images, folders=10)
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
                ended = wait(child)
                if ended > 0:  # it has said why
                    raise typer.Exit(1)
                done += ended == -signal.SIGKILL
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
        one["different_from_uninterrupted"] or one["rows_twice"] or one["rows"] != images
        for one in report.values()
    )
    print(json.dumps({"command": "kill", "images": images, "seed": seed, "formats": report}))
    raise typer.Exit(int(bad))


@app.command()
def many(
    inputs: Annotated[int, typer.Option(help="Number of images of the long run.")] = 1_000_000,
    format: Annotated[str, typer.Option(help="csv, jsonl, parquet or h5.")] = "csv",
    scratch: Annotated[
        Path | None, typer.Option(help="Put links and outputs here; they are removed at the end.")
    ] = None,
) -> None:
    """Compare the memory of a long run with that of a run over a thousand images."""
    report: dict[str, Any] = {"command": "many", "format": format}
    with tempfile.TemporaryDirectory(prefix="r2n-stress-", dir=scratch) as top:
        for count in (1000, inputs):
            folder = hard_links(Path(top, f"images-{count}"), count, folders=-(-count // 1000))
            out = Path(top, f"{count}.{format}")
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
    """A tree of `count` images: hard links to 25 small files, one of them broken."""
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


# --- files: corrupted images through the decoder --------------------------------------


@dataclass(frozen=True)
class Corruption:
    """What the corrupted files are made of, and how far they are decoded."""

    originals: list[tuple[str, bytes]]
    seed: int
    max_pixels: int


@app.command()
def files(
    count: Annotated[int, typer.Option(help="Number of files.")] = 100_000,
    seed: Annotated[int, typer.Option(help="Seed of the corruption.")] = 0,
    first: Annotated[int, typer.Option(help="Number of the first file.")] = 0,
    jobs: Annotated[int, typer.Option(help="Number of processes.")] = os.cpu_count() or 1,
    max_pixels: Annotated[int, typer.Option(help="Refuse images with more pixels.")] = 16_000_000,
) -> None:
    """Put corrupted files through the decoder: no crash, no hang, no other error."""
    began = time.monotonic()
    corruption = Corruption(images_of_every_kind(), seed, max_pixels)
    shares = [range(first + job, first + count, jobs) for job in range(jobs)]
    with ThreadPoolExecutor(jobs) as threads:
        watched = list(threads.map(lambda share: watch(share, decode_files, corruption), shares))
    outcomes: dict[str, Counter[str]] = {}
    broken: list[dict[str, Any]] = []
    for decoded, troubles, _ in watched:
        broken += troubles
        for number, (kind, outcome) in decoded:
            if outcome in ("decoded", "failed"):
                outcomes.setdefault(kind, Counter())[outcome] += 1
            else:
                broken.append({"number": number, "kind": kind, "what": outcome})
    report = {
        "command": "files",
        "files": sum(map(Counter.total, outcomes.values())) + len(broken),
        "seed": seed,
        "broken": broken,
        "peak_resident_mb": max(peak for _, _, peak in watched) // 1024,
        "seconds": round(time.monotonic() - began),
        "formats": {kind: dict(outcomes[kind]) for kind in sorted(outcomes)},
    }
    print(json.dumps(report))
    raise typer.Exit(int(bool(broken)))


def decode_files(numbers: range, corruption: Corruption, sender: Connection) -> None:
    """Decode one file after another, and send the kind and outcome of each."""
    warnings.simplefilter("ignore")  # as the command line does
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    rules = DecodeRules("exact", max_pixels=corruption.max_pixels)
    for number in numbers:
        kind, content = corrupted(corruption.originals, Random(f"{corruption.seed} {number}"))
        try:
            pixels = decode(content, Preprocessing(), rules)
            outcome = "decoded" if pixels.shape == (224, 224, 3) else f"shape {pixels.shape}"
        except ImageError:
            outcome = "failed"
        except BaseException as error:
            outcome = repr(error)
        sender.send(((kind, outcome), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


DATE = re.compile(rb"((?:mvhd|tkhd|mdhd).{4}).{16}", re.DOTALL)  # of an AVIF of several images


def images_of_every_kind() -> list[tuple[str, bytes]]:
    """A small image in every format and layout that Pillow writes, the format's name first.

    Without dates: a seed and a number say the same file tomorrow.
    """
    rgb = Image.effect_mandelbrot((61, 47), (-2, -1, 1, 1), 50).convert("RGB")
    rgb = Image.merge("RGB", [rgb.getchannel(0), *rgb.rotate(90).split()[:2]])
    rgba = rgb.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(rgb.size))
    by_mode = {mode: rgb.convert(mode) for mode in ("1", "L", "P", "CMYK", "I;16", "F", "LAB")}
    by_mode |= {"RGB": rgb, "RGBA": rgba, "LA": rgba.convert("LA")}
    by_mode["LAB"].info.clear()  # a profile, which has a date
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    srgb = srgb[:24] + bytes(12) + srgb[36:]
    swapped = srgb.replace(b"rXYZ", b"xxxx").replace(b"gXYZ", b"rXYZ").replace(b"xxxx", b"gXYZ")
    exif = Image.Exif()
    exif[0x0112] = 6
    rich: dict[str, Any] = {"icc_profile": swapped, "exif": exif}
    several: dict[str, Any] = {"save_all": True}
    layouts: list[tuple[str, str, dict[str, Any]]] = [
        *(("JPEG", mode, {}) for mode in ("RGB", "L", "CMYK")),
        *(("JPEG", "RGB", extra) for extra in (rich, {"progressive": True})),
        *(("MPO", "RGB", several), ("PPM", "RGB", {}), ("PPM", "1", {}), ("PPM", "I;16", {})),
        *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *(("PNG", "RGB", extra) for extra in (rich, several)),
        *(("GIF", "P", {}), ("GIF", "RGB", several), ("ICO", "RGBA", {})),
        *(("BMP", mode, {}) for mode in ("1", "P", "RGB", "RGBA")),
        *(("TIFF", mode, {}) for mode in by_mode),
        *(("TIFF", "RGB", extra) for extra in (rich, several, {"compression": "jpeg"})),
        *(("TIFF", "L", {"compression": c}) for c in ("tiff_lzw", "tiff_adobe_deflate")),
        *(("TIFF", "1", {"compression": c}) for c in ("group3", "group4")),
        *(("WEBP", "RGB", extra) for extra in ({}, rich, several)),
        *(("WEBP", "RGBA", {"lossless": True}), ("ICO", "RGBA", {"bitmap_format": "bmp"})),
        *(("AVIF", mode, {}) for mode in ("RGB", "RGBA")),
        *(("AVIF", "RGB", extra) for extra in (rich, several)),
        *(("JPEG2000", mode, {}) for mode in ("RGB", "LA", "I;16")),
        *(("JPEG2000", "RGB", extra) for extra in ({"no_jp2": True}, {"tile_size": (16, 16)})),
    ]
    try:
        from pillow_heif import register_heif_opener  # to write it; r2n reads it without
    except ImportError:
        print("stress: HEIC is left out: pillow-heif is not installed", file=sys.stderr)
    else:
        register_heif_opener()
        layouts += [("HEIF", mode, {}) for mode in ("RGB", "RGBA", "L")] + [("HEIF", "RGB", rich)]
    encoded = []
    for kind, mode, extra in layouts:
        content = BytesIO()
        more = {"append_images": [rgb.rotate(180)]} if "save_all" in extra else {}
        by_mode[mode].copy().save(content, kind, **extra, **more)  # copies: saving leaves traces
        encoded.append((kind, re.sub(DATE, lambda date: date[1] + bytes(16), content.getvalue())))
    return encoded


def corrupted(originals: list[tuple[str, bytes]], random: Random) -> tuple[str, bytes]:
    """An image's format, and its bytes after one to four corruptions."""
    kind, original = random.choice(originals)
    content = corrupt(original, lambda: random.choice(originals)[1], random)
    if kind == "PNG" and random.random() < 0.8:  # or nearly all would end at the first check
        mend_checksums(content)
    return kind, bytes(content)


def mend_checksums(png: bytearray) -> None:
    at = 8
    while (end := at + 8 + int.from_bytes(png[at : at + 4], "big")) + 4 <= len(png):
        png[end : end + 4] = crc32(png[at + 4 : end]).to_bytes(4, "big")
        at = end + 4


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    app()
