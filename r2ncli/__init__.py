"""r2n: image classification and feature extraction with the Res2Net family.

    import r2ncli
    for picture in r2ncli.classify(["photos"], weights="demo"):
        print(picture.path, picture.predictions)

Importing this package is quick: torch is imported when a name that needs it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from r2ncli.architectures import PUBLISHED as PUBLISHED
    from r2ncli.errors import R2NError as R2NError
    from r2ncli.weights import load_model as load_model

_HOMES = {
    "Architecture": "architectures",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"r2ncli.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'r2ncli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
