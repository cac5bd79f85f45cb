"""Runs on file systems that lack what a local disk has: locks, fsync, free space, renames.

A library that is loaded before libc stands in for the file system.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from support.results import read_csv

import r2ncli
from r2ncli.outputs.results import read_rows

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        COMPILER is None or sys.platform != "linux", reason="needs Linux and a C compiler"
    ),
]

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

static int refused(const char *call) {
    const char *number = getenv(call);
    if (!number) return 0;
    errno = atoi(number);
    return 1;
}

int flock(int fd, int operation) {
    int (*real)(int, int) = dlsym(RTLD_NEXT, "flock");
    return refused("FLOCK") ? -1 : real(fd, operation);
}

int fsync(int fd) {
    struct stat status;
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    int folder = !fstat(fd, &status) && S_ISDIR(status.st_mode);
    return refused("FSYNC") || (folder && refused("FSYNC_FOLDER")) ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
    struct stat status;
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    return !lstat(to, &status) && refused("RENAME_OVER") ? -1 : real(from, to);
}

int rmdir(const char *path) {
    int (*real)(const char *) = dlsym(RTLD_NEXT, "rmdir");
    return refused("RMDIR") ? -1 : real(path);
}

int statvfs(const char *path, struct statvfs *status) {
    int (*real)(const char *, struct statvfs *) = dlsym(RTLD_NEXT, "statvfs");
    int result = real(path, status);
    if (getenv("NO_BLOCKS")) status->f_blocks = status->f_bfree = status->f_bavail = 0;
    return refused("STATVFS") ? -1 : result;
}

int statvfs64(const char *path, struct statvfs64 *status) {
    int (*real)(const char *, struct statvfs64 *) = dlsym(RTLD_NEXT, "statvfs64");
    int result = real(path, status);
    if (getenv("NO_BLOCKS")) status->f_blocks = status->f_bfree = status->f_bavail = 0;
    return refused("STATVFS") ? -1 : result;
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The compiled library."""
    assert COMPILER is not None
    source = tmp_path_factory.mktemp("shim") / "shim.c"
    source.write_text(SHIM)
    library = source.with_suffix(".so")
    command = [COMPILER, "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


@pytest.fixture
def on_file_system(shim, pictures, tiny_weights, cache_of_the_session):
    """A function that runs r2n on a file system with these answers."""

    def run(*arguments, **answers):
        package = Path(r2ncli.__file__).parent.parent
        environment = {**os.environ, "PYTHONPATH": str(package), "LD_PRELOAD": str(shim)}
        environment |= {call: str(number) for call, number in answers.items()}
        command = [sys.executable, "-m", "r2ncli", *map(str, arguments)]
        if arguments[0] in ("classify", "extract"):
            command += [str(pictures), "--weights", str(tiny_weights), "--backend", "torch"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


ANSWERS = {
    **{f"flock {n}": {"FLOCK": getattr(errno, n)} for n in ("ENOSYS", "ENOLCK", "EOPNOTSUPP")},
    **{
        f"fsync of a folder {n}": {"FSYNC_FOLDER": getattr(errno, n)}
        for n in ("EINVAL", "ENOSYS", "ENOTSUP", "EACCES")
    },
    "fsync": {"FSYNC": errno.EINVAL},
    "no blocks": {"NO_BLOCKS": 1},
    "statvfs": {"STATVFS": errno.ENOSYS},
    **{f"rename over {n}": {"RENAME_OVER": getattr(errno, n)} for n in ("EEXIST", "EPERM")},
    "rmdir": {"RMDIR": errno.EBUSY},
    "all": {
        "FLOCK": errno.ENOLCK,
        "FSYNC": errno.EINVAL,
        "NO_BLOCKS": 1,
        "RENAME_OVER": errno.EEXIST,
    },
}


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("suffix", [".csv", ".h5"])
def test_a_run_ends_with_its_output(tmp_path, on_file_system, answers, suffix):
    out = tmp_path / f"x{suffix}"
    command = "classify" if suffix == ".csv" else "extract"
    for _ in range(2):  # the second run replaces the output of the first
        done = on_file_system(command, "-o", out, "--overwrite", "-q", **answers)
        assert done.returncode == 0, done.stderr
        assert len(list(read_rows(out))) == 20
    words = "its file system has no locks; do not start a second run on it"
    assert (words in done.stderr) == ("FLOCK" in answers)
    left = {"x.csv", "x.csv.run.json"} if suffix == ".csv" else {"x.h5"}
    left |= {f"x{suffix}.inputs", "pictures", "torch"}
    left |= {f"x{suffix}.partial"} if "RMDIR" in answers else set()
    assert {path.name for path in tmp_path.iterdir()} <= left
    done = on_file_system(command, "-o", out, "--resume", **answers)
    assert done.returncode == 0, done.stderr
    assert "nothing left to do" in done.stderr


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_outputs_are_compared_and_merged(tmp_path, on_file_system, answers):
    for n in (1, 2):
        done = on_file_system("extract", "-o", tmp_path / f"{n}.h5", "--shard", f"{n}/2", **answers)
        assert done.returncode == 0, done.stderr
    shards = [tmp_path / f"{n}.h5" for n in (1, 2)]
    done = on_file_system("merge", *shards, "-o", tmp_path / "all.h5", **answers)
    assert done.returncode == 0, done.stderr
    done = on_file_system("diff", tmp_path / "all.h5", tmp_path / "all.h5", **answers)
    assert done.returncode == 0, done.stderr


def test_features_that_are_open_elsewhere_are_never_said_to_be_lost(tmp_path, on_file_system):
    out = tmp_path / "f.h5"
    assert on_file_system("extract", "-o", out).returncode == 0
    with h5py.File(out, "a"):
        for arguments in (("diff", out, out), ("extract", "-o", out, "--resume")):
            done = on_file_system(*arguments)
            assert done.returncode == 6
            assert "another program is writing it" in done.stderr
            assert "overwrite" not in done.stderr
    assert on_file_system("extract", "-o", out, "--resume").returncode == 0


LEASE = """
import fcntl, os, signal, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
signal.signal(signal.SIGIO, lambda *_: fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK))
fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
while True:
    signal.pause()
"""


def test_an_image_under_a_write_lease_is_read(tmp_path, pictures, tiny_weights):
    """As Samba and knfsd hold one; they give it up when another program opens the file."""
    assert signal.SIGIO
    assert fcntl.F_SETLEASE
    leased = pictures / "00003.jpg"
    with subprocess.Popen(
        [sys.executable, "-c", LEASE, str(leased)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        if holder.stdout.readline() != "held\n":
            pytest.skip("this file system has no leases")
        r2ncli.classify_to(tmp_path / "x.csv", pictures, weights=tiny_weights)
        holder.kill()
    assert {row["status"] for row in read_csv(tmp_path / "x.csv")} == {"ok"}
