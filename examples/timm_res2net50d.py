"""The checkpoint in timm, where the network is called res2net50d.

    pip install timm
    python examples/timm_res2net50d.py res2net50_v1b_26w_4s-3cf99910.pth

It is converted to timm's names, loaded strictly, and both networks see the same pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from safetensors.torch import load_file

import r2ncli


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare a checkpoint here and in timm.")
    parser.add_argument("weights", help="a checkpoint of res2net50_v1b_26w_4s")
    options = parser.parse_args(arguments)

    with TemporaryDirectory() as folder:
        converted = Path(folder, "timm.safetensors")
        r2ncli.convert(options.weights, converted, to="timm")
        theirs = timm.create_model("res2net50d", pretrained=False).eval()
        theirs.load_state_dict(load_file(converted), strict=True)

    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        ours = r2ncli.res2net50_v1b_26w_4s(options.weights)(pixels)
        difference = (theirs(pixels) - ours).abs().max() / ours.abs().max()
    print(f"logits differ by {difference:.1e} of the largest")
    return 0 if difference < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
