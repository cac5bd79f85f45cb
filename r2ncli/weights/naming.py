"""Translate between libraries' names for the tensors of a Res2Net, without torch.

timm uses the published names. mmpretrain and mmdetection differ in two ways: a deep stem is
called `stem`, and names start with ``backbone.`` or, in mmpretrain, ``head.``.
(Read from mmpretrain 1.2.0 and mmdetection 3.3.0.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MARK = "layer1.0.conv1.weight"  # in every Res2Net of every library; text before it is the prefix

OFFICIAL, TIMM, MMPRETRAIN, MMDETECTION = "official", "timm", "mmpretrain", "mmdetection"
LIBRARIES = (OFFICIAL, TIMM, MMPRETRAIN, MMDETECTION)

_DEEP_STEM = ("conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6", "bn1")
_STEMS = {
    MMPRETRAIN: tuple(f"stem.{i}.{part}" for i in range(3) for part in ("conv", "bn")),
    MMDETECTION: tuple(f"stem.{i}" for i in (0, 1, 3, 4, 6, 7)),
}
_BACKBONE, _CLASSIFIER = "backbone.", "head."


@dataclass(frozen=True)
class Naming:
    """The names under which a state dict holds a Res2Net.

    `library` is one of `LIBRARIES` (``official`` is timm's too); `prefix` stands before the
    names of the backbone: ``module.``, ``backbone.`` or nothing; `official` gives for each name
    the published one, and for a name that is no part of a Res2Net that name without the prefix.
    """

    library: str
    prefix: str
    official: dict[str, str]


def read_naming(names: Iterable[str]) -> Naming:
    """Recognise which library's names these are; `names` are all those of a state dict.

    The names of another network stay as they are. No two names become the same: a name whose
    new form is taken stays as it is.
    """
    found = tuple(names)
    marks = [name for name in found if name == MARK or name.endswith("." + MARK)]
    prefix = min(marks, key=len).removesuffix(MARK) if marks else ""
    plain = {name.removeprefix(prefix) for name in found}
    library = OFFICIAL
    for other, stem in _STEMS.items():
        if f"{stem[0]}.weight" in plain and marks:
            library = other
    outside = prefix.removesuffix(_BACKBONE) + _CLASSIFIER + "fc."
    if marks and library == OFFICIAL and any(name.startswith(outside) for name in found):
        library = MMPRETRAIN
    renamed = dict(zip(_STEMS.get(library, ()), _DEEP_STEM, strict=False))

    official: dict[str, str] = {}
    taken = set(found)
    for name in found:
        if marks and name.startswith(outside):
            new = "fc." + name.removeprefix(outside)
        else:
            module, dot, leaf = name.removeprefix(prefix).rpartition(".")
            new = renamed.get(module, module) + dot + leaf
        official[name] = new if new == name or new not in taken else name
        taken.add(official[name])
    return Naming(library, prefix, official)


def names_for(library: str, official: Iterable[str]) -> dict[str, str]:
    """Return `library`'s name for each published name of a network.

    `official` are the names of a whole state dict, because the name of ``bn1`` depends on the
    stem. mmdetection has no classifiers: ``fc`` gets mmpretrain's name. `read_naming` of the
    values gives the published names.

    Raises
    ------
    ValueError
        `library` is not one of `LIBRARIES`.
    """
    if library not in LIBRARIES:
        raise ValueError(f"library {library!r}: expected one of {', '.join(LIBRARIES)}")
    found = tuple(official)
    if library in (OFFICIAL, TIMM):
        return {name: name for name in found}
    deep = "conv1.0.weight" in found
    renamed = dict(zip(_DEEP_STEM, _STEMS[library], strict=True)) if deep else {}
    names = {}
    for name in found:
        module, dot, leaf = name.rpartition(".")
        part = _CLASSIFIER if module == "fc" else _BACKBONE
        names[name] = part + renamed.get(module, module) + dot + leaf
    return names
