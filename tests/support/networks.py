"""A network small enough to be trained and run within a test."""

from __future__ import annotations

from r2ncli.architectures import Architecture

TINY_ARCHITECTURE = Architecture(
    (1, 1, 1, 1), base_width=16, stem=(8, 8, 16), average_pool_shortcut=True,
    stage_planes=(16, 16, 16, 16), classes=6,
)  # fmt: skip
