"""Commands that run a network on images: classify and extract."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from r2ncli.cli.options import Paths, Quiet, for_command_line, with_run_options
from r2ncli.cli.terminal import (
    Report,
    image_line,
    is_terminal,
    plain_lines,
    put,
    say,
    terminal_width,
)
from r2ncli.errors import FailedInputError, UsageError
from r2ncli.options import CLASSIFY, EXTRACT, Listeners, RunOptions

if TYPE_CHECKING:
    from r2ncli.outputs.rows import Batch

STDOUT = "-"


@with_run_options(CLASSIFY)
def classify(
    options: RunOptions,
    paths: Paths = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE|-",
            help="Write to this file, whose suffix decides the format; - is stdout.",
            show_default="a line per image to a terminal, CSV to a pipe",
            rich_help_panel="Results",
        ),
    ] = None,
    format: Annotated[
        Literal["csv", "jsonl"] | None,
        typer.Option(
            "--format",
            help="Write stdout in this format.",
            show_default="csv",
            rich_help_panel="Results",
        ),
    ] = None,
    quiet: Quiet = False,
) -> int:
    """Classify images: print or save the most probable classes of each."""
    if output is not None and output != STDOUT:
        if format is not None:
            raise UsageError(f"--format is for stdout; the suffix of {output} decides its format")
        return _run_to_file(CLASSIFY, output, paths, options, quiet)
    if options.overwrite or options.resume or options.retry_failed:
        raise UsageError(
            "`overwrite`, `resume` and `retry_failed` are for an output file: give one with -o"
        )
    return _classify_to_stdout(paths, options, output, format, quiet)


def _classify_to_stdout(
    paths: list[str] | None,
    options: RunOptions,
    output: str | None,
    format: str | None,
    quiet: bool,
) -> int:
    lines = is_terminal(sys.stdout) and output is None and format is None
    with Report("classify", quiet, bar=not lines, failures=not lines) as report:
        report.preparing()  # before imports that take their time
        from r2ncli.pipeline import Classify
        from r2ncli.runs import run_to_stream

        write = _write_lines if lines else _writer_of_text(format or "csv")
        record = run_to_stream(Classify(), write, paths or None, options, _listeners(report))
        return report.summary(_executed(record))


def _write_lines(batch: Batch) -> None:
    from r2ncli.outputs.rows import classifications

    for result in classifications(batch):
        put(image_line(result, terminal_width()) + "\n")


def _writer_of_text(format: str) -> Callable[[Batch], None]:
    """Return a function that writes batches as CSV or JSONL to stdout."""
    from r2ncli.outputs.formats import FORMATS
    from r2ncli.outputs.rows import LABEL, PROBABILITY, WNID

    kind: Any = FORMATS[f".{format}"]
    head_is_due = True

    def write(batch: Batch) -> None:
        nonlocal head_is_due
        columns = batch.columns
        rows = kind(columns[PROBABILITY].shape[1], WNID in columns, LABEL in columns)
        text = (rows.head() * head_is_due + rows.pack([batch])).decode()
        head_is_due = False
        put(plain_lines(text) + "\n" if is_terminal(sys.stdout) else text)

    return write


@with_run_options(EXTRACT)
def extract(
    options: RunOptions,
    paths: Paths = None,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Write to this file, whose suffix decides the format.",
            rich_help_panel="Results",
        ),
    ] = "features.h5",
    list_layers: Annotated[
        bool,
        typer.Option(
            "--list-layers",
            metavar="",
            help="Print the name and output shape of every layer, then exit.",
            rich_help_panel="Results",
        ),
    ] = False,
    quiet: Quiet = False,
) -> int:
    """Extract features: save the outputs of any layers for each image."""
    if list_layers:
        return _list_layers(options, quiet)
    return _run_to_file(EXTRACT, output, paths, options, quiet)


def _list_layers(options: RunOptions, quiet: bool) -> int:
    from r2ncli.weights.loading import list_layers

    with Report("download", quiet=quiet) as report:
        shapes = list_layers(options.weights, options.image_size, on_progress=report.download)
    longest = max(map(len, shapes))
    for name, shape in shapes.items():
        put(f"{name:<{longest}}  {' x '.join(map(str, shape))}\n")
    return 0


def _run_to_file(
    command: str, output: str, paths: list[str] | None, options: RunOptions, quiet: bool
) -> int:
    with Report(command, quiet) as report, _resumable(Path(output), options):
        report.preparing()  # before imports that take their time
        from r2ncli.pipeline import Classify, Extract
        from r2ncli.runs import run_to_file

        task = Classify() if command == CLASSIFY else Extract()
        record = run_to_file(task, output, paths or None, options, _listeners(report))
        if command == EXTRACT and record["precision"] != "fp32":
            report.sentence(
                f"computed in {record['precision']}; --precision fp32 gives full precision"
            )
        if report.progress is None and (options.resume or options.retry_failed):
            if not quiet:
                say(f"{output}: nothing left to do")
            return 7 if record["counts"]["failed"] else 0
        return report.summary(f"{_executed(record)} -> {output}")


def _listeners(report: Report) -> Listeners:
    def warning(text: str) -> None:
        report.sentence(for_command_line(text))

    return Listeners(
        warning, report.batch, report.download, report.quantising, on_ready=report.prepared
    )


def _executed(record: dict[str, Any]) -> str:
    return f", {record['device']['name']}, {record['precision']}"


@contextmanager
def _resumable(output: Path, options: RunOptions) -> Iterator[None]:
    """Tell the user, when a run ends early, which rows are kept and how to continue."""
    try:
        yield
    except (KeyboardInterrupt, FailedInputError) as ended:
        from r2ncli.outputs.partial import partial_folder

        partial = partial_folder(output)
        option = "`retry_failed`" if options.retry_failed else "`resume`"
        kept = f"finished rows are kept in {partial}; continue with {option}"
        why = f"{ended}; " if isinstance(ended, FailedInputError) else "interrupted: "
        raise type(ended)(why + (kept if partial.is_dir() else "nothing was written")) from ended
