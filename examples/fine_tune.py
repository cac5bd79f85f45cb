"""Fine-tune a checkpoint on a folder of class folders, then classify with it.

    python examples/fine_tune.py photos --weights res2net50_v1b_26w_4s -o mine.safetensors
    r2n classify other_photos --weights mine.safetensors

`photos/` holds one folder a class: `photos/cat/1.jpg`, `photos/dog/1.jpg`. The new head
learns alone first, then the whole network. The file says its labels and preprocessing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import (
    Compose,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToTensor,
)

from r2ncli.weights.loading import load_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fine-tune on a folder of class folders.")
    parser.add_argument("folder", help="holds one folder of pictures a class")
    parser.add_argument("--weights", default="res2net50_v1b_26w_4s", help="file or published name")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("-o", "--output", default="mine.safetensors")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    checkpoint = load_checkpoint(options.weights)
    network, preprocessing = checkpoint.network, checkpoint.preprocessing
    augment = Compose(
        [
            RandomResizedCrop(preprocessing.image_size, scale=(0.5, 1)),
            RandomHorizontalFlip(),
            ToTensor(),
            Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
    photos = ImageFolder(options.folder, augment)
    network.fc = nn.Linear(network.fc.in_features, len(photos.classes))

    network.requires_grad_(False)  # batch norms keep their statistics too: it is in eval mode
    head_epochs = max(1, options.epochs // 3)
    for part, rate, epochs in (
        (network.fc, 1e-3, head_epochs),  # a random head would spoil the layers below it
        (network, 1e-4, options.epochs - head_epochs),
    ):
        part.requires_grad_(True)
        optimizer = torch.optim.AdamW(part.parameters(), lr=rate)
        for _ in range(epochs):
            total = 0.0
            for images, classes in DataLoader(photos, options.batch_size, shuffle=True):
                loss = cross_entropy(network(images), classes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(images)
            print(f"loss {total / len(photos):.3f}")

    metadata = {"labels": photos.classes, "preprocessing": asdict(preprocessing)}
    save_file(network.state_dict(), options.output, {"r2n": json.dumps(metadata)})
    print(f"{options.output}: {len(photos.classes)} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
