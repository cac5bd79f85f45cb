"""Turn inputs into results: decode threads, batches, engine, results in input order.

    inputs ──► decode threads ──► batches ──► a thread per stream ──► results, in input order

All queues are bounded: as many batches are under way as keep the threads and the engine's
streams busy, however many images there are.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from r2ncli.engine.base import Outputs, Pixels
from r2ncli.errors import FailedInputError, ImageError
from r2ncli.images.decode import decode
from r2ncli.options import CLASSIFY, EXTRACT, RunOptions
from r2ncli.outputs.formats import Format
from r2ncli.outputs.record import labels_digest
from r2ncli.outputs.rows import (
    CLASSES,
    FEATURES,
    INDEX,
    LABEL,
    PROBABILITY,
    WNID,
    Batch,
    Classification,
    Features,
    classifications,
    features,
)
from r2ncli.predictor import LOGITS, Predictor
from r2ncli.sources.content import Stamp
from r2ncli.sources.walk import Input
from r2ncli.weights.checkpoints import Labels

Columns = Mapping[str, npt.NDArray[Any]]  # of a batch, by name
Outcome = str | None  # of an image: why it failed, or None

MOST_AT_ONCE = 16  # local files that a thread reads and decodes before it takes the next
FETCHERS = 16  # threads that read remote images; far more than cores, because they mostly wait


class Task(Protocol):
    """What a command needs from the network, and which results it keeps.

    Attributes
    ----------
    command : str
        The name of the command.
    content : str
        What the rows of its output hold (see `rows`).
    """

    command: str
    content: str

    def layers(self, options: RunOptions) -> Sequence[str]:
        """Return the names of the network's outputs that are wanted."""

    def keep(self, options: RunOptions, predictor: Predictor) -> Callable[[Outputs], Columns]:
        """Return a function from the outputs of a batch to the columns that are kept.

        The engine's threads call it at the same time.
        """

    def format(self, kind: type[Any], options: RunOptions, predictor: Predictor) -> Format:
        """Return a format of files with the columns, or the layers, of this run."""

    def settings(self, options: RunOptions, predictor: Predictor) -> dict[str, Any]:
        """Return the settings that only this command has in the run record."""

    def records(self, batch: Batch) -> Iterator[Any]:
        """Yield the rows of a batch, one record each."""


class Classify:
    """Ask for the logits and keep the most probable classes (see `Task`)."""

    command = CLASSIFY
    content = CLASSES

    def layers(self, options: RunOptions) -> Sequence[str]:
        return (LOGITS,)

    def keep(self, options: RunOptions, predictor: Predictor) -> Callable[[Outputs], Columns]:
        return top_classes(options.topk, predictor.labels)

    def format(self, kind: type[Any], options: RunOptions, predictor: Predictor) -> Format:
        labels = predictor.labels
        return cast(
            Format,
            kind(
                min(options.topk, predictor.classes),
                with_wnids=labels is not None and labels.wnids is not None,
                with_labels=labels is not None,
            ),
        )

    def settings(self, options: RunOptions, predictor: Predictor) -> dict[str, Any]:
        labels = predictor.labels
        return {
            "topk": min(options.topk, predictor.classes),
            "labels_sha256": None if labels is None else labels_digest(labels),
            "classes": predictor.classes,
        }

    def records(self, batch: Batch) -> Iterator[Classification]:
        return classifications(batch)


class Extract:
    """Ask for layers and keep them (see `Task`)."""

    command = EXTRACT
    content = FEATURES

    def layers(self, options: RunOptions) -> Sequence[str]:
        return options.layers

    def keep(self, options: RunOptions, predictor: Predictor) -> Callable[[Outputs], Columns]:
        return within_float16 if options.dtype == "float16" else lambda outputs: outputs

    def format(self, kind: type[Any], options: RunOptions, predictor: Predictor) -> Format:
        return cast(Format, kind(predictor.shapes, options.dtype))

    def settings(self, options: RunOptions, predictor: Predictor) -> dict[str, Any]:
        return {
            "layers": list(predictor.shapes),
            "pool": options.pool,
            "dtype": options.dtype,
        }

    def records(self, batch: Batch) -> Iterator[Features]:
        return features(batch)


