"""Check the integrity and content of a checkpoint file, without executing anything in it."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch

from r2ncli.architectures import DECLINED, PUBLISHED, Architecture
from r2ncli.errors import CheckpointError, UsageError
from r2ncli.weights.checkpoints import Weights, find_on_this_machine, named_variant, published_file
from r2ncli.weights.checkpoints import sha256 as digest_of
from r2ncli.weights.compare import TensorComparison, compare_weights
from r2ncli.weights.containers import broken_members, container
from r2ncli.weights.download import hash_prefix
from r2ncli.weights.loading import MOST_VALUES, build, load_tensors, tensors_sha256
from r2ncli.weights.pickles import check_pickles
from r2ncli.weights.structure import (
    COUNTER,
    FLOATS,
    OFFICIAL,
    Mismatches,
    Naming,
    StateDict,
    by_block,
    find_mismatches,
    guess_architecture,
    in_words,
    kind_of,
    nearest_published,
    published_dla,
    read_naming,
    seems_to_be,
    shapes_of,
    variant_name,
)

PASSED, FAILED, WARNING, NOT_APPLICABLE = "passed", "failed", "warning", "not applicable"

CHECKS = (
    *("container", "stored checksums", "expected SHA-256", "hash prefix", "published list"),
    *("pickle", "safe loading", "variant", "names", "shapes", "dtypes"),
    *("finite values", "constant tensors", "batch norm", "forward pass"),
)
MEAN, VARIANCE = "running_mean", "running_var"
SHOWN = 3  # examples per check; the JSON document has all names that differ

Spans = dict[str, tuple[float, ...]]  # the smallest and the largest value of each tensor


@dataclass(frozen=True)
class Check:
    """One check of a file: its `status`, what was found and what was expected."""

    name: str
    status: str
    found: str
    expected: str = ""

    def describe(self) -> str:
        """Return what was found and, if the check did not pass, what was expected."""
        wanted = self.expected if self.status in (FAILED, WARNING) else ""
        return f"{self.found} (expected {wanted})" if wanted else self.found


@dataclass(frozen=True)
class Verification:
    """All checks of one checkpoint file.

    Attributes
    ----------
    sha256, tensors_sha256 : str or None
        The hash of the file's bytes, and the content hash of its tensors only
        (`weights.loading.tensors_sha256`).
    variant : str or None
        The published network's name, or the architecture in words; None where the tensors
        are not those of a Res2Net.
    checks : tuple of Check
        All of `CHECKS`, in their order; empty where `error` says why nothing could be checked.
    differences : Mismatches or None
        Every name that does not fit the variant, not only the first ones.
    """

    file: str
    sha256: str | None = None
    tensors_sha256: str | None = None
    variant: str | None = None
    checks: tuple[Check, ...] = ()
    differences: Mismatches | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether no check failed; False if no check was possible. Warnings are not failures."""
        return self.error is None and not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed, in their order."""
        return tuple(check for check in self.checks if check.status == FAILED)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document of ``r2n verify-weights --json``; the same keys always."""
        return {"schema": 2, **asdict(self), "ok": self.ok}


@overload
def verify_weights(
    file: Weights = None, *, sha256: str | None = None, against: None = None
) -> Verification: ...


@overload
def verify_weights(
    file: Weights = None, *, sha256: str | None = None, against: str | os.PathLike[str]
) -> TensorComparison: ...


