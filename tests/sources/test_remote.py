"""Images that URLs name: patient with servers, and never for ever."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image
from support.archives import tar_bytes, zip_bytes
from support.processes import heed_interrupts
from support.servers import (
    Answer,
    Server,
    chunked,
    content,
    endless,
    in_turn,
    moved,
    silence,
    status,
)
from support.sources import outcome

import r2ncli
from r2ncli.errors import (
    FailedInputError,
    ImageError,
    InputNotFoundError,
    OutputError,
    UsageError,
)
from r2ncli.sources import remote
from r2ncli.sources.remote import is_url
from r2ncli.sources.selection import Selection
from r2ncli.sources.walk import Input, find_images
from r2ncli.web import ATTEMPTS, Client


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 40), colour).save(buffer, "JPEG")
    return buffer.getvalue()


JPEG = picture()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between tries are short."""
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty, whose URLs are read in this test."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(remote, "SCHEMES", (*remote.SCHEMES, "memory"))
        yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


# --- answers ------------------------------------------------------------------------------


def found(*paths: str, **selection: Any) -> list[Input]:
    return list(find_images(paths, print, Selection(**{"timeout": 20.0, **selection})))


def names(*paths: str, **selection: Any) -> list[str]:
    return [source.name for source in found(*paths, **selection)]


def outcomes(*paths: str, **selection: Any) -> dict[str, bytes | str]:
    return {source.name: outcome(source) for source in found(*paths, **selection)}


def read_url(url: str, seconds: float, max_bytes: int) -> bytes:
    return remote.read_url(url, Client(), seconds, max_bytes)


def error_of(url: str, seconds: float = 20.0, max_bytes: int = 10**8) -> str:
    with pytest.raises(ImageError) as raised:
        read_url(url, seconds, max_bytes)
    return str(raised.value)


# --- URLs ----------------------------------------------------------------------------


def test_what_is_a_url_and_what_is_a_path() -> None:
    for text in ("http://h/x", "HTTPS://h", "s3://b/k", "gs://b", "file:///x", "zip://a::s3://b/c"):
        assert is_url(text)
    for text in ("x/http://h", "/a://b", "a.jpg", "C:/x", "://x", "1://x"):
        assert not is_url(text)


# --- http ---------------------------------------------------------------------------------


def test_an_image_at_a_url_is_read(server: Server) -> None:
    server.answers["/x.jpg"] = content(JPEG)
    assert outcomes(server.at("/x.jpg")) == {server.at("/x.jpg"): JPEG}


def test_a_redirect_is_followed_and_the_name_is_the_one_that_was_typed(server: Server) -> None:
    server.answers["/x.jpg"] = moved("/y")
    server.answers["/y"] = content(JPEG)
    assert outcomes(server.at("/x.jpg")) == {server.at("/x.jpg"): JPEG}
    server.answers["/loop"] = moved("/loop")
    assert error_of(server.at("/loop")) == "the server redirects without end (more than 10 times)"


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_what_will_not_get_better_is_a_failed_row_at_once(server: Server, code: int) -> None:
    server.answers["/x.jpg"] = status(code)
    assert re.fullmatch(f"the server answered {code} .*", error_of(server.at("/x.jpg")))
    assert server.asked["/x.jpg"] == 1


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_server_that_fails_for_the_moment_is_asked_again(server: Server, code: int) -> None:
    server.answers["/x.jpg"] = in_turn(status(code), status(code), status(code), content(JPEG))
    assert read_url(server.at("/x.jpg"), 20, 10**6) == JPEG
    assert server.asked["/x.jpg"] == 4


def test_a_server_that_always_fails_is_a_failed_row_that_says_so(server: Server) -> None:
    server.answers["/x.jpg"] = status(503)
    assert error_of(server.at("/x.jpg")) == "the server answered 503 Service Unavailable"
    assert server.asked["/x.jpg"] == ATTEMPTS


