"""Open, write and lock files: what every part of the package that touches a disk shares."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from filelock import BaseFileLock

PathLike = str | os.PathLike[str]

# what a file system answers that cannot synchronise, or cannot lock
UNSUPPORTED = {
    *(errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK),
    *(errno.ENOTTY, errno.EPROTONOSUPPORT),
}


def open_regular(path: PathLike, buffering: int = -1) -> tuple[BinaryIO, os.stat_result]:
    """Open a regular file for reading and return it with its status; never wait for a pipe.

    Raises
    ------
    OSError
        The file cannot be opened, or it is a folder, a pipe or a device.
    ValueError
        There is a NUL character in the path.
    """
    file: BinaryIO = open(path, "rb", buffering, opener=_open_at_once)  # noqa: SIM115
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
    except BaseException:
        file.close()
        raise
    return file, status


def _open_at_once(path: str, mode: int) -> int:
    try:
        return os.open(path, mode | getattr(os, "O_NONBLOCK", 0))  # Windows has no such flag
    except BlockingIOError:  # a file server holds a lease on it, and gives it up when asked
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise
        return os.open(path, mode)


def locked_elsewhere(file: BinaryIO) -> bool:
    """Return whether another program holds a file that is open here, for writing."""
    try:
        import fcntl  # Windows has none

        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until the file is closed
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # a file system without locks
        pass
    return False


def create(path: PathLike) -> BinaryIO:
    """Create a file under a name that only this process uses, and open it for writing.

    What a killed process left under that name is removed. A link is never followed.

    Raises
    ------
    OSError
        The file cannot be created, or a folder has that name.
    """
    with suppress(FileNotFoundError):
        os.unlink(path)
    return open(path, "x+b")


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
        with create(temporary) as file:
            file.writelines(parts)
        publish(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Give a complete file its final name, durably: the content first, then the name."""
    sync(temporary)
    replace(temporary, path)
    sync(path.parent)


def replace(temporary: Path, path: Path) -> None:
    """Rename a file to `path`, also where the file system cannot replace a file that exists.

    There the old file is renamed first, to the name of `temporary` followed by ``.old``; if the
    process is killed before the end, that file is left.
    """
    try:
        os.replace(temporary, path)
    except (FileExistsError, PermissionError):
        if not path.is_file():
            raise
        old = temporary.with_name(temporary.name + ".old")
        with suppress(FileNotFoundError):
            old.unlink()
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(old, path)
            raise
        with suppress(OSError):
            old.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Some network file systems cannot do this for a folder, or at all; that is no error.
    """
    windows = os.name == "nt"
    if path.is_dir():
        if windows:
            return  # Windows cannot open folders
        with suppress(PermissionError):  # a folder may be writable and not readable
            _sync(path, os.O_RDONLY)
    else:
        _sync(path, os.O_RDWR if windows else os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def belongs_to_us(folder: Path, status: os.stat_result) -> bool:
    """Return whether a folder has the owner that a file made by this process gets beside it.

    On network file systems that may be another user than the one of the process.
    """
    if os.name == "nt" or status.st_uid == os.geteuid():
        return True
    try:
        with tempfile.TemporaryFile(dir=folder.parent) as made:
            return os.fstat(made.fileno()).st_uid == status.st_uid
    except OSError:
        return False


def free_bytes(folder: Path) -> int | None:
    """Return how many bytes are free; None where the file system says nothing, or zero.

    Some network file systems say zero and take every write; a disk that is full says so itself.
    """
    try:
        return shutil.disk_usage(folder).free or None
    except OSError:
        return None


def take_lock(path: Path, *, wait: bool = False) -> BaseFileLock | None:
    """Lock the file `path`; where another process holds the lock, wait for it or return None.

    The operating system releases the lock when the process ends, even if it is killed.
    The file, and its folder for this user alone, are created if they do not exist. Where the
    file system has no locks, the result is a lock whose `is_locked` is False.

    Raises
    ------
    OSError
        The lock file cannot be created.
    """
    from filelock import FileLock, Timeout  # only runs that write need it

    while True:
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
        except FileExistsError:
            if path.parent.is_symlink() or (path.parent.exists() and not path.parent.is_dir()):
                raise
            continue  # the folder existed, and was removed before it was looked at
        # a SoftFileLock as a fallback would stay behind where the process is killed
        lock = FileLock(path, timeout=-1 if wait else 0, thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire()
            return lock
        except (Timeout, FileNotFoundError) as error:
            if isinstance(error, Timeout) and path.exists():
                return None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
                raise
            return lock
        # the process that held the lock has just removed it, perhaps with its folder: try again


def remove_lock(lock: BaseFileLock) -> None:
    """Remove the file of a lock that is held, and release the lock."""
    path = Path(lock.lock_file)
    removed = False
    with suppress(OSError):
        path.unlink(missing_ok=True)  # while it is held: afterwards it may be another process's
        removed = True
    release(lock)
    if not removed:  # Windows, and some of its file servers, remove no file that is open
        with suppress(OSError):
            path.unlink(missing_ok=True)


def release(lock: BaseFileLock) -> None:
    """Release a lock; its file stays. Where that fails, the lock ends with the process."""
    with suppress(OSError):
        lock.release()


def reason(error: BaseException) -> str:
    """Return what failed, in lower case on one line, without a path that the user did not type."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return " ".join(text.lower().split()) or type(error).__name__.lower()
