"""Servers that mean harm: no answer outlives its deadline, and no redirect leads astray."""

from __future__ import annotations

import base64
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.servers import DRIPS, OK, RawServer, Speak, drips, says
from support.sources import outcome

from r2ncli.errors import CheckpointError
from r2ncli.sources.selection import Selection
from r2ncli.sources.walk import find_images
from r2ncli.web import Client, WebError, connections, response
from r2ncli.web.connections import is_private, names_private_address
from r2ncli.weights import download

Serve = Callable[..., RawServer]
BODY = OK + b"Content-Length: 5\r\n\r\nhello"


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A function that starts a server which speaks like this."""
    running: list[RawServer] = []

    def start(speak: Speak, host: str = "127.0.0.1") -> RawServer:
        running.append(RawServer(speak, host))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    """No thread of a request is left after each test."""
    yield
    for thread in threading.enumerate():
        if thread.name == "r2n-wait":
            thread.join(30)
            assert not thread.is_alive()


def get(url: str, seconds: float = 20.0, client: Client | None = None) -> bytes:
    with (client or Client()).open(url, time.monotonic() + seconds) as answer:
        return answer.read()


def error_of(url: str, **options: Any) -> str:
    with pytest.raises(WebError) as raised:
        get(url, **options)
    return str(raised.value)


def redirect(to: str, length: bytes = b"Content-Length: 0\r\n") -> Speak:
    head = b"HTTP/1.1 302 Found\r\nConnection: close\r\nLocation: "
    return says(head + to.encode() + b"\r\n" + length + b"\r\n")


# --- time ---------------------------------------------------------------------------------


@pytest.mark.parametrize("drip", DRIPS)
def test_an_image_is_given_up_after_the_timeout_however_its_server_drips(
    serve: Serve, drip: str
) -> None:
    (source,) = find_images([serve(DRIPS[drip]).at("/x.jpg")], print, Selection(timeout=0.15))
    assert outcome(source) == "timed out after 0.15 s"


@pytest.mark.parametrize("drip", DRIPS)
def test_a_request_ends_by_itself_at_its_deadline(serve: Serve, drip: str) -> None:
    """No other thread ends it: what waits for it may be gone."""
    assert "the server does not answer" in error_of(serve(DRIPS[drip]).at("/x"), seconds=0.15)


@pytest.mark.parametrize("drip", DRIPS)
def test_a_tar_is_given_up_when_next_to_nothing_comes(serve: Serve, drip: str) -> None:
    url = serve(DRIPS[drip]).at("/x.tar")
    (source,) = find_images([url], print, Selection(timeout=0.15))
    assert source.name == url
    assert str(outcome(source)).endswith(("timed out after 0.15 s", "the server does not answer"))


@pytest.mark.parametrize("drip", DRIPS)
def test_a_download_is_given_up_when_next_to_nothing_comes(
    serve: Serve, drip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "OPEN_SECONDS", 0.15)
    monkeypatch.setattr(download, "STEADY_SECONDS", 0.1)
    monkeypatch.setattr(download, "FIRST_PAUSE_SECONDS", 0.01)
    with pytest.raises(CheckpointError, match=r"no answer in 0\.15 s|the server does not answer"):
        download.download_file(serve(DRIPS[drip]).at("/x.pth"), tmp_path / "x-00000000.pth")


def test_a_proxy_that_drips_its_answer_to_connect_is_given_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    for drip in ("a status line", "headers without end"):
        monkeypatch.setenv("https_proxy", serve(DRIPS[drip]).at(""))
        assert "does not answer" in error_of("https://example.org/x", seconds=0.15)


def test_a_slow_body_is_read_to_its_end_where_its_time_is_not_limited(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(connection: socket.socket, _: RawServer) -> None:
        connection.sendall(OK + b"Content-Length: 50\r\n\r\n")
        for _piece in range(5):
            time.sleep(0.1)
            connection.sendall(b"0123456789")

    monkeypatch.setattr(response, "SLOWEST", 20)
    url = serve(slowly).at("/x")
    with Client().open(url, time.monotonic() + 20, steady=0.4) as answer:
        assert answer.read() == b"0123456789" * 5


# --- lengths ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length", ["-5", "1e9", "+5", "5_0", "0x5", "5.0", "", "five", "9" * 30, "5, 5", "\u0665"]
)
def test_a_length_that_is_no_plain_number_is_an_error(serve: Serve, length: str) -> None:
    answer = OK + f"Content-Length: {length}\r\n\r\nhello".encode()
    text = error_of(serve(says(answer)).at("/x"))
    assert "the server sent an invalid Content-Length" in text


def test_two_lengths_that_differ_are_an_error_and_equal_ones_are_not(serve: Serve) -> None:
    two = OK + b"Content-Length: 5\r\nContent-Length: %d\r\n\r\nhello"
    text = error_of(serve(says(two % 6)).at("/x"))
    assert text.startswith("the server sent an invalid header (content-length ")
    assert get(serve(says(two % 5)).at("/x")) == b"hello"


# --- redirects ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("file:///etc/passwd", "a URL of file"),
        ("ftp://127.0.0.1/x", "a URL of ftp"),
        ("s3://bucket/x", "a URL of s3"),
        ("javascript:alert(1)", "a URL of javascript"),
        ("data:,x", "a URL of data"),
    ],
)
def test_a_redirect_to_another_scheme_is_refused(serve: Serve, to: str, said: str) -> None:
    text = error_of(serve(redirect(to)).at("/x"))
    assert text == f"the server redirects to {said}; only http and https are followed"


def test_a_redirect_to_no_url_is_an_error(serve: Serve) -> None:
    for to in ("http://[::1", "http://h:port/", "//:80/", "http://a b/"):
        assert "not a URL" in error_of(serve(redirect(to)).at("/x"))


def test_a_redirect_without_end_is_one_sentence(serve: Serve) -> None:
    server = serve(redirect("/y"))
    assert error_of(server.at("/x")) == "the server redirects without end (more than 10 times)"
    assert len(server.requests) == 11


def test_the_body_of_a_redirect_is_not_read_for_ever(serve: Serve) -> None:
    last = serve(says(BODY))
    found = f"HTTP/1.1 302 Found\r\nLocation: {last.at('/y')}\r\n"
    bodies = [
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        "\r\n",
        "Content-Length: 9\r\n\r\n",
    ]
    for body in bodies[:2]:
        assert get(serve(drips((found + body).encode(), b"1\r\nx\r\n")).at("/x")) == b"hello"


PRIVATE = [
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "0.0.0.0"),
    *("100.64.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::a00:1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_known_in_every_form(address: str) -> None:
    assert is_private(address)
    assert names_private_address(address)


def test_public_addresses_are_not_private() -> None:
    for address in (
        "8.8.8.8",
        "172.32.0.1",
        "2606:4700::1111",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
    ):
        assert not is_private(address)


def test_a_private_address_is_known_however_it_is_written() -> None:
    for host in ("2130706433", "0x7f000001", "0177.0.0.1", "127.1", "localhost", "a.LOCALHOST."):
        assert names_private_address(host)
    assert not names_private_address("example.org")


@pytest.fixture
def first_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make 127.0.0.1 an address of the public internet for this test; 127.0.0.2 stays private."""
    real = is_private
    monkeypatch.setattr(
        connections, "is_private", lambda address: address != "127.0.0.1" and real(address)
    )


