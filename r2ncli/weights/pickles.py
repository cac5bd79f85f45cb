"""Read from a pickle's opcodes which names it would import, without executing it.

A pickle is a small program. It can call only what it imports by name (a "global"), so the
names decide: a state dict needs the few in `ALLOWED`, and any other is refused. torch's own
safe loader runs after this check, not instead of it.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, cast

from r2ncli.errors import CheckpointError
from r2ncli.weights.containers import ZIP_ERRORS, looks_pickled, reading

_STORAGES = (
    *("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"),
    *("ComplexDouble", "ComplexFloat", "QUInt8", "QInt8", "QInt32", "QUInt4x2", "QUInt2x4"),
)
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
    *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("quint8", "qint8", "qint32", "per_tensor_affine", "per_channel_affine"),
)
_REBUILDS = (
    *("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"),
    *("_rebuild_parameter_with_state", "_rebuild_sparse_tensor", "_rebuild_qtensor"),
    "_rebuild_meta_tensor_no_storage",
)
ALLOWED = frozenset(
    [
        "collections.OrderedDict",
        "collections.Counter",  # a scheduler's milestones
        "argparse.Namespace",  # a training script's options: it only holds values
        "builtins.set",
        "_codecs.encode",  # how protocol 2 stores bytes
        "torch.Size",
        "torch.device",
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        *(f"torch.{name}Storage" for name in _STORAGES),
        *(f"torch.cuda.{name}Storage" for name in _STORAGES),
        *(f"torch.{name}" for name in _DTYPES),
        *(f"torch._utils.{name}" for name in _REBUILDS),
    ]
)

# what harmless files import beyond a state dict, and why
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
_LIMIT = 256_000_000  # bytes of a pickle; a state dict of 500 tensors takes 80,000
_COMPUTED = "a name that it computes"
_ENDS_EARLY = "it ends too early"
_MARK = object()
_MALFORMED = (ValueError, IndexError, KeyError, EOFError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Requests:
    """The names that one pickle would import, in order, each once.

    `broken` says why the pickle could not be read to its end.
    """

    names: tuple[str, ...]
    broken: str | None = None

    @property
    def refused(self) -> tuple[str, ...]:
        """The names that no state dict needs."""
        return tuple(name for name in self.names if name not in ALLOWED)


def check_pickles(path: Path, container: str) -> tuple[str, ...]:
    """Check every pickle of a checkpoint, and return the names that they would import.

    `container` is ``zip``, ``pickle`` or ``safetensors``, which contains no pickle.

    Raises
    ------
    CheckpointError
        A pickle would import what a state dict never needs, or cannot be read.
    """
    names: dict[str, None] = {}
    refused: dict[str, None] = {}
    broken: list[str] = []
    for where, found in _pickles(path, container):
        names |= dict.fromkeys(found.names)
        refused |= {name + where: None for name in found.refused}
        if found.broken is not None:
            broken.append(found.broken + where)
    if _ENDS_EARLY in broken and not refused:
        raise CheckpointError(f"{path}: truncated: {_ENDS_EARLY}. Download it again")
    if refused or broken:
        why = _sentence(refused) if refused else f"its pickle cannot be read ({broken[0]})"
        raise CheckpointError(f"{path}: refused, nothing in it was executed: {why}")
    return tuple(names)


def _sentence(refused: dict[str, None]) -> str:
    def hint(name: str) -> str | None:
        return next((why for start, why in _HINTS if name.startswith(start)), None)

    names = sorted(refused, key=lambda name: hint(name) is not None)  # names without a hint first
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    sentence = f"it would import {', '.join(names[:3])}{more}, which a state dict never needs"
    hints = [why for name in names if (why := hint(name)) is not None]
    return f"{sentence}; {hints[0]}: {_SAVE_AGAIN}" if hints else sentence


def _pickles(path: Path, container: str) -> Iterator[tuple[str, Requests]]:
    """Yield where each pickle of a file is (empty for the checkpoint's own), and its requests."""
    with reading(path) as file:
        if container == "zip":
            yield from _zipped(path, file)
        elif container == "pickle":
            # mapped, because a string may claim any length: no memory is reserved for it
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                legacy = content[2:14] == _MAGIC
                for _ in range(_LEGACY_PICKLES if legacy else 1):
                    found = requests(cast(IO[bytes], content))
                    yield "", found
                    if found.broken is not None or found.refused:
                        return  # the next one cannot be found, or no longer matters
            if not legacy:
                raise CheckpointError(f"{path}: a pickle, but not one that torch.save writes")


def _zipped(path: Path, file: BufferedReader) -> Iterator[tuple[str, Requests]]:
    """Yield the pickles of a zip archive, recognised by its members' bytes, not their names."""
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                name = member.filename.rpartition("/")[2].lower()
                named = name.endswith((".pkl", ".pickle"))
                content = _member(archive, member, 256)
                if not named and not looks_pickled(content):
                    continue
                where = "" if name == "data.pkl" else f" (in its member {member.filename})"
                if member.file_size > _LIMIT:
                    found = Requests((), f"it has {member.file_size:,} bytes" if named else None)
                else:
                    found = requests(io.BytesIO(_member(archive, member, _LIMIT)))
                # a tensor's bytes can start like a pickle, but do not continue like one
                if named or found.broken is None or found.refused:
                    yield where, found
    except ZIP_ERRORS as error:
        raise CheckpointError(f"{path}: corrupted, cannot be loaded: {error}") from error


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, size: int) -> bytes:
    """Return the first bytes of a member without a CRC check: torch may have written none."""
    with archive.open(member) as content:
        content._expected_crc = None  # type: ignore[attr-defined]
        return content.read(size)


