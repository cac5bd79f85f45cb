"""Train Faster R-CNN with a feature pyramid (torchvision) on Res2Net for a few steps.

    python examples/faster_rcnn.py --weights res2net50_v1b_26w_4s-3cf99910.pth
    python examples/faster_rcnn.py --weights demo --steps 2 --size 64    # a quick check

The images are generated, each with a bright rectangle. To use your own, replace `generated_images`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN

import r2ncli


def detector(weights: str, classes: int, size: int) -> FasterRCNN:
    """Return a detector of `classes` classes (with background) for images of `size` pixels."""
    network = r2ncli.load_model(weights)
    stages = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}
    channels = [4 * planes for planes in network.architecture.stage_planes]
    backbone = BackboneWithFPN(network, stages, channels, out_channels=256)
    # torchvision normalises by ImageNet's mean and deviation, as these weights expect
    return FasterRCNN(backbone, classes, min_size=size, max_size=size)


def generated_images(count: int, size: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return images, RGB in [0, 1], and the boxes [n, 4] and classes [n] of each."""
    images, targets = [], []
    for _ in range(count):
        image = 0.3 * torch.rand(3, size, size)
        left, top = (int(n) for n in torch.randint(0, size // 2, (2,)))
        width, height = (int(n) for n in torch.randint(size // 4, size // 2, (2,)))
        image[:, top : top + height, left : left + width] += 0.7
        box = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)
        images.append(image)
        targets.append({"boxes": box, "labels": torch.tensor([1])})
    return images, targets


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a detector on generated images.")
    parser.add_argument("--weights", default="res2net50_v1b_26w_4s", help="file or published name")
    parser.add_argument("--steps", type=int, default=5, help="default %(default)s")
    parser.add_argument(
        "--size", type=int, default=320, help="of an image, in pixels (default %(default)s)"
    )
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = detector(options.weights, classes=2, size=options.size).train()
    model.backbone.body.eval()  # statistics of two images are too noisy for batch norms
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    for step in range(options.steps):
        losses = model(*generated_images(2, options.size))
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")

    with torch.no_grad():
        found = model.eval()(generated_images(1, options.size)[0])[0]
    print(f"{len(found['boxes'])} boxes found in one image")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except r2ncli.R2NError as error:  # expected: one sentence, not a traceback
        print(f"faster_rcnn: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
