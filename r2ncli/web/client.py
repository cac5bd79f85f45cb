"""The HTTP client: redirects, proxies, deadlines and compressed answers."""

from __future__ import annotations

import logging
import os
import re
import ssl
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from r2ncli.files import reason
from r2ncli.web.attempts import WebError, explained
from r2ncli.web.response import Response
from r2ncli.web.urls import is_web, requested, scrubbed, without_secrets_of_log

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

    from r2ncli.web.connections import Clock, Hosts

ANSWER_SECONDS = 10.0  # how long a server may take to answer, or to send more
REDIRECTS = 10
REDIRECT_STATUS = (301, 302, 303, 307, 308)
SMALL_BODY_BYTES = 1 << 16  # of a redirect: read, so that its connection can be used again
LOGGERS = ("connection", "connectionpool", "poolmanager", "response", "util.retry")


class Client:
    """An HTTP client for one run, which keeps connections open; threads may share it."""

    def __init__(self, user_agent: str = "r2n") -> None:
        self._user_agent = user_agent
        self._pools: dict[tuple[str | None, bool], PoolManager] = {}  # by proxy; only public hosts
        self._hosts: Hosts | None = None
        self._lock = threading.Lock()

    def open(
        self,
        url: str,
        deadline: float,
        headers: Mapping[str, str] | None = None,
        steady: float | None = None,
    ) -> Response:
        """Request a URL once, and return the answer before its body is read.

        A user name and password in the URL are sent to its own scheme, host and port only.
        The answer must be complete at `deadline` (of `time.monotonic`); only looking up the
        host's name is not bounded: call this in `within`. With `steady`, the deadline holds until
        the body begins, which may then take any time (see `Response`).

        Raises
        ------
        WebError
            There is no connection or no answer, the answer has an error status or an invalid
            length, or it redirects without end, to another scheme, or from a public address to a
            private one.
        """
        try:
            with explained():
                return self._open(url, deadline, headers or {}, steady)
        except WebError as error:
            error.args = (scrubbed(str(error), url),)
            raise

    def _open(
        self, url: str, deadline: float, headers: Mapping[str, str], steady: float | None
    ) -> Response:
        plain, user = requested(url)
        sent = {"User-Agent": self._user_agent, **user, **headers}
        answer, clock, first_is_private = self._ask(plain, sent, deadline, public_only=False)
        for _ in range(REDIRECTS):
            target = answer.headers.get("Location", "")
            if answer.status not in REDIRECT_STATUS or not target:
                break
            _end(answer)
            before, (plain, _) = plain, requested(_redirected(plain, target))
            if _origin(before) != _origin(plain):
                sent.pop("Authorization", None)  # for good
            answer, clock, _ = self._ask(plain, sent, deadline, public_only=not first_is_private)
        if answer.status >= 300:
            answer.close()
            if answer.status in REDIRECT_STATUS and answer.headers.get("Location"):
                raise WebError(
                    f"the server redirects without end (more than {REDIRECTS} times)",
                    may_recover=False,
                )
            raise WebError(
                f"the server answered {answer.status} {answer.reason or ''}".rstrip(),
                may_recover=answer.status in (408, 425, 429) or answer.status >= 500,
                status=answer.status,
                headers=answer.headers,
            )
        try:
            _check_length(answer.headers)
            return Response(answer, clock, steady)
        except BaseException:
            answer.close()
            raise

    def _ask(
        self, plain: str, headers: dict[str, str], deadline: float, public_only: bool
    ) -> tuple[BaseHTTPResponse, Clock, bool]:
        """Return the answer at a URL, the clock of its body, and whether its host is private."""
        from urllib3 import Timeout

        from r2ncli.web.connections import (
            Bounded,
            Clock,
            is_private,
            names_private_address,
            redirected_to_private,
        )

        parts = urlsplit(plain)
        host = parts.hostname or ""
        proxy = None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
        if proxy is None:
            self._known_hosts().check(host)
        elif public_only and names_private_address(host):
            raise redirected_to_private()
        seconds = max(0.1, min(ANSWER_SECONDS, deadline - monotonic()))
        answer = self._pool(proxy, public_only).connection_from_url(plain).urlopen(
            "GET", plain if proxy and parts.scheme == "http" else _target(plain), headers=headers,
            retries=False, redirect=False, assert_same_host=False,
            timeout=Timeout(total=seconds), preload_content=False, decode_content=False,
        )  # fmt: skip
        connection = answer.connection
        if not isinstance(connection, Bounded):
            return answer, Clock(deadline), False
        connection.clock.deadline = deadline
        private = names_private_address(host) if proxy else is_private(connection.address)
        return answer, connection.clock, private

    def _known_hosts(self) -> Hosts:
        from r2ncli.web.connections import Hosts

        with self._lock:
            self._hosts = self._hosts or Hosts()
            return self._hosts

    def _pool(self, proxy: str | None, public_only: bool) -> PoolManager:
        """Return the connections through a proxy, or without one."""
        from r2ncli.web.connections import pools

        with self._lock:
            if (proxy, public_only) not in self._pools:
                for name in LOGGERS:  # urllib3 logs whole URLs, at level WARNING too
                    logging.getLogger(f"urllib3.{name}").addFilter(without_secrets_of_log)
                through = _proxy(proxy) if proxy else None
                self._pools[proxy, public_only] = pools(through, public_only, _certificates())
            return self._pools[proxy, public_only]


