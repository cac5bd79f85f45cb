"""A cache of compiled networks on disk: one file for each entry, replaced atomically.

An entry is named after the digest of the settings that determine it, and starts with a digest
of its content. A corrupted entry, or one with other settings, counts as a cache miss. So does
one of another user, because OpenVINO executes what it contains; except that the entries of
root, and to users other than root those of the folder's owner, are trusted. Who writes into
another user's folder adds the number of the user to the names, so that both have an entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from r2ncli import __version__
from r2ncli.errors import R2NError
from r2ncli.files import open_regular, reason, write_whole

FORMAT = 2
LIMIT = 2_000_000_000  # bytes; beyond it the least recently used entries are deleted
SUFFIX = ".network"
ALIGNMENT = 64  # of the graph in the file: one cache line of the processor

_UNUSABLE = (LookupError, TypeError, ValueError, AttributeError, OverflowError)

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A compiled graph as bytes, and facts about it (JSON values)."""

    facts: dict[str, Any]
    graph: Bytes


def cache_folder() -> Path | None:
    """Return ``$R2N_CACHE``, or else the platform's cache folder; None for a user without a home.

    A ``~`` in it is the user's home.
    """
    given = os.environ.get("R2N_CACHE")
    try:
        if not given:
            from platformdirs import user_cache_dir  # late: only this case needs it

            given = user_cache_dir("r2n", appauthor=False)
        return Path(given).expanduser()
    except RuntimeError:  # no HOME, and no entry for the user in the system's list of users
        return None


def loaded_entry(
    settings: Mapping[str, Any] | None,
    make: Callable[[], Entry],
    load: Callable[[Entry], T],
    on_warning: Callable[[str], None],
) -> T:
    """Return what `load` makes of the entry of these settings, read from the cache or made.

    A new entry is written to the cache. A cached one that `load` refuses, or whose facts it
    cannot use, counts as a cache miss. If `settings` is None, the cache is not used.
    """
    folder = cache_folder()
    if settings is not None and folder is None:
        on_warning(
            "the compiled network is not cached, because this user has no home folder; "
            "set R2N_CACHE to a folder"
        )
        settings = None
    entry = None if settings is None else read_entry(settings)
    if entry is not None:
        with suppress(R2NError, *_UNUSABLE):
            return load(entry)
    entry = make()
    loaded = load(entry)
    try:
        if settings is not None:
            write_entry(settings, entry)
    except OSError as error:
        on_warning(
            f"the compiled network cannot be cached in {folder}: {reason(error)}; "
            "set R2N_CACHE to another folder"
        )
    return loaded


def read_entry(settings: Mapping[str, Any]) -> Entry | None:
    """Return the entry of these settings, or None if there is none or it cannot be trusted."""
    found = (_read(path, settings) for path in {_path(settings): 0, _own_path(settings): 0})
    return next((entry for entry in found if entry is not None), None)


def _read(path: Path, settings: Mapping[str, Any]) -> Entry | None:
    try:
        if path.is_symlink():
            return None
        file, status = open_regular(path)
        with file:
            if not _is_trusted(status.st_uid, path):
                return None
            content: Bytes = np.memmap(file, np.uint8, mode="c")  # not copied
            digest, length, rest = content[:32], content[32:40], content[40:]
            if _digest(length.data, rest.data) != digest.tobytes():
                return None
            with suppress(OSError):
                os.utime(file.fileno())  # the time of its last use
        size = int.from_bytes(length.tobytes(), "little")
        header = json.loads(rest[:size].tobytes())
        if header["settings"] != _settings(settings):
            return None
        return Entry(dict(header["facts"]), rest[size:])
    except (OSError, RecursionError, *_UNUSABLE):
        return None


def write_entry(settings: Mapping[str, Any], entry: Entry) -> None:
    """Write the entry of these settings, and delete the least recently used ones."""
    path = _own_path(settings)
    header = json.dumps({"settings": _settings(settings), "facts": entry.facts}).encode()
    header += b" " * (-(40 + len(header)) % ALIGNMENT)
    parts = (len(header).to_bytes(8, "little"), header, entry.graph.data)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{os.getpid()}-{threading.get_ident()}"  # others may be writing the same entry
    temporary = path.with_name(f".{path.stem}-{writer}{SUFFIX}")
    write_whole(path, (_digest(*parts), *parts), temporary)
    _evict(path)


def _evict(newest: Path) -> None:
    """Delete entries beyond the limit, and temporary files that killed processes left."""
    entries = []
    for path in newest.parent.glob(f"*{SUFFIX}"):  # temporary files start with a dot
        with suppress(OSError):  # another process deleted it
            status = path.stat()
            entries.append((path == newest, status.st_mtime, path, status.st_size))
    total = 0
    for _, _, path, size in sorted(entries, reverse=True):
        total += size
        if total > LIMIT and path != newest:
            with suppress(OSError):
                path.unlink()


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` and what every entry depends on, as they are read back from JSON."""
    everything = {"format": FORMAT, "r2n": __version__, **settings}
    read_back: dict[str, Any] = json.loads(json.dumps(everything))
    return read_back


def _path(settings: Mapping[str, Any]) -> Path:
    text = json.dumps(_settings(settings), sort_keys=True)
    folder = cache_folder()
    assert folder is not None  # or nothing is cached
    return folder / (hashlib.sha256(text.encode()).hexdigest() + SUFFIX)


def _own_path(settings: Mapping[str, Any]) -> Path:
    """Return the path that this user writes: another user's folder may be shared by many."""
    path, user = _path(settings), _user()
    if user is None or _owner(path) in (None, user):
        return path
    return path.with_stem(f"{path.stem}-{user}")


def _is_trusted(writer: int, path: Path) -> bool:
    """Return whether an entry of the user `writer` may be executed by this one."""
    user = _user()
    return user in (None, writer) or writer == 0 or (user != 0 and writer == _owner(path))


def _owner(path: Path) -> int | None:
    """Return whom the folder of the cache belongs to; None if it does not exist."""
    try:
        return path.parent.stat().st_uid
    except OSError:
        return None


def _user() -> int | None:
    return os.geteuid() if hasattr(os, "geteuid") else None
