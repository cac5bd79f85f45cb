"""Find a checkpoint file, hash it and read its metadata, without torch.

A checkpoint is looked for in this order: the option, ``R2N_WEIGHTS``, torch.hub's folder,
the official URL. Nothing here ever falls back from one network to another.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from r2ncli.architectures import (
    DEFAULT_NETWORK,
    DEMO,
    OFFICIAL_URL,
    PUBLISHED,
    Preprocessing,
    PublishedNetwork,
    published,
)
from r2ncli.errors import CheckpointError, escaped
from r2ncli.files import reason
from r2ncli.web import is_file, is_web, requested, without_secrets
from r2ncli.weights.containers import SUFFIXES, container, reading, safetensors_header, shown
from r2ncli.weights.download import OnProgress, download_file, hash_prefix

Weights = str | os.PathLike[str] | None  # a file, a published name or ``demo``

# the metadata that decides what r2n does; any other key is a note and is kept unchanged
KEYS = ("labels", "wnids", "preprocessing")
# Labels, synsets and preprocessing of 21,000 classes take 1 MB; the rest is for notes.
METADATA_LIMIT = 8_000_000  # bytes
_METADATA_DEPTH = 32
_KEYS_COMPARED = 1000
LONGEST_LABEL = 1000  # characters; the longest of ImageNet's 21,000 has 200
PREPROCESSING_KEYS = tuple(field.name for field in fields(Preprocessing))
# keys that other programs use for the same things
_SYNONYMS = {
    **dict.fromkeys(("classes", "class_names", "names", "categories"), "labels"),
    **dict.fromkeys(("synsets", "wordnet_ids"), "wnids"),
    **dict.fromkeys(("transform", "transforms", *PREPROCESSING_KEYS), "preprocessing"),
}


@dataclass(frozen=True)
class Labels:
    """What the logits stand for: a label and, for ImageNet, a synset (wnid) each."""

    labels: tuple[str, ...]
    wnids: tuple[str, ...] | None = None


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint file that was found and checked, but whose tensors are not loaded.

    `sha256` is that of the file, as 64 hex digits; for `metadata` see `read_metadata`.
    """

    path: Path
    sha256: str
    metadata: dict[str, Any]
    preprocessing: Preprocessing

    def labels(self, classes: int) -> Labels | None:
        """Return the labels of a network of `classes` classes (see `labels_of`)."""
        return labels_of(self.metadata, classes, self.path)


def open_checkpoint(
    weights: Weights = None,
    *,
    download: bool = True,
    on_progress: OnProgress | None = None,
) -> CheckpointFile:
    """Find a checkpoint (see `find_checkpoint`), check it, and read its metadata.

    Raises
    ------
    CheckpointError
        The file is absent, not a checkpoint or not the published one, or its metadata cannot
        be used.
    """
    path = find_checkpoint(weights, download=download, on_progress=on_progress)
    container(path)
    digest, metadata = checked_sha256(path), read_metadata(path)
    return CheckpointFile(path, digest, metadata, preprocessing_of(metadata, path))


# --- find ---------------------------------------------------------------------------


def requested_weights(weights: Weights = None) -> str:
    """Return the weights to load: `weights`, or ``$R2N_WEIGHTS``, or the default network."""
    if weights is None:
        weights = os.environ.get("R2N_WEIGHTS") or DEFAULT_NETWORK
    return os.fspath(weights)


def find_checkpoint(
    weights: Weights = None,
    *,
    download: bool = True,
    on_progress: OnProgress | None = None,
) -> Path:
    """Return the path of the checkpoint that `weights` means; download it if necessary.

    Parameters
    ----------
    weights : str, path or None
        A file, a published network's name, or ``demo``. None means ``$R2N_WEIGHTS``, or
        else the default network.
    download : bool
        Whether an official file that is not on this machine may be downloaded.
    on_progress : callable, optional
        Called with a `DownloadProgress` during a download.

    Raises
    ------
    CheckpointError
        The file does not exist, cannot be downloaded, or is not the published one.
    """
    wanted = requested_weights(weights)
    if wanted == DEMO:
        return Path(str(files("r2ncli").joinpath("demo.safetensors")))
    if network := published(wanted):
        return _find_published(network, download, on_progress)
    if found := existing_file(wanted):
        return found
    raise CheckpointError(
        f"no such weights: {wanted!r}. Expected a checkpoint file ({', '.join(SUFFIXES)}), "
        f"'{DEMO}', or one of: {', '.join(PUBLISHED)}"
    )


