"""What a person sees: sentences, one progress line, a line a picture, tables, JSON.

Names and errors reach a terminal as plain text: never as markup, control characters
escaped. With `cli` this is the only file that prints.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

import typer

from r2ncli.architectures import LICENCE_NOTICE
from r2ncli.errors import OutputError
from r2ncli.files import reason
from r2ncli.sources.names import bytes_as_hex

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from r2ncli.outputs.rows import Classification
    from r2ncli.pipeline import Progress
    from r2ncli.weights.download import DownloadProgress

FAILURES_SHOWN = 20


def say(text: str) -> None:
    """A sentence on stderr; a stderr that is closed or full stops no run."""
    with suppress(OSError, ValueError):
        typer.echo(plain(text), err=True)


def put(text: str) -> None:
    """Data on stdout, at once.

    Raises
    ------
    BrokenPipeError
        Whoever read it has seen enough.
    OutputError
        It is closed or full.
    """
    if sys.stdout is None:
        raise OutputError("stdout is closed: give a file with -o")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"stdout: cannot be written: {reason(error)}") from error


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads it; a closed stream is none at all."""
    return stream is not None and stream.isatty()


def plain(text: str) -> str:
    """`text` for a terminal: control characters escaped, so that a name cannot act."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in bytes_as_hex(text)
    )


class Report:
    """What a person sees of a run: one progress line, failures, and a summary."""

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
        if not self._announced:
            self._announced = True
            self.sentence(f"downloading {progress.address} to {progress.destination.parent}")
            self.sentence(f"note: {LICENCE_NOTICE}")
        if not self.quiet and is_terminal(sys.stderr):
            text = f"{progress.received / 1e6:,.0f} MB"
            if progress.total:
                text += f" of {progress.total / 1e6:,.0f}"
            self._show("download", progress.received, progress.total, text)
        if progress.received == progress.total:
            self._end_bar()

    def quantising(self, pictures: int) -> None:
        """Tell what takes so long."""
        if not self.quiet:
            found = "which the next run finds in the cache"
            self.sentence(f"quantising with {pictures} pictures, {found}")

    def sentence(self, text: str) -> None:
        """Say something without tearing the progress line."""
        if self._bar is None:
            say(text)
        else:
            self._bar.console.print(plain(text), markup=False, highlight=False, soft_wrap=True)

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
            say(f"{progress.done:,} images{failed} in {took}{rate}{more}")
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
                redirect_stdout=False,  # rich would send our data to the terminal, not the pipe
                redirect_stderr=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(name, text=text)
        self._bar.update(self._task, completed=done, total=total, text=text)

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


def picture_line(result: Classification, width: int) -> str:
    """``path  label 87.3 %, label 6.1 %, …``: as many of the k as the width holds, at least one."""
    from rich.cells import cell_len

    name = plain(result.path)
    if result.error is not None:
        return f"{name}  failed: {plain(result.error)}"
    parts = [
        f"{plain(p.label) if p.label is not None else f'class {p.index}'} "
        f"{100 * p.probability:.1f} %"
        for p in result.predictions
    ]
    line = f"{name}  {parts[0]}"
    for part in parts[1:]:
        if cell_len(line) + 2 + cell_len(part) > width:
            break
        line += f", {part}"
    return line


def terminal_width() -> int:
    """Columns of the terminal, or of ``COLUMNS``."""
    return shutil.get_terminal_size().columns


def print_table(
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
    return "\n".join(map(plain, text.splitlines()))


def print_json(document: dict[str, Any]) -> None:
    put(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
