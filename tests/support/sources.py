"""What reading an input gives."""

from __future__ import annotations

from r2ncli.errors import ImageError
from r2ncli.sources.walk import Input


def outcome(source: Input, max_bytes: int = 10**8) -> bytes | str:
    """Return the bytes of an input, or the reason why there are none."""
    try:
        return source.read(max_bytes).content
    except ImageError as error:
        return str(error)
