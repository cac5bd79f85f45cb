"""Paths that a pattern matches: ``*``, ``?``, ``[…]``, and ``**`` for any folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from r2ncli.selection import is_visible


def has_pattern(text: str) -> bool:
    return re.search(r"[*?\[]", text) is not None


def matching_paths(pattern: str) -> Iterator[str]:
    """Paths that a pattern matches, in the order of a walk; ``**`` stands for any folders."""
    parts = [part for part in pattern.split("/") if part]
    if parts and parts[-1] == "**":
        parts.pop()  # the folder itself, which is walked
        return _expanded("/" if pattern.startswith("/") else "", parts, ())
    paths = _expanded("/" if pattern.startswith("/") else "", parts, ())
    # below `**` every folder's pictures match for themselves: once is enough
    return (path for path in paths if "**" not in parts or not os.path.isdir(path))


def _expanded(
    base: str, parts: Sequence[str], above: tuple[tuple[int, int] | None, ...]
) -> Iterator[str]:
    if not parts:
        yield base
        return
    part, rest = parts[0], parts[1:]
    if not has_pattern(part):
        path = os.path.join(base, part)
        if os.path.lexists(path):
            yield from _expanded(path, rest, ())
        return
    try:
        listed = sorted(os.listdir(base or "."), key=os.fsencode)
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
    identity = device_and_inode(base or ".")
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
