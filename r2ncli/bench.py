"""Measure the speed of the model alone and of every stage of the pipeline on images."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from itertools import chain, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from r2ncli import __version__
from r2ncli.architectures import DEFAULT_NETWORK, PUBLISHED, Architecture, Preprocessing
from r2ncli.engine import INT8
from r2ncli.engine.base import EngineDescription
from r2ncli.errors import ImageError, UsageError
from r2ncli.images.decode import decode
from r2ncli.options import BENCH_PRECISIONS, BENCH_SECONDS, PathLike, RunOptions
from r2ncli.outputs.formats import CsvFormat, Format
from r2ncli.outputs.partial import PartialOutput
from r2ncli.outputs.rows import Batch
from r2ncli.pipeline import Classify, run
from r2ncli.predictor import Predictor, assemble_predictor
from r2ncli.sources.selection import LeftOut, Selection, no_image_found
from r2ncli.sources.walk import Input, as_sequence, file_input, find_images
from r2ncli.weights.checkpoints import imagenet_labels

if TYPE_CHECKING:
    from r2ncli.weights.loading import Checkpoint

DEFAULTS = RunOptions()
MOST_IMAGES = 2000  # names taken from a folder; they are repeated as often as necessary


@dataclass(frozen=True)
class ModelSpeed:
    """Throughput of the model alone on full batches, and latency of one batch.

    `flops_per_second` counts convolutions and classifier. `matmul_share` is its ratio to the rate
    of a large matrix product in the same precision; None if torch has no such product.
    """

    precision: str
    batch_size: int
    images_per_second: float
    latency_p50_ms: float
    latency_p90_ms: float
    latency_p95_ms: float
    latency_p99_ms: float
    flops_per_second: float
    matmul_share: float | None


@dataclass(frozen=True)
class StageSpeed:
    """Throughput of one stage or of the whole pipeline (``whole``); latency per image or batch."""

    stage: str
    images_per_second: float
    latency_p50_ms: float | None = None
    latency_p90_ms: float | None = None
    latency_p95_ms: float | None = None
    latency_p99_ms: float | None = None


@dataclass(frozen=True)
class BenchReport:
    """What was measured, and on what.

    `bottleneck` is the name of the slowest stage. `peak_resident_mb` is of the whole process;
    None if the system does not report it.
    """

    weights: str
    engine: EngineDescription
    workers: int
    images: str
    model: tuple[ModelSpeed, ...]
    stages: tuple[StageSpeed, ...]
    bottleneck: str
    peak_resident_mb: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of ``r2n bench --json``."""
        return {"schema": 3, "r2n": __version__, **asdict(self)}


