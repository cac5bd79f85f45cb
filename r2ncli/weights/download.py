"""Download a file whose name carries the first hex digits of its SHA-256, as torch.hub names them.

A download continues where it broke off, is tried again when a server fails, is checked before
the file gets its name, and is done by one process at a time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import BinaryIO

from r2ncli import web
from r2ncli.architectures import DEMO
from r2ncli.errors import CheckpointError
from r2ncli.files import open_regular, publish, reason, remove_lock, take_lock
from r2ncli.sources.selection import USER_AGENT
from r2ncli.web import (
    Client,
    CutOffError,
    Response,
    WebError,
    is_file,
    local_path,
    without_secrets,
)

OPEN_SECONDS = 8.0  # how long it may take until the answer begins
FIRST_PAUSE_SECONDS = 1.0  # before the second attempt; each further one is twice as long
STEADY_SECONDS = 10.0  # how long a server may send next to nothing (`Response.SLOWEST`)
PIECE_BYTES = 1 << 18


@dataclass(frozen=True)
class DownloadProgress:
    """How many bytes were downloaded; `total` is None if the server does not send the size."""

    url: str
    destination: Path
    received: int
    total: int | None


OnProgress = Callable[[DownloadProgress], None]


def hash_prefix(name: str) -> str | None:
    """Return the hash prefix at the end of a file name, by torch.hub's convention, or None.

    It consists of the first hex digits of the file's SHA-256: eight or more, before the suffix,
    after a hyphen or an underscore. Eight decimal digits that are a date (20240131) do not count.
    """
    match = re.search(r"[-_]([0-9a-f]{8,64})(?:\.[A-Za-z]+)+$", name)
    if match is None:
        return None
    digits = match[1]
    date = re.fullmatch(r"(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", digits)
    return None if date else digits


def download_file(url: str, destination: Path, on_progress: OnProgress | None = None) -> Path:
    """Download `url` to `destination`, whose name carries the hash prefix of the file.

    The URL is one of http, https or file. A download that broke off continues where it
    stopped, in this run or the next; the file gets its final name only if its SHA-256 matches.

    Raises
    ------
    CheckpointError
        The server cannot be reached or does not send the file, the folder cannot be written,
        or the SHA-256 does not match.
    """
    shown = without_secrets(url)
    by_hand = (
        f"To do it by hand: get {shown} and put it, as {destination.name}, into "
        f'{destination.parent}. To try r2n without it: `weights="{DEMO}"`'
    )
    partial = destination.with_name(destination.name + ".r2n-partial")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            if destination.exists():  # another process was faster
                partial.unlink(missing_ok=True)
                return destination
            if partial.is_symlink():  # whose target may be any file
                partial.unlink()
            with open(partial, "ab") as file:
                _fetch(url, file, destination, on_progress)
            with open(partial, "rb") as whole:
                digest = hashlib.file_digest(whole, "sha256").hexdigest()
            prefix = hash_prefix(destination.name) or ""
            if not digest.startswith(prefix):
                partial.unlink()
                raise CheckpointError(
                    f"{shown}: checksum mismatch: expected SHA-256 {prefix}…, got {digest[:8]}…; "
                    f"the download was deleted. {by_hand}"
                )
            publish(partial, destination)
    except WebError as error:
        times = f", {web.ATTEMPTS} times" if error.may_recover else ""
        raise CheckpointError(f"cannot download {shown}: {error}{times}. {by_hand}") from error
    except OSError as error:
        raise CheckpointError(
            f"{destination.parent}: cannot be written: {reason(error)}. {by_hand}"
        ) from error
    return destination


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Let one process at a time write `partial`; remove it if it is empty."""
    lock = take_lock(partial.with_name(partial.name + ".lock"), wait=True)
    assert lock is not None  # it waits for the lock
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            if partial.stat().st_size == 0:
                partial.unlink()
        remove_lock(lock)


def _fetch(url: str, file: BinaryIO, destination: Path, on_progress: OnProgress | None) -> None:
    """Append to `file` until it holds everything at `url`."""
    if is_file(url):
        file.truncate(0)
        try:
            source, _ = open_regular(local_path(url))
        except (OSError, ValueError) as error:
            raise WebError(f"cannot be read: {reason(error)}", may_recover=False) from error
        with source:
            shutil.copyfileobj(source, file)
        return
    shown = without_secrets(url)
    client = Client(USER_AGENT)

    def attempt() -> None:
        received = file.seek(0, os.SEEK_END)
        try:
            response = _open(client, url, received)
        except WebError as error:
            if error.status != 416:
                raise
            # the server has no further byte: the download is complete, or of another file
            if error.headers.get("Content-Range") == f"bytes */{received}":
                return
            file.truncate(0)
            raise WebError(
                "the server does not know this part of the file", may_recover=True
            ) from error
        with response:
            if received and response.is_unpacked:  # a part of a compressed file is of no use
                file.truncate(0)
                raise WebError("the server compresses a part of the file", may_recover=True)
            begins = response.headers.get("Content-Range", "").startswith(f"bytes {received}-")
            if received and not (response.status == 206 and begins):
                file.truncate(0)
                received = 0
            length = response.headers.get("Content-Length")
            total = (
                received + int(length.split(",")[0])
                if length and not response.is_unpacked
                else None
            )
            try:
                while piece := response.read(PIECE_BYTES):
                    file.write(piece)
                    received += len(piece)
                    if on_progress:
                        on_progress(DownloadProgress(shown, destination, received, total))
            except CutOffError as error:
                of_total = "" if total is None else f" of {total:,}"
                raise WebError(
                    f"the connection closed after {received:,}{of_total} bytes", may_recover=True
                ) from error

    web.retry(attempt, FIRST_PAUSE_SECONDS)


def _open(client: Client, url: str, received: int) -> Response:
    """Request the part of `url` after the first `received` bytes."""
    headers = {"Range": f"bytes={received}-"} if received else {}
    try:
        return web.within(
            OPEN_SECONDS,
            lambda: client.open(url, monotonic() + OPEN_SECONDS + 1, headers, STEADY_SECONDS),
        )
    except TimeoutError as error:
        raise WebError(f"no answer in {OPEN_SECONDS:g} s", may_recover=received > 0) from error
    except WebError as error:
        if not error.connected and not received:
            error.may_recover = False  # no connection at all: do not retry
        raise
