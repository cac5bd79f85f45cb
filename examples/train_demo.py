"""Train the demonstration network that is part of r2n, and export it for r2n.

    python examples/train_demo.py cifar10.zip -o demo.safetensors
    python examples/train_demo.py cifar10.zip --export demo.pth -o demo.safetensors

The data is a zip file or a folder of 32x32 images, ``train/<class>/*`` and
``test/<class>/*``; the classes are the folders' names in alphabetical order. The state of the
training is saved after every epoch: after Ctrl-C or a crash the same command continues, and
ends (on a CPU, bit by bit) with the weights of an uninterrupted training. The whole training
takes about 50 minutes on two cores; a GPU is used if there is one.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional

from r2ncli import (
    Architecture,
    CheckpointError,
    InputNotFoundError,
    OutputError,
    Preprocessing,
    R2NError,
    Res2Net,
    UsageError,
    classify_to,
)
from r2ncli.engine.base import cpu_has_bf16
from r2ncli.files import reason, write_whole
from r2ncli.model import Bottle2neck
from r2ncli.sources.selection import SUFFIXES
from r2ncli.weights.loading import StateDict, load_state_dict

ARCHITECTURE = Architecture(
    layers=(1, 2, 2, 1),
    base_width=26,
    scale=4,
    stem=(16, 16, 32),
    average_pool_shortcut=True,
    stage_planes=(32, 64, 96, 128),
    classes=10,
)
PREPROCESSING = Preprocessing(image_size=64, resize_size=64, crop="square")
LARGEST_EXPORT = 2_500_000  # bytes

STORED_SIZE = 32  # height and width of the images in the files
EPOCHS = 31
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 0.2
WARM_UP = 0.2  # of all steps
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.1

Settings = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        with unpacked(options.data) as folder:
            if options.export:
                state_dict = load_state_dict(options.export)
            else:
                state_dict = train(folder, options.epochs, options.limit, options.state)
            metadata = describe(folder, options.data.stem, options.epochs, options.limit)
            metadata["accuracy"] = measure(state_dict, metadata, folder, options.limit)
            content = packed(state_dict, metadata)
        write(options.output, content)
    except KeyboardInterrupt:
        print("interrupted: the same command continues after the last epoch", file=sys.stderr)
        return 130
    accuracy = metadata["accuracy"]
    print(
        f"{options.output}: {len(content):,} bytes, {accuracy['top1']:.2%} top-1 over "
        f"{accuracy['pictures']:,} images in {accuracy['precision']}"
    )
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train r2n's demonstration network and export it.")
    parser.add_argument("data", type=Path, help="zip file or folder with train/ and test/")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"default {EPOCHS}")
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="use N images of train/ and N of test/, evenly spread",
    )
    parser.add_argument(
        "--state",
        type=Path,
        help="the training's state (default: OUTPUT with the suffix .training.pth)",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="CHECKPOINT",
        help="export this checkpoint instead of training",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("demo.safetensors"),
        help="replaced if it exists (default %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.epochs < 1 or (options.limit is not None and options.limit < 1):
        raise UsageError("--epochs and --limit must be at least 1")
    if not options.output.parent.is_dir():
        raise OutputError(f"{options.output}: there is no folder {options.output.parent}")
    options.state = options.state or options.output.with_suffix(".training.pth")
    return options


# --- images -----------------------------------------------------------------------------


@contextmanager
def unpacked(data: Path) -> Iterator[Path]:
    """Give the folder `data`, or a temporary folder with the content of the zip file `data`."""
    if data.is_dir():
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="train_demo-") as folder:
        try:
            with zipfile.ZipFile(data) as archive:
                archive.extractall(folder)
        except OSError as error:
            raise InputNotFoundError(f"{data}: {reason(error)}") from error
        except zipfile.BadZipFile as error:
            raise InputNotFoundError(f"{data}: neither a folder nor a zip file") from error
        yield Path(folder)


def class_names(folder: Path) -> list[str]:
    """Return the labels, which are the names of the folders in ``train/``."""
    if not (folder / "train").is_dir():
        raise InputNotFoundError(f"{folder}: expected train/ and test/ with a folder per class")
    return sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())


def image_paths(folder: Path, limit: int | None) -> list[Path]:
    """Return the images below a folder of class folders; with a limit, every n-th of them."""
    paths = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputNotFoundError(f"{folder}: no images in folders named after their classes")
    return paths[:: math.ceil(len(paths) / limit)] if limit else paths


def read_images(paths: Sequence[Path], labels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return pixels, uint8 [N, 32, 32, 3], and the index of each image's class, int64 [N]."""
    pixels = np.empty((len(paths), STORED_SIZE, STORED_SIZE, 3), dtype=np.uint8)
    for row, path in zip(pixels, paths, strict=True):
        try:
            with Image.open(path) as image:
                row[...] = np.asarray(image.convert("RGB").resize((STORED_SIZE, STORED_SIZE)))
        except OSError as error:
            raise InputNotFoundError(f"{path}: cannot be read as an image") from error
    targets = torch.tensor([labels.index(path.parent.name) for path in paths])
    return torch.from_numpy(pixels), targets


