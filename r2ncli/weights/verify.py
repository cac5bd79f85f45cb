"""Whether a checkpoint file is what it should be: one check after the other, nothing executed."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from r2ncli.architectures import DECLINED, DEMO, PUBLISHED, Architecture
from r2ncli.errors import CheckpointError, UsageError
from r2ncli.weights.checkpoints import existing_file, find_checkpoint, hub_folder, published_file
from r2ncli.weights.checkpoints import sha256 as digest_of
from r2ncli.weights.containers import broken_members, container
from r2ncli.weights.download import digits_in_name
from r2ncli.weights.loading import (
    COUNTER,
    FLOATS,
    Differences,
    StateDict,
    build,
    compare,
    guess_architecture,
    kind_of,
    load_tensors,
    nearest_published,
    shapes_of,
    tensors_sha256,
    variant_name,
)
from r2ncli.weights.naming import OFFICIAL, Naming, read_naming
from r2ncli.weights.pickles import check_pickles
from r2ncli.weights.recognition import by_block, published_dla, seems_to_be

PASSED, FAILED, WARNING, NOT_APPLICABLE = "passed", "failed", "warning", "not applicable"

CHECKS = (
    "container",
    "stored checksums",
    "pinned digest",
    "digits in the name",
    "published list",
    "pickle",
    "safe loading",
    "variant",
    "names",
    "shapes",
    "dtypes",
    "finite values",
    "constant tensors",
    "batch norm",
    "forward pass",
)
MEAN, VARIANCE = "running_mean", "running_var"
SHOWN = 3  # examples of what is wrong; the document has all names that differ

Spans = dict[str, tuple[float, ...]]  # the least and the greatest value of each tensor


@dataclass(frozen=True)
class Check:
    """One question about a file: its `status`, what was found and what was expected."""

    name: str
    status: str
    found: str
    expected: str = ""


@dataclass(frozen=True)
class Verification:
    """All checks of one checkpoint file.

    Attributes
    ----------
    file : str
        The file that was found, or what was asked for.
    sha256, tensors_sha256 : str or None
        Digests of the file's bytes, and of the tensors alone (`weights.tensors_sha256`).
    variant : str or None
        The published network's name, or the architecture in words; None where the tensors
        are no Res2Net's.
    checks : tuple of Check
        All of `CHECKS`, in their order; none where there is an `error`.
    differences : Differences or None
        Every name that differs from the variant's, not only the first ones.
    error : str or None
        Why nothing could be checked.
    """

    file: str
    sha256: str | None = None
    tensors_sha256: str | None = None
    variant: str | None = None
    checks: tuple[Check, ...] = ()
    differences: Differences | None = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        """False where a check failed or none was possible; warnings do not count."""
        return self.error is None and all(check.status != FAILED for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """As the JSON document of ``r2n verify-weights --json``: always these keys."""
        return {"schema": 1, **asdict(self), "ok": self.ok}


def verify_weights(
    file: str | os.PathLike[str] | None = None, *, sha256: str | None = None
) -> Verification:
    """Check a checkpoint file without executing anything in it, and without downloading.

    Parameters
    ----------
    file : str, path or None
        A file; where there is none of this name, its twin with hyphens and underscores
        exchanged, then the same in torch.hub's folder; then a published name or ``demo``.
        None means the checkpoint that `classify` would load.
    sha256 : str, optional
        The digest that the file must have: 64 hex digits.

    Returns
    -------
    Verification
        Checks that a failed one makes pointless are "not applicable".

    Raises
    ------
    CheckpointError
        There is no such file, or it cannot be read.
    UsageError
        `sha256` is no SHA-256.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UsageError(f"--sha256 {sha256!r}: expected the 64 hex digits of a whole SHA-256")
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
            if checks[-1].status != FAILED:  # what the pickle asks for has been said
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
                differences = compare(architecture, state_dict)
                found = replace(found, variant=variant_name(architecture), differences=differences)
                checks += _tensor_checks(path, state_dict, naming, architecture, differences)
    done = {check.name: check for check in checks}
    every = tuple(done.get(name, Check(name, NOT_APPLICABLE, "")) for name in CHECKS)
    return replace(found, checks=every)


def find_on_this_machine(file: str | os.PathLike[str] | None) -> Path:
    """The checkpoint file that `file` means (see `verify_weights`); nothing is downloaded."""
    if file is None:
        return find_checkpoint(download=False)
    wanted = os.fspath(file)
    path = existing_file(Path(wanted)) or existing_file(hub_folder() / Path(wanted).name)
    if wanted and path is not None:
        return path
    if wanted == DEMO or wanted.replace("-", "_") in PUBLISHED:
        return find_checkpoint(wanted, download=False)
    raise CheckpointError(f"no such file: {wanted or repr(wanted)} (nor in {hub_folder()})")


# --- the file -------------------------------------------------------------------------


