"""Load a checkpoint into timm, where the network is called res2net50d, and compare the logits.

    pip install timm
    python examples/timm_res2net50d.py res2net50_v1b_26w_4s-3cf99910.pth
    python examples/timm_res2net50d.py res2net50_v1b_26w_4s    # downloads the official weights

The checkpoint is converted to timm's names and loaded strictly. Both networks then get the
same random input. The exit code is 1 if their logits differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

import r2ncli


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare a checkpoint's logits in r2n and timm.")
    parser.add_argument("weights", help="a checkpoint of res2net50_v1b_26w_4s, or this name")
    options = parser.parse_args(arguments)
    try:
        import timm
    except ModuleNotFoundError as error:
        raise r2ncli.UsageError(f"{error.name} is not installed: pip install timm") from error

    network = r2ncli.res2net50_v1b_26w_4s(options.weights)  # refuses other networks' weights
    with TemporaryDirectory() as folder:
        converted = Path(folder, "timm.safetensors")
        r2ncli.convert(options.weights, converted, to="timm")
        classes = network.fc.out_features
        theirs = timm.create_model("res2net50d", pretrained=False, num_classes=classes).eval()
        theirs.load_state_dict(load_file(converted), strict=True)

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
        print(f"timm_res2net50d: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
