"""Read images at URLs: http(s) with `web`, those of object stores and ftp with fsspec.

A request that fails temporarily is repeated, with growing pauses, within a time limit for each
image. fsspec has file systems that run templates, programs and other file systems, so a URL
reaches it only if its scheme is one of `SCHEMES`, and never as a chain (``a::b``): what opens a
URL is looked up by the scheme alone.
"""

from __future__ import annotations

import io
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from time import monotonic
from typing import IO, Any, TypeVar, cast

from r2ncli.errors import ImageError, InputNotFoundError, UsageError
from r2ncli.files import reason
from r2ncli.sources.content import too_large
from r2ncli.sources.selection import is_visible
from r2ncli.web import (
    Client,
    WebError,
    check,
    is_file,
    is_web,
    retry,
    scrubbed,
    within,
    without_secrets,
)

SCHEMES = ("http", "https", "file", "ftp", "s3", "gs", "gcs", "az", "abfs", "abfss", "hf")
FIRST_PAUSE_SECONDS = 0.5  # each further pause is twice as long
PIECE_BYTES = 1 << 16

T = TypeVar("T")


def is_url(text: str) -> bool:
    """Return whether a text is a URL, or a chain of URLs, and not a path."""
    chain = re.match(r"[A-Za-z][A-Za-z0-9+._-]*(::[A-Za-z0-9+._-]+)*://", text)
    return chain is not None or is_file(text)


def checked_scheme(url: str) -> str:
    """Return the scheme of a URL, in lower case.

    Raises
    ------
    UsageError
        It is not one of `SCHEMES`, or the URL is a chain.
    """
    scheme = url.partition(":/")[0].lower()
    if scheme in SCHEMES:
        return scheme
    what = "chains of URLs (a::b) are" if "::" in scheme else f"URLs of {scheme} are"
    allowed = ", ".join(SCHEMES)
    raise UsageError(f"{without_secrets(url)}: {what} not read; allowed are URLs of {allowed}")


def read_url(url: str, client: Client, seconds: float, max_bytes: int) -> bytes:
    """Return the bytes at `url`, read in at most `seconds`.

    Raises
    ------
    ImageError
        The URL cannot be read, reading it takes too long, or it has more than `max_bytes`.
    """

    def read(deadline: float) -> bytes:
        pieces: list[bytes] = []
        size = 0
        with closing(_connect(url, client, deadline)) as stream:
            while piece := stream.read(PIECE_BYTES):
                size += len(piece)
                if size > max_bytes:
                    raise too_large(max_bytes)
                if monotonic() > deadline:
                    raise _timed_out(seconds)
                pieces.append(piece)
        if not pieces:
            raise ImageError("empty file")
        return b"".join(pieces)

    return _retried(read, url, seconds)


def open_url(url: str, client: Client, seconds: float) -> IO[bytes]:
    """Open `url` for reading, in at most `seconds`.

    Raises
    ------
    ImageError
        It cannot be opened.
    """
    stream = _retried(lambda deadline: _connect(url, client, deadline, seconds), url, seconds)
    return stream if is_web(url) else io.BufferedReader(InTime(stream, seconds), PIECE_BYTES)


class InTime(io.RawIOBase):
    """A file of fsspec, of which no single read may take longer than `seconds`."""

    def __init__(self, file: IO[bytes], seconds: float) -> None:
        super().__init__()
        self._file = file
        self._seconds = seconds

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(position, whence)

    def readinto(self, buffer: Any) -> int:
        piece = in_time(self._seconds, self._file.read, len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        with suppress(Exception):  # a file system of fsspec can raise anything
            self._file.close()
        super().close()


def in_time(seconds: float, action: Callable[..., T], *arguments: Any) -> T:
    """Return what `action(*arguments)` returns; an `ImageError` if it takes over `seconds`."""
    try:
        return within(seconds, lambda: action(*arguments))
    except TimeoutError as error:
        raise _timed_out(seconds) from error


def _timed_out(seconds: float) -> ImageError:
    return ImageError(f"timed out after {seconds:g} s")


def _connect(url: str, client: Client, deadline: float, steady: float | None = None) -> IO[bytes]:
    if is_web(url):
        return cast(IO[bytes], client.open(url, deadline, steady=steady))
    system, path = _system(url)
    return cast(IO[bytes], system.open(path, "rb"))


def _retried(action: Callable[[float], T], url: str, seconds: float) -> T:
    """Return what `action(deadline)` returns; repeat it while the server fails temporarily."""
    deadline = monotonic() + seconds

    def attempt() -> T:
        try:
            return action(deadline)
        except (ImageError, WebError):
            raise
        except UsageError as error:
            raise ImageError(str(error)) from error
        except Exception as error:  # a file system of fsspec can raise anything
            raise _web_error(error, url) from error

    try:
        return in_time(seconds, lambda: retry(attempt, FIRST_PAUSE_SECONDS, deadline))
    except WebError as error:
        late = monotonic() > deadline - 0.01
        raise _timed_out(seconds) if late else ImageError(str(error)) from error


def _web_error(error: Exception, url: str) -> WebError:
    """Say what failed in fsspec, and whether the next attempt may succeed."""
    if isinstance(error, TimeoutError):
        return WebError("the server does not answer", may_recover=True)
    why = scrubbed(reason(error), url)
    missing = isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))
    if isinstance(error, OSError) and not missing:
        unknown_host = isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN
        return WebError(f"the connection failed ({why})", may_recover=not unknown_host)
    return WebError(f"cannot be read: {why}", may_recover=False)


