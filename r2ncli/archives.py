"""Pictures inside archives, read in place: tar (plain or compressed) and zip.

A plain tar and a zip are read member by member from any thread. A compressed tar can only
be read from its beginning to its end: its members' bytes are held until they are used, and
no more than `Budget` allows at a time.
"""

from __future__ import annotations

import lzma
import os
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, Self

from r2ncli.errors import ImageError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
ZIP_SUFFIXES = (".zip",)

Read = Callable[[int], bytes]  # the bytes of one input, of which there may be so many

# what the standard library's readers make of damage
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(OSError, EOFError, ValueError, RuntimeError, NotImplementedError),
)


class Budget:
    """How many bytes may be held at a time by inputs that are not used yet.

    Attributes
    ----------
    stop : threading.Event
        Once set, nobody waits any longer.
    """

    def __init__(self, limit: float, stop: threading.Event) -> None:
        self.stop = stop
        self._limit = limit
        self._held = 0
        self._freed = threading.Condition()

    def take(self, count: int) -> None:
        """Wait until `count` bytes may be held; one input always may, however large."""
        with self._freed:
            while self._held and self._held + count > self._limit and not self.stop.is_set():
                self._freed.wait(0.1)
            self._held += count

    def free(self, count: int) -> None:
        """Give back what was taken."""
        with self._freed:
            self._held -= count
            self._freed.notify()


class _StrictTarInfo(tarfile.TarInfo):
    """A header of a tar, where a damaged or missing one is an error and no end.

    Python's reader ends quietly at either, and whatever follows would be lost.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise  # two blocks of zeros: the end as it should be
            cut = str(error) in ("empty header", "truncated header")
            raise tarfile.ReadError("it is cut off" if cut else "a damaged header") from error


class _Held:
    """The bytes of a member that cannot be read again; they count until nobody needs them."""

    def __init__(self, content: bytes, budget: Budget) -> None:
        self._content = content
        self._budget = budget
        budget.take(len(content))

    def read(self, max_bytes: int) -> bytes:
        if len(self._content) > max_bytes:
            raise too_large(max_bytes)
        return self._content

    def __del__(self) -> None:
        self._budget.free(len(self._content))


def is_archive(name: str) -> bool:
    """Whether a name ends as an archive's does."""
    return name.lower().endswith((*TAR_SUFFIXES, *ZIP_SUFFIXES))


def members(
    path: str, wanted: Callable[[str], bool], max_bytes: int, budget: Budget
) -> Iterator[tuple[str, Read]]:
    """Name of every wanted member of the archive at `path`, as stored, and what reads it.

    Parameters
    ----------
    path : str
        A local file whose name ends as one of an archive.
    wanted : callable
        Whether a member of this name is.
    max_bytes : int
        A member of a compressed tar that is larger is not held.
    budget : Budget
        Bounds what is held of a compressed tar.

    Raises
    ------
    ImageError
        The file is no archive, or cannot be read on.
    """
    if path.lower().endswith(ZIP_SUFFIXES):
        yield from zip_members(path, wanted)
        return
    try:
        with open(path, "rb") as file:
            head = file.read(6)
            file.seek(0)
            if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")):
                yield from tar_stream_members(file, wanted, max_bytes, budget)
            else:
                yield from _tar_members(path, file, wanted)
    except OSError as error:
        raise ImageError(f"cannot be read: {_words(error)}") from error


def too_large(max_bytes: int, size: int | None = None) -> ImageError:
    """The error of an input of more than `max_bytes`."""
    found = f"{size:,} bytes, more" if size is not None else "more bytes"
    return ImageError(f"{found} than --max-bytes {max_bytes:,}")


# --- tar ------------------------------------------------------------------------------


def tar_stream_members(
    stream: IO[bytes], wanted: Callable[[str], bool], max_bytes: int, budget: Budget
) -> Iterator[tuple[str, Read]]:
    """Members of a tar, compressed or not, that can only be read onwards (see `members`)."""
    for archive, member in _entries(stream, "r|*", wanted):
        refused = _refused(member)
        if refused:
            yield _plain_name(member.name), refused
        elif member.size > max_bytes:
            yield _plain_name(member.name), partial(_fail, str(too_large(max_bytes, member.size)))
        else:
            content = archive.extractfile(member)
            assert content is not None  # it is a regular file
            yield _plain_name(member.name), _Held(content.read(), budget).read


