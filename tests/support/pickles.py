"""An object that shows whether a pickle was executed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Payload:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        return self.call