def test_no_pause_goes_beyond_the_timeout(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 3600)
    server.answers["/x.jpg"] = status(503)
    assert "503" in error_of(server.at("/x.jpg"))
    assert server.asked["/x.jpg"] == 1


@pytest.mark.parametrize("cut", [content(JPEG[:300], claim=len(JPEG)), chunked(JPEG[:300], False)])
def test_a_connection_that_is_cut_in_the_middle_is_tried_again(server: Server, cut: Answer) -> None:
    server.answers["/x.jpg"] = in_turn(cut, content(JPEG))
    assert read_url(server.at("/x.jpg"), 20, 10**6) == JPEG
    server.answers["/y.jpg"] = cut
    assert error_of(server.at("/y.jpg")) == "the connection failed (it closed before the end)"
    assert server.asked["/y.jpg"] == ATTEMPTS


def test_a_chunked_answer_is_put_together(server: Server) -> None:
    server.answers["/x.jpg"] = chunked(JPEG)
    assert read_url(server.at("/x.jpg"), 20, 10**6) == JPEG


def test_a_server_that_is_not_there_is_a_failed_row() -> None:
    assert error_of("http://127.0.0.1:9/x.jpg") == "the connection failed (connection refused)"
    for url in ("http://", "http:///x.jpg", "http://h:port/x.jpg", "http://[::1/x.jpg"):
        assert error_of(url)


def test_a_slow_drip_ends_with_the_timeout(server: Server) -> None:
    server.answers["/x.jpg"] = endless(b"x", server, 0.05)
    assert error_of(server.at("/x.jpg"), seconds=0.5) == "timed out after 0.5 s"


def test_a_silent_server_ends_with_the_timeout(server: Server) -> None:
    server.answers["/x.jpg"] = silence(server)
    assert error_of(server.at("/x.jpg"), seconds=0.3) == "timed out after 0.3 s"


def test_too_much_is_a_failed_row_whether_it_is_announced_or_endless(server: Server) -> None:
    server.answers["/x.jpg"] = content(bytes(5001))
    assert error_of(server.at("/x.jpg"), max_bytes=5000) == "larger than the limit of 5,000 bytes"
    server.answers["/x.jpg"] = content(bytes(5000))
    assert len(read_url(server.at("/x.jpg"), 20, 5000)) == 5000
    server.answers["/y.jpg"] = endless(bytes(4096), server)
    assert (
        error_of(server.at("/y.jpg"), max_bytes=50_000) == "larger than the limit of 50,000 bytes"
    )
    assert server.asked["/y.jpg"] == 1


def test_an_empty_answer_is_an_empty_file(server: Server) -> None:
    server.answers["/x.jpg"] = content(b"")
    assert error_of(server.at("/x.jpg")) == "empty file"


def test_a_page_instead_of_an_image_is_a_failed_row(server: Server, tiny_weights: Path) -> None:
    server.answers["/x.jpg"] = content(b"<!doctype html><title>Log in</title>")
    (row,) = r2ncli.classify([server.at("/x.jpg")], weights=tiny_weights)
    assert row.path == server.at("/x.jpg")
    assert row.error


def test_a_name_and_a_password_are_sent_and_never_shown(server: Server) -> None:
    server.answers["/x.jpg"] = content(JPEG)
    url = f"http://us%40er:pa%3Ass@{server.host}/x.jpg"
    assert outcomes(url) == {server.at("/x.jpg"): JPEG}
    sent = server.headers[-1]["Authorization"]
    assert base64.b64decode(sent.removeprefix("Basic ")) == b"us@er:pa:ss"
    del server.answers["/x.jpg"]
    ((name, error),) = outcomes(url).items()
    assert "ss" not in name
    assert "pa" not in str(error)


def test_a_password_is_not_sent_to_another_server(server: Server) -> None:
    other = Server()
    try:
        server.answers["/x.jpg"] = moved(other.at("/y.jpg"))
        other.answers["/y.jpg"] = content(JPEG)
        assert read_url(f"http://user:secret@{server.host}/x.jpg", 20, 10**6) == JPEG
        assert server.headers[-1]["Authorization"]
        assert other.headers[-1]["Authorization"] is None
    finally:
        other.close()


