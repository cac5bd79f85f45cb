"""Select inputs by suffix, pattern, number and shard, and count what is left out."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import starmap

from r2ncli import __version__
from r2ncli.errors import InputNotFoundError, UsageError
from r2ncli.images.decoders import MAX_BYTES as MAX_BYTES
from r2ncli.images.decoders import SUFFIXES as SUFFIXES
from r2ncli.sources.names import printable

TIMEOUT = 60.0
USER_AGENT = f"r2n/{__version__} (image classification with Res2Net)"
MOST_SUFFIXES = 1000  # how many different suffixes are counted separately
MOST_LISTED = 30  # suffixes in the sentence at the end of a run
MOST_NAMED = 5  # how many of them, or of empty lists, an error names
OTHERS = "others"  # all further suffixes
LONGEST_SUFFIX = 20  # characters; longer ones are counted together
# folders of NAS systems, trash and file systems, in lower case
SYSTEM_FOLDERS = {
    *("__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
    *("$recycle.bin", "lost+found", "system volume information"),
}
RAW_SUFFIXES = {  # what cameras write that is not decoded yet: the values of their sensors
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".gpr", ".iiq"),
    *(".kdc", ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2"),
    *(".rwl", ".sr2", ".srf", ".srw", ".x3f"),
}


@dataclass(frozen=True)
class Selection:
    """Which inputs are taken, and the limits for reading them.

    Patterns have ``*``, ``?`` and ``[…]``, and are case-sensitive. One with a slash is compared
    with the whole name, one without with its last part; `exclude` also leaves out whole folders.
    """

    include: tuple[str, ...] = ()  # empty: everything
    exclude: tuple[str, ...] = ()
    max: int | None = None  # stop after this many inputs
    shard: tuple[int, int] | None = None  # i (from 1) of n, by the hash of the names
    null: bool = False  # names in lists end with a NUL byte instead of a line end
    timeout: float = TIMEOUT  # seconds that reading one remote image may take
    max_bytes: int = MAX_BYTES  # larger files become failed rows
    user_agent: str = USER_AGENT  # what servers are told

    def left_out_by(self, name: str) -> str | None:
        """Return which option leaves out an image of this name: ``include``, ``exclude``, None."""
        if self.excludes(name):
            return "exclude"
        if not self.include:
            return None
        last = _BORDER.split(name)[-1]
        compared = ((name if "/" in pattern else last, pattern) for pattern in self.include)
        return None if any(starmap(fnmatchcase, compared)) else "include"

    def excludes(self, name: str) -> bool:
        """Return whether `exclude` leaves out an image or a folder, or a folder above it."""
        if not self.exclude:
            return False
        parts = _BORDER.split(name)
        beginnings = [*(name[: border.start()] for border in _BORDER.finditer(name)), name]
        return any(
            fnmatchcase(candidate, pattern)
            for pattern in (pattern.rstrip("/") for pattern in self.exclude)
            for candidate in (beginnings if "/" in pattern else parts)
        )


class LeftOut:
    """Counts what a search leaves out, so that "no image found" can say why."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.options: Counter[str] = Counter()  # names, by ``include`` and ``exclude``
        self.suffixes: Counter[str] = Counter()  # files, by a suffix that is not tried
        self.archives = 0  # below folders, where they are not searched
        self.first_archive = ""
        self.empty_lists: list[str] = []  # at most `MOST_NAMED`

    def takes(self, name: str) -> bool:
        """Return whether the patterns let this name through; count it if they do not."""
        option = self.selection.left_out_by(name)
        if option is not None:
            self.options[option] += 1
        return option is None

    def add_file(self, name: str) -> None:
        """Count a file whose suffix is not tried."""
        suffix = printable(os.path.splitext(name)[1].lower())
        is_new = suffix not in self.suffixes
        if len(suffix) > LONGEST_SUFFIX or (is_new and len(self.suffixes) >= MOST_SUFFIXES):
            suffix = OTHERS
        self.suffixes[suffix] += 1

    def add_archive(self, name: str) -> None:
        """Count an archive below a folder."""
        self.first_archive = self.first_archive or name
        self.archives += 1

    def add_empty_list(self, argument: str) -> None:
        """Note a list without a name."""
        if len(self.empty_lists) < MOST_NAMED:
            self.empty_lists.append(argument)

    def sentence(self) -> str:
        """Return the sentence for the end of a run about what was left out; empty if nothing."""
        if not self.suffixes:
            return ""
        named = [f"{count:,} {_named(suffix)}" for suffix, count in sorted(self.suffixes.items())]
        if len(named) > MOST_LISTED:
            more = sum(count for _, count in sorted(self.suffixes.items())[MOST_LISTED:])
            named[MOST_LISTED:] = [f"{more:,} more"]
        total = _counted(sum(self.suffixes.values()), "file")
        return f"left out {total}: {', '.join(named)}{self.advice()}"

    def advice(self) -> str:
        """Return what to do about files of a RAW format; empty if there are none."""
        raw = sorted(RAW_SUFFIXES.intersection(self.suffixes))
        if not raw:
            return ""
        return (
            f"; RAW images ({', '.join(raw)}) are not decoded: convert them, or extract the JPEG "
            "preview that each holds, for example with exiftool -b -JpgFromRaw"
        )


