"""A checkpoint as a file: find it, hash it, read its labels. No torch.

A checkpoint is looked for in the order that CONTRACTS and the README give: the option,
``R2N_WEIGHTS``, torch.hub's folder, the official address. Nothing here ever falls back
from one network to another.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from r2ncli.architectures import (
    DEFAULT_NETWORK,
    DEMO,
    OFFICIAL_ADDRESS,
    PUBLISHED,
    Preprocessing,
    PublishedNetwork,
)
from r2ncli.errors import CheckpointError
from r2ncli.files import reason
from r2ncli.weights.containers import HEADER_LIMIT, SUFFIXES, reading
from r2ncli.weights.download import OnProgress, digits_in_name, download_file


@dataclass(frozen=True)
class Labels:
    """What the logits stand for: a label and, for ImageNet, a synset (wnid) each."""

    labels: tuple[str, ...]
    wnids: tuple[str, ...] | None = None


# --- find ---------------------------------------------------------------------------


def find_checkpoint(
    weights: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
    on_progress: OnProgress | None = None,
) -> Path:
    """The file that `weights` means, downloaded if it must be.

    Parameters
    ----------
    weights : str, path or None
        A file, a published network's name, or ``demo``. None means ``$R2N_WEIGHTS``, or
        else the default network.
    download : bool
        Whether an official file that is nowhere on this machine may be fetched.
    on_progress : callable, optional
        Called with a `DownloadProgress` as a download goes on.

    Raises
    ------
    CheckpointError
        The file is nowhere, cannot be fetched, or is not the published one.
    """
    if weights is None:
        weights = os.environ.get("R2N_WEIGHTS") or DEFAULT_NETWORK
    wanted = os.fspath(weights)
    if wanted == DEMO:
        return Path(str(files("r2ncli").joinpath("demo.safetensors")))
    name = wanted.replace("-", "_")
    if name in PUBLISHED:
        return _find_published(PUBLISHED[name], download, on_progress)
    found = existing_file(Path(wanted)) if wanted else None
    if found is None:
        raise CheckpointError(
            f"no such weights: {wanted!r}. Expected a checkpoint file ({', '.join(SUFFIXES)}), "
            f"'{DEMO}', or one of: {', '.join(PUBLISHED)}"
        )
    return found


def _find_published(
    network: PublishedNetwork, download: bool, on_progress: OnProgress | None
) -> Path:
    folder = hub_folder()
    found = existing_file(folder / network.file)
    if found is not None:
        return found
    if not download:
        raise CheckpointError(f"{network.file} is not in {folder}, and nothing was downloaded")
    base = os.environ.get("R2N_WEIGHTS_BASE_URL") or OFFICIAL_ADDRESS
    try:
        address = urljoin(base if base.endswith("/") else base + "/", network.file)
        known = urlsplit(address).scheme in ("http", "https", "file")
    except ValueError:
        known = False
    if not known:
        raise CheckpointError(
            f"R2N_WEIGHTS_BASE_URL is {base!r}: expected the address of a mirror, such as "
            f"{OFFICIAL_ADDRESS} or file:///a/folder/"
        )
    return download_file(address, folder / network.file, on_progress)


def existing_file(path: Path) -> Path | None:
    """`path`, or its twin with hyphens or underscores exchanged; None where neither is."""
    try:
        if path.exists():
            return path
        twin = path.name.replace("-", "_")
        for name in sorted(os.listdir(path.parent)):
            if name.replace("-", "_") == twin and (path.parent / name).exists():
                return path.parent / name
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from error
    return None


def hub_folder() -> Path:
    """torch.hub's checkpoints folder, by torch.hub's own rule."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or os.path.join(cache, "torch")
    return Path(os.path.expanduser(home), "hub", "checkpoints")


def published_file(name: str) -> PublishedNetwork | None:
    """The published network whose file is called `name`, hyphens or underscores alike."""
    plain = name.replace("-", "_")
    for network in PUBLISHED.values():
        if network.file.replace("-", "_") == plain:
            return network
    return None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as 64 hex digits."""
    with reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_sha256(path: Path) -> str:
    """The SHA-256 of a checkpoint; a file that bears a published name must be that file."""
    digest = sha256(path)
    network = published_file(path.name)
    if network is not None:
        digits = digits_in_name(network.file) or ""
        if not digest.startswith(digits):
            raise CheckpointError(
                f"{path}: not the published file. Its SHA-256 starts {digest[:8]}, the name says "
                f"{digits}: a broken or altered download. Delete it, or give a file of your own "
                "another name"
            )
    return digest


# --- labels and preprocessing ---------------------------------------------------------


def read_metadata(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: `labels`, `wnids`, `preprocessing`, and more.

    In a .safetensors file it stands in the header, as JSON under the key ``r2n``; otherwise
    in a JSON file beside it (``mine.pth`` and ``mine.pth.json``, or ``mine.json``). A
    checkpoint that says nothing gives an empty dict.
    """
    if path.suffix == ".safetensors":
        with reading(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = _json_object(path, file.read(length)) if length < HEADER_LIMIT else {}
        metadata = header.get("__metadata__", {})
        if isinstance(metadata, dict) and "r2n" in metadata:
            return _json_object(path, metadata["r2n"])
    for beside in (path.with_name(path.name + ".json"), path.with_suffix(".json")):
        if beside.is_file():
            with reading(beside) as file:
                return _json_object(beside, file.read())
    return {}


def labels_of(metadata: dict[str, Any], classes: int, source: Path) -> Labels | None:
    """The labels that `metadata` gives; ImageNet's for a network of 1000 classes without any."""
    labels = metadata.get("labels")
    if labels is None:
        return imagenet_labels() if classes == 1000 else None
    wnids = metadata.get("wnids")
    for key, names in (("labels", labels), ("wnids", wnids)):
        if names is None and key == "wnids":
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{source}: its '{key}' are not a list of strings")
        if len(names) != classes:
            raise CheckpointError(
                f"{source}: {len(names)} {key} for a network of {classes} classes"
            )
    return Labels(tuple(labels), tuple(wnids) if wnids is not None else None)


def preprocessing_of(metadata: dict[str, Any], source: Path) -> Preprocessing:
    """The preprocessing that `metadata` gives; ImageNet's where it gives none."""
    try:
        given: dict[str, Any] = {
            key: tuple(float(number) for number in value) if isinstance(value, list) else value
            for key, value in metadata.get("preprocessing", {}).items()
        }
        preprocessing = Preprocessing(**given)
        for size in (preprocessing.image_size, preprocessing.resize_size):
            if type(size) is not int:
                raise TypeError(f"a size of {size!r} pixels")
        if not all(math.isfinite(number) for number in preprocessing.mean + preprocessing.std):
            raise ValueError("mean and std must be finite")
        return preprocessing
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{source}: its 'preprocessing' is unfit ({error}). Expected any of image_size, "
            "resize_size, mean, std, crop"
        ) from error


def imagenet_labels() -> Labels:
    """The 1000 labels and synsets of ImageNet-1k, in the order of the logits."""
    with files("r2ncli").joinpath("imagenet_classes.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return Labels(tuple(row["label"] for row in rows), tuple(row["wnid"] for row in rows))


def _json_object(source: Path, text: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{source}: its metadata is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: its metadata is no JSON object")
    return value
