"""Files on the disk."""

from __future__ import annotations

import os


def touch(*paths: str | bytes) -> None:
    """Make files of one byte, and the folders that they are in."""
    for path in paths:
        os.makedirs(os.path.dirname(path) or os.curdir, exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"x")
