"""Paths that a pattern matches: ``*``, ``?``, ``[…]``, and ``**`` for any folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from r2ncli.sources.selection import is_visible


def has_pattern(text: str) -> bool:
    return re.search(r"[*?\[]", text) is not None


def matching_paths(pattern: str) -> Iterator[str]:
    """Paths that a pattern matches, in the order of a walk; ``**`` stands for any folders.

    A folder that matches is walked by whoever asked: ``**`` finds nothing more in it.
    """
    root = "/" if pattern.startswith("/") else ""
    parts = [part for part in pattern.split("/") if part]
    while parts and parts[-1] == "**":
        parts.pop()  # the folder itself, which is walked
        pattern = "/".join((*parts, ""))
    paths = _expanded(root, parts, ())
    if parts.count("**") > 1:
        paths = iter(dict.fromkeys(paths))  # several of them find a path in several ways
    if "**" in parts:
        paths = _outside_matches(paths)
    return (path for path in paths if not pattern.endswith("/") or os.path.isdir(path))


def _outside_matches(paths: Iterable[str]) -> Iterator[str]:
    """`paths` without those in a folder that is one of them and came before."""
    folders: set[str] = set()
    for path in paths:
        above = path
        while above not in folders and above != os.path.dirname(above):
            above = os.path.dirname(above)
        if above not in folders:
            if os.path.isdir(path):
                folders.add(path)
            yield path


def _expanded(
    base: str, parts: Sequence[str], above: tuple[tuple[int, int] | None, ...]
) -> Iterator[str]:
    if not parts:
        yield base or os.curdir
        return
    part, rest = parts[0], parts[1:]
    if not has_pattern(part):
        path = os.path.join(base, part)
        if os.path.lexists(path):
            yield from _expanded(path, rest, ())
        return
    try:
        listed = sorted(os.listdir(base or os.curdir), key=os.fsencode)
    except OSError:
        return  # as a shell: what cannot be listed matches nothing
    if part != "**":
        for name in listed:
            hidden = name.startswith(".") and not part.startswith(".")
            path = os.path.join(base, name)
            if not hidden and fnmatchcase(name, part) and (not rest or os.path.isdir(path)):
                yield from _expanded(path, rest, ())
        return
    yield from _expanded(base, rest, ())
    identity = device_and_inode(base or os.curdir)
    if identity in above:
        return  # a link back to a folder above it
    for name in filter(is_visible, listed):
        path = os.path.join(base, name)
        if os.path.isdir(path):
            yield from _expanded(path, parts, (*above, identity))


def device_and_inode(path: str) -> tuple[int, int] | None:
    """What a folder is, whatever it is called; None where it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return None  # listing it will say why
    return status.st_dev, status.st_ino
