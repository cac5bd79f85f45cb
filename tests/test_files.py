"""Files are opened without waiting, written whole or not at all, and locked for one process."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
import pytest
from PIL import Image

import r2ncli
from r2ncli.errors import OutputError
from r2ncli.files import open_regular, publish, reason, remove_lock, take_lock, write_whole
from r2ncli.outputs.hdf5 import Hdf5Format
from r2ncli.outputs.partial import PartialOutput

PACKAGE = Path(r2ncli.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}


# --- opening ------------------------------------------------------------------------------


def test_a_regular_file_is_opened_and_described(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"content")
    file, status = open_regular(tmp_path / "x")
    with file:
        assert file.read() == b"content"
    assert status.st_size == 7


def test_a_pipe_is_an_error_and_no_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    relief = threading.Timer(60, lambda: os.close(os.open(tmp_path / "pipe", os.O_RDWR)))
    relief.start()  # ends a hang
    with pytest.raises(OSError, match="Not a regular file"):
        open_regular(tmp_path / "pipe")
    assert relief.is_alive()
    relief.cancel()
    relief.join()


def test_a_regular_file_under_a_lease_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening it without waiting fails at first; a blocking open makes its holder give it up."""
    real = os.open

    def leased(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if flags & os.O_NONBLOCK:
            raise BlockingIOError(errno.EWOULDBLOCK, "Resource temporarily unavailable", path)
        return real(path, flags, *more, **others)

    (tmp_path / "x").write_bytes(b"content")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "open", leased)
    file, _ = open_regular(tmp_path / "x")
    with file:
        assert file.read() == b"content"
    with pytest.raises(BlockingIOError):  # and no wait
        open_regular(tmp_path / "pipe")


def test_what_is_not_opened_leaves_no_descriptor(tmp_path: Path) -> None:
    gc.collect()  # what earlier tests left open
    before = sorted(os.listdir("/dev/fd"))
    for path in (tmp_path, "/dev/zero", tmp_path / "missing"):
        with pytest.raises(OSError, match=r"."):
            open_regular(path)
    assert sorted(os.listdir("/dev/fd")) == before


# --- writing ------------------------------------------------------------------------------


def test_a_file_is_written_in_parts_and_leaves_no_temporary_name(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    write_whole(tmp_path / "x", [b"ne", memoryview(b"w")])
    assert (tmp_path / "x").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_file_that_cannot_be_finished_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    def failing(*_: object) -> None:
        raise error

    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(os, call, failing)
    with pytest.raises(type(error)):
        write_whole(tmp_path / "x", [b"new"])
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        done.append(f"rename {source.name} {target.name}")
        replace(source, target)

    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    publish(tmp_path / "a", tmp_path / "b")
    assert done == ["fsync a", "rename a b", f"fsync {tmp_path.name}"]


def test_an_error_of_the_system_is_said_without_a_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r".") as raised:
        os.stat(tmp_path / "missing")
    assert reason(raised.value) == "no such file or directory"
    assert reason(OSError("Broken")) == "broken"
    assert reason(OSError()) == "oserror"


@pytest.mark.parametrize("target", ["victim", "missing"])
def test_a_link_at_the_temporary_name_is_removed_and_not_followed(
    tmp_path: Path, target: str
) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "x.tmp").symlink_to(target)
    write_whole(tmp_path / "x", [b"new"])
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "x").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["victim", "x"]


def test_a_hard_link_at_the_temporary_name_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    os.link(tmp_path / "victim", tmp_path / "x.tmp")
    write_whole(tmp_path / "x", [b"new"])
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_folder_at_the_temporary_name_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "x.tmp").mkdir()
    with pytest.raises(OSError, match=r"."):
        write_whole(tmp_path / "x", [b"new"])
    assert os.listdir(tmp_path) == ["x.tmp"]


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EPERM, errno.EACCES])
def test_a_file_is_replaced_where_no_rename_over_another_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refusing(source: Path, target: Path) -> None:
        if target.exists():
            raise OSError(number, os.strerror(number))
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    for content in (b"old", b"new"):
        write_whole(tmp_path / "x", [content])
        assert (tmp_path / "x").read_bytes() == content
        assert os.listdir(tmp_path) == ["x"]


def test_the_old_file_comes_back_where_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def refusing(source: Path, target: Path) -> None:
        if source.name == "x.tmp":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        rename(source, target)

    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", refusing)
    monkeypatch.setattr(os, "rename", refusing)
    with pytest.raises(PermissionError):
        write_whole(tmp_path / "x", [b"new"])
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_that_cannot_synchronise_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refusing(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refusing)
    write_whole(tmp_path / "x", [b"new"])
    assert (tmp_path / "x").read_bytes() == b"new"


# --- locks --------------------------------------------------------------------------------


def test_a_lock_is_for_one_and_its_file_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    lock = take_lock(path)
    assert lock is not None
    assert take_lock(path) is None
    remove_lock(lock)
    assert os.listdir(path.parent) == []
    again = take_lock(path)
    assert again is not None
    again.release()


