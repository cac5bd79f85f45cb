"""Commands that read finished outputs: diff and merge."""

from __future__ import annotations

from typing import Annotated

import typer

from r2ncli.cli.options import Json, Overwrite, Quiet
from r2ncli.cli.terminal import Report, plain_lines, print_json, print_table, put, say


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Compare this output with B.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Compare A with this output.")],
    atol: Annotated[
        float,
        typer.Option("--atol", help="Count values that differ by no more than this as equal."),
    ] = 0.0,
    json: Json = False,
) -> int:
    """Compare two outputs row by row; exit with 8 if they differ."""
    from r2ncli.outputs.diff import diff as compare
    from r2ncli.outputs.reading import shortened

    found = compare(a, b, atol=atol)
    if json:
        print_json(found.as_dict())
        return 8 if found.different else 0
    title = f"{a} and {b}: {found.compared:,} row{'s' * (found.compared != 1)} compared"
    changes = [
        (words, f"{names.count:,}", ", ".join(names.examples))
        for words, names in (
            ("only in A", found.only_in_a),
            ("only in B", found.only_in_b),
            ("failed in one", found.status_changed),
            ("another top-1", found.top1_changed),
            (f"values beyond {atol:g}" if atol else "other values", found.beyond_atol),
        )
        if names is not None and names.count
    ]
    if changes:
        print_table(title, ("", "rows", "such as"), changes)
    else:
        put(plain_lines(f"{title}, equal") + "\n")
    largest = [
        (name, f"{one.difference:.3g}", one.path)
        for name, one in found.largest.items()
        if one.path is not None
    ]
    if largest:
        print_table("largest differences", ("of", "max |Δ|", "in"), largest)
    if found.settings:
        rows = [(key, shortened(was), shortened(now)) for key, (was, now) in found.settings.items()]
        print_table("settings that differ", ("", "A", "B"), rows)
    return 8 if found.different else 0


def merge(
    shards: Annotated[
        list[str],
        typer.Argument(
            metavar="SHARDS", help="Join the outputs of --shard 1/N to N/N, in any order."
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Write to this file, with the suffix of the shards.",
        ),
    ],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> int:
    """Join the outputs of all shards of a run into one file."""
    from r2ncli.outputs.merge import merge as join

    with Report("merge", quiet) as report:
        counts = join(
            shards,
            output,
            overwrite=overwrite,
            on_progress=report.rows,
            on_warning=report.sentence,
        )["counts"]
    if not quiet:
        failed = f" ({counts['failed']:,} failed)" if counts["failed"] else ""
        say(f"{counts['inputs']:,} images{failed} of {len(shards)} shards -> {output}")
    return 0
