"""What the user typed becomes names and bytes: streamed, in a stable order.

Within a folder first its files, then its subfolders, depth first, each by the bytes of
its name. No file is `stat`ed while walking.
"""

from __future__ import annotations

import errno
import os
import queue
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from r2ncli.errors import ImageError, InputNotFoundError

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".jp2", ".j2k", ".ico", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"),
)
NAMES_AHEAD = 100_000  # how many names may wait, so that the total is known early

PathLike = str | os.PathLike[str]
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Input:
    """One input: `name` is its identity in every output, `path` what is opened.

    `error` says why it cannot be opened (a folder that cannot be listed), else None.
    """

    name: str
    path: str
    error: str | None = None


def find_images(paths: Sequence[PathLike], warn: Warn) -> Iterator[Input]:
    """Every picture among `paths`, in the order of the results.

    Parameters
    ----------
    paths : sequence of str or path
        Files, which are always tried, and folders, which are searched for `SUFFIXES`.
        None at all means the current folder.
    warn : callable
        Takes a sentence about what is left out and is no input: a link back to an ancestor.

    Raises
    ------
    InputNotFoundError
        One of `paths` does not exist; before anything is yielded.
    """
    arguments = [os.fspath(path) for path in paths] or ["."]
    for argument in arguments:
        if not _may_exist(argument):
            broken = " (a link to nothing)" if os.path.islink(argument) else ""
            name = printable(argument) or "''"
            raise InputNotFoundError(f"no such file or folder: {name}{broken}")
    return _walk_all(arguments, warn)


def _may_exist(path: str) -> bool:
    """Whether something is there, or may be: what may not be looked at is a row that says so."""
    try:
        os.stat(path)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def read_bytes(source: Input, max_bytes: int) -> bytes:
    """The bytes of one input.

    Raises
    ------
    ImageError
        It cannot be read, is no regular file, is empty, or is larger than `max_bytes`.
    """
    if source.error:
        raise ImageError(source.error)
    try:
        with open(source.path, "rb", buffering=0, opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not a regular file")
            if status.st_size > max_bytes:
                raise ImageError(f"{status.st_size:,} bytes, more than --max-bytes {max_bytes:,}")
            content = file.readall()
    except OSError as error:
        raise ImageError(f"cannot be read: {_reason(error)}") from error
    except ValueError as error:  # a NUL in a name
        raise ImageError(f"cannot be read: {error}") from error
    if not content:
        raise ImageError("empty file")
    return content


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting, as for a pipe that is named like a picture, for ever."""
    return os.open(path, flags | os.O_NONBLOCK)


def printable(name: str) -> str:
    r"""`name` as every output has it: bytes that are no UTF-8 as ``\xNN``, reversibly."""
    return bytes_as_hex(name.replace("\\x", "\\x5cx"))


def bytes_as_hex(text: str) -> str:
    r"""`text` with the bytes that are no UTF-8, which Python keeps as surrogates, as ``\xNN``."""
    return re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", text)


class Walk:
    """The inputs among `paths`, walked in a thread of its own while they are used.

    Iterate once. `found` counts what was found so far and is the total once `ended`.
    Leaving the `with` block ends the walk.
    """

    def __init__(self, paths: Sequence[PathLike], warn: Warn) -> None:
        self.found = 0
        self.ended = False
        self._inputs = find_images(paths, warn)
        self._names: queue.Queue[Input | BaseException | None] = queue.Queue(NAMES_AHEAD)
        self._stop = threading.Event()
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
        self._thread.join()

    def __iter__(self) -> Iterator[Input]:
        while (found := self._names.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found

    def _run(self) -> None:
        try:
            for source in self._inputs:
                self.found += 1
                if not self._put(source):
                    return
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


@dataclass(frozen=True)
class _Folder:
    """A folder on the way down: what to open, its identity, and the folder above it."""

    path: str
    name: str
    parent: _Folder | None
    device_and_inode: tuple[int, int] | None

    def is_below_or_at(self, other: tuple[int, int]) -> bool:
        folder: _Folder | None = self
        while folder is not None:
            if folder.device_and_inode == other:
                return True
            folder = folder.parent
        return False


def _walk_all(arguments: Sequence[str], warn: Warn) -> Iterator[Input]:
    for argument in arguments:
        name = argument
        while name.startswith("./"):
            name = name[2:].lstrip("/")
        if os.path.isdir(argument):
            yield from _walk(argument, "" if name == "." else name, warn)
        else:
            yield Input(printable(name), argument)


def _walk(path: str, name: str, warn: Warn) -> Iterator[Input]:
    folders = [_Folder(path, name, None, _device_and_inode(path))]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder.path) as entries:
                listed = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            reason = f"the folder cannot be listed: {_reason(error)}"
            yield Input(printable(folder.name or "."), folder.path, reason)
            continue
        below: list[_Folder] = []
        for entry in listed:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            entry_name = os.path.join(folder.name, entry.name)
            if not _is_folder(entry):
                if _is_tried(entry.name):
                    yield Input(printable(entry_name), entry.path)
                continue
            identity = _device_and_inode(entry.path)
            if identity and folder.is_below_or_at(identity):
                warn(f"{printable(entry_name)}: a link back to a folder above it, not followed")
                continue
            below.append(_Folder(entry.path, entry_name, folder, identity))
        folders.extend(reversed(below))


def _device_and_inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None  # listing it will say why
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link: a broken one, or one to what may be a folder
        broken = error.errno in (errno.ELOOP, errno.ENOTDIR)
        return not broken and not _is_tried(entry.name)


def _is_tried(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _reason(error: OSError) -> str:
    """What the system says, without a path that the user did not type."""
    return (error.strerror or type(error).__name__).lower()
