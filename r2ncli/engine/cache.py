"""Compiled networks kept between runs: one file an entry, written whole or not at all.

An entry is named after the digest of the settings that decide it, and holds a digest of all
it holds: one that is damaged, or another's under this name, is as good as none.
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
from r2ncli.files import reason, write_whole

FORMAT = 1
LIMIT = 2_000_000_000  # bytes; the least recently used entries beyond it go
SUFFIX = ".network"
ALIGNMENT = 64  # where the graph begins: what executes it likes whole cache lines

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A compiled graph in bytes, and what is to be known of it (JSON values)."""

    facts: dict[str, Any]
    graph: Bytes


def cache_folder() -> Path:
    """``$R2N_CACHE``, else the platform's folder for caches."""
    if given := os.environ.get("R2N_CACHE"):
        return Path(given)
    from platformdirs import user_cache_dir  # where nothing is kept, nobody needs it

    return Path(user_cache_dir("r2n", appauthor=False))


def loaded_entry(
    settings: Mapping[str, Any],
    make: Callable[[], Entry],
    load: Callable[[Entry], T],
    on_warning: Callable[[str], None],
) -> tuple[Entry, T]:
    """The entry of these settings, and what `load` makes of it.

    It comes out of the cache, or it is made and kept if it can be. One that cannot be loaded
    is another's, whole as it may be: it is made once more, and what fails then is raised.
    """
    entry = read_entry(settings)
    if entry is not None:
        with suppress(R2NError):
            return entry, load(entry)
    entry = make()
    loaded = load(entry)
    try:
        write_entry(settings, entry)
    except OSError as error:
        on_warning(
            f"the compiled network cannot be kept in {cache_folder()}: {reason(error)}; "
            "R2N_CACHE names another folder"
        )
    return entry, loaded


def read_entry(settings: Mapping[str, Any]) -> Entry | None:
    """The entry of these settings; None where there is none that is whole."""
    path = _path(settings)
    try:
        content: Bytes = np.memmap(path, np.uint8, mode="c")  # read when it is used, never copied
    except (OSError, ValueError):
        return None
    digest, length, rest = content[:32], content[32:40], content[40:]
    if _digest(length.data, rest.data) != digest.tobytes():
        return None
    with suppress(OSError):
        os.utime(path)  # used just now
    size = int.from_bytes(length.tobytes(), "little")
    header = json.loads(rest[:size].tobytes())
    if header["settings"] != _settings(settings):
        return None
    return Entry(header["facts"], rest[size:])


def write_entry(settings: Mapping[str, Any], entry: Entry) -> None:
    """Keep `entry` for these settings, and let go of what was not used for longest.

    Raises
    ------
    OSError
        The folder cannot be written.
    """
    path = _path(settings)
    header = json.dumps({"settings": _settings(settings), "facts": entry.facts}).encode()
    header += b" " * (-(40 + len(header)) % ALIGNMENT)
    parts = (len(header).to_bytes(8, "little"), header, entry.graph.data)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = f"{os.getpid()}-{threading.get_ident()}"  # others may write the same entry now
    temporary = path.with_name(f".{path.stem}-{writer}{SUFFIX}")
    write_whole(path, (_digest(*parts), *parts), temporary)
    _evict(path)


def _evict(newest: Path) -> None:
    """Entries beyond the limit go, and so does what a killed process left half-written."""
    entries = []
    for path in newest.parent.glob(f"*{SUFFIX}"):  # names with a dot in front too
        with suppress(OSError):  # another process took it away
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
    """`settings` with what every entry depends on, as JSON gives them back."""
    everything = {"format": FORMAT, "r2n": __version__, **settings}
    read_back: dict[str, Any] = json.loads(json.dumps(everything))
    return read_back


def _path(settings: Mapping[str, Any]) -> Path:
    text = json.dumps(_settings(settings), sort_keys=True)
    return cache_folder() / (hashlib.sha256(text.encode()).hexdigest() + SUFFIX)
