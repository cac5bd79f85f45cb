"""The options that commands share: each name, help text and shown default once.

The defaults themselves are the library's: an option that was not given is None, and is not
handed on.
"""

from __future__ import annotations

from typing import Annotated

import typer

INPUTS, PICTURES, NETWORK, OUTPUT = "Inputs", "Pictures", "Network", "Output"

Paths = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PATHS",
        help="Pictures, folders, .tar, .tar.gz and .zip archives, 'patterns*', @list, - (names on "
        "standard input), addresses.",
        show_default="the current folder",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FILE|NAME|demo",
        help="A checkpoint file, a published name, or demo (ten CIFAR-10 classes, for trying "
        "the tool).",
        show_default="$R2N_WEIGHTS, else res2net50_v1b_26w_4s",
        rich_help_panel=NETWORK,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="auto, cpu, cuda (all cards of the first one's model) or cuda:N.",
        show_default="auto",
        rich_help_panel=NETWORK,
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help="auto, torch or openvino (CPU).",
        show_default="auto",
        rich_help_panel=NETWORK,
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="auto (the fastest that keeps top-1), fp32, bf16, fp16, or int8 (classify).",
        show_default="auto",
        rich_help_panel=NETWORK,
    ),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="PATHS",
        help="Pictures that int8 is calibrated with, as PATHS may be; repeatable; 300 are taken.",
        rich_help_panel=NETWORK,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "-b",
        "--batch-size",
        help="Pictures a batch.",
        show_default="what suits the device",
        rich_help_panel=NETWORK,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "-j",
        "--workers",
        help="Decode threads.",
        show_default="one a core",
        rich_help_panel=NETWORK,
    ),
]
Decode = Annotated[
    str | None,
    typer.Option(
        "--decode",
        help="auto, exact, or gpu (baseline JPEGs on the CUDA card; needs the extra gpu-decode).",
        show_default="auto",
        rich_help_panel=PICTURES,
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        "--image-size",
        help="The network's input, in pixels.",
        show_default="as trained",
        rich_help_panel=PICTURES,
    ),
]
NoCrop = Annotated[
    bool,
    typer.Option(
        "--no-crop",
        help="Stretch the whole picture instead of cropping its centre.",
        rich_help_panel=PICTURES,
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        "--max-pixels",
        help="A picture of more is a failed row.",
        show_default="200 million",
        rich_help_panel=PICTURES,
    ),
]
MaxBytes = Annotated[
    int | None,
    typer.Option(
        "--max-bytes",
        help="A file of more is a failed row.",
        show_default="512 MB",
        rich_help_panel=PICTURES,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        help="Take only names that match; repeatable.",
        rich_help_panel=INPUTS,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="PATTERN",
        help="Leave out pictures and folders; repeatable.",
        rich_help_panel=INPUTS,
    ),
]
Max = Annotated[
    int | None,
    typer.Option("--max", help="Take the first so many pictures.", rich_help_panel=INPUTS),
]
Shard = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Take the share I of N; N jobs cover all exactly once.",
        rich_help_panel=INPUTS,
    ),
]
Null = Annotated[
    bool,
    typer.Option(
        "-0",
        "--null",
        help="Names in lists and on stdin end with a NUL byte.",
        rich_help_panel=INPUTS,
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        help="Seconds for one remote picture.",
        show_default="60",
        rich_help_panel=INPUTS,
    ),
]
OnError = Annotated[
    str | None,
    typer.Option(
        "--on-error",
        help="continue, or fail: end at the first failure.",
        show_default="continue",
        rich_help_panel=INPUTS,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Start again over an output that exists.", rich_help_panel=OUTPUT
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on with an output that was interrupted.", rich_help_panel=OUTPUT
    ),
]
RetryFailed = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        help="Try the failed rows of a finished output again.",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="No progress and no summary; failures still show.")
]