def requests(stream: IO[bytes]) -> Requests:
    """Return every name that the pickle at `stream` would import; leave `stream` behind it."""
    names: dict[str, None] = {}
    try:
        for name in _globals(stream):
            names[name] = None
    except _MALFORMED as error:
        text = str(error)
        early = re.match("pickle exhausted|not enough data|expected .* remain|no newline", text)
        return Requests(tuple(names), _ENDS_EARLY if early else text.split("\n")[0])
    return Requests(tuple(names))


def _globals(stream: IO[bytes]) -> Iterator[str]:
    """Yield the imported names, by a walk over the opcodes with a stack of strings and marks.

    STACK_GLOBAL takes its name from strings on the stack, which may come from the memo;
    anything else on the stack is None.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name, takes, gives = opcode.name, opcode.stack_before, opcode.stack_after
        number = argument if isinstance(argument, int) else -1
        if name in ("GLOBAL", "INST"):
            yield _full_name(*str(argument).split(" ", 1))
        elif name == "STACK_GLOBAL":
            module, attribute = stack[-2:]
            known = isinstance(module, str) and isinstance(attribute, str)
            yield _full_name(module, attribute) if known else _COMPUTED
        elif name.startswith("EXT"):
            yield f"the extension registry's number {argument}"

        if "PUT" in name:
            memo[number] = stack[-1]
            continue
        if name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
            continue
        if name == "DUP":
            stack.append(stack[-1])
            continue
        if pickletools.markobject in takes:
            while stack.pop() is not _MARK:
                pass
            takes = takes[: takes.index(pickletools.markobject)]
        for _ in takes:
            stack.pop()
        if name == "MARK":
            stack.append(_MARK)
        elif "GET" in name:
            stack.append(memo[number])
        else:
            text = argument if "UNICODE" in name or "STRING" in name else None
            stack += [text] * len(gives)


def _full_name(module: str, name: str) -> str:
    """Return a name as Python 3 has it: protocol 2, which torch writes, has Python 2's names."""
    module, name = NAME_MAPPING.get((module, name), (module, name))
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"
