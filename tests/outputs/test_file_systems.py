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

import pytest
from support.results import read_csv

import r2ncli

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


PROGRAM = """
import sys
import r2ncli
from pathlib import Path
folder, images, weights = map(Path, sys.argv[1:])
options = {"weights": weights, "backend": "torch", "on_warning": print}
for write, out in ((r2ncli.classify_to, folder / "x.csv"), (r2ncli.extract_to, folder / "x.h5")):
    for _ in range(2):  # the second run replaces the output of the first
        record = write(out, images, overwrite=True, **options)
        assert record["counts"]["ok"] == 20
    assert write(out, images, resume=True, **options) == record
    shards = [folder / f"{n}{out.suffix}" for n in (1, 2)]
    for n, shard in enumerate(shards, start=1):
        write(shard, images, shard=f"{n}/2", **options)
    r2ncli.merge(shards, folder / f"all{out.suffix}", on_warning=print)
    found = r2ncli.diff(out, folder / f"all{out.suffix}", atol=1e-4)
    assert found.compared == 20 and not found.different, found
"""


def run(program, *arguments, **environment):
    """Run a program in a process of its own."""
    package = Path(r2ncli.__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(package), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


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
def test_runs_end_with_their_outputs(tmp_path, pictures, tiny_weights, shim, answers):
    folder = tmp_path / "outputs"
    folder.mkdir()
    answers = {call: str(number) for call, number in answers.items()}
    done = run(PROGRAM, folder, pictures, tiny_weights, LD_PRELOAD=str(shim), **answers)
    assert done.returncode == 0, done.stderr
    words = "x.csv: its file system has no locks; do not start a second run on it"
    assert (words in done.stdout) == ("FLOCK" in answers)
    beside = [".csv", ".csv.inputs", ".csv.run.json", ".h5", ".h5.inputs"]
    expected = [name + suffix for name in ("x", "1", "2", "all") for suffix in beside]
    left = [path.name for path in folder.iterdir() if path.suffix != ".partial"]
    assert sorted(left) == sorted(expected)
    if "RMDIR" not in answers:
        assert list(folder.glob("*.partial")) == []


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
