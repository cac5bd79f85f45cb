"""Pictures that URLs name: http(s) by itself, and whatever fsspec opens (s3://, gs://, …).

A server that fails for the moment is asked again, with growing pauses, within a time limit
for each picture.
"""

from __future__ import annotations

import os
import re
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPException, IncompleteRead, InvalidURL
from itertools import count
from typing import IO, Any, TypeVar
from urllib.parse import quote, unquote

from r2ncli.errors import ImageError, InputNotFoundError, UsageError
from r2ncli.sources.archives import too_large
from r2ncli.sources.selection import is_visible
from r2ncli.web import without_password

ATTEMPTS = 4
ANSWER_SECONDS = 10.0  # how long one connection may say nothing
FIRST_PAUSE_SECONDS = 0.5  # each further one is twice as long
PIECE_BYTES = 1 << 16

T = TypeVar("T")


def is_url(text: str) -> bool:
    """Whether a text is an address and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.-]+)*://", text) is not None


def is_web(address: str) -> bool:
    """Whether an address is one of http or https."""
    return re.match(r"https?://", address, re.IGNORECASE) is not None


def without_secrets(address: str) -> str:
    """An address as outputs show it: no user name, no password; of http no query."""
    if is_web(address):
        address = re.split(r"[?#]", address, maxsplit=1)[0]
    return without_password(address)


def read_url(address: str, seconds: float, max_bytes: int) -> bytes:
    """The bytes at `address`, in `seconds` at the most.

    Raises
    ------
    ImageError
        They do not come, do not come in time, or are more than `max_bytes`.
    """
    deadline = time.monotonic() + seconds

    def read() -> bytes:
        with closing(_connect(address, deadline)) as stream:
            return _read_all(stream, deadline, seconds, max_bytes)

    return _patiently(read, deadline, seconds)


def open_url(address: str, seconds: float) -> IO[bytes]:
    """A stream of what is at `address`, connected in `seconds` at the most.

    Raises
    ------
    ImageError
        It cannot be opened.
    """
    deadline = time.monotonic() + seconds
    return _patiently(lambda: _connect(address, deadline), deadline, seconds)


def _read_all(stream: IO[bytes], deadline: float, seconds: float, max_bytes: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    read = getattr(stream, "read1", stream.read)  # what has come, without waiting for more
    while piece := read(PIECE_BYTES):
        size += len(piece)
        if size > max_bytes:
            raise too_large(max_bytes)
        if time.monotonic() > deadline:
            raise _too_late(seconds)
        pieces.append(piece)
    if getattr(stream, "length", None):  # what an http server still owes
        raise ConnectionError("it closed before the end")
    if not pieces:
        raise ImageError("empty file")
    return b"".join(pieces)


def _connect(address: str, deadline: float) -> IO[bytes]:
    stream: IO[bytes]
    if is_web(address):
        request = _request(address)
        left = max(0.1, min(ANSWER_SECONDS, deadline - time.monotonic()))
        stream = urllib.request.urlopen(request, timeout=left)
    else:
        system, path = _system(address)
        stream = system.open(path, "rb")
    return stream


def _request(address: str) -> urllib.request.Request:
    scheme, separator, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    user, _, host = host.rpartition("@")
    plain = quote(f"{scheme}{separator}{host}{slash}{path}", safe="%/:=&?~#+!$,;'@()*[]")
    request = urllib.request.Request(plain, headers={"User-Agent": "r2n"})
    if user:  # not for another server, should this one send us there
        token = b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _patiently(action: Callable[[], T], deadline: float, seconds: float) -> T:
    """The result of `action`, which is tried again while the server fails for the moment."""
    for attempt in count(1):
        try:
            return action()
        except Exception as error:
            if time.monotonic() > deadline and not isinstance(error, ImageError):
                raise _too_late(seconds) from error
            reason, may_get_better = _what_failed(error)
            pause = FIRST_PAUSE_SECONDS * 2.0 ** (attempt - 1)
            too_often = attempt == ATTEMPTS or time.monotonic() + pause >= deadline
            if too_often or not may_get_better:
                raise ImageError(reason) from error
            time.sleep(pause)
    raise AssertionError("count() has no end")


def _too_late(seconds: float) -> ImageError:
    return ImageError(f"not there within {seconds:g} s (--timeout)")


def _what_failed(error: Exception) -> tuple[str, bool]:
    """An error in words, and whether the next try may have none."""
    if isinstance(error, (ImageError, UsageError)):
        return str(error), False
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        said = f"the server answered {error.code} {error.reason}".rstrip()
        return said, error.code in (408, 425, 429) or error.code >= 500
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return f"cannot be read: {_words(error)}", False
    reason = getattr(error, "reason", error)  # of an URLError
    if isinstance(reason, InvalidURL):
        return f"not an address: {_words(reason)}", False
    if isinstance(reason, IncompleteRead):
        return "the connection failed (it closed before the end)", True
    if isinstance(reason, TimeoutError):
        return "the server does not answer", True
    if isinstance(error, (OSError, HTTPException)):
        return f"the connection failed ({_words(reason)})", True
    return f"cannot be read: {_words(error)}", False  # whatever a file system of fsspec raises


# --- folders, by fsspec -----------------------------------------------------------------


def is_remote_folder(address: str) -> bool:
    """Whether a folder is at `address`; over http that cannot be told, and is no.

    Raises
    ------
    InputNotFoundError
        Nothing is there.
    UsageError
        Nothing that is installed opens such addresses.
    """
    if is_web(address):
        return False
    system, path = _system(address)
    try:
        if system.isdir(path):
            return True
        exists = system.exists(path)
    except Exception:  # whatever a file system of fsspec raises
        return False  # reading it will say why
    if not exists:
        raise InputNotFoundError(f"no such file or folder: {without_secrets(address)}")
    return False


def list_folder(address: str) -> tuple[list[str], list[str]]:
    """Addresses of the files and of the folders in a remote folder.

    Raises
    ------
    OSError
        It cannot be listed.
    """
    system, path = _system(address)
    files: list[str] = []
    folders: list[str] = []
    for entry in system.ls(path, detail=True):
        inside = system._strip_protocol(entry["name"]).rstrip("/")
        if inside == path.rstrip("/"):
            continue  # object stores list the folder itself
        found = address + "/" * (not address.endswith("/")) + inside.rpartition("/")[2]
        (folders if entry["type"] == "directory" else files).append(found)
    return files, folders


def match_remote(pattern: str) -> Iterator[str]:
    """Addresses that a pattern with ``*``, ``?`` or ``[…]`` matches, in order.

    Raises
    ------
    InputNotFoundError
        It cannot be looked for.
    """
    system, path = _system(pattern)
    above, slash, below = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")
    above_path = system._strip_protocol(above + slash)
    try:
        matches = system.glob(path, detail=True)
    except Exception as error:  # whatever a file system of fsspec raises
        name = without_secrets(pattern)
        raise InputNotFoundError(f"{name}: cannot be looked for: {_words(error)}") from error
    folders = {found for found, entry in matches.items() if entry["type"] == "directory"}
    for found in sorted(matches, key=os.fsencode):
        parts = found.removeprefix(above_path).lstrip("/").split("/")
        beyond = found.split("/")
        # a folder that matches is walked: nothing more in it is a match
        walked = any("/".join(beyond[:count]) in folders for count in range(1, len(beyond)))
        if not walked and (below.startswith(".") or all(map(is_visible, parts))):
            yield above + slash + "/".join(parts)


def _system(address: str) -> tuple[Any, str]:
    """The file system of fsspec for an address, and the path in it."""
    try:
        import fsspec
    except ImportError as error:
        raise UsageError(
            f"{without_secrets(address)}: addresses other than http(s) need fsspec: "
            "pip install 'r2ncli[remote]'"
        ) from error
    try:
        system, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # a library that is missing, an unknown protocol
        raise UsageError(f"{without_secrets(address)}: {error}") from error
    return system, path


def _words(error: object) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).lower() or type(error).__name__