def _file_checks(path: Path, digest: str, pinned: str | None) -> Iterator[Check]:
    """Of the bytes; "container" comes first and "pickle" last."""
    packed = None
    try:
        packed = container(path)
        yield Check("container", PASSED, packed)
    except CheckpointError as error:
        yield Check("container", FAILED, _without_path(error, path))
    if packed == "zip":
        yield _stored_checksums(path)
    if pinned is not None:
        status = PASSED if digest == pinned.lower() else FAILED
        yield Check("pinned digest", status, f"SHA-256 {digest}", pinned.lower())
    yield _digits(path.name, digest)
    yield _published(path, digest)
    if packed in ("zip", "pickle"):
        try:
            names = check_pickles(path, packed)
            found = f"asks for {len(names)} names, all a state dict's: {', '.join(names)}"
            yield Check("pickle", PASSED, found)
        except CheckpointError as error:
            yield Check("pickle", FAILED, _without_path(error, path))
    elif packed is not None:
        yield Check("pickle", NOT_APPLICABLE, f"{packed} has none")


def _stored_checksums(path: Path) -> Check:
    count, broken = broken_members(path)
    if not count:
        return Check("stored checksums", NOT_APPLICABLE, "its writer left them out")
    bad = [f"{name} was changed or broken since it was written" for name in broken]
    return _absent("stored checksums", bad, f"CRC-32 of {count} members")


def _digits(name: str, digest: str) -> Check:
    digits = digits_in_name(name)
    if digits is None:
        date = re.search(r"[-_]([0-9]{8})\.", name)
        found = f"the name has none ({date[1]} is a date)" if date else "the name has none"
        return Check("digits in the name", NOT_APPLICABLE, found)
    if not digest.startswith(digits):
        return Check("digits in the name", FAILED, f"SHA-256 {digest[: len(digits)]}…", digits)
    proof = "the whole SHA-256"
    if len(digits) < 64:
        proof = (
            f"the first {len(digits)} of 64 digits: proof against a broken download, not "
            "against someone who altered it (that takes all 64: --sha256)"
        )
    return Check("digits in the name", PASSED, proof, digits)


def _published(path: Path, digest: str) -> Check:
    files = [network.file for network in PUBLISHED.values()] + list(DECLINED.values())
    listed = {digits_in_name(file): file for file in files}.get(digest[:8])
    network = published_file(path.name)
    named = _named_variant(path)
    if listed is not None:
        found = f"its digest starts as that of {listed}; no more digits were published"
        return Check("published list", PASSED, found)
    if network is not None:
        found = f"not the published {network.name}"
        return Check("published list", FAILED, found, network.file)
    if named is not None:
        found = f"not the published file, though named like {PUBLISHED[named].file}"
        return Check("published list", WARNING, found)
    return Check("published list", NOT_APPLICABLE, "not named like a published file")


# --- the tensors ----------------------------------------------------------------------


def _foreign_checks(path: Path, state_dict: StateDict) -> Iterator[Check]:
    """Of tensors that are no Res2Net's, or only a part of one."""
    expected = _named_variant(path) or "a Res2Net"
    shapes = shapes_of(state_dict)
    other = seems_to_be(shapes)
    nearest = None if other is not None else nearest_published(state_dict)
    if published_dla(shapes) is not None:
        yield Check("variant", FAILED, f"{other}", "a network that r2n has")
    elif other is not None:
        yield Check("variant", FAILED, f"no Res2Net: it seems to be {other}", expected)
    elif nearest is None:
        found = f"no Res2Net: {', '.join(list(state_dict)[:SHOWN])}…"
        yield Check("variant", FAILED, found, expected)
    else:
        network, count = nearest
        differences = compare(network.architecture, state_dict)
        found = f"a part of {network.name}: {count} of its tensors"
        yield Check("variant", FAILED, found, expected)
        yield from _structure(state_dict, None, differences)
    yield from _values(state_dict)


def _tensor_checks(
    path: Path,
    state_dict: StateDict,
    naming: Naming,
    architecture: Architecture,
    differences: Differences,
) -> Iterator[Check]:
    named = _named_variant(path)
    status = PASSED
    if named is not None and variant_name(architecture) != named:
        wanted = PUBLISHED[named].architecture
        fine_tuned = replace(architecture, classes=wanted.classes) == wanted
        status = WARNING if fine_tuned else FAILED
    expected = f"{named}, by its name" if named else ""
    yield Check("variant", status, _in_words(architecture), expected)
    yield from _structure(state_dict, naming, differences)
    values = list(_values(state_dict))
    yield from values
    unfit = any(c.status == FAILED and c.name != "constant tensors" for c in values)
    if not differences and not unfit:
        yield _forward_pass(state_dict, architecture)


def _in_words(architecture: Architecture) -> str:
    for network in PUBLISHED.values():
        if network.architecture == architecture:
            return network.name
        if network.architecture == replace(architecture, classes=network.architecture.classes):
            return f"a Res2Net like {network.name}, with {architecture.classes} classes"
    return f"a Res2Net like none published: {architecture.describe()}"


