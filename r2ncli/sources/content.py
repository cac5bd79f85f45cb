"""Represent and read one input: its name, its bytes, and the size and time of its file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, NoReturn

from r2ncli.errors import ImageError
from r2ncli.files import open_regular, reason
from r2ncli.sources.names import printable


class Stamp(NamedTuple):
    """Size in bytes and modification time in nanoseconds of a local file."""

    size: int
    mtime_ns: int


class Content(NamedTuple):
    """The bytes of an input; `stamp` is None if they came from no local file."""

    content: bytes
    stamp: Stamp | None


Read = Callable[[int], Content]  # reads an input of at most that many bytes
ReadBytes = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Input:
    """One input; `read` raises an `ImageError` if it cannot be read or is too large."""

    name: str  # its identity in every output
    read: Read = field(repr=False)  # it may hold a URL with a password
    remote: bool = False  # whether reading it waits for a network
    path: str | None = None  # the local file that it comes from: itself, or its archive
    alone: bool = False  # whether the next input may not be found before this one is read


def file_input(path: str, name: str | None = None) -> Input:
    """Return a local file as an input."""
    return Input(printable(path) if name is None else name, partial(read_file, path), path=path)


def stamp_of(path: str) -> Stamp | None:
    """Return the size and time of a file, by one `stat`; None if that fails."""
    try:
        return stamp_in(os.stat(path))
    except (OSError, ValueError):
        return None


def stamp_in(status: os.stat_result) -> Stamp:
    """Return the stamp in the result of a `stat`."""
    return Stamp(status.st_size, status.st_mtime_ns)


def read_file(path: str, max_bytes: int) -> Content:
    """Read a local file.

    Raises
    ------
    ImageError
        It cannot be read, is not a regular file, is empty, is larger than `max_bytes`, or
        changed while it was read.
    """
    try:
        file, status = open_regular(path, buffering=0)
        before = stamp_in(status)
        with file:
            if before.size > max_bytes:
                raise too_large(max_bytes, before.size)
            content = file.read(before.size + 1)  # it may grow meanwhile
            while content and len(content) <= max_bytes and (more := file.read(1 << 16)):
                content += more
            after = stamp_in(os.fstat(file.fileno()))
    except (OSError, ValueError) as error:  # a NUL in a name is a ValueError
        raise ImageError(f"cannot be read: {reason(error)}") from error
    if before != after:
        raise ImageError("changed while it was read")
    if len(content) > max_bytes:
        raise too_large(max_bytes)
    if not content:
        raise ImageError("empty file")
    return Content(content, after)


def with_stamp(
    found: Iterable[tuple[str, ReadBytes]], stamp: Stamp | None
) -> Iterator[tuple[str, Read]]:
    """Give each of these names and readers the `stamp` of the archive they are in."""
    for name, read in found:
        yield name, partial(stamped, read, stamp)
        del read  # frees what it holds as soon as it was used


def stamped(read: ReadBytes, stamp: Stamp | None, max_bytes: int) -> Content:
    """Read bytes whose `stamp` is known."""
    return Content(read(max_bytes), stamp)


def too_large(max_bytes: int, size: int | None = None) -> ImageError:
    """Return the error of an input of more than `max_bytes`."""
    found = "" if size is None else f"{size:,} bytes, "
    return ImageError(f"{found}larger than the limit of {max_bytes:,} bytes")


def fail(why: str, _max_bytes: int) -> NoReturn:
    """Stand in for the reader of an input that cannot be read."""
    raise ImageError(why)
