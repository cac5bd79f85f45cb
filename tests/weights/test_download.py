"""A download arrives whole under its name, or not at all and says why."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import error_of

from r2ncli.architectures import DEFAULT_NETWORK, OFFICIAL_URL, PUBLISHED
from r2ncli.files import take_lock
from r2ncli.web import attempts
from r2ncli.weights import checkpoints, download
from r2ncli.weights.checkpoints import find_checkpoint
from r2ncli.weights.download import DownloadProgress, download_file

FILE = PUBLISHED[DEFAULT_NETWORK].file
HERE = Path("x.pth")


# --- download -----------------------------------------------------------------------------

CONTENT = hashlib.sha256(b"weights").digest() * 40_000  # 1.28 MB: several pieces
DIGITS = hashlib.sha256(CONTENT).hexdigest()[:8]
NAME = f"net-{DIGITS}.pth"


class Request(BaseHTTPRequestHandler):
    """One request, answered by the server's next answer or, when there are none, as asked."""

    server: Server

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers["Range"]))
        answer = self.server.answers.popleft() if self.server.answers else Request.as_asked
        answer(self)

    def as_asked(self) -> None:
        """The file, or the part of it that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if asked is None:
            self.send(200, CONTENT)
        elif int(asked[1]) >= len(CONTENT):
            self.send(416, b"", {"Content-Range": f"bytes */{len(CONTENT)}"})
        else:
            first, last = int(asked[1]), len(CONTENT) - 1
            content_range = f"bytes {first}-{last}/{len(CONTENT)}"
            self.send(206, CONTENT[first:], {"Content-Range": content_range})

    def send(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, cut: int = 0
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) - cut])

    def log_message(self, *_: object) -> None:
        pass


Answer = Callable[[Request], None]


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.answers: deque[Answer] = deque()
        self.requests: list[tuple[str, str | None]] = []

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/res2net/"

    @property
    def address(self) -> str:
        return self.base + NAME

    @property
    def ranges(self) -> list[str | None]:
        return [asked for _, asked in self.requests]


def whole(request: Request) -> None:
    """The whole file, whatever part was asked for."""
    request.send(200, CONTENT)


def broken_after(count: int) -> Answer:
    """The beginning of the file, then the connection ends."""
    return lambda request: request.send(200, CONTENT, cut=len(CONTENT) - count)


def refusal(status: int) -> Answer:
    return lambda request: request.send(status, b"<html>no</html>")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.02,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which are not waited for."""
    waited: list[float] = []
    monkeypatch.setattr(attempts, "sleep", waited.append)
    return waited


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new" / "folder"


def fetch(server: Server, folder: Path, **options: Any) -> Path:
    return download_file(server.address, folder / NAME, **options)


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def leave_a_partial(folder: Path, content: bytes) -> None:
    """What a download that was killed leaves behind."""
    folder.mkdir(parents=True)
    (folder / f"{NAME}.r2n-partial").write_bytes(content)


def test_a_download_arrives_whole_and_tells_its_progress(server: Server, folder: Path) -> None:
    progress: list[DownloadProgress] = []
    path = fetch(server, folder, on_progress=progress.append)
    assert path == folder / NAME
    assert path.read_bytes() == CONTENT
    assert names_in(folder) == [NAME]
    received = [report.received for report in progress]
    assert len(received) > 2
    assert received == sorted(set(received))
    assert received[-1] == len(CONTENT)
    assert {report.total for report in progress} == {len(CONTENT)}
    assert {(report.url, report.destination) for report in progress} == {(server.address, path)}
    assert server.requests == [(f"/res2net/{NAME}", None)]


