"""Classify images and extract features from Python: start here.

    import r2ncli

    for result in r2ncli.classify("photos", topk=3, weights="demo"):
        print(result.path, result.error or result.predictions[0].label)

Each function takes the fields of `RunOptions` and of `Listeners` as keywords, with the names
and defaults that the command line has; ``help(r2ncli.classify)`` lists them. Type checkers
and editors read ``api.pyi``, which is generated from the same fields.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from os import PathLike as OsPathLike
from typing import Any, TypeVar, get_type_hints

from r2ncli import runs
from r2ncli.options import CLASSIFY, EXTRACT, Listeners, RunOptions, options_of
from r2ncli.outputs.rows import Classification, Features
from r2ncli.pipeline import Classify, Extract
from r2ncli.runs import Paths

F = TypeVar("F", bound=Callable[..., Any])

OUTPUT = (
    "The file to write; its suffix decides the format. It grows in ``OUT.partial/`` until complete."
)
PATHS = (
    "Images, folders, archives, patterns, ``@list`` files, ``-`` (names on standard input) and "
    "URLs; one or a sequence. None means the current folder, an empty sequence no input."
)
LISTENERS = {
    "on_warning": "Called with a warning as a sentence, for example about inputs that are skipped.",
    "on_progress": "Called with a `Progress` after each batch of images.",
    "on_download": "Called with a `DownloadProgress` while weights are downloaded.",
    "on_quantising": "Called with the number of calibration images before int8 is prepared.",
}


def keywords(command: str, *, to_file: bool) -> Iterator[inspect.Parameter]:
    """Yield the keyword parameters of a command's function: its options, then the listeners."""
    hints = get_type_hints(RunOptions)
    for declared, _ in options_of(command, to_file=to_file):
        yield inspect.Parameter(
            declared.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=declared.default,
            annotation=hints[declared.name],
        )
    for name in LISTENERS:
        annotation = Callable[[Any], None] | None
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
        )


def _complete(command: str, *, to_file: bool = False) -> Callable[[F], F]:
    """Give a function the signature and the documentation of a command's keywords."""

    def complete(function: F) -> F:
        written = inspect.signature(function, eval_str=True)
        own = [p for p in written.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = [*own, *keywords(command, to_file=to_file)]
        function.__signature__ = written.replace(  # type: ignore[attr-defined]
            parameters=parameters
        )
        texts = {"output": OUTPUT, "paths": PATHS} if to_file else {"paths": PATHS}
        texts |= {f.name: option.help for f, option in options_of(command, to_file=to_file)}
        sections = ["", "Parameters", "----------"]
        for name, text in (texts | LISTENERS).items():
            sections += [name, textwrap.indent(textwrap.fill(text, 84), "    ")]
        sections += _RESULT_TO_FILE if to_file else _RESULT
        function.__doc__ = "\n".join([function.__doc__ or "", *sections])
        return function

    return complete


_RAISES = ["", "Raises", "------", "R2NError"]
_RESULT = [
    *("", "Yields", "------"),
    "One record per input; an image that cannot be used has an `error`.",
    *_RAISES,
    "    At the call: an option, a path, the weights or the device cannot be used.",
]
_RESULT_TO_FILE = [
    *("", "Returns", "-------", "dict", "    The run record, as stored with the output."),
    *_RAISES,
    "    Before anything is written if an argument cannot be used; later if the device or the disk",
    "    fails: finished blocks are kept then.",
]


def _parsed(
    command: str, given: dict[str, Any], *, to_file: bool = False
) -> tuple[RunOptions, Listeners]:
    """Split keywords into options and listeners.

    Raises
    ------
    TypeError
        There is no such keyword.
    UsageError
        A value is not valid.
    """
    known = {parameter.name for parameter in keywords(command, to_file=to_file)}
    for name in given:
        if name not in known:
            from difflib import get_close_matches

            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"unexpected keyword argument {name!r}{hint}")
    heard = {name: given[name] for name in LISTENERS if given.get(name) is not None}
    options = {name: value for name, value in given.items() if name not in LISTENERS}
    return RunOptions(**options), Listeners(**heard)


@_complete(CLASSIFY)
def classify(paths: Paths = None, **options: Any) -> Iterator[Classification]:
    """Classify images: the most probable classes of each, in input order."""
    return runs.records(Classify(), paths, *_parsed(CLASSIFY, options))


@_complete(EXTRACT)
def extract(paths: Paths = None, **options: Any) -> Iterator[Features]:
    """Extract features: the outputs of layers for each image, in input order."""
    return runs.records(Extract(), paths, *_parsed(EXTRACT, options))


@_complete(CLASSIFY, to_file=True)
def classify_to(
    output: str | OsPathLike[str], paths: Paths = None, **options: Any
) -> dict[str, Any]:
    """Classify images into a file, as ``r2n classify -o`` does."""
    return runs.run_to_file(Classify(), output, paths, *_parsed(CLASSIFY, options, to_file=True))


@_complete(EXTRACT, to_file=True)
def extract_to(
    output: str | OsPathLike[str], paths: Paths = None, **options: Any
) -> dict[str, Any]:
    """Extract features into a file, as ``r2n extract -o`` does."""
    return runs.run_to_file(Extract(), output, paths, *_parsed(EXTRACT, options, to_file=True))
