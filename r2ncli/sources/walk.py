"""What the user typed becomes names and bytes: streamed, in a stable order.

Within a folder first its files, then its subfolders, depth first, each by the bytes of
its name. No file is `stat`ed while walking.

An argument that exists is itself. Of the others ``-`` is standard input and ``@file`` a
list, one name a line; then come addresses, and patterns with ``*``, ``?`` or ``[…]``.
"""

from __future__ import annotations

import errno
import os
import queue
import re
import select
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from types import TracebackType

from r2ncli.errors import ImageError, InputNotFoundError, UsageError
from r2ncli.sources.archives import (
    TAR_SUFFIXES,
    Budget,
    Read,
    fail,
    is_archive,
    members,
    open_at_once,
    tar_stream_members,
    too_large,
    zip_members,
)
from r2ncli.sources.patterns import device_and_inode, has_pattern, matching_paths
from r2ncli.sources.remote import (
    is_remote_folder,
    is_url,
    is_web,
    list_folder,
    match_remote,
    open_url,
    read_url,
    without_secrets,
)
from r2ncli.sources.selection import SUFFIXES, Selection, in_shard, is_tried, is_visible

NAMES_AHEAD = 100_000  # how many names may wait, so that the total is known early
BYTES_AHEAD = 64_000_000  # of pictures out of compressed archives that may wait

PathLike = str | os.PathLike[str]
Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Input:
    """One input: `name` is its identity in every output, `read` gives its bytes.

    `read(max_bytes)` raises an ImageError where there are none, or too many. One that is
    `remote` waits for a network.
    """

    name: str
    read: Read
    remote: bool = False


def find_images(
    paths: Sequence[PathLike],
    warn: Warn,
    selection: Selection = Selection(),  # noqa: B008  frozen
    stop: threading.Event | None = None,
) -> Iterator[Input]:
    """Every picture among `paths`, in the order of the results.

    Parameters
    ----------
    paths : sequence of str or path
        Pictures, which are always tried; folders, which are searched for `SUFFIXES`;
        archives; patterns; ``@list``; ``-``; addresses. None at all means the current
        folder.
    warn : callable
        Takes a sentence about what is left out and is no input: a link back to an ancestor.
    selection : Selection
        Which of them are taken. (A shard is the `Walk`'s business.)
    stop : threading.Event, optional
        Ends a wait for standard input, or for room. With one, no more than `BYTES_AHEAD` of
        compressed archives are held at a time.

    Raises
    ------
    InputNotFoundError
        One of `paths` does not exist; before anything is yielded.
    UsageError
        Nothing that is installed opens such addresses; before anything is yielded.
    """
    arguments = [os.fspath(path) for path in paths] or ["."]
    budget = Budget(BYTES_AHEAD if stop else float("inf"), stop or threading.Event())
    search = _Search(warn, selection, budget)
    # each begins here, so that what is missing is said before anything runs
    begun = [search.of_argument(argument) for argument in arguments]
    return islice(chain.from_iterable(begun), selection.max)


def as_sequence(paths: Sequence[PathLike] | PathLike) -> Sequence[PathLike]:
    """`paths` as a sequence: one path is a sequence of one."""
    return [paths] if isinstance(paths, str | os.PathLike) else paths


def file_input(path: str, name: str | None = None) -> Input:
    """A local file as an input."""
    return Input(printable(path) if name is None else name, partial(read_file, path))