def verify_weights(
    file: Weights = None, *, sha256: str | None = None, against: Weights = None
) -> Verification | TensorComparison:
    """Check a checkpoint file, or compare it with another one, without executing anything.

    Nothing is downloaded.

    Parameters
    ----------
    file : str, path or None
        A file; if it does not exist, one whose name differs only in ``-`` and
        ``_``. A name without a folder is then looked for in torch.hub's folder, and may be
        a published name or ``demo``. None means the checkpoint that `classify` would load.
    sha256 : str, optional
        The SHA-256 that the file must have: 64 hex digits.
    against : str or path, optional
        Another file, named as `file` is: compare the two tensor by tensor instead.

    Returns
    -------
    Verification or TensorComparison
        A comparison where `against` is given. A check that cannot run because another one failed
        is "not applicable".

    Raises
    ------
    CheckpointError
        There is no such file, or it cannot be read.
    UsageError
        `sha256` is not a SHA-256, or is given together with `against`.
    """
    if against is not None:
        if sha256 is not None:
            raise UsageError("`sha256` is for the checks of one file: leave `against` out")
        return compare_weights(file, against)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UsageError(f"`sha256` {sha256!r}: expected the 64 hex digits of a whole SHA-256")
    path = find_on_this_machine(file)
    if path.is_dir():
        container(path)  # says what is in it
    digest = digest_of(path)
    checks = list(_file_checks(path, digest, sha256))
    found = Verification(str(path), digest)
    if checks[0].status == PASSED:
        try:
            tensors = load_tensors(path)
        except CheckpointError as error:
            if checks[-1].status != FAILED:  # the pickle check reports it
                checks.append(Check("safe loading", FAILED, _without_path(error, path)))
        else:
            checks.append(Check("safe loading", PASSED, f"{len(tensors)} tensors, no code"))
            naming = read_naming(tensors)
            state_dict = {naming.official[name]: tensor for name, tensor in tensors.items()}
            found = replace(found, tensors_sha256=tensors_sha256(state_dict))
            architecture = guess_architecture(state_dict)
            if architecture is None:
                checks += _foreign_checks(path, state_dict)
            else:
                mismatches = find_mismatches(architecture, state_dict)
                found = replace(found, variant=variant_name(architecture), differences=mismatches)
                checks += _tensor_checks(path, state_dict, naming, architecture, mismatches)
    done = {check.name: check for check in checks}
    every = tuple(done.get(name, Check(name, NOT_APPLICABLE, "")) for name in CHECKS)
    return replace(found, checks=every)


# --- the file -------------------------------------------------------------------------


def _file_checks(path: Path, digest: str, expected: str | None) -> Iterator[Check]:
    """Check the bytes; "container" comes first and "pickle" last."""
    packed = None
    try:
        packed = container(path)
        yield Check("container", PASSED, packed)
    except CheckpointError as error:
        yield Check("container", FAILED, _without_path(error, path))
    if packed == "zip":
        count, broken = broken_members(path)
        bad = [f"{name} was altered or corrupted after it was written" for name in broken]
        stored = _absent("stored checksums", bad, f"CRC-32 of {count} members")
        yield stored if count else Check(stored.name, NOT_APPLICABLE, "the file has none")
    if expected is not None:
        status = PASSED if digest == expected.lower() else FAILED
        yield Check("expected SHA-256", status, f"SHA-256 {digest}", expected.lower())
    yield _hash_prefix(path.name, digest)
    yield _published(path, digest)
    if packed in ("zip", "pickle"):
        try:
            names = check_pickles(path, packed)
            found = f"imports {len(names)} names, all allowed in a state dict: {', '.join(names)}"
            yield Check("pickle", PASSED, found)
        except CheckpointError as error:
            yield Check("pickle", FAILED, _without_path(error, path))
    elif packed is not None:
        yield Check("pickle", NOT_APPLICABLE, f"{packed} files have none")


def _hash_prefix(name: str, digest: str) -> Check:
    prefix = hash_prefix(name)
    if prefix is None:
        date = re.search(r"[-_]([0-9]{8})\.", name)
        found = "the file name has none" + (f" ({date[1]} is a date)" if date else "")
        return Check("hash prefix", NOT_APPLICABLE, found)
    if not digest.startswith(prefix):
        return Check("hash prefix", FAILED, f"SHA-256 {digest[: len(prefix)]}…", prefix)
    found = "all 64 hex digits of the SHA-256 match"
    if len(prefix) < 64:
        rest = "this rules out a corrupted download, but not a deliberate change"
        found = f"the first {len(prefix)} of 64 hex digits match: {rest}"
    return Check("hash prefix", PASSED, found, prefix)


