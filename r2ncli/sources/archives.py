"""Read images inside archives, in place: tar (plain or compressed) and zip.

Members of a plain tar and of a zip are read by opening the archive again, from any thread,
so that files do not stay open while names wait. A compressed tar can only be read from
its beginning to its end: the bytes of its members are held until they are used, at most as
many as `Budget` allows at a time.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.client import IncompleteRead
from operator import attrgetter
from typing import IO, Any, cast

from r2ncli.errors import ImageError
from r2ncli.files import open_regular, reason
from r2ncli.sources.content import Read, ReadBytes, fail, stamp_in, too_large, with_stamp
from r2ncli.sources.names import without_dot_slash
from r2ncli.sources.tar import TarError, TarFile, tar_headers
from r2ncli.web import WebError
from r2ncli.web.unpack import Unpacked, unpacker_of

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
ZIP_SUFFIXES = (".zip",)
ZIP_HEADER_BYTES = 30  # of a member, before its name
PIECE_BYTES = 1 << 16
# What a compressed tar may hold besides the images that are read, which `max_bytes` bounds one by
# one: this many bytes for each byte of the file, and `SKIPPED_BYTES` more. Text shrinks to a
# twentieth, headers to a hundredth; a bomb to a thousandth and less.
SKIPPED_RATIO = 200
SKIPPED_BYTES = 1 << 28

_identity = attrgetter("st_dev", "st_ino", "st_size", "st_mtime_ns")  # changes with the content

OpenAgain = Callable[[], AbstractContextManager[IO[bytes]]]


class Budget:
    """Limits the bytes that are held by inputs that wait to be used; `stop` ends each wait."""

    def __init__(self, limit: float, stop: threading.Event) -> None:
        self.stop = stop
        self._limit = limit
        self._held = 0
        self._freed = threading.Condition()

    def take(self, count: int) -> None:
        """Wait until `count` bytes may be held; a single input may always be held."""
        with self._freed:
            while self._held and self._held + count > self._limit and not self.stop.is_set():
                self._freed.wait(0.1)
            self._held += count

    def free(self, count: int) -> None:
        """Return bytes that `take` took."""
        with self._freed:
            self._held -= count
            self._freed.notify()


class _Held:
    """The bytes of a member that cannot be read again; counted in `budget` while they exist."""

    def __init__(self, file: _Forwards, size: int, budget: Budget) -> None:
        budget.take(size)
        self._size = size
        self._budget = budget
        self._content = file.read_image(size)
        if len(self._content) < size:
            raise EOFError

    def read(self, max_bytes: int) -> bytes:
        if self._size > max_bytes:
            raise too_large(max_bytes, self._size)
        return self._content

    def __del__(self) -> None:
        self._budget.free(self._size)


def is_archive(name: str) -> bool:
    """Return whether a name has the suffix of an archive."""
    return name.lower().endswith((*TAR_SUFFIXES, *ZIP_SUFFIXES))


def members(
    path: str, wanted: Callable[[str], bool], max_bytes: int, budget: Budget
) -> Iterator[tuple[str, Read]]:
    """Yield the name of every wanted member of the archive at `path`, as stored, and its reader.

    Of a compressed tar, at most what `budget` allows is held, and no member above `max_bytes`.

    Raises
    ------
    ImageError
        The file is not an archive, or cannot be read to its end.
    """
    try:
        file, status = open_regular(path)
        with file:
            open_again = partial(_open_unchanged, path, _identity(status))
            if path.lower().endswith(ZIP_SUFFIXES):
                found = zip_members(file, open_again, wanted)
            elif unpacker_of(cast(io.BufferedReader, file).peek(6)):
                found = tar_stream_members(file, wanted, max_bytes, budget)
            else:
                found = _tar_members(file, wanted, partial(partial, _read_range, open_again))
            yield from with_stamp(found, stamp_in(status))
    except OSError as error:
        raise ImageError(f"cannot be read: {_words(error)}") from error


@contextmanager
def _open_unchanged(path: str, identity: tuple[int, ...]) -> Iterator[IO[bytes]]:
    changed = ImageError("the archive changed while it was read")
    try:
        file, status = open_regular(path)
        with file:
            if _identity(status) != identity:
                raise changed
            yield file
            if _identity(os.fstat(file.fileno())) != identity:
                raise changed
    except OSError as error:
        raise ImageError(f"cannot be read: {_words(error)}") from error


def _words(error: Exception) -> str:
    """Return the standard library's message about a corrupted archive, without a file name."""
    text = reason(error)
    cut = isinstance(error, (EOFError, IncompleteRead, struct.error))
    if cut or text == "unexpected end of data":
        return "it is cut off"
    wrong = "crc" in text or "incorrect data check" in text or "incorrect length check" in text
    return "its checksum does not match" if wrong else text


