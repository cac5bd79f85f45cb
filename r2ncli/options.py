"""Every option of a run, declared once: its default, its documentation and its check.

The keywords of `classify` and `extract`, the options of ``r2n classify`` and ``r2n extract``,
their help texts and what the code below takes are all made from `RunOptions`. Importing this
file is quick, because ``r2n --help`` needs it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from operator import index
from typing import TYPE_CHECKING, Any, get_type_hints

from r2ncli.engine import AUTO, BACKENDS, INT8, POOLS, PRECISIONS
from r2ncli.errors import UsageError
from r2ncli.images.decoders import MAX_BYTES, MAX_PIXELS, DecodeRules
from r2ncli.sources.selection import TIMEOUT, USER_AGENT, Selection, parse_shard

if TYPE_CHECKING:
    from r2ncli.weights.download import DownloadProgress

CLASSIFY, EXTRACT, BENCH = "classify", "extract", "bench"
RUNS, ALL = (CLASSIFY, EXTRACT), (CLASSIFY, EXTRACT, BENCH)
DECODES = (AUTO, "exact")
DTYPES = ("float32", "float16")
ON_ERROR = ("continue", "fail")
BENCH_PRECISIONS = (AUTO, "fp32")
BENCH_SECONDS = 3.0

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Option:
    """The properties of one option besides its name, type and default.

    Attributes
    ----------
    help : str
        A sentence for ``--help`` and for the docstrings. It names other options as Python
        keywords in backticks.
    panel : str
        The group of options that it is listed under in ``--help``.
    commands : tuple of str
        The commands that have it.
    to_file : bool
        Whether only runs that write a file have it.
    flags : tuple of str
        Its names on the command line, where they are not made from the keyword.
    metavar, shown : str or None
        Its value in ``--help``, and its default in words where the plain value is unclear.
    choices : tuple of str
        All allowed values; empty if they cannot be listed.
    at_least, at_most : float or None
        The limits of a number.
    repeatable : bool
        Whether it holds several values; one value alone is taken as a sequence of one.
    suggestions : callable or None
        Returns values for the shell's completion, where not all values can be listed.
    """

    help: str
    panel: str
    commands: tuple[str, ...] = RUNS
    to_file: bool = False
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    shown: str | None = None
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    repeatable: bool = False
    suggestions: Callable[[], Sequence[str]] | None = None


def _known_weights() -> Sequence[str]:
    from r2ncli.architectures import DEMO, PUBLISHED

    return [*PUBLISHED, DEMO]


def _known_layers() -> Sequence[str]:
    from r2ncli.architectures import DEFAULT_NETWORK, PUBLISHED

    stages = enumerate(PUBLISHED[DEFAULT_NETWORK].architecture.layers, start=1)
    blocks = [
        name
        for stage, count in stages
        for name in (f"layer{stage}", *(f"layer{stage}.{block}" for block in range(count)))
    ]
    return ["conv1", "bn1", "relu", "maxpool", *blocks, "avgpool", "fc"]


INPUTS, IMAGES, NETWORK, RESULTS = "Inputs", "Images", "Network", "Results"


def _option(default: Any, help: str, panel: str, **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(help, panel, **more)})


@dataclass(frozen=True)
class RunOptions:
    """The options of a run, checked.

    Every field is a keyword of the public functions and an option of the commands; `Option`
    describes it, and `options_of` says which commands have it.

    Raises
    ------
    UsageError
        A value has the wrong type, is outside its limits, or contradicts another one. What
        depends on the device or on the weights is checked when these are opened.
    """

    topk: int = _option(
        5,
        "Report this many of the most probable classes per image.",
        RESULTS,
        commands=(CLASSIFY,),
        flags=("--topk", "--top-k"),
        at_least=1,
    )
    layers: Sequence[str] = _option(
        ("layer4",),
        "Extract the output of this layer (repeatable).",
        RESULTS,
        commands=(EXTRACT,),
        flags=("--layer",),
        metavar="NAME",
        repeatable=True,
        suggestions=_known_layers,
    )
    pool: str = _option(
        "avg",
        "Reduce feature maps to one value per channel by their mean (avg) or maximum (max), or "
        "keep them (none).",
        RESULTS,
        commands=(EXTRACT,),
        choices=POOLS,
    )
    dtype: str = _option(
        DTYPES[0],
        "Store features with this type.",
        RESULTS,
        commands=(EXTRACT,),
        to_file=True,
        choices=DTYPES,
    )
    weights: str | os.PathLike[str] | None = _option(
        None,
        "Load this checkpoint: a file, the name of a published network, or demo (ten CIFAR-10 "
        "classes, for trying the tool).",
        NETWORK,
        metavar="FILE|NAME|demo",
        suggestions=_known_weights,
        shown="$R2N_WEIGHTS, else res2net50_v1b_26w_4s",
    )
    device: str = _option(
        "auto",
        "Run on this device: auto (one GPU if there is one, else the CPU), cpu, cuda (all GPUs of "
        "the first one's model) or cuda:N.",
        NETWORK,
        commands=ALL,
        metavar="auto|cpu|cuda|cuda:N",
        suggestions=lambda: ("auto", "cpu", "cuda", "cuda:0"),
    )
    backend: str = _option(
        "auto",
        "Execute the network with this library; auto is the first one that runs on the device.",
        NETWORK,
        commands=ALL,
        choices=(AUTO, *(backend.name for backend in BACKENDS)),
    )
    precision: str = _option(
        "auto",
        "Compute in this precision; auto is the fastest that keeps top-1. int8 is for classify "
        "and needs `calibration`.",
        NETWORK,
        choices=(AUTO, *PRECISIONS),
    )
    calibration: Sequence[str | os.PathLike[str]] | str | os.PathLike[str] | None = _option(
        None,
        "Calibrate int8 with these images (given like PATHS, repeatable); up to 300 are sampled.",
        NETWORK,
        commands=(CLASSIFY,),
        metavar="PATHS",
        repeatable=True,
    )
    batch_size: int | None = _option(
        None,
        "Compute this many images per batch.",
        NETWORK,
        flags=("-b", "--batch-size"),
        shown="chosen for the device",
        at_least=1,
    )
    workers: int | None = _option(
        None,
        "Decode images with this many threads.",
        NETWORK,
        commands=ALL,
        flags=("-j", "--workers"),
        shown="one per core",
        at_least=1,
    )
    decode: str = _option(
        "auto",
        "Decode large JPEGs at reduced size (auto), or every image at full size (exact).",
        IMAGES,
        choices=DECODES,
    )
    image_size: int | None = _option(
        None,
        "Give the network square inputs of this many pixels a side.",
        IMAGES,
        shown="as trained",
        at_least=32,
        at_most=4096,
    )
    no_crop: bool = _option(
        False,
        "Stretch the whole image instead of cropping its centre.",
        IMAGES,
    )
    max_pixels: int = _option(
        MAX_PIXELS,
        "Turn images with more pixels than this into failed rows.",
        IMAGES,
        shown="200 million",
        at_least=1,
    )
    max_bytes: int = _option(
        MAX_BYTES,
        "Turn files with more bytes than this into failed rows.",
        IMAGES,
        shown="512 MB",
        at_least=1,
    )
    include: Sequence[str] | str = _option(
        (),
        "Take only names that match this pattern (repeatable).",
        INPUTS,
        metavar="PATTERN",
        repeatable=True,
    )
    exclude: Sequence[str] | str = _option(
        (),
        "Leave out images and folders that match this pattern (repeatable).",
        INPUTS,
        metavar="PATTERN",
        repeatable=True,
    )
    max: int | None = _option(None, "Stop after this many images.", INPUTS, at_least=1)
    shard: str | None = _option(
        None,
        "Process shard I of N; together the N shards cover every input exactly once.",
        INPUTS,
        metavar="I/N",
    )
    null: bool = _option(
        False,
        "Separate the names in lists and on standard input by NUL bytes.",
        INPUTS,
        flags=("-0", "--null"),
    )
    timeout: float = _option(TIMEOUT, "Give up on a remote image after this many seconds.", INPUTS)
    user_agent: str | None = _option(
        None, "Name this program to the servers of images.", INPUTS, shown="r2n and its version"
    )
    on_error: str = _option(
        "continue",
        "Turn an image that cannot be used into a failed row (continue), or end the run at the "
        "first one (fail).",
        INPUTS,
        choices=ON_ERROR,
    )
    overwrite: bool = _option(
        False, "Start again although the output exists, and replace it.", RESULTS, to_file=True
    )
    resume: bool = _option(False, "Continue an interrupted run.", RESULTS, to_file=True)
    retry_failed: bool = _option(
        False, "Try the failed rows of a finished output again.", RESULTS, to_file=True
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(RunOptions)
        for declared in fields(self):
            option: Option = declared.metadata["option"]
            value = _checked(declared.name, getattr(self, declared.name), hints, option)
            object.__setattr__(self, declared.name, value)
        self._check_together()

    def _check_together(self) -> None:
        if not self.layers:
            raise UsageError("`layers` names no layer")
        if not 0 < self.timeout < 86400:  # false for NaN
            raise UsageError(
                f"`timeout` must be more than 0 and less than 86400 seconds, not {self.timeout:g}"
            )
        if not re.fullmatch(r"[\x21-\x7e][\x20-\x7e]{0,999}", self.user_agent or USER_AGENT):
            raise UsageError(f"`user_agent` must be one line of ASCII, not {self.user_agent!r}")
        if self.shard is not None:
            parse_shard(self.shard)
        if self.precision == INT8 and self.calibration is None:
            raise UsageError(
                "`precision=int8` needs images to calibrate with: add `calibration` with "
                "images like those to be classified; 300 suffice (int8 is for classify only)"
            )
        if self.precision != INT8 and self.calibration is not None:
            raise UsageError("`calibration` is for `precision=int8`: give both, or neither")
        if self.overwrite + self.resume + self.retry_failed > 1:
            raise UsageError(
                "`overwrite` starts again, `resume` continues a run, and `retry_failed` tries the "
                "failed rows of a finished output again: give one of them"
            )

    def selection(self) -> Selection:
        """Return which inputs are taken."""
        return Selection(
            include=tuple(self.include),
            exclude=tuple(self.exclude),
            max=self.max,
            shard=None if self.shard is None else parse_shard(self.shard),
            null=self.null,
            timeout=self.timeout,
            max_bytes=self.max_bytes,
            user_agent=self.user_agent or USER_AGENT,
        )

    def decode_rules(self) -> DecodeRules:
        """Return how images are decoded."""
        return DecodeRules(self.decode, self.max_pixels, self.max_bytes)


@dataclass(frozen=True)
class Progress:
    """How far a run is after some more rows.

    Attributes
    ----------
    rows : int
        The number of these rows.
    failures : tuple of (str, str)
        The path and the error of each of these rows that failed.
    done, failed : int
        The number of all rows so far, and of those that failed.
    found : int
        The number of inputs found so far; once `walk_ended`, it is the total.
    """

    rows: int
    failures: tuple[tuple[str, str], ...]
    done: int
    failed: int
    found: int
    walk_ended: bool


def _ignore(_news: Any) -> None: ...


@dataclass(frozen=True)
class Listeners:
    """Functions that are called during a run; each does nothing unless given.

    Attributes
    ----------
    on_warning : callable
        Takes a warning as a sentence, for example about inputs that are skipped.
    on_progress : callable
        Takes a `Progress` after each batch.
    on_download : callable
        Takes a `DownloadProgress` while weights are downloaded.
    on_quantising : callable
        Takes the number of calibration images before the network is quantised to int8.
    on_ready : callable
        Is called when the network is ready and the first images are about to be computed.
    """

    on_warning: Callable[[str], None] = _ignore
    on_progress: Callable[[Progress], None] = _ignore
    on_download: Callable[[DownloadProgress], None] = _ignore
    on_quantising: Callable[[int], None] = _ignore
    on_ready: Callable[[], None] = lambda: None


NO_LISTENERS = Listeners()


def options_of(command: str, *, to_file: bool) -> Iterator[tuple[Field[Any], Option]]:
    """Yield the fields of `RunOptions` that a command has, in the order of their declaration."""
    for declared in fields(RunOptions):
        option: Option = declared.metadata["option"]
        if command in option.commands and (to_file or not option.to_file):
            yield declared, option


def _checked(name: str, value: Any, hints: dict[str, Any], option: Option) -> Any:
    """Return `value` in the form that `RunOptions` stores; raise a UsageError if it is invalid."""
    if option.repeatable and value is not None:
        single = isinstance(value, str | os.PathLike)
        try:
            values = (value,) if single else tuple(value)
        except TypeError:
            values = (value,)
        allowed = (str, os.PathLike) if name == "calibration" else (str,)
        for one in values:
            if not isinstance(one, allowed):
                raise _wrong_type(name, one, "text" if allowed == (str,) else "paths")
        return values
    types = getattr(hints[name], "__args__", (hints[name],))
    if value is None and type(None) in types:
        return None
    if bool in types:
        if not isinstance(value, bool):
            raise _wrong_type(name, value, "True or False")
    elif int in types:
        try:
            value = index(value)
        except TypeError:
            raise _wrong_type(name, value, "a whole number") from None
    elif float in types:
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise _wrong_type(name, value, "a number") from None
    elif not isinstance(value, str | os.PathLike if os.PathLike[str] in types else str):
        raise _wrong_type(name, value, "a path" if os.PathLike[str] in types else "text")
    if option.choices and value not in option.choices:
        raise UsageError(f"`{name}` must be one of {', '.join(option.choices)}, not {value!r}")
    if option.at_most is not None and not option.at_least <= value <= option.at_most:
        raise UsageError(
            f"`{name}` must be from {option.at_least} to {option.at_most}, not {value}"
        )
    if option.at_least is not None and value < option.at_least:
        raise UsageError(f"`{name}` must be at least {option.at_least}, not {value}")
    return value


def _wrong_type(name: str, value: object, expected: str) -> UsageError:
    return UsageError(f"`{name}` must be {expected}, not {value!r} ({type(value).__name__})")