def _published(path: Path, digest: str) -> Check:
    files = [network.file for network in PUBLISHED.values()] + list(DECLINED.values())
    listed = {hash_prefix(file): file for file in files}.get(digest[:8])
    if listed is not None:
        found = f"the SHA-256 starts like that of {listed}; only these 8 hex digits were published"
        return Check("published list", PASSED, found)
    if network := published_file(path.name):
        return Check("published list", FAILED, f"not the published {network.name}", network.file)
    if named := named_variant(path):
        found = f"not the published file, though named like {PUBLISHED[named].file}"
        return Check("published list", WARNING, found)
    return Check("published list", NOT_APPLICABLE, "the name is not that of a published file")


# --- the tensors ----------------------------------------------------------------------


def _foreign_checks(path: Path, state_dict: StateDict) -> Iterator[Check]:
    """Check tensors that are not those of a Res2Net, or only a part of one."""
    expected = named_variant(path) or "a Res2Net"
    shapes = shapes_of(state_dict)
    found, nearest = f"not a Res2Net: {', '.join(list(state_dict)[:SHOWN])}…", None
    if (other := seems_to_be(shapes)) is None:
        nearest = nearest_published(state_dict)
    elif published_dla(shapes) is None:
        found = f"not a Res2Net: it seems to be {other}"
    else:
        found, expected = other, "a network that r2n supports"
    if nearest is not None:
        found = f"a part of {nearest[0].name}: {nearest[1]} of its tensors"
    yield Check("variant", FAILED, found, expected)
    if nearest is not None:
        mismatches = find_mismatches(nearest[0].architecture, state_dict)
        yield from _structure(state_dict, None, mismatches)
    yield from _values(state_dict)


def _tensor_checks(
    path: Path,
    state_dict: StateDict,
    naming: Naming,
    architecture: Architecture,
    mismatches: Mismatches,
) -> Iterator[Check]:
    named = named_variant(path)
    status = PASSED
    if named is not None and variant_name(architecture) != named:
        wanted = PUBLISHED[named].architecture
        fine_tuned = replace(architecture, classes=wanted.classes) == wanted
        status = WARNING if fine_tuned else FAILED
    expected = f"{named}, by its name" if named else ""
    yield Check("variant", status, in_words(architecture), expected)
    yield from _structure(state_dict, naming, mismatches)
    values = list(_values(state_dict))
    yield from values
    unfit = any(c.status == FAILED and c.name != "constant tensors" for c in values)
    if not mismatches and not unfit:
        yield _forward_pass(state_dict, architecture)