# --- tar ------------------------------------------------------------------------------


def tar_stream_members(
    stream: IO[bytes], wanted: Callable[[str], bool], max_bytes: int, budget: Budget
) -> Iterator[tuple[str, ReadBytes]]:
    """Yield the members of a tar that can only be read forwards (see `members`)."""

    try:
        buffered = io.BufferedReader(cast(io.RawIOBase, stream), PIECE_BYTES)
        make = unpacker_of(buffered.peek(6))
    except Exception as error:  # a server can make its reader raise anything
        raise ImageError(f"cannot be read: {_words(error)}") from error
    # not by tarfile itself: it checks no checksum, and its memory use has no limit
    with buffered:
        counted = _Counted(buffered)
        plain = io.BufferedReader(Unpacked(counted, make), PIECE_BYTES) if make else counted
        forwards = _Forwards(plain, counted, max(max_bytes, SKIPPED_BYTES))

        def held(_offset: int, size: int) -> ReadBytes:
            if size > max_bytes:
                return partial(fail, str(too_large(max_bytes, size)))
            return _Held(forwards, size, budget).read

        yield from _tar_members(forwards, wanted, held)


class _Counted(io.RawIOBase):
    """A stream that counts the bytes that are read from it."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size: int = self._stream.readinto1(buffer)
        self.count += size
        return size


class _Forwards:
    """A tar that can only be read forwards: it skips by reading, and reads no bomb to its end."""

    def __init__(self, stream: IO[bytes] | io.RawIOBase, packed: _Counted, allowed: int) -> None:
        self._stream = stream
        self._packed = packed
        self._allowed = allowed
        self._position = 0
        self._used = 0

    def read(self, size: int) -> bytes:
        pieces = []
        while size and (piece := self._stream.read(min(size, PIECE_BYTES))):
            pieces.append(piece)
            size -= len(piece)
            self._position += len(piece)
            skipped = self._position - self._used
            if skipped > self._allowed + SKIPPED_RATIO * self._packed.count:
                raise ImageError(
                    f"{skipped:,} bytes that are no image to read came out of "
                    f"{self._packed.count:,} compressed ones, which is refused"
                )
        return b"".join(pieces)

    def read_image(self, size: int) -> bytes:
        """Read the content of an image, which does not count as skipped."""
        self._used += size
        return self.read(size)

    def seek(self, position: int) -> int:
        while position > self._position and self.read(min(PIECE_BYTES, position - self._position)):
            continue
        return self._position


def _read_range(open_again: OpenAgain, offset: int, size: int, max_bytes: int) -> bytes:
    if size > max_bytes:
        raise too_large(max_bytes, size)
    with open_again() as file:
        if offset + size > file.seek(0, os.SEEK_END):  # before that much memory is allocated
            raise ImageError("the archive ends before this member does")
        file.seek(offset)
        return file.read(size)


def _tar_members(
    file: TarFile, wanted: Callable[[str], bool], reader: Callable[[int, int], ReadBytes]
) -> Iterator[tuple[str, ReadBytes]]:
    count = 0
    try:
        for member in tar_headers(file):
            count += 1
            name = without_dot_slash(member.name)
            if not member.is_folder and wanted(name):
                if member.is_link:
                    yield name, partial(fail, "a link inside the archive: not followed")
                elif not member.is_file:
                    yield name, partial(fail, "not a regular file")
                else:
                    yield name, reader(member.offset, member.size)
        while piece := file.read(PIECE_BYTES):  # a decompressor checks its checksum there
            if piece.strip(b"\0"):
                raise TarError("more follows after its end mark")
    except Exception as error:  # a corrupted file or a server can raise anything
        if not count and not isinstance(error, (ImageError, WebError)):
            raise ImageError("not a tar archive, or its beginning is corrupted") from error
        beyond = f" beyond member {count:,}" if count else ""
        raise ImageError(f"cannot be read{beyond}: {_words(error)}") from error


# --- zip ------------------------------------------------------------------------------


def zip_members(
    file: IO[bytes], open_again: OpenAgain, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, ReadBytes]]:
    """Yield the members of a zip (see `members`): listed from `file`, read by opening it again."""
    try:
        with zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
    except Exception as error:  # a corrupted file or a server can raise anything
        failed = isinstance(error, ImageError) or (isinstance(error, OSError) and error.strerror)
        why = f"cannot be read: {_words(error)}" if failed else "not a zip archive, or cut off"
        raise ImageError(why) from error
    overlapping = _overlapping(listed)
    for member in listed:
        name = without_dot_slash(_name_as_stored(member))
        if not name.endswith("/") and wanted(name):
            if member.header_offset in overlapping:
                yield name, partial(fail, "it overlaps another member of the archive")
            else:
                yield name, partial(_read_zip_member, open_again, member)


def _overlapping(listed: list[zipfile.ZipInfo]) -> set[int]:
    """Return where members begin that share bytes with others, as in a bomb that expands itself."""
    found: set[int] = set()
    end, begin = 0, 0
    for member in sorted(listed, key=attrgetter("header_offset")):
        if member.header_offset < end:
            found |= {begin, member.header_offset}
        size = ZIP_HEADER_BYTES + member.compress_size
        if member.header_offset + size > end:
            begin, end = member.header_offset, member.header_offset + size
    return found


def _name_as_stored(member: zipfile.ZipInfo) -> str:
    """Return a member's name, read as UTF-8 even if the flag for it is missing, as macOS does."""
    if member.flag_bits & 0x800 or member.filename != member.orig_filename:
        return member.filename
    return member.filename.encode("cp437").decode("utf-8", "surrogateescape")


def _read_zip_member(open_again: OpenAgain, member: zipfile.ZipInfo, max_bytes: int) -> bytes:
    if member.flag_bits & 1:
        raise ImageError("encrypted inside the archive")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile cannot limit the output of bzip2 or LZMA: up to a million times the input
        method = zipfile.compressor_names.get(member.compress_type, str(member.compress_type))  # type: ignore[attr-defined]
        raise ImageError(f"compressed by {method} inside the archive: only deflate is read")
    if member.file_size > max_bytes:
        raise too_large(max_bytes)
    with open_again() as file:
        try:
            file.seek(member.header_offset)
            header = file.read(ZIP_HEADER_BYTES)
            signature, name_bytes, extra_bytes = struct.unpack("<4s22xHH", header)
            if signature != b"PK\3\4":
                raise zipfile.BadZipFile("a corrupted header")
            file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
            with zipfile.ZipExtFile(file, "r", member) as plain:
                content = plain.read(max_bytes + 1)  # the header's size may be wrong
        except Exception as error:  # a corrupted file or a server can raise anything
            raise ImageError(f"cannot be read from the archive: {_words(error)}") from error
    if len(content) > max_bytes:
        raise too_large(max_bytes)
    return content
