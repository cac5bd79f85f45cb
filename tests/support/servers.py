"""A web server on this machine that answers at each path as a test says."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """A web server of this test's own; `answers` says what it does at a path."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: Counter[str] = Counter()
        self.headers: list[Any] = []
        self.over = threading.Event()
        server = self

        class Asked(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.asked[self.path] += 1
                server.headers.append(self.headers)
                self.close_connection = True
                answer = server.answers.get(self.path, status(404))
                try:
                    answer(self)
                except OSError:  # who asked has gone
                    return

            def end_headers(self) -> None:
                self.send_header("Connection", "close")
                super().end_headers()

            def log_message(self, *_: object) -> None:
                return

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Asked)
        self._http.daemon_threads = True
        self.host = f"127.0.0.1:{self._http.server_port}"
        self.thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self.thread.start()

    def at(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def close(self) -> None:
        self.over.set()
        self._http.shutdown()
        self.thread.join()
        self._http.server_close()


def content(body: bytes, code: int = 200, claim: int | None = None, **headers: str) -> Answer:
    def answer(asked: BaseHTTPRequestHandler) -> None:
        asked.send_response(code)
        asked.send_header("Content-Length", str(len(body) if claim is None else claim))
        for name, value in headers.items():
            asked.send_header(name, value)
        asked.end_headers()
        asked.wfile.write(body)

    return answer


def encoded(body: bytes, encoding: str) -> Answer:
    """Send this with a Content-Encoding."""
    return content(body, **{"Content-Encoding": encoding})


def status(code: int) -> Answer:
    return content(b"<html>no", code)


def in_turn(*answers: Answer) -> Answer:
    """Each once, and the last one for ever."""
    left = list(answers)

    def answer(asked: BaseHTTPRequestHandler) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(asked)

    return answer


def moved(to: str) -> Answer:
    return content(b"", 302, Location=to)


def chunked(body: bytes, whole: bool = True) -> Answer:
    def answer(asked: BaseHTTPRequestHandler) -> None:
        asked.send_response(200)
        asked.send_header("Transfer-Encoding", "chunked")
        asked.end_headers()
        for start in range(0, len(body), 100):
            piece = body[start : start + 100]
            asked.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if whole:
            asked.wfile.write(b"0\r\n\r\n")

    return answer


def endless(piece: bytes, server: Server, pause: float = 0.0) -> Answer:
    def answer(asked: BaseHTTPRequestHandler) -> None:
        asked.send_response(200)
        asked.end_headers()
        while not server.over.is_set():
            asked.wfile.write(piece)
            if pause:
                server.over.wait(pause)

    return answer


def silence(server: Server) -> Answer:
    return lambda _asked: server.over.wait() and None


class RawServer:
    """A server that speaks no HTTP by itself: `speak` writes whatever it likes to each socket."""

    def __init__(self, speak: Callable[[socket.socket, RawServer], None], host: str) -> None:
        self.over = threading.Event()
        self.requests: list[bytes] = []
        self._speak = speak
        self._socket = socket.create_server((host, 0))
        self._socket.settimeout(0.02)
        self.host = f"{host}:{self._socket.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def at(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def _accept(self) -> None:
        while not self.over.is_set():
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            self._connections.append(connection)
            thread = threading.Thread(target=self._answer, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(60)
            self.requests.append(connection.recv(1 << 16))
            self._speak(connection, self)

    def close(self) -> None:
        self.over.set()
        self._threads[0].join()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._socket.close()


Speak = Callable[[socket.socket, RawServer], None]


def says(content: bytes) -> Speak:
    """Send this, and close the connection."""
    return lambda connection, _: connection.sendall(content)


def drips(first: bytes, again: bytes, pause: float = 0.02) -> Speak:
    """Send the beginning at once, then the rest in small pieces for ever."""

    def speak(connection: socket.socket, server: RawServer) -> None:
        connection.sendall(first)
        while not server.over.wait(pause):
            connection.sendall(again)

    return speak


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
DRIPS: dict[str, Speak] = {
    "a status line": drips(b"HTTP/1.1 200 O", b"K"),
    "a header": drips(OK + b"X-Long: ", b"x"),
    "headers without end": drips(OK, b"X: y\r\n"),
    "100 Continue without end": drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "the size of a chunk": drips(CHUNKED, b"0"),
    "an extension of a chunk": drips(CHUNKED + b"1;", b"x"),
    "the trailer": drips(CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n"),
    "the body": drips(OK + b"Content-Length: 1000000\r\n\r\n", b"x"),
    "nothing": drips(b"", b""),
}
