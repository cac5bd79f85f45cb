"""The records of one image's results: what `classify` and `extract` yield."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """One of a picture's k most probable classes; `wnid` and `label` where they are known."""

    index: int
    wnid: str | None
    label: str | None
    probability: float


@dataclass(frozen=True)
class Classification:
    """One picture's most probable classes, or why there are none (`error`)."""

    path: str
    predictions: tuple[Prediction, ...]
    error: str | None = None


@dataclass(frozen=True)
class Features:
    """One picture's features by layer, float32 [C] or [C, H, W], or why there are none."""

    path: str
    features: dict[str, Array]
    error: str | None = None
