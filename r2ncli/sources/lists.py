"""Lists of names: standard input, and the file of an ``@file`` argument."""

from __future__ import annotations

import codecs
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

LONGEST_NAME = 1 << 16  # bytes of a name in a list; longer than a path can be
_MARKS = {  # the longer ones first: one of UTF-16 is the beginning of one of UTF-32
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}

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
    if path.startswith("~") and not os.path.lexists(path):
        path = os.path.expanduser(path)
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
    """Split the `pieces` of a list, in UTF-8 or with a mark of UTF-16, at each `separator`.

    Empty lines are dropped; an empty name between NUL bytes is a name. Of a name that is longer
    than any can be, the beginning is given.
    """
    rest = b""
    is_line = separator == b"\n"
    for piece in chain(_in_utf8(pieces), [separator]):
        if is_line and b"\0" in piece:  # which no name can have
            raise UsageError("the names in the list end with a NUL byte: give `null=True`")
        *whole, rest = (rest + piece).split(separator)
        rest = rest[:LONGEST_NAME]
        at_end = piece is separator
        for number, entry in enumerate(whole):
            entry = entry[:LONGEST_NAME]
            if is_line:
                entry = entry.removesuffix(b"\r")
            if entry or not (is_line or (at_end and number == len(whole) - 1)):
                yield os.fsdecode(entry)


def _in_utf8(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the content of a list without its byte order mark, recoded if that is of UTF-16."""
    head = b""
    pieces = iter(pieces)
    for piece in pieces:
        head += piece
        if len(head) >= len(codecs.BOM_UTF32_LE):
            break
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            decoder = codecs.getincrementaldecoder(name)("replace")
            for piece in chain([head[len(mark) :]], pieces):
                yield decoder.decode(piece).encode()
            yield decoder.decode(b"", True).encode()
            return
    yield head.removeprefix(codecs.BOM_UTF8)
    yield from pieces
