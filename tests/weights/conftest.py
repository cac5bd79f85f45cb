"""What the tests of the weights share."""

from __future__ import annotations

import pytest
from support.reference_weights import TINY, reference_network
from torch import Tensor


@pytest.fixture
def state_dict() -> dict[str, Tensor]:
    """The state dict of a small network, which a test may change."""
    return dict(reference_network(TINY["v1b"]).state_dict())