def _tar_members(
    path: str, file: IO[bytes], wanted: Callable[[str], bool]
) -> Iterator[tuple[str, Read]]:
    status = os.fstat(file.fileno())
    for _, member in _entries(file, "r:", wanted):
        read = _refused(member) or partial(
            _read_range, path, _identity(status), member.offset_data, member.size
        )
        yield _plain_name(member.name), read


def _entries(
    file: IO[bytes], mode: str, wanted: Callable[[str], bool]
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Every wanted file and link of a tar, and the archive to read it from."""
    count = 0
    try:
        with tarfile.open(fileobj=file, mode=mode, tarinfo=_StrictTarInfo) as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                count += 1
                archive.members.clear()  # which would grow with the archive
                if not member.isdir() and wanted(_plain_name(member.name)):
                    yield archive, member
    except _DAMAGE as error:
        if not count:
            raise ImageError("not a tar archive, or its beginning is damaged") from error
        after = f"after {count:,} member{'s' if count > 1 else ''}"
        raise ImageError(f"cannot be read on {after}: {_words(error)}") from error


def _refused(member: tarfile.TarInfo) -> Read | None:
    """What says why a member has no bytes of its own; None where it has."""
    if member.islnk() or member.issym():
        return partial(_fail, f"a link inside the archive, to {member.linkname}: not followed")
    if not member.isreg() or member.issparse():
        return partial(_fail, "not a regular file")
    return None


def _fail(reason: str, _max_bytes: int) -> bytes:
    raise ImageError(reason)


def _read_range(
    path: str, identity: tuple[int, ...], offset: int, size: int, max_bytes: int
) -> bytes:
    """Bytes of a plain tar, opened anew: no file stays open however many names wait."""
    if size > max_bytes:
        raise too_large(max_bytes, size)
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if _identity(status) != identity:
                raise ImageError("the archive changed while it was read")
            if offset + size > status.st_size:  # before so much memory is asked for
                raise ImageError("the archive ends before this member does")
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise ImageError(f"cannot be read: {_words(error)}") from error
    if len(content) < size:
        raise ImageError("the archive ends before this member does")
    return content


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _plain_name(name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


# --- zip ------------------------------------------------------------------------------


def zip_members(file: str | IO[bytes], wanted: Callable[[str], bool]) -> Iterator[tuple[str, Read]]:
    """Members of a zip (see `members`); `file` is a path, or can be read at any place."""
    try:
        archive = zipfile.ZipFile(file)
    except _DAMAGE as error:
        missing = isinstance(error, OSError) and error.strerror
        reason = f"cannot be read: {_words(error)}" if missing else "not a zip archive, or cut off"
        raise ImageError(reason) from error
    lock = threading.Lock()
    for member in archive.infolist():
        name = _plain_name(member.filename)
        if not member.is_dir() and wanted(name):
            yield name, partial(_read_zip_member, archive, lock, member)


def _read_zip_member(
    archive: zipfile.ZipFile, lock: threading.Lock, member: zipfile.ZipInfo, max_bytes: int
) -> bytes:
    try:
        with lock:  # the archive counts its open members
            file = archive.open(member)
        try:
            content = file.read(max_bytes + 1)  # counted: its header may lie
            if len(content) <= max_bytes:
                content += file.read()  # nothing, and the checksum is looked at
        finally:
            with lock:
                file.close()
    except _DAMAGE as error:
        raise ImageError(f"cannot be read from the archive: {_zip_words(error)}") from error
    if len(content) > max_bytes:
        raise too_large(max_bytes)
    return content


def _zip_words(error: Exception) -> str:
    text = _words(error)
    if "encrypted" in text:
        return "it is encrypted"
    return "its checksum does not fit" if text.startswith("bad crc") else text


def _words(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.lower() or type(error).__name__