def read_file(path: str, max_bytes: int) -> bytes:
    """The bytes of a local file.

    Raises
    ------
    ImageError
        It cannot be read, is no regular file, is empty, or is larger than `max_bytes`.
    """
    try:
        with open(path, "rb", buffering=0, opener=open_at_once) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise ImageError("not a regular file")
            if before.st_size > max_bytes:
                raise too_large(max_bytes, before.st_size)
            content = file.read(before.st_size + 1)  # it may grow meanwhile
            while content and len(content) <= max_bytes and (more := file.read(1 << 16)):
                content += more
            after = os.fstat(file.fileno())
    except OSError as error:
        raise ImageError(f"cannot be read: {_reason(error)}") from error
    except ValueError as error:  # a NUL in a name
        raise ImageError(f"cannot be read: {error}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ImageError("changed while it was read")
    if len(content) > max_bytes:
        raise too_large(max_bytes)
    if not content:
        raise ImageError("empty file")
    return content


def printable(name: str) -> str:
    r"""`name` as every output has it: bytes that are no UTF-8 as ``\xNN``, reversibly."""
    return bytes_as_hex(name.replace("\\x", "\\x5cx"))


def bytes_as_hex(text: str) -> str:
    r"""`text` with the bytes that are no UTF-8, which Python keeps as surrogates, as ``\xNN``."""
    return re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", text)


def no_image_found() -> InputNotFoundError:
    """The error of a walk without inputs."""
    suffixes = " ".join(sorted(suffix[1:] for suffix in SUFFIXES))
    return InputNotFoundError(f"no image found (looked for files ending in {suffixes})")


class Walk:
    """The inputs among `paths`, found in a thread of its own while they are used.

    Iterate once. `found` counts what was found so far and is the total once `ended`; inputs
    of other shards are not in it, but make `any_found` true. Leaving the `with` block ends
    the walk.
    """

    def __init__(
        self,
        paths: Sequence[PathLike],
        warn: Warn,
        selection: Selection = Selection(),  # noqa: B008  frozen
    ) -> None:
        self.found = 0
        self.any_found = False
        self.ended = False
        self._shard = selection.shard
        self._stop = threading.Event()
        self._inputs = find_images(paths, warn, selection, self._stop)
        self._names: queue.Queue[Input | BaseException | None] = queue.Queue(NAMES_AHEAD)
        self._thread = threading.Thread(target=self._run, name="r2n-walk", daemon=True)

    def __enter__(self) -> Walk:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(1.0)  # a dead network drive may hold it longer: nobody waits for that

    def __iter__(self) -> Iterator[Input]:
        while (found := self._names.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
            del found  # what it holds is free as soon as it was used

    def _run(self) -> None:
        try:
            for source in self._inputs:
                self.any_found = True
                if self._shard is None or in_shard(source.name, self._shard):
                    self.found += 1
                    if not self._put(source):
                        return
                del source  # what it holds is free as soon as it was used
            self.ended = True
            self._put(None)
        except BaseException as error:  # raised where the inputs are used
            self._put(error)

    def _put(self, found: Input | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._names.put(found, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


# --- arguments and entries of lists ---------------------------------------------------------


class _Search:
    """How an argument, or an entry of a list, becomes inputs."""

    def __init__(self, warn: Warn, selection: Selection, budget: Budget) -> None:
        self.warn = warn
        self.selection = selection
        self.budget = budget

    def of_argument(self, argument: str) -> Iterator[Input]:
        """The inputs of an argument, which is looked at now and read later.

        Raises
        ------
        InputNotFoundError
            Nothing is there.
        """
        if argument == "-":
            return self._of_list(_standard_input())
        if _may_exist(argument):
            return self._of_path(argument)
        if argument.startswith("@"):
            return self._of_list(_checked_list(argument[1:]))
        if is_url(argument):
            return self._of_address(argument)
        matches = matching_paths(argument) if has_pattern(argument) else iter(())
        first = next(matches, None)
        if first is not None:
            return chain.from_iterable(map(self._of_path, chain([first], matches)))
        name = printable(argument) or "''"
        broken = " (a link to nothing)" if os.path.islink(argument) else ""
        nothing = ", and nothing matches it" if has_pattern(argument) else broken
        raise InputNotFoundError(f"no such file or folder: {name}{nothing}")

    def _of_list(self, open_list: Callable[[], int]) -> Iterator[Input]:
        descriptor = open_list()
        try:
            pieces = _pieces(descriptor, self.budget.stop)
            for entry in _entries(pieces, b"\0" if self.selection.null else b"\n"):
                yield from self._of_entry(entry)
        finally:
            os.close(descriptor)

    def _of_entry(self, entry: str) -> Iterator[Input]:
        """The inputs of a list's entry: a path or an address; a missing one is a row."""
        if not is_url(entry):
            # what is named like a picture is taken for one: a million are not looked at twice
            return self._file(entry) if is_tried(entry) else self._of_path(entry)
        return self._of_remote_entry(entry)

    def _of_path(self, path: str) -> Iterator[Input]:
        if os.path.isdir(path):
            name = _name_of(path)
            return self._walk(path, "" if name == "." else name)
        if is_archive(path) and os.path.exists(path):
            return self._archive(path)
        return self._file(path)

    def _file(self, path: str) -> Iterator[Input]:
        name = printable(_name_of(path))
        if self.selection.takes(name):
            yield file_input(path, name)

    def _of_address(self, address: str) -> Iterator[Input]:
        if is_web(address):
            return self._remote_file(address)
        try:
            folder = is_remote_folder(address)
        except InputNotFoundError:
            if has_pattern(address):
                return self._remote_matches(address)
            raise
        return self._remote_walk(address) if folder else self._remote_file(address)

    def _of_remote_entry(self, address: str) -> Iterator[Input]:
        """The inputs of an address in a list, or one that a pattern matches."""
        name = without_secrets(address)
        if is_web(address) or is_tried(name) or is_archive(name):  # not looked at, as above
            return self._remote_file(address)
        try:
            return self._of_address(address)
        except (InputNotFoundError, UsageError) as error:
            return iter([_failed(printable(name), str(error))])

    # --- folders -----------------------------------------------------------------------

    def _walk(self, path: str, name: str) -> Iterator[Input]:
        folders = [_Folder(path, name, None, device_and_inode(path))]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder.path) as entries:
                    listed = sorted(entries, key=lambda entry: os.fsencode(entry.name))
            except OSError as error:
                reason = f"the folder cannot be listed: {_reason(error)}"
                yield _failed(printable(folder.name or "."), reason)
                continue
            below: list[_Folder] = []
            for entry in listed:
                if not is_visible(entry.name):
                    continue
                entry_name = os.path.join(folder.name, entry.name)
                if not _is_folder(entry):
                    if is_tried(entry.name) and self.selection.takes(name := printable(entry_name)):
                        yield file_input(entry.path, name)
                    continue
                if self.selection.exclude and self.selection.leaves_out(printable(entry_name)):
                    continue
                identity = device_and_inode(entry.path)
                if identity and folder.is_below_or_at(identity):
                    link = printable(entry_name)
                    self.warn(f"{link}: a link back to a folder above it, not followed")
                    continue
                below.append(_Folder(entry.path, entry_name, folder, identity))
            folders.extend(reversed(below))

    # --- archives ------------------------------------------------------------------------

    def _archive(self, path: str) -> Iterator[Input]:
        name = printable(_name_of(path))
        found = members(path, self._wanted(name), self.selection.max_bytes, self.budget)
        return self._members(name, found)

    def _wanted(self, archive: str) -> Callable[[str], bool]:
        def wanted(member: str) -> bool:
            visible = all(part in (".", "..") or is_visible(part) for part in member.split("/"))
            return (
                visible
                and is_tried(member)
                and self.selection.takes(f"{archive}!{printable(member)}")
            )

        return wanted

    def _members(
        self, archive: str, found: Iterator[tuple[str, Read]], remote: bool = False
    ) -> Iterator[Input]:
        try:
            for member, read in found:
                yield Input(f"{archive}!{printable(member)}", read, remote)
                del read  # what it holds is free as soon as it was used
        except ImageError as error:
            yield _failed(archive, str(error))

    # --- addresses -----------------------------------------------------------------------

    def _remote_file(self, address: str) -> Iterator[Input]:
        name = printable(without_secrets(address))
        if is_archive(name):
            yield from self._remote_archive(address, name)
        elif self.selection.takes(name):
            yield Input(name, partial(read_url, address, self.selection.timeout), remote=True)

    def _remote_matches(self, pattern: str) -> Iterator[Input]:
        matches = match_remote(pattern)
        first = next(matches, None)
        if first is None:
            name = without_secrets(pattern)
            raise InputNotFoundError(f"no such file or folder, and nothing matches: {name}")
        return chain.from_iterable(map(self._of_remote_entry, chain([first], matches)))

    def _remote_walk(self, address: str) -> Iterator[Input]:
        folders = [address]
        while folders:
            folder = folders.pop()
            try:
                files, below = list_folder(folder)
            except Exception as error:  # whatever a file system of fsspec raises
                reason = str(error) or type(error).__name__
                name = printable(without_secrets(folder))
                yield _failed(name, f"the folder cannot be listed: {reason}")
                continue
            for file in sorted(files, key=os.fsencode):
                if is_visible(file.rpartition("/")[2]) and is_tried(file):
                    yield from self._remote_file(file)
            folders += (
                found
                for found in sorted(below, key=os.fsencode, reverse=True)
                if is_visible(found.rpartition("/")[2])
                and not self.selection.leaves_out(without_secrets(found))
            )

    def _remote_archive(self, address: str, name: str) -> Iterator[Input]:
        is_tar = name.lower().endswith(TAR_SUFFIXES)
        if is_web(address) and not is_tar:
            yield _failed(name, "a zip archive cannot be read over http(s): download it first")
            return
        open_again = partial(open_url, address, self.selection.timeout)
        try:
            with open_again() as stream:
                if is_tar:
                    limit = self.selection.max_bytes
                    found = tar_stream_members(stream, self._wanted(name), limit, self.budget)
                else:
                    found = zip_members(stream, open_again, self._wanted(name))
                yield from self._members(name, found, remote=not is_tar)
        except ImageError as error:
            yield _failed(name, str(error))


def _failed(name: str, reason: str) -> Input:
    return Input(name, partial(fail, reason))


def _may_exist(path: str) -> bool:
    """Whether something is there, or may be: what may not be looked at is a row that says so."""
    try:
        os.stat(path)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _name_of(path: str) -> str:
    """A path's identity: as typed, without a leading ``./``."""
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    return path


# --- lists ----------------------------------------------------------------------------------


def _standard_input() -> Callable[[], int]:
    try:
        descriptor = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError) as error:
        raise InputNotFoundError("-: standard input is closed") from error
    return lambda: os.dup(descriptor)


def _checked_list(path: str) -> Callable[[], int]:
    """What opens a list of names, after a look at whether it can be."""
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            os.close(os.open(path, os.O_RDONLY))
        elif os.path.isdir(path):
            raise InputNotFoundError(f"@{printable(path)}: a folder, not a list of names")
    except (OSError, ValueError) as error:
        reason = _reason(error) if isinstance(error, OSError) else str(error)
        raise InputNotFoundError(f"@{printable(path)}: cannot be read: {reason}") from error
    return lambda: os.open(path, os.O_RDONLY)


def _pieces(descriptor: int, stop: threading.Event) -> Iterator[bytes]:
    """What comes out of a file or a pipe, until its end or `stop`."""
    while not stop.is_set():
        if select.select([descriptor], [], [], 0.2)[0]:
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                return
            yield piece


def _entries(pieces: Iterable[bytes], separator: bytes) -> Iterator[str]:
    """Names out of a list, one after each `separator`; empty ones are none."""
    rest, first = b"", True
    for piece in chain(pieces, [separator]):
        if separator == b"\n" and b"\0" in piece:  # which no name can have
            raise UsageError("names in a list end with a NUL byte: give -0")
        *whole, rest = (rest + piece).split(separator)
        for entry in whole:
            if first:
                entry, first = entry.removeprefix(b"\xef\xbb\xbf"), False
            if separator == b"\n":
                entry = entry.removesuffix(b"\r")
            if entry:
                yield os.fsdecode(entry)


# --- folders --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    """A folder on the way down: what to open, its identity, and the folder above it."""

    path: str
    name: str
    parent: _Folder | None
    identity: tuple[int, int] | None

    def is_below_or_at(self, other: tuple[int, int]) -> bool:
        folder: _Folder | None = self
        while folder is not None:
            if folder.identity == other:
                return True
            folder = folder.parent
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link: a broken one, or one to what may be a folder
        broken = error.errno in (errno.ELOOP, errno.ENOTDIR)
        return not broken and not is_tried(entry.name)


def _reason(error: OSError) -> str:
    """What the system says, without a path that the user did not type."""
    return (error.strerror or type(error).__name__).lower()
