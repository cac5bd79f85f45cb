"""Inputs become rows: decode threads, batches, engine, results in input order.

    names ──► decode threads ──► batches ──► a thread a stream ──► rows, in input order

With `--decode gpu` the decode threads hand on the JPEGs that a card decodes as they are, and
the stream's thread has them decoded into its batch.

Everything between is bounded: as many batches are under way as keep the threads and the
engine's streams busy, however many pictures there are.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypedDict, Unpack, cast

import numpy as np
import numpy.typing as npt

from r2ncli.engine import (
    Pixels,
)
from r2ncli.errors import (
    FailedInputError,
    ImageError,
    UsageError,
)
from r2ncli.images.decode import decode
from r2ncli.images.jpeg import Jpeg
from r2ncli.outputs.rows import Classification, Features, Prediction
from r2ncli.predictor import (
    LOGITS,
    Pipeline,
    PipelineOptions,
    open_classifier,
    open_extractor,
)
from r2ncli.sources.selection import MAX_BYTES, Selection, no_image_found, parse_shard
from r2ncli.sources.walk import Input, PathLike, Walk, as_sequence
from r2ncli.weights.checkpoints import (
    Labels,
)

Array = npt.NDArray[np.float32]
Outputs = Mapping[str, npt.NDArray[Any]]  # of a batch or of a picture, by name
Outcome = Jpeg | str | None  # of a picture: for the card, why it failed, or decoded

FETCHERS = 16  # threads that wait for networks, far more than cores
ON_ERROR = ("continue", "fail")
INDICES, PROBABILITIES = "indices", "probabilities"  # what `top_classes` keeps


@dataclass(frozen=True)
class Progress:
    """How far a run is after the row of `path`, which failed if it has an `error`.

    `found` is the total of inputs once `walk_ended`, and before that at least the total.
    """

    path: str
    error: str | None
    done: int
    failed: int
    found: int
    walk_ended: bool


class SourceOptions(TypedDict, total=False):
    """Keywords that say which inputs are taken; see `open_walk`."""

    include: Sequence[str]
    exclude: Sequence[str]
    max: int | None
    shard: str | None
    null: bool
    timeout: float
    on_error: str
    max_bytes: int


class RunOptions(PipelineOptions, SourceOptions, total=False):
    """Keywords that `classify`, `extract` and their `_to` forms share."""


@dataclass(frozen=True)
class Row:
    """One input's outputs by layer, or the reason why there are none."""

    name: str
    outputs: dict[str, npt.NDArray[Any]]
    error: str | None = None


def _all(outputs: Outputs) -> Outputs:
    return outputs


