"""What is kept beside the rows of an output: the run record, and the stamps of the inputs.

The run record holds every setting; its fingerprint is a digest of those that decide the values.

The stamps are the sizes and times of the files behind the rows, in ``OUT.inputs``. `resume`
compares them, so that an image that was replaced under the same name is noticed. The file holds two
little-endian int64 per row, the size in bytes and the modification time in nanoseconds, both
-1 where the input was no local file. It has no other use: without it only names are compared.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from r2ncli.files import open_regular
from r2ncli.images.decoders import decoder_versions
from r2ncli.outputs.formats import FORMATS
from r2ncli.outputs.reading import shortened
from r2ncli.sources.content import Stamp
from r2ncli.weights.checkpoints import Labels

STAMP_BYTES = 16
STAMPS_AT_ONCE = 4096
NO_STAMP = Stamp(-1, -1)
MOST_BYTES = 2**50  # of an input: text at the place of a stamp is a larger number

DIFFERENCES_SHOWN = 20
EXECUTED = "executed_batch_size"  # in the record only where memory did not hold a whole batch


def fingerprint(record: dict[str, Any]) -> str:
    """Return a digest of the settings that decide the values."""
    settings = json.dumps(deciding_settings(record), sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()


def deciding_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a record that decide the values, flat, under the names users know."""
    flat: dict[str, Any] = {}
    for key in (
        *("command", "layers", "pool", "dtype", "topk", "labels_sha256"),
        *("backend", "precision", "batch_size"),
    ):
        if key in record:
            flat[key] = record[key]
    kept = {
        "checkpoint": ("sha256", "variant"),
        "device": ("kind", "model"),
        "calibration": ("sha256",),
        "versions": (
            *("r2n", "engine"),
            *decoder_versions(),
            *(name for format in FORMATS.values() for name in format.packages),
        ),
        # older records hold the rules in words, which the version replaces
        "decode_rules": ("version", "decode", "max_pixels", "max_bytes"),
    }
    groups = (
        *("checkpoint", "device", "calibration", "versions"),
        *("inputs", "preprocessing", "decode_rules"),
    )
    for group in groups:
        for key, value in record.get(group, {}).items():
            if key in kept.get(group, (key,)):
                flat[f"{group} {key}"] = value
    return flat


def differing_settings(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the deciding settings that differ, by name; None where one record has none."""
    before, after = deciding_settings(then), deciding_settings(now)
    return {
        key: (before.get(key), after.get(key))
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    }


def in_words(differing: dict[str, tuple[Any, Any]]) -> str:
    """Return the differences as text: ``topk was 5, is 3; …``."""
    return "; ".join(
        f"{shortened(key)} was {shortened(then)}, is {shortened(now)}"
        for key, (then, now) in [*differing.items()][:DIFFERENCES_SHOWN]
    )


def labels_digest(labels: Labels) -> str:
    """Return a digest of the labels, which may be in a file beside the checkpoint."""
    return hashlib.sha256(json.dumps([labels.labels, labels.wnids]).encode()).hexdigest()


def target_of(output: Path) -> Path:
    """Return the file that an output's name means: ``~`` is expanded, and a link is followed."""
    output = Path(os.path.expanduser(output))
    return Path(os.path.realpath(output)) if output.is_symlink() else output


def record_path(output: Path) -> Path:
    """Return the path of an output's run record: ``OUT.run.json`` beside its file."""
    target = target_of(output)
    return target.with_name(target.name + ".run.json")


def stamps_path(output: Path) -> Path:
    """Return the path of an output's stamps: ``OUT.inputs`` beside its file."""
    target = target_of(output)
    return target.with_name(target.name + ".inputs")


def pack_stamps(stamps: Sequence[Stamp | None]) -> bytes:
    """Return stamps as they are stored."""
    return np.array([stamp or NO_STAMP for stamp in stamps], "<i8").tobytes()


def read_stamps(path: Path, rows: int | None = None) -> Iterator[Stamp | None]:
    """Yield the stamp of each row, then None forever; only None if there are not `rows` rows."""
    with suppress(OSError, ValueError):  # the missing stamps are None below
        file, status = open_regular(path)
        with file:
            if rows is None or status.st_size == rows * STAMP_BYTES:
                while some := file.read(STAMPS_AT_ONCE * STAMP_BYTES):
                    for size, mtime_ns in np.frombuffer(some, "<i8").reshape(-1, 2).tolist():
                        yield Stamp(size, mtime_ns) if size > 0 else None  # zeros: a power cut
    while True:
        yield None


def may_be_stamps(path: Path) -> bool:
    """Return whether a file begins as one of stamps does, or whether there is none."""
    try:
        file, _ = open_regular(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    with file:
        size = int.from_bytes(file.read(STAMP_BYTES // 2), "little", signed=True)
    return -1 <= size < MOST_BYTES