def _proxy(proxy: str) -> tuple[str, dict[str, str]]:
    """Return the URL of a proxy, and the header with its user name and password."""
    try:
        url, user = requested(proxy if "://" in proxy else f"http://{proxy}")
    except ValueError as error:
        raise WebError(
            "the proxy that the environment names (http_proxy, https_proxy) is not a URL: "
            f"{scrubbed(reason(error), proxy)}",
            may_recover=False,
        ) from error
    return url, {f"Proxy-{name}": value for name, value in user.items()}


def _target(plain: str) -> str:
    """Return the path and query of a URL."""
    parts = urlsplit(plain)
    return (parts.path or "/") + (f"?{parts.query}" if "?" in plain else "")


def _origin(plain: str) -> tuple[str, str | None, int]:
    """Return scheme, host and port of a URL."""
    parts = urlsplit(plain)
    return parts.scheme, parts.hostname, parts.port or {"http": 80}.get(parts.scheme, 443)


def _redirected(plain: str, target: str) -> str:
    """Return the URL that the answer at `plain` redirects to, without user and password."""
    with suppress(UnicodeError):
        target = target.encode("latin-1").decode()  # a header in UTF-8, as browsers take it
    try:
        url = urljoin(plain, target)
    except ValueError:
        url = ""
    if not is_web(url):
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]{0,20}):", url)
        where = f"a URL of {scheme[1]}" if scheme else "what is not a URL"
        raise WebError(
            f"the server redirects to {where}; only http and https are followed",
            may_recover=False,
        )
    return url


def _end(answer: BaseHTTPResponse) -> None:
    """Finish with the answer that is a redirect; keep its connection if its body is small."""
    length = answer.headers.get("Content-Length", "")
    if re.fullmatch("[0-9]{1,6}", length) and int(length) <= SMALL_BODY_BYTES:
        answer.read(SMALL_BODY_BYTES)
    else:
        answer.close()


def _check_length(headers: Mapping[str, str]) -> None:
    """Check that every Content-Length is the same plain number."""
    getlist: Callable[[str], list[str]] | None = getattr(headers, "getlist", None)
    values = [value.strip(" \t") for value in getlist("Content-Length")] if getlist else []
    if len(set(values)) > 1 or not all(re.fullmatch("[0-9]{1,18}", value) for value in values):
        shown = ", ".join(repr(value[:40]) for value in values[:2])
        raise WebError(
            f"the server sent an invalid Content-Length ({shown}); expected one plain number",
            may_recover=False,
        )


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
