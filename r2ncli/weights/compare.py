"""Compare two checkpoint files tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from r2ncli.weights.checkpoints import Weights, find_on_this_machine
from r2ncli.weights.loading import load_state_dict, tensors_sha256
from r2ncli.weights.structure import FLOATS, kind_of


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same in both files.

    `file` and `against` are its dtype and shape in each, as in ``float32 [7]``;
    `max_difference` is the largest absolute difference of two values, None where the shapes
    differ or it is not finite.
    """

    name: str
    file: str
    against: str
    max_difference: float | None


@dataclass(frozen=True)
class TensorComparison:
    """What differs between two checkpoint files, by the published names of their tensors.

    `equal` counts the tensors with the same dtype, shape and bytes in both. Of those that are
    `different`, those without a numeric difference come first, then the largest. `tensors_sha256`
    are the content hashes of both (`weights.loading.tensors_sha256`); `error` says why nothing
    could be compared.
    """

    file: str
    against: str
    equal: int = 0
    different: tuple[TensorDifference, ...] = ()
    only_in_file: tuple[str, ...] = ()
    only_in_against: tuple[str, ...] = ()
    tensors_sha256: tuple[str, str] | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether both files hold the same tensors, bit by bit."""
        different = self.different or self.only_in_file or self.only_in_against
        return self.error is None and not different

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of ``r2n verify-weights --against``; always the same keys."""
        return {"schema": 1, **asdict(self), "ok": self.ok}


def compare_weights(file: Weights, against: Weights) -> TensorComparison:
    """Compare the tensors of two checkpoint files, whatever their containers and names.

    `verify_weights` says what `file` and `against` may be.

    Raises
    ------
    CheckpointError
        A file does not exist, would execute something, or holds no state dict.
    """
    paths = find_on_this_machine(file), find_on_this_machine(against)
    ours, theirs = (load_state_dict(path) for path in paths)
    both = [name for name in theirs if name in ours]
    differences = [
        _difference(name, ours[name], theirs[name])
        for name in both
        if tensors_sha256({"": ours[name]}) != tensors_sha256({"": theirs[name]})
    ]
    differences.sort(key=lambda d: -math.inf if d.max_difference is None else -d.max_difference)
    return TensorComparison(
        file=str(paths[0]),
        against=str(paths[1]),
        equal=len(both) - len(differences),
        different=tuple(differences),
        only_in_file=tuple(name for name in ours if name not in theirs),
        only_in_against=tuple(name for name in theirs if name not in ours),
        tensors_sha256=(tensors_sha256(ours), tensors_sha256(theirs)),
    )


def _difference(name: str, ours: Tensor, theirs: Tensor) -> TensorDifference:
    largest = None
    dense = {kind_of(ours), kind_of(theirs)} <= {*FLOATS, "int64", "int32"}
    if dense and ours.shape == theirs.shape and ours.numel():
        gap = float((ours.to(torch.float64) - theirs.to(torch.float64)).abs().max())
        largest = gap if math.isfinite(gap) else None
    return TensorDifference(name, _form(ours), _form(theirs), largest)


def _form(tensor: Tensor) -> str:
    return f"{kind_of(tensor)} {list(tensor.shape)}"
