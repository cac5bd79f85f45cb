"""Register the published networks among torchvision's models, on import.

    import torchvision, r2ncli.torchvision_models

    torchvision.models.get_model("res2net50_v1b_26w_4s", weights="DEFAULT")

The weights are found, downloaded and checked as elsewhere in r2ncli. Like torchvision's
own builders, these give the network in training mode.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torchvision.models._api import Weights, WeightsEnum, register_model
from torchvision.transforms._presets import ImageClassification

from r2ncli.architectures import (
    LICENCE_NOTICE,
    OFFICIAL_URL,
    PUBLISHED,
    Preprocessing,
    PublishedNetwork,
)
from r2ncli.errors import UsageError
from r2ncli.model import Res2Net
from r2ncli.weights.checkpoints import imagenet_labels
from r2ncli.weights.loading import load_model, published_network


class Res2NetWeights(WeightsEnum):  # type: ignore[misc]  # torchvision is untyped
    """The official weights of one network, as `get_model_weights(name)` returns them."""

    def get_state_dict(self, *_arguments: Any, **_options: Any) -> dict[str, Tensor]:
        """Return the official state dict; torchvision's download options have no effect."""
        return load_model(self.meta["variant"]).state_dict()


def _official_weights(network: PublishedNetwork) -> Weights:
    preprocessing = Preprocessing()
    errors = {"acc@1": network.top1_error, "acc@5": network.top5_error}
    accuracy = {name: round(100 - error, 2) for name, error in errors.items()}
    return Weights(
        url=OFFICIAL_URL + network.file,
        transforms=partial(
            ImageClassification,
            crop_size=preprocessing.image_size,
            resize_size=preprocessing.resize_size,
            mean=preprocessing.mean,
            std=preprocessing.std,
        ),
        meta={
            "variant": network.name,
            "num_params": network.parameters,
            "min_size": (32, 32),
            "categories": list(imagenet_labels().labels),
            "license": LICENCE_NOTICE,
            "_metrics": {"ImageNet-1K": accuracy},
        },
    )


def _register(network: PublishedNetwork) -> None:
    members = {"IMAGENET1K_V1": (official := _official_weights(network)), "DEFAULT": official}
    official_weights = Res2NetWeights(f"{network.name}_Weights", members)

    def build(
        *,
        weights: Res2NetWeights | str | os.PathLike[str] | None = None,
        progress: bool = True,  # torchvision's option; nothing here prints
        num_classes: int | None = None,
        output_stride: int = 32,
    ) -> Res2Net:
        if isinstance(weights, str) and weights.rpartition(".")[2] in members:
            weights = official_weights.verify(weights)
        if isinstance(weights, WeightsEnum):
            weights = official_weights.verify(weights).meta["variant"]
        if weights is None and num_classes is not None:
            untrained = replace(network.architecture, classes=num_classes)
            return Res2Net(untrained, output_stride)
        built = published_network(network.name, weights, output_stride).train()
        if num_classes not in (None, built.architecture.classes):
            raise UsageError(
                f"`num_classes` {num_classes}: these weights have {built.architecture.classes} "
                "classes; replace the network's fc afterwards"
            )
        return built

    build.__doc__ = f"""Build {network.architecture.describe()}, in training mode.

    Parameters
    ----------
    weights : {official_weights.__name__}, str, path or None
        The official weights or their name (``DEFAULT``), or a checkpoint file; None gives an
        untrained network.
    num_classes : int, optional
        The number of classes of an untrained network; with weights it must be theirs.
    output_stride : int
        32, 16 or 8 (see `Res2Net`).

    Raises
    ------
    CheckpointError
        The weights are absent, altered, or another network's.
    """
    build.__annotations__["weights"] = official_weights | str | os.PathLike[str] | None
    build.__name__ = build.__qualname__ = network.name
    register_model(network.name)(build)


for _network in PUBLISHED.values():
    _register(_network)
