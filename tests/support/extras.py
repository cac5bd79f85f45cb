"""Tests that need the libraries of an extra."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def needs(extra: str, *libraries: str) -> None:
    """Skip the test, and say why, where a library is absent; one that is broken fails it."""
    for library in libraries:
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed: pip install '.[{extra}]'")
