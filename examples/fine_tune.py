"""Fine-tune a checkpoint on a folder of class folders, then classify with the result.

    python examples/fine_tune.py photos --weights res2net50_v1b_26w_4s -o mine.safetensors
    python examples/fine_tune.py photos/train --val photos/val --device cuda:0
    r2n classify other_photos --weights mine.safetensors

`photos/` holds one folder per class: `photos/cat/1.jpg`, `photos/dog/1.jpg`. The new
classifier is trained alone first, then the whole network. After each epoch the accuracy on
the validation images is printed; they are prepared exactly as `r2n classify` does it. The
output file contains the labels and the preprocessing, so that r2n needs nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2ncli import DeviceError, InputNotFoundError, OutputError, R2NError, UsageError

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset
    from torchvision.datasets import ImageFolder

    from r2ncli import Preprocessing


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # torch takes seconds to import, so that is done below, after the first message
    print(f"Fine-tuning {options.weights} on {options.folder}: loading ...", flush=True)
    try:
        fine_tune(options)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        size = options.batch_size
        raise DeviceError(f"out of memory at --batch-size {size}: try a smaller one") from error
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, and check what can be checked before anything is loaded."""
    parser = argparse.ArgumentParser(description="Fine-tune on a folder of class folders.")
    parser.add_argument("folder", type=Path, help="contains one folder of images per class")
    parser.add_argument("--weights", default="res2net50_v1b_26w_4s", help="file or published name")
    parser.add_argument(
        "--val",
        default="0.2",
        metavar="FOLDER|FRACTION",
        help="validation images: a folder of class folders, or the fraction of each class to hold "
        "out; 0 means no validation (default %(default)s)",
    )
    parser.add_argument("--epochs", type=int, default=5, help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU if there is one)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("mine.safetensors"),
        help="must end in .safetensors; replaced if it exists (default %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.batch_size < 1:
        raise UsageError("--epochs and --batch-size must be at least 1")
    if options.output.suffix != ".safetensors":
        raise UsageError(f"{options.output}: the output's name must end in .safetensors")
    if not options.output.parent.is_dir():
        raise OutputError(f"{options.output}: there is no folder {options.output.parent}")
    if not options.folder.is_dir():
        raise InputNotFoundError(f"{options.folder}: no such folder")
    if not Path(options.val).is_dir():
        try:
            options.val = float(options.val)
        except ValueError:
            raise InputNotFoundError(f"--val {options.val}: no such folder") from None
        if not 0 <= options.val < 1:
            raise UsageError(f"--val {options.val:g}: a fraction must be at least 0 and below 1")
    return options


