"""Entry points for torch.hub, as in
``torch.hub.load("…/r2ncli", "res2net50_v1b_26w_4s", source="local")``.

``weights`` is the network's own name for its official weights, or a checkpoint file.
"""

import os
import sys

dependencies = ["torch", "safetensors"]

# import the package of this checkout, even if another one is installed
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from r2ncli.architectures import PUBLISHED  # noqa: E402
from r2ncli.weights import loading as _loading  # noqa: E402

del sys.path[0]

load_model = _loading.load_model
globals().update({name: _loading.builder(name) for name in PUBLISHED})

__all__ = ["load_model", *PUBLISHED]
