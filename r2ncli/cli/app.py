"""The command line: options become one call, its results and errors become messages.

Data goes to stdout or files; progress, summaries and warnings go to stderr.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, cast

import typer

from r2ncli import __version__
from r2ncli.cli.options import (
    Backend,
    BatchSize,
    Calibration,
    Decode,
    Device,
    Exclude,
    ImageSize,
    Include,
    Json,
    Max,
    MaxBytes,
    MaxPixels,
    NoCrop,
    Null,
    OnError,
    Overwrite,
    Paths,
    Precision,
    Quiet,
    Resume,
    RetryFailed,
    Shard,
    Timeout,
    Weights,
    Workers,
)
from r2ncli.cli.terminal import (
    Report,
    is_terminal,
    picture_line,
    plain_lines,
    print_json,
    print_table,
    put,
    say,
    terminal_width,
)
from r2ncli.errors import FailedInputError, R2NError, UsageError

if TYPE_CHECKING:
    from r2ncli.bench import ModelSpeed, StageSpeed
    from r2ncli.pipeline import RunOptions
    from r2ncli.weights.verify import Verification

P = ParamSpec("P")
TENSORS_SHOWN = 10

app = typer.Typer(
    name="r2n",
    help="Classify images and extract features with the Res2Net family.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# --- the boundary: errors become exit codes -----------------------------------------------


_SILENT = logging.NullHandler()


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


def _boundary(command: Callable[P, int | None]) -> Callable[P, None]:
    """`command`, whose result or expected error becomes the exit code."""

    @wraps(command)
    def bounded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with _sigterm_interrupts(), warnings.catch_warnings():
                if not sys.warnoptions:  # the libraries' asides are not for users
                    warnings.simplefilter("ignore")
                    logging.getLogger("PIL").addHandler(_SILENT)
                _speak_utf8()
                code = command(*args, **kwargs)
        except R2NError as error:
            say(f"r2n: {error}")
            code = error.exit_code
            _give_up_stdout()
        except BrokenPipeError:
            code = 0
            _give_up_stdout()
        except KeyboardInterrupt as interrupt:
            say(f"r2n: {interrupt}" if str(interrupt) else "r2n: interrupted")
            code = 143 if isinstance(interrupt, _Terminated) else 130
            _leave(code)
        raise typer.Exit(code or 0)

    return bounded


def _leave(code: int) -> None:
    """End now, if this is a program of its own: all that was to be written is.

    Python would wait for its threads, and one may be in the middle of a large batch, or
    wait for a server.
    """
    if sys.stdout is sys.__stdout__:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _speak_utf8() -> None:
    """Files are UTF-8 whatever the locale is; a terminal gets what it cannot show escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding if is_terminal(stream) else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def _give_up_stdout() -> None:
    """Write nothing more to a stdout that does not take it, not even at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except AttributeError:  # it was closed from the start
        return


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: someone's test, or a server
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _given(**options: Any) -> dict[str, Any]:
    """The options that the user gave; the library has the defaults of the others."""
    return {name: value for name, value in options.items() if value is not None}


@contextmanager
def _resumable(output: Path, retry_failed: bool) -> Iterator[None]:
    """Tell the user of a run that was ended what is kept and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, FailedInputError) as ended:
        from r2ncli.outputs.partial import partial_folder

        partial = partial_folder(output)
        option = "--retry-failed" if retry_failed else "--resume"
        kept = f"what was done is kept in {partial}; go on with {option}"
        why = f"{ended}; " if isinstance(ended, FailedInputError) else "interrupted: "
        raise type(ended)(why + (kept if partial.is_dir() else "nothing was written")) from ended


# --- classify -----------------------------------------------------------------------------