def test_a_published_name_is_downloaded_from_the_mirror_and_then_found(
    server: Server, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = replace(PUBLISHED[DEFAULT_NETWORK], file=NAME)
    monkeypatch.setitem(PUBLISHED, DEFAULT_NETWORK, network)
    for base in (server.base, server.base.rstrip("/")):
        monkeypatch.setenv("R2N_WEIGHTS_BASE_URL", base)
        assert find_checkpoint() == hub / NAME
        (hub / NAME).unlink()
    assert [path for path, _ in server.requests] == [f"/res2net/{NAME}"] * 2
    find_checkpoint(DEFAULT_NETWORK)
    find_checkpoint(DEFAULT_NETWORK)
    assert len(server.requests) == 3


def test_without_a_mirror_the_official_url_is_asked(
    monkeypatch: pytest.MonkeyPatch, hub: Path
) -> None:
    monkeypatch.delenv("R2N_WEIGHTS_BASE_URL")
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(checkpoints, "download_file", lambda *arguments: asked.append(arguments))
    find_checkpoint()
    assert asked == [(OFFICIAL_URL + FILE, hub / FILE, None)]


@pytest.mark.parametrize(
    "base", ["/mnt/mirror", "mirror.example.org/x", "http://[::1", "s3://x/y", "ftp://x/y"]
)
def test_a_mirror_that_is_no_url_says_so(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R2N_WEIGHTS_BASE_URL", base)
    text = error_of(find_checkpoint)
    assert text.startswith(f"R2N_WEIGHTS_BASE_URL is {base!r}: expected the URL of a mirror")


def test_a_mirror_may_be_a_folder(
    tmp_path: Path, hub: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PUBLISHED, DEFAULT_NETWORK, replace(PUBLISHED[DEFAULT_NETWORK], file=NAME))
    monkeypatch.setenv("R2N_WEIGHTS_BASE_URL", tmp_path.as_uri())
    assert "no such file or directory" in error_of(find_checkpoint)
    (tmp_path / NAME).write_bytes(CONTENT)
    assert find_checkpoint().read_bytes() == CONTENT


def test_a_broken_connection_goes_on_where_it_broke(
    server: Server, folder: Path, naps: list[float]
) -> None:
    def broken_again(request: Request) -> None:
        part = CONTENT[700_000:]
        content_range = f"bytes 700000-{len(CONTENT) - 1}/{len(CONTENT)}"
        request.send(206, part, {"Content-Range": content_range}, cut=len(part) - 5)

    server.answers.extend([broken_after(700_000), broken_again])
    progress: list[DownloadProgress] = []
    assert fetch(server, folder, on_progress=progress.append).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=700000-", "bytes=700005-"]
    assert naps == [1.0, 2.0]
    received = [report.received for report in progress]
    assert received == sorted(received)
    assert {report.total for report in progress} == {len(CONTENT)}


def test_a_download_of_an_earlier_run_goes_on(server: Server, folder: Path) -> None:
    leave_a_partial(folder, CONTENT[:1_000_000])
    progress: list[DownloadProgress] = []
    assert fetch(server, folder, on_progress=progress.append).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000000-"]
    assert progress[0].received > 1_000_000
    assert names_in(folder) == [NAME]


def test_a_download_that_was_whole_but_not_yet_named_is_only_checked(
    server: Server, folder: Path
) -> None:
    leave_a_partial(folder, CONTENT)
    assert fetch(server, folder).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT)}-"]
    assert names_in(folder) == [NAME]


def test_a_partial_longer_than_the_file_is_begun_again(
    server: Server, folder: Path, naps: list[float]
) -> None:
    leave_a_partial(folder, CONTENT + b"more")
    assert fetch(server, folder).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT) + 4}-", None]


def test_a_server_that_knows_no_ranges_sends_it_all_again(server: Server, folder: Path) -> None:
    leave_a_partial(folder, b"x" * 500)
    server.answers.append(whole)
    assert fetch(server, folder).read_bytes() == CONTENT
    assert server.ranges == ["bytes=500-"]


def test_a_broken_connection_to_a_server_without_ranges_begins_again(
    server: Server, folder: Path, naps: list[float]
) -> None:
    server.answers.extend([broken_after(900_000), broken_after(10), whole])
    assert fetch(server, folder).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=900000-", "bytes=10-"]