# --- folders, by fsspec -----------------------------------------------------------------


def remote_kind(url: str, seconds: float) -> str:
    """Return what is at `url`: ``file``, ``folder`` or ``missing``; for http always ``file``.

    Raises
    ------
    InputNotFoundError
        The file system cannot be reached.
    UsageError
        No installed library opens such URLs.
    """
    if is_web(url):
        return "file"

    def look() -> str:
        system, path = _system(url)
        try:
            if system.isdir(path):
                return "folder"
            return "file" if system.exists(path) else "missing"
        except Exception:  # a file system of fsspec can raise anything
            return "file"  # reading it will say why

    with _opening(url):
        return in_time(seconds, look)


def list_folder(url: str, seconds: float) -> tuple[list[str], list[str]]:
    """Return URLs of the visible files and folders in a remote folder, by the bytes of names.

    Raises
    ------
    ImageError
        The folder cannot be listed, or not in `seconds`.
    """
    try:
        return in_time(seconds, _listed, url)
    except ImageError:
        raise
    except Exception as error:  # a file system of fsspec can raise anything
        raise ImageError(scrubbed(reason(error), url)) from error


def _listed(url: str) -> tuple[list[str], list[str]]:
    system, path = _system(url)
    files: list[str] = []
    folders: list[str] = []
    above = url + "/" * (not url.endswith("/"))
    for entry in system.ls(path, detail=True):
        inside = system._strip_protocol(entry["name"]).rstrip("/")
        name = inside.rpartition("/")[2]
        if inside != path.rstrip("/") and is_visible(name):  # object stores list the folder too
            (folders if entry["type"] == "directory" else files).append(above + name)
    return sorted(files, key=os.fsencode), sorted(folders, key=os.fsencode)


def match_remote(pattern: str, seconds: float) -> list[str]:
    """Return the URLs that a pattern with ``*``, ``?`` or ``[…]`` matches, in order.

    Raises
    ------
    InputNotFoundError
        The file system cannot be reached, or cannot search.
    UsageError
        No installed library opens such URLs.
    """
    with _opening(pattern):
        return in_time(seconds, _matched, pattern)


def _matched(pattern: str) -> list[str]:
    above, slash, below = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")
    system, path = _system(pattern)
    above_path = system._strip_protocol(above + slash)
    matches = system.glob(path, detail=True)
    folders = {found for found, entry in matches.items() if entry["type"] == "directory"}
    urls = []
    for found in sorted(matches, key=os.fsencode):
        beyond = found.split("/")
        # a folder that matches is walked: nothing more in it is a match
        walked = any("/".join(beyond[:count]) in folders for count in range(1, len(beyond)))
        inside = found.removeprefix(above_path).lstrip("/")
        if not walked and (below.startswith(".") or all(map(is_visible, inside.split("/")))):
            urls.append(above + slash + inside)
    return urls


@contextmanager
def _opening(url: str) -> Iterator[None]:
    """Turn whatever a file system of fsspec raises into an `InputNotFoundError`."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        why = scrubbed(reason(error), url)
        raise InputNotFoundError(f"{without_secrets(url)}: cannot be opened: {why}") from error


def _system(url: str) -> tuple[Any, str]:
    """Return the file system of fsspec for a URL, and the path in it."""
    scheme = checked_scheme(url)
    check(url)
    name = without_secrets(url)
    try:
        import fsspec
    except ImportError as error:
        raise UsageError(
            f"{name}: URLs other than http(s) need fsspec: pip install fsspec"
        ) from error
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:  # a library that is missing
        raise UsageError(f"{name}: {error}") from error
    if scheme == "ftp":
        kind = _without_noise(kind)
    url = scheme + url[len(scheme) :]
    # not by `fsspec.core.url_to_fs`, which follows chains
    return kind(**kind._get_kwargs_from_urls(url)), kind._strip_protocol(url)


@lru_cache(1)
def _without_noise(kind: Any) -> Any:
    """Return fsspec's class for ftp; one that could not connect prints no traceback at its end."""

    class Ftp(kind):  # type: ignore[misc]
        def __del__(self) -> None:
            with suppress(Exception):
                self.ftp.close()

    return Ftp
