"""One HTTP client: patient with servers, bounded in time, and silent about secrets."""

from __future__ import annotations

import base64
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from r2ncli.web import Client, CutOffError, WebError, attempts, retry, within

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """A server that keeps connections open; `answer` says what it does."""

    daemon_threads = True

    def __init__(self, answer: Answer, context: ssl.SSLContext | None = None) -> None:
        self.connections = 0
        self.asked: list[tuple[str, Any]] = []
        server = self

        class Asked(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                server.connections += 1
                super().setup()

            def do_GET(self) -> None:
                server.asked.append((self.path, self.headers))
                answer(self)

            def log_message(self, *_: object) -> None:
                return

        super().__init__(("127.0.0.1", 0), Asked)
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.scheme = "https" if context else "http"

    def handle_error(self, *_: object) -> None:
        return  # a client that does not trust the certificate

    def at(self, path: str) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}{path}"


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """A function that starts a server."""
    running: list[tuple[Server, threading.Thread]] = []

    def start(answer: Answer, context: ssl.SSLContext | None = None) -> Server:
        server = Server(answer, context)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def content(asked: BaseHTTPRequestHandler) -> None:
    asked.send_response(200)
    asked.send_header("Content-Length", "5")
    asked.end_headers()
    asked.wfile.write(b"hello")


def get(client: Client, url: str, seconds: float = 20) -> bytes:
    with client.open(url, time.monotonic() + seconds) as response:
        return response.read()


# --- requests -----------------------------------------------------------------------------


def test_a_connection_is_used_again(serve: Callable[..., Server]) -> None:
    server = serve(content)
    client = Client("my-agent/1")
    assert [get(client, server.at(f"/{n}")) for n in range(5)] == [b"hello"] * 5
    assert server.connections == 1
    assert server.asked[0][1]["User-Agent"] == "my-agent/1"


def test_nothing_is_connected_or_started_before_it_is_used() -> None:
    before = threading.active_count()
    clients = [Client() for _ in range(100)]
    assert threading.active_count() == before
    assert not any(client._pools for client in clients)


def test_a_body_is_read_as_it_comes_though_it_is_called_gzip(
    serve: Callable[..., Server],
) -> None:
    go_on = threading.Event()

    def slowly(asked: BaseHTTPRequestHandler) -> None:
        asked.send_response(200)
        asked.send_header("Content-Length", "4")
        asked.send_header("Content-Encoding", "gzip")
        asked.end_headers()
        asked.wfile.write(b"ab")
        go_on.wait(60)
        asked.wfile.write(b"cd")

    with Client().open(serve(slowly).at("/"), time.monotonic() + 60) as response:
        assert response.read(100) == b"ab"
        go_on.set()
        assert response.read(100) == b"cd"
        assert response.read(100) == b""


def test_a_body_that_is_cut_off_is_an_error(serve: Callable[..., Server]) -> None:
    def cut(asked: BaseHTTPRequestHandler) -> None:
        asked.send_response(200)
        asked.send_header("Content-Length", "4000")
        asked.end_headers()
        asked.wfile.write(b"ab")
        asked.close_connection = True

    with pytest.raises(CutOffError, match="it closed before the end") as raised:
        get(Client(), serve(cut).at("/"))
    assert raised.value.may_recover


@pytest.mark.parametrize(
    ("status", "may_recover"),
    [*((code, True) for code in (408, 425, 429, 500, 503)), (404, False), (304, False)],
)
def test_an_answer_that_says_no_is_an_error_with_its_status(
    serve: Callable[..., Server], status: int, may_recover: bool
) -> None:
    def refusal(asked: BaseHTTPRequestHandler) -> None:
        asked.send_response(status)
        asked.send_header("Content-Length", "0")
        asked.send_header("X-Why", "busy")
        asked.end_headers()

    with pytest.raises(WebError, match=f"the server answered {status} ") as raised:
        get(Client(), serve(refusal).at("/"))
    assert (raised.value.status, raised.value.may_recover) == (status, may_recover)
    assert raised.value.headers["x-why"] == "busy"