def test_a_part_from_another_place_is_not_taken_for_the_file(server: Server, folder: Path) -> None:
    def other_part(request: Request) -> None:
        content_range = f"bytes 5-{len(CONTENT) - 1}/{len(CONTENT)}"
        request.send(206, CONTENT[5:], {"Content-Range": content_range})

    leave_a_partial(folder, CONTENT[:500])
    server.answers.append(other_part)
    assert "checksum mismatch" in error_of(fetch, server, folder)
    assert names_in(folder) == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_an_error_of_the_server_is_tried_again_after_a_while(
    status: int, server: Server, folder: Path, naps: list[float]
) -> None:
    server.answers.extend([refusal(status)] * 2)
    assert fetch(server, folder).read_bytes() == CONTENT
    assert naps == [1.0, 2.0]


def test_after_some_attempts_the_error_of_the_server_is_said(
    server: Server, folder: Path, naps: list[float]
) -> None:
    server.answers.extend([refusal(503)] * 50)
    text = error_of(fetch, server, folder)
    assert "the server answered 503 Service Unavailable, 4 times" in text
    assert naps == [1.0, 2.0, 4.0]
    assert len(server.requests) == 4
    assert_says_what_to_do(text, server.address, folder)
    assert names_in(folder) == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_the_server_refuses_is_said_at_once(
    status: int, server: Server, folder: Path, naps: list[float]
) -> None:
    server.answers.append(refusal(status))
    text = error_of(fetch, server, folder)
    assert f"the server answered {status} " in text
    assert naps == []
    assert len(server.requests) == 1
    assert_says_what_to_do(text, server.address, folder)
    assert names_in(folder) == []


def assert_says_what_to_do(text: str, address: str, folder: Path) -> None:
    assert f"get {address} and put it, as {NAME}, into {folder}." in text
    assert text.endswith('`weights="demo"`')
    assert "\n" not in text


def test_wrong_content_is_deleted_and_never_gets_the_name(server: Server, folder: Path) -> None:
    server.answers.append(lambda request: request.send(200, b"<html>please log in</html>"))
    text = error_of(fetch, server, folder)
    digest = hashlib.sha256(b"<html>please log in</html>").hexdigest()
    assert f"checksum mismatch: expected SHA-256 {DIGITS}…, got {digest[:8]}…; " in text
    assert "the download was deleted" in text
    assert_says_what_to_do(text, server.address, folder)
    assert names_in(folder) == []
    assert fetch(server, folder).read_bytes() == CONTENT  # a second try begins anew


def test_a_partial_of_another_file_is_not_continued_for_ever(server: Server, folder: Path) -> None:
    leave_a_partial(folder, b"x" * 1000)
    assert "checksum mismatch" in error_of(fetch, server, folder)
    assert fetch(server, folder).read_bytes() == CONTENT


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def test_a_refused_connection_is_said_at_once(folder: Path, naps: list[float]) -> None:
    address = f"http://127.0.0.1:{free_port()}/{NAME}"
    text = error_of(download_file, address, folder / NAME)
    assert "the connection failed (connection refused)" in text
    assert naps == []
    assert_says_what_to_do(text, address, folder)
    assert names_in(folder) == []


