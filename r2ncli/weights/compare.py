"""Two checkpoint files, tensor by tensor."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from r2ncli.weights.loading import FLOATS, kind_of, load_state_dict, tensors_sha256
from r2ncli.weights.verify import find_on_this_machine


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same in both files.

    `file` and `against` are its dtype and shape in each; `max_difference` is the largest
    absolute difference of two values, None where shapes differ or a NaN is among them.
    """

    name: str
    file: str
    against: str
    max_difference: float | None


@dataclass(frozen=True)
class Comparison:
    """What differs between two checkpoint files, by the published names of their tensors.

    `equal` counts the tensors whose dtype, shape and bytes are the same in both. The others
    are only in one file, or in `different`: first those without a difference in numbers, then
    the largest. `error` says why nothing could be compared.
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
        """Whether both hold the same tensors, bit by bit."""
        different = self.different or self.only_in_file or self.only_in_against
        return self.error is None and not different

    def as_dict(self) -> dict[str, Any]:
        """As the JSON document of ``r2n verify-weights --against --json``: always these keys."""
        return {"schema": 1, **asdict(self), "ok": self.ok}


def compare_weights(
    file: str | os.PathLike[str] | None, against: str | os.PathLike[str]
) -> Comparison:
    """Compare the tensors of two checkpoint files, whatever their containers and naming.

    Parameters
    ----------
    file, against : str or path
        As `verify_weights` takes them.

    Raises
    ------
    CheckpointError
        One is not there, asks to execute something, or holds no state dict.
    """
    paths = find_on_this_machine(file), find_on_this_machine(against)
    ours, theirs = (load_state_dict(path) for path in paths)
    both = [name for name in theirs if name in ours]
    differences = [
        _difference(name, ours[name], theirs[name])
        for name in both
        if not _same(ours[name], theirs[name])
    ]
    differences.sort(key=lambda d: -math.inf if d.max_difference is None else -d.max_difference)
    return Comparison(
        file=str(paths[0]),
        against=str(paths[1]),
        equal=len(both) - len(differences),
        different=tuple(differences),
        only_in_file=tuple(name for name in ours if name not in theirs),
        only_in_against=tuple(name for name in theirs if name not in ours),
        tensors_sha256=(tensors_sha256(ours), tensors_sha256(theirs)),
    )


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return tensors_sha256({"": ours}) == tensors_sha256({"": theirs})


def _difference(name: str, ours: Tensor, theirs: Tensor) -> TensorDifference:
    largest = None
    dense = {kind_of(ours), kind_of(theirs)} <= {*FLOATS, "int64", "int32"}
    if dense and ours.shape == theirs.shape and ours.numel():
        gap = float((ours.to(torch.float64) - theirs.to(torch.float64)).abs().max())
        largest = gap if math.isfinite(gap) else None
    return TensorDifference(name, _form(ours), _form(theirs), largest)


def _form(tensor: Tensor) -> str:
    return f"{kind_of(tensor)} {list(tensor.shape)}"
