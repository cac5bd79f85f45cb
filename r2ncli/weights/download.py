"""Fetch a file whose name carries the first digits of its SHA-256, as torch.hub names them.

Resumed where it broke off, tried again when a server fails, checked before it gets its
name, and one process at a time for one file.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from r2ncli.architectures import DEMO
from r2ncli.errors import CheckpointError
from r2ncli.web import without_password

ATTEMPTS = 4
CONNECT_SECONDS = 8.0


@dataclass(frozen=True)
class DownloadProgress:
    """How far a download is; `total` is None while the server has not said it."""

    address: str
    destination: Path
    received: int
    total: int | None


OnProgress = Callable[[DownloadProgress], None]


def digits_in_name(name: str) -> str | None:
    """The hex digits that torch.hub's convention puts at a file name's end.

    They are the first digits of the file's SHA-256: eight or more, before the suffix,
    after a hyphen or an underscore. A run of eight decimal digits that reads as a date
    (20240131) is none.
    """
    match = re.search(r"[-_]([0-9a-f]{8,64})(?:\.[A-Za-z]+)+$", name)
    if match is None:
        return None
    digits = match[1]
    date = re.fullmatch(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", digits)
    return None if date else digits


def download_file(address: str, destination: Path, on_progress: OnProgress | None = None) -> Path:
    """Fetch `address` to `destination`, whose name carries its SHA-256's first digits.

    A broken download goes on where it stopped, in this run or the next; the file gets its
    final name only when its SHA-256 fits.

    Raises
    ------
    CheckpointError
        The server cannot be reached or does not give the file, the folder cannot be
        written, or what came is not the file.
    """
    shown = without_password(address)
    by_hand = (
        f"To do it by hand: get {shown} and put it, as {destination.name}, into "
        f"{destination.parent}. To try r2n without it: --weights {DEMO}"
    )
    partial = destination.with_name(destination.name + ".r2n-partial")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial) as file:
            if destination.exists():  # another process was faster
                partial.unlink(missing_ok=True)
                return destination
            _fetch(address, file, destination, on_progress)
            file.flush()
            os.fsync(file.fileno())
            with open(partial, "rb") as whole:
                digest = hashlib.file_digest(whole, "sha256").hexdigest()
            digits = digits_in_name(destination.name) or ""
            if not digest.startswith(digits):
                partial.unlink()
                raise CheckpointError(
                    f"{shown}: what came is not the file: its SHA-256 starts {digest[:8]}, "
                    f"expected {digits}. It was deleted. {by_hand}"
                )
            os.replace(partial, destination)
    except _DownloadFailedError as error:
        raise CheckpointError(f"cannot download {shown}: {error}. {by_hand}") from error
    except (_DiskError, OSError) as error:
        raise CheckpointError(
            f"{destination.parent}: cannot be written: {_words(error.__cause__ or error)}. "
            f"{by_hand}"
        ) from error
    return destination


class _DownloadFailedError(Exception):
    """A download that does not come; the message says why."""


class _DiskError(Exception):
    """What came cannot be written; the cause says why."""


@contextmanager
def _locked(partial: Path) -> Iterator[BinaryIO]:
    """`partial` open for appending, by one process at a time."""
    while True:
        with open(partial, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                ours = os.path.samestat(os.fstat(file.fileno()), os.stat(partial))
            except FileNotFoundError:
                ours = False  # the process before us renamed it away
            if ours:
                try:
                    yield file
                finally:
                    if file.seek(0, os.SEEK_END) == 0:
                        partial.unlink(missing_ok=True)  # nothing came
                return


def _fetch(address: str, file: BinaryIO, destination: Path, on_progress: OnProgress | None) -> None:
    """Append to `file` until the whole of `address` is there."""
    shown = without_password(address)
    _reach(address)
    for attempt in range(1, ATTEMPTS + 1):
        received = file.seek(0, os.SEEK_END)
        try:
            request = urllib.request.Request(address, headers={"User-Agent": "r2n"})
            if received:
                request.add_header("Range", f"bytes={received}-")
            with urllib.request.urlopen(request, timeout=CONNECT_SECONDS) as response:
                if received and not _continues(response.headers, response.status, received):
                    file.truncate(0)
                    received = 0
                length = response.headers.get("Content-Length")
                total = received + int(length) if length and length.isdigit() else None
                while piece := response.read(1 << 18):
                    try:
                        file.write(piece)
                    except OSError as error:
                        raise _DiskError from error
                    received += len(piece)
                    if on_progress:
                        on_progress(DownloadProgress(shown, destination, received, total))
            if total is None or received >= total:
                return
            reason = f"the connection closed after {received:,} of {total:,} bytes"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # nothing is left after what we have: whole, or of another file
                if received == _total_of(error.headers):
                    return
                file.truncate(0)
                reason = "the server does not know this part of the file"
            elif error.code in (408, 429) or error.code >= 500:
                reason = f"the server answered {error.code} {error.reason}"
            else:
                raise _DownloadFailedError(
                    f"the server answered {error.code} {error.reason}"
                ) from error
        except TimeoutError as error:
            reason = "the server does not answer"
            if not received:  # nor would it the next time
                raise _DownloadFailedError(reason) from error
        except (urllib.error.URLError, OSError, HTTPException) as error:
            reason = f"the connection failed ({_words(error)})"
        if attempt < ATTEMPTS:
            time.sleep(2.0 ** (attempt - 1))
    raise _DownloadFailedError(f"{reason}, {ATTEMPTS} times")


def _continues(headers: Message[str, str], status: int, received: int) -> bool:
    """Whether the answer goes on at byte `received`, as asked."""
    return status == 206 and headers.get("Content-Range", "").startswith(f"bytes {received}-")


def _total_of(headers: Message[str, str]) -> int:
    """The whole size in a ``Content-Range: bytes */N``; -1 where it is not said."""
    _, _, total = headers.get("Content-Range", "").rpartition("/")
    return int(total) if total.isdigit() else -1


_PORTS = {"http": 80, "https": 443, "ftp": 21}


def _reach(address: str) -> None:
    """Connect once, within a limit that name look-ups and many addresses do not stretch."""
    parts = urlsplit(address)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and parts.hostname and not urllib.request.proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        host, port = parts.hostname, parts.port or _PORTS.get(parts.scheme)
    except ValueError as error:
        raise _DownloadFailedError(f"{parts.netloc}: {error}") from error
    if host is None or port is None:
        return
    failure: list[Exception] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
        except (OSError, UnicodeError) as error:
            failure.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if thread.is_alive() or failure:
        reason = _words(failure[0]) if failure else f"no answer in {CONNECT_SECONDS:.0f} s"
        raise _DownloadFailedError(f"no connection to {host} ({reason})")


def _words(error: BaseException) -> str:
    """What an error of the network says, without its number."""
    cause = getattr(error, "reason", error)
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause) or type(cause).__name__