def fine_tune(options: argparse.Namespace) -> None:
    """Train, print the loss and the validation accuracy of each epoch, and save the network."""
    import torch
    from safetensors.torch import save
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader

    from r2ncli.weights.loading import load_checkpoint

    torch.manual_seed(options.seed)
    device = find_device(options.device)
    checkpoint = load_checkpoint(options.weights)
    preprocessing = checkpoint.preprocessing
    training, validation, labels = datasets(
        options.folder, options.val, options.seed, preprocessing
    )
    network = checkpoint.network
    network.fc = torch.nn.Linear(network.fc.in_features, len(labels))
    network.to(device)
    print(
        f"{len(labels)} classes, {len(training):,} images for training, "
        f"{len(validation):,} for validation, on {device}",
        flush=True,
    )

    network.requires_grad_(False)  # in eval mode batch norms keep their statistics too
    classifier_epochs = max(1, options.epochs // 3)
    for epoch in range(options.epochs):
        if epoch == 0:  # a random classifier would spoil the layers below it
            optimizer = torch.optim.AdamW(network.fc.requires_grad_().parameters(), lr=1e-3)
        elif epoch == classifier_epochs:
            optimizer = torch.optim.AdamW(network.requires_grad_().parameters(), lr=1e-4)
        total = 0.0
        for images, classes in DataLoader(training, options.batch_size, shuffle=True):
            loss = cross_entropy(network(images.to(device)), classes.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(images)
        line = f"epoch {epoch + 1} of {options.epochs}: loss {total / len(training):.3f}"
        if len(validation):
            right = 0
            with torch.inference_mode():
                for images, classes in DataLoader(validation, options.batch_size):
                    predicted = network(images.to(device)).argmax(1).cpu()
                    right += int((predicted == classes).sum())
            line += f", validation accuracy {100 * right / len(validation):.1f} %"
        print(line, flush=True)

    metadata = {"labels": labels, "preprocessing": asdict(preprocessing)}
    tensors = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    try:
        options.output.write_bytes(save(tensors, {"r2n": json.dumps(metadata)}))
    except OSError as error:
        raise OutputError(f"{options.output}: cannot be written ({error.strerror})") from error
    print(f"Saved {options.output}. Use it: r2n classify IMAGES --weights {options.output}")


def find_device(name: str) -> torch.device:
    """Return the device `name`; ``auto`` is a GPU if there is one, else the CPU."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"--device {name}: torch cannot use it ({reason})") from error


def datasets(
    folder: Path, val: str | float, seed: int, preprocessing: Preprocessing
) -> tuple[Dataset[Any], Dataset[Any], list[str]]:
    """Return the images for training, those for validation, and the labels.

    Parameters
    ----------
    folder : Path
        Contains one folder of images per class.
    val : str or float
        Another such folder, or the fraction of each class to hold out for validation.
    seed : int
        Decides which images are held out.
    preprocessing : Preprocessing
        How images become the network's input.
    """
    import torch
    from PIL import Image
    from torch.utils.data import Subset
    from torchvision import transforms

    from r2ncli.errors import ImageError
    from r2ncli.images.decode import DecodeRules, decode

    rules = DecodeRules("auto")  # as `r2n classify` does by default

    def read(path: str) -> Image.Image:
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, Image.DecompressionBombError) as error:
            raise InputNotFoundError(f"{path}: cannot be read as an image") from error

    def read_as_r2n(path: str) -> Any:  # uint8 [image_size, image_size, 3]
        try:
            return decode(Path(path).read_bytes(), preprocessing, rules).copy()
        except (OSError, ImageError) as error:
            raise InputNotFoundError(f"{path}: {error}") from error

    to_input = [
        transforms.ToTensor(),
        transforms.Normalize(preprocessing.mean, preprocessing.std),
    ]
    augment = [
        transforms.RandomResizedCrop(preprocessing.image_size, scale=(0.5, 1)),
        transforms.RandomHorizontalFlip(),
    ]
    photos = class_folders(folder, transforms.Compose([*augment, *to_input]), read)
    plain = transforms.Compose(to_input)
    if isinstance(val, str):
        validation = class_folders(Path(val), plain, read_as_r2n)
        if validation.classes != photos.classes:
            raise InputNotFoundError(
                f"--val {val}: its class folders are {', '.join(validation.classes)}; those of "
                f"{folder} are {', '.join(photos.classes)}"
            )
        return photos, validation, photos.classes

    random = torch.Generator().manual_seed(seed)
    kept: list[int] = []
    held_out: list[int] = []
    targets = torch.tensor(photos.targets)
    for number in range(len(photos.classes)):
        members = (targets == number).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=random)].tolist()
        # at least one, but never all
        count = min(max(1, round(val * len(members))), len(members) - 1) if val else 0
        held_out += members[:count]
        kept += members[count:]
    validation = class_folders(folder, plain, read_as_r2n)
    return Subset(photos, kept), Subset(validation, held_out), photos.classes


def class_folders(folder: Path, transform: Any, loader: Any) -> ImageFolder:
    """Return the images below a folder of class folders."""
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(folder), transform, loader=loader)
    except OSError as error:  # an empty folder, or one that cannot be read
        reason = str(error).split(". ")[0].rstrip(".")
        raise InputNotFoundError(
            f"{folder}: expected one folder of images per class ({reason})"
        ) from error


if __name__ == "__main__":
    try:
        sys.exit(main())
    except R2NError as error:  # expected: one sentence, not a traceback
        print(f"fine_tune: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("fine_tune: interrupted, nothing was saved", file=sys.stderr)
        sys.exit(130)
