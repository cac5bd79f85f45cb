"""Errors of requests, repeated attempts, and calls that are given up after a time."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from http.client import HTTPException, IncompleteRead
from time import monotonic, sleep
from typing import TypeVar

from r2ncli.files import reason
from r2ncli.web.urls import without_secrets

ATTEMPTS = 4

T = TypeVar("T")


class WebError(Exception):
    """Why a request failed, and whether another attempt may succeed.

    `connected` says whether there was a connection to the server; `status` and `headers` are
    those of its answer, if there was one.
    """

    def __init__(
        self,
        text: str,
        *,
        may_recover: bool,
        connected: bool = True,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(text)
        self.may_recover = may_recover
        self.connected = connected
        self.status = status
        self.headers = headers or {}


class CutOffError(WebError, EOFError):
    """The connection closed before the end of the answer."""


def retry(action: Callable[[], T], first_pause: float, deadline: float = float("inf")) -> T:
    """Return what `action` returns; try again after a temporary `WebError`.

    It is tried `ATTEMPTS` times at most, the second time after `first_pause` seconds; each
    further pause is twice as long. No attempt begins after `deadline` (of `time.monotonic`).

    Raises
    ------
    WebError
        The last attempt failed, or another one could not succeed.
    """
    pause = first_pause
    for _ in range(ATTEMPTS - 1):
        try:
            return action()
        except WebError as error:
            if not error.may_recover or monotonic() + pause >= deadline:
                raise
        sleep(pause)
        pause *= 2
    return action()


def within(seconds: float, action: Callable[[], T]) -> T:
    """Return what `action` returns, or stop waiting for it after `seconds`.

    The action runs in a daemon thread. After the time it continues there, and its result is
    dropped: some calls, such as a look-up of a host name, cannot be interrupted.

    Raises
    ------
    TimeoutError
        The action took longer.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:  # raised where the result is used
            outcome.set_exception(error)

    threading.Thread(target=run, name="r2n-wait", daemon=True).start()
    return outcome.result(seconds)


# --- errors of urllib3 ---------------------------------------------------------------------


@contextmanager
def explained() -> Iterator[None]:
    """Turn whatever urllib3 raises into a `WebError`."""
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (HTTPError, HTTPException, OSError, ValueError) as error:
        raise _web_error(error) from error


def _web_error(error: BaseException) -> WebError:
    """Return what failed, in words; urllib3 wraps the cause several times."""
    from urllib3 import exceptions

    chain = [error]
    while (inner := _inner(chain[-1])) is not None and inner not in chain:
        chain.append(inner)
    cause = chain[-1]

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if has(IncompleteRead):
        return CutOffError("the connection failed (it closed before the end)", may_recover=True)
    if has(exceptions.InvalidHeader):
        return WebError(f"the server sent an invalid header ({reason(cause)})", may_recover=False)
    if isinstance(error, ValueError):
        shown = without_secrets(getattr(error, "location", "")) or reason(cause)
        return WebError(f"not a URL: {shown}", may_recover=False)
    if has(TimeoutError, exceptions.TimeoutError) and not has(exceptions.NewConnectionError):
        text = f"the {'proxy' if has(exceptions.ProxyError) else 'server'} does not answer"
    else:
        to_proxy = " to the proxy" if has(exceptions.ProxyError) else ""
        text = f"the connection{to_proxy} failed ({reason(cause)})"
    return WebError(
        text,
        may_recover=not has(ssl.SSLCertVerificationError),
        connected=not has(exceptions.ConnectTimeoutError),
    )


def _inner(error: BaseException) -> BaseException | None:
    """Return the error that caused this one; urllib3 keeps it in several places."""
    named = (getattr(error, name, None) for name in ("original_error", "reason", "__cause__"))
    inner = (one for one in (*named, *reversed(error.args)) if isinstance(one, BaseException))
    return next(inner, None)
