"""The Res2Net family as data: architectures, preprocessing, and the published networks.

Sources: Gao et al., "Res2Net: A New Multi-scale Backbone Architecture", TPAMI 2021
(arXiv:1904.01169); Xie et al., "Aggregated Residual Transformations", CVPR 2017 (the X in
Res2NeXt); He et al., "Bag of Tricks", CVPR 2019 (the deep stem and the average-pool
shortcut of "v1b", there called ResNet-D). Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

EXPANSION = 4  # output channels of a bottleneck per plane of its stage


@dataclass(frozen=True)
class Architecture:
    """The shape of a Res2Net.

    Attributes
    ----------
    layers : tuple of int
        Blocks in each of the four stages.
    base_width : int
        Channels of one split at 64 planes ("26w").
    scale : int
        Splits of a block ("4s").
    cardinality : int
        Groups of the 3x3 convolutions (1, or 8 in Res2NeXt).
    stem : tuple of int
        Output channels of the stem's convolutions: one 7x7 (v1) or three 3x3 (v1b).
    average_pool_shortcut : bool
        Whether a strided shortcut averages before its 1x1 convolution (v1b) or strides in it.
    stage_planes : tuple of int
        Planes of the four stages; a stage gives four times as many channels.
    classes : int
        Outputs of the classifier; 0 for a checkpoint without a classifier.
    """

    layers: tuple[int, int, int, int]
    base_width: int = 26
    scale: int = 4
    cardinality: int = 1
    stem: tuple[int, ...] = (64,)
    average_pool_shortcut: bool = False
    stage_planes: tuple[int, int, int, int] = (64, 128, 256, 512)
    classes: int = 1000

    def split_width(self, planes: int) -> int:
        """Return the channels of one split in a stage of `planes` planes."""
        return planes * self.base_width // 64 * self.cardinality

    def largest_output(self, image_size: int) -> int:
        """Return how many values the largest layer gives for one image of this size."""
        half, side = -(-image_size // 2), -(-image_size // 4)
        sizes = [max(self.stem) * half**2]
        for planes in self.stage_planes:
            # a stage strides in the middle of its first block
            sizes.append(self.split_width(planes) * self.scale * side**2)
            side = side if planes is self.stage_planes[0] else -(-side // 2)
            sizes.append(EXPANSION * planes * side**2)
        return max(sizes)

    def describe(self) -> str:
        """Return the usual short form, as in ``Res2Net50-v1b 26w-4s, 1000 classes``."""
        family = "Res2NeXt" if self.cardinality > 1 else "Res2Net"
        depth = 3 * sum(self.layers) + 2
        version = "-v1b" if len(self.stem) == 3 and self.average_pool_shortcut else ""
        classes = f"{self.classes} classes" if self.classes else "no classifier"
        return f"{family}{depth}{version} {self.base_width}w-{self.scale}s, {classes}"


CROPS = ("centre", "square", "none")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input of `image_size` x `image_size` pixels.

    Attributes
    ----------
    image_size, resize_size : int
        Pixels of the network's input, and of the short side before the crop.
    mean, std : tuple of float
        `mean` is subtracted from RGB values in [0, 1], which are then divided by `std`.
    crop : str
        ``centre``: as torchvision's Resize and CenterCrop, which round to whole pixels of
        the resized image. ``square``: the same part without rounding, so the exact centre
        square where both sizes are equal. ``none``: the whole image, stretched.

    Raises
    ------
    ValueError
        A value cannot be used.
    """

    image_size: int = 224
    resize_size: int = 256
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop: str = "centre"

    def __post_init__(self) -> None:
        if not 32 <= self.image_size <= min(self.resize_size, 4096):
            raise ValueError(
                f"image_size {self.image_size}, resize_size {self.resize_size}: expected "
                "32 <= image_size <= resize_size, and image_size at most 4096"
            )
        if self.resize_size > 16 * self.image_size:  # the network would see single pixels
            raise ValueError(
                f"resize_size {self.resize_size}: expected at most 16 times image_size "
                f"{self.image_size}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError("mean and std must have three values each, all of std positive")
        # for values in 0 to 1, or to 255; beyond, the network's input would overflow
        if max(map(abs, self.mean)) > 1000 or min(self.std) < 1e-4 or max(self.std) > 1e4:
            raise ValueError(
                f"mean {self.mean}, std {self.std}: expected mean from -1000 to 1000 and std from "
                "0.0001 to 10000"
            )
        if self.crop not in CROPS:
            raise ValueError(f"crop {self.crop!r}: expected one of {', '.join(CROPS)}")

    def resized(self, image_size: int | None, no_crop: bool) -> Preprocessing:
        """Return this preprocessing for another input size; the resize target keeps its ratio."""
        size = image_size or self.image_size
        target = round(size * self.resize_size / self.image_size)
        crop = "none" if no_crop else self.crop
        return replace(self, image_size=size, resize_size=target, crop=crop)


def cpu_batch_size(image_size: int) -> int:
    """Return how many images of this size make a batch on a CPU.

    The activations of eight images of 224 x 224 fit its cache. Beyond 512 x 512 there are fewer,
    so that a batch does not take gigabytes.
    """
    return max(1, min(8, 8 * 512**2 // image_size**2))


@dataclass(frozen=True)
class PublishedNetwork:
    """A network as its authors published it; the errors are in per cent on ImageNet-1k."""

    name: str
    file: str
    architecture: Architecture
    parameters: int
    top1_error: float
    top5_error: float


DEFAULT_NETWORK = "res2net50_v1b_26w_4s"
DEMO = "demo"  # the embedded checkpoint of ten CIFAR-10 classes
OFFICIAL_URL = "https://shanghuagao.oss-cn-beijing.aliyuncs.com/res2net/"
LICENCE_NOTICE = (
    "the official weights come from a project under CC BY-NC-SA 4.0 (noncommercial use only)"
)

_50, _101 = (3, 4, 6, 3), (3, 4, 23, 3)
_V1B_50 = Architecture(_50, stem=(32, 32, 64), average_pool_shortcut=True)

# name, file, architecture, number of parameters, top-1 error, top-5 error
# fmt: off
_NETWORKS = (
    PublishedNetwork("res2net50_v1b_26w_4s", "res2net50_v1b_26w_4s-3cf99910.pth",
                     _V1B_50, 25_718_352, 19.73, 4.96),
    PublishedNetwork("res2net101_v1b_26w_4s", "res2net101_v1b_26w_4s-0812c246.pth",
                     replace(_V1B_50, layers=_101), 45_225_920, 18.77, 4.64),
    PublishedNetwork("res2net50_26w_4s", "res2net50_26w_4s-06e79181.pth",
                     Architecture(_50), 25_699_120, 22.01, 6.15),
    PublishedNetwork("res2net50_48w_2s", "res2net50_48w_2s-afed724a.pth",
                     Architecture(_50, base_width=48, scale=2), 25_287_304, 22.68, 6.47),
    PublishedNetwork("res2net50_14w_8s", "res2net50_14w_8s-6527dddc.pth",
                     Architecture(_50, base_width=14, scale=8), 25_059_816, 21.86, 6.14),
    PublishedNetwork("res2net50_26w_6s", "res2net50_26w_6s-19041792.pth",
                     Architecture(_50, scale=6), 37_051_448, 21.42, 5.87),
    PublishedNetwork("res2net50_26w_8s", "res2net50_26w_8s-2c7c9f12.pth",
                     Architecture(_50, scale=8), 48_403_776, 20.80, 5.63),
    PublishedNetwork("res2net101_26w_4s", "res2net101_26w_4s-02a759a1.pth",
                     Architecture(_101), 45_206_688, 20.81, 5.57),
    PublishedNetwork("res2next50", "res2next50_4s-6ef7e7bf.pth",
                     Architecture(_50, base_width=4, cardinality=8), 24_671_464, 21.76, 6.09),
)
# fmt: on
PUBLISHED: dict[str, PublishedNetwork] = {network.name: network for network in _NETWORKS}

DECLINED = {  # published too, but with a DLA body, which r2n does not support
    "res2net_dla60": "res2net_dla60_4s-d88db7f9.pth",
    "res2next_dla60": "res2next_dla60_4s-d327927b.pth",
}


def published(name: str) -> PublishedNetwork | None:
    """Return the published network of this name, or None; ``-`` and ``_`` count as equal."""
    return PUBLISHED.get(name.replace("-", "_"))