def test_a_query_is_sent_and_is_part_of_the_name_without_its_secrets(server: Server) -> None:
    server.answers["/x.jpg?id=1&token=secret&b=%20"] = content(JPEG)
    assert outcomes(server.at("/x.jpg?id=1&token=secret&b=%20#here")) == {
        server.at("/x.jpg?id=1&b=%20"): JPEG
    }


def test_spaces_and_letters_of_all_scripts_may_be_in_a_url(server: Server) -> None:
    server.answers["/a%20b/%C3%A9.jpg"] = content(JPEG)
    assert outcomes(server.at("/a b/é.jpg")) == {server.at("/a b/é.jpg"): JPEG}
    assert outcomes(server.at("/a%20b/%C3%A9.jpg")) == {server.at("/a%20b/%C3%A9.jpg"): JPEG}


def test_images_of_many_urls_come_in_input_order(server: Server, tiny_weights: Path) -> None:
    def late(number: int) -> Answer:
        def answer(asked: BaseHTTPRequestHandler) -> None:
            time.sleep(0.001 * (number * 7 % 40))
            content(JPEG)(asked)

        return answer

    urls = [server.at(f"/{n}.jpg") for n in range(60)]
    server.answers.update({f"/{n}.jpg": late(n) for n in range(60)})
    rows = list(r2ncli.classify(urls, weights=tiny_weights, batch_size=7, workers=2))
    assert [row.path for row in rows] == urls
    assert {row.error for row in rows} == {None}


# --- archives at a URL ---------------------------------------------------------------


MEMBERS = {f"{n}.jpg": os.urandom(3000) for n in range(6)}


@pytest.mark.parametrize("answer", [content, chunked])
@pytest.mark.parametrize(("suffix", "pack"), [(".tar", bytes), (".tar.gz", gzip.compress)])
def test_a_tar_at_a_url_is_read_as_it_comes(
    server: Server,
    suffix: str,
    pack: Callable[[bytes], bytes],
    answer: Callable[[bytes], Answer],
) -> None:
    server.answers[f"/a{suffix}?k"] = answer(pack(tar_bytes(MEMBERS)))
    name = server.at(f"/a{suffix}?k")
    assert outcomes(name) == {f"{name}!{n}": body for n, body in MEMBERS.items()}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_whose_connection_is_cut_is_a_failed_row(server: Server, suffix: str) -> None:
    whole = tar_bytes(MEMBERS)
    whole = gzip.compress(whole) if suffix == ".tar.gz" else whole
    name = server.at("/a" + suffix)
    for cut in (content(whole[:9000], claim=len(whole)), chunked(whole[:9000], False)):
        server.answers["/a" + suffix] = cut
        rows = outcomes(name)
        assert list(rows)[-1] == name
        assert re.fullmatch("cannot be read(| beyond member .): it is cut off", str(rows.pop(name)))
        assert all(rows[f"{name}!{n}"] == MEMBERS[n] for n in list(MEMBERS)[: len(rows)])


def test_a_tar_that_is_not_there_or_none_is_a_failed_row(server: Server) -> None:
    name = server.at("/a.tar")
    assert outcomes(name) == {name: "the server answered 404 Not Found"}
    server.answers["/a.tar"] = content(b"<html>" * 999)
    assert outcomes(name) == {name: "not a tar archive, or its beginning is corrupted"}


def test_a_zip_at_a_url_is_a_failed_row_that_says_what_to_do(server: Server) -> None:
    server.answers["/a.zip"] = content(zip_bytes(MEMBERS))
    name = server.at("/a.zip")
    assert outcomes(name) == {name: "a zip archive cannot be read over http(s): download it first"}
    assert server.asked["/a.zip"] == 0


# --- runs ---------------------------------------------------------------------------------