def find_on_this_machine(file: Weights) -> Path:
    """Return the path of the checkpoint file that `file` means (see `verify_weights`).

    Nothing is downloaded.

    Raises
    ------
    CheckpointError
        There is no such file.
    """
    if file is None:
        return find_checkpoint(download=False)
    wanted = os.fspath(file)
    if found := existing_file(wanted):
        return found
    if os.path.dirname(wanted):
        raise CheckpointError(f"no such file: {wanted}")
    if wanted and (found := existing_file(hub_folder() / wanted)):
        return found
    if wanted == DEMO or published(wanted):
        return find_checkpoint(wanted, download=False)
    raise CheckpointError(f"no such file: {wanted or repr(wanted)} (nor in {hub_folder()})")


def _find_published(
    network: PublishedNetwork, download: bool, on_progress: OnProgress | None
) -> Path:
    folder = hub_folder()
    if found := existing_file(folder / network.file):
        return found
    if not download:
        raise CheckpointError(f"{network.file} is not in {folder}, and nothing was downloaded")
    if folder.parts[0].startswith("~"):  # a folder of this name is never made
        raise CheckpointError(
            f"{network.file} cannot be downloaded into {folder}: the home folder of this user is "
            "unknown. Name a folder for it in TORCH_HOME"
        )
    base = os.environ.get("R2N_WEIGHTS_BASE_URL") or OFFICIAL_URL
    return download_file(_url_in(base, network.file), folder / network.file, on_progress)


def _url_in(base: str, file: str) -> str:
    """Return the URL of a file in the mirror `base`, which may have a password and a query."""
    try:
        known = is_web(base) or is_file(base)
        if is_web(base):
            requested(base)
    except ValueError:
        known = False
    if not known or "#" in base:
        raise CheckpointError(
            f"R2N_WEIGHTS_BASE_URL is {without_secrets(base)!r}: expected the URL of a mirror, "
            f"such as {OFFICIAL_URL} or file:///a/folder/"
        )
    folder, mark, query = base.partition("?") if is_web(base) else (base, "", "")
    return f"{folder.rstrip('/')}/{file}{mark}{query}"


def existing_file(name: str | Path) -> Path | None:
    """Return the file, or the one whose name differs only in ``-`` and ``_``, or None.

    A ``~`` at its beginning is the home folder, unless there is a file of this name.
    """
    path = Path(name)
    if os.fspath(path).startswith("~") and not os.path.lexists(path):
        path = Path(os.path.expanduser(path))
    try:
        if not name:
            return None
        if path.exists():
            return path
        alike = path.name.replace("-", "_")
        for name in sorted(os.listdir(path.parent)):
            if name.replace("-", "_") == alike and (path.parent / name).exists():
                return path.parent / name
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from error
    return None


def hub_folder() -> Path:
    """Return torch.hub's checkpoints folder, by torch.hub's own rule."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or os.path.join(cache, "torch")
    return Path(os.path.expanduser(home), "hub", "checkpoints")


def published_file(name: str) -> PublishedNetwork | None:
    """Return the published network whose file has this name; ``-`` and ``_`` count as equal."""
    plain = name.replace("-", "_")
    return next((n for n in PUBLISHED.values() if n.file.replace("-", "_") == plain), None)


def named_variant(path: Path) -> str | None:
    """Return the published network that a file is named after, ignoring the hash prefix."""
    stem = re.sub(r"[-_][0-9a-f]{8,64}$", "", path.stem).replace("-", "_")
    for network in PUBLISHED.values():
        if stem in (network.name, network.file.rpartition("-")[0]):
            return network.name
    return None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as 64 hex digits."""
    with reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_sha256(path: Path) -> str:
    """Return the SHA-256 of a checkpoint; check it where the file has a published name.

    Raises
    ------
    CheckpointError
        The file has a published name, and its SHA-256 does not start as the published one.
    """
    digest = sha256(path)
    network = published_file(path.name)
    prefix = (hash_prefix(network.file) if network else None) or ""
    if not digest.startswith(prefix):
        raise CheckpointError(
            f"{path}: not the published file: expected a SHA-256 that starts with {prefix}, "
            f"as the name says, got {digest[:8]}…. The download is corrupted or the file was "
            "altered: move it away and download it again. If it is your own, rename it"
        )
    return digest


# --- labels and preprocessing ---------------------------------------------------------


def read_metadata(path: Path) -> dict[str, Any]:
    """Return a checkpoint's metadata: `labels`, `wnids`, `preprocessing`, and more.

    In a safetensors file of any name, the metadata is JSON in the header under the
    key ``r2n``. Otherwise it is a JSON file beside the checkpoint: for ``mine.pth`` this is
    ``mine.pth.json`` or ``mine.json``. A checkpoint without metadata gives an empty dict.

    Raises
    ------
    CheckpointError
        The metadata is not a JSON object, or has a key that is likely a mistake for one of
        r2n's.
    """
    header = safetensors_header(path)
    if header is not None:
        try:
            metadata = _json_object(path, header).get("__metadata__", {})
        except CheckpointError as error:
            raise CheckpointError(
                f"{path}: corrupted, the header of the safetensors file is not JSON"
            ) from error
        if isinstance(metadata, dict) and "r2n" in metadata:
            return _checked_keys(path, _json_object(path, metadata["r2n"]))
    for beside in (path.with_name(path.name + ".json"), path.with_suffix(".json")):
        if os.path.isfile(beside):  # not a pipe or a device, nor a name that is too long
            with reading(beside) as file:
                text = file.read(METADATA_LIMIT + 1)
            return _checked_keys(beside, _json_object(beside, text))
    return {}


