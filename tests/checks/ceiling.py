"""Measure how many images per second the pipeline could deliver if the network cost nothing.

    python tests/checks/ceiling.py
    python tests/checks/ceiling.py --images 200000 --rounds 5

The images are hard links to one small file in folders of a thousand. The network is replaced by
an engine that returns the same logits at once, and for the first figures decoding by a function
that returns the same pixels. The parts are measured in turns; the result is each part's median.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

import r2ncli
from r2ncli import pipeline, runs
from r2ncli.architectures import Preprocessing
from r2ncli.engine.base import cores, cpu_model
from r2ncli.images.decode import DecodeRules, decode
from r2ncli.outputs.formats import CsvFormat
from r2ncli.outputs.rows import Batch
from r2ncli.pipeline import top_classes
from r2ncli.predictor import Predictor
from r2ncli.sources.walk import Walk
from r2ncli.weights.checkpoints import imagenet_labels

CLASSES = 1000


def main(
    images: Annotated[int, typer.Option(help="Number of images per run.")] = 50_000,
    rounds: Annotated[int, typer.Option(help="Number of rounds; the median is taken.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 256,
    side: Annotated[int, typer.Option(help="Side of the network's input in pixels.")] = 32,
) -> None:
    """Print images per second of the whole and of its parts, then one JSON document."""
    found: dict[str, list[float]] = {}
    print(f"{cpu_model()}, {cores()} cores; {images:,} images, batches of {batch_size}")
    with tempfile.TemporaryDirectory(prefix="r2n-ceiling-") as scratch:
        folder = hard_links(Path(scratch, "images"), images)
        predictor = null_predictor(batch_size, side)
        out = str(Path(scratch, "out.csv"))
        parts: dict[str, Callable[[], int]] = {
            "whole, null decoder": lambda: whole(out, folder, predictor, null_decode(side)),
            "whole, 40x40 JPEGs decoded": lambda: whole(out, folder, predictor, decode),
            "walk": lambda: walk(folder),
            "walk and read": lambda: walk_and_read(folder),
            "decode a 40x40 JPEG, one thread": lambda: decode_small(side),
            "top classes": lambda: keep_classes(images, batch_size),
            "rows to CSV": lambda: write_rows(images, batch_size),
        }
        for _ in range(rounds):
            for name, part in parts.items():
                began = time.perf_counter()
                count = part()
                found.setdefault(name, []).append(count / (time.perf_counter() - began))
    for name, rates in found.items():
        rate = statistics.median(rates)
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        print(f"{name:34} {rate:10,.0f} images/s ({spread}), {1e6 / rate:6.1f} µs each")
    print(json.dumps({"command": "ceiling", "images": images, "images_per_second": found}))


def hard_links(folder: Path, count: int) -> Path:
    """Make a tree of `count` images, all of them links to one small JPEG."""
    folder.mkdir()
    file = folder.with_name("image.jpg")
    file.write_bytes(small_jpeg())
    for number in range(count):
        below = folder / f"{number // 1000:04d}"
        if number % 1000 == 0:
            below.mkdir()
        os.link(file, below / f"{number:07d}.jpg")
    return folder


def small_jpeg() -> bytes:
    content = io.BytesIO()
    Image.effect_mandelbrot((40, 40), (-2, -1, 1, 1), 50).convert("RGB").save(content, "JPEG")
    return content.getvalue()


class NullEngine:
    """An engine whose network costs nothing."""

    def __init__(self, batch_size: int) -> None:
        self.description = SimpleNamespace(
            library="null 1", device="null", device_kind="cpu", device_model="null",
            backend="null", precision="fp32", batch_size=batch_size, streams=1, stream_threads=1,
            executed_batch_size=None,
        )  # fmt: skip
        values = np.random.default_rng(0).standard_normal((batch_size, CLASSES))
        self._logits = values.astype(np.float32)

    def empty_batch(self, side: int) -> Any:
        return np.empty((self.description.batch_size, side, side, 3), np.uint8)

    def __call__(self, _pixels: Any) -> Any:
        return {"fc": self._logits}


def null_predictor(batch_size: int, side: int) -> Predictor:
    return Predictor(
        engine=NullEngine(batch_size),  # type: ignore[arg-type]
        preprocessing=Preprocessing(side, side),
        rules=DecodeRules("auto"),
        workers=cores(),
        checkpoint=Path("null.pth"),
        sha256="0" * 64,
        variant="null",
        classes=CLASSES,
        labels=imagenet_labels(),
        pool="none",
        shapes={"fc": (CLASSES,)},
    )


def null_decode(side: int) -> Callable[..., Any]:
    pixels = np.zeros((side, side, 3), np.uint8)
    return lambda *_: pixels


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def whole(out: str, folder: Path, predictor: Predictor, decoder: Callable[..., Any]) -> int:
    with (
        replaced(runs, "open_predictor", lambda *_: predictor),
        replaced(pipeline, "decode", decoder),
    ):
        record = r2ncli.classify_to(out, folder, overwrite=True)
    assert record["counts"]["failed"] == 0
    return int(record["counts"]["inputs"])


def walk(folder: Path) -> int:
    with Walk([folder], print) as inputs:
        return sum(1 for _ in inputs)


def walk_and_read(folder: Path) -> int:
    with Walk([folder], print) as inputs:
        return sum(1 for source in inputs if source.read(10**9))


def decode_small(side: int) -> int:
    content, preprocessing, rules = small_jpeg(), Preprocessing(side, side), DecodeRules("auto")
    for _ in range(5000):
        decode(content, preprocessing, rules)
    return 5000


def keep_classes(images: int, batch_size: int) -> int:
    keep, outputs = top_classes(5, imagenet_labels()), NullEngine(batch_size)(None)
    batches = -(-images // batch_size)
    deque((keep(outputs) for _ in range(batches)), maxlen=0)
    return batches * batch_size


def write_rows(images: int, batch_size: int) -> int:
    columns = top_classes(5, imagenet_labels())(NullEngine(batch_size)(None))
    names = [f"images/0000/{number:07d}.jpg" for number in range(batch_size)]
    batch, format = Batch(names, [None] * batch_size, columns), CsvFormat(5, True, True)
    batches = -(-images // batch_size)
    for _ in range(batches):
        format.pack([batch])
    return batches * batch_size


if __name__ == "__main__":
    typer.run(main)