@app.command(
    epilog="Example:  r2n classify ./photos --topk 5 -o results.csv",
)
@_boundary
def classify(
    paths: Paths = None,
    topk: Annotated[int, typer.Option("--topk", "--top-k", help="Classes a picture.")] = 5,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE|-",
            help="Write a .csv, .jsonl or .parquet file; - is stdout, as CSV.",
            show_default="lines to a terminal, CSV to a pipe",
        ),
    ] = None,
    weights: Weights = None,
    device: Device = None,
    backend: Backend = None,
    precision: Precision = None,
    calibration: Calibration = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    decode: Decode = None,
    image_size: ImageSize = None,
    no_crop: NoCrop = False,
    max_pixels: MaxPixels = None,
    max_bytes: MaxBytes = None,
    include: Include = None,
    exclude: Exclude = None,
    max: Max = None,
    shard: Shard = None,
    null: Null = False,
    timeout: Timeout = None,
    on_error: OnError = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    retry_failed: RetryFailed = False,
    quiet: Quiet = False,
) -> int:
    """The most probable classes of pictures, as lines or CSV."""
    options = _given(
        weights=weights,
        device=device,
        backend=backend,
        precision=precision,
        calibration=calibration,
        batch_size=batch_size,
        workers=workers,
        decode=decode,
        image_size=image_size,
        max_pixels=max_pixels,
        max_bytes=max_bytes,
        no_crop=no_crop,
        include=include,
        exclude=exclude,
        max=max,
        shard=shard,
        null=null,
        timeout=timeout,
        on_error=on_error,
    )
    if output is None or output == "-":
        if overwrite or resume or retry_failed:
            raise UsageError(
                "--overwrite, --resume and --retry-failed are for an output file: give one with -o"
            )
        return _classify_to_stdout(
            paths or [], topk, output is None, quiet, cast("RunOptions", options)
        )

    from r2ncli.runs import classify_to

    with Report("classify", quiet) as report, _resumable(Path(output), retry_failed):
        record = classify_to(
            output,
            paths or [],
            topk=topk,
            overwrite=overwrite,
            resume=resume,
            retry_failed=retry_failed,
            on_warning=report.sentence,
            on_progress=report.row,
            on_download=report.download,
            on_quantising=report.quantising,
            **options,
        )
        return _finished(report, record, output)


def _classify_to_stdout(
    paths: list[str], topk: int, lines: bool, quiet: bool, options: RunOptions
) -> int:
    from r2ncli.outputs.formats import CsvFormat
    from r2ncli.pipeline import (
        classification,
        open_walk,
        split_options,
        top_classes,
        walked_rows,
    )
    from r2ncli.predictor import open_classifier
    from r2ncli.runs import row_format

    on_terminal = is_terminal(sys.stdout)
    lines = lines and on_terminal
    with Report("classify", quiet, bar=not lines, failures=not lines) as report:
        sources, execution = split_options(options)
        walk = open_walk(paths, report.sentence, **sources)
        execution |= {"on_download": report.download, "on_quantising": report.quantising}
        pipeline = open_classifier(topk, report.sentence, **execution)
        on_error = sources.get("on_error", "continue")
        rows = walked_rows(walk, pipeline, report.row, on_error, top_classes(topk))
        results = (classification(row, pipeline.labels) for row in rows)
        if lines:
            for result in results:
                put(picture_line(result, terminal_width()) + "\n")
        else:
            for text in row_format(CsvFormat, pipeline, topk).lines(results):
                put(plain_lines(text) + "\n" if on_terminal else text)
        ran = pipeline.engine.description
        return report.summary(f", {ran.device}, {ran.precision}")


def _finished(report: Report, record: dict[str, Any], output: str) -> int:
    """The summary of a run with an output file, and its exit code."""
    if report.progress is None:  # resumed, and nothing was left to do
        if not report.quiet:
            say(f"{output}: nothing left to do")
        return 7 if record.get("counts", {}).get("failed") else 0
    ran = f"{record['device']['name']}, {record['precision']}"
    return report.summary(f", {ran} -> {output}")


# --- extract ------------------------------------------------------------------------------