def test_a_lock_file_that_cannot_be_removed_while_it_is_open_is_removed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows' file servers."""
    lock = take_lock(tmp_path / "lock")
    assert lock is not None
    unlink = Path.unlink

    def refusing(path: Path, missing_ok: bool = False) -> None:
        if lock.is_locked:
            raise OSError(errno.EBUSY, "Device or resource busy")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refusing)
    remove_lock(lock)
    assert os.listdir(tmp_path) == []


def test_a_lock_that_cannot_be_released_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    lock = take_lock(tmp_path / "lock")
    assert lock is not None
    with monkeypatch.context() as patched:

        def refusing(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        patched.setattr(fcntl, "flock", refusing)
        remove_lock(lock)
    assert os.listdir(tmp_path) == []
    lock.release(force=True)


def test_waiting_for_a_lock_ends_when_it_is_removed_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    held = take_lock(path)
    assert held is not None
    taken: list[Any] = []
    waiting = threading.Thread(target=lambda: taken.append(take_lock(path, wait=True)))
    waiting.start()
    remove_lock(held)
    with suppress(OSError):  # the other one may be quicker
        path.parent.rmdir()
    waiting.join(60)
    assert taken[0].is_locked
    assert path.exists()  # it holds the file that the next one finds
    assert take_lock(path) is None
    taken[0].release()


def test_a_folder_that_is_removed_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mkdir` finds that it exists, and then that it does not."""
    mkdir = Path.mkdir
    calls: list[None] = []

    def existed(path: Path, *arguments: Any, **options: Any) -> None:
        calls.append(None)
        if len(calls) == 1:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", existed)
    lock = take_lock(tmp_path / "folder" / "lock")
    assert lock is not None
    assert lock.is_locked
    lock.release()


@pytest.mark.parametrize("error", [filelock.Timeout("lock"), FileNotFoundError()])
def test_a_lock_that_another_run_removes_with_its_folder_meanwhile_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    """The run that held it ends after this one has opened the file, or made the folder."""
    path = tmp_path / "folder" / "lock"
    acquire = filelock.FileLock.acquire
    calls: list[None] = []

    def removed_meanwhile(lock: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            path.parent.rmdir()
            raise error  # what filelock says of a file that has lost its name
        return acquire(lock, *arguments, **options)

    monkeypatch.setattr(filelock.FileLock, "acquire", removed_meanwhile)
    lock = take_lock(path)
    assert lock is not None
    assert len(calls) == 2
    lock.release()


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from r2ncli.files import take_lock\n"
        "lock = take_lock(Path(sys.argv[1]))\n"
        "print('locked', flush=True)\n"
        "time.sleep(600)\n"
    )
    path = tmp_path / "lock"
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        assert take_lock(path) is None
        process.send_signal(signal.SIGKILL)
    lock = take_lock(path)
    assert lock is not None
    lock.release()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_a_file_system_has_no_locks_the_lock_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import fcntl

    def refusing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refusing)
    for wait in (False, True):
        lock = take_lock(tmp_path / "folder" / "lock", wait=wait)
        assert lock is not None
        assert not lock.is_locked
        remove_lock(lock)
        assert os.listdir(tmp_path / "folder") == []


def test_a_folder_that_may_not_be_written_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root, who may run the tests, may write everywhere: so opening the lock is refused."""
    real = os.open

    def refusing(path: Any, *more: Any, **others: Any) -> int:
        if os.path.basename(os.fspath(path)) == "lock":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *more, **others)

    monkeypatch.setattr(os, "open", refusing)
    with (
        pytest.raises(OutputError, match=r"f\.h5: cannot be written: permission denied"),
        PartialOutput(tmp_path / "f.h5", Hdf5Format({"x": (4,)})),
    ):
        pass


# --- systems without fcntl and resource ---------------------------------------------------

WITHOUT = """
import builtins, importlib, sys
asked = []
real = builtins.__import__

def hiding(name, globals=None, *more, **others):
    importer = (globals or {}).get("__name__", "")
    if importer.split(".")[0] == "r2ncli" and name in ("fcntl", "resource"):
        asked.append(f"{importer} {name}")
        raise ImportError(f"No module named {name!r}")
    return real(name, globals, *more, **others)

builtins.__import__ = hiding
for module in sys.argv[2].split():
    importlib.import_module(module)
from r2ncli.bench import _peak_resident_mb
assert _peak_resident_mb() is None
assert asked == ["r2ncli.bench resource"], asked

import r2ncli
record = r2ncli.classify_to(sys.argv[1] + ".csv", sys.argv[1], weights="demo")
assert record["counts"] == {"inputs": 1, "ok": 1, "failed": 0}
sys.argv = ["r2n", "classify", sys.argv[1], "--weights", "demo", "-o", "-"]
from r2ncli.cli.app import app
app()
"""


@pytest.mark.slow
def test_the_package_works_without_fcntl_and_resource(tmp_path: Path) -> None:
    """As on Windows; filelock, which has its own way there, keeps them."""
    Image.new("RGB", (48, 40), "red").save(tmp_path / "x.jpg")
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.stem != "__main__"  # which runs
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path / "x.jpg"), " ".join(modules)],
        env={**ENVIRONMENT, "R2N_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    header, row = done.stdout.splitlines()
    assert header.startswith("path,status")
    assert row.startswith(f"{tmp_path}/x.jpg,ok")
