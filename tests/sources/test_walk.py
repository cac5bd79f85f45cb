"""What the user typed becomes names and bytes."""

from __future__ import annotations

import ast
import errno
import os
import selectors
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support.files import touch
from support.processes import heed_interrupts

from r2ncli.errors import ImageError, InputNotFoundError, UsageError
from r2ncli.sources import walk as walking
from r2ncli.sources.content import stamp_of
from r2ncli.sources.lists import entries, names_in_list
from r2ncli.sources.names import printable
from r2ncli.sources.selection import SUFFIXES, Selection
from r2ncli.sources.walk import Input, Walk, file_input, find_images


def found(*paths: str | os.PathLike[str]) -> list[Input]:
    def unexpected(sentence: str) -> None:
        raise AssertionError(sentence)

    return list(find_images(paths or ["."], unexpected))


def names(*paths: str | os.PathLike[str]) -> list[str]:
    return [source.name for source in found(*paths)]


def names_and_warnings(*paths: str) -> tuple[list[str], list[str]]:
    warnings: list[str] = []
    some = islice(
        find_images(paths or ["."], warnings.append), 1000
    )  # an endless walk would fail too
    return [source.name for source in some], warnings


def error_of(source: Input, max_bytes: int = 1000) -> str:
    with pytest.raises(ImageError) as raised:
        source.read(max_bytes)
    return str(raised.value)


# --- names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("photos", "photos/a.jpg"),
        ("photos/", "photos/a.jpg"),
        ("./photos", "photos/a.jpg"),
        ("././photos", "photos/a.jpg"),
        (".//photos/", "photos/a.jpg"),
        ("photos/a.jpg", "photos/a.jpg"),
        ("./photos/a.jpg", "photos/a.jpg"),
        ("photos/.", "photos/./a.jpg"),  # as find prints it
        ("photos/../photos", "photos/../photos/a.jpg"),
        (".", "photos/a.jpg"),
        ("./", "photos/a.jpg"),
        ("./.", "photos/a.jpg"),
    ],
)
def test_a_name_is_the_argument_as_typed_without_a_leading_dot_slash(
    here: Path, argument: str, name: str
) -> None:
    touch("photos/a.jpg")
    assert names(argument) == [name]


def test_without_an_argument_names_begin_in_the_current_folder(here: Path) -> None:
    touch("a.jpg", "sub/b.jpg")
    assert names() == ["a.jpg", "sub/b.jpg"]


def test_absolute_and_upward_arguments_stay_as_typed(here: Path) -> None:
    touch("photos/a.jpg", "work/b.jpg")
    os.chdir("work")
    assert names(here / "photos") == [f"{here}/photos/a.jpg"]
    assert names("../photos") == ["../photos/a.jpg"]
    assert names("..") == ["../photos/a.jpg", "../work/b.jpg"]


def test_every_input_opens_under_its_path(here: Path) -> None:
    touch("photos/a.jpg", "./.hidden/b.jpg", "c.jpg")
    sources_found = found("photos", "./.hidden", "./c.jpg")
    assert [source.read(10).content for source in sources_found] == [b"x"] * 3


def test_bytes_that_are_no_utf8_are_written_with_a_backslash_x(here: Path) -> None:
    touch(b"caf\xe9/m\xfcller.jpg", "naïve/é.jpg".encode())
    assert names() == ["caf\\xe9/m\\xfcller.jpg", "naïve/é.jpg"]
    assert [source.read(10).content for source in found()] == [b"x", b"x"]
    assert names(os.fsdecode(b"caf\xe9")) == ["caf\\xe9/m\\xfcller.jpg"]


def test_a_literal_backslash_x_cannot_be_taken_for_one(here: Path) -> None:
    touch(b"\\xe9.jpg", b"\xe9.jpg", b"\\\\x.jpg", b"\\y.jpg")
    assert names() == ["\\\\x5cx.jpg", "\\x5cxe9.jpg", "\\y.jpg", "\\xe9.jpg"]


def test_printable_names_are_reversible() -> None:
    all_bytes = bytes(range(1, 256))
    for raw in (all_bytes, b"\\x41", b"\\x5cx", b"\xff\\x", b"\\\xffx41", "\\xé€😀".encode()):
        text = printable(os.fsdecode(raw))
        text.encode()  # is UTF-8
        pieces = text.encode().split(b"\\x")
        back = pieces[0] + b"".join(bytes.fromhex(p[:2].decode()) + p[2:] for p in pieces[1:])
        assert back == raw


