"""The checkpoint in mmpretrain, as a backbone with its head.

    pip install '.[interop]'
    python examples/mmpretrain_classifier.py res2net50_v1b_26w_4s-3cf99910.pth

The network of this file has deep_stem=True and avg_down=True in mmpretrain's terms: three
3x3 convolutions as its stem, and shortcuts that average before their convolution. What is
widely copied, deep_stem=False and avg_down=False, does not load it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from mmpretrain.models import ImageClassifier

import r2ncli

BACKBONE = {
    "type": "Res2Net",
    "depth": 50,
    "scales": 4,
    "base_width": 26,
    "deep_stem": True,
    "avg_down": True,
}


def classifier(backbone: dict[str, object]) -> ImageClassifier:
    """mmpretrain's classifier of ImageNet's 1000 classes, untrained."""
    return ImageClassifier(
        backbone=backbone,
        neck={"type": "GlobalAveragePooling"},
        head={"type": "LinearClsHead", "num_classes": 1000, "in_channels": 2048},
    ).eval()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare a checkpoint here and in mmpretrain.")
    parser.add_argument("weights", help="a checkpoint of res2net50_v1b_26w_4s")
    options = parser.parse_args(arguments)

    with TemporaryDirectory() as folder:
        converted = Path(folder, "mmpretrain.pth")
        r2ncli.convert(options.weights, converted, to="mmpretrain")
        theirs = classifier(BACKBONE)
        theirs.load_state_dict(torch.load(converted, weights_only=True), strict=True)

    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        ours = r2ncli.load_model(options.weights)(pixels)
        difference = (theirs(pixels) - ours).abs().max() / ours.abs().max()
    print(f"logits differ by {difference:.1e} of the largest")
    return 0 if difference < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
