"""Generate r2ncli/api.pyi, which type checkers and editors read in place of api.py.

python tests/support/api_stub.py    # after a change of RunOptions or Listeners
"""

from __future__ import annotations

from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from r2ncli import api
from r2ncli.options import CLASSIFY, EXTRACT, Listeners, options_of

STUB = Path(api.__file__).with_suffix(".pyi")

HEAD = """\
# Generated from r2ncli/options.py by tests/support/api_stub.py: do not edit.

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from r2ncli.options import Progress
from r2ncli.outputs.rows import Classification, Features
from r2ncli.weights.download import DownloadProgress

Paths = Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None
"""
FUNCTIONS = (
    ("classify", CLASSIFY, False, "Iterator[Classification]"),
    ("extract", EXTRACT, False, "Iterator[Features]"),
    ("classify_to", CLASSIFY, True, "dict[str, Any]"),
    ("extract_to", EXTRACT, True, "dict[str, Any]"),
)


def stub() -> str:
    """The text of api.pyi."""
    parts = [HEAD]
    for name, command, to_file, result in FUNCTIONS:
        lines = [f"def {name}("]
        if to_file:
            lines.append("    output: str | os.PathLike[str],")
        lines += ["    paths: Paths = None,", "    *,"]
        for field, _ in options_of(command, to_file=to_file):
            lines.append(f"    {field.name}: {field.type} = {_text(field.default)},")
        lines += [
            f"    {field.name}: {_listener(field)} | None = None,"
            for field in fields(Listeners)
            if field.name in api.LISTENERS
        ]
        parts.append("\n".join([*lines, f") -> {result}: ...\n"]))
    return "\n".join(parts)


def _listener(field: Field[Any]) -> str:
    return str(field.type)


def _text(default: object) -> str:
    if isinstance(default, str):
        return f'"{default}"'
    if isinstance(default, tuple):
        return "(" + "".join(f"{_text(value)}," for value in default) + ")"
    return f"{default:_}" if type(default) is int else str(default)


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
