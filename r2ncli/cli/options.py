"""Command-line options, made from `RunOptions`; and those that only the command line has."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import Field, fields
from functools import wraps
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from r2ncli.options import Option, RunOptions, options_of

F = TypeVar("F", bound=Callable[..., Any])

Paths = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PATHS",
        help="Images, folders, archives (.tar, .tar.gz, .zip, …), quoted patterns, @list files, "
        "- (names on standard input) and URLs.",
        show_default="the current folder",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print one JSON document to stdout.")
]
Quiet = Annotated[
    bool,
    typer.Option(
        "-q",
        "--quiet",
        metavar="",
        help="Show no progress and no summary; failures still show.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", metavar="", help="Replace the output if it exists.")
]


def flags(name: str) -> tuple[str, ...]:
    """Return the names of a keyword on the command line."""
    declared = _ALL.get(name)
    given: tuple[str, ...] = declared.metadata["option"].flags if declared else ()
    return given or ("--" + name.replace("_", "-"),)


def for_command_line(text: str) -> str:
    """Return an error's text with the keywords in backticks rewritten as options.

    ``use `batch_size=4` `` becomes ``use --batch-size 4``.
    """

    def option(match: re.Match[str]) -> str:
        value = (match[2] or "").strip("\"'")
        long = next(flag for flag in flags(match[1]) if flag.startswith("--"))
        return long if value in ("", "True") else f"{long} {value}"

    return re.sub(r"`([a-z]\w*)(?:=([^`]*))?`", option, text)


def with_run_options(command: str) -> Callable[[F], F]:
    """Add the options of `command` to the parameters of a function that takes ``options``.

    The parameter ``options`` is replaced by one parameter for each option of the command; the
    function is called with the `RunOptions` made from their values.
    """

    def complete(function: F) -> F:
        declared = [*options_of(command, to_file=True)]

        @wraps(function)
        def called(**given: Any) -> Any:
            options = {field.name: given.pop(field.name) for field, _ in declared}
            known = {name: value for name, value in options.items() if value is not None}
            return function(options=RunOptions(**known), **given)

        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "options"]
        parameters = [*own, *(_parameter(field, option) for field, option in declared)]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        called.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=parameters
        )
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        return called  # type: ignore[return-value]

    return complete


def _parameter(field: Field[Any], option: Option) -> inspect.Parameter:
    given: Any = field.default
    shown = option.shown or (", ".join(given) if option.repeatable and given else True)
    kind = _cli_type(field, option)
    known = option.suggestions or (lambda: ())
    annotation: Any = Annotated[
        kind,
        typer.Option(
            *flags(field.name),
            help=for_command_line(option.help),
            metavar=option.metavar or "|".join(option.choices) or _METAVARS.get(kind, "TEXT"),
            show_default=shown,
            rich_help_panel=option.panel,
            autocompletion=(lambda incomplete: [v for v in known() if v.startswith(incomplete)])
            if option.suggestions
            else None,
        ),
    ]
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None if option.repeatable else given,
        annotation=annotation,
    )


def _cli_type(field: Field[Any], option: Option) -> Any:
    if option.repeatable:
        return list[str] | None
    if option.choices:
        return Literal[option.choices]
    hint = _HINTS[field.name]
    types = getattr(hint, "__args__", (hint,))
    kind = next((kind for kind in (bool, int, float) if kind in types), str)
    return kind | None if type(None) in types else kind


_HINTS = get_type_hints(RunOptions)
_METAVARS: dict[Any, str] = {bool: "", int: "N", int | None: "N", float: "N"}
_ALL = {field.name: field for field in fields(RunOptions)}
