"""A web server on this machine that answers at each path as a test says."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
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
