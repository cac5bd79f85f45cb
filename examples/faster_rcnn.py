"""Faster R-CNN with a feature pyramid (torchvision) on Res2Net, trained for a few steps.

    python examples/faster_rcnn.py --weights res2net50_v1b_26w_4s-3cf99910.pth

The pictures are generated, a bright rectangle each; yours go where `pictures` is called.
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
    """A detector of `classes` classes, background included, for pictures of `size` pixels."""
    network = r2ncli.load_model(weights)  # strictly: what does not fit is refused
    stages = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}
    channels = [4 * planes for planes in network.architecture.stage_planes]
    backbone = BackboneWithFPN(network, stages, channels, out_channels=256)
    # torchvision normalises by ImageNet's mean and deviation, as the weights want it
    return FasterRCNN(backbone, classes, min_size=size, max_size=size)


def pictures(count: int, size: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Pictures, RGB in [0, 1], and for each its boxes [n, 4] and their classes [n]."""
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
    parser = argparse.ArgumentParser(description="Train a detector on generated pictures.")
    parser.add_argument("--weights", default="res2net50_v1b_26w_4s", help="file or published name")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, default=320, help="pixels (default %(default)s)")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = detector(options.weights, classes=2, size=options.size).train()
    model.backbone.body.eval()  # two pictures say too little to batch norms
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    for step in range(options.steps):
        losses = model(*pictures(2, options.size))
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")

    with torch.no_grad():
        found = model.eval()(pictures(1, options.size)[0])[0]
    print(f"{len(found['boxes'])} boxes found in one picture")
    return 0


if __name__ == "__main__":
    sys.exit(main())
