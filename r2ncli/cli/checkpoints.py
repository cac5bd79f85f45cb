"""Commands that work on checkpoint files: verify-weights and convert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from r2ncli.cli.options import Json, Overwrite, Quiet, for_command_line
from r2ncli.cli.terminal import Report, print_json, print_table, say, say_error
from r2ncli.errors import R2NError

if TYPE_CHECKING:
    from r2ncli.weights.compare import TensorComparison
    from r2ncli.weights.verify import Verification

TENSORS_SHOWN = 10


def verify(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE",
            help="Verify this checkpoint file; a bare name is also searched in torch.hub's folder.",
            show_default="the checkpoint that classify would load",
        ),
    ] = None,
    sha256: Annotated[
        str | None,
        typer.Option("--sha256", metavar="HEX", help="Require this SHA-256 digest."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="FILE",
            help="Compare with this checkpoint, tensor by tensor, instead.",
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Verify a checkpoint without executing anything in it."""
    from r2ncli.weights.compare import TensorComparison
    from r2ncli.weights.verify import Verification, verify_weights

    try:
        if against is None:
            return _print_verification(verify_weights(file, sha256=sha256), json)
        return _print_comparison(verify_weights(file, sha256=sha256, against=against), json)
    except R2NError as error:
        if json:
            failed = (
                Verification(file or "", error=for_command_line(str(error)))
                if against is None
                else TensorComparison(file or "", against, error=for_command_line(str(error)))
            )
            print_json(failed.as_dict())
        raise


def _print_verification(verification: Verification, json: bool) -> int:
    code = 4 if verification.failures else 0
    if json:
        print_json(verification.as_dict())
        for check in verification.failures:
            say_error(f"r2n: {verification.file}: {check.name}: {check.describe()}")
        return code
    rows = [(check.name, check.status, check.describe()) for check in verification.checks]
    title = f"{verification.file}\nSHA-256 {verification.sha256}"
    if verification.tensors_sha256 is not None:
        title += f"\ncontent hash (tensors only) {verification.tensors_sha256}"
    colours = {"failed": "red", "warning": "yellow"}
    print_table(title, ("check", "result", "found"), rows, colours=colours)
    if verification.failures:
        names = ", ".join(check.name for check in verification.failures)
        say_error(f"r2n: {verification.file}: failed: {names}")
    return code


def _print_comparison(comparison: TensorComparison, json: bool) -> int:
    from r2ncli.weights.structure import by_block

    if json:
        print_json(comparison.as_dict())
        return 0 if comparison.ok else 4
    counts = [("equal, bit by bit", str(comparison.equal), "")]
    if comparison.different:
        names = by_block(tensor.name for tensor in comparison.different)
        counts.append(("different", str(len(comparison.different)), names))
    for path, only in (
        (comparison.file, comparison.only_in_file),
        (comparison.against, comparison.only_in_against),
    ):
        if only:
            counts.append((f"only in {path}", str(len(only)), by_block(only)))
    title = f"{comparison.file}\nagainst {comparison.against}"
    print_table(title, ("tensors", "count", "which"), counts)
    if comparison.different:
        rows = [
            (
                tensor.name,
                "not numeric" if tensor.max_difference is None else f"{tensor.max_difference:.3g}",
                tensor.file,
                tensor.against if tensor.against != tensor.file else "",
            )
            for tensor in comparison.different[:TENSORS_SHOWN]
        ]
        left = len(comparison.different) - len(rows)
        title = "the largest differences" if left else "the differences"
        print_table(title, ("tensor", "max |Δ|", "in FILE", "in --against, if other"), rows)
    if not comparison.ok:
        say_error(f"r2n: {comparison.file}: not the same tensors as {comparison.against}")
    return 0 if comparison.ok else 4


def convert(
    weights: Annotated[
        str,
        typer.Argument(
            metavar="IN", help="Convert this checkpoint: a file, a published name, or demo."
        ),
    ],
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="Write to this .pth, .safetensors, .onnx or .xml (OpenVINO) file."
        ),
    ],
    to: Annotated[
        Literal["official", "timm", "mmpretrain", "torchvision-backbone"],
        typer.Option("--to", help="Name the parameters as this library does."),
    ] = "official",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint for another library, and check that the outputs match."""
    from r2ncli.weights.convert import convert as write

    with Report("convert", quiet) as report:
        done = write(weights, output, to=to, overwrite=overwrite, on_download=report.download)
    if not quiet:
        equal = (
            f"equal to {done.difference:.1g} of the largest" if done.difference else "bit-identical"
        )
        say(f"{done.variant}, {done.naming} names, {done.compared} {equal} -> {done.output}")
