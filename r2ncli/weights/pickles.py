"""Check the pickles of a checkpoint file, and find what they hold, without executing them.

No unpickler runs: the opcodes are followed (see `opcodes`), and what cannot be followed is
refused, as is a file that is not packed as torch.save packs it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

from r2ncli.errors import CheckpointError
from r2ncli.weights.containers import (
    Member,
    looks_pickled,
    member_start,
    reading,
    shown,
    stored_members,
    zip_members,
)
from r2ncli.weights.opcodes import ENDS_EARLY, LIMIT, OPCODES, Requests, requests
from r2ncli.weights.stored import DTYPES, Places

_HINTS = (
    ("torch.nn.modules.", "it holds a whole network, not its state dict"),
    ("torch.storage._load_from_bytes", "it was written by pickle, not by torch.save"),
    ("numpy", "it holds numpy values beside the tensors"),
    ("mmengine.", "it is a training checkpoint of OpenMMLab"),
    ("pytorch_lightning.", "it is a training checkpoint of Lightning"),
    ("lightning.", "it is a training checkpoint of Lightning"),
    ("ultralytics.", "it holds a whole network of ultralytics"),
)
_SAVE_AGAIN = "if you trust it, save only its state dict"

_MAGIC = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # torch's, before zip
_LEGACY_PICKLES = 5  # magic number, version, system, the object, its storages' keys


@dataclass(frozen=True)
class Content:
    """A checkpoint's pickle, checked: the names that it would import, and what it holds.

    `places` is where its storages are in the file; their numbers are `big_endian` or not.
    """

    names: tuple[str, ...]
    value: Any
    places: Places
    big_endian: bool = False


def check_pickles(path: Path, container: str) -> tuple[str, ...]:
    """Check every pickle of a checkpoint, and return the names that they would import.

    `container` is ``zip``, ``pickle`` or ``safetensors``, which contains no pickle.

    Raises
    ------
    CheckpointError
        As `read_pickles`.
    """
    return () if container == "safetensors" else read_pickles(path, container).names


def read_pickles(path: Path, container: str) -> Content:
    """Check every pickle of a checkpoint, ``zip`` or ``pickle``, and return what it holds.

    Raises
    ------
    CheckpointError
        A pickle would import what a state dict never needs, or cannot be read; a tensor is not
        within the file; or the file is not one that torch.save writes.
    """
    places: Places = {}
    found: list[tuple[str, Requests]] = []
    unfit: str | None = None
    big_endian = False
    with reading(path) as file:
        try:
            if container == "zip":
                members = zip_members(file)
                found += _zipped(file, members)
                places, big_endian = _places(file, members)
            else:
                found += _legacy(path, file, places)
        except (ValueError, EOFError, OSError, OverflowError) as failure:
            unfit = str(failure) or ENDS_EARLY
    names = tuple(dict.fromkeys(name for _, asked in found for name in asked.names))
    refused = {name + where: None for where, asked in found for name in asked.refused}
    broken = [asked.broken + where for where, asked in found if asked.broken]
    unfits = [asked.unfit + where for where, asked in found if asked.unfit]
    if unfit is not None:
        unfits.append(unfit)
    if ENDS_EARLY in (*broken, unfit) and not refused:
        raise CheckpointError(f"{path}: truncated: {ENDS_EARLY}. Download it again")
    if refused or broken or unfits:
        why = _sentence(refused) if refused else unfits[0] if unfits else ""
        why = why or f"its pickle cannot be read ({broken[0]})"
        raise CheckpointError(f"{path}: refused, nothing in it was executed: {why}")
    own = next(asked for where, asked in found[3 * (container == "pickle") :] if not where)
    for tensor, key in own.tensors:
        if (error := tensor.unfit(places)) is not None:
            raise CheckpointError(
                f"{path}: refused, nothing in it was executed: the tensor {key}: {error}"
            )
    return Content(names, own.value, places, big_endian)


def _sentence(refused: dict[str, None]) -> str:
    def hint(name: str) -> str | None:
        return next((why for start, why in _HINTS if name.startswith(start)), None)

    # names without a hint first
    names = [name[:200] for name in sorted(refused, key=lambda name: hint(name) is not None)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    sentence = f"it would import {', '.join(names[:3])}{more}, which a state dict never needs"
    hints = [why for name in names if (why := hint(name)) is not None]
    return f"{sentence}; {hints[0]}: {_SAVE_AGAIN}" if hints else sentence


def _legacy(path: Path, file: BufferedReader, places: Places) -> Iterator[tuple[str, Requests]]:
    """Yield the pickles of a file of torch before 1.6, and fill `places`.

    Behind the pickles, each storage is its number of elements and their bytes.
    """
    size = os.fstat(file.fileno()).st_size
    legacy = file.read(14)[2:] == _MAGIC
    at, found = 0, []
    for _ in range(_LEGACY_PICKLES if legacy else 1):
        file.seek(at)
        stream = io.BytesIO(file.read(LIMIT))
        asked = requests(stream)
        if asked.broken == ENDS_EARLY and at + LIMIT < size:
            asked = replace(asked, broken=f"it has more than {LIMIT:,} bytes")
        yield "", asked
        if asked.broken is not None or asked.refused:
            return  # the next one cannot be found, or no longer matters
        at += stream.tell()
        found.append(asked)
    if not legacy:
        raise CheckpointError(f"{path}: a pickle, but not one that torch.save writes")
    keys, storages = found[4].value, found[3].storages
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str) or key not in storages:
            raise ValueError("it lists a storage that no tensor has")
        file.seek(at)
        count = int.from_bytes(file.read(8), "little")
        places[key] = at + 8, count * DTYPES[storages[key]]
        at += 8 + count * DTYPES[storages[key]]
        if at > size:
            raise EOFError


def _zipped(file: BufferedReader, members: list[Member]) -> Iterator[tuple[str, Requests]]:
    """Yield the pickles of a zip archive, recognised by its members' bytes, not their names."""
    opcodes, total = OPCODES, 0
    for member in members:
        name = member.name.rpartition("/")[2].lower()
        named = name.endswith((".pkl", ".pickle"))
        total += member.size
        if total > os.fstat(file.fileno()).st_size:
            return  # members overlap or are compressed: `stored_members` says which
        try:
            file.seek(member_start(file, member))
        except ValueError:
            continue  # it is not stored as torch does it, as `stored_members` says
        content = file.read(min(member.size, 256))
        if not named and not looks_pickled(content):
            continue
        where = "" if name == "data.pkl" else f" (in its member {shown(member.name)[1:-1]})"
        if named and member.size > LIMIT:
            found = Requests((), f"it has {member.size:,} bytes, the limit is {LIMIT:,}")
        else:
            content += file.read(min(member.size, LIMIT) - len(content))
            found = requests(io.BytesIO(content), opcodes)
            opcodes -= found.opcodes
        # a tensor's bytes can start like a pickle, but do not continue like one
        if named or found.broken is None or found.refused:
            yield where, found


def _places(file: BufferedReader, members: list[Member]) -> tuple[Places, bool]:
    """Return where the storages of a zip archive are, and whether they are big-endian."""
    stored = stored_members(file, members)
    own = [name for name in stored if name.rpartition("/")[2] == "data.pkl"]
    if len(own) != 1:
        raise ValueError(f"it has {len(own)} members that are called data.pkl")
    folder = own[0].removesuffix("data.pkl")
    start, size = stored.get(f"{folder}byteorder", (0, 0))
    file.seek(start)
    big_endian = file.read(min(size, 8)) == b"big"
    data = f"{folder}data/"
    return {n.removeprefix(data): at for n, at in stored.items() if n.startswith(data)}, big_endian
