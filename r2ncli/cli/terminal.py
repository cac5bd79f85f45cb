"""Terminal output: sentences, one progress line, a line per image, tables, JSON.

Names and errors reach a terminal as plain text: never as markup, control characters escaped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

import typer

from r2ncli.architectures import LICENCE_NOTICE
from r2ncli.errors import OutputError, escaped
from r2ncli.files import reason

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from r2ncli.options import Progress
    from r2ncli.outputs.rows import Classification
    from r2ncli.weights.download import DownloadProgress

FAILURES_SHOWN = 20
MIN_PATH = 16  # columns that are left to a path beside a long label


def say(text: str, colour: str | None = None) -> None:
    """Print a sentence to stderr; a closed or full stderr does not stop a run."""
    with suppress(OSError, ValueError):
        typer.echo(coloured(plain(text), colour, sys.stderr), err=True)


def say_error(text: str) -> None:
    """Print to stderr the error that ended a command."""
    say(text, "red")


def coloured(text: str, colour: str | None, stream: TextIO | None) -> str:
    """Return `text` in a colour if `stream` is a terminal and ``NO_COLOR`` is not set."""
    if colour is None or not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return text
    return typer.style(text, fg=colour)


def put(text: str) -> None:
    """Print data to stdout, at once.

    Raises
    ------
    BrokenPipeError
        The reader closed the pipe.
    OutputError
        Stdout is closed or full.
    """
    if sys.stdout is None:
        raise OutputError("stdout is closed: give an output file with -o")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"stdout: cannot be written: {reason(error)}") from error


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal; a closed one is not."""
    return stream is not None and stream.isatty()


