"""How a name is written in outputs and on terminals."""

from __future__ import annotations

from r2ncli.errors import escaped


def printable(name: str) -> str:
    r"""Write `name` as every output has it, reversibly.

    Control characters and bytes that are not UTF-8 are ``\xNN`` (see `errors.escaped`), and a
    literal ``\x`` is ``\x5cx``.
    """
    return escaped(name.replace("\\x", "\\x5cx"))


def without_dot_slash(path: str) -> str:
    """Drop each leading ``./`` of a path."""
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    return path
