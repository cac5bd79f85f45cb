"""Entries of a list, and arguments, that mean harm: a failed row or an exit code, always."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support.sources import outcome

from r2ncli.errors import InputNotFoundError, UsageError
from r2ncli.sources import remote
from r2ncli.sources.selection import Selection
from r2ncli.sources.walk import Input, find_images

ALLOWED = "allowed are URLs of http, https, file, ftp, s3, gs, gcs, az, abfs, abfss, hf"
FOREIGN = sorted(
    set(fsspec.available_protocols()) - set(remote.SCHEMES) | {"nonsense", "javascript", "s3a"}
)


def in_list(here: Path, *entries: str, **selection: Any) -> list[Input]:
    names = "\0".join(entries).encode("utf-8", "surrogateescape")
    (here / "list").write_bytes(names)
    return list(find_images(["@list"], print, Selection(null=True, timeout=2, **selection)))


@pytest.fixture
def no_file_system(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The schemes that fsspec was asked for; it opens nothing."""
    asked: list[str] = []

    def refusing(scheme: str) -> None:
        asked.append(scheme)
        raise ImportError("not in this test")

    monkeypatch.setattr(fsspec, "get_filesystem_class", refusing)
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_: asked.append("url_to_fs"))
    return asked


@pytest.mark.parametrize("scheme", FOREIGN)
@pytest.mark.parametrize("rest", ["x.jpg", "x/*.jpg", "x.zip", ""])
def test_another_scheme_is_refused_and_what_is_allowed_is_said(
    here: Path, no_file_system: list[str], scheme: str, rest: str
) -> None:
    for url in (f"{scheme}://{rest}", f"{scheme.upper()}://{rest}"):
        with pytest.raises(UsageError, match=ALLOWED):
            find_images([url], print)
        (source,) = in_list(here, url)
        assert source.name == url
        assert ALLOWED in str(outcome(source))
    assert no_file_system == []


@pytest.mark.parametrize(
    "chain",
    [
        "simplecache::http://h/x.jpg",
        "filecache::s3://b/x.jpg",
        "zip::file:///x.zip",
        "reference::file:///x.json",
        "reference://a.jpg::data:application/json;base64,e30=",
        "zip://a.jpg::http://h/a.zip",
        "zip://a.jpg::simplecache::http://h/a.zip",
        "s3::http://h/x.jpg",
        "http::s3://b/x.jpg",
    ],
)
def test_a_chain_is_refused_and_what_is_allowed_is_said(
    here: Path, no_file_system: list[str], chain: str
) -> None:
    with pytest.raises(UsageError, match=ALLOWED):
        find_images([chain], print)
    (source,) = in_list(here, chain)
    assert ALLOWED in str(outcome(source))
    assert no_file_system == []


def test_a_key_of_an_object_store_with_two_colons_is_no_chain(
    here: Path, no_file_system: list[str]
) -> None:
    """The library for the scheme gets the whole URL; fsspec takes no second one from it."""
    for url in ("s3://bucket/a::b.jpg", "s3://bucket/x::reference://y.jpg"):
        (source,) = in_list(here, url)
        assert str(outcome(source)).endswith("not in this test")
    assert no_file_system == ["s3", "s3"]


def test_a_list_entry_that_renders_templates_runs_nothing(here: Path) -> None:
    """The entry that ran a command with fsspec before 2026.6."""
    program = "print(*__import__('sys').modules)"
    entry = "reference://a.jpg::data:application/json;base64," + "e30="
    (source,) = in_list(here, entry)
    assert ALLOWED in str(outcome(source))
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "from r2ncli.sources.walk import find_images\n"
            "(one,) = find_images(['@list'], print)\n"
            "try: one.read(1000)\n"
            "except Exception: " + program,
        ],
        cwd=here,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "fsspec" not in done.stdout.split()


