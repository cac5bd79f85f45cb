"""The run record: which of its settings decide values, their fingerprint, and how two differ."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from r2ncli.images.decoders import decoder_versions
from r2ncli.outputs.formats import FORMATS
from r2ncli.weights.checkpoints import Labels

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
    return "; ".join(f"{key} was {then}, is {now}" for key, (then, now) in differing.items())


def labels_digest(labels: Labels) -> str:
    """Return a digest of the labels, which may be in a file beside the checkpoint."""
    return hashlib.sha256(json.dumps([labels.labels, labels.wnids]).encode()).hexdigest()
