"""U-Net (segmentation-models-pytorch) with Res2Net as its encoder, trained for a few steps.

    pip install '.[interop]'
    python examples/unet.py --weights res2net50_v1b_26w_4s-3cf99910.pth

The pictures are generated, a bright disc each; yours go where `pictures` is called.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.encoders import encoders
from segmentation_models_pytorch.encoders._base import EncoderMixin
from torch import Tensor, nn

import r2ncli


class Res2NetEncoder(nn.Module, EncoderMixin):
    """The stem and the four stages, as segmentation-models-pytorch asks for them."""

    def __init__(self, weights: str, depth: int = 5, output_stride: int = 32) -> None:
        super().__init__()
        self.network = r2ncli.load_model(weights, output_stride=output_stride)
        del self.network.avgpool, self.network.fc
        architecture = self.network.architecture
        stages = [4 * planes for planes in architecture.stage_planes]
        self._out_channels = [3, architecture.stem[-1], *stages]
        self._in_channels, self._depth, self._output_stride = 3, depth, output_stride

    def make_dilated(self, output_stride: int) -> None:
        """It was loaded so."""

    def forward(self, x: Tensor) -> list[Tensor]:
        network = self.network
        features = [x, network.relu(network.bn1(network.conv1(x)))]
        x = network.maxpool(features[-1])
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            x = stage(x)
            features.append(x)
        return features[: self._depth + 1]


def segmenter(weights: str) -> smp.Unet:
    """A U-Net of one class whose encoder is registered under the name res2net."""
    encoders["res2net"] = {
        "encoder": Res2NetEncoder,
        "pretrained_settings": {},
        "params": {"weights": weights},
    }
    return smp.Unet("res2net", encoder_weights=None, classes=1)


def pictures(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Pictures [N, 3, H, W], normalised, and masks [N, 1, H, W]."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centres = torch.randint(size // 4, 3 * size // 4, (count, 2, 1, 1))
    masks = (y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2 < (size // 5) ** 2
    images = torch.randn(count, 3, size, size) + 2 * masks[:, None]
    return images, masks[:, None].float()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a U-Net on generated pictures.")
    parser.add_argument("--weights", default="res2net50_v1b_26w_4s", help="file or published name")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="pixels (default %(default)s)")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = segmenter(options.weights).train()
    dice = smp.losses.DiceLoss("binary")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(options.steps):
        images, masks = pictures(4, options.size)
        loss = dice(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: Dice loss {loss.item():.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
