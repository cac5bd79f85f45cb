"""Train a polyp segmenter like PraNet, which calls stem and layers one by one.

    python examples/polyp_segmentation.py --weights res2net50_v1b_26w_4s-3cf99910.pth
    python examples/polyp_segmentation.py --weights demo --steps 2 --size 64    # a quick check

Such code keeps the network as `self.resnet` and calls its parts by the published names.
The images are generated, each with a reddish blob. To use your own, replace `generated_images`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

import r2ncli


class PolypSegmenter(nn.Module):
    """Gives logits of one class [N, 1, H, W] from layer2 to layer4, summed at layer2's size."""

    def __init__(self, weights: str, channels: int = 32) -> None:
        super().__init__()
        self.resnet = r2ncli.load_model(weights)
        self.reduce = nn.ModuleList(
            nn.Conv2d(4 * planes, channels, 1)
            for planes in self.resnet.architecture.stage_planes[1:]
        )
        self.decide = nn.Conv2d(channels, 1, 3, padding=1)

    def layers(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of layer1 to layer4."""
        x = self.resnet.conv1(x)
        x = self.resnet.bn1(x)
        x = self.resnet.relu(x)
        x = self.resnet.maxpool(x)
        x1 = self.resnet.layer1(x)
        x2 = self.resnet.layer2(x1)
        x3 = self.resnet.layer3(x2)
        x4 = self.resnet.layer4(x3)
        return [x1, x2, x3, x4]

    def forward(self, x: Tensor) -> Tensor:
        _, x2, x3, x4 = self.layers(x)
        reduced = [conv(y) for conv, y in zip(self.reduce, (x2, x3, x4), strict=True)]
        mixed = sum(interpolate(y, x2.shape[2:], mode="bilinear") for y in reduced)
        logits: Tensor = interpolate(self.decide(torch.relu(mixed)), x.shape[2:], mode="bilinear")
        return logits


def generated_images(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return images [N, 3, H, W], normalised, and masks [N, 1, H, W]."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centres = torch.randint(size // 4, 3 * size // 4, (count, 2, 1, 1))
    masks = (y - centres[:, 0]) ** 2 / 2 + (x - centres[:, 1]) ** 2 < (size // 6) ** 2
    red = torch.tensor([2.0, 0.5, 0.5])[:, None, None]
    return torch.randn(count, 3, size, size) + red * masks[:, None], masks[:, None].float()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a segmenter on generated images.")
    parser.add_argument("--weights", default="res2net50_v1b_26w_4s", help="file or published name")
    parser.add_argument("--steps", type=int, default=5, help="default %(default)s")
    parser.add_argument(
        "--size", type=int, default=352, help="of an image, in pixels (default %(default)s)"
    )
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = PolypSegmenter(options.weights)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for step in range(options.steps):
        images, masks = generated_images(2, options.size)
        loss = binary_cross_entropy_with_logits(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except r2ncli.R2NError as error:  # expected: one sentence, not a traceback
        print(f"polyp_segmentation: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
