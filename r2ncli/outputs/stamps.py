"""Keep the sizes and times of the files behind the rows of an output, in ``OUT.inputs``.

`resume` compares them, so that an image that was replaced under the same name is noticed. The
file holds two little-endian int64 per row, the size in bytes and the modification time in
nanoseconds, both -1 where the input was no local file. It has no other use: without it only
names are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from r2ncli.sources.content import Stamp

ROW_BYTES = 16
ROWS_AT_ONCE = 4096
NONE = Stamp(-1, -1)


def stamps_path(output: Path) -> Path:
    """Return the path of an output's stamps: ``OUT.inputs`` beside it."""
    return output.with_name(output.name + ".inputs")


def pack_stamps(stamps: Sequence[Stamp | None]) -> bytes:
    """Return stamps as they are stored."""
    return np.array([stamp or NONE for stamp in stamps], "<i8").tobytes()


def read_stamps(path: Path, rows: int | None = None) -> Iterator[Stamp | None]:
    """Yield the stamp of each row, then None forever; only None if there are not `rows` rows."""
    try:
        if rows is None or path.stat().st_size == rows * ROW_BYTES:
            with open(path, "rb") as file:
                while some := file.read(ROWS_AT_ONCE * ROW_BYTES):
                    for size, mtime_ns in np.frombuffer(some, "<i8").reshape(-1, 2).tolist():
                        yield Stamp(size, mtime_ns) if size > 0 else None  # zeros: a power cut
    except (OSError, ValueError):
        pass  # the missing stamps are None below
    while True:
        yield None