@app.command(
    epilog="Example:  r2n extract ./photos --layer layer3 -o feats.h5",
)
@_boundary
def extract(
    paths: Paths = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            "--layer", help="A layer's name; give it again for more.", show_default="layer4"
        ),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option("--pool", help="avg, max or none (whole feature maps).", show_default="avg"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32 or float16.", show_default="float32")
    ] = None,
    list_layers: Annotated[
        bool, typer.Option("--list-layers", help="Print every layer's name and shape, and end.")
    ] = False,
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE.h5", help="Write HDF5 there.")
    ] = "features.h5",
    weights: Weights = None,
    device: Device = None,
    backend: Backend = None,
    precision: Precision = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    decode: Decode = None,
    image_size: ImageSize = None,
    no_crop: NoCrop = False,
    max_pixels: MaxPixels = None,
    max_bytes: MaxBytes = None,
    include: Include = None,
    exclude: Exclude = None,
    max: Max = None,
    shard: Shard = None,
    null: Null = False,
    timeout: Timeout = None,
    on_error: OnError = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    retry_failed: RetryFailed = False,
    quiet: Quiet = False,
) -> int:
    """The features of any layers for every picture, as HDF5."""
    if list_layers:
        return _list_layers(weights, image_size, quiet)
    from r2ncli.runs import extract_to

    with Report("extract", quiet) as report, _resumable(Path(output), retry_failed):
        record = extract_to(
            output,
            paths or [],
            overwrite=overwrite,
            resume=resume,
            retry_failed=retry_failed,
            on_warning=report.sentence,
            on_progress=report.row,
            on_download=report.download,
            **_given(
                layers=layer,
                pool=pool,
                dtype=dtype,
                weights=weights,
                device=device,
                backend=backend,
                precision=precision,
                batch_size=batch_size,
                workers=workers,
                decode=decode,
                image_size=image_size,
                max_pixels=max_pixels,
                max_bytes=max_bytes,
                no_crop=no_crop,
                include=include,
                exclude=exclude,
                max=max,
                shard=shard,
                null=null,
                timeout=timeout,
                on_error=on_error,
            ),
        )
        if record["precision"] != "fp32":
            report.sentence(
                f"computed in {record['precision']}; --precision fp32 gives full precision"
            )
        return _finished(report, record, output)


def _list_layers(weights: str | None, image_size: int | None, quiet: bool) -> int:
    from r2ncli.model import layer_shapes
    from r2ncli.predictor import check_options
    from r2ncli.weights.loading import load_checkpoint

    check_options(image_size=image_size)
    with Report("download", quiet=quiet) as report:
        checkpoint = load_checkpoint(weights, on_progress=report.download)
    size = image_size or checkpoint.preprocessing.image_size
    shapes = layer_shapes(checkpoint.network.architecture, size)
    longest = max(map(len, shapes))
    for name, shape in shapes.items():
        put(f"{name:<{longest}}  {' x '.join(map(str, shape))}\n")
    return 0


# --- diff and merge -------------------------------------------------------------------------


@app.command(epilog="Example:  r2n diff before.csv after.parquet")
@_boundary
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A result.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another, of the same kind.")],
    atol: Annotated[
        float, typer.Option("--atol", help="Values that differ by no more count as equal.")
    ] = 0.0,
    json: Json = False,
) -> int:
    """Whether two results are equal, and what differs; exit code 8 if something does."""
    from r2ncli.outputs.diff import diff as compare

    found = compare(a, b, atol=atol)
    if json:
        print_json(found.as_dict())
        return 8 if found.different else 0
    title = f"{a} and {b}: {found.compared:,} rows compared"
    changes = [
        (words, f"{names.count:,}", ", ".join(names.examples))
        for words, names in (
            ("only in A", found.only_in_a),
            ("only in B", found.only_in_b),
            ("failed in one", found.status_changed),
            ("another top-1", found.top1_changed),
            (f"values beyond {atol:g}" if atol else "other values", found.beyond_atol),
        )
        if names is not None and names.count
    ]
    if changes:
        print_table(title, ("", "rows", "such as"), changes)
    else:
        put(plain_lines(f"{title}, equal") + "\n")
    largest = [
        (name, f"{one.difference:.3g}", one.path)
        for name, one in found.largest.items()
        if one.path is not None
    ]
    if largest:
        print_table("largest differences", ("of", "max |Δ|", "in"), largest)
    if found.settings:
        rows = [(key, str(was), str(now)) for key, (was, now) in found.settings.items()]
        print_table("settings that differ", ("", "A", "B"), rows)
    return 8 if found.different else 0


