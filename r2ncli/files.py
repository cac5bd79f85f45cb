"""Open, write and lock files: what every part of the package that touches a disk shares."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from filelock import BaseFileLock

PathLike = str | os.PathLike[str]


def open_regular(path: PathLike, buffering: int = -1) -> tuple[BinaryIO, os.stat_result]:
    """Open a regular file for reading and return it with its status; never wait for a pipe.

    Raises
    ------
    OSError
        The file cannot be opened, or it is a folder, a pipe or a device.
    ValueError
        There is a NUL character in the path.
    """
    flags = getattr(os, "O_NONBLOCK", 0)  # Windows has no such flag
    file: BinaryIO = open(  # noqa: SIM115
        path, "rb", buffering, opener=lambda path, mode: os.open(path, mode | flags)
    )
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
    except BaseException:
        file.close()
        raise
    return file, status


def write_whole(
    path: Path, parts: Iterable[bytes | memoryview], temporary: Path | None = None
) -> None:
    """Write a file so that it exists completely or not at all, even after a power cut.

    Until it is complete its name is `temporary`, which needs to be unique where several
    processes may write `path` at the same time; the default is `path` followed by ``.tmp``.

    Raises
    ------
    OSError
        The file cannot be written; nothing is left under the temporary name.
    """
    temporary = temporary or path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
        publish(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Give a complete file its final name, durably: the content first, then the name."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(path: Path, *, wait: bool = False) -> BaseFileLock | None:
    """Lock the file `path`; where another process holds the lock, wait for it or return None.

    The operating system releases the lock when the process ends, even if it is killed.
    The file and its folder are created if they do not exist.

    Raises
    ------
    OSError
        The lock file cannot be created, or its file system has no locks.
    """
    from filelock import FileLock, Timeout  # only runs that write need it

    while True:
        path.parent.mkdir(exist_ok=True)
        # a SoftFileLock as a fallback would stay behind where the process is killed
        lock = FileLock(path, timeout=-1 if wait else 0, thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire()
            return lock
        except (Timeout, FileNotFoundError) as error:
            if isinstance(error, Timeout) and path.exists():
                return None
        # the process that held the lock has just removed it, perhaps with its folder: try again


def remove_lock(lock: BaseFileLock) -> None:
    """Remove the file of a lock that is held, and release the lock."""
    path = Path(lock.lock_file)
    with suppress(OSError):
        path.unlink(missing_ok=True)  # while it is held: afterwards it may be another process's
    lock.release()
    if os.name == "nt":  # Windows cannot remove a file that a process has open
        with suppress(OSError):
            path.unlink(missing_ok=True)


def reason(error: BaseException) -> str:
    """Return what failed, in lower case on one line, without a path that the user did not type."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return " ".join(text.lower().split()) or type(error).__name__.lower()
