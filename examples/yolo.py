"""Train YOLO (ultralytics) on Res2Net, through its TorchVision module, for one epoch.

    pip install '.[interop]'
    python examples/yolo.py --weights res2net50_v1b_26w_4s-3cf99910.pth
    python examples/yolo.py --images 4 --size 64    # downloads the official weights

The images are generated, each with a bright rectangle. To use your own, give `train` the
YAML file of your data set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

import r2ncli.torchvision_models  # registers the networks for TorchVision


def configuration(weights: str, classes: int) -> dict[str, Any]:
    """Return a model of three scales, as ultralytics otherwise reads it from a YAML file.

    The TorchVision module splits the network: its outputs 12, 13 and 14 (0 is the image, and
    the deep stem's seven modules count one by one) are layer2, layer3 and layer4.
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
    """Restore eps of the backbone's batch norms, which ultralytics sets to 1e-3."""
    for module in model.model[0].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5


def write_images(folder: Path, count: int, size: int) -> Path:
    """Write a data set for ultralytics (images, text files of boxes) and return its YAML file."""
    import yaml

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
    parser = argparse.ArgumentParser(description="Train YOLO on generated images.")
    parser.add_argument("--weights", default="DEFAULT", help="file or DEFAULT (the official ones)")
    parser.add_argument("--images", type=int, default=8, help="how many (default %(default)s)")
    parser.add_argument(
        "--size", type=int, default=320, help="of an image, in pixels (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        import yaml
        from ultralytics import YOLO
    except ModuleNotFoundError as error:
        raise r2ncli.UsageError(
            f"{error.name} is not installed: pip install '.[interop]'"
        ) from error

    with TemporaryDirectory() as name:
        folder = Path(name)
        model_file = folder / "yolo_res2net.yaml"
        model_file.write_text(yaml.safe_dump(configuration(options.weights, classes=1)))
        model = YOLO(model_file, task="detect")
        model.add_callback("on_train_start", lambda trainer: keep_eps(trainer.model))
        model.add_callback("on_train_start", lambda trainer: keep_eps(trainer.ema.ema))
        model.train(
            data=write_images(folder, options.images, options.size),
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
    try:
        sys.exit(main())
    except r2ncli.R2NError as error:  # expected: one sentence, not a traceback
        print(f"yolo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
