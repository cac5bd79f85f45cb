"""The errors a user can meet, one exit code each.

R2NError
├── UsageError            2   an invalid option value or combination of options
├── InputNotFoundError    3   an argument that does not exist, or no image found
├── CheckpointError       4   weights absent, altered or unsuitable
├── DeviceError           5   a device that does not exist or fails
├── OutputError           6   an output that exists, is locked or cannot be written or resumed
└── FailedInputError      7   an image failed in a run with `on_error=fail`

An image that cannot be read is not in this tree: it becomes a row that says why. Any other
exception is a bug (exit code 1, with its traceback).

Messages name options as Python keywords in backticks, `max_bytes` or `resume=True`; the command
line prints them as --max-bytes and --resume. What they quote may come from a hostile file or
server, so that control characters are escaped in every message.
"""

from __future__ import annotations

import re


def escaped(text: str) -> str:
    r"""Return `text` with control characters (C0, DEL, C1) and lone surrogates written as ``\xNN``.

    These are the bytes that the character has in UTF-8. A byte of a file name that is not UTF-8,
    which Python keeps as a surrogate, is that byte.
    """
    return re.sub("[\0-\x1f\x7f-\x9f\ud800-\udfff]", _as_bytes, text)


def _as_bytes(character: re.Match[str]) -> str:
    try:
        encoded = character[0].encode(errors="surrogateescape")
    except UnicodeEncodeError:  # not of a file name: perhaps of JSON
        encoded = character[0].encode(errors="surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in encoded)


class _EscapedError(Exception):
    """An error whose message has no control characters."""

    def __init__(self, message: str = "") -> None:
        super().__init__(escaped(message))


class R2NError(_EscapedError):
    """Base of every expected error; the command line ends with its `exit_code`."""

    exit_code = 1


class UsageError(R2NError):
    """An invalid option value or combination of options."""

    exit_code = 2


class InputNotFoundError(R2NError):
    """An argument that does not exist, or arguments without any image below them."""

    exit_code = 3


class CheckpointError(R2NError):
    """Weights that are absent, altered, or do not fit a Res2Net."""

    exit_code = 4


class DeviceError(R2NError):
    """A device that does not exist, or that failed while it was used."""

    exit_code = 5


class OutputError(R2NError):
    """An output that exists, cannot be written, is locked, or cannot be resumed."""

    exit_code = 6


class FailedInputError(R2NError):
    """An image that cannot be used, in a run that ends at the first one."""

    exit_code = 7


class ImageError(_EscapedError):
    """Why one image cannot be used; it becomes the `error` of the image's row."""