def augment(pixels: Tensor, random: Generator) -> Tensor:
    """Change a batch at random, upscale and normalise it.

    Photographs are sharper than upscaled images of 32x32 pixels. Three ways of upscaling, and
    sharpening, keep the network from relying on the blur.

    Parameters
    ----------
    pixels : uint8 tensor [N, 32, 32, 3]
    random : Generator
        On the CPU, so that a training draws the same numbers on every device.

    Returns
    -------
    float32 tensor [N, 3, 64, 64], channels_last
    """
    count, device = len(pixels), pixels.device

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=random)

    def uniform(low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(torch.rand((), generator=random))

    x = pixels.permute(0, 3, 1, 2).float() / 255
    flipped = integers(0, 1, count, 1, 1, 1).bool().to(device)
    x = torch.where(flipped, x.flip(3), x)

    grid = torch.arange(STORED_SIZE, device=device)
    rows, columns = grid + integers(0, 8, 2, count, 1).to(device)
    padded = functional.pad(x, (4, 4, 4, 4), mode="reflect").permute(0, 2, 3, 1)
    numbers = torch.arange(count, device=device)[:, None, None]
    x = padded[numbers, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    corner = integers(0, STORED_SIZE - 8, 2, count, 1).to(device)
    in_rows, in_columns = (grid >= corner) & (grid < corner + 8)
    patch = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
    x = x.masked_fill(patch, 0.5)

    if uniform() < 0.5:  # a zoom
        side = int(integers(24, 31))
        top, left = integers(0, STORED_SIZE - side, 2).tolist()
        x = x[:, :, top : top + side, left : left + side]

    mode = ("bilinear", "bicubic", "nearest")[int(integers(0, 2))]
    x = functional.interpolate(x, size=PREPROCESSING.image_size, mode=mode).clamp(0, 1)
    if uniform() < 0.3:
        blurred = functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        x = (x + uniform(0.5, 2.0) * (x - blurred)).clamp(0, 1)

    mean = torch.tensor(PREPROCESSING.mean, device=device).view(3, 1, 1)
    std = torch.tensor(PREPROCESSING.std, device=device).view(3, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


# --- training ---------------------------------------------------------------------------


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: it rises from a 25th of the peak, then falls to nearly zero.

    It depends on the step alone, so that a resumed training has no schedule to restore.
    """
    warm_up = WARM_UP * steps
    first, last = PEAK_LEARNING_RATE / 25, PEAK_LEARNING_RATE / 250_000
    if step < warm_up:
        begin, progress = first, step / warm_up
    else:
        begin, progress = last, 1 - (step - warm_up) / (steps - warm_up)
    return begin + (PEAK_LEARNING_RATE - begin) * (1 - math.cos(math.pi * progress)) / 2


def train(folder: Path, epochs: int, limit: int | None, state_file: Path) -> StateDict:
    """Train on ``train/`` for `epochs` epochs, continuing from `state_file` if it exists.

    The random numbers of an epoch depend only on its number, so that a resumed training sees
    the same batches as an uninterrupted one.
    """
    labels = class_names(folder)
    paths = image_paths(folder / "train", limit)
    settings: Settings = {"epochs": epochs, "images": len(paths), "labels": labels}

    torch.manual_seed(0)
    network = Res2Net(replace(ARCHITECTURE, classes=len(labels)))
    for module in network.modules():
        if isinstance(module, Bottle2neck):
            torch.nn.init.zeros_(module.bn3.weight)  # each block starts as its shortcut
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(memory_format=torch.channels_last).to(device)
    optimizer = torch.optim.SGD(
        network.parameters(), momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    done = resume(state_file, settings, network, optimizer)
    if done < epochs:
        pixels, targets = (tensor.to(device) for tensor in read_images(paths, labels))
    for epoch in range(done, epochs):
        started = time.monotonic()
        loss = train_epoch(network, optimizer, pixels, targets, epoch, epochs)
        seconds = time.monotonic() - started
        print(f"epoch {epoch + 1} of {epochs}: loss {loss:.4f}, {seconds:.1f} s", flush=True)
        buffer = io.BytesIO()
        state = {
            "epoch": epoch + 1,
            "settings": settings,
            "model": network.state_dict(),  # a name that r2n --weights recognises
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, buffer)
        write(state_file, buffer.getvalue())
    return {name: tensor.cpu() for name, tensor in network.state_dict().items()}


def resume(
    state_file: Path, settings: Settings, network: Res2Net, optimizer: torch.optim.Optimizer
) -> int:
    """Load the saved state, if there is one, and return the number of finished epochs."""
    if not state_file.exists():
        return 0
    try:
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        found = state["settings"]
    except Exception as error:  # a file of another kind fails in many ways
        raise CheckpointError(f"{state_file}: not the state of a training") from error
    if found != settings:
        raise OutputError(
            f"{state_file}: is the state of a training with {found}, expected {settings}. Give "
            "another --state, or delete this one to start again"
        )
    network.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"{state_file}: {state['epoch']} of {settings['epochs']} epochs are done")
    return int(state["epoch"])


def train_epoch(
    network: Res2Net,
    optimizer: torch.optim.Optimizer,
    pixels: Tensor,
    targets: Tensor,
    epoch: int,
    epochs: int,
) -> float:
    """Train on every image once and return the mean loss."""
    random = Generator().manual_seed(epoch)
    order = torch.randperm(len(pixels), generator=random).to(pixels.device)
    batches = torch.split(order, BATCH_SIZE)
    on_gpu = pixels.device.type == "cuda"
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0) if on_gpu else cpu_has_bf16()
    total = torch.zeros((), device=pixels.device)
    network.train()
    for number, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch * len(batches) + number, epochs * len(batches))
        x = augment(pixels[batch], random)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=has_bf16):
            logits = network(x)
        loss = functional.cross_entropy(
            logits.float(), targets[batch], label_smoothing=LABEL_SMOOTHING
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(batch)
    return float(total) / len(pixels)


# --- export -----------------------------------------------------------------------------


def describe(folder: Path, data: str, epochs: int, limit: int | None) -> dict[str, Any]:
    """Return the checkpoint's metadata without its accuracy.

    The recipe's wording and the key "pictures" are those of the file that is part of r2n: an
    export of the same weights must have the same SHA-256.
    """
    count = len(image_paths(folder / "train", limit))
    preprocessing = asdict(PREPROCESSING)
    return {
        "variant": "demo",
        "labels": class_names(folder),
        "preprocessing": preprocessing,
        "recipe": (
            f"{epochs} epochs of the {count:,} training pictures of {data}; SGD with Nesterov "
            f"momentum {MOMENTUM}, weight decay {WEIGHT_DECAY}, one-cycle learning rate up to "
            f"{PEAK_LEARNING_RATE} ({WARM_UP:.0%} warm-up), batch {BATCH_SIZE}, label smoothing "
            f"{LABEL_SMOOTHING}, last batch norm of each block starting at zero, bf16 autocast "
            "where there is hardware for it. "
            "Augmentation: horizontal flip, shift by up to 4 pixels, an 8x8 patch greyed out; in "
            "half of the batches a zoom to 24-31 pixels; upscaled to 64x64 by bilinear, bicubic "
            "or nearest interpolation and, in three batches of ten, sharpened by 0.5-2 times the "
            "difference to the 3x3 mean. Stored as fp16."
        ),
    }


def packed(state_dict: StateDict, metadata: dict[str, Any]) -> bytes:
    """Return a safetensors file with the weights as fp16 and the metadata for r2n."""
    halves = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in state_dict.items()
    }
    content = safetensors.torch.save(halves, metadata={"r2n": json.dumps(metadata)})
    if len(content) > LARGEST_EXPORT:
        raise OutputError(
            f"the export has {len(content):,} bytes, more than the limit of {LARGEST_EXPORT:,}"
        )
    return content


def measure(
    state_dict: StateDict, metadata: dict[str, Any], folder: Path, limit: int | None
) -> dict[str, Any]:
    """Return the top-1 accuracy of the exported weights on ``test/``, classified by r2n."""
    paths = image_paths(folder / "test", limit)
    with tempfile.TemporaryDirectory(prefix="train_demo-") as temporary:
        weights, rows = Path(temporary, "demo.safetensors"), Path(temporary, "test.csv")
        weights.write_bytes(packed(state_dict, metadata))
        record = classify_to(rows, paths, topk=1, weights=weights, precision="fp32")
        with open(rows, encoding="utf-8", newline="") as file:
            right = sum(
                row["label_1"] == Path(row["path"]).parent.name for row in csv.DictReader(file)
            )
    return {
        "top1": right / len(paths),
        "pictures": len(paths),
        "precision": record["precision"],
        "measured": "by r2n classify over the files of test/",
    }


def write(path: Path, content: bytes) -> None:
    """Replace the file `path` by one with this content, completely or not at all."""
    try:
        write_whole(path, [content])
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({reason(error)})") from error


if __name__ == "__main__":
    try:
        sys.exit(main())
    except R2NError as error:  # expected: one sentence, not a traceback
        print(f"train_demo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
