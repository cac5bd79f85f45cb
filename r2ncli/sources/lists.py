"""Lists of names: standard input, and the file of an ``@file`` argument."""

from __future__ import annotations

import os
import selectors
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain

from r2ncli.errors import InputNotFoundError, UsageError
from r2ncli.files import reason
from r2ncli.sources.names import printable

OpenList = Callable[[], int]  # gives a descriptor, which the caller closes


def standard_input() -> OpenList:
    """Return the function that opens standard input as a list.

    Raises
    ------
    InputNotFoundError
        Standard input is closed.
    """
    try:
        descriptor = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError) as error:
        raise InputNotFoundError("-: standard input is closed") from error
    return lambda: os.dup(descriptor)


def list_file(path: str) -> OpenList:
    """Return the function that opens a list, after checking that this is possible.

    Raises
    ------
    InputNotFoundError
        The file does not exist or cannot be read, or is a folder.
    """
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            os.close(os.open(path, os.O_RDONLY))
        elif os.path.isdir(path):
            raise InputNotFoundError(f"@{printable(path)}: a folder, not a list of names")
    except (OSError, ValueError) as error:
        raise InputNotFoundError(f"@{printable(path)}: cannot be read: {reason(error)}") from error
    return lambda: os.open(path, os.O_RDONLY)


def names_in_list(open_list: OpenList, null: bool, stop: threading.Event) -> Iterator[str]:
    """Yield the names in a list, as they come, until its end or `stop`.

    Raises
    ------
    UsageError
        The names end with NUL bytes, and `null` is False.
    """
    return entries(_pieces(open_list, stop), b"\0" if null else b"\n")


def _pieces(open_list: OpenList, stop: threading.Event) -> Iterator[bytes]:
    """Yield the content of a file or a pipe, as it comes, until its end or `stop`."""
    with open(open_list(), "rb", buffering=0) as file, selectors.DefaultSelector() as selector:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            with suppress(OSError, ValueError):  # a device that never waits, such as /dev/null
                selector.register(file, selectors.EVENT_READ)
        while not stop.is_set():
            if not selector.get_map() or selector.select(0.2):
                piece = file.read(1 << 16)
                if not piece:
                    return
                yield piece


def entries(pieces: Iterable[bytes], separator: bytes) -> Iterator[str]:
    """Split the `pieces` of a list into names at each `separator`; empty names are dropped."""
    rest, first = b"", True
    for piece in chain(pieces, [separator]):
        if separator == b"\n" and b"\0" in piece:  # which no name can have
            raise UsageError("the names in the list end with a NUL byte: give `null=True`")
        *whole, rest = (rest + piece).split(separator)
        for entry in whole:
            if first:
                entry, first = entry.removeprefix(b"\xef\xbb\xbf"), False
            if separator == b"\n":
                entry = entry.removesuffix(b"\r")
            if entry:
                yield os.fsdecode(entry)