def test_commas_and_quotes_stay_in_the_name_and_control_characters_are_escaped(
    here: Path,
) -> None:
    strange = [
        "a,b.jpg",
        'a"b.jpg',
        "a\nb.jpg",
        "a\x1b[31mb.jpg",
        "a\x9bb.jpg",
        "[b]a[/b].jpg",
        "-rf.jpg",
        " .jpg",
    ]
    touch(*(f"./{name}" for name in strange))
    escaped = {"\n": "\\x0a", "\x1b": "\\x1b", "\x9b": "\\xc2\\x9b"}
    assert sorted(names()) == sorted(name.translate(str.maketrans(escaped)) for name in strange)
    assert names("./a\nb.jpg") == ["a\\x0ab.jpg"]


# --- order --------------------------------------------------------------------------------


def test_files_come_first_then_subfolders_depth_first_by_the_bytes_of_their_names(
    here: Path,
) -> None:
    touch("b.jpg", "a/z.jpg", "a/m/x.jpg", "a/B.jpg", "c.jpg", "Z/q.jpg", "a.jpg", "é/e.jpg")
    touch("a-b/k.jpg", "10.jpg", "9.jpg", "a/m/n/deep.jpg", "a/n.jpg")
    assert names() == [
        *("10.jpg", "9.jpg", "a.jpg", "b.jpg", "c.jpg"),
        "Z/q.jpg",
        *("a/B.jpg", "a/n.jpg", "a/z.jpg", "a/m/x.jpg", "a/m/n/deep.jpg"),
        "a-b/k.jpg",
        "é/e.jpg",
    ]


def test_the_order_is_that_of_bytes_also_where_they_are_no_utf8(here: Path) -> None:
    touch(b"\xff.jpg", b"\xc3\xa9.jpg", "\U0001f600.jpg".encode(), "\uffee.jpg".encode(), b"z.jpg")
    assert names() == [
        printable(os.fsdecode(name)) for name in sorted(os.listdir(os.fsencode(here)))
    ]


