"""Find the inputs of an argument, or of an entry of a list."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain

from r2ncli.errors import ImageError, InputNotFoundError, R2NError, UsageError, escaped
from r2ncli.files import reason
from r2ncli.sources import archives, lists, patterns, remote
from r2ncli.sources.archives import Budget, is_archive
from r2ncli.sources.content import Input, Read, fail, file_input, stamped, with_stamp
from r2ncli.sources.names import printable, without_dot_slash
from r2ncli.sources.patterns import Folders, Warn, device_and_inode, has_pattern
from r2ncli.sources.remote import is_url
from r2ncli.sources.selection import LeftOut, Selection, is_tried, is_visible
from r2ncli.web import Client, is_file, is_web, local_path, without_secrets

MOST_REMEMBERED = 1000  # warnings that are not repeated
MOST_FOLDERS = 100  # around a remote file: a server can invent folders without end


@dataclass(frozen=True, slots=True)
class Naming:
    """How outputs name local paths: as they are, or as a URL of file or a ``~`` means them.

    What the user typed stands for `path` or, of a pattern, `typed` for its beginning `path`.
    """

    typed: str = ""
    path: str = ""
    is_url: bool = False

    def of(self, path: str) -> str:
        """Return the name of a path that was typed, or that a pattern matches."""
        if not self.typed:
            return without_dot_slash(path)
        return self.typed + self.below(path.removeprefix(self.path))

    def below(self, name: str) -> str:
        """Return the name of a path below one that was typed, from there."""
        return name.replace("%", "%25") if self.is_url else name


class Search:
    """Finds the inputs of arguments and of the entries of lists."""

    def __init__(self, warn: Warn, selection: Selection, budget: Budget, left_out: LeftOut) -> None:
        self.warn = lru_cache(MOST_REMEMBERED)(warn)  # a pattern finds a link in several ways
        self.selection = selection
        self.budget = budget
        self.left_out = left_out
        # one for each run; connects when it is first used
        self.client = Client(selection.user_agent)

    def of_argument(self, argument: str) -> Iterator[Input]:
        """Return the inputs of an argument; check now that it exists, and read it later.

        Raises
        ------
        InputNotFoundError
            It does not exist.
        """
        if argument == "-":
            return self._of_list(argument, lists.standard_input())
        if _may_exist(argument):
            return self._of_path(argument, Naming())
        if argument.startswith("@"):
            return self._of_list(argument, lists.list_file(argument[1:]))
        if is_url(argument) and not is_file(argument):
            return self._of_url(argument)
        path, naming = _local(argument)
        if path != argument and _may_exist(path):
            return self._of_path(path, naming)
        is_pattern = has_pattern(path)
        matches = patterns.matching_paths(path, self.warn) if is_pattern else iter(())
        first = next(matches, None)
        if first is not None:
            of_match = partial(self._of_path, naming=naming, matched=True)
            return chain.from_iterable(map(of_match, chain([first], matches)))
        broken = " (a broken link)" if os.path.islink(path) else ""
        raise _missing(printable(argument) or "''", is_pattern, broken)

    def _of_list(self, argument: str, open_list: lists.OpenList) -> Iterator[Input]:
        empty = True
        for entry in lists.names_in_list(open_list, self.selection.null, self.budget.stop):
            empty = False
            if is_url(entry) and not is_file(entry):
                yield from self._of_remote_entry(entry)
            else:
                yield from self._of_local_entry(entry)
        if empty:
            self.left_out.add_empty_list(printable(argument))

    def _of_local_entry(self, entry: str) -> Iterator[Input]:
        """Return the inputs of a path in a list, or of a URL of file."""
        if not entry:
            return iter([_failed("", "an empty name")])
        try:
            path, naming = _local(entry)
        except UsageError as error:
            return iter([_unusable(entry, error)])
        if is_tried(path):  # without `stat`, which would double the time
            return self._file(path, naming)
        if os.path.isdir(path) and _is_root(path):
            why = "the root folder: a list does not search a whole machine; name folders below it"
            return iter([_failed(printable(entry), why)])
        return self._of_path(path, naming)

    def _of_path(self, path: str, naming: Naming, matched: bool = False) -> Iterator[Input]:
        """Return a path's inputs; `matched` also skips links to folders above the path."""
        if os.path.isdir(path):
            return self._walk(path, naming, _folders_above(path if matched else ""))
        if is_archive(path) and os.path.exists(path):
            return self._archive(path, naming)
        return self._file(path, naming)

    def _file(self, path: str, naming: Naming) -> Iterator[Input]:
        name = printable(naming.of(path))
        if self.left_out.takes(name):
            yield file_input(path, name)

    def _of_url(self, url: str) -> Iterator[Input]:
        remote.checked_scheme(url)
        seconds = self.selection.timeout
        kind = remote.remote_kind(url, seconds)
        if kind == "folder":
            return self._remote_walk(url)
        if kind == "file":
            return self._remote_file(url)
        matches = remote.match_remote(url, seconds) if has_pattern(url) else []
        if matches:
            return chain.from_iterable(map(self._of_remote_entry, matches))
        raise _missing(without_secrets(url), has_pattern(url))

    def _of_remote_entry(self, url: str) -> Iterator[Input]:
        """Return the inputs of a URL in a list, or of one that a pattern matches."""
        name = without_secrets(url)
        try:
            remote.checked_scheme(url)
            if is_web(url) or is_tried(name) or is_archive(name):  # without a request, as above
                return self._remote_file(url)
            return self._of_url(url)
        except (InputNotFoundError, UsageError) as error:
            return iter([_unusable(url, error)])

    # --- folders -----------------------------------------------------------------------

    def _walk(self, path: str, naming: Naming, above: Folders) -> Iterator[Input]:
        name = naming.of(path)
        folders = [(path, "" if name == "." else name, (*above, device_and_inode(path)))]
        while folders:
            path, name, above = folders.pop()
            try:
                entries = patterns.listed(path)
            except OSError as error:
                why = f"the folder cannot be listed: {reason(error)}"
                yield _failed(printable(name or "."), why)
                continue
            below: list[tuple[str, str, Folders]] = []
            for entry in entries:
                if not is_visible(entry.name):
                    continue
                entry_name = os.path.join(name, naming.below(entry.name))
                if not patterns.is_folder(entry):
                    if self._takes_file(entry.name, printed := printable(entry_name)):
                        yield file_input(entry.path, printed)
                elif self.selection.excludes(printable(entry_name)):
                    self.left_out.takes(printable(entry_name))  # counts it
                elif (identity := device_and_inode(entry.path)) and identity in above:
                    self.warn(patterns.link_back(entry_name))
                else:
                    below.append((entry.path, entry_name, (*above, identity)))
            folders.extend(reversed(below))

    def _takes_file(self, file: str, name: str) -> bool:
        """Return whether a file below a folder, which outputs call `name`, is an input."""
        if is_tried(file):
            return self.left_out.takes(name)
        if is_archive(file):
            self.left_out.add_archive(name)
        else:
            self.left_out.add_file(file)
        return False

    # --- archives ------------------------------------------------------------------------

    def _archive(self, path: str, naming: Naming) -> Iterator[Input]:
        name = printable(naming.of(path))
        found = archives.members(
            path, partial(self._takes_member, name), self.selection.max_bytes, self.budget
        )
        return self._members(name, found, False, path)

    def _takes_member(self, archive: str, member: str) -> bool:
        if not all(part in (".", "..") or is_visible(part) for part in re.split(r"[/\\]", member)):
            return False
        if not is_tried(member):
            self.left_out.add_file(member)
            return False
        return self.left_out.takes(f"{archive}!{printable(member)}")

    def _members(
        self, archive: str, found: Iterator[tuple[str, Read]], remote: bool, path: str | None
    ) -> Iterator[Input]:
        try:
            for member, read in found:
                yield Input(f"{archive}!{printable(member)}", read, remote, path, alone=True)
                del read  # frees what it holds as soon as it was used
        except ImageError as error:
            yield _failed(archive, str(error))

    # --- URLs ----------------------------------------------------------------------------

    def _remote_file(self, url: str) -> Iterator[Input]:
        name = printable(without_secrets(url))
        compared = name.partition("?")[0] if is_web(url) else name  # with suffixes and patterns
        if is_archive(compared):
            is_tar = compared.lower().endswith(archives.TAR_SUFFIXES)
            found = self._remote_members(url, compared, is_tar)
            yield from self._members(name, found, not is_tar, None)
        elif self.left_out.takes(compared):
            read = partial(remote.read_url, url, self.client, self.selection.timeout)
            yield Input(name, partial(stamped, read, None), remote=True)

    def _remote_walk(self, url: str) -> Iterator[Input]:
        folders = [url]
        while folders:
            folder = folders.pop()
            try:
                if folder.count("/") > MOST_FOLDERS:
                    raise ImageError(f"it is in more than {MOST_FOLDERS} folders")
                files, below = remote.list_folder(folder, self.selection.timeout)
            except ImageError as error:
                why = f"the folder cannot be listed: {error}"
                yield _failed(printable(without_secrets(folder)), why)
                continue
            for file in files:
                if is_tried(file):
                    yield from self._remote_file(file)
                else:
                    self._takes_file(file.rpartition("/")[2], printable(without_secrets(file)))
            excludes = self.selection.excludes
            folders += (one for one in reversed(below) if not excludes(without_secrets(one)))

    def _remote_members(self, url: str, name: str, is_tar: bool) -> Iterator[tuple[str, Read]]:
        if is_web(url) and not is_tar:
            raise ImageError("a zip archive cannot be read over http(s): download it first")
        seconds = self.selection.timeout
        open_again = partial(remote.open_url, url, self.client, seconds)
        wanted = partial(self._takes_member, name)
        with open_again() as stream:
            if is_tar:
                limit = self.selection.max_bytes
                found = archives.tar_stream_members(stream, wanted, limit, self.budget)
            else:
                found = (
                    (member, partial(remote.in_time, seconds, read))
                    for member, read in archives.zip_members(stream, open_again, wanted)
                )
            yield from with_stamp(found, None)


