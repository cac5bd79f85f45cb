"""Import OpenVINO without its telemetry; every other file imports it from here.

Importing openvino sends a message to its developers and writes a file to the home folder,
unless its module `openvino_telemetry` cannot be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Make `openvino_telemetry` impossible to import while this context is active."""
    telemetry = "openvino_telemetry"
    if telemetry in sys.modules:
        yield
        return
    sys.modules[telemetry] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[telemetry]


with without_telemetry():
    from openvino import CompiledModel as CompiledModel
    from openvino import Core as Core
    from openvino import InferRequest as InferRequest
    from openvino import Model as Model
    from openvino import Node as Node
    from openvino import Output as Output
    from openvino import Tensor as Tensor
    from openvino import get_version as get_version
    from openvino import opset15 as opset15
    from openvino import save_model as save_model
