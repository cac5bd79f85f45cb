"""Find the inputs among what the user typed: streamed, in a stable order.

Within a folder first its files, then its subfolders, depth first, each by the bytes of
its name. No file is `stat`ed while walking.

An argument that exists as a path means that path. Any other is ``-`` (standard input),
``@file`` (a list, one name a line), a URL, or a pattern with ``*``, ``?`` or ``[…]``; ``~`` is
the home folder. An entry of a list is a path or a URL, and never the root folder.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from itertools import chain, islice

from r2ncli.files import PathLike as PathLike
from r2ncli.sources.archives import Budget
from r2ncli.sources.content import Input as Input
from r2ncli.sources.content import file_input as file_input
from r2ncli.sources.patterns import Warn
from r2ncli.sources.search import Search
from r2ncli.sources.selection import LeftOut, Selection, in_shard

NAMES_AHEAD = 100_000  # how many names may wait, so that the total is known early
BYTES_AHEAD = 64_000_000  # of images from compressed archives that may wait


def find_images(
    paths: Sequence[PathLike],
    warn: Warn,
    selection: Selection = Selection(),  # noqa: B008  frozen
    stop: threading.Event | None = None,
    left_out: LeftOut | None = None,
) -> Iterator[Input]:
    """Find every image among `paths`, in the order of the results.

    `warn` takes a sentence about a link back to an ancestor, which is not followed. (The shard
    is applied by `Walk`.) `stop` ends a wait for standard input or for memory; with it, at most
    `BYTES_AHEAD` bytes of compressed archives are held at a time.

    Raises
    ------
    InputNotFoundError
        One of `paths` does not exist; before anything is yielded.
    UsageError
        A URL is not one that is read, or no installed library opens it; before anything is
        yielded.
    """
    arguments = [os.fspath(path) for path in paths]
    budget = Budget(BYTES_AHEAD if stop else float("inf"), stop or threading.Event())
    search = Search(warn, selection, budget, left_out or LeftOut(selection))
    # every argument is checked here: a missing one is an error before anything runs
    begun = [search.of_argument(argument) for argument in arguments]
    return islice(chain.from_iterable(begun), selection.max)


def as_sequence(paths: Sequence[PathLike] | PathLike) -> Sequence[PathLike]:
    """Return `paths` as a sequence: one path gives a sequence of one."""
    return [paths] if isinstance(paths, str | os.PathLike) else paths


class Walk:
    """The inputs among `paths`, found by a separate thread while they are used.

    Iterate once. Leaving the `with` block ends the walk.
    """

    def __init__(
        self,
        paths: Sequence[PathLike],
        warn: Warn,
        selection: Selection = Selection(),  # noqa: B008  frozen
    ) -> None:
        self.found = 0  # inputs of this shard so far; the total once the walk ended
        self.any_found = not paths  # an input of any shard; an empty `paths` is no error
        self.ended = False
        self.left_out = LeftOut(selection)
        self._shard = selection.shard
        self._stop = threading.Event()
        self._inputs = find_images(paths, warn, selection, self._stop, self.left_out)
        self._names: queue.SimpleQueue[Input | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="r2n-walk", daemon=True)

    def __enter__(self) -> Walk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(1.0)  # a dead network drive may block it longer: do not wait

    def __iter__(self) -> Iterator[Input]:
        while (found := self._names.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found
            del found  # frees what it holds as soon as it was used

    def _run(self) -> None:
        try:
            for source in self._inputs:
                self.any_found = True
                if self._shard is None or in_shard(source.name, self._shard):
                    self.found += 1
                    if not self._put(source):
                        return
                del source  # frees what it holds as soon as it was used
            self.ended = True
            self._put(None)
        except BaseException as error:  # raised where the inputs are used
            self._put(error)

    def _put(self, found: Input | BaseException | None) -> bool:
        # a bounded queue takes several times as long for each name as this one
        while self._names.qsize() >= NAMES_AHEAD and not self._stop.wait(0.02):
            pass
        self._names.put(found)
        return not self._stop.is_set()
