"""HTTP for images and checkpoints: one client, retries, deadlines, and no secrets shown."""

from __future__ import annotations

import io
import os
import re
import ssl
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from http.client import HTTPException, IncompleteRead
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from r2ncli.files import reason

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

ATTEMPTS = 4
ANSWER_SECONDS = 10.0  # how long a server may take to answer, or to send more
CONNECTIONS = 16  # kept open for each server

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


def is_web(url: str) -> bool:
    """Return whether a URL is one of http or https."""
    return re.match(r"https?://", url, re.IGNORECASE) is not None


def without_secrets(url: str) -> str:
    """Return a URL as it may be shown: no user name, no password, and for http no query."""
    parts = re.split(r"::(?=[A-Za-z][A-Za-z0-9+.-]*://)", url)  # of a chain of fsspec's
    plain = (re.split(r"[?#]", part, maxsplit=1)[0] if is_web(part) else part for part in parts)
    return "::".join(re.sub(r"://[^/]*@", "://", part, count=1) for part in plain)


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


class Client:
    """An HTTP client for one run, which keeps connections open; threads may share it."""

    def __init__(self, user_agent: str = "r2n") -> None:
        self._user_agent = user_agent
        self._pools: dict[str | None, PoolManager] = {}  # by proxy
        self._lock = threading.Lock()

    def open(self, url: str, deadline: float, headers: Mapping[str, str] | None = None) -> Response:
        """Request a URL once, and return the answer before its body is read.

        A user name and password in the URL are sent to its own host only. The server may take
        until `deadline` (of `time.monotonic`) to answer; looking up the host's name is not
        bounded: call this in `within`.

        Raises
        ------
        WebError
            There is no connection or no answer, or the answer has an error status.
        """
        from urllib3 import Retry, Timeout

        seconds = max(0.1, min(ANSWER_SECONDS, deadline - monotonic()))
        with _explained():
            plain, user = _split_user(url)
            sent = {"User-Agent": self._user_agent, **user, **(headers or {})}
            # redirects alone are urllib3's; it drops Authorization on the way to another host
            redirects = Retry(
                None, connect=False, read=False, other=0, redirect=10, raise_on_redirect=False
            )
            answer = self._pool(plain).urlopen(
                "GET", plain, headers=sent, retries=redirects, timeout=Timeout(seconds, seconds),
                preload_content=False, decode_content=False,
            )  # fmt: skip
        response = Response(answer)
        if monotonic() > deadline:
            response.close()  # the caller no longer waits for it
        if answer.status >= 300:
            response.close()
            raise WebError(
                f"the server answered {answer.status} {answer.reason or ''}".rstrip(),
                may_recover=answer.status in (408, 425, 429) or answer.status >= 500,
                status=answer.status,
                headers=answer.headers,
            )
        return response

    def _pool(self, url: str) -> PoolManager:
        """Return the connections for a URL: its proxy's, if the environment names one for it."""
        from urllib3 import PoolManager, ProxyManager

        parts = urlsplit(url)
        proxy = None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
        with self._lock:
            if proxy not in self._pools:
                options: dict[str, Any] = {"maxsize": CONNECTIONS, "ssl_context": _certificates()}
                if proxy:
                    proxy_url, user = _split_user(proxy if "://" in proxy else f"http://{proxy}")
                    headers = {f"Proxy-{name}": value for name, value in user.items()}
                    self._pools[proxy] = ProxyManager(proxy_url, proxy_headers=headers, **options)
                else:
                    self._pools[proxy] = PoolManager(**options)
            return self._pools[proxy]


class Response(io.RawIOBase):
    """The answer of a server; reading gives its body as it comes, unchanged."""

    def __init__(self, answer: BaseHTTPResponse) -> None:
        super().__init__()
        self.status = answer.status
        self.headers: Mapping[str, str] = answer.headers
        self._answer = answer

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what has come, at least one byte unless it is the end; raises a `WebError`."""
        with _explained():
            piece = self._answer.read1(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._answer.close()  # after a whole body its connection is already back in the pool
        super().close()


def _certificates() -> ssl.SSLContext:
    """Return the trusted certificates: the system's, ``SSL_CERT_FILE``, ``REQUESTS_CA_BUNDLE``."""
    context = ssl.create_default_context()  # this reads SSL_CERT_FILE itself
    if bundle := os.environ.get("REQUESTS_CA_BUNDLE"):
        kind = "capath" if os.path.isdir(bundle) else "cafile"
        try:
            context.load_verify_locations(**{kind: bundle})
        except OSError as error:
            raise WebError(
                f"REQUESTS_CA_BUNDLE is {bundle!r}, which cannot be used: {reason(error)}",
                may_recover=False,
            ) from error
    return context


def _split_user(url: str) -> tuple[str, dict[str, str]]:
    """Return a URL in ASCII without user name, password and fragment, and the user's header."""
    from urllib3.util import parse_url

    parts = parse_url(url)
    plain = parts._replace(auth=None, fragment=None).url
    if not parts.auth:
        return plain, {}
    return plain, {"Authorization": f"Basic {b64encode(unquote(parts.auth).encode()).decode()}"}


@contextmanager
def _explained() -> Iterator[None]:
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
