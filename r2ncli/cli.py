"""The command line: options become one call, its results and errors become messages.

Data goes to stdout or files; progress, summaries and warnings go to stderr. This is the
only file that prints.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from r2ncli import __version__
from r2ncli.errors import R2NError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from r2ncli.checkpoints import DownloadProgress
    from r2ncli.inference import Classification, Progress

P = ParamSpec("P")

FAILURES_SHOWN = 20

app = typer.Typer(
    name="r2n",
    help="Classify images and extract features with the Res2Net family.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# --- options that commands share --------------------------------------------------------

Paths = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PATHS", help="Pictures and folders.", show_default="the current folder"
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FILE|NAME|demo",
        help="A checkpoint file, a published name, or demo (ten CIFAR-10 classes, for trying "
        "the tool).",
        show_default="$R2N_WEIGHTS, else res2net50_v1b_26w_4s",
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", show_default="auto")
]
Backend = Annotated[str | None, typer.Option("--backend", help="torch.", show_default="torch")]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="auto (the fastest that keeps top-1), fp32, bf16 or fp16.",
        show_default="auto",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "-b", "--batch-size", help="Pictures a batch.", show_default="what suits the device"
    ),
]
Workers = Annotated[
    int | None, typer.Option("-j", "--workers", help="Decode threads.", show_default="one a core")
]
Decode = Annotated[str | None, typer.Option("--decode", help="auto or exact.", show_default="auto")]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", help="The network's input, in pixels.", show_default="as trained"),
]
NoCrop = Annotated[
    bool,
    typer.Option("--no-crop", help="Stretch the whole picture instead of cropping its centre."),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        "--max-pixels", help="A picture of more is a failed row.", show_default="200 million"
    ),
]
MaxBytes = Annotated[
    int | None,
    typer.Option("--max-bytes", help="A file of more is a failed row.", show_default="512 MB"),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start again over an output that exists.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an output that was interrupted.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="No progress and no summary; failures still show.")
]


# --- the boundary: errors become exit codes -----------------------------------------------


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


def _boundary(command: Callable[P, int | None]) -> Callable[P, None]:
    """`command`, whose result or expected error becomes the exit code."""

    @wraps(command)
    def bounded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with _sigterm_interrupts(), warnings.catch_warnings():
                if not sys.warnoptions:
                    warnings.simplefilter("ignore")  # the libraries' asides are not for users
                code = command(*args, **kwargs)
                sys.stdout.flush()
        except R2NError as error:
            _say(f"r2n: {error}")
            code = error.exit_code
        except BrokenPipeError:
            # whoever read our output has seen enough; nothing more may be written at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        except KeyboardInterrupt as interrupt:
            _say(f"r2n: {interrupt}" if str(interrupt) else "r2n: interrupted")
            code = 143 if isinstance(interrupt, _Terminated) else 130
        raise typer.Exit(code or 0)

    return bounded


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


def _say(text: str) -> None:
    """A sentence on stderr."""
    typer.echo(_plain(text), err=True)


def _plain(text: str) -> str:
    """`text` for a terminal: control characters escaped, so that a name cannot act."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def _given(**options: Any) -> dict[str, Any]:
    """The options that the user gave; the library has the defaults of the others."""
    return {name: value for name, value in options.items() if value is not None}


# --- progress ---------------------------------------------------------------------------


