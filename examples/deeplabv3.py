"""Train DeepLabV3 (torchvision) on Res2Net with output stride 8 for a few steps.

    python examples/deeplabv3.py --weights res2net50_v1b_26w_4s-3cf99910.pth
    python examples/deeplabv3.py --weights demo --steps 2 --size 64    # a quick check

The images are generated, each with a bright disc. To use your own, replace `generated_images`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCNHead

import r2ncli


def segmenter(weights: str, classes: int) -> DeepLabV3:
    """Return a segmenter whose auxiliary loss is at layer3."""
    network = r2ncli.load_model(weights, output_stride=8)  # dilated convolutions
    planes = network.architecture.stage_planes
    backbone = IntermediateLayerGetter(network, {"layer3": "aux", "layer4": "out"})
    return DeepLabV3(backbone, DeepLabHead(4 * planes[3], classes), FCNHead(4 * planes[2], classes))


def generated_images(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return images [N, 3, H, W], normalised, and the class of each pixel [N, H, W]."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centres = torch.randint(size // 4, 3 * size // 4, (count, 2, 1, 1))
    masks = (y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2 < (size // 5) ** 2
    images = torch.randn(count, 3, size, size) + 2 * masks[:, None]
    return images, masks.long()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a segmenter on generated images.")
    parser.add_argument("--weights", default="res2net50_v1b_26w_4s", help="file or published name")
    parser.add_argument("--steps", type=int, default=5, help="default %(default)s")
    parser.add_argument(
        "--size", type=int, default=256, help="of an image, in pixels (default %(default)s)"
    )
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = segmenter(options.weights, classes=2).train()
    model.backbone.eval()  # statistics of two images are too noisy for batch norms
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(options.steps):
        images, masks = generated_images(2, options.size)
        maps = model(images)
        loss = cross_entropy(maps["out"], masks) + 0.5 * cross_entropy(maps["aux"], masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")

    images, masks = generated_images(4, options.size)
    with torch.no_grad():
        right = (model.eval()(images)["out"].argmax(1) == masks).float().mean()
    print(f"{100 * right:.1f} % of the pixels are classified correctly")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except r2ncli.R2NError as error:  # expected: one sentence, not a traceback
        print(f"deeplabv3: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