def _structure(
    state_dict: StateDict, naming: Naming | None, mismatches: Mismatches
) -> Iterator[Check]:
    """Check names, shapes and dtypes."""
    both = {"missing": mismatches.missing, "unexpected": mismatches.unexpected}
    names = [f"{how} {by_block(which)}" for how, which in both.items() if which]
    good = f"{len(state_dict)} names, all as published"
    if naming is not None and naming.library != OFFICIAL:
        good = f"{len(state_dict)} names, all as {naming.library} has them"
    if naming is not None and naming.prefix:
        good += f", behind the prefix {naming.prefix!r}"
    yield _absent("names", names, good)
    shapes = [f"{name} {found}, not {wanted}" for name, found, wanted in mismatches.shapes]
    if len(shapes) > SHOWN:
        shapes = [f"{shapes[0]}; in all {by_block(name for name, *_ in mismatches.shapes)}"]
    yield _absent("shapes", shapes, "all as the architecture has them")
    counts = Counter(
        kind_of(tensor) for name, tensor in state_dict.items() if not name.endswith(COUNTER)
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    status = PASSED if set(counts) == {"float32"} else WARNING
    yield Check("dtypes", FAILED if mismatches.kinds else status, kinds, "float32")


def _values(state_dict: StateDict) -> Iterator[Check]:
    """Check for finite values, constant tensors and batch-norm statistics, of plain floats."""
    floats = {name: t for name, t in state_dict.items() if kind_of(t) in FLOATS and t.numel()}
    spans = {name: tuple(map(float, tensor.aminmax())) for name, tensor in floats.items()}
    bad = [
        f"{name} ({int((~floats[name].isfinite()).sum())} values)"
        for name, span in spans.items()
        if not all(map(math.isfinite, span))
    ]
    yield _absent("finite values", bad, "no NaN and no infinity")
    yield _constants(floats, spans)
    yield _batch_norm(floats, spans)


def _constants(floats: StateDict, spans: Spans) -> Check:
    """Check that no convolution, classifier or running variance has one value only."""
    several = {name: span for name, span in spans.items() if floats[name].numel() > 1}
    constant = {name: low for name, (low, high) in several.items() if low == high}
    dead = [
        f"{name} (all {value:g})"
        for name, value in constant.items()
        if (name.endswith("weight") and floats[name].dim() > 1)
        or (name.endswith(VARIANCE) and value == 0)
    ]
    zero = [name for name, value in constant.items() if value == 0 and name.endswith("weight")]
    if zero and not dead:
        found = f"batch norms whose weights are all zero: {by_block(zero)}"
        return Check("constant tensors", WARNING, found, "trained blocks")
    return _absent("constant tensors", dead, "none where none should be")


def _batch_norm(floats: StateDict, spans: Spans) -> Check:
    variances = [name for name in floats if name.endswith(VARIANCE)]
    if not variances:
        return Check("batch norm", NOT_APPLICABLE, "there are no batch norms")
    wanted = "positive running variances"
    if negative := [name for name in variances if spans[name][0] < 0]:
        bad = [f"{name} ({int((floats[name] < 0).sum())} values)" for name in negative]
        return _absent("batch norm", bad, "", wanted)
    untrained = [
        name.removesuffix("." + VARIANCE)
        for name in variances
        if spans[name] == (1, 1) and spans.get(name.replace(VARIANCE, MEAN)) == (0, 0)
    ]
    if untrained:
        found = (
            f"{len(untrained)} of {len(variances)} layers have the statistics of an untrained "
            f"network, mean 0 and variance 1: {by_block(untrained)}"
        )
        return Check("batch norm", WARNING, found, "statistics of a trained network")
    zeros = sum(int((floats[name] == 0).sum()) for name in variances if spans[name][0] == 0)
    if zeros:
        found = f"{zeros} channels with running variance 0"
        return Check("batch norm", WARNING, found, wanted)
    least = min(spans[name][0] for name in variances)
    most = max(spans[name][1] for name in variances)
    found = f"{len(variances)} layers, running variance {least:.2g} to {most:.2g}"
    return Check("batch norm", PASSED, found)


def _forward_pass(state_dict: StateDict, architecture: Architecture) -> Check:
    if (largest := architecture.largest_output(64)) > MOST_VALUES:
        found = f"its largest layer gives {largest:,} values for an image of 64 x 64 pixels"
        return Check("forward pass", FAILED, found, f"at most {MOST_VALUES:,}")
    random = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 64, 64, dtype=torch.float32, generator=random) * 4 - 2
    with torch.inference_mode():
        logits = build(architecture, state_dict)(pixels)
    expected = f"{architecture.classes} finite logits"
    found = f"logits {list(logits.shape)} from {logits.min():.3g} to {logits.max():.3g}"
    if not bool(logits.isfinite().all()):
        return Check("forward pass", FAILED, found, expected)
    scale = float(logits.square().mean().sqrt())
    found += f", root mean square {scale:.3g}"
    usual = 1e-3 <= scale <= 1e3  # trained classifiers give about 1 to 10
    expected += "" if usual else " with a root mean square of 0.001 to 1000, as in trained networks"
    return Check("forward pass", PASSED if usual else WARNING, found, expected)


def _absent(name: str, bad: list[str], good: str, expected: str = "none") -> Check:
    if not bad:
        return Check(name, PASSED, good)
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return Check(name, FAILED, "; ".join(bad[:SHOWN]) + more, expected)


def _without_path(error: CheckpointError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
