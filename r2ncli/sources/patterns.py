"""Find the paths that a pattern matches: ``*``, ``?``, ``[…]``, and ``**`` for any folders."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from r2ncli.sources.names import printable, without_dot_slash
from r2ncli.sources.selection import is_tried, is_visible

Identity = tuple[int, int]  # device and inode of a folder
Folders = tuple[Identity | None, ...]  # from the top down to one
Warn = Callable[[str], None]


def has_pattern(text: str) -> bool:
    """Return whether a text has one of the characters that make a pattern."""
    return re.search(r"[*?\[]", text) is not None


def matching_paths(pattern: str, warn: Warn) -> Iterator[str]:
    """Yield the paths that a pattern matches, in a walk's order; ``**`` stands for any folders.

    The caller walks a folder that matches; ``**`` finds nothing more in it. A folder link
    that leads back to a folder above it does not match: `warn` takes a sentence about it.
    """
    root = "/" if pattern.startswith("/") else ""
    parts = [part for part in pattern.split("/") if part]
    while parts and parts[-1] == "**":
        parts.pop()  # the folder itself, which is walked
        pattern = "/".join((*parts, ""))
    paths = _expanded(root, parts, (), warn)
    if parts.count("**") > 1:
        paths = iter(dict.fromkeys(paths))  # several ``**`` find a path in several ways
    if "**" in parts:
        paths = _outside_matches(paths)
    return (path for path in paths if not pattern.endswith("/") or os.path.isdir(path))


def _outside_matches(paths: Iterable[str]) -> Iterator[str]:
    """Yield `paths` without those inside a folder that is one of them and came before."""
    folders: set[str] = set()
    for path in paths:
        above = path
        while above not in folders and above != os.path.dirname(above):
            above = os.path.dirname(above)
        if above not in folders:
            if os.path.isdir(path):
                folders.add(path)
            yield path


def _expanded(base: str, parts: Sequence[str], above: Folders, warn: Warn) -> Iterator[str]:
    """Yield paths below `base` that `parts` match; `above` are the folders on the way to `base`."""
    if not parts:
        yield base or os.curdir
        return
    part, rest = parts[0], parts[1:]
    folders = (*above, device_and_inode(base or os.curdir))
    if not has_pattern(part):
        path = os.path.join(base, part)
        if os.path.lexists(path):
            yield from _expanded(path, rest, folders, warn)
        return
    try:
        entries = listed(base or os.curdir)
    except OSError:
        return  # as in a shell, what cannot be listed matches nothing
    if part == "**":
        yield from _expanded(base, rest, above, warn)
    for entry in entries:
        hidden = entry.name.startswith(".") and not part.startswith(".")
        matches = is_visible(entry.name) if part == "**" else fnmatchcase(entry.name, part)
        if hidden or not matches:
            continue
        path = os.path.join(base, entry.name)
        folder = is_folder(entry)
        if folder and entry.is_symlink() and device_and_inode(path) in folders:
            warn(link_back(path))
        elif folder or (part != "**" and not rest):
            yield from _expanded(path, parts if part == "**" else rest, folders, warn)


# --- folders ------------------------------------------------------------------------------


def listed(folder: str) -> list[os.DirEntry[str]]:
    """Return a folder's entries, sorted by the bytes of their names; raises an `OSError`."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: os.fsencode(entry.name))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to what may be one."""
    try:
        return entry.is_dir()
    except OSError as error:  # a link: a broken one, or one to what may be a folder
        broken = error.errno in (errno.ELOOP, errno.ENOTDIR)
        return not broken and not is_tried(entry.name)


def device_and_inode(path: str) -> Identity | None:
    """Return the device and inode, which identify a folder; None if `stat` fails."""
    try:
        status = os.stat(path)
    except OSError:
        return None  # listing it will say why
    return status.st_dev, status.st_ino


def link_back(path: str) -> str:
    """Return the warning about a folder link that is not followed."""
    name = printable(without_dot_slash(path))
    return f"{name}: a link back to a folder above it, not followed"
