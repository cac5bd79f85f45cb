"""Which inputs are taken: by suffix, pattern, number and shard."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from r2ncli.images.decoders import SUFFIXES as SUFFIXES
from r2ncli.images.rules import MAX_BYTES as MAX_BYTES


@dataclass(frozen=True)
class Selection:
    """Which inputs are taken, and how far reading them may go.

    Attributes
    ----------
    include, exclude : tuple of str
        Patterns (``*``, ``?``, ``[…]``; upper and lower case differ). One with a slash is
        compared with the whole name, one without with its last part; `exclude` leaves out
        whole folders as well. No `include` takes everything.
    max : int or None
        Take that many of them, the first ones.
    shard : (int, int) or None
        ``(i, n)``: of these, the share i (from 1) of n by the names' hash.
    null : bool
        Names in lists and on standard input end with a NUL byte, not with a line.
    timeout : float
        Seconds that one remote picture may take.
    max_bytes : int
        A picture of more is a failed row.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max: int | None = None
    shard: tuple[int, int] | None = None
    null: bool = False
    timeout: float = 60.0
    max_bytes: int = MAX_BYTES

    def takes(self, name: str) -> bool:
        """Whether the patterns let a picture of this name through."""
        if not self.include and not self.exclude:
            return True
        if self.leaves_out(name):
            return False
        last = _BORDER.split(name)[-1]
        return not self.include or any(
            fnmatchcase(name if "/" in pattern else last, pattern) for pattern in self.include
        )

    def leaves_out(self, name: str) -> bool:
        """Whether a picture or a folder is excluded, or a folder above it."""
        parts = _BORDER.split(name)
        beginnings = [*(name[: border.start()] for border in _BORDER.finditer(name)), name]
        for pattern in self.exclude:
            wanted = pattern.rstrip("/")
            candidates = beginnings if "/" in wanted else parts
            if any(fnmatchcase(candidate, wanted) for candidate in candidates):
                return True
        return False


def in_shard(name: str, shard: tuple[int, int]) -> bool:
    """Whether an input belongs to share i of n: by the blake2b hash of its name modulo n."""
    index, count = shard
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count == index - 1


def is_visible(name: str) -> bool:
    """Whether a file or folder below an argument is looked at."""
    return not name.startswith(".") and name != "__MACOSX"


def is_tried(name: str) -> bool:
    """Whether a name's suffix is one of a picture."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


# between the folders, archive and last part of a name
_BORDER = re.compile(
    r"/|(?:(?<=\.tar|\.tgz|\.txz|\.zip)|(?<=\.tbz2)|(?<=\.tar\.gz|\.tar\.xz)|(?<=\.tar\.bz2))!",
    re.IGNORECASE,
)