def _local(text: str) -> tuple[str, Naming]:
    """Return the path that a text means: a path, one with ``~``, or a URL of file.

    Raises
    ------
    UsageError
        It is a URL of file that names no file of this machine.
    """
    if is_file(text):
        try:
            path = local_path(text)
        except ValueError as error:
            raise UsageError(f"{without_secrets(text)}: {error}") from error
        if has_pattern(path) and not _may_exist(path):
            begin, host = re.findall(r"^(file:(?://([^/]*))?)", text, re.IGNORECASE)[0]
            return path, Naming(begin, os.path.expanduser(host) if "~" in host else "", True)
        return path, Naming(text, path, True)
    if text.startswith("~") and not os.path.lexists(text):
        begin = text.partition("/")[0]
        home = os.path.expanduser(begin)
        return home + text[len(begin) :], Naming(begin, home)
    return text, Naming()


def _is_root(path: str) -> bool:
    real = os.path.realpath(path)
    return os.path.dirname(real) == real


def _unusable(entry: str, error: R2NError) -> Input:
    """Return the entry of a list that is an error as an argument, without its name in the error."""
    name = without_secrets(entry)
    return _failed(printable(name), str(error).removeprefix(f"{escaped(name)}: "))


def _failed(name: str, why: str) -> Input:
    return Input(name, partial(fail, why))


def _missing(name: str, is_pattern: bool, why: str = "") -> InputNotFoundError:
    nothing = ", and nothing matches it" if is_pattern else why
    return InputNotFoundError(f"no such file or folder: {name}{nothing}")


def _may_exist(path: str) -> bool:
    """Return whether a path exists or may exist: without permission it becomes a failed row."""
    try:
        return os.stat(path) is not None
    except (OSError, ValueError) as error:
        return isinstance(error, PermissionError)


def _folders_above(path: str) -> Folders:
    """Return the root, and the folders on the way to `path`, from the current one if relative."""
    root = device_and_inode(os.path.abspath(os.sep))
    if not path:
        return (root,)
    parts = path.split("/")
    top = "/" if path.startswith("/") else os.curdir
    passed = ("/".join(parts[:count]) or top for count in range(len(parts)))
    return (root, *map(device_and_inode, passed))
