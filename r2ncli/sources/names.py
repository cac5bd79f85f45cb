"""How a name is written in outputs and on terminals. Imports nothing of the package."""

from __future__ import annotations

import re


def printable(name: str) -> str:
    r"""Write `name` as every output has it: bytes that are not UTF-8 as ``\xNN``, reversibly."""
    return bytes_as_hex(name.replace("\\x", "\\x5cx"))


def without_dot_slash(path: str) -> str:
    """Drop each leading ``./`` of a path."""
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    return path


def bytes_as_hex(text: str) -> str:
    r"""Write the bytes that are not UTF-8, which Python keeps as surrogates, as ``\xNN``."""
    return re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", text)