ODD_HOSTS = [
    *("", ":", ":80", "@", "u:p@", "u:p@:80", "h:port", "h:99999", "h:-1", "h:", "[::1", "[zz]"),
    *("[::1]:x", "[", "]", " ", "a b", "a..b", ".", "..", "%", "%zz", "%00", "*", "[ab]*", "?"),
    *("a" * 70, "a." * 200, "a" * 40_000, "\u2100", "é..b", "xn--", "\U0001f600", "\udcff"),
    *("h\x00", "h\n", "h\r\nX: y", "h\x7f", "h\x1b[31m", "h\\x", "127.0.0.1:9", "127.0.0.1:0"),
    *("u:a/b@h", "u:a@b/c@h", "u:p@u:p@h", "h#", "h?", "-", "~", "$HOME", "{{7*7}}"),
]


@pytest.mark.parametrize("scheme", [*remote.SCHEMES, "nonsense", "HTTP", "S3"])
@pytest.mark.parametrize("rest", ["", "/", "/x.jpg", "/*.jpg", "/a.zip", "/a.tar", "/%zz\x00"])
def test_whatever_is_odd_about_a_url_is_a_failed_row_or_an_exit_code(
    here: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, rest: str
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    entries = [f"{scheme}://{host}{rest}" for host in ODD_HOSTS if scheme != "file" or host]
    for entry in entries:
        with suppress(UsageError, InputNotFoundError):
            for source in find_images([entry], print, Selection(timeout=2)):
                assert isinstance(outcome(source), str)
    entries = [entry for entry in entries if "\0" not in entry]
    rows = in_list(here, *entries)
    assert len(rows) >= len([entry for entry in entries if "~" not in entry])
    assert all(isinstance(outcome(source), str) for source in rows)


@pytest.mark.slow
def test_no_traceback_is_printed_for_a_server_of_ftp_that_is_not_there(here: Path) -> None:
    (here / "list").write_text("ftp://127.0.0.1:9/x.jpg\nftp://127.0.0.1:9/y\n")
    program = (
        "from r2ncli.sources.walk import find_images\n"
        "for one in find_images(['@list'], print):\n"
        "    try: one.read(1000)\n"
        "    except Exception as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=here, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("connection refused") == 2
    assert done.stderr == ""


# --- paths --------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["/", "//", "/.", "/..", "/tmp/..", "///", "file:///", "file:/"])
def test_a_list_never_walks_the_whole_machine(here: Path, entry: str) -> None:
    (source,) = in_list(here, entry)
    assert source.name == entry
    assert "the root folder: a list does not search a whole machine" in str(outcome(source))


def test_a_link_to_the_root_folder_is_not_followed(here: Path) -> None:
    (here / "photos").mkdir()
    (here / "photos/all").symlink_to("/")
    (here / "photos/a.jpg").write_bytes(b"x")
    said: list[str] = []
    assert [one.name for one in find_images(["photos"], said.append)] == ["photos/a.jpg"]
    assert said == ["photos/all: a link back to a folder above it, not followed"]
    (here / "all").symlink_to("/")
    (source,) = in_list(here, "all")
    assert "the root folder" in str(outcome(source))


def test_an_empty_entry_between_nul_bytes_is_a_failed_row(here: Path) -> None:
    (here / "a.jpg").write_bytes(b"x")
    rows = {source.name: outcome(source) for source in in_list(here, "a.jpg", "", "a.jpg")}
    assert rows == {"a.jpg": b"x", "": "an empty name"}


def test_a_line_without_end_is_a_failed_row_and_takes_little_memory(here: Path) -> None:
    import tracemalloc

    (here / "a.jpg").write_bytes(b"x")
    (here / "list").write_bytes(b"x" * 30_000_000 + b"\na.jpg\n")
    tracemalloc.start()
    try:
        first, second = find_images(["@list"], print)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert outcome(first) == "cannot be read: file name too long"
    assert outcome(second) == b"x"


# --- URLs of file -------------------------------------------------------------------------


@pytest.fixture
def photos(here: Path) -> Iterator[Path]:
    """A folder with names that must be escaped in a URL."""
    (here / "ph%20 otos/b").mkdir(parents=True)
    for name in ("a b.jpg", "100%.jpg", "é.jpg", "b/c#1.jpg"):
        (here / "ph%20 otos" / name).write_bytes(name.encode())
    return here / "ph%20 otos"


def test_a_url_of_file_is_read_and_keeps_its_name(here: Path, photos: Path) -> None:
    base = f"file://{here}/ph%2520%20otos"
    for url in (f"{base}/a%20b.jpg", f"{base}/a b.jpg", f"{base}/a%20b.jpg".replace("//", "")):
        for sources in (list(find_images([url], print)), in_list(here, url)):
            (source,) = sources
            assert (source.name, outcome(source)) == (url, b"a b.jpg")
            assert source.path == str(photos / "a b.jpg")


def test_a_folder_or_a_pattern_in_a_url_of_file_gives_names_that_can_be_typed(
    here: Path, photos: Path
) -> None:
    base = f"file://{here}/ph%2520%20otos"
    for argument in (base, f"file://localhost{here}/*", f"{base}/**"):
        found = list(find_images([argument], print))
        assert [outcome(one) for one in found] == [
            *(b"100%.jpg", b"a b.jpg", "é.jpg".encode(), b"b/c#1.jpg"),
        ]
        for source in found:
            (again,) = find_images([source.name], print)
            assert outcome(again) == outcome(source)


def test_a_url_of_file_that_is_no_file_here_says_so(here: Path) -> None:
    for url, why in {
        "file://host/x.jpg": "is for this machine",
        "file://": "names no file",
        "file:///no/such.jpg": "no such file",
        "file:///%00.jpg": "null",
    }.items():
        (source,) = in_list(here, url)
        assert why in str(outcome(source))
        with pytest.raises((UsageError, InputNotFoundError)):
            find_images([url], print)


# --- the home folder ----------------------------------------------------------------------


def test_a_tilde_is_the_home_folder_in_arguments_and_lists(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = here / "home"
    (home / "photos").mkdir(parents=True)
    (home / "photos/a.jpg").write_bytes(b"x")
    (home / "list").write_text("~/photos/a.jpg\n~/photos\n")
    monkeypatch.setenv("HOME", str(home))
    expected = {"~/photos/a.jpg": b"x"}
    for argument in ("~/photos", "~/photos/a.jpg", "~/*/*.jpg", "@~/list", "~"):
        assert {one.name: outcome(one) for one in find_images([argument], print)} == expected
    (source,) = find_images(["file://~/photos/a.jpg"], print)
    assert outcome(source) == b"x"
    (here / "~").mkdir()
    (here / "~/b.jpg").write_bytes(b"a folder called ~")
    (source,) = find_images(["~"], print)
    assert (source.name, outcome(source)) == ("~/b.jpg", b"a folder called ~")


@pytest.mark.parametrize("scheme", [*remote.SCHEMES, "memory", "nonsense", "zip://a::http"])
def test_no_password_of_an_entry_is_in_its_row(here: Path, scheme: str) -> None:
    users = ("u:s3cr3t@", "u:a/s3cr3t@h", "u:a@b/s3cr3t@h", "u:s3cr3t@h:port", "u:s3cr3t@[::1")
    entries = [
        f"{scheme}://{user}{rest}"
        for user in users
        for rest in ("", "/x.jpg", "/*", "?token=s3cr3t")
    ]
    for source in in_list(here, *entries):
        assert "s3cr3t" not in f"{source.name} {outcome(source)} {source}"
    for entry in entries:
        said = ""
        try:
            find_images([entry], print, Selection(timeout=2))
        except (UsageError, InputNotFoundError) as error:
            said = str(error)
        assert "s3cr3t" not in said