def _named(suffix: str) -> str:
    return suffix or "without a suffix"


def no_image_found(left_out: LeftOut) -> InputNotFoundError:
    """Return the error of a search that found no input, with its causes."""
    causes = []
    for option, count in sorted(left_out.options.items()):
        patterns = ", ".join(getattr(left_out.selection, option))
        causes.append(f"`{option}` ({patterns}) left out {_counted(count, 'name')}")
    for argument in left_out.empty_lists:
        where = "on standard input (-)" if argument == "-" else argument
        causes.append(f"the list {where} is empty")
    if left_out.archives:
        found = f"{_counted(left_out.archives, 'archive')}, such as {left_out.first_archive}"
        causes.append(
            f"archives inside a folder are not searched ({found}): name an archive to read it"
        )
    suffixes = " ".join(sorted(suffix[1:] for suffix in SUFFIXES))
    looked_for = "" if causes else f" (looked for files ending in {suffixes})"
    if left_out.suffixes:
        by_count = sorted(left_out.suffixes.items(), key=lambda pair: (-pair[1], pair[0]))
        named = [f"{count:,} {_named(suffix)}" for suffix, count in by_count]
        if more := sum(count for _, count in by_count[MOST_NAMED:]):
            named[MOST_NAMED:] = [f"{more:,} more"]
        causes.append(f"files with other suffixes: {', '.join(named)}")
    why = f"{': ' * bool(causes)}{'; '.join(causes)}{left_out.advice()}"
    return InputNotFoundError(f"no image found{looked_for}{why}")


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def parse_shard(text: str) -> tuple[int, int]:
    """Read a shard ``I/N``.

    Raises
    ------
    UsageError
        It is not of this form, or I is not from 1 to N.
    """
    match = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", text)
    if match is None or int(match[1]) > int(match[2]):
        raise UsageError(f"`shard` must be I/N with I from 1 to N, such as 2/8, not {text!r}")
    return int(match[1]), int(match[2])


def in_shard(name: str, shard: tuple[int, int]) -> bool:
    """Return whether an input belongs to shard i of n: by its name's blake2b hash modulo n."""
    index, count = shard
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count == index - 1


def is_visible(name: str) -> bool:
    """Return whether a file or folder below an argument is visited.

    Hidden ones are not, nor the folders of NAS systems, trash and file systems.
    """
    return not name.startswith(".") and name.lower() not in SYSTEM_FOLDERS


def is_tried(name: str) -> bool:
    """Return whether a name has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


# between the folders, archive and last part of a name
_BORDER = re.compile(
    r"/|(?:(?<=\.tar|\.tgz|\.txz|\.zip)|(?<=\.tbz2)|(?<=\.tar\.gz|\.tar\.xz)|(?<=\.tar\.bz2))!",
    re.IGNORECASE,
)