def _checked_keys(source: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Refuse a key that would be ignored although it seems to be meant for r2n."""
    for key, value in islice(metadata.items(), _KEYS_COMPARED):
        near = difflib.get_close_matches(key.lower(), KEYS, n=1, cutoff=0.75)
        meant = near[0] if near else _SYNONYMS.get(key)
        note = meant in ("labels", "wnids") and not isinstance(value, list | dict)
        if key not in KEYS and meant is not None and meant not in metadata and not note:
            known = ", ".join(KEYS)
            raise CheckpointError(f"{source}: unknown key {shown(key)} (known: {known})")
    preprocessing = metadata.get("preprocessing")
    for key in preprocessing if isinstance(preprocessing, dict) else ():
        if key not in PREPROCESSING_KEYS:
            known = ", ".join(PREPROCESSING_KEYS)
            raise CheckpointError(
                f"{source}: unknown key {shown(key)} in preprocessing (known: {known})"
            )
    return metadata


def labels_of(metadata: dict[str, Any], classes: int, source: Path) -> Labels | None:
    """Return the labels in `metadata`; for 1000 classes without labels those of ImageNet.

    Raises
    ------
    CheckpointError
        The labels are not strings, or not one for each class.
    """
    labels = metadata.get("labels")
    if labels is None:
        return imagenet_labels() if classes == 1000 else None
    wnids = metadata.get("wnids")
    for key in ("labels", "wnids"):
        if (names := metadata.get(key)) is None:
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{source}: expected '{key}' to be a list of strings")
        if (longest := max(map(len, names), default=0)) > LONGEST_LABEL:
            raise CheckpointError(
                f"{source}: one of the {key} has {longest:,} characters, more than the limit of "
                f"{LONGEST_LABEL:,}"
            )
        if len(names) != classes:
            count = f"{len(names)} {key}"
            raise CheckpointError(f"{source}: {count} for a network of {classes} classes")
    return Labels(
        tuple(map(escaped, labels)), tuple(map(escaped, wnids)) if wnids is not None else None
    )


def preprocessing_of(metadata: dict[str, Any], source: Path) -> Preprocessing:
    """Return the preprocessing in `metadata`; that of ImageNet where there is none.

    Raises
    ------
    CheckpointError
        A value cannot be used.
    """
    given = metadata.get("preprocessing", {})
    try:
        if not isinstance(given, dict):
            raise ValueError(f"{reprlib.repr(given)} is not an object")
        values = dict(given)
        for key, value in given.items():
            if key in ("image_size", "resize_size") and type(value) is not int:
                found = reprlib.repr(value)
                raise ValueError(f"{key} {found}: expected a whole number of pixels")
            if key in ("image_size", "resize_size") and abs(value) > 1_000_000:
                raise ValueError(f"{key} has more than a million pixels")
            if key in ("mean", "std"):
                if not _are_finite_numbers(value):
                    found = reprlib.repr(value)
                    raise ValueError(f"{key} {found}: expected a list of three finite numbers")
                values[key] = tuple(map(float, value))
        return Preprocessing(**values)
    except (ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{source}: invalid 'preprocessing': {error}. Known keys: "
            f"{', '.join(PREPROCESSING_KEYS)}"
        ) from error


def _are_finite_numbers(value: object) -> bool:
    return isinstance(value, list | tuple) and all(
        type(number) in (int, float) and math.isfinite(number) for number in value
    )


def imagenet_labels() -> Labels:
    """Return the 1000 labels and synsets of ImageNet-1k, in the order of the logits."""
    with files("r2ncli").joinpath("imagenet_classes.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return Labels(tuple(row["label"] for row in rows), tuple(row["wnid"] for row in rows))


def _json_object(source: Path, text: bytes | str) -> dict[str, Any]:
    if isinstance(text, str | bytes) and len(text) > METADATA_LIMIT:
        raise CheckpointError(
            f"{source}: its metadata has more than {METADATA_LIMIT:,} bytes, which is the limit"
        )
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{source}: its metadata is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: its metadata is not a JSON object")
    level: list[Any] = [value]
    for _ in range(_METADATA_DEPTH):
        level = [part for node in level for part in _parts(node)]
        if not level:
            return value
    raise CheckpointError(f"{source}: its metadata is nested more than {_METADATA_DEPTH} deep")


def _parts(value: object) -> Iterable[Any]:
    """Return the objects and lists that are directly in a JSON value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (part for part in inner if isinstance(part, dict | list))
