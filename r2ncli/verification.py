"""Whether a checkpoint file is what it should be: one check after the other, nothing executed."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from r2ncli.architectures import PUBLISHED, Architecture
from r2ncli.checkpoints import (
    existing_file,
    hub_folder,
    published_file,
    sha256,
)
from r2ncli.containers import container
from r2ncli.downloads import digits_in_name
from r2ncli.errors import CheckpointError
from r2ncli.weights import (
    COUNTER,
    FLOATS,
    Differences,
    StateDict,
    build,
    compare,
    guess_architecture,
    kind_of,
    load_state_dict,
    variant_name,
)

PASSED, FAILED, WARNING, NOT_APPLICABLE = "passed", "failed", "warning", "not applicable"

CHECKS = (
    "container",
    "digits in the name",
    "published list",
    "safe loading",
    "variant",
    "names",
    "shapes",
    "dtypes",
    "finite values",
    "forward pass",
)


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

    `variant` is the published network's name, or the architecture in words; None where the
    tensors are no Res2Net's. `ok` is false where a check failed; warnings do not count.
    """

    file: str
    sha256: str
    variant: str | None
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.status != FAILED for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """As the JSON document of ``r2n verify-weights --json``."""
        return {"schema": 1, **asdict(self), "ok": self.ok}


def verify_weights(file: str | os.PathLike[str]) -> Verification:
    """Check a checkpoint file without executing anything in it.

    Parameters
    ----------
    file : str or path
        A file; where there is none of this name, its twin with hyphens and underscores
        exchanged, then the same in torch.hub's folder.

    Returns
    -------
    Verification
        Checks that a failed one makes pointless are "not applicable".

    Raises
    ------
    CheckpointError
        There is no such file, or it cannot be read.
    """
    path = existing_file(Path(file)) or existing_file(hub_folder() / Path(file).name)
    if path is None:
        raise CheckpointError(f"no such file: {os.fspath(file)} (nor in {hub_folder()})")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, not a checkpoint file")
    digest = sha256(path)
    checks = list(_file_checks(path, digest))
    variant = None
    if checks[0].status == PASSED:
        try:
            state_dict = load_state_dict(path)
        except CheckpointError as error:
            checks.append(Check("safe loading", FAILED, _without_path(error, path)))
        else:
            checks.append(Check("safe loading", PASSED, f"{len(state_dict)} tensors, no code"))
            architecture = guess_architecture(state_dict)
            variant = None if architecture is None else variant_name(architecture)
            checks += _tensor_checks(path, state_dict, architecture)
    done = {check.name: check for check in checks}
    every = tuple(done.get(name, Check(name, NOT_APPLICABLE, "")) for name in CHECKS)
    return Verification(str(path), digest, variant, every)


def _file_checks(path: Path, digest: str) -> Iterator[Check]:
    try:
        yield Check("container", PASSED, container(path))
    except CheckpointError as error:
        yield Check("container", FAILED, _without_path(error, path), "a checkpoint")

    digits = digits_in_name(path.name)
    if digits is None:
        yield Check("digits in the name", NOT_APPLICABLE, "the name has none")
    else:
        status = PASSED if digest.startswith(digits) else FAILED
        found = f"SHA-256 {digest[: len(digits)]}…"
        yield Check("digits in the name", status, found, digits)

    network = published_file(path.name)
    published = {digits_in_name(known.file): known for known in PUBLISHED.values()}
    match = published.get(digest[:8])
    if match is not None:
        found = f"its digest starts as that of {match.file}"
        yield Check("published list", PASSED, found)
    elif network is not None:
        yield Check(
            "published list", FAILED, f"not the published {network.name}", f"{network.file}"
        )
    elif _named_variant(path) is not None:
        yield Check("published list", WARNING, "not a published file, though named like one")
    else:
        yield Check("published list", NOT_APPLICABLE, "not named like a published file")


def _tensor_checks(
    path: Path, state_dict: StateDict, architecture: Architecture | None
) -> Iterator[Check]:
    named = _named_variant(path)
    if architecture is None:
        found = f"no Res2Net: {', '.join(list(state_dict)[:3])}…"
        yield Check("variant", FAILED, found, named or "a Res2Net")
        yield _finite(state_dict)
        return
    variant = variant_name(architecture)
    status = PASSED
    if named is not None and variant != named:
        wanted = PUBLISHED[named].architecture
        fine_tuned = replace(architecture, classes=wanted.classes) == wanted
        status = WARNING if fine_tuned else FAILED
    yield Check("variant", status, variant, f"{named}, by its name" if named else "")

    differences = compare(architecture, state_dict)
    missing = [f"missing {name}" for name in differences.missing]
    names = missing + [f"unexpected {name}" for name in differences.unexpected]
    yield _absent("names", names, f"{len(state_dict)} names, all as published")
    shapes = [f"{name} {found}, not {wanted}" for name, found, wanted in differences.shapes]
    yield _absent("shapes", shapes, "all as the architecture has them")
    yield _dtypes(state_dict, differences)
    finite = _finite(state_dict)
    yield finite
    if differences or finite.status == FAILED:
        return
    size = 64
    random = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, size, size, dtype=torch.float32, generator=random) * 4 - 2
    with torch.inference_mode():
        logits = build(architecture, state_dict)(pixels)
    good = bool(logits.isfinite().all()) and logits.shape == (1, architecture.classes)
    span = f"logits {list(logits.shape)} from {logits.min():.3g} to {logits.max():.3g}"
    expected = f"{architecture.classes} finite logits"
    yield Check("forward pass", PASSED if good else FAILED, span, expected)


def _absent(name: str, differences: list[str], good: str) -> Check:
    if not differences:
        return Check(name, PASSED, good)
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return Check(name, FAILED, "; ".join(differences[:3]) + more, "none")


def _dtypes(state_dict: StateDict, differences: Differences) -> Check:
    counts = Counter(
        kind_of(tensor) for name, tensor in state_dict.items() if not name.endswith(COUNTER)
    )
    found = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    if differences.kinds:
        return Check("dtypes", FAILED, found, "float32")
    return Check("dtypes", PASSED if set(counts) == {"float32"} else WARNING, found, "float32")


def _finite(state_dict: StateDict) -> Check:
    bad = [
        f"{name} ({int((~tensor.isfinite()).sum())} values)"
        for name, tensor in state_dict.items()
        if kind_of(tensor) in FLOATS and not bool(tensor.isfinite().all())
    ]
    return _absent("finite values", bad, "no NaN and no infinity")


def _named_variant(path: Path) -> str | None:
    """The published network that a file is named after, whatever its digits are."""
    stem = re.sub(r"[-_][0-9a-f]{8,64}$", "", path.stem).replace("-", "_")
    for network in PUBLISHED.values():
        if stem in (network.name, network.file.rpartition("-")[0]):
            return network.name
    return None


def _without_path(error: CheckpointError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