@pytest.mark.usefixtures("first_is_public")
def test_a_public_server_cannot_redirect_to_a_private_address(serve: Serve) -> None:
    inner = serve(says(BODY), "127.0.0.2")
    refused = "the server redirects to an address of a private network, which is refused"
    assert error_of(serve(redirect(inner.at("/x"))).at("/x")) == refused
    between = serve(redirect(inner.at("/x")))
    assert error_of(serve(redirect(between.at("/y"))).at("/x")) == refused
    assert b"".join(inner.requests) == b""  # connected to at most, and asked for nothing


@pytest.mark.usefixtures("first_is_public")
def test_a_name_that_has_a_private_address_only_when_it_is_used_is_refused(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = serve(says(BODY), "127.0.0.2")
    port = int(inner.host.rpartition(":")[2])
    real = socket.getaddrinfo
    asked: list[str] = []

    def rebinding(host: str, *more: Any, **options: Any) -> Any:
        asked.append(host)
        if host != "rebinding.example":
            return real(host, *more, **options)
        return real("127.0.0.1" if asked.count(host) == 1 else "127.0.0.2", *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    server = serve(redirect(f"http://rebinding.example:{port}/x"))
    assert "a private network" in error_of(server.at("/x"))
    assert asked.count("rebinding.example") == 2


@pytest.mark.usefixtures("first_is_public")
def test_a_private_server_may_redirect_to_another_one_and_to_itself(serve: Serve) -> None:
    inner = serve(says(BODY), "127.0.0.2")
    assert get(serve(redirect(inner.at("/x")), "127.0.0.3").at("/x")) == b"hello"


@pytest.mark.usefixtures("first_is_public")
def test_a_connection_to_a_private_server_is_not_used_again_for_a_redirect(serve: Serve) -> None:
    keep = OK + b"Content-Length: 0\r\n\r\n"

    def twice(connection: socket.socket, _: RawServer) -> None:
        connection.sendall(keep)
        connection.recv(1000)
        connection.sendall(BODY)

    inner = serve(twice, "127.0.0.2")
    client = Client()
    assert get(inner.at("/x"), client=client) == b""
    assert "a private network" in error_of(serve(redirect(inner.at("/x"))).at("/y"), client=client)


def test_a_proxy_is_not_asked_for_a_private_address_that_a_redirect_names(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve(redirect("http://169.254.169.254/latest/meta-data/"))
    monkeypatch.setenv("http_proxy", proxy.at(""))
    monkeypatch.setenv("no_proxy", "")
    assert "a private network" in error_of("http://example.org/x")
    assert len(proxy.requests) == 1


# --- secrets ------------------------------------------------------------------------------


def sent_user(request: bytes) -> str | None:
    for line in request.split(b"\r\n"):
        if line.lower().startswith(b"authorization: basic "):
            return base64.b64decode(line.split()[-1]).decode()
    return None


def test_a_user_is_sent_to_its_own_scheme_host_and_port_only(serve: Serve) -> None:
    last = serve(says(BODY))
    back = serve(redirect(last.at("/x")))
    server = serve(redirect(back.at("/y")))
    assert get(server.at("/x").replace("//", "//us:pa%40%2Fss@")) == b"hello"
    assert sent_user(server.requests[0]) == "us:pa@/ss"
    assert sent_user(back.requests[0]) is sent_user(last.requests[0]) is None


def test_a_user_in_a_redirect_is_not_sent(serve: Serve) -> None:
    last = serve(says(BODY))
    server = serve(redirect(last.at("/x").replace("//", "//other:user@")))
    assert get(server.at("/x")) == b"hello"
    assert sent_user(last.requests[0]) is None


def test_a_server_that_repeats_a_secret_does_not_bring_it_into_an_error(serve: Serve) -> None:
    server = serve(says(b"HTTP/1.1 403 no s3cr3t for t0ken\r\nContent-Length: 0\r\n\r\n"))
    url = server.at("/x?token=t0ken").replace("//", "//user:s3cr3t@")
    assert error_of(url) == "the server answered 403 no *** for ***"


def test_urllib3_logs_no_secret(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    odd = OK + b"Content-Length: 5\r\n\x00 malformed\r\nTransfer-Encoding: x\r\n\r\nhello"
    server = serve(says(odd))
    last = serve(redirect(server.at("/y?id=1&X-Amz-Signature=s3cr3t")))
    get(last.at("/x?id=1&token=s3cr3t").replace("//", "//user:s3cr3t@"))
    assert "/y?id=1" in caplog.text
    assert "s3cr3t" not in caplog.text


def test_an_error_about_a_proxy_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "")
    for proxy in ("http://user:s3cr3t@h:port", "http://user:a/s3cr3t@h:1", "socks5://u:s3cr3t@h:1"):
        monkeypatch.setenv("http_proxy", proxy)
        text = error_of("http://example.org/x")
        assert "proxy" in text
        assert "s3cr3t" not in text


# --- hosts --------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "times"), [(socket.EAI_NONAME, 1), (socket.EAI_AGAIN, 4)])
def test_a_host_without_an_address_is_looked_up_once_for_all_its_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, times: int
) -> None:
    """A failure that may be temporary is one after as many attempts as for any request."""
    asked: list[str] = []

    def unknown(host: str, *_: Any, **__: Any) -> None:
        asked.append(host)
        raise socket.gaierror(code, "Name or service not known")

    monkeypatch.setattr("r2ncli.sources.remote.FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"http://dead.example/{n}.jpg\n" for n in range(20)))
    rows = {outcome(source) for source in find_images([f"@{listed}"], print)}
    assert rows == {"the connection failed (name or service not known)"}
    assert asked == ["dead.example"] * times


def test_threads_that_ask_for_one_dead_host_at_a_time_look_it_up_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    go_on = threading.Event()

    def unknown(host: str, *_: Any, **__: Any) -> None:
        asked.append(host)
        go_on.wait(60)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    client = Client()
    errors: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: errors.append(error_of("http://dead.example/", client=client))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert set(errors) == {"the connection failed (name or service not known)"}
    assert asked == ["dead.example"]