def test_a_run_over_urls_ends_with_its_failed_rows_and_resumes(
    server: Server, tmp_path: Path, tiny_weights: Path
) -> None:
    server.answers.update({f"/{n}.jpg": content(JPEG) for n in range(20)})
    server.answers["/5.jpg"] = status(503)
    listed = tmp_path / "list.txt"
    listed.write_text("".join(server.at(f"/{n}.jpg") + "\n" for n in range(20)))
    options: dict[str, Any] = {"weights": tiny_weights, "batch_size": 4}
    record = r2ncli.classify_to(tmp_path / "whole.csv", [f"@{listed}"], **options)
    assert record["counts"] == {"inputs": 20, "ok": 19, "failed": 1}

    def stop(progress: r2ncli.Progress) -> None:
        if progress.done >= 9:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        r2ncli.classify_to(tmp_path / "x.csv", [f"@{listed}"], on_progress=stop, **options)
    server.asked.clear()
    r2ncli.classify_to(tmp_path / "x.csv", [f"@{listed}"], resume=True, **options)
    assert (tmp_path / "x.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert set(server.asked) == {f"/{n}.jpg" for n in range(12, 20)}  # whole batches are kept


def test_on_error_fail_keeps_what_was_done_and_goes_on_with_that_image(
    server: Server, tmp_path: Path, tiny_weights: Path
) -> None:
    urls = [server.at(f"/{n}.jpg") for n in range(12)]
    server.answers.update({f"/{n}.jpg": content(JPEG) for n in range(12)})
    server.answers["/7.jpg"] = status(404)
    out = tmp_path / "x.csv"
    options: dict[str, Any] = {"weights": tiny_weights, "batch_size": 2, "on_error": "fail"}
    with pytest.raises(FailedInputError, match=r"/7\.jpg: the server answered 404") as raised:
        r2ncli.classify_to(out, urls, **options)
    assert raised.value.exit_code == 7
    assert not out.exists()
    server.answers["/7.jpg"] = content(JPEG)
    server.asked.clear()
    record = r2ncli.classify_to(out, urls, resume=True, **options)
    assert record["counts"] == {"inputs": 12, "ok": 12, "failed": 0}
    assert set(server.asked) == {f"/{n}.jpg" for n in range(7, 12)}
    with out.open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == urls


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_a_server_is_silent_keeps_what_was_done(
    server: Server, tmp_path: Path, tiny_weights: Path, number: signal.Signals
) -> None:
    server.answers.update({f"/{n}.jpg": content(JPEG) for n in range(8)})
    del server.answers["/3.jpg"]  # its row is on stderr as soon as it is there
    server.answers["/4.jpg"] = silence(server)
    out = tmp_path / "x.csv"
    command = [
        *(sys.executable, "-m", "r2ncli", "classify", "-b", "2", "-o", str(out)),
        *("--weights", str(tiny_weights), *(server.at(f"/{n}.jpg") for n in range(8))),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(r2ncli.__file__).parents[1])}
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONWARNINGS": "ignore"},
        preexec_fn=heed_interrupts,
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(server.at("/3.jpg"))
        process.send_signal(number)
        said = process.stderr.read()  # to its end: the server is silent all the while
        assert process.wait() == (130 if number == signal.SIGINT else 143)
    assert "interrupted: finished rows are kept in" in said
    assert "continue with --resume" in said
    assert "Traceback" not in said
    server.answers["/4.jpg"] = content(JPEG)
    server.asked.clear()
    ended = subprocess.run([*command, "--resume", "-q"], env=environment, check=False)
    assert ended.returncode == 7
    assert "/0.jpg" not in server.asked
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [server.at(f"/{n}.jpg") for n in range(8)]
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["failed"] + ["ok"] * 4


# --- what fsspec opens --------------------------------------------------------------------


def fill(memory: Any, *paths: str) -> None:
    for path in paths:
        memory.pipe(path, path.encode())