def run(
    inputs: Iterable[Input], predictor: Predictor, keep: Callable[[Outputs], Columns]
) -> Iterator[Batch]:
    """Yield the results of every input in order, each batch as soon as it is ready.

    An image that fails keeps its place and its error, and does not affect the others. `keep`
    makes columns of a batch's outputs; the engine's threads call it.
    """
    engine, workers = predictor.engine, predictor.workers
    batch_size = engine.description.batch_size
    streams = engine.description.streams
    ahead = 1 + streams + -(-2 * workers // batch_size)  # batches under way: all threads busy
    side = predictor.preprocessing.image_size
    buffers: list[Pixels] = []
    pending: deque[Future[Batch | None]] = deque()
    stopped = threading.Event()

    rules, preprocessing = predictor.rules, predictor.preprocessing
    most_at_once = max(1, min(MOST_AT_ONCE, batch_size // (2 * workers)))

    def read_and_decode(batch: _Batch, first: int, sources: list[Input]) -> None:
        outcomes: list[Outcome | BaseException] = []
        stamps: list[Stamp | None] = []
        for number, source in enumerate(sources, first):
            outcome: Outcome | BaseException = None
            stamp = None
            try:
                if stopped.is_set():
                    break
                content, stamp = source.read(rules.max_bytes)
                batch.pixels[number] = decode(content, preprocessing, rules)
            except ImageError as error:
                batch.pixels[number] = 0
                outcome = str(error)
            except BaseException as error:  # raised where the batch is used
                outcome = error
            outcomes.append(outcome)
            stamps.append(stamp)
        batch.decide(first, outcomes, stamps)

    def finish(batch: _Batch) -> Batch | None:
        while not batch.ready.wait(0.2):
            if stopped.is_set():
                return None
        errors = batch.outcomes()
        if stopped.is_set():
            return None
        batch.pixels[len(batch.names) :] = 0
        outputs = engine(batch.pixels)
        buffers.append(batch.pixels)
        columns = kept(outputs, errors, keep)
        count = len(batch.names)
        columns = {name: column[:count] for name, column in columns.items()}
        return Batch(batch.names, errors, columns, batch.stamps)

    decoders = _Threads(workers, "r2n-decode")
    fetchers = _Threads(FETCHERS, "r2n-fetch")
    runner = ThreadPoolExecutor(streams, "r2n-engine")
    try:
        remaining = iter(inputs)
        ended = False
        while not ended:
            batch = _Batch(buffers.pop() if buffers else engine.empty_batch(side))
            some: list[Input] = []  # which one thread reads: Python takes longer for each hand-over
            for source in islice(remaining, batch_size):
                batch.names.append(source.name)
                some.append(source)
                if source.alone or source.remote or len(some) == most_at_once:
                    pool = fetchers if source.remote else decoders
                    first = len(batch.names) - len(some)
                    pool.submit(partial(read_and_decode, batch, first, some))
                    some = []
                del source
            if some:
                first = len(batch.names) - len(some)
                decoders.submit(partial(read_and_decode, batch, first, some))
            del some
            ended = len(batch.names) < batch_size
            if batch.close():
                pending.append(runner.submit(finish, batch))
            while pending and (ended or len(pending) >= ahead or pending[0].done()):
                if (results := pending.popleft().result()) is not None:
                    yield results
    except BaseException:
        stopped.set()
        # after an interrupt, do not wait for a batch or for a server
        runner.shutdown(wait=False, cancel_futures=True)
        raise
    else:
        runner.shutdown()
    finally:
        decoders.end()
        fetchers.end()


def kept(outputs: Outputs, errors: list[Outcome], keep: Callable[[Outputs], Columns]) -> Columns:
    """Return the columns of a batch; write into `errors` which images have no finite values.

    A value can be infinite only in a column: one that is too large for float16.
    """
    finite = _finite_rows(outputs)
    if not finite.all():
        _fail(errors, finite, "the network's output is not finite")
        outputs = {  # as zeros: what makes columns of them need not know NaN
            name: np.where(finite.reshape(-1, *[1] * (output.ndim - 1)), output, np.float32(0))
            for name, output in outputs.items()
        }
    columns = keep(outputs)
    if columns is not outputs:
        fits = _finite_rows({n: c for n, c in columns.items() if c.dtype.kind == "f"})
        _fail(errors, fits, "the network's output is too large for float16")
    return columns


def _finite_rows(arrays: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.bool_]:
    """Return for each row whether it is finite in all arrays [N, ...]."""
    rows = [np.isfinite(array).reshape(len(array), -1).all(axis=1) for array in arrays.values()]
    return cast(npt.NDArray[np.bool_], np.stack(rows).all(axis=0))


def _fail(errors: list[Outcome], sound: npt.NDArray[np.bool_], reason: str) -> None:
    for row in np.flatnonzero(~sound[: len(errors)]):
        errors[row] = errors[row] or reason


def until_failure(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield `batches` up to the first input that failed.

    Raises
    ------
    FailedInputError
        An input failed; the rows before it were given.
    """
    for batch in batches:
        if not batch.failed:
            yield batch
            continue
        first, error = next((i, e) for i, e in enumerate(batch.errors) if e is not None)
        yield batch[:first]
        raise FailedInputError(f"{batch.names[first]}: {error} (`on_error=fail`)")


class _Batch:
    """Images on their way to the engine, each with its row of pixels and its outcome.

    There is one object per batch, not per image: a GPU computes more images per second than
    Python creates futures for them.

    Attributes
    ----------
    names : list of str
        In the order in which they were added.
    stamps : list of Stamp or None
        Of the files that they were read from.
    pixels : uint8 array [batch_size, H, W, 3]
    ready : Event
        Set when it is closed and every image has its outcome.
    """

    def __init__(self, pixels: Pixels) -> None:
        self.names: list[str] = []
        self.stamps: list[Stamp | None] = [None] * len(pixels)
        self.pixels = pixels
        self.ready = threading.Event()
        self._outcomes: list[Outcome | BaseException] = [None] * len(pixels)
        self._done: list[int] = []  # `append` is atomic, so no image waits for a lock
        self._closed = False

    def close(self) -> bool:
        """End adding; return whether there is any image."""
        self._closed = True
        count = len(self.names)
        del self.stamps[count:], self._outcomes[count:]
        self._look()
        return bool(self.names)

    def decide(
        self, first: int, outcomes: list[Outcome | BaseException], stamps: list[Stamp | None]
    ) -> None:
        """Set the outcomes and stamps of the images from number `first` on."""
        self._outcomes[first : first + len(outcomes)] = outcomes
        self.stamps[first : first + len(stamps)] = stamps
        self._done.append(len(outcomes))
        self._look()

    def outcomes(self) -> list[Outcome]:
        """Return the outcome of each image; raise any error that is not about an image."""
        for outcome in self._outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return cast(list[Outcome], self._outcomes)

    def _look(self) -> None:
        if self._closed and sum(self._done) == len(self.names):
            self.ready.set()


class _Threads:
    """A bounded pool of daemon threads.

    The interpreter waits for the threads of an executor when it exits; a server or a network
    drive that does not answer would hold it.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._count = 0
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(self, action: Callable[[], None]) -> None:
        """Run an action, which must not raise, in one of the threads."""
        self._work.put(action)
        if self._count < self._most:
            self._count += 1
            threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def end(self) -> None:
        """End every thread once there is no more work."""
        for _ in range(self._count):
            self._work.put(None)

    def _run(self) -> None:
        while (action := self._work.get()) is not None:
            action()
            del action  # frees what the input holds as soon as it was used


def within_float16(outputs: Outputs) -> Columns:
    """Return the outputs with infinity for values that are too large for float16."""
    return {
        name: np.where(np.abs(output) < 65520, output, np.float32(np.inf))  # rounded, it would be
        for name, output in outputs.items()
    }


def top_classes(topk: int, labels: Labels | None = None) -> Callable[[Outputs], Columns]:
    """Return the function that keeps the `topk` most probable classes of logits, with labels."""
    names = {} if labels is None else {LABEL: np.array(labels.labels, object)}
    if labels is not None and labels.wnids is not None:
        names[WNID] = np.array(labels.wnids, object)

    def top(outputs: Outputs) -> Columns:
        logits = outputs[LOGITS]
        best = _best(logits, min(topk, logits.shape[1]))
        exponentials = logits.astype(np.float64)
        exponentials -= exponentials.max(axis=1, keepdims=True)
        np.exp(exponentials, out=exponentials)
        chosen = np.take_along_axis(exponentials, best, axis=1)
        chosen /= exponentials.sum(axis=1, keepdims=True)
        known = {name: of_classes[best] for name, of_classes in names.items()}
        return {INDEX: best, PROBABILITY: chosen.astype(np.float32), **known}

    return top


def _best(logits: npt.NDArray[np.floating[Any]], k: int) -> npt.NDArray[np.intp]:
    """Return indices [N, k] of each row's highest logits, highest first (ties: lower first)."""
    least = np.partition(logits, -k, axis=1)[:, -k, None]
    among = logits >= least
    exactly = np.count_nonzero(among, axis=1) == k
    some = np.empty((len(logits), k), np.intp)
    some[exactly] = np.nonzero(among[exactly])[1].reshape(-1, k)
    # the other rows have several logits that equal the k-th, which is common in half precision
    some[~exactly] = np.argsort(-logits[~exactly], axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(logits, some, axis=1)
    return np.take_along_axis(some, np.argsort(-values, axis=1, kind="stable"), axis=1)
