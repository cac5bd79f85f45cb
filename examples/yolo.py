"""YOLO (ultralytics) on Res2Net, through its TorchVision module, trained for an epoch.

    pip install '.[interop]'
    python examples/yolo.py --weights res2net50_v1b_26w_4s-3cf99910.pth

The pictures are generated, a bright rectangle each; with yours, give `train` their YAML.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch import nn
from ultralytics import YOLO

import r2ncli.torchvision_models  # noqa: F401  # registers the networks for TorchVision


def configuration(weights: str, classes: int) -> dict[str, Any]:
    """A model of three scales: what ultralytics otherwise reads from a YAML file.

    TorchVision unwraps the network: its outputs 12, 13 and 14 (0 is the picture, the deep
    stem's seven modules count one by one) are layer2, layer3 and layer4.
    """
    name, literal = "res2net50_v1b_26w_4s", repr(weights)  # ultralytics evaluates literals
    return {
        "nc": classes,
        "backbone": [
            [-1, 1, "TorchVision", [2048, name, literal, True, 2, True]],
            [0, 1, "Index", [512, 12]],
            [0, 1, "Index", [1024, 13]],
            [0, 1, "Index", [2048, 14]],
            [-1, 1, "SPPF", [256, 5]],
        ],
        "head": [
            [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
            [[-1, 2], 1, "Concat", [1]],
            [-1, 1, "C2f", [128]],
            [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
            [[-1, 1], 1, "Concat", [1]],
            [-1, 1, "C2f", [64]],
            [[10, 7, 4], 1, "Detect", ["nc"]],
        ],
    }


def keep_eps(model: nn.Module) -> None:
    """Give the backbone's batch norms their eps back: ultralytics sets all to 1e-3."""
    for module in model.model[0].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5


def write_pictures(folder: Path, count: int, size: int) -> Path:
    """A data set as ultralytics wants it: pictures, a text of boxes for each, and a YAML."""
    random = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for number in range(count):
        pixels = random.integers(0, 80, (size, size, 3), dtype=np.uint8)
        left, top = random.integers(0, size // 2, 2)
        width, height = random.integers(size // 4, size // 2, 2)
        pixels[top : top + height, left : left + width] += 150
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        box = (left + width / 2, top + height / 2, width, height)
        text = " ".join(f"{value / size:.4f}" for value in box)
        (folder / "labels" / f"{number}.txt").write_text(f"0 {text}\n")
    data = folder / "data.yaml"
    names = {"path": str(folder), "train": "images", "val": "images", "names": {0: "rectangle"}}
    data.write_text(yaml.safe_dump(names))
    return data


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train YOLO on generated pictures.")
    parser.add_argument("--weights", default="DEFAULT", help="file or DEFAULT (the official ones)")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--size", type=int, default=320, help="pixels (default %(default)s)")
    options = parser.parse_args(arguments)

    with TemporaryDirectory() as name:
        folder = Path(name)
        model_file = folder / "yolo_res2net.yaml"
        model_file.write_text(yaml.safe_dump(configuration(options.weights, classes=1)))
        model = YOLO(model_file, task="detect")
        model.add_callback("on_train_start", lambda trainer: keep_eps(trainer.model))
        model.add_callback("on_train_start", lambda trainer: keep_eps(trainer.ema.ema))
        model.train(
            data=write_pictures(folder, options.pictures, options.size),
            imgsz=options.size,
            epochs=1,
            batch=2,
            workers=0,
            device="cpu",
            amp=False,
            plots=False,
            project=str(folder / "runs"),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