def test_a_folder_of_fsspec_is_walked_in_the_order_of_a_walk(memory: Any) -> None:
    fill(memory, "/p/b.jpg", "/p/a/z.jpg", "/p/a/m/x.jpg", "/p/a/B.jpg", "/p/Z/q.jpg", "/p/a-b/k.jpg")  # fmt: skip # noqa: E501
    fill(memory, "/p/.hidden/h.jpg", "/p/.h.jpg", "/p/notes.txt", "/p/__MACOSX/a.jpg", "/o/x.jpg")
    expected = ["b.jpg", "Z/q.jpg", "a/B.jpg", "a/z.jpg", "a/m/x.jpg", "a-b/k.jpg"]
    for argument in ("memory://p", "memory://p/"):
        assert outcomes(argument) == {f"memory://p/{n}": f"/p/{n}".encode() for n in expected}
        assert names(argument) == [f"memory://p/{n}" for n in expected]
    assert names("memory://")[0] == "memory://o/x.jpg"
    assert all(source.remote for source in found("memory://p"))
    assert names("memory://p", exclude=("a*",)) == ["memory://p/b.jpg", "memory://p/Z/q.jpg"]


def test_a_file_of_fsspec_is_always_tried(memory: Any) -> None:
    fill(memory, "/p/notes.txt", "/p/a[1].jpg")
    assert outcomes("memory://p/notes.txt") == {"memory://p/notes.txt": b"/p/notes.txt"}
    assert outcomes("memory://p/a[1].jpg") == {"memory://p/a[1].jpg": b"/p/a[1].jpg"}


def test_a_pattern_of_fsspec_matches_in_order(memory: Any) -> None:
    fill(memory, "/p/b.jpg", "/p/a.jpg", "/p/c.png", "/p/sub/d.jpg", "/p/.e.jpg", "/p/.f/g.jpg")
    assert names("memory://p/*.jpg") == ["memory://p/a.jpg", "memory://p/b.jpg"]
    assert names("memory://p/[bc].*") == ["memory://p/b.jpg", "memory://p/c.png"]
    assert names("memory://p/*") == [
        *(f"memory://p/{n}" for n in ("a.jpg", "b.jpg", "c.png", "sub/d.jpg")),
    ]
    assert names("memory://p/**/*.jpg") == [
        *(f"memory://p/{n}" for n in ("a.jpg", "b.jpg", "sub/d.jpg")),
    ]
    with pytest.raises(InputNotFoundError, match=r"memory://p/\*\.gif, and nothing matches it"):
        find_images(["memory://p/*.gif"], print)


def test_a_local_file_by_its_url_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"x")
    assert outcomes(f"file://{tmp_path}/x.jpg") == {f"file://{tmp_path}/x.jpg": b"x"}
    assert outcomes(f"file://{tmp_path}") == {f"file://{tmp_path}/x.jpg": b"x"}
    assert outcomes(f"file://{tmp_path}/*.jpg") == {f"file://{tmp_path}/x.jpg": b"x"}


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".tar", tar_bytes(MEMBERS)),
        (".tar.gz", gzip.compress(tar_bytes(MEMBERS))),
        (".zip", zip_bytes(MEMBERS)),
    ],
)
def test_an_archive_of_fsspec_is_read_in_place(
    memory: Any, tmp_path: Path, suffix: str, content: bytes
) -> None:
    memory.pipe("/a" + suffix, content)
    (tmp_path / ("a" + suffix)).write_bytes(content)
    for name in (f"memory://a{suffix}", f"file://{tmp_path}/a{suffix}"):
        assert outcomes(name) == {f"{name}!{n}": body for n, body in MEMBERS.items()}


def test_what_is_missing_in_fsspec_is_said_before_anything_runs(memory: Any) -> None:
    for url in ("memory://x.jpg", "memory://x", "memory://a.zip", "memory://a.tar"):
        with pytest.raises(InputNotFoundError, match=f"no such file or folder: {url}"):
            find_images([url], print)


def test_an_unknown_or_missing_file_system_is_a_usage_error() -> None:
    for url in ("nonsense://b/x.jpg", "nonsense://b/*.jpg"):
        with pytest.raises(UsageError, match="nonsense"):
            find_images([url], print)
    with pytest.raises(UsageError, match="s3fs"):
        find_images(["s3://key:secret@bucket/x.jpg"], print)