def classify(
    paths: Sequence[PathLike] | PathLike = (),
    *,
    topk: int = 5,
    on_warning: Callable[[str], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **options: Unpack[RunOptions],
) -> Iterator[Classification]:
    """The `topk` most probable classes of every picture among `paths`, in input order.

    Parameters
    ----------
    paths : path or sequence of paths
        Pictures, folders, archives, patterns, ``@list``, ``-``, addresses; none means the
        current folder.
    topk : int
        Classes a picture; at most the network's number of them.
    on_warning, on_progress : callable, optional
        Take a sentence, and a `Progress` after each picture.
    **options
        As for `open_walk` and `open_pipeline`.

    Yields
    ------
    Classification
        A picture that cannot be used is one with its `error`.

    Raises
    ------
    R2NError
        At the call: an option, the weights, the device or a path does not fit.
    """
    sources, execution = split_options(options)
    walk = open_walk(paths, on_warning, **sources)
    pipeline = open_classifier(topk, on_warning, **execution)
    rows = walked_rows(
        walk, pipeline, on_progress, sources.get("on_error", "continue"), top_classes(topk)
    )
    return (classification(row, pipeline.labels) for row in rows)


def extract(
    paths: Sequence[PathLike] | PathLike = (),
    *,
    layers: Sequence[str] = ("layer4",),
    pool: str = "avg",
    on_warning: Callable[[str], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    **options: Unpack[RunOptions],
) -> Iterator[Features]:
    """The features of `layers` for every picture among `paths`, in input order.

    Parameters
    ----------
    paths : path or sequence of paths
        Pictures, folders, archives, patterns, ``@list``, ``-``, addresses; none means the
        current folder.
    layers : sequence of str
        Names of modules, as ``r2n extract --list-layers`` prints them.
    pool : str
        ``avg`` or ``max`` over height and width, or ``none`` for whole feature maps.
    on_warning, on_progress : callable, optional
        Take a sentence, and a `Progress` after each picture.
    **options
        As for `open_walk` and `open_pipeline`.

    Yields
    ------
    Features
        A picture that cannot be used is one with its `error`.

    Raises
    ------
    R2NError
        At the call: an option, the weights, the device or a path does not fit.
    """
    sources, execution = split_options(options)
    walk = open_walk(paths, on_warning, **sources)
    pipeline = open_extractor(layers, pool, on_warning, **execution)
    rows = walked_rows(walk, pipeline, on_progress, sources.get("on_error", "continue"))
    return (Features(row.name, row.outputs, row.error) for row in rows)


def split_options(options: RunOptions) -> tuple[SourceOptions, PipelineOptions]:
    """Those for `open_walk`, and those for `open_pipeline`."""
    known = {**SourceOptions.__annotations__, **PipelineOptions.__annotations__}
    for name in options.keys() - known:
        raise TypeError(f"unexpected keyword argument {name!r}")
    sources, execution = (
        {name: value for name, value in options.items() if name in kind.__annotations__}
        for kind in (SourceOptions, PipelineOptions)
    )
    return cast(SourceOptions, sources), cast(PipelineOptions, execution)


def open_walk(
    paths: Sequence[PathLike] | PathLike,
    on_warning: Callable[[str], None] | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max: int | None = None,
    shard: str | None = None,
    null: bool = False,
    timeout: float = 60.0,
    on_error: str = "continue",
    max_bytes: int = MAX_BYTES,
) -> Walk:
    """The inputs among `paths`, not begun yet.

    Parameters
    ----------
    paths : path or sequence of paths
        Pictures, folders, archives (.tar, .tar.gz, .zip), patterns, ``@list``, ``-``,
        addresses; none means the current folder.
    on_warning : callable, optional
        Takes a sentence about what is left out.
    include, exclude : sequence of str
        Patterns of names that are taken, or left out (see `Selection`).
    max : int or None
        Take that many inputs, the first ones.
    shard : str or None
        ``I/N``: the share I (from 1) of N by the names' hash, so that N runs cover all once.
    null : bool
        Names in lists and on standard input end with a NUL byte.
    timeout : float
        Seconds that one remote picture may take.
    on_error : str
        ``continue``: a picture that cannot be used is a failed row; ``fail``: it ends the run.
    max_bytes : int
        As for `assemble_pipeline`.

    Raises
    ------
    InputNotFoundError, UsageError
        One of `paths` does not exist; an option does not fit.
    """
    if on_error not in ON_ERROR:
        raise UsageError(f"on error {on_error!r}: expected one of {', '.join(ON_ERROR)}")
    if max is not None and max < 1:
        raise UsageError(f"max must be at least 1, not {max}")
    if not 0 < timeout < 86400:  # false for NaN
        raise UsageError(f"timeout must be more than 0 s and less than a day, not {timeout:g}")
    selection = Selection(
        include=_patterns(include),
        exclude=_patterns(exclude),
        max=max,
        shard=None if shard is None else parse_shard(shard),
        null=null,
        timeout=timeout,
        max_bytes=max_bytes,
    )
    return Walk(as_sequence(paths), on_warning or _ignore, selection)


def _patterns(given: Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def walked_rows(
    walk: Walk,
    pipeline: Pipeline,
    on_progress: Callable[[Progress], None] | None,
    on_error: str = "continue",
    keep: Callable[[Outputs], Outputs] = _all,
) -> Iterator[Row]:
    """A row for every input of `walk`, which is started and ended here. `keep` is as for `run`.

    Raises
    ------
    InputNotFoundError
        The walk ends without a single input.
    FailedInputError
        `on_error` is ``fail`` and an input failed.
    """
    done = failed = 0
    with walk:
        for row in run(walk, pipeline, keep):
            if row.error is not None and on_error == "fail":
                raise failed_input(row.name, row.error)
            yield row
            done += 1
            failed += row.error is not None
            if on_progress:
                on_progress(Progress(row.name, row.error, done, failed, walk.found, walk.ended))
    if not walk.any_found:
        raise no_image_found(walk.left_out)


def failed_input(name: str, error: str) -> FailedInputError:
    """The error of a row that ends a run."""
    return FailedInputError(f"{name}: {error} (--on-error fail)")


def run(
    inputs: Iterable[Input], pipeline: Pipeline, keep: Callable[[Outputs], Outputs] = _all
) -> Iterator[Row]:
    """A row for every input, in order, as soon as it is there.

    A picture that fails keeps its place and its reason; its neighbours do not notice. `keep`
    gives what is wanted of a batch's outputs; it works in the engine's threads.
    """
    engine, workers, card_decoder = pipeline.engine, pipeline.workers, pipeline.card_decoder
    batch_size = engine.description.batch_size
    streams = engine.description.streams
    ahead = 1 + streams + -(-2 * workers // batch_size)  # batches under way: all threads busy
    side = pipeline.preprocessing.image_size
    buffers: list[Pixels] = []
    pending: deque[Future[list[Row]]] = deque()
    stopped = threading.Event()

    def read_and_decode(source: Input, pixels: Pixels) -> Outcome:
        if stopped.is_set():
            return "interrupted"
        try:
            content = source.read(pipeline.rules.max_bytes).content
        except ImageError as error:
            return failed(error, pixels)
        if card_decoder is not None and (jpeg := card_decoder.accept(content)) is not None:
            return jpeg
        return decode_into(pixels, content)

    def decide(batch: _Batch, number: int, source: Input) -> None:
        try:
            outcome: Outcome | BaseException = read_and_decode(source, batch.pixels[number])
        except BaseException as error:  # raised where the batch is used
            outcome = error
        batch.decide(number, outcome)

    def decode_into(pixels: Pixels, content: bytes) -> str | None:
        try:
            pixels[...] = decode(content, pipeline.preprocessing, pipeline.rules)
        except ImageError as error:
            return failed(error, pixels)
        return None

    def failed(error: ImageError, pixels: Pixels) -> str:
        pixels[...] = 0
        return str(error)

    def decode_on_card(outcomes: list[Outcome], pixels: Pixels) -> list[str | None]:
        jpegs = {i: found for i, found in enumerate(outcomes) if isinstance(found, Jpeg)}
        errors = [None if isinstance(found, Jpeg) else found for found in outcomes]
        if card_decoder is not None and jpegs:
            for i in card_decoder(jpegs, pixels):
                errors[i] = decode_into(pixels[i], jpegs[i].content)
        return errors

    def finish(batch: _Batch) -> list[Row]:
        while not batch.ready.wait(0.2):
            if stopped.is_set():
                return []
        errors = decode_on_card(batch.outcomes(), batch.pixels)
        if stopped.is_set():
            return []
        batch.pixels[len(batch.names) :] = 0
        outputs = keep(engine(batch.pixels))
        buffers.append(batch.pixels)
        return [
            Row(name, {} if error else {layer: a[i] for layer, a in outputs.items()}, error)
            for i, (name, error) in enumerate(zip(batch.names, errors, strict=True))
        ]

    decoders = _Threads(workers, "r2n-decode")
    fetchers = _Threads(FETCHERS, "r2n-fetch")
    runner = ThreadPoolExecutor(streams, "r2n-engine")
    try:
        remaining = iter(inputs)
        ended = False
        while not ended:
            batch = _Batch(buffers.pop() if buffers else engine.empty_batch(side))
            # each is read as it comes: a source may hold back the next until this one is used
            for source in islice(remaining, batch_size):
                pool = fetchers if source.remote else decoders
                pool.submit(partial(decide, batch, batch.add(source.name), source))
                del source
            ended = len(batch.names) < batch_size
            if batch.close():
                pending.append(runner.submit(finish, batch))
            while pending and (ended or len(pending) >= ahead or pending[0].done()):
                yield from pending.popleft().result()
    except BaseException:
        stopped.set()
        # nobody who interrupts waits for a batch, or for a server
        runner.shutdown(wait=False, cancel_futures=True)
        raise
    else:
        runner.shutdown()
    finally:
        decoders.end()
        fetchers.end()


class _Batch:
    """Pictures on their way to the engine: a row of pixels each, and what became of it.

    One object a batch, not one a picture: a card takes more pictures a second than Python makes
    futures for them.

    Attributes
    ----------
    names : list of str
        In the order in which they were added.
    pixels : uint8 array [batch_size, H, W, 3]
    ready : Event
        Set when it is closed and every picture has its outcome.
    """

    def __init__(self, pixels: Pixels) -> None:
        self.names: list[str] = []
        self.pixels = pixels
        self.ready = threading.Event()
        self._outcomes: list[Outcome | BaseException] = []
        self._done: list[int] = []  # to append is atomic, so no picture waits for a lock
        self._closed = False

    def add(self, name: str) -> int:
        """Take one more picture in; its number."""
        self.names.append(name)
        self._outcomes.append(None)
        return len(self.names) - 1

    def close(self) -> bool:
        """Say that there is no more to add; whether there is anything at all."""
        self._closed = True
        self._look()
        return bool(self.names)

    def decide(self, number: int, outcome: Outcome | BaseException) -> None:
        self._outcomes[number] = outcome
        self._done.append(number)
        self._look()

    def outcomes(self) -> list[Outcome]:
        """What became of the pictures; raises what is no fault of theirs."""
        for outcome in self._outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return cast(list[Outcome], self._outcomes)

    def _look(self) -> None:
        if self._closed and len(self._done) == len(self.names):
            self.ready.set()


class _Threads:
    """At most so many threads, for which nobody waits at the end of the program.

    It waits for an executor's, and a dead server or network drive may hold them for long.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._count = 0
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(self, action: Callable[[], None]) -> None:
        """Have an action done, which raises nothing."""
        self._work.put(action)
        if self._count < self._most:
            self._count += 1
            threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def end(self) -> None:
        """Let every thread end once there is no more work."""
        for _ in range(self._count):
            self._work.put(None)

    def _run(self) -> None:
        while (action := self._work.get()) is not None:
            action()
            del action  # what an input holds is free as soon as it was used


def top_classes(topk: int) -> Callable[[Outputs], Outputs]:
    """What `run` is to keep for `classification`: the `topk` most probable classes of a batch.

    A thousand logits a picture become ten numbers where the engine's threads work side by side,
    not where the rows are written one after the other.
    """

    def top(outputs: Outputs) -> Outputs:
        logits = outputs[LOGITS].astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        best = _best(logits, min(topk, logits.shape[1]))
        chosen = np.take_along_axis(probabilities, best, axis=1)
        return {INDICES: best, PROBABILITIES: chosen.astype(np.float32)}

    return top


def _best(logits: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.intp]:
    """Indices [N, k] of each row's highest logits, highest first (ties: the lower index first)."""
    some = np.sort(np.argpartition(-logits, k - 1, axis=1)[:, :k], axis=1)
    values = np.take_along_axis(logits, some, axis=1)
    best = np.take_along_axis(some, np.argsort(-values, axis=1, kind="stable"), axis=1)
    # where more than k are as high as the k-th, which of them were found is an accident
    tied = (logits >= values.min(axis=1, keepdims=True)).sum(axis=1) != k
    best[tied] = np.argsort(-logits[tied], axis=1, kind="stable")[:, :k]
    return best


def classification(row: Row, labels: Labels | None) -> Classification:
    """A row of what `top_classes` keeps, with its labels."""
    if row.error is not None:
        return Classification(row.name, (), row.error)
    best = zip(row.outputs[INDICES].tolist(), row.outputs[PROBABILITIES].tolist(), strict=True)
    return Classification(
        row.name,
        tuple(
            Prediction(
                index=index,
                wnid=labels.wnids[index] if labels and labels.wnids else None,
                label=labels.labels[index] if labels else None,
                probability=probability,
            )
            for index, probability in best
        ),
    )


def _ignore(_warning: str) -> None: ...
