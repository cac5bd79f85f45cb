"""Train U-Net (segmentation-models-pytorch) with Res2Net as its encoder for a few steps.

    pip install '.[interop]'
    python examples/unet.py --weights res2net50_v1b_26w_4s-3cf99910.pth
    python examples/unet.py --weights demo --steps 2 --size 64    # a quick check

The images are generated, each with a bright disc. To use your own, replace `generated_images`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import r2ncli


class Res2NetEncoder(nn.Module):
    """The stem and the four stages as an encoder; `segmenter` adds the library's EncoderMixin."""

    def __init__(self, weights: str, depth: int = 5, output_stride: int = 32) -> None:
        super().__init__()
        self.network = r2ncli.load_model(weights, output_stride=output_stride)
        del self.network.avgpool, self.network.fc
        architecture = self.network.architecture
        stages = [4 * planes for planes in architecture.stage_planes]
        self._out_channels = [3, architecture.stem[-1], *stages]
        self._in_channels, self._depth, self._output_stride = 3, depth, output_stride

    def make_dilated(self, output_stride: int) -> None:
        """Do nothing: the network was loaded with this output stride."""

    def forward(self, x: Tensor) -> list[Tensor]:
        network = self.network
        features = [x, network.relu(network.bn1(network.conv1(x)))]
        x = network.maxpool(features[-1])
        for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
            x = stage(x)
            features.append(x)
        return features[: self._depth + 1]


def segmenter(weights: str) -> nn.Module:
    """Return a U-Net of one class whose encoder is registered under the name res2net."""
    import segmentation_models_pytorch as smp
    from segmentation_models_pytorch.encoders import encoders
    from segmentation_models_pytorch.encoders._base import EncoderMixin

    encoders["res2net"] = {
        "encoder": type("Encoder", (Res2NetEncoder, EncoderMixin), {}),
        "pretrained_settings": {},
        "params": {"weights": weights},
    }
    model: nn.Module = smp.Unet("res2net", encoder_weights=None, classes=1)
    return model


def generated_images(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return images [N, 3, H, W], normalised, and masks [N, 1, H, W]."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centres = torch.randint(size // 4, 3 * size // 4, (count, 2, 1, 1))
    masks = (y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2 < (size // 5) ** 2
    images = torch.randn(count, 3, size, size) + 2 * masks[:, None]
    return images, masks[:, None].float()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a U-Net on generated images.")
    parser.add_argument("--weights", default="res2net50_v1b_26w_4s", help="file or published name")
    parser.add_argument("--steps", type=int, default=5, help="default %(default)s")
    parser.add_argument(
        "--size", type=int, default=256, help="of an image, in pixels (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        import segmentation_models_pytorch as smp
    except ModuleNotFoundError as error:
        raise r2ncli.UsageError(
            f"{error.name} is not installed: pip install '.[interop]'"
        ) from error

    torch.manual_seed(0)
    model = segmenter(options.weights).train()
    dice = smp.losses.DiceLoss("binary")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(options.steps):
        images, masks = generated_images(4, options.size)
        loss = dice(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: Dice loss {loss.item():.3f}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except r2ncli.R2NError as error:  # expected: one sentence, not a traceback
        print(f"unet: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