def test_without_fsspec_the_way_to_get_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UsageError, match=r"pip install fsspec$") as raised:
        find_images(["s3://bucket/x.jpg"], print)
    assert raised.value.exit_code == 2


def test_a_url_in_a_list_that_cannot_be_opened_is_a_row_and_no_end(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(memory, "/p/a.jpg")
    listed = tmp_path / "list.txt"
    entries = ["memory://gone.jpg", "memory://gone", "nonsense://x", "nonsense://x.jpg"]
    entries += ["nonsense://a.zip", "memory://gone.tar", "s3://k:s@b/x.jpg", "memory://p"]
    listed.write_text("\n".join(entries))
    rows = outcomes(f"@{listed}")
    assert list(rows) == [*entries[:6], "s3://b/x.jpg", "memory://p/a.jpg"]
    assert rows.pop("memory://p/a.jpg") == b"/p/a.jpg"
    assert all(isinstance(row, str) and "k:s" not in row for row in rows.values())
    monkeypatch.setitem(sys.modules, "fsspec", None)
    rows = {name: str(row) for name, row in outcomes(f"@{listed}").items()}
    assert {name for name, row in rows.items() if "pip install" in row} == {
        *("memory://gone.jpg", "memory://gone", "memory://gone.tar", "s3://b/x.jpg", "memory://p"),
    }


def test_whatever_a_file_system_raises_is_a_row_or_an_exit_code(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoCredentialsError(Exception):
        """As botocore's: no OSError."""

    def refusing(*_: object, **__: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    fill(memory, "/p/a.jpg", "/p/sub/b.jpg")
    for method in ("isdir", "exists", "glob", "open", "ls", "info"):
        monkeypatch.setattr(type(memory), method, refusing)
    assert outcomes("memory://p/a.jpg") == {
        "memory://p/a.jpg": "cannot be read: unable to locate credentials"
    }
    monkeypatch.undo()
    monkeypatch.setattr(type(memory), "glob", refusing)
    with pytest.raises(InputNotFoundError, match="unable to locate credentials"):
        find_images(["memory://p/x*"], print)
    monkeypatch.setattr(type(memory), "glob", lambda *_, **__: {"/p/x.jpg": {"no": "type"}})
    with pytest.raises(InputNotFoundError, match="cannot be opened: 'type'"):
        find_images(["memory://p/x*"], print)
    monkeypatch.setattr(type(memory), "ls", lambda *_, **__: [{"name": None}])
    monkeypatch.setattr(type(memory), "isdir", lambda *_: True)
    assert str(outcomes("memory://p")["memory://p"]).startswith("the folder cannot be listed: ")
    monkeypatch.setattr(type(memory), "ls", refusing)
    assert outcomes("memory://p") == {
        "memory://p": "the folder cannot be listed: unable to locate credentials"
    }


class Hanging:
    """A file of fsspec whose server says nothing more."""

    def __init__(self, over: threading.Event) -> None:
        self.over = over

    def read(self, _size: int = -1) -> bytes:
        self.over.wait(60)
        return b""

    def close(self) -> None:
        return


@pytest.fixture
def over() -> Iterator[threading.Event]:
    """Set at the end of a test, so that what hangs ends."""
    event = threading.Event()
    yield event
    event.set()


def test_the_timeout_bounds_a_blocked_read_of_fsspec(
    memory: Any, monkeypatch: pytest.MonkeyPatch, over: threading.Event
) -> None:
    fill(memory, "/p/a.jpg")
    monkeypatch.setattr(type(memory), "open", lambda *_, **__: Hanging(over))
    (source,) = found("memory://p/a.jpg", timeout=0.1)
    assert outcome(source) == "timed out after 0.1 s"
    assert not over.is_set()


def test_the_timeout_bounds_a_blocked_read_in_a_zip_of_fsspec(
    memory: Any, monkeypatch: pytest.MonkeyPatch, over: threading.Event
) -> None:
    memory.pipe("/a.zip", zip_bytes(MEMBERS))
    source, *_ = found("memory://a.zip", timeout=1.0)
    hanging = io.BytesIO()
    hanging.seek = lambda *_: over.wait(60) and 0  # type: ignore[method-assign]
    monkeypatch.setattr(type(memory), "open", lambda *_, **__: hanging)
    assert outcome(source) == "timed out after 1 s"


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
def test_the_timeout_bounds_a_blocked_read_of_an_archive_of_fsspec(
    memory: Any, monkeypatch: pytest.MonkeyPatch, over: threading.Event, name: str
) -> None:
    memory.pipe(f"/{name}", b"x")
    hanging = io.BytesIO()
    hanging.read = lambda *_: over.wait(60) and b""  # type: ignore[method-assign]
    hanging.seek = lambda *_: 1000  # type: ignore[method-assign]
    monkeypatch.setattr(type(memory), "open", lambda *_, **__: hanging)
    ((row, error),) = outcomes(f"memory://{name}", timeout=0.1).items()
    assert row == f"memory://{name}"
    assert "timed out after 0.1 s" in str(error)


def test_the_timeout_bounds_the_look_at_an_argument(
    memory: Any, monkeypatch: pytest.MonkeyPatch, over: threading.Event
) -> None:
    monkeypatch.setattr(type(memory), "isdir", lambda *_: over.wait(60))
    with pytest.raises(InputNotFoundError, match=r"memory://p: .*timed out after 0\.1 s"):
        found("memory://p", timeout=0.1)


def test_a_file_whose_closing_fails_costs_no_row(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.BytesIO):
        def close(self) -> None:
            raise RuntimeError("no")

    archives = {".tar": tar_bytes(MEMBERS), ".zip": zip_bytes(MEMBERS)}
    for suffix, body in archives.items():
        memory.pipe(f"/a{suffix}", body)
    for suffix, body in archives.items():
        monkeypatch.setattr(type(memory), "open", lambda *_, made=body, **__: Failing(made))
        assert list(outcomes(f"memory://a{suffix}").values()) == list(MEMBERS.values())


def test_a_folder_that_a_server_invents_without_end_is_a_failed_row(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(memory, "/d/a.jpg")

    def invented(_: Any, path: str, **__: Any) -> list[dict[str, str]]:
        return [{"name": f"{path}/d", "type": "directory"}]

    monkeypatch.setattr(type(memory), "ls", invented)
    ((name, error),) = outcomes("memory://d").items()
    assert name.startswith("memory://d/d/d/")
    assert error == "the folder cannot be listed: it is in more than 100 folders"


def test_the_timeout_bounds_a_pattern_and_a_listing(
    memory: Any, monkeypatch: pytest.MonkeyPatch, over: threading.Event
) -> None:
    fill(memory, "/d/a.jpg")
    monkeypatch.setattr(type(memory), "ls", lambda *_, **__: over.wait(60))
    monkeypatch.setattr(type(memory), "glob", lambda *_, **__: over.wait(60))
    assert outcomes("memory://d", timeout=0.1) == {
        "memory://d": "the folder cannot be listed: timed out after 0.1 s"
    }
    with pytest.raises(InputNotFoundError, match=r"timed out after 0\.1 s"):
        found("memory://d/*", timeout=0.1)


UNREACHABLE = "ftp://user:secret@127.0.0.1:9"  # nothing listens there


def test_a_server_that_cannot_be_reached_is_an_error_of_the_argument() -> None:
    for argument in ("", "/", "/x.jpg", "/*.jpg", "/**/*.jpg", "/a.tar", "/a.zip"):
        with pytest.raises(InputNotFoundError, match="cannot be opened: connection ref") as raised:
            find_images([UNREACHABLE + argument], print)
        assert "secret" not in str(raised.value)


def test_a_server_that_cannot_be_reached_is_a_failed_row_of_a_list(tmp_path: Path) -> None:
    entries = ["", "/x", "/x.jpg", "/a.tar", "/a.zip", "/d/"]
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{UNREACHABLE}{entry}\n" for entry in entries))
    rows = outcomes(f"@{listed}")
    assert list(rows) == [f"ftp://127.0.0.1:9{entry}" for entry in entries]
    for row in rows.values():
        assert "connection refused" in str(row)
        assert "secret" not in str(row)


def test_whatever_a_constructor_of_fsspec_raises_is_handled(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: object, **__: object) -> None:
        raise RuntimeError("No Credentials")

    monkeypatch.setattr(type(memory), "_get_kwargs_from_urls", refusing)
    for argument in ("memory://p", "memory://p/*.jpg", "memory://p/a.jpg"):
        with pytest.raises(InputNotFoundError, match="cannot be opened: no credentials"):
            find_images([argument], print)
    (tmp_path / "list.txt").write_text("memory://p\nmemory://p/a.jpg\n")
    rows = outcomes(f"@{tmp_path}/list.txt")
    assert rows == {
        "memory://p": "cannot be opened: no credentials",
        "memory://p/a.jpg": "cannot be read: no credentials",
    }


def test_what_comes_from_a_server_has_no_stamp_and_no_path(server: Server, memory: Any) -> None:
    server.answers["/x.jpg"] = content(JPEG)
    fill(memory, "/a.jpg")
    memory.pipe("/a.zip", zip_bytes(MEMBERS))
    for source in found(server.at("/x.jpg"), "memory://a.jpg", "memory://a.zip"):
        assert source.read(10**6).stamp is None
        assert source.path is None


# --- what servers are told ------------------------------------------------------------------


def test_servers_are_told_who_asks(server: Server, tiny_weights: Path) -> None:
    server.answers["/x.jpg"] = content(JPEG)
    list(r2ncli.classify(server.at("/x.jpg"), weights=tiny_weights))
    list(r2ncli.classify(server.at("/x.jpg"), weights=tiny_weights, user_agent="mine/1 (me@h)"))
    agents = [headers["User-Agent"] for headers in server.headers]
    assert agents == [
        f"r2n/{r2ncli.__version__} (image classification with Res2Net)",
        "mine/1 (me@h)",
    ]


@pytest.mark.parametrize("agent", [" ", "a\r\nX: y", "a\0", "ä", "x" * 1001])
def test_a_user_agent_that_is_no_line_of_ascii_is_a_usage_error(agent: str) -> None:
    with pytest.raises(UsageError, match=r"`user_agent` must be one line of ASCII"):
        r2ncli.classify("x.jpg", user_agent=agent)


def test_a_proxy_is_asked_for_an_international_host_in_ascii(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers["http://xn--bcher-kva.example/x.jpg"] = content(JPEG)
    monkeypatch.setenv("http_proxy", server.at(""))
    monkeypatch.setenv("no_proxy", "")
    name = "http://bücher.example/x.jpg"
    assert outcomes(name) == {name: JPEG}
    assert server.headers[0]["Host"] == "xn--bcher-kva.example"


def test_a_run_is_not_resumed_with_another_query(
    server: Server, tmp_path: Path, tiny_weights: Path
) -> None:
    for number in (1, 2):
        server.answers[f"/image.php?id={number}&sig=a"] = content(JPEG)
        server.answers[f"/image.php?id={number}&sig=b"] = content(JPEG)
    out = tmp_path / "x.csv"
    options: dict[str, Any] = {"weights": tiny_weights}
    r2ncli.classify_to(out, server.at("/image.php?id=1&sig=a"), **options)
    r2ncli.classify_to(out, server.at("/image.php?id=1&sig=b"), resume=True, **options)
    assert sum(server.asked.values()) == 1  # another signature is the same input
    with pytest.raises(OutputError, match=r"it has .*id=1, now there is .*id=2"):
        r2ncli.classify_to(out, server.at("/image.php?id=2&sig=b"), resume=True, **options)