def test_a_name_that_no_one_knows_is_said_at_once(
    folder: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    text = error_of(download_file, f"https://mirror.example.org/{NAME}", folder / NAME)
    assert "the connection failed (name or service not known)" in text
    assert naps == []


def test_a_connection_that_never_comes_is_given_up(
    folder: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = threading.Event()

    def hanging(*_: object, **__: object) -> None:
        given_up.wait(60)
        raise OSError("too late")

    monkeypatch.setattr(download, "OPEN_SECONDS", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    text = error_of(download_file, f"http://mirror.example.org/{NAME}", folder / NAME)
    given_up.set()
    assert "no answer in 0.05 s" in text
    assert naps == []


def test_a_proxy_that_is_not_there_is_said_at_once(
    folder: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    text = error_of(download_file, f"http://mirror.example.org/{NAME}", folder / NAME)
    assert "the connection to the proxy failed (connection refused)" in text
    assert naps == []


def test_a_proxy_is_asked_and_one_that_does_not_apply_is_not(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{server.server_port}")
    address = f"http://mirror.example.org/{NAME}"
    assert download_file(address, folder / NAME).read_bytes() == CONTENT
    assert server.requests == [(address, None)]
    (folder / NAME).unlink()
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetch(server, folder).read_bytes() == CONTENT


def test_a_password_in_the_url_is_not_shown(folder: Path) -> None:
    text = error_of(download_file, "http://user:secret@127.0.0.1:9/net-00000000.pth", folder / FILE)
    assert "http://127.0.0.1:9/net-00000000.pth" in text
    assert "secret" not in text


def test_a_malformed_port_is_an_error_of_the_checkpoint(folder: Path) -> None:
    text = error_of(download_file, f"http://127.0.0.1:x/{NAME}", folder / NAME)
    assert_says_what_to_do(text, f"http://127.0.0.1:x/{NAME}", folder)


def test_a_folder_that_cannot_be_made_or_written_says_so(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text = error_of(fetch, server, tmp_path / "file" / "folder")
    assert text.startswith(f"{tmp_path}/file/folder: cannot be written: not a directory.")
    assert_says_what_to_do(text, server.address, tmp_path / "file" / "folder")
    assert server.requests == []


def test_a_folder_without_permission_says_so(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(download, "open", refusing, raising=False)
    text = error_of(fetch, server, folder)
    assert text.startswith(f"{folder}: cannot be written: permission denied. To do it by hand")


def test_a_full_disk_says_so_and_leaves_nothing_under_the_name(
    server: Server, folder: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.BufferedWriter):
        def write(self, content: Any) -> int:
            if self.tell() > 500_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    monkeypatch.setattr(
        download, "open", lambda path, mode: FullDisk(io.FileIO(path, mode)), raising=False
    )
    text = error_of(fetch, server, folder)
    assert text.startswith(f"{folder}: cannot be written: no space left on device.")
    assert naps == []  # the disk does not become emptier by asking the server again
    assert len(server.requests) == 1
    assert names_in(folder) == [f"{NAME}.r2n-partial"]
    monkeypatch.undo()
    assert fetch(server, folder).read_bytes() == CONTENT


def test_a_file_size_limit_says_so(server: Server, folder: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from r2ncli.weights.download import download_file\n"
        "from r2ncli.errors import CheckpointError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
        "try: download_file(sys.argv[1], Path(sys.argv[2]))\n"
        "except CheckpointError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, server.address, folder / NAME],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"{folder}: cannot be written: file too large.")
    assert done.stderr == ""
    assert NAME not in names_in(folder)


def test_two_downloads_at_once_in_one_process_ask_once(server: Server, folder: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        paths = list(threads.map(lambda _: fetch(server, folder), range(4)))
    assert set(paths) == {folder / NAME}
    assert (folder / NAME).read_bytes() == CONTENT
    assert names_in(folder) == [NAME]
    assert len(server.requests) == 1


def test_two_downloads_at_once_in_two_processes_end_with_one_whole_file(
    server: Server, folder: Path
) -> None:
    def slowly(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(CONTENT)))
        request.end_headers()
        request.wfile.write(CONTENT[:1000])
        time.sleep(0.3)  # the other process comes meanwhile, most likely
        request.wfile.write(CONTENT[1000:])

    server.answers.append(slowly)
    program = (
        "import sys; from pathlib import Path\n"
        "from r2ncli.weights.download import download_file\n"
        "print(download_file(sys.argv[1], Path(sys.argv[2])))\n"
    )
    command = [sys.executable, "-c", program, server.address, folder / NAME]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert (output, errors) == (f"{folder / NAME}\n", "")
    assert (folder / NAME).read_bytes() == CONTENT
    assert names_in(folder) == [NAME]
    assert len(server.requests) == 1


def test_a_file_that_another_process_brought_meanwhile_is_taken(
    server: Server, folder: Path
) -> None:
    leave_a_partial(folder, CONTENT[:10])
    (folder / NAME).write_bytes(CONTENT)
    assert fetch(server, folder) == folder / NAME
    assert server.requests == []
    assert names_in(folder) == [NAME]


def test_an_interrupted_download_keeps_what_came(server: Server, folder: Path) -> None:
    def interrupt(progress: DownloadProgress) -> None:
        if progress.received > 500_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server, folder, on_progress=interrupt)
    assert names_in(folder) == [f"{NAME}.r2n-partial"]
    kept = (folder / f"{NAME}.r2n-partial").stat().st_size
    assert kept > 500_000
    assert fetch(server, folder).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={kept}-"]


def test_a_server_that_accepts_and_never_answers_is_said_at_once(
    server: Server, folder: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    server.answers.append(lambda _request: over.wait(60) and None)
    monkeypatch.setattr(download, "OPEN_SECONDS", 0.1)
    text = error_of(fetch, server, folder)
    over.set()
    assert "no answer in 0.1 s. To do it by hand" in text
    assert naps == []
    assert names_in(folder) == []


def test_a_download_holds_its_lock_while_it_runs_and_leaves_no_lock_file(
    server: Server, folder: Path
) -> None:
    locked: list[bool] = []

    def look(_progress: DownloadProgress) -> None:
        lock = take_lock(folder / f"{NAME}.r2n-partial.lock")
        locked.append(lock is None)

    fetch(server, folder, on_progress=look)
    assert locked
    assert all(locked)
    assert names_in(folder) == [NAME]


# --- mirrors ------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish the file of these tests as the default network."""
    monkeypatch.setitem(PUBLISHED, DEFAULT_NETWORK, replace(PUBLISHED[DEFAULT_NETWORK], file=NAME))


@pytest.mark.usefixtures("published")
def test_a_mirror_may_have_a_user_and_a_query_and_no_word_shows_them(
    server: Server, hub: Path, naps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = server.base.replace("//", "//user:s3cr%2Fet@") + "?sv=1&sig=s1gn%3D&v=2"
    sent: list[str | None] = []

    def with_user(request: Request) -> None:
        sent.append(request.headers["Authorization"])
        whole(request)

    monkeypatch.setenv("R2N_WEIGHTS_BASE_URL", base)
    progress: list[DownloadProgress] = []
    server.answers.extend([refusal(403), with_user])
    text = error_of(find_checkpoint)
    assert f"cannot download {server.address}?v=2: the server answered 403" in text
    assert find_checkpoint(on_progress=progress.append) == hub / NAME
    assert sent == ["Basic " + base64.b64encode(b"user:s3cr/et").decode()]
    assert [path for path, _ in server.requests] == [f"/res2net/{NAME}?sv=1&sig=s1gn%3D&v=2"] * 2
    for said in (text, str(progress)):
        assert not re.search("s3cr|s1gn", said)


@pytest.mark.parametrize("base", ["ftp://u:s3cr3t@h/x", "http://u:a/s3cr3t@h", "s3://k:s3cr3t@b/"])
def test_the_error_about_a_mirror_shows_no_password(
    base: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R2N_WEIGHTS_BASE_URL", base)
    text = error_of(find_checkpoint)
    assert text.startswith("R2N_WEIGHTS_BASE_URL is '")
    assert "s3cr3t" not in text


@pytest.mark.usefixtures("published")
def test_a_mirror_may_be_a_folder_in_the_home_folder(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my mirror").mkdir()
    (tmp_path / "my mirror" / NAME).write_bytes(CONTENT)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("R2N_WEIGHTS_BASE_URL", "file://~/my%20mirror")
    assert find_checkpoint().read_bytes() == CONTENT


def test_weights_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.pth").write_bytes(b"x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint("~/mine.pth") == tmp_path / "mine.pth"
    monkeypatch.setenv("R2N_WEIGHTS", "~/mine.pth")
    assert find_checkpoint() == tmp_path / "mine.pth"
    assert "no such weights: '~/other.pth'" in error_of(find_checkpoint, "~/other.pth")


@pytest.mark.usefixtures("published")
def test_a_folder_called_tilde_is_never_made(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for an unknown user id
    monkeypatch.setenv("R2N_WEIGHTS_BASE_URL", server.base)
    assert "the home folder of this user is unknown" in error_of(find_checkpoint)
    assert names_in(tmp_path) == []
    assert server.requests == []


def test_a_link_at_the_place_of_a_partial_download_is_not_followed(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder.mkdir(parents=True)
    (folder / f"{NAME}.r2n-partial").symlink_to(victim)
    assert fetch(server, folder).read_bytes() == CONTENT
    assert victim.read_text() == "mine"
