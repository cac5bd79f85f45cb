"""Commands about this machine: bench."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from r2ncli.cli.options import Json, Quiet, with_run_options
from r2ncli.cli.terminal import print_json, print_table, say, terminal_width
from r2ncli.options import BENCH, BENCH_PRECISIONS, BENCH_SECONDS, RunOptions

if TYPE_CHECKING:
    from r2ncli.bench import ModelSpeed, StageSpeed


@with_run_options(BENCH)
def bench(
    options: RunOptions,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATHS", help="Measure with these images.", show_default="generated JPEGs"
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="FILE|NAME|demo",
            help="Load this checkpoint, which must be on this machine.",
            show_default="random weights, which are as fast",
            rich_help_panel="Network",
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            help="Measure the model in this precision (repeatable).",
            show_default=" and ".join(BENCH_PRECISIONS),
            rich_help_panel="Network",
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            "-b",
            "--batch-size",
            help="Measure the model with this batch size (repeatable).",
            show_default="chosen for the device",
            rich_help_panel="Network",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", help="Measure each stage for this many seconds.")
    ] = BENCH_SECONDS,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure images/s and latency of the model alone and of every stage of the pipeline."""
    from r2ncli.bench import bench as measure

    report = measure(
        paths or [],
        options=options,
        weights=weights,
        precisions=precision or BENCH_PRECISIONS,
        batch_sizes=batch_size,
        seconds=seconds,
        on_measuring=None if quiet else lambda words: say(f"measuring {words}"),
    )
    if json:
        print_json(report.as_dict())
        return 0
    engine = report.engine
    latencies = ("p50 ms", "p90", "p95", "p99")[:: _every()]
    print_table(
        f"model only, {report.weights} weights, {engine.device} ({engine.device_model}), "
        f"{engine.library}",
        (
            "precision",
            "batch",
            "images/s",
            *latencies,
            "% of matmul peak" if _every() == 1 else "% peak",
        ),
        [
            (
                speed.precision,
                str(speed.batch_size),
                f"{speed.images_per_second:,.1f}",
                *_milliseconds(speed),
                "" if speed.matmul_share is None else f"{100 * speed.matmul_share:.0f}",
            )
            for speed in report.model
        ],
        right_from=1,
    )
    print_table(
        f"pipeline, {engine.precision}, batch {engine.batch_size}, {engine.streams} streams, "
        f"{report.workers} decode threads, {report.images}",
        ("stage", "images/s", *latencies, ""),
        [
            (
                stage.stage,
                f"{stage.images_per_second:,.1f}",
                *_milliseconds(stage),
                "bottleneck" if stage.stage == report.bottleneck else "",
            )
            for stage in report.stages
        ],
        right_from=1,
    )
    if not quiet and report.peak_resident_mb is not None:
        say(f"peak memory {report.peak_resident_mb:,.0f} MB")
    return 0


def _milliseconds(speed: ModelSpeed | StageSpeed) -> list[str]:
    percentiles = (
        *(speed.latency_p50_ms, speed.latency_p90_ms),
        *(speed.latency_p95_ms, speed.latency_p99_ms),
    )
    return ["" if one is None else f"{one:,.1f}" for one in percentiles[:: _every()]]


def _every() -> int:
    """Return the step between shown latencies: a narrow terminal shows the first and last only."""
    return 1 if terminal_width() >= 80 else 3
