"""The answer of a server, read as it comes."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from r2ncli.files import reason
from r2ncli.web import unpack
from r2ncli.web.attempts import WebError, explained

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

    from r2ncli.web.connections import Clock

SLOWEST = 1000  # bytes a second, of a body whose time is not limited


class Response(io.RawIOBase):
    """The answer of a server; reading gives its body as it comes.

    A Content-Encoding, which nobody asked for, is undone; then `is_unpacked`. Without `steady` the
    body ends at the deadline of its clock; with it, the body may take any time in which `SLOWEST`
    bytes a second come, counted over `steady` seconds of waiting.
    """

    def __init__(self, answer: BaseHTTPResponse, clock: Clock, steady: float | None) -> None:
        super().__init__()
        self.status = answer.status
        self.headers: Mapping[str, str] = answer.headers
        body = _Body(answer, clock, steady)
        make = _unpacker(self.headers.get("Content-Encoding", ""))
        self.is_unpacked = make is not None
        self._body: io.RawIOBase = _Sniffed(body, make) if make else body

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read what has come, at least one byte unless it is the end; raises a `WebError`."""
        try:
            with explained():
                return self._body.readinto(buffer)
        except WebError:
            raise
        except (EOFError, zlib.error) as error:
            raise WebError(
                f"the answer cannot be unpacked ({reason(error)})", may_recover=False
            ) from error

    def close(self) -> None:
        if not self.closed:
            self._body.close()
        super().close()


class _Body(io.RawIOBase):
    """The body of an answer, unchanged."""

    def __init__(self, answer: BaseHTTPResponse, clock: Clock, steady: float | None) -> None:
        super().__init__()
        self._answer = answer
        self._clock = clock
        self._steady = steady
        self._waited = 0.0  # seconds, and
        self._came = 0  # bytes since enough had come

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        began = monotonic()
        if self._steady is not None:
            self._clock.deadline = began + self._steady - self._waited
        piece = self._answer.read1(len(buffer))
        if self._steady is not None:
            self._waited += monotonic() - began
            self._came += len(piece)
            if self._came >= SLOWEST * self._steady:
                self._waited, self._came = 0.0, 0
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._answer.close()  # after a whole body its connection is already back in the pool
        super().close()


class _Sniffed(io.RawIOBase):
    """A body with a Content-Encoding: undone if it begins as such, else taken as it is.

    Some servers name an encoding and send the plain file.
    """

    def __init__(self, body: io.RawIOBase, make: Callable[[], unpack.Unpacker]) -> None:
        super().__init__()
        self._body = body
        self._make = make
        self._plain: io.RawIOBase | None = None
        self._head = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._plain is None:
            self._plain = self._source()
        if head := self._head[: len(buffer)]:
            self._head = self._head[len(head) :]
            buffer[: len(head)] = head
            return len(head)
        return self._plain.readinto(buffer) or 0

    def _source(self) -> io.RawIOBase:
        head = self._body.read(1) or b""
        head += self._body.read(1) or b""
        make = self._make
        if make is unpack.zlib_unpacker and not _is_zlib(head):
            make = unpack.raw_unpacker
        if not head or (make is unpack.gzip_unpacker and head != b"\x1f\x8b"):
            self._head = head
            return self._body
        return unpack.Unpacked(self._body, make, head)

    def close(self) -> None:
        self._body.close()
        super().close()


def _is_zlib(head: bytes) -> bool:
    """Return whether two bytes are the header of a zlib stream."""
    return len(head) == 2 and head[0] & 15 == 8 and int.from_bytes(head, "big") % 31 == 0


def _unpacker(encoding: str) -> Callable[[], unpack.Unpacker] | None:
    """Return what undoes a Content-Encoding; None if there is none."""
    names = {name.strip() for name in encoding.lower().split(",")} - {"", "identity", "none"}
    if not names:
        return None
    if names <= {"gzip", "x-gzip"}:
        return unpack.gzip_unpacker
    if names == {"deflate"}:
        return unpack.zlib_unpacker
    raise WebError(
        f"the server sent it compressed, which was not asked for, as {', '.join(sorted(names))}: "
        "only gzip and deflate are undone",
        may_recover=False,
    )
