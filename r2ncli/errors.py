"""The errors a user can meet, one exit code each.

R2NError
├── UsageError            2   an option, or a combination of them, that cannot be
├── InputNotFoundError    3   an argument that does not exist, or no image found
├── CheckpointError       4   weights absent, altered or unfit
├── DeviceError           5   a device that is not there or fails
├── OutputError           6   an output that exists, is locked, full or does not fit
└── FailedInputError      7   a picture failed, and was to end the run

A picture that cannot be read is not in this tree: it is a row that says why.
Anything that is no R2NError is a bug (exit 1, with its traceback).
"""

from __future__ import annotations


class R2NError(Exception):
    """Base of every expected error; `exit_code` is what the command line ends with."""

    exit_code = 1


class UsageError(R2NError):
    """An option's value, or a combination of options, that cannot be."""

    exit_code = 2


class InputNotFoundError(R2NError):
    """An argument that does not exist, or arguments without any image below them."""

    exit_code = 3


class CheckpointError(R2NError):
    """Weights that are absent, altered, or do not fit a Res2Net."""

    exit_code = 4


class DeviceError(R2NError):
    """A device that is not there, or that failed while it was used."""

    exit_code = 5


class OutputError(R2NError):
    """An output that exists, cannot be written, is locked, or cannot be resumed."""

    exit_code = 6


class FailedInputError(R2NError):
    """A picture that cannot be used, in a run that was to end at the first."""

    exit_code = 7


class ImageError(Exception):
    """Why one picture cannot be used. It never reaches the user as an error: it becomes
    the `error` of the picture's row."""
