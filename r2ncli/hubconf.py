"""What torch.hub offers: ``torch.hub.load("…/r2ncli", "res2net50_v1b_26w_4s", source="local")``.

With ``weights="res2net50_v1b_26w_4s"`` the official weights, with a file those in it.
"""

import os
import sys

dependencies = ["torch", "safetensors"]

# the package need not be installed: this checkout's is the one that is meant
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from r2ncli.weights.loading import (  # noqa: E402
    load_model,
    res2net50_14w_8s,
    res2net50_26w_4s,
    res2net50_26w_6s,
    res2net50_26w_8s,
    res2net50_48w_2s,
    res2net50_v1b_26w_4s,
    res2net101_26w_4s,
    res2net101_v1b_26w_4s,
    res2next50,
)

del sys.path[0]

__all__ = [
    "load_model",
    "res2net50_14w_8s",
    "res2net50_26w_4s",
    "res2net50_26w_6s",
    "res2net50_26w_8s",
    "res2net50_48w_2s",
    "res2net50_v1b_26w_4s",
    "res2net101_26w_4s",
    "res2net101_v1b_26w_4s",
    "res2next50",
]