def test_a_user_is_sent_through_a_redirect_to_the_same_host_only(
    serve: Callable[..., Server],
) -> None:
    other = serve(content)

    def redirect(asked: BaseHTTPRequestHandler) -> None:
        target = {"/away": other.at("/x"), "/here": "/there"}.get(asked.path)
        if target is None:
            content(asked)
            return
        asked.send_response(302)
        asked.send_header("Location", target)
        asked.send_header("Content-Length", "0")
        asked.end_headers()

    server = serve(redirect)
    url = server.at("/here").replace("//", "//us%40er:pa%3Ass@")
    assert get(Client(), url) == b"hello"
    assert get(Client(), url.replace("here", "away")) == b"hello"
    sent = f"Basic {base64.b64encode(b'us@er:pa:ss').decode()}"
    assert [headers["Authorization"] for _, headers in server.asked] == [sent] * 3
    assert [headers["Authorization"] for _, headers in other.asked] == [None]


def test_a_proxy_is_asked_with_its_user_and_not_for_hosts_that_are_excepted(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = serve(content)
    monkeypatch.setenv("http_proxy", proxy.at("").replace("//", "//user:word@"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert get(Client(), "http://example.org/x?y#z") == b"hello"
    path, headers = proxy.asked[0]
    assert path == "http://example.org/x?y"
    assert headers["Proxy-Authorization"] == f"Basic {base64.b64encode(b'user:word').decode()}"
    direct = serve(content)
    assert get(Client(), direct.at("/")) == b"hello"
    assert len(proxy.asked) == 1


def test_a_url_that_is_none_is_not_tried_again() -> None:
    for url in ("http://", "http:///x", "http://h:port/x", "http://[::1/x"):
        with pytest.raises(WebError, match="not a URL: ") as raised:
            get(Client(), url)
        assert not raised.value.may_recover


def test_the_error_of_a_malformed_url_shows_no_secret() -> None:
    for url in ("http://user:secret@h:port/x?secret", "http://user:secret@h:99999/x?secret"):
        with pytest.raises(WebError, match="not a URL: ") as raised:
            get(Client(), url)
        assert "secret" not in str(raised.value)


# --- certificates -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody trusts, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the program openssl")
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=test", "-keyout", "key.pem"),
            *("-out", "certificate.pem", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder / "certificate.pem", folder / "key.pem"


@pytest.fixture
def secure(serve: Callable[..., Server], certificate: tuple[Path, Path]) -> Server:
    """A server with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return serve(content, context)


def test_an_unknown_certificate_is_refused_at_once(secure: Server) -> None:
    with pytest.raises(WebError, match=r"the connection failed \(.*certificate") as raised:
        get(Client(), secure.at("/"))
    assert not raised.value.may_recover
    assert secure.asked == []


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_a_certificate_that_the_environment_names_is_trusted(
    secure: Server,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    monkeypatch.setenv(variable, str(certificate[0]))
    assert get(Client(), secure.at("/")) == b"hello"


def test_a_bundle_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/bundle.pem")
    with pytest.raises(WebError, match=r"REQUESTS_CA_BUNDLE is '/no/such/bundle\.pem'"):
        get(Client(), "https://127.0.0.1:9/")


# --- time ---------------------------------------------------------------------------------


def test_a_call_that_takes_too_long_is_given_up_and_the_next_one_runs() -> None:
    over = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.05, over.wait)
    assert within(60, lambda: "next") == "next"
    over.set()


def test_what_a_call_raises_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0)


def test_a_call_runs_in_a_daemon_thread_that_ends_with_it() -> None:
    thread = within(60, threading.current_thread)
    assert thread.daemon
    thread.join(60)
    assert not thread.is_alive()


def test_a_name_that_takes_long_to_look_up_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def hanging(*_: object, **__: object) -> None:
        over.wait(60)
        raise OSError("too late")

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    client = Client()
    with pytest.raises(TimeoutError):
        within(0.05, lambda: get(client, "http://mirror.example.org/x"))
    over.set()


def test_an_action_is_tried_again_after_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(attempts, "sleep", pauses.append)

    def failing() -> None:
        raise WebError("busy", may_recover=True)

    with pytest.raises(WebError, match="busy"):
        retry(failing, 0.5)
    assert pauses == [0.5, 1.0, 2.0]
    pauses.clear()
    with pytest.raises(WebError, match="busy"):
        retry(failing, 0.5, deadline=time.monotonic() + 0.4)
    assert pauses == []