@app.command(epilog="Example:  r2n merge 1.parquet 2.parquet 3.parquet -o all.parquet")
@_boundary
def merge(
    shards: Annotated[
        list[str],
        typer.Argument(metavar="SHARDS", help="The outputs of --shard 1/N to N/N, in any order."),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="Ends as the shards do.")
    ],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> int:
    """Join the outputs of all shards of a run into one."""
    from r2ncli.outputs.merge import merge as join

    counts = join(shards, output, overwrite=overwrite)["counts"]
    if not quiet:
        failed = f" ({counts['failed']:,} failed)" if counts["failed"] else ""
        say(f"{counts['inputs']:,} images{failed} of {len(shards)} shards -> {output}")
    return 0


# --- verify-weights -----------------------------------------------------------------------


@app.command(
    "verify-weights",
    epilog="Example:  r2n verify-weights res2net50_v1b_26w_4s-3cf99910.pth",
)
@_boundary
def verify(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            help="A checkpoint file, also by its name in torch.hub's folder.",
            show_default="the one that classify would load",
        ),
    ] = None,
    sha256: Annotated[
        str | None,
        typer.Option("--sha256", metavar="HEX", help="The whole digest that it must have."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="FILE", help="Compare the two, tensor by tensor, instead."
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Whether a checkpoint file is what it should be; nothing in it is executed."""
    from r2ncli.weights.compare import Comparison
    from r2ncli.weights.verify import Verification, verify_weights

    try:
        if against is not None:
            return _compare(file, against, sha256, json)
        verification = verify_weights(file, sha256=sha256)
    except R2NError as error:
        if json:
            failed = Verification(file or "", error=str(error))
            unlike = Comparison(file or "", against or "", error=str(error))
            print_json((failed if against is None else unlike).as_dict())
        raise
    if json:
        print_json(verification.as_dict())
    else:
        _print_checks(verification)
    failures = [check for check in verification.checks if check.status == "failed"]
    for check in failures:
        expected = f", expected {check.expected}" if check.expected else ""
        say(f"r2n: {verification.file}: {check.name}: {check.found}{expected}")
    return 4 if failures else 0


def _print_checks(verification: Verification) -> None:
    rows = []
    for check in verification.checks:
        wanted = check.expected if check.status in ("failed", "warning") else ""
        found = f"{check.found} (expected {wanted})" if wanted else check.found
        rows.append((check.name, check.status, found))
    title = f"{verification.file}\nSHA-256 {verification.sha256}"
    if verification.tensors_sha256 is not None:
        title += f"\nof the tensors alone {verification.tensors_sha256}"
    colours = {"failed": "red", "warning": "yellow"}
    print_table(title, ("check", "result", "found"), rows, colours=colours)


def _compare(file: str | None, against: str, sha256: str | None, json: bool) -> int:
    from r2ncli.weights.compare import compare_weights
    from r2ncli.weights.recognition import by_block

    if sha256 is not None:
        raise UsageError("--sha256 is for the checks of one file: leave --against out")
    comparison = compare_weights(file, against)
    if json:
        print_json(comparison.as_dict())
        return 0 if comparison.ok else 4
    counts = [("equal, bit by bit", str(comparison.equal), "")]
    if comparison.different:
        names = by_block(tensor.name for tensor in comparison.different)
        counts.append(("different", str(len(comparison.different)), names))
    for path, only in (
        (comparison.file, comparison.only_in_file),
        (comparison.against, comparison.only_in_against),
    ):
        if only:
            counts.append((f"only in {path}", str(len(only)), by_block(only)))
    title = f"{comparison.file}\nagainst {comparison.against}"
    print_table(title, ("tensors", "count", "which"), counts)
    if comparison.different:
        rows = [
            (
                tensor.name,
                "none in numbers"
                if tensor.max_difference is None
                else f"{tensor.max_difference:.3g}",
                tensor.file,
                tensor.against if tensor.against != tensor.file else "",
            )
            for tensor in comparison.different[:TENSORS_SHOWN]
        ]
        left = len(comparison.different) - len(rows)
        title = "the largest differences" if left else "the differences"
        print_table(title, ("tensor", "max |Δ|", "here", "there, if another"), rows)
    if not comparison.ok:
        say(f"r2n: {comparison.file}: not the same tensors as {comparison.against}")
    return 0 if comparison.ok else 4


# --- convert ------------------------------------------------------------------------------


@app.command(epilog="Example:  r2n convert res2net50_v1b_26w_4s mine.onnx")
@_boundary
def convert(
    weights: Annotated[
        str, typer.Argument(metavar="IN", help="A checkpoint file, a published name, or demo.")
    ],
    output: Annotated[
        str, typer.Argument(metavar="OUT", help="A .pth, .safetensors, .onnx or .xml (OpenVINO).")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="Whose names: official, timm, mmpretrain or torchvision-backbone.",
            show_default="official",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")] = False,
    quiet: Quiet = False,
) -> None:
    """A checkpoint as another library loads it, with equal logits."""
    from r2ncli.weights.convert import convert as write

    with Report("convert", quiet) as report:
        done = write(
            weights, output, overwrite=overwrite, on_download=report.download, **_given(to=to)
        )
    if not quiet:
        equal = f"to {done.difference:.1g} of the largest" if done.difference else "bit by bit"
        say(f"{done.variant}, {done.naming} names, the same logits {equal} -> {done.output}")


# --- bench --------------------------------------------------------------------------------


@app.command(epilog="Example:  r2n bench ./photos --precision bf16 -b 1 -b 8")
@_boundary
def bench(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATHS", help="Pictures.", show_default="generated JPEGs"),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="FILE|NAME|demo",
            help="A checkpoint on this machine.",
            show_default="random, which are as fast",
        ),
    ] = None,
    device: Device = None,
    backend: Backend = None,
    precision: Annotated[
        list[str] | None,
        typer.Option("--precision", help="Give it again for more.", show_default="auto and fp32"),
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            "-b",
            "--batch-size",
            help="Give it again for more.",
            show_default="what suits the device",
        ),
    ] = None,
    workers: Workers = None,
    seconds: Annotated[
        float, typer.Option("--seconds", help="How long each measurement takes.")
    ] = 3.0,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Images/s and latency of the model alone, and of every stage of the pipeline."""
    from r2ncli.bench import bench as measure

    report = measure(
        paths or [],
        seconds=seconds,
        on_measuring=None if quiet else lambda words: say(f"measuring {words}"),
        **_given(
            weights=weights,
            device=device,
            backend=backend,
            precisions=precision,
            batch_sizes=batch_size,
            workers=workers,
        ),
    )
    if json:
        print_json(report.as_dict())
        return 0
    engine = report.engine
    latencies = ("p50 ms", "p90", "p95", "p99")
    print_table(
        f"model alone, {report.weights} weights, {engine.device} ({engine.device_model}), "
        f"{engine.library}",
        ("precision", "batch", "images/s", *latencies, "FLOP/s of matmul's"),
        [
            (
                speed.precision,
                str(speed.batch_size),
                f"{speed.images_per_second:,.1f}",
                *_milliseconds(speed),
                "" if speed.matmul_share is None else f"{100 * speed.matmul_share:.0f} %",
            )
            for speed in report.model
        ],
        right_from=1,
    )
    print_table(
        f"pipeline, {engine.precision}, batch {engine.batch_size}, {engine.streams} streams, "
        f"{report.workers} decode threads, {report.pictures}",
        ("stage", "images/s", *latencies, ""),
        [
            (
                stage.stage,
                f"{stage.images_per_second:,.1f}",
                *_milliseconds(stage),
                "binds" if stage.stage == report.binding_stage else "",
            )
            for stage in report.stages
        ],
        right_from=1,
    )
    if not quiet and report.peak_resident_mb is not None:
        say(f"at most {report.peak_resident_mb:,.0f} MB resident")
    return 0


def _milliseconds(speed: ModelSpeed | StageSpeed) -> list[str]:
    percentiles = (
        *(speed.latency_p50_ms, speed.latency_p90_ms),
        *(speed.latency_p95_ms, speed.latency_p99_ms),
    )
    return ["" if one is None else f"{one:,.1f}" for one in percentiles]


# --- the program --------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"r2n {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Classify images and extract features with the Res2Net family."""