def test_the_order_does_not_depend_on_the_order_of_the_file_system(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(*(f"{folder}/{name}.jpg" for folder in "xyz" for name in "fedcba"))
    forwards = names()
    scandir = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            return iter(self.entries)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert names() == forwards
    assert forwards == sorted(forwards)


def test_arguments_keep_their_order_and_may_repeat(here: Path) -> None:
    touch("b/2.jpg", "a/1.jpg", "c.jpg")
    assert names("c.jpg", "b", "a", "b/2.jpg") == ["c.jpg", "b/2.jpg", "a/1.jpg", "b/2.jpg"]


# --- what is tried ------------------------------------------------------------------------


def test_suffixes_are_tried_in_any_case_and_others_are_not(here: Path) -> None:
    tried = [f"a{suffix}" for suffix in SUFFIXES]
    tried += ["b.JPG", "b.Jpeg", "b.PnG", "b.TIFF", "c.tar.jpg", "d.jpg.PNG"]
    touch(*tried, "a.txt", "a.jpg.part", "a.mp4", "jpg", "a.jpg~", "README", "a.jpg.json")
    assert sorted(names()) == sorted(tried)
    assert " ".join(SUFFIXES) == (
        ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .gif .bmp .tif .tiff .heic .heif .hif .heics "
        ".avif .avifs .jp2 .j2k .jpx .jpf .j2c .jpc .ico .ppm .pgm .pbm .pnm .dib"
    )


def test_hidden_names_and_macosx_are_skipped_below_an_argument(here: Path) -> None:
    touch(".a.jpg", ".hidden/a.jpg", "__MACOSX/a.jpg", "sub/._a.jpg", "sub/a.jpg", "sub/.git/b.jpg")
    assert names() == ["sub/a.jpg"]
    assert names("sub") == ["sub/a.jpg"]


def test_a_hidden_folder_or_file_that_is_named_is_tried(here: Path) -> None:
    touch(".a.jpg", ".hidden/a.jpg", "__MACOSX/._a.jpg", "__MACOSX/a.jpg")
    assert names(".a.jpg", ".hidden", "__MACOSX") == [
        ".a.jpg",
        ".hidden/a.jpg",
        "__MACOSX/a.jpg",
    ]


def test_a_file_that_is_named_is_always_tried(here: Path) -> None:
    touch("notes.txt", "picture")
    assert names("notes.txt", "./picture") == ["notes.txt", "picture"]


def test_a_folder_named_like_an_image_is_searched(here: Path) -> None:
    touch("x.jpg/a.jpg", "x.jpg/notes.txt")
    assert names() == ["x.jpg/a.jpg"]
    assert names("x.jpg") == ["x.jpg/a.jpg"]


def test_an_empty_folder_has_no_names(here: Path) -> None:
    assert names() == []


# --- arguments that are not there ---------------------------------------------------------


def test_a_missing_argument_is_said_before_anything_is_found(here: Path) -> None:
    touch("a.jpg")
    with pytest.raises(InputNotFoundError, match=r"^no such file or folder: b\.jpg$"):
        find_images(["a.jpg", "b.jpg"], print)
    with pytest.raises(InputNotFoundError, match=r"caf\\xe9\.jpg"):
        find_images([os.fsdecode(b"caf\xe9.jpg")], print)
    for impossible in ("a\0b", "x" * 5000):
        with pytest.raises(InputNotFoundError):
            find_images([impossible], print)
    with pytest.raises(InputNotFoundError, match="no such file or folder: ''"):
        find_images([""], print)


def test_an_argument_that_may_not_be_looked_at_is_a_row(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(path: str, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "stat", refusing)
    assert [source.name for source in find_images(["secret/a.jpg"], print)] == ["secret/a.jpg"]


def test_a_link_to_nothing_that_is_named_is_missing_and_says_so(here: Path) -> None:
    os.symlink("nowhere.jpg", "a.jpg")
    with pytest.raises(InputNotFoundError, match=r"a\.jpg \(a broken link\)"):
        find_images(["a.jpg"], print)


# --- links --------------------------------------------------------------------------------


def test_a_link_to_nothing_within_a_folder_is_a_failed_row(here: Path) -> None:
    os.symlink("nowhere.jpg", "a.jpg")
    os.symlink("nowhere", "b")  # not named like an image: none
    os.symlink("c.jpg/below", "d")
    touch("c.jpg")
    assert names() == ["a.jpg", "c.jpg"]
    assert error_of(found()[0]) == "cannot be read: no such file or directory"


def test_links_to_files_are_files(here: Path) -> None:
    touch("elsewhere/a.jpg")
    os.mkdir("here")
    os.symlink("../elsewhere/a.jpg", "here/b.jpg")
    assert names("here") == ["here/b.jpg"]
    assert found("here")[0].read(10).content == b"x"


def test_a_link_to_itself_is_a_failed_row_if_it_is_named_like_an_image(here: Path) -> None:
    os.symlink("a.jpg", "a.jpg")
    os.symlink("b", "b")
    assert names() == ["a.jpg"]
    assert "symbolic links" in error_of(found()[0])


def test_a_link_back_to_an_ancestor_is_a_sentence_and_no_row(here: Path) -> None:
    touch("top/a.jpg", "top/sub/b.jpg")
    os.symlink(".", "top/self")
    os.symlink("..", "top/sub/up")
    os.symlink(here / "top", "top/sub/absolute")
    rows, warnings = names_and_warnings("top")
    assert rows == ["top/a.jpg", "top/sub/b.jpg"]
    assert warnings == [
        f"top/{name}: a link back to a folder above it, not followed"
        for name in ("self", "sub/absolute", "sub/up")
    ]


def test_a_link_to_the_folder_above_the_argument_is_followed_once(here: Path) -> None:
    touch("x.jpg", "top/a.jpg")
    os.symlink("..", "top/up")
    rows, warnings = names_and_warnings("top")
    assert rows == ["top/a.jpg", "top/up/x.jpg"]
    assert warnings == ["top/up/top: a link back to a folder above it, not followed"]


def test_links_to_folders_elsewhere_are_followed_each_of_them(here: Path) -> None:
    touch("elsewhere/a.jpg", "elsewhere/sub/b.jpg")
    os.mkdir("top")
    os.symlink("../elsewhere", "top/one")
    os.symlink("../elsewhere", "top/two")
    os.symlink("../elsewhere/sub", "top/three.jpg")
    assert names("top") == [
        *("top/one/a.jpg", "top/one/sub/b.jpg"),
        "top/three.jpg/b.jpg",
        *("top/two/a.jpg", "top/two/sub/b.jpg"),
    ]


def test_two_folders_that_link_to_each_other_end(here: Path) -> None:
    touch("a/1.jpg", "b/2.jpg")
    os.symlink("../b", "a/to_b")
    os.symlink("../a", "b/to_a")
    rows, warnings = names_and_warnings(".")
    assert rows == ["a/1.jpg", "a/to_b/2.jpg", "b/2.jpg", "b/to_a/1.jpg"]
    assert len(warnings) == 2


# --- folders that cannot be listed --------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, folder: str, number: int = errno.EACCES) -> None:
    """Let listing `folder` fail; root, who may run the tests, is refused nothing."""
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if os.path.basename(path) == folder:
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)


def test_a_subfolder_that_cannot_be_listed_is_a_failed_row(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch("a/1.jpg", "b/2.jpg", "b/sub/3.jpg", "c/4.jpg")
    refuse(monkeypatch, "b")
    assert names() == ["a/1.jpg", "b", "c/4.jpg"]
    failed = found()[1]
    assert error_of(failed) == "the folder cannot be listed: permission denied"


def test_an_argument_that_cannot_be_listed_is_a_failed_row(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch("b/2.jpg")
    refuse(monkeypatch, "b", errno.EIO)
    assert error_of(found("./b/../b")[0]) == "the folder cannot be listed: input/output error"


def test_a_folder_whose_listing_breaks_off_is_a_failed_row(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch("a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    class Breaking:
        def __init__(self, path: str) -> None:
            self.path = path

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            with scandir(self.path) as entries:
                yield from entries
            if self.path.endswith("a"):
                raise OSError(errno.ESTALE, "Stale file handle", self.path)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Breaking)
    assert names() == ["a", "b/2.jpg"]
    assert error_of(found()[0]) == "the folder cannot be listed: stale file handle"


def test_what_a_user_may_not_read_is_a_failed_row(tmp_path: Path) -> None:
    """As another user in another process, where root runs the tests."""
    for folder in (tmp_path / "open", tmp_path / "closed"):
        folder.mkdir()
        (folder / "a.jpg").write_bytes(b"x")
    (tmp_path / "open" / "b.jpg").write_bytes(b"x")
    (tmp_path / "open" / "b.jpg").chmod(0)
    (tmp_path / "closed").chmod(0)
    (tmp_path / "open" / "link").symlink_to("../closed")
    (tmp_path / "open" / "within").symlink_to("../closed/sub")
    (tmp_path / "open" / "within.jpg").symlink_to("../closed/a.jpg")
    program = (
        "import os, sys\n"
        "from r2ncli.sources.walk import find_images\n"  # imported before it is refused
        "from r2ncli.errors import ImageError\n"
        "folder = os.open('.', os.O_RDONLY)\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "os.fchdir(folder)\n"
        "for source in find_images(['.'], print):\n"
        "    try: print(source.name, source.read(10).content)\n"
        "    except ImageError as error: print(source.name, error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(walking.__file__).parents[2])}
    tmp_path.chmod(0o755)
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        (tmp_path / "closed").chmod(0o755)
    assert done.stdout.splitlines() == [
        "closed the folder cannot be listed: permission denied",
        "open/a.jpg b'x'",
        "open/b.jpg cannot be read: permission denied",
        "open/within.jpg cannot be read: permission denied",
        "open/link the folder cannot be listed: permission denied",
        "open/within the folder cannot be listed: permission denied",
    ]


def test_folders_nested_too_deeply_end_in_a_failed_row(here: Path) -> None:
    touch("a.jpg", "z/b.jpg")
    descriptor = os.open(".", os.O_RDONLY)
    for _ in range(2000):
        os.mkdir("d" * 9, dir_fd=descriptor)
        below = os.open("d" * 9, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    try:
        picture, deep, other = found()
        assert error_of(deep) == "the folder cannot be listed: file name too long"
    finally:
        subprocess.run(["rm", "-r", "d" * 9], check=True)  # deeper than Python can
    assert (picture.name, other.name) == ("a.jpg", "z/b.jpg")
    assert deep.name.count("/") > 300


# --- bytes --------------------------------------------------------------------------------


def test_a_pipe_named_like_an_image_is_a_failed_row_and_does_not_hang(here: Path) -> None:
    os.mkfifo("x.jpg")
    relief = threading.Timer(60, lambda: os.close(os.open("x.jpg", os.O_RDWR)))  # ends a hang
    relief.start()
    assert error_of(found()[0]) == "cannot be read: not a regular file"
    assert error_of(found("x.jpg")[0]) == "cannot be read: not a regular file"
    assert relief.is_alive()
    relief.cancel()
    relief.join()


def test_a_device_is_a_failed_row() -> None:
    assert error_of(found("/dev/zero")[0]) == "cannot be read: not a regular file"


def test_a_folder_is_no_image_and_leaves_no_open_file(tmp_path: Path) -> None:
    descriptors = sorted(os.listdir("/dev/fd"))
    for _ in range(3):
        assert error_of(file_input(str(tmp_path), "x")) == "cannot be read: is a directory"
    assert sorted(os.listdir("/dev/fd")) == descriptors


def test_an_empty_file_is_a_failed_row(here: Path) -> None:
    (here / "x.jpg").touch()
    assert error_of(found()[0]) == "empty file"


def test_a_file_beyond_max_bytes_is_a_failed_row_and_one_at_it_is_not(here: Path) -> None:
    (here / "x.jpg").write_bytes(bytes(2000))
    assert len(found()[0].read(2000).content) == 2000
    assert error_of(found()[0], 1999) == "2,000 bytes, larger than the limit of 1,999 bytes"


def test_a_file_beyond_max_bytes_is_not_read(here: Path) -> None:
    with open("x.jpg", "wb") as file:
        file.truncate(1 << 40)  # a hole: a terabyte that takes no room
    assert "larger than the limit of" in error_of(found()[0])


def test_a_file_that_is_gone_or_unreadable_is_a_failed_row(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch("x.jpg")
    (source,) = found()
    os.remove("x.jpg")
    assert error_of(source) == "cannot be read: no such file or directory"

    def refusing(path: str, *_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "open", refusing)
    assert error_of(source) == "cannot be read: permission denied"
    assert error_of(file_input("a\0b", "x")).startswith("cannot be read: ")


def test_an_error_names_no_path_that_the_user_did_not_type(here: Path) -> None:
    assert str(here) not in error_of(file_input(str(here / "x.jpg"), "x.jpg"))


def test_content_carries_the_size_and_time_of_the_file_it_came_from(here: Path) -> None:
    touch("a.jpg")
    os.utime("a.jpg", ns=(5, 1234567891))
    (source,) = found("./a.jpg")
    assert source.path == "./a.jpg"
    content, stamp = source.read(10)
    assert content == b"x"
    assert stamp == (1, 1234567891)
    assert stamp_of("./a.jpg") == stamp


def test_a_file_that_cannot_be_looked_at_has_no_stamp(here: Path) -> None:
    assert stamp_of("missing") is None
    assert stamp_of("a\0b") is None


def test_the_stamp_costs_no_further_call(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("a.jpg")
    (source,) = found()
    calls: list[str] = []
    for call in ("stat", "lstat", "fstat"):
        real = getattr(os, call)

        def counted(*given: Any, _call: str = call, _real: Any = real, **more: Any) -> Any:
            calls.append(_call)
            return _real(*given, **more)

        monkeypatch.setattr(os, call, counted)
    source.read(10)
    assert calls == ["fstat", "fstat"]  # before and after, to notice a change


# --- the walk in its thread ---------------------------------------------------------------


def test_a_walk_gives_what_find_images_gives_and_then_knows_the_total(here: Path) -> None:
    touch(*(f"{folder}/{name}.jpg" for folder in "abc" for name in range(20)))
    with Walk(["."], print) as walk:
        assert [source.name for source in walk] == names()
        assert walk.ended
        assert walk.found == 60


def test_a_missing_argument_is_said_when_the_walk_is_made(here: Path) -> None:
    with pytest.raises(InputNotFoundError):
        Walk(["missing"], print)


def test_the_first_input_comes_before_the_walk_has_ended(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch("a/1.jpg", "b/2.jpg")
    go_on = threading.Event()
    scandir = os.scandir

    def waiting(path: str) -> Any:
        if os.path.basename(path) == "b":
            assert go_on.wait(60)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", waiting)
    with Walk(["."], print) as walk:
        inputs = iter(walk)
        assert next(inputs).name == "a/1.jpg"
        assert not walk.ended
        go_on.set()
        assert [source.name for source in inputs] == ["b/2.jpg"]
        assert walk.ended


def test_no_more_names_wait_than_are_allowed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "NAMES_AHEAD", 5)
    produced: list[Input] = []

    def endless(*_: object) -> Iterator[Input]:
        while True:
            produced.append(file_input("x"))
            yield produced[-1]

    monkeypatch.setattr(walking, "find_images", endless)
    with Walk(["."], print) as walk:
        inputs = iter(walk)
        for taken in range(1, 20):
            next(inputs)
            assert len(produced) <= taken + 5 + 1  # five wait, one is in the walk's hand
        wait_until(lambda: len(produced) == 19 + 5 + 1)
        assert walk.found == len(produced)
        assert not walk.ended


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_leaving_a_walk_early_ends_its_thread(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "NAMES_AHEAD", 2)
    touch(*(f"{name:03d}.jpg" for name in range(50)))
    with Walk(["."], print) as walk:
        assert next(iter(walk)).name == "000.jpg"
        assert "r2n-walk" in {thread.name for thread in threading.enumerate()}
    assert "r2n-walk" not in {thread.name for thread in threading.enumerate()}
    assert not walk.ended


def test_a_walk_that_nobody_reads_ends_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "NAMES_AHEAD", 1)
    touch("a.jpg", "b.jpg", "c.jpg")
    with pytest.raises(RuntimeError, match="the user's own"), Walk(["."], print):
        raise RuntimeError("the user's own")
    assert "r2n-walk" not in {thread.name for thread in threading.enumerate()}


def test_an_error_in_the_walk_is_raised_where_it_is_used(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> Iterator[Input]:
        yield file_input("a.jpg")
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(walking, "find_images", failing)
    with Walk(["."], print) as walk:
        inputs = iter(walk)
        assert next(inputs).name == "a.jpg"
        with pytest.raises(ZeroDivisionError, match="a bug"):
            next(inputs)


def test_no_file_is_looked_at_while_walking(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(*(f"sub/{name}.jpg" for name in range(50)))
    looked_at: list[str] = []
    for call in ("stat", "lstat", "open"):
        original = getattr(os, call)

        def counting(path: Any, *arguments: Any, _original: Any = original, **more: Any) -> Any:
            looked_at.append(os.fspath(path))
            return _original(path, *arguments, **more)

        monkeypatch.setattr(os, call, counting)
    assert len(names()) == 50
    assert [path for path in looked_at if path.endswith(".jpg")] == []
    assert len(looked_at) < 10  # the folders, once each or twice


def test_a_folder_is_listed_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("a/b/1.jpg", "a/2.jpg")
    listed: list[str] = []
    scandir = os.scandir

    def counting(path: Any) -> Any:
        listed.append(os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    assert len(names("a")) == 2
    assert sorted(listed) == ["a", "a/b"]


# --- a file that changes while it is read -------------------------------------------------


def while_reading(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let `change` happen after the file was opened and looked at."""
    fstat = os.fstat
    calls: list[int] = []

    def changing(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        calls.append(descriptor)
        if len(calls) == 1:
            change()
        return status

    monkeypatch.setattr(os, "fstat", changing)


@pytest.mark.parametrize("length", [0, 500, 3000, 20_000])
def test_a_file_that_grows_or_shrinks_while_it_is_read_is_a_failed_row(
    here: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    (here / "x.jpg").write_bytes(b"a" * 2000)
    while_reading(monkeypatch, lambda: (here / "x.jpg").write_bytes(b"b" * length))
    assert error_of(file_input("x.jpg"), 10_000) == "changed while it was read"


def test_a_file_that_is_rewritten_while_it_is_read_is_a_failed_row(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "x.jpg").write_bytes(b"a" * 2000)
    os.utime("x.jpg", (1, 1))
    while_reading(monkeypatch, lambda: (here / "x.jpg").write_bytes(b"b" * 2000))
    assert error_of(file_input("x.jpg"), 10_000) == "changed while it was read"


def test_a_file_that_is_replaced_while_it_is_read_is_the_old_one(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "x.jpg").write_bytes(b"a" * 2000)
    (here / "new").write_bytes(b"b" * 2000)
    while_reading(monkeypatch, lambda: os.replace("new", "x.jpg"))
    assert file_input("x.jpg").read(10_000).content == b"a" * 2000
    assert file_input("x.jpg").read(10_000).content == b"b" * 2000


def test_a_folder_that_vanishes_during_the_walk_is_a_failed_row(here: Path) -> None:
    touch("a/1.jpg", "b/2.jpg", "c/3.jpg")
    walk = find_images(["."], print)
    assert next(walk).name == "a/1.jpg"
    os.rename("b", ".gone")
    missing, other = walk
    assert (missing.name, other.name) == ("b", "c/3.jpg")
    assert error_of(missing) == "the folder cannot be listed: no such file or directory"


# --- lists --------------------------------------------------------------------------------


def write_list(content: bytes) -> str:
    Path("names").write_bytes(content)
    return "@names"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a.jpg\nb.jpg\n", ["a.jpg", "b.jpg"]),
        (b"a.jpg\nb.jpg", ["a.jpg", "b.jpg"]),
        (b"a.jpg\r\nb.jpg\r\n", ["a.jpg", "b.jpg"]),
        (b"\n\na.jpg\n\n\nb.jpg\n\n", ["a.jpg", "b.jpg"]),
        (b"\xef\xbb\xbfa.jpg\nb.jpg\n", ["a.jpg", "b.jpg"]),
        (b"./a.jpg\nx/../b.jpg\n", ["a.jpg", "x/../b.jpg"]),
        (b" a.jpg\nb.jpg \n", [" a.jpg", "b.jpg "]),  # a name may have spaces at its ends
        (b"caf\xe9.jpg\n\xc3\xa9.jpg\n", ["caf\\xe9.jpg", "é.jpg"]),
        (b"@x.jpg\n-\n*.jpg\n[a].jpg\n", ["@x.jpg", "-", "*.jpg", "[a].jpg"]),  # are themselves
        ("\ufeffa.jpg\r\né.jpg\r\n".encode("utf-16-le"), ["a.jpg", "é.jpg"]),
        ("\ufeffa.jpg\né.jpg".encode("utf-16-be"), ["a.jpg", "é.jpg"]),
        ("\ufeff\U0001f600.jpg\n".encode("utf-32-le"), ["\U0001f600.jpg"]),
        ("\ufeffa.jpg\n".encode("utf-16-le") + b"b", ["a.jpg", "\ufffd"]),  # cut off
        (b"\xff\xfe", []),
        (b"", []),
        (b"\n", []),
        (b"\xef\xbb\xbf", []),
    ],
)
def test_a_list_has_a_name_a_line(here: Path, content: bytes, expected: list[str]) -> None:
    assert names(write_list(content)) == expected


def test_a_list_may_end_its_names_with_nul(here: Path) -> None:
    argument = write_list(b"a\nb.jpg\0c\r.jpg\0\0d.jpg")
    found_ones = find_images([argument], print, Selection(null=True))
    assert [source.name for source in found_ones] == ["a\\x0ab.jpg", "c\\x0d.jpg", "", "d.jpg"]
    with pytest.raises(UsageError, match="give `null=True`"):
        names(argument)


def test_names_of_a_list_are_whole_wherever_its_pieces_end() -> None:
    text = b"\xef\xbb\xbfa.jpg\r\n\xc3\xa9.jpg\n" + b"x" * 30 + b"\n"
    for size in range(1, 12):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert list(entries(pieces, b"\n")) == ["a.jpg", "é.jpg", "x" * 30]


def test_entries_of_a_list_may_be_folders_archives_and_missing(here: Path) -> None:
    touch("d/1.jpg", "d/e/2.jpg", "b.jpg", "notes.txt")
    with tarfile.open("a.tar", "w") as archive:
        archive.add("b.jpg")
    entries = ["d", "a.tar", "gone.jpg", "gone", "gone.tar", "notes.txt", "b.jpg", "d/"]
    rows = found(write_list("\n".join(entries).encode()))
    assert [row.name for row in rows] == [
        *("d/1.jpg", "d/e/2.jpg", "a.tar!b.jpg", "gone.jpg", "gone", "gone.tar", "notes.txt"),
        *("b.jpg", "d/1.jpg", "d/e/2.jpg"),
    ]
    for row in rows:
        if row.name.startswith("gone"):
            assert error_of(row) == "cannot be read: no such file or directory"
        else:
            assert row.read(10**6)


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("@gone", "no such file or directory"),
        ("@", "no such file or directory"),
        ("@.", "a folder, not a list of names"),
        ("@closed", "permission denied"),
    ],
)
def test_a_list_that_cannot_be_read_is_said_before_anything_is_found(
    here: Path, monkeypatch: pytest.MonkeyPatch, argument: str, reason: str
) -> None:
    touch("a.jpg", "closed")
    real = os.open

    def refusing(path: str, *more: Any, **others: Any) -> int:
        if path == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *more, **others)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(InputNotFoundError, match=reason) as raised:
        find_images(["a.jpg", argument], print)
    assert str(raised.value).startswith(f"{argument}: ")


def test_a_list_may_be_a_pipe(here: Path) -> None:
    os.mkfifo("names")
    writer = threading.Thread(target=lambda: Path("names").write_bytes(b"a.jpg\nb.jpg\n"))
    writer.start()
    assert names("@names") == ["a.jpg", "b.jpg"]
    writer.join()


def test_a_list_is_read_while_it_is_written(here: Path) -> None:
    reading, writing = os.pipe()
    with Walk([f"@/dev/fd/{reading}"], print) as walk:
        inputs = iter(walk)
        os.write(writing, b"a.jpg\nb.j")
        assert next(inputs).name == "a.jpg"
        assert not walk.ended
        os.write(writing, b"pg\n")
        assert next(inputs).name == "b.jpg"
        os.close(writing)
        assert list(inputs) == []
    os.close(reading)


def test_a_list_may_have_a_descriptor_beyond_those_that_select_takes(here: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1100:
        pytest.skip("the system allows too few descriptors")
    reading, writing = os.pipe()
    os.write(writing, b"a.jpg\n")
    os.close(writing)
    Path("names").write_bytes(b"b.jpg\n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1100), hard))
    try:
        pipe = fcntl.fcntl(reading, fcntl.F_DUPFD, 1050)
        file = fcntl.fcntl(os.open("names", os.O_RDONLY), fcntl.F_DUPFD, 1050)
        for descriptor, name in ((pipe, "a.jpg"), (file, "b.jpg")):
            opened = list(names_in_list(lambda fd=descriptor: fd, False, threading.Event()))
            assert opened == [name]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(reading)


def test_a_list_that_is_a_regular_file_or_a_null_device_is_read_without_waiting(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waiting(*_: object) -> None:
        raise AssertionError("waited")

    monkeypatch.setattr(selectors.DefaultSelector, "select", waiting)
    assert names(write_list(b"a.jpg\n")) == ["a.jpg"]
    assert names("@/dev/null") == []


def test_a_silent_list_does_not_hold_up_the_end_of_a_walk(here: Path) -> None:
    reading, writing = os.pipe()
    with Walk([f"@/dev/fd/{reading}"], print):
        pass
    wait_until(lambda: "r2n-walk" not in {thread.name for thread in threading.enumerate()})
    os.close(writing)
    os.close(reading)


# --- standard input, in a process of its own ----------------------------------------------


PROGRAM = (
    "import sys\n"
    "from r2ncli.sources.selection import Selection\n"
    "from r2ncli.sources.walk import Walk\n"
    "with Walk(['-'], print, Selection(null='-0' in sys.argv)) as walk:\n"
    "    for source in walk: print(ascii(source.name), flush=True)\n"
)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(walking.__file__).parents[2])}


def names_on_stdin(content: bytes, *options: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *options],
        input=content, env=ENVIRONMENT, capture_output=True, check=True,
    )  # fmt: skip
    return [ast.literal_eval(line.decode()) for line in done.stdout.splitlines()]


def test_standard_input_is_a_list() -> None:
    assert names_on_stdin(b"\xef\xbb\xbfa.jpg\r\ncaf\xe9.jpg\n\nb.jpg") == [
        *("a.jpg", "caf\\xe9.jpg", "b.jpg"),
    ]
    assert names_on_stdin(b"a\nb.jpg\0c.jpg\0", "-0") == ["a\\x0ab.jpg", "c.jpg"]
    assert names_on_stdin(b"") == []


def test_a_closed_standard_input_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputNotFoundError, match="standard input is closed"):
        find_images(["-"], print)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_a_run_whose_standard_input_is_silent(
    here: Path, tiny_weights: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "r2ncli", "classify", "-", "--weights", str(tiny_weights)]
    with subprocess.Popen(
        [*command, "-o", "x.csv", "-b", "1"],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**ENVIRONMENT, "PYTHONWARNINGS": "ignore"}, preexec_fn=heed_interrupts,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("".join(f"{n}.jpg\n" for n in range(40)))  # enough for rows to come
        process.stdin.flush()
        assert process.stderr.readline() == ("0.jpg: cannot be read: no such file or directory\n")
        time.sleep(0.3)
        process.send_signal(number)
        said = process.stderr.read()  # to its end, while standard input stays open
        assert process.wait() == (130 if number == signal.SIGINT else 143)
    assert "interrupted: finished rows are kept in x.csv.partial; continue with --resume" in said
    assert "Traceback" not in said


# --- what waits ---------------------------------------------------------------------------


def test_a_name_that_waits_takes_little_memory(here: Path) -> None:
    folder = "photos/of/a/summer"
    os.makedirs(folder)
    for name in range(2000):
        os.mknod(f"{folder}/picture_{name:07d}.jpg")
    list(find_images(["."], print))
    tracemalloc.start()
    try:
        waiting = list(find_images(["."], print))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(waiting) == 2000
    assert held / len(waiting) < 1000  # of 100,000 names: 100 MB
