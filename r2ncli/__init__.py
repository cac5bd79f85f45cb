"""r2n: image classification and feature extraction with the Res2Net family.

    import r2ncli

    for image in r2ncli.classify("photos", weights="demo"):
        print(image.path, image.predictions[:1] or image.error)

Each published network has a function that builds it, such as `r2ncli.res2net50_v1b_26w_4s`.
Importing this package is quick: torch is imported when a name that needs it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from r2ncli.api import classify as classify
    from r2ncli.api import classify_to as classify_to
    from r2ncli.api import extract as extract
    from r2ncli.api import extract_to as extract_to
    from r2ncli.architectures import Architecture as Architecture
    from r2ncli.architectures import Preprocessing as Preprocessing
    from r2ncli.engine.gpus import why_no_gpu as why_no_gpu
    from r2ncli.errors import CheckpointError as CheckpointError
    from r2ncli.errors import DeviceError as DeviceError
    from r2ncli.errors import FailedInputError as FailedInputError
    from r2ncli.errors import InputNotFoundError as InputNotFoundError
    from r2ncli.errors import OutputError as OutputError
    from r2ncli.errors import R2NError as R2NError
    from r2ncli.errors import UsageError as UsageError
    from r2ncli.model import Res2Net as Res2Net
    from r2ncli.options import Progress as Progress
    from r2ncli.options import RunOptions as RunOptions
    from r2ncli.outputs.diff import Difference as Difference
    from r2ncli.outputs.diff import diff as diff
    from r2ncli.outputs.merge import merge as merge
    from r2ncli.outputs.rows import Classification as Classification
    from r2ncli.outputs.rows import Features as Features
    from r2ncli.outputs.rows import Prediction as Prediction
    from r2ncli.weights.compare import TensorComparison as TensorComparison
    from r2ncli.weights.convert import Conversion as Conversion
    from r2ncli.weights.convert import convert as convert
    from r2ncli.weights.loading import load_model as load_model
    from r2ncli.weights.verify import Verification as Verification
    from r2ncli.weights.verify import verify_weights as verify_weights

_MODULES = {
    "architectures": ("Architecture", "Preprocessing"),
    "errors": (
        "R2NError",
        "UsageError",
        "InputNotFoundError",
        "CheckpointError",
        "DeviceError",
        "OutputError",
        "FailedInputError",
    ),
    "model": ("Res2Net",),
    "weights.loading": ("load_model",),
    "weights.verify": ("verify_weights", "Verification"),
    "weights.compare": ("TensorComparison",),
    "weights.convert": ("convert", "Conversion"),
    "engine.gpus": ("why_no_gpu",),
    "outputs.rows": ("Classification", "Prediction", "Features"),
    "api": ("classify", "extract", "classify_to", "extract_to"),
    "options": ("RunOptions", "Progress"),
    "outputs.diff": ("diff", "Difference"),
    "outputs.merge": ("merge",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"r2ncli.{_HOME[name]}"), name)
    from r2ncli.architectures import PUBLISHED

    if name == "__all__":
        return [*_HOME, *PUBLISHED]
    if name in PUBLISHED:  # the function that builds this network
        from r2ncli.weights.loading import builder

        return builder(name)
    raise AttributeError(f"module 'r2ncli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__getattr__("__all__")])
