"""The scripts in `examples/` and `tests/checks/`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKS = Path(__file__).parents[1] / "checks"


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a script anew, as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.syspath_prepend(CHECKS)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(name)