class _Report:
    """What a person sees of a run: one progress line, failures, and a summary."""

    def __init__(self, verb: str, quiet: bool, bar: bool = True, failures: bool = True) -> None:
        self.verb = verb
        self.quiet = quiet
        self.failures = failures
        self.progress: Progress | None = None
        self._bar: Bar | None = None
        self._with_bar = bar and not quiet and sys.stderr.isatty()
        self._created = self._started = time.monotonic()
        self._begun_at = 0
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._end_bar()

    def row(self, progress: Progress) -> None:
        """Take in one finished row."""
        if self.progress is None:
            self._started, self._begun_at = time.monotonic(), progress.done - 1
        self.progress = progress
        if progress.error is not None and self.failures:
            if progress.failed <= FAILURES_SHOWN:
                self.sentence(f"{progress.path}: {progress.error}")
            elif progress.failed == FAILURES_SHOWN + 1:
                self.sentence("more pictures failed; their rows say why")
        if self._with_bar:
            elapsed = time.monotonic() - self._started
            rate = (progress.done - self._begun_at) / elapsed if elapsed > 0.2 else 0.0
            total = f"{progress.found:,}" if progress.walk_ended else f"at least {progress.found:,}"
            text = f"{progress.done:,} of {total}"
            if rate:
                left = (progress.found - progress.done) / rate
                text += f"  {rate:,.0f} images/s  {_duration(left)} left"
            self._show(self.verb, progress.done, progress.found, text)

    def download(self, progress: DownloadProgress) -> None:
        """Take in one piece of a download."""
        if "download" not in self._tasks:
            self._tasks["download"] = None
            from r2ncli.architectures import LICENCE_NOTICE

            self.sentence(f"downloading {progress.address} to {progress.destination.parent}")
            self.sentence(f"note: {LICENCE_NOTICE}")
        if self._with_bar:
            text = f"{progress.received / 1e6:,.0f} MB"
            if progress.total:
                text += f" of {progress.total / 1e6:,.0f}"
            self._show("download", progress.received, progress.total, text)

    def sentence(self, text: str) -> None:
        """Say something without tearing the progress line."""
        if self._bar is None:
            _say(text)
        else:
            self._bar.console.print(_plain(text), markup=False, highlight=False, soft_wrap=True)

    def summary(self, more: str) -> int:
        """End the progress line, say what was done, and give the exit code."""
        self._end_bar()
        progress = self.progress
        if progress is None:
            return 0
        if not self.quiet:
            now = time.monotonic()
            count, seconds = progress.done - self._begun_at, now - self._started
            failed = f" ({progress.failed:,} failed)" if progress.failed else ""
            rate = f" at {count / seconds:,.0f} images/s" if seconds > 1 else ""
            took = _duration(now - self._created)
            _say(f"{progress.done:,} images{failed} in {took}{rate}{more}")
        return 7 if progress.failed else 0

    def _show(self, name: str, done: int, total: int | None, text: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False),
                console=Console(stderr=True),
                refresh_per_second=5,
                transient=True,
            )
            self._bar.start()
        if self._tasks.get(name) is None:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._tasks[name] = self._bar.add_task(name, text=text)
        self._bar.update(self._tasks[name], completed=done, total=total, text=text)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d} min"


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    """Tell an interrupted user what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        partial = output.with_name(output.name + ".partial")
        kept = f"what was done is kept in {partial}; go on with --resume"
        raise type(interrupt)(
            f"interrupted: {kept if partial.is_dir() else 'nothing was written'}"
        ) from interrupt


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
            metavar="FILE.csv|-",
            help="Write CSV there; - is stdout.",
            show_default="lines to a terminal, CSV to a pipe",
        ),
    ] = None,
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
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
) -> int:
    """The most probable classes of pictures, as lines or CSV."""
    options = _given(
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
    )
    if output is None or output == "-":
        if overwrite or resume:
            raise UsageError("--overwrite and --resume are for an output file: give one with -o")
        return _classify_to_stdout(paths or [], topk, output is None, quiet, options)

    from r2ncli.runs import classify_to

    with _Report("classify", quiet) as report, _resumable(Path(output)):
        record = classify_to(
            output,
            paths or [],
            topk=topk,
            overwrite=overwrite,
            resume=resume,
            on_warning=report.sentence,
            on_progress=report.row,
            on_download=report.download,
            **options,
        )
        return _finished(report, record, output)


def _classify_to_stdout(
    paths: list[str], topk: int, lines: bool, quiet: bool, options: dict[str, Any]
) -> int:
    from r2ncli.inference import classification, open_classifier, walked_rows
    from r2ncli.runs import csv_format
    from r2ncli.sources import Walk
    from r2ncli.writers import stream_csv

    lines = lines and sys.stdout.isatty()
    with _Report("classify", quiet, bar=not lines, failures=not lines) as report:
        walk = Walk(paths, report.sentence)
        pipeline = open_classifier(topk, on_download=report.download, **options)
        rows = walked_rows(walk, pipeline, report.row)
        results = (classification(row, topk, pipeline.labels) for row in rows)
        if lines:
            for result in results:
                typer.echo(_line(result, _terminal_width()))
        else:
            stream_csv(results, csv_format(pipeline, topk), sys.stdout)
        ran = pipeline.engine.description
        return report.summary(f", {ran.device}, {ran.precision}")


def _line(result: Classification, width: int) -> str:
    """``path  label 87.3 %, label 6.1 %, …``: as many of the k as the width holds, at least one."""
    from rich.cells import cell_len

    name = _plain(result.path)
    if result.error is not None:
        return f"{name}  failed: {_plain(result.error)}"
    parts = [
        f"{_plain(p.label) if p.label is not None else f'class {p.index}'} "
        f"{100 * p.probability:.1f} %"
        for p in result.predictions
    ]
    line = f"{name}  {parts[0]}"
    for part in parts[1:]:
        if cell_len(line) + 2 + cell_len(part) > width:
            break
        line += f", {part}"
    return line


def _terminal_width() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _finished(report: _Report, record: dict[str, Any], output: str) -> int:
    """The summary of a run with an output file, and its exit code."""
    if report.progress is None:  # resumed, and nothing was left to do
        if not report.quiet:
            _say(f"{output}: nothing left to do")
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
    overwrite: Overwrite = False,
    resume: Resume = False,
    quiet: Quiet = False,
) -> int:
    """The features of any layers for every picture, as HDF5."""
    if list_layers:
        return _list_layers(weights, image_size)
    from r2ncli.runs import extract_to

    with _Report("extract", quiet) as report, _resumable(Path(output)):
        record = extract_to(
            output,
            paths or [],
            overwrite=overwrite,
            resume=resume,
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
            ),
        )
        if record["precision"] != "fp32":
            report.sentence(
                f"computed in {record['precision']}; --precision fp32 gives full precision"
            )
        return _finished(report, record, output)


def _list_layers(weights: str | None, image_size: int | None) -> int:
    from r2ncli.model import layer_shapes
    from r2ncli.weights import load_checkpoint

    with _Report("download", quiet=False) as report:
        checkpoint = load_checkpoint(weights, on_progress=report.download)
    size = image_size or checkpoint.preprocessing.image_size
    shapes = layer_shapes(checkpoint.network.architecture, size)
    longest = max(map(len, shapes))
    for name, shape in shapes.items():
        typer.echo(f"{name:<{longest}}  {' x '.join(map(str, shape))}")
    return 0


# --- verify-weights -----------------------------------------------------------------------


@app.command(
    "verify-weights",
    epilog="Example:  r2n verify-weights res2net50_v1b_26w_4s-3cf99910.pth",
)
@_boundary
def verify(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A checkpoint file.")],
    json: Json = False,
) -> int:
    """Whether a checkpoint file is what it should be; nothing in it is executed."""
    from r2ncli.verification import FAILED, WARNING, verify_weights

    verification = verify_weights(file)
    if json:
        _print_json(verification.as_dict())
    else:
        rows = [
            (check.name, check.status, check.found, check.expected) for check in verification.checks
        ]
        title = f"{verification.file}\nSHA-256 {verification.sha256}"
        colours = {FAILED: "red", WARNING: "yellow"}
        _print_table(title, ("check", "result", "found", "expected"), rows, colours=colours)
    failed = [check for check in verification.checks if check.status == FAILED]
    for check in failed:
        expected = f", expected {check.expected}" if check.expected else ""
        _say(f"r2n: {verification.file}: {check.name}: {check.found}{expected}")
    return 4 if failed else 0


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
        on_measuring=None if quiet else lambda words: _say(f"measuring {words}"),
        **_given(
            weights=weights,
            device=device,
            precisions=precision,
            batch_sizes=batch_size,
            workers=workers,
        ),
    )
    if json:
        _print_json(report.as_dict())
        return 0
    engine = report.engine
    _print_table(
        f"model alone, {report.weights} weights, {engine.device} ({engine.device_model}), "
        f"{engine.library}",
        ("precision", "batch", "images/s", "p50 ms", "p95 ms"),
        [
            (
                speed.precision,
                str(speed.batch_size),
                f"{speed.images_per_second:,.1f}",
                f"{speed.latency_p50_ms:,.1f}",
                f"{speed.latency_p95_ms:,.1f}",
            )
            for speed in report.model
        ],
        right_from=1,
    )
    _print_table(
        f"pipeline, {engine.precision}, batch {engine.batch_size}, {report.workers} decode "
        f"threads, {report.pictures}",
        ("stage", "images/s", "p50 ms", "p95 ms", ""),
        [
            (
                stage.stage,
                f"{stage.images_per_second:,.1f}",
                "" if stage.latency_p50_ms is None else f"{stage.latency_p50_ms:,.1f}",
                "" if stage.latency_p95_ms is None else f"{stage.latency_p95_ms:,.1f}",
                "binds" if stage.stage == report.binding_stage else "",
            )
            for stage in report.stages
        ],
        right_from=1,
    )
    return 0


# --- tables and JSON ------------------------------------------------------------------------


def _print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right_from: int | None = None,
    colours: dict[str, str] | None = None,
) -> None:
    """A table on stdout; a cell that is a key of `colours` is coloured on a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(_plain_lines(title)), title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        right = right_from is not None and number >= right_from
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_plain(cell), (colours or {}).get(cell, "")) for cell in row))
    Console(highlight=False).print(table)


def _plain_lines(text: str) -> str:
    return "\n".join(map(_plain, text.splitlines()))


def _print_json(document: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


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
