"""Turn the errors of reading a corrupted output into an OutputError that names the file."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from r2ncli.errors import OutputError

DAMAGE = (
    *(OSError, ValueError, LookupError, EOFError, TypeError, AttributeError),
    *(zipfile.BadZipFile, csv.Error),
)


@contextmanager
def damage_as_error(output: Path) -> Iterator[None]:
    """Raise an OutputError that names `output` in place of any error that its corruption causes."""
    try:
        yield
    except DAMAGE as error:
        raise OutputError(f"{output}: corrupted, or not written by r2n ({error})") from error
