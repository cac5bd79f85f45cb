"""Follow the opcodes of a pickle: which names it would import, and what it holds.

A pickle is a small program. It can call only what it imports by name (a "global"): a state dict
needs the few in `ALLOWED`. Nothing is imported or called here. The opcodes are followed with
dicts, lists, strings and numbers, and with descriptions in place of tensors. The depth, the number
of opcodes and the layout of every tensor are checked meanwhile.
"""

from __future__ import annotations

import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO, Any, cast

from r2ncli.weights.containers import shown
from r2ncli.weights.stored import Global, StoredTensor, rebuilt, storage_of

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


# The bounds of a pickle. A state dict takes 150 bytes and 25 opcodes a tensor and is 8 containers
# deep, with the tuples that describe a tensor; a training checkpoint of the largest published
# network, with Adam's state, has 6,000 tensors. The rest is for settings, logs of losses and the
# like: ten times what such files need, and still read in a few seconds.
LIMIT = 16_000_000  # bytes
OPCODES = 2_000_000
_DEPTH = 32

COMPUTED = "a name that it computes"
ENDS_EARLY = "it ends too early"
_MALFORMED = (ValueError, IndexError, KeyError, EOFError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Requests:
    """What one pickle would import and what it holds.

    Attributes
    ----------
    names : tuple of str
        In order, each once.
    broken, unfit : str or None
        Why it could not be read to its end, and why it is refused although it could.
    value : object
        What it would load: dicts, lists, tuples, strings, numbers and `StoredTensor`; anything
        else is an `Other` or a `Global`.
    tensors : tuple of StoredTensor and str
        All of its tensors, with the key that each has in the dict around it.
    storages : dict of str
        The dtype of each storage by its key.
    opcodes : int
        How much work it was.
    """

    names: tuple[str, ...]
    broken: str | None = None
    unfit: str | None = None
    value: Any = None
    tensors: tuple[tuple[StoredTensor, str], ...] = ()
    storages: dict[str, str] = field(default_factory=dict)
    opcodes: int = 0

    @property
    def refused(self) -> tuple[str, ...]:
        """The names that no state dict needs."""
        return tuple(name for name in self.names if name not in ALLOWED)


def requests(stream: IO[bytes], opcodes: int = OPCODES) -> Requests:
    """Follow the pickle at `stream` for at most so many opcodes; leave `stream` behind it."""
    walk = _Walk(opcodes)
    broken = None
    try:
        walk.follow(stream)
    except _MALFORMED as error:
        text = str(error)
        early = re.match("pickle exhausted|not enough data|expected .* remain|no newline", text)
        broken = ENDS_EARLY if early else text.split("\n")[0][:200]
    tensors = tuple((tensor, walk.keys.get(id(tensor), "in a list")) for tensor in walk.tensors)
    return Requests(
        tuple(walk.names), broken, walk.unfit, walk.value, tensors, walk.storages, walk.done
    )


class _List(list[Any]):
    """A list of a pickle: how deep it is, and whether another container holds it."""

    __slots__ = ("depth", "held")
    depth: int
    held: bool


class _Dict(dict[Any, Any]):
    """A dict of a pickle: as `_List`, and the class that it has."""

    __slots__ = ("depth", "held", "kind")
    depth: int
    held: bool
    kind: str


class _Tuple(tuple[Any, ...]):
    """A tuple of a pickle that has containers in it."""

    depth: int


@dataclass(slots=True, eq=False)
class Other:
    """An object of a pickle that is no dict, list, tuple, string, number or tensor."""

    kind: str
    depth: int = 0


class _UnfitError(Exception):
    """A pickle is refused, and following it further cannot name anything that matters more."""


class _Walk:
    """Follows the opcodes of one pickle, as an unpickler would, but without calling anything."""

    def __init__(self, opcodes: int) -> None:
        self.names: dict[str, None] = {}
        self.unfit: str | None = None
        self.value: Any = None
        self.tensors: list[StoredTensor] = []
        self.keys: dict[int, str] = {}  # of tensors, by their id
        self.storages: dict[str, str] = {}
        self.done = 0
        self._most = opcodes
        self.stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def follow(self, stream: IO[bytes]) -> None:
        """Follow the pickle to its end, or until it is refused."""
        try:
            for opcode, value, _ in pickletools.genops(stream):
                self._work(1)
                name, argument = opcode.name, cast(Any, value)
                if name in _CONSTANTS:
                    self.stack.append(argument)
                elif name.endswith("PUT"):
                    self._memo[argument] = self.stack[-1]
                elif name.endswith("GET"):
                    self.stack.append(self._memo[argument])
                elif (step := _STEPS.get(name)) is not None:
                    step(self)
                else:
                    self._name(name, argument)
        except _UnfitError as refusal:
            self._refuse(str(refusal))

    def _work(self, amount: int) -> None:
        self.done += amount
        if self.done > self._most:
            raise _UnfitError(f"its pickle has more than {OPCODES:,} opcodes")

    def _charge(self, value: Any, levels: int) -> None:
        """Count what is in a container, and in those in it, as work: a memo gives it repeatedly."""
        if isinstance(value, list | tuple | dict):
            self._work(len(value))
            if levels:
                for part in value.values() if isinstance(value, dict) else value:
                    self._charge(part, levels - 1)

    def _refuse(self, why: str) -> None:
        self.unfit = self.unfit or why

    def _name(self, opcode: str, argument: Any) -> None:
        """Push a name that is imported, and remember it."""
        if opcode in ("GLOBAL", "INST"):
            name = _full_name(*str(argument).split(" ", 1))
        elif opcode == "STACK_GLOBAL":
            module, attribute = self.stack[-2:]
            known = isinstance(module, str) and isinstance(attribute, str)
            name = _full_name(module, attribute) if known else COMPUTED
            del self.stack[-2:]
        elif opcode.startswith("EXT"):
            name = f"the extension registry's number {argument}"
        else:
            raise ValueError(f"the opcode {opcode} is not one that torch.save writes")
        self.names[name] = None
        if opcode == "INST":
            self._refuse(f"it would call {name}")
            self.since_mark()
        self.stack.append(Global(name))

    def since_mark(self) -> list[Any]:
        found = self.stack
        self.stack = self._marks.pop()
        return found

    # --- containers ---

    def _deeper(self, values: Iterable[Any]) -> int:
        """Return the depth of a container of `values`, which it holds from now on."""
        deepest = 0
        for value in values:
            if isinstance(value, _List | _Dict):
                value.held = True
            depth = getattr(value, "depth", 1 if type(value) is tuple else 0)
            deepest = max(deepest, depth)
        if deepest >= _DEPTH:
            raise _UnfitError(f"its pickle is more than {_DEPTH} containers deep")
        return deepest + 1

    def _fill(self, container: Any, values: list[Any]) -> None:
        """Let a list or dict hold `values`, if no other container holds it already.

        So a container is complete before it is in another one, its depth is known, and none can
        hold itself.
        """
        container.depth = max(container.depth, self._deeper(values))
        if container.held:
            raise _UnfitError("a container holds itself, or is changed after another one holds it")

    def push_list(self, values: list[Any]) -> None:
        made = _List(values)
        made.depth, made.held = self._deeper(values), False
        self.stack.append(made)

    def push_dict(self, values: list[Any], kind: str = "dict") -> None:
        made = _Dict()
        made.depth, made.held, made.kind = 1, False, kind
        self.stack.append(made)
        self.set(values)

    def push_tuple(self, values: list[Any]) -> None:
        depth = self._deeper(values)
        made = tuple(values) if depth == 1 else _Tuple(values)
        if isinstance(made, _Tuple):
            made.depth = depth
        self.stack.append(made)

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not _List:
            raise ValueError(f"it appends to a {kind_of_value(target)}")
        self._fill(target, values)
        target.extend(values)

    def set(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not _Dict:
            raise ValueError(f"it sets an entry of a {kind_of_value(target)}")
        self._fill(target, values)
        for key, value in zip(values[::2], values[1::2], strict=True):
            # other keys name no tensor; the hash of a tuple or of a large number takes long
            plain = isinstance(key, str) or (type(key) is int and abs(key) < 1 << 62)
            target[key if plain else Other(kind_of_value(key))] = value
            if isinstance(value, StoredTensor):
                self.keys.setdefault(id(value), shown(key))

    # --- calls ---

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if not isinstance(arguments, tuple):
            raise ValueError("it calls something without a tuple of arguments")
        self._charge(arguments, 2)
        self.stack[-1] = self._result(function, arguments)

    def _result(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Return what stands for the result of a call."""
        if not isinstance(function, Global):
            self._refuse(f"it would call a {kind_of_value(function)}")
            return Other("object", self._deeper(arguments))
        name = function.name
        self._deeper(arguments)
        if name.startswith("torch._utils.") and name in ALLOWED:
            tensor = rebuilt(name, arguments)
            self.tensors.append(tensor)
            return tensor
        if name in ("collections.OrderedDict", "collections.Counter"):
            return self._mapping(name.removeprefix("collections."), arguments)
        if name in ("torch.Size", "torch.serialization._get_layout") and len(arguments) == 1:
            return arguments[0]  # a tuple, and the layout's name
        if name in ("builtins.set", "torch.device") or (
            name == "_codecs.encode" and arguments[1:] == ("latin1",)
        ):
            return Other(name.rpartition(".")[2], self._deeper(arguments))
        if name in ALLOWED:
            self._refuse(f"it would call {name} with what no state dict needs")
        return Other(name)  # not allowed, so the file is refused

    def _mapping(self, kind: str, arguments: tuple[Any, ...]) -> Any:
        values = []
        for pairs in arguments:
            if kind == "Counter" or not isinstance(pairs, list):
                return Other(kind, self._deeper(arguments))  # its counts do not matter
            for key, value in pairs:  # as Python 2 writes it
                values += [key, value]
        self.push_dict(values, kind)
        return self.stack.pop()

    def new(self) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        name = made.name if isinstance(made, Global) else kind_of_value(made)
        if name != "argparse.Namespace" or arguments != ():
            self._refuse(f"it would make a {name} with what no state dict needs")
        self.stack.append(Other(name))

    def obj(self) -> None:
        self._refuse(f"it would make a {kind_of_value(self.since_mark()[0])}")
        self.stack.append(Other("object"))

    def build(self) -> None:
        """Set attributes: torch's loader gives them to OrderedDict, where they replace methods."""
        state, target = self.stack.pop(), self.stack[-1]
        self._charge(state, 0)
        depth = self._deeper([state])
        names = list(state) if isinstance(state, _Dict) else [state]
        if isinstance(target, _Dict) and target.kind == "OrderedDict":
            self._fill(target, [state])
            bad = [name for name in names if not _is_note(name) or hasattr(OrderedDict, name)]
        elif isinstance(target, Other):
            target.depth = max(target.depth, depth)
            known = target.kind == "argparse.Namespace"
            bad = [name for name in names if not known or not _is_note(name)]
        else:
            bad = names
        if bad or not isinstance(state, _Dict):
            bad = bad or names
            self._refuse(f"it would set the attribute {shown(bad[0])} of a {kind_of_value(target)}")

    def storage(self) -> None:
        storage = storage_of(self.stack.pop())
        self.storages.setdefault(storage.key, storage.dtype)
        self.stack.append(storage)

    def stop(self) -> None:
        self.value = self.stack.pop()

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def mark(self) -> None:
        self._marks.append(self.stack)
        self.stack = []

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("its stack is empty")
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found


def _is_note(name: Any) -> bool:
    """Whether the name of an attribute is one that Python and its libraries do not use."""
    return isinstance(name, str) and not name.startswith("__")


def kind_of_value(value: Any) -> str:
    """Return the class of a value of a pickle, as an error names it."""
    if isinstance(value, _Dict | Other):
        return value.kind
    names = {_List: "list", _Tuple: "tuple", StoredTensor: "Tensor", Global: "class"}
    return names.get(type(value), type(value).__name__)


_CONSTANTS = frozenset(
    [
        *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
        *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    ]
)
_STEPS: dict[str, Callable[[_Walk], object]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda walk: None),
    "NONE": lambda walk: walk.stack.append(None),
    "NEWTRUE": lambda walk: walk.stack.append(True),
    "NEWFALSE": lambda walk: walk.stack.append(False),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda walk: walk.push_list([])),
    "EMPTY_DICT": lambda walk: walk.push_dict([]),
    "EMPTY_TUPLE": lambda walk: walk.stack.append(()),
    "LIST": lambda walk: walk.push_list(walk.since_mark()),
    "DICT": lambda walk: walk.push_dict(walk.since_mark()),
    **dict.fromkeys(("TUPLE", "FROZENSET"), lambda walk: walk.push_tuple(walk.since_mark())),
    "TUPLE1": lambda walk: walk.push_tuple(walk.last(1)),
    "TUPLE2": lambda walk: walk.push_tuple(walk.last(2)),
    "TUPLE3": lambda walk: walk.push_tuple(walk.last(3)),
    "APPEND": lambda walk: walk.append(walk.last(1)),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda walk: walk.append(walk.since_mark())),
    "SETITEM": lambda walk: walk.set(walk.last(2)),
    "SETITEMS": lambda walk: walk.set(walk.since_mark()),
    "REDUCE": _Walk.reduce,
    "NEWOBJ": _Walk.new,
    "OBJ": _Walk.obj,
    "BUILD": _Walk.build,
    "BINPERSID": _Walk.storage,
    "MARK": _Walk.mark,
    "POP": _Walk.pop,
    "POP_MARK": _Walk.since_mark,
    "DUP": lambda walk: walk.stack.append(walk.stack[-1]),
    "MEMOIZE": _Walk.memoize,
    "STOP": _Walk.stop,
}


def _full_name(module: str, name: str) -> str:
    """Return a name as Python 3 has it: protocol 2, which torch writes, has Python 2's names."""
    module, name = NAME_MAPPING.get((module, name), (module, name))
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"