def plain(text: str) -> str:
    """Return `text` for a terminal, with control characters escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in escaped(text)
    )


class Report:
    """The report of a run on stderr: one progress line, failures, and a summary."""

    def __init__(self, verb: str, quiet: bool, bar: bool = True, failures: bool = True) -> None:
        self.verb = verb
        self.quiet = quiet
        self.failures = failures
        self.progress: Progress | None = None
        self._bar: Bar | None = None
        self._with_bar = bar and not quiet and is_terminal(sys.stderr)
        self._created = self._started = time.monotonic()
        self._begun_at = 0
        self._announced = False
        self._task: Any = None

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._end_bar()

    def preparing(self) -> None:
        """Show that the network is being prepared, which takes a while in a first run."""
        if not self.quiet and is_terminal(sys.stderr):
            self._show("preparing the network", 0, None, "(a first run takes longer)")

    def prepared(self) -> None:
        """Note that the network is ready, and that results may follow on stdout."""
        self._started = time.monotonic()
        self._end_bar()

    def batch(self, progress: Progress) -> None:
        """Report a batch of finished rows."""
        if self.progress is None:
            self._begun_at = progress.done - progress.rows
        self.progress = progress
        before = progress.failed - len(progress.failures)
        if self.failures:
            for path, error in progress.failures[: max(FAILURES_SHOWN - before, 0)]:
                self.sentence(f"{path}: {error}", "red")
            if before <= FAILURES_SHOWN < progress.failed:
                self.sentence("more images failed; their rows say why")
        if self._with_bar:
            elapsed = time.monotonic() - self._started
            rate = (progress.done - self._begun_at) / elapsed if elapsed > 0.2 else 0.0
            total = f"{progress.found:,}" if progress.walk_ended else f"at least {progress.found:,}"
            text = f"{progress.done:,} of {total}"
            if rate:
                left = (progress.found - progress.done) / rate
                text += f"  {rate:,.0f} images/s  {_duration(left)} left"
            self._show(self.verb, progress.done, progress.found, text)

    def rows(self, done: int) -> None:
        """Report how many rows have been copied."""
        if self._with_bar:
            self._show(self.verb, done, None, f"{done:,} rows")

    def download(self, progress: DownloadProgress) -> None:
        """Report one piece of a download."""
        if not self._announced:
            self._announced = True
            self.sentence(f"downloading {progress.url} to {progress.destination.parent}")
            self.sentence(f"note: {LICENCE_NOTICE}")
        if not self.quiet and is_terminal(sys.stderr):
            text = f"{progress.received / 1e6:,.0f} MB"
            if progress.total:
                text += f" of {progress.total / 1e6:,.0f}"
            self._show("download", progress.received, progress.total, text)
        if progress.received == progress.total:
            self._end_bar()

    def quantising(self, images: int) -> None:
        """Announce int8 quantisation, which is slow."""
        if not self.quiet:
            kept = "the next run finds the result in the cache"
            self.sentence(f"quantising with {images} images; {kept}")

    def sentence(self, text: str, colour: str | None = None) -> None:
        """Print a sentence without breaking the progress line."""
        if self._bar is None:
            say(text, colour)
        else:
            self._bar.console.print(
                plain(text), style=colour, markup=False, highlight=False, soft_wrap=True
            )

    def summary(self, more: str) -> int:
        """End the progress line, print a summary of the run, and return the exit code."""
        self._end_bar()
        progress = self.progress
        done, failed = (0, 0) if progress is None else (progress.done, progress.failed)
        if not self.quiet:
            now = time.monotonic()
            count, seconds = done - self._begun_at, now - self._started
            failures = f" ({failed:,} failed)" if failed else ""
            rate = f" at {count / seconds:,.0f} images/s" if seconds > 1 else ""
            prepared = self._started - self._created
            after = f" after {_duration(prepared)} of preparation" if prepared > 1 else ""
            say(f"{done:,} images{failures} in {_duration(seconds)}{rate}{after}{more}")
        return 7 if failed else 0

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
                redirect_stdout=False,  # rich would send our data to the terminal, not the pipe
                redirect_stderr=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(name, text=text)
        self._bar.update(self._task, description=name, completed=done, total=total, text=text)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.{2 if seconds < 1 else 1 if seconds < 10 else 0}f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d} min"


def image_line(result: Classification, width: int) -> str:
    """Return ``path  label 87.3 %, …`` with as many classes as fit into `width`, at least one.

    A path that is too long for one class is shortened in its middle.
    """
    from rich.cells import cell_len

    name = plain(result.path)
    if result.error is not None:
        line = f"{name}  failed: {plain(result.error)}"
        return coloured(line, "red", sys.stdout)
    parts = [
        f"{plain(p.label) if p.label is not None else f'class {p.index}'} "
        f"{100 * p.probability:.1f} %"
        for p in result.predictions
    ]
    line = f"{shortened(name, max(width - 2 - cell_len(parts[0]), MIN_PATH))}  {parts[0]}"
    for part in parts[1:]:
        if cell_len(line) + 2 + cell_len(part) > width:
            break
        line += f", {part}"
    return line


def shortened(path: str, width: int) -> str:
    """Return `path` in at most `width` columns, with ``…`` in place of its middle if necessary."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(path) <= width:
        return path
    end = path[-(width - 1) * 2 // 3 :]
    while cell_len(end) > (width - 1) * 2 // 3:
        end = end[1:]
    start = set_cell_size(path, width - 1 - cell_len(end)).rstrip()
    return f"{start}…{end}"


def terminal_width() -> int:
    """Return the columns of the terminal, or ``COLUMNS``."""
    return shutil.get_terminal_size().columns


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right_from: int | None = None,
    colours: dict[str, str] | None = None,
) -> None:
    """Print a table to stdout; a cell that is a key of `colours` is coloured on a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(plain_lines(title)), title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        right = right_from is not None and number >= right_from
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell), (colours or {}).get(cell, "")) for cell in row))
    console = Console(highlight=False)
    with console.capture() as rendered:
        console.print(table)
    put(rendered.get())


def plain_lines(text: str) -> str:
    """Return `text` with each line escaped for a terminal (see `plain`)."""
    return "\n".join(map(plain, text.splitlines()))


def print_json(document: dict[str, Any]) -> None:
    """Print a JSON document to stdout; no control character acts on a terminal."""
    text = json.dumps(document, indent=2, ensure_ascii=False)  # this escapes C0 alone
    put(re.sub("[\x7f-\x9f\ud800-\udfff]", lambda c: f"\\u{ord(c[0]):04x}", text) + "\n")
