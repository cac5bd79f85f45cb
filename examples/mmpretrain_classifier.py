"""Load a checkpoint into mmpretrain, as a backbone with its head, and compare the logits.

    pip install '.[interop]'
    python examples/mmpretrain_classifier.py res2net50_v1b_26w_4s-3cf99910.pth
    python examples/mmpretrain_classifier.py res2net50_v1b_26w_4s    # the official weights

In mmpretrain's terms, the network of this file has deep_stem=True and avg_down=True: its stem
is three 3x3 convolutions, and its shortcuts average before their convolution. Many published
instructions say deep_stem=False and avg_down=False, which cannot load it.
The exit code is 1 if the logits differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import r2ncli

BACKBONE = {
    "type": "Res2Net",
    "depth": 50,
    "scales": 4,
    "base_width": 26,
    "deep_stem": True,
    "avg_down": True,
}


def classifier(backbone: dict[str, object], classes: int = 1000) -> nn.Module:
    """Return mmpretrain's classifier, untrained."""
    try:
        from mmpretrain import models
    except ModuleNotFoundError as error:
        raise r2ncli.UsageError(
            f"{error.name} is not installed: pip install '.[interop]'"
        ) from error

    model: nn.Module = models.ImageClassifier(
        backbone=backbone,
        neck={"type": "GlobalAveragePooling"},
        head={"type": "LinearClsHead", "num_classes": classes, "in_channels": 2048},
    )
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compare a checkpoint's logits in r2n and mmpretrain."
    )
    parser.add_argument("weights", help="a checkpoint of res2net50_v1b_26w_4s, or this name")
    options = parser.parse_args(arguments)

    network = r2ncli.load_model(options.weights)
    theirs = classifier(BACKBONE, network.fc.out_features)
    with TemporaryDirectory() as folder:
        converted = Path(folder, "mmpretrain.pth")
        r2ncli.convert(options.weights, converted, to="mmpretrain")
        try:
            theirs.load_state_dict(torch.load(converted, weights_only=True), strict=True)
        except RuntimeError as error:
            raise r2ncli.CheckpointError(
                f"{options.weights}: holds {network.architecture.describe()}, which does not fit "
                f"mmpretrain's {BACKBONE}"
            ) from error

    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        ours = network(pixels)
        difference = (theirs(pixels) - ours).abs().max() / ours.abs().max()
    print(f"largest difference of the logits: {difference:.1e} of the largest logit")
    return 0 if difference < 1e-5 else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except r2ncli.R2NError as error:  # expected: one sentence, not a traceback
        print(f"mmpretrain_classifier: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
