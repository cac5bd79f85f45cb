"""Connections with a deadline for the whole of an answer, and the hosts they may lead to.

urllib3 and `http.client` bound each read from a socket, not an answer: a server that sends a
byte now and then, or ``100 Continue`` for ever, would be waited for without end. Here every read
ends at the deadline of its `Clock`, so that no thread outlives it.
"""

from __future__ import annotations

import io
import ipaddress
import socket
import ssl
import threading
from concurrent.futures import Future
from functools import partial
from http.client import HTTPResponse
from time import monotonic
from typing import Any

from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager, ProxyManager
from urllib3.connection import HTTPConnection, HTTPSConnection

from r2ncli.web.attempts import ATTEMPTS, WebError

LONGEST_WAIT = 10.0  # seconds for one read from a socket
MOST_HOSTS = 10_000  # whose look-ups are remembered
CONNECTIONS = 16  # kept open for each server


class Clock:
    """When reading an answer must end, in seconds of `time.monotonic`; it can be moved."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline


class _InTime(io.RawIOBase):
    """What comes from a socket, until the deadline of a clock."""

    def __init__(self, source: io.RawIOBase, sock: socket.socket, clock: Clock) -> None:
        super().__init__()
        self._source = source
        self._socket = sock
        self._clock = clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._clock.deadline - monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(min(LONGEST_WAIT, left))
        return self._source.readinto(buffer)

    def close(self) -> None:
        self._source.close()
        super().close()


def _response(connection: Bounded, sock: socket.socket, *more: Any, **options: Any) -> HTTPResponse:
    response = HTTPResponse(sock, *more, **options)
    source = response.fp.detach()
    response.fp = io.BufferedReader(_InTime(source, sock, connection.clock))
    connection.answer = response
    return response


class Bounded:
    """Makes a connection of urllib3 keep a deadline, and refuse private addresses if it must.

    urllib3 gives it the seconds until the deadline as its `timeout`.
    """

    public_only = False
    timeout: Any
    proxy: Any
    response_class: Any

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.clock = Clock(float("inf"))
        self.answer: HTTPResponse | None = None  # while its head is read
        self.address = ""  # of the server, or of the proxy
        self.response_class = partial(_response, self)

    def connect(self) -> None:
        self.clock = Clock(monotonic() + self.timeout)  # for a proxy's answer to CONNECT
        super().connect()  # type: ignore[misc]

    def getresponse(self) -> Any:
        self.clock = Clock(monotonic() + self.timeout)
        try:
            return super().getresponse()  # type: ignore[misc]
        except BaseException:
            if self.answer is not None:  # urllib3 leaves it open where it does not like a header
                self.answer.close()
            raise
        finally:
            self.answer = None

    def _new_conn(self) -> socket.socket:
        sock: socket.socket = super()._new_conn()  # type: ignore[misc]
        self.address = str(sock.getpeername()[0])
        # the address that is really used: a name may have another one at each look-up
        if self.public_only and self.proxy is None and is_private(self.address):
            sock.close()
            raise redirected_to_private()
        return sock


class _Http(Bounded, HTTPConnection):
    pass


class _Https(Bounded, HTTPSConnection):
    pass


class _PublicHttp(_Http):
    public_only = True


class _PublicHttps(_Https):
    public_only = True


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https


class _PublicHttpPool(HTTPConnectionPool):
    ConnectionCls = _PublicHttp


class _PublicHttpsPool(HTTPSConnectionPool):
    ConnectionCls = _PublicHttps


def pools(
    proxy: tuple[str, dict[str, str]] | None, public_only: bool, certificates: ssl.SSLContext
) -> PoolManager:
    """Return the connections to all servers, directly or through the proxy with these headers."""
    options: dict[str, Any] = {"maxsize": CONNECTIONS, "ssl_context": certificates}
    manager = (
        ProxyManager(proxy[0], proxy_headers=proxy[1], **options)
        if proxy
        else PoolManager(**options)
    )
    manager.pool_classes_by_scheme = (
        {"http": _PublicHttpPool, "https": _PublicHttpsPool}
        if public_only
        else {"http": _HttpPool, "https": _HttpsPool}
    )
    return manager


# --- hosts --------------------------------------------------------------------------------


def redirected_to_private() -> WebError:
    """Return the error of a public server that redirects to an address of a private network."""
    return WebError(
        "the server redirects to an address of a private network, which is refused",
        may_recover=False,
    )


def is_private(address: str) -> bool:
    """Return whether an IP address is not one of the public internet: private, loopback, …"""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # an IPv4 address behind NAT64
            ip = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
        else:
            ip = ip.ipv4_mapped or ip.sixtofour or ip
    return not ip.is_global


def names_private_address(host: str) -> bool:
    """Return whether a host is written as a private address, such as ``[::1]`` or ``2130706433``.

    For a request through a proxy, which looks up names by itself.
    """
    plain = host.strip("[]").rstrip(".").lower()
    if plain == "localhost" or plain.endswith(".localhost"):
        return True
    try:
        return is_private(socket.inet_ntoa(socket.inet_aton(plain)))
    except OSError:
        pass
    try:
        return is_private(plain)
    except ValueError:
        return False


class Hosts:
    """Looks up each host of a run once: one without an address is not asked for again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[str, Future[str]] = {}  # "", or why there is no address
        self._again: dict[str, int] = {}  # temporary failures

    def check(self, host: str) -> None:
        """Look up a host, unless that was done before.

        Raises
        ------
        WebError
            It has no address.
        UnicodeError
            It is not a host name.
        """
        with self._lock:
            is_first = host not in self._found
            while len(self._found) >= MOST_HOSTS:
                self._found.pop(next(iter(self._found)))
            found = self._found.setdefault(host, Future())
        if is_first:
            try:
                self._look_up(host, found)
            except BaseException:
                with self._lock:
                    self._found.pop(host, None)
                found.set_result("the look-up failed")
                raise
        if why := found.result():
            with self._lock:
                may_recover = self._found.get(host) is not found
            text = f"the connection failed ({why})"
            raise WebError(text, may_recover=may_recover, connected=False)

    def _look_up(self, host: str, found: Future[str]) -> None:
        try:
            socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            with self._lock:
                self._again[host] = self._again.get(host, 0) + 1
                if error.errno == socket.EAI_AGAIN and self._again[host] < ATTEMPTS:
                    self._found.pop(host, None)
                elif host in self._again:
                    del self._again[host]
            found.set_result(" ".join((error.strerror or "unknown host").lower().split()))
        else:
            found.set_result("")