def bench(
    paths: Sequence[PathLike] | PathLike = (),
    *,
    options: RunOptions = DEFAULTS,
    weights: PathLike | None = None,
    precisions: Sequence[str] = BENCH_PRECISIONS,
    batch_sizes: Sequence[int] | None = None,
    seconds: float = BENCH_SECONDS,
    on_measuring: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measure throughput and latency.

    The model alone is measured with every precision and batch size, the whole pipeline with
    the first precision and the batch size that suits the device.

    Parameters
    ----------
    paths : path or sequence of paths
        Images for the pipeline; an empty sequence means generated JPEGs of 500 x 375.
    options : RunOptions
        Its `device`, `backend` and `workers` are used.
    weights : str, path or None
        A checkpoint that is on this machine (nothing is downloaded); None means the default
        network with random weights, which run at the same speed.
    precisions, batch_sizes : sequences
        What the model alone is measured with; None means batch sizes that suit the device.
    seconds : float
        How long each measurement takes.
    on_measuring : callable, optional
        Takes the name of each measurement before it starts.

    Raises
    ------
    R2NError
        An option, the weights, the device or a path cannot be used.
    """
    if not 0 < seconds < 3600:  # false for NaN
        raise UsageError(f"`seconds` must be more than 0 and less than 3600, not {seconds:g}")
    if INT8 in precisions:
        raise UsageError(
            "`precision=int8` cannot be measured: int8 needs images to calibrate with, and "
            "bench does not quantise"
        )
    paths = as_sequence(paths)
    left_out = LeftOut(Selection())
    every = find_images(paths, lambda _warning: None, left_out=left_out) if paths else iter(())
    found = list(islice(every, MOST_IMAGES))
    if paths and not found:
        raise no_image_found(left_out)
    say = on_measuring or (lambda _words: None)
    options = replace(options, precision=precisions[0])
    checkpoint = _checkpoint(weights)
    layers = Classify().layers(options)
    whole = assemble_predictor(checkpoint, layers, options)
    on_cpu = whole.engine.description.device_kind == "cpu"
    sizes = batch_sizes or ((1, 8) if on_cpu else (1, 64, 256))

    speeds: dict[tuple[str, int], ModelSpeed] = {}
    for precision in precisions:
        for size in sizes:
            measured = replace(options, precision=precision, batch_size=size)
            predictor = assemble_predictor(checkpoint, layers, measured)
            executed = predictor.engine.description.precision
            if (executed, size) not in speeds:
                say(f"model, {executed}, batch {size}")
                architecture = checkpoint.network.architecture
                speeds[executed, size] = _model_speed(predictor, architecture, seconds)

    with tempfile.TemporaryDirectory(prefix="r2n-bench-") as folder:
        inputs = found or generated_jpegs(Path(folder))
        kind = (
            f"images of {', '.join(map(str, paths))}" if found else "generated JPEGs of 500 x 375"
        )
        images = f"{len(inputs)} {kind}"
        stages = tuple(_stages(whole, options, inputs, Path(folder), seconds, say))
    alone = [stage for stage in stages if stage.stage != "whole"]
    return BenchReport(
        weights="random" if weights is None else checkpoint.variant,
        engine=whole.engine.description,
        workers=whole.workers,
        images=images,
        model=tuple(speeds.values()),
        stages=stages,
        bottleneck=min(alone, key=lambda stage: stage.images_per_second).stage,
        peak_resident_mb=_peak_resident_mb(),
    )


def generated_jpegs(folder: Path, count: int = 64) -> list[Input]:
    """Write seeded JPEGs of 500 x 375 that are about as large as photographs."""
    random = np.random.default_rng(0)
    inputs = []
    for number in range(count):
        coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        noise = random.normal(0, 12, (375, 500, 3))
        pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
        encoded = BytesIO()
        Image.fromarray(pixels).save(encoded, "JPEG", quality=88)
        path = folder / f"{number:04d}.jpg"
        path.write_bytes(encoded.getvalue())
        inputs.append(file_input(str(path), path.name))
    return inputs


def _checkpoint(weights: PathLike | None) -> Checkpoint:
    """Load a checkpoint that is on this machine; None gives one with random weights."""
    import torch

    from r2ncli.model import Res2Net
    from r2ncli.weights.loading import Checkpoint, load_checkpoint

    if weights is not None:
        return load_checkpoint(weights, download=False)
    with torch.random.fork_rng(devices=[]):
        network = Res2Net(PUBLISHED[DEFAULT_NETWORK].architecture).eval()
    path, labels = Path("random weights"), imagenet_labels()
    return Checkpoint(path, "", DEFAULT_NETWORK, network, labels, Preprocessing())


def _model_speed(predictor: Predictor, architecture: Architecture, seconds: float) -> ModelSpeed:
    from r2ncli.model import forward_flops

    description = predictor.engine.description
    rate, latencies = _forward(predictor, seconds)
    flops = rate * forward_flops(architecture, predictor.preprocessing.image_size)
    first, *others = description.device.split(",")
    product = matmul_flops_per_second(description.precision, first)
    return ModelSpeed(
        description.precision,
        description.batch_size,
        rate,
        *_percentiles(latencies),
        flops_per_second=flops,
        matmul_share=None if product is None else flops / (product * (1 + len(others))),
    )


def _forward(predictor: Predictor, seconds: float) -> tuple[float, list[float]]:
    """Run full batches on all streams; return images/s, and the seconds of each batch.

    Each stream runs two batches before the measurement.
    """
    engine, description = predictor.engine, predictor.engine.description
    side = predictor.preprocessing.image_size

    def forward(deadline: float) -> list[float]:
        pixels = engine.empty_batch(side)
        pixels[...] = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
        latencies: list[float] = []
        while time.perf_counter() < deadline or len(latencies) < 2:
            start = time.perf_counter()
            engine(pixels)
            latencies.append(time.perf_counter() - start)
        return latencies

    with ThreadPoolExecutor(description.streams) as threads:
        list(threads.map(forward, [0.0] * description.streams))
        start = time.perf_counter()
        latencies = list(chain(*threads.map(forward, [start + seconds] * description.streams)))
        took = time.perf_counter() - start
    rate = description.batch_size * len(latencies) / took
    if description.device_kind != "cpu":  # there a batch also waits for those before it
        latencies = forward(time.perf_counter() + seconds / 2)
    return rate, latencies


def _percentiles(latencies: Sequence[float]) -> tuple[float, float, float, float]:
    """Return the 50th, 90th, 95th and 99th percentile in ms."""
    p50, p90, p95, p99 = np.percentile(latencies, [50, 90, 95, 99]) * 1000
    return float(p50), float(p90), float(p95), float(p99)


def matmul_flops_per_second(precision: str, device: str) -> float | None:
    """Return the highest rate of a few products of two large matrices.

    They are 2048 x 2048 on a CPU. On a GPU they are 8192 x 8192, so that the start of a
    kernel and the wait for its end take a small part of the time.
    """
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        return None
    side = 2048 if device == "cpu" else 8192
    matrix = torch.ones(side, side, dtype=dtypes[precision], device=device)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(6):
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits until a GPU has finished
            best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _peak_resident_mb() -> float | None:
    """Return the most memory that this process held, in MB; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6  # bytes, elsewhere KiB


def _stages(
    predictor: Predictor,
    options: RunOptions,
    inputs: list[Input],
    folder: Path,
    seconds: float,
    say: Callable[[str], None],
) -> Iterator[StageSpeed]:
    say("read and decode")
    yield _decode_speed(predictor, inputs, seconds)

    say("forward")
    rate, latencies = _forward(predictor, seconds)
    yield StageSpeed("forward", rate, *_percentiles(latencies))

    say("the whole pipeline")
    count = max(2 * predictor.engine.description.batch_size, int(rate * seconds))
    start = time.perf_counter()
    format = Classify().format(CsvFormat, options, predictor)
    keep = Classify().keep(options, predictor)
    results = list(run(islice(cycle(inputs), count), predictor, keep))
    _write(format, results, folder / "whole.csv")
    whole = StageSpeed("whole", count / (time.perf_counter() - start))

    say("write")
    writing: list[float] = []
    while sum(writing) < min(seconds, 1.0) or len(writing) < 3:
        start = time.perf_counter()
        _write(format, results, folder / "write.csv")
        writing.append(time.perf_counter() - start)
    yield StageSpeed("write", count * len(writing) / sum(writing))
    yield whole


def _decode_speed(predictor: Predictor, inputs: list[Input], seconds: float) -> StageSpeed:
    """Measure decoding with all threads for `seconds`."""
    deadline = time.perf_counter() + seconds

    def decode_until_deadline(first: int) -> list[float]:
        latencies: list[float] = []
        for source in islice(cycle(inputs), first, None):
            start = time.perf_counter()
            if start > deadline and latencies:
                break
            try:
                content = source.read(predictor.rules.max_bytes).content
                decode(content, predictor.preprocessing, predictor.rules)
            except ImageError:
                pass  # a failed image takes time too
            latencies.append(time.perf_counter() - start)
        return latencies

    start = time.perf_counter()
    with ThreadPoolExecutor(predictor.workers) as threads:
        latencies = list(chain(*threads.map(decode_until_deadline, range(predictor.workers))))
    took = time.perf_counter() - start
    return StageSpeed("read+decode", len(latencies) / took, *_percentiles(latencies))


def _write(format: Format, results: Sequence[Batch], out: Path) -> None:
    with PartialOutput(out, format) as partial:
        partial.begin({})
        for batch in results:
            partial.append(batch)
        partial.finish({})
