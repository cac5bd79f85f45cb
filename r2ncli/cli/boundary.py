"""The boundary of the program: errors become messages and exit codes."""

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
from types import FrameType
from typing import Any

import typer

from r2ncli.cli.options import for_command_line
from r2ncli.cli.terminal import is_terminal, say, say_error
from r2ncli.errors import DeviceError, R2NError

_SILENT = logging.NullHandler()

# of Python, of an executor whose thread failed while it began, and of libraries in C++
NO_THREAD = "can't start new thread", "initializer failed", "Resource temporarily unavailable"
TOO_FEW_THREADS = (
    "the system allows this user no more threads or processes (ulimit -u, or the limit of a "
    "container): allow more, or use --workers 1"
)


class _Terminated(KeyboardInterrupt):
    """Raised on SIGTERM and handled as Ctrl-C."""


def boundary(command: Callable[..., int | None]) -> Callable[..., None]:
    """Wrap a command: its result, or an expected error, becomes the exit code."""

    @wraps(command)
    def bounded(*args: Any, **kwargs: Any) -> None:
        try:
            with _sigterm_interrupts(), warnings.catch_warnings():
                if not sys.warnoptions:  # warnings of libraries are not for users
                    warnings.simplefilter("ignore")
                    logging.getLogger("PIL").addHandler(_SILENT)
                code = command(*args, **kwargs)
        except R2NError as error:
            say_error(f"r2n: {for_command_line(str(error))}")
            code = error.exit_code
            stop_writing()
        except RuntimeError as error:
            if not any(words in str(error) for words in NO_THREAD):
                raise
            say_error(f"r2n: {TOO_FEW_THREADS}")
            code = DeviceError.exit_code
        except BrokenPipeError:
            code = 0
            stop_writing()
        except KeyboardInterrupt as interrupt:
            say(f"r2n: {for_command_line(str(interrupt)) or 'interrupted'}")
            code = 143 if isinstance(interrupt, _Terminated) else 130
            _leave(code)
        raise typer.Exit(code or 0)

    return bounded


def _leave(code: int) -> None:
    """Exit at once, unless a test runs this in its own process.

    The interpreter would wait for threads that may be computing a large batch or waiting for a
    server. All output has been written by now.
    """
    if sys.stdout is sys.__stdout__:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def speak_utf8() -> None:
    """Write UTF-8 to files and pipes; escape what a terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding if is_terminal(stream) else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def stop_writing() -> None:
    """Flush stdout; where that fails, write nothing more to it, not even at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except AttributeError:  # stdout was closed from the start
        return


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: a test, or a server
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
