"""Checkpoint files to test with, and why one is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from r2ncli.architectures import Architecture
from r2ncli.errors import CheckpointError
from r2ncli.weights.structure import expected_shapes


def error_of(call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """Return the message of the CheckpointError that a call raises."""
    with pytest.raises(CheckpointError) as raised:
        call(*arguments, **options)
    assert raised.value.exit_code == 4
    return str(raised.value)


def saved(content: object, path: Path, **options: Any) -> Path:
    """Save `content` with torch.save and return its path; `hollow` tensors get their values."""
    if isinstance(content, dict):
        content = {
            key: value.contiguous() if is_hollow(value) else value for key, value in content.items()
        }
    torch.save(content, path, **options)
    return path


def torch_bytes(content: object, **options: Any) -> bytes:
    """Return what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def is_hollow(value: object) -> bool:
    """Whether a tensor has more elements than its storage, as those of `hollow` have."""
    dense = isinstance(value, torch.Tensor) and not (value.is_sparse or value.is_meta)
    return dense and 0 in value.stride()


def hollow(architecture: Architecture) -> dict[str, torch.Tensor]:
    """Return a state dict of full shapes that takes no memory: every tensor is one zero."""
    return {
        name: torch.zeros((), dtype=torch.int64 if "num_batches" in name else None).expand(shape)
        for name, shape in expected_shapes(architecture).items()
    }
