"""The program: its commands in their groups, and its entry point."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from r2ncli import __version__
from r2ncli.cli import checkpoints, results, run, system
from r2ncli.cli.boundary import boundary, speak_utf8, stop_writing
from r2ncli.cli.terminal import put

RUN, RESULTS, CHECKPOINTS, SYSTEM = "Run", "Results", "Checkpoints", "System"


class _Command(TyperCommand):
    """A command that suggests an option only if its name is similar to the unknown one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if hasattr(error, "possibilities") and hasattr(error, "option_name"):
                known = [name for parameter in self.params for name in parameter.opts]
                error.possibilities = near_options(error.option_name, known)
            raise


class _Group(TyperGroup):
    command_class = _Command


app = typer.Typer(
    name="r2n",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for panel, name, command, example in (
    (RUN, "classify", run.classify, "r2n classify ./photos --topk 5 -o results.csv"),
    (RUN, "extract", run.extract, "r2n extract ./photos --layer layer3 -o feats.h5"),
    (RESULTS, "diff", results.diff, "r2n diff before.csv after.parquet"),
    (RESULTS, "merge", results.merge, "r2n merge 1.parquet 2.parquet 3.parquet -o all.parquet"),
    (
        CHECKPOINTS,
        "verify-weights",
        checkpoints.verify,
        "r2n verify-weights res2net50_v1b_26w_4s-3cf99910.pth",
    ),
    (CHECKPOINTS, "convert", checkpoints.convert, "r2n convert res2net50_v1b_26w_4s mine.onnx"),
    (SYSTEM, "bench", system.bench, "r2n bench ./photos --precision bf16 -b 1 -b 8"),
):
    app.command(name, cls=_Command, epilog=f"Example:  {example}", rich_help_panel=panel)(
        boundary(command)
    )


@app.command("help", rich_help_panel=SYSTEM, epilog="Example:  r2n help classify")
def show_help(
    context: typer.Context,
    command: Annotated[
        str | None, typer.Argument(help="Explain this command.", show_default="the whole program")
    ] = None,
) -> None:
    """Show the help of a command."""
    app([command, "--help"] if command else ["--help"], prog_name="r2n")


def _print_version(wanted: bool) -> None:
    if wanted:
        put(f"r2n {__version__}\n")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option(
            "-V",
            "--version",
            metavar="",
            callback=_print_version,
            is_eager=True,
            help="Print the version.",
        ),
    ] = False,
) -> None:
    """Classify images and extract features with the Res2Net family."""


def near_options(unknown: str, known: list[str]) -> list[str]:
    """Return the option most similar to an unknown one, if both begin alike."""
    start = unknown.lstrip("-")[:2]
    near = {
        name: SequenceMatcher(None, unknown, name).ratio()
        for name in known
        if name.startswith("--") and name.lstrip("-").startswith(start)
    }
    best = max(near, key=near.__getitem__, default=None)
    return [best] if best is not None and near[best] > 0.5 else []


def main() -> None:
    """Run the program and exit; a reader that closes the pipe early is no error."""
    speak_utf8()  # before typer prints a help page
    try:
        app(prog_name="r2n")
    except SystemExit as ended:
        # commands end with other codes, and bugs with their traceback: 1 can only come from
        # typer, when it prints a help page into a closed pipe
        stop_writing()
        raise SystemExit(0 if ended.code == 1 else ended.code) from None