def _structure(
    state_dict: StateDict, naming: Naming | None, differences: Differences
) -> Iterator[Check]:
    """Names, shapes and dtypes."""
    names = [
        f"{how} {by_block(which)}"
        for how, which in (
            ("missing", differences.missing),
            ("unexpected", differences.unexpected),
        )
        if which
    ]
    good = f"{len(state_dict)} names, all as published"
    if naming is not None and naming.library != OFFICIAL:
        good = f"{len(state_dict)} names, all as {naming.library} has them"
    if naming is not None and naming.prefix:
        good += f", behind the prefix {naming.prefix!r}"
    yield _absent("names", names, good)
    shapes = [f"{name} {found}, not {wanted}" for name, found, wanted in differences.shapes]
    if len(shapes) > SHOWN:
        shapes = [f"{shapes[0]}; in all {by_block(name for name, *_ in differences.shapes)}"]
    yield _absent("shapes", shapes, "all as the architecture has them")
    counts = Counter(
        kind_of(tensor) for name, tensor in state_dict.items() if not name.endswith(COUNTER)
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    status = PASSED if set(counts) == {"float32"} else WARNING
    yield Check("dtypes", FAILED if differences.kinds else status, kinds, "float32")


def _values(state_dict: StateDict) -> Iterator[Check]:
    """Finite values, constant tensors and batch-norm statistics, of plain floats."""
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
    """A convolution or a classifier of one value sees nothing; nor does a variance of zero."""
    constant = {
        name: low for name, (low, high) in spans.items() if low == high and floats[name].numel() > 1
    }
    dead = [
        f"{name} (all {value:g})"
        for name, value in constant.items()
        if (name.endswith("weight") and floats[name].dim() > 1)
        or (name.endswith(VARIANCE) and value == 0)
    ]
    zero = [name for name, value in constant.items() if value == 0 and name.endswith("weight")]
    if zero and not dead:
        found = f"batch norms that scale everything to zero: {by_block(zero)}"
        return Check("constant tensors", WARNING, found, "trained blocks")
    return _absent("constant tensors", dead, "none where none should be")


def _batch_norm(floats: StateDict, spans: Spans) -> Check:
    variances = [name for name in floats if name.endswith(VARIANCE)]
    if not variances:
        return Check("batch norm", NOT_APPLICABLE, "there is none")
    wanted = "variances that are positive"
    negative = [
        f"{name} ({int((floats[name] < 0).sum())} values)"
        for name in variances
        if spans[name][0] < 0
    ]
    if negative:
        return _absent("batch norm", negative, "", wanted)
    untrained = [
        name.removesuffix("." + VARIANCE)
        for name in variances
        if spans[name] == (1, 1) and spans.get(name.replace(VARIANCE, MEAN)) == (0, 0)
    ]
    if untrained:
        found = (
            f"{len(untrained)} of {len(variances)} have the statistics that training starts "
            f"with, mean 0 and variance 1: {by_block(untrained)}"
        )
        return Check("batch norm", WARNING, found, "statistics of a trained network")
    zeros = sum(int((floats[name] == 0).sum()) for name in variances if spans[name][0] == 0)
    if zeros:
        found = f"{zeros} channels never vary (variance 0)"
        return Check("batch norm", WARNING, found, wanted)
    least = min(spans[name][0] for name in variances)
    most = max(spans[name][1] for name in variances)
    found = f"{len(variances)} times variances from {least:.2g} to {most:.2g}"
    return Check("batch norm", PASSED, found)


def _forward_pass(state_dict: StateDict, architecture: Architecture) -> Check:
    size = 64
    random = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, size, size, dtype=torch.float32, generator=random) * 4 - 2
    with torch.inference_mode():
        logits = build(architecture, state_dict)(pixels)
    expected = f"{architecture.classes} finite logits"
    if not bool(logits.isfinite().all()) or logits.shape != (1, architecture.classes):
        found = f"logits {list(logits.shape)} from {logits.min():.3g} to {logits.max():.3g}"
        return Check("forward pass", FAILED, found, expected)
    scale = float(logits.square().mean().sqrt())
    found = (
        f"logits {list(logits.shape)} from {logits.min():.3g} to {logits.max():.3g}, of root "
        f"mean square {scale:.3g}"
    )
    usual = 1e-3 <= scale <= 1e3  # trained classifiers give about 1 to 10
    expected += "" if usual else " of root mean square 0.001 to 1000, as training gives them"
    return Check("forward pass", PASSED if usual else WARNING, found, expected)


def _absent(name: str, bad: list[str], good: str, expected: str = "none") -> Check:
    if not bad:
        return Check(name, PASSED, good)
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return Check(name, FAILED, "; ".join(bad[:SHOWN]) + more, expected)


def _named_variant(path: Path) -> str | None:
    """The published network that a file is named after, whatever its digits are."""
    stem = re.sub(r"[-_][0-9a-f]{8,64}$", "", path.stem).replace("-", "_")
    for network in PUBLISHED.values():
        if stem in (network.name, network.file.rpartition("-")[0]):
            return network.name
    return None


def _without_path(error: CheckpointError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
