"""The pipeline: decode threads, batches, engine, results in input order.

    names ──► decode threads ──► batches ──► a thread a stream ──► rows, in input order

Everything between is bounded: as many batches are under way as keep the threads and the
engine's streams busy, however many pictures there are.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, cast

import numpy as np
import numpy.typing as npt

from r2ncli.architectures import Preprocessing
from r2ncli.cache import Entry, kept_entry
from r2ncli.checkpoints import (
    Labels,
    checked_sha256,
    find_checkpoint,
    labels_of,
    preprocessing_of,
    read_metadata,
)
from r2ncli.containers import container
from r2ncli.downloads import OnProgress
from r2ncli.engine import (
    BACKENDS,
    POOLS,
    Engine,
    Pixels,
    cores,
    cpu_model,
    find_backend,
    pooled_shape,
)
from r2ncli.errors import (
    DeviceError,
    FailedInputError,
    ImageError,
    InputNotFoundError,
    UsageError,
)
from r2ncli.images import MAX_PIXELS, DecodeRules, decode
from r2ncli.selection import MAX_BYTES, SUFFIXES, Selection
from r2ncli.sources import Input, PathLike, Walk

if TYPE_CHECKING:
    from r2ncli.weights import Checkpoint

Array = npt.NDArray[np.float32]
T = TypeVar("T")

LOGITS = "fc"  # the module whose output the logits are
DECODES = ("auto", "exact")
MAX_WORKERS = 256
FETCHERS = 16  # threads that wait for networks, far more than cores
ON_ERROR = ("continue", "fail")


@dataclass(frozen=True)
class Prediction:
    """One of a picture's k most probable classes; `wnid` and `label` where they are known."""

    index: int
    wnid: str | None
    label: str | None
    probability: float


@dataclass(frozen=True)
class Classification:
    """One picture's most probable classes, or why there are none (`error`)."""

    path: str
    predictions: tuple[Prediction, ...]
    error: str | None = None


@dataclass(frozen=True)
class Features:
    """One picture's features by layer, float32 [C] or [C, H, W], or why there are none."""

    path: str
    features: dict[str, Array]
    error: str | None = None


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


class ExecutionOptions(TypedDict, total=False):
    """Keywords that say how a network is executed; see `open_pipeline`."""

    device: str
    backend: str
    precision: str
    batch_size: int | None
    workers: int | None
    decode: str
    image_size: int | None
    no_crop: bool
    max_pixels: int
    max_bytes: int


class PipelineOptions(ExecutionOptions, total=False):
    """Keywords that say which network is executed, and how; see `open_pipeline`."""

    weights: str | os.PathLike[str] | None
    on_download: OnProgress | None


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
class Pipeline:
    """A network at work: what turns inputs into rows, and what it is made of."""

    engine: Engine
    preprocessing: Preprocessing
    rules: DecodeRules
    workers: int
    checkpoint: Path
    sha256: str
    variant: str
    classes: int
    labels: Labels | None
    pool: str
    shapes: dict[str, tuple[int, ...]]  # of one picture's outputs, by layer


@dataclass(frozen=True)
class Row:
    """One input's outputs by layer, or the reason why there are none."""

    name: str
    outputs: dict[str, Array]
    error: str | None = None


def open_pipeline(
    layers: Sequence[str],
    pool: str = "avg",
    *,
    weights: str | os.PathLike[str] | None = None,
    on_download: OnProgress | None = None,
    on_warning: Callable[[str], None] | None = None,
    **options: Unpack[ExecutionOptions],
) -> Pipeline:
    """Load the weights and get a device ready.

    With the backend ``openvino`` the compiled network is kept in the cache: the next time
    neither torch nor the checkpoint's tensors are loaded.

    Parameters
    ----------
    layers : sequence of str
        Modules of the network whose outputs are wanted.
    pool : str
        ``avg`` or ``max`` over height and width, or ``none``.
    weights : str, path or None
        A checkpoint file, a published network's name, or ``demo`` (see `find_checkpoint`).
    on_download : callable, optional
        Called with a `DownloadProgress` while weights are downloaded.
    on_warning : callable, optional
        Takes a sentence if the cache cannot be written.
    **options
        As for `assemble_pipeline`.

    Raises
    ------
    UsageError, CheckpointError, DeviceError
        An option, the weights or the device do not fit.
    """
    # what can be said before a large file is loaded, or even downloaded, is said before
    check_options(pool, **options)
    device, precision = options.get("device", "auto"), options.get("precision", "auto")
    if find_backend(options.get("backend", "auto"), device) == "torch":
        from r2ncli.engine import pytorch
        from r2ncli.weights import load_checkpoint

        pytorch.find_precision(precision, pytorch.find_device(device))
        checkpoint = load_checkpoint(weights, on_progress=on_download)
        return assemble_pipeline(checkpoint, layers, pool, **options)

    from r2ncli.engine import openvino

    layers = _distinct(layers)
    precision = openvino.find_precision(precision)
    batch_size = options.get("batch_size") or openvino.BATCH_SIZE
    path = find_checkpoint(weights, on_progress=on_download)
    container(path)
    sha256, metadata = checked_sha256(path), read_metadata(path)
    preprocessing = _preprocessing(preprocessing_of(metadata, path), options)
    settings = {
        "library": openvino.library(),
        "processor": cpu_model(),
        "sha256": sha256,
        "metadata": metadata,
        "layers": layers,
        "pool": pool,
        "preprocessing": asdict(preprocessing),
        "precision": precision,
        "batch_size": batch_size,
    }

    def compile_checkpoint() -> Entry:
        from r2ncli.weights import load_file

        loaded = load_file(path, sha256)
        facts = {
            "variant": loaded.variant,
            "classes": loaded.network.architecture.classes,
            "shapes": _shapes(loaded, layers, pool, preprocessing),
        }
        graph = _graph(loaded, layers, pool, preprocessing, precision, batch_size)
        return Entry(facts, graph)

    entry = kept_entry(settings, compile_checkpoint, on_warning or _ignore)
    return Pipeline(
        engine=openvino.OpenVinoEngine(entry.graph, layers, precision),
        preprocessing=preprocessing,
        rules=_rules(options),
        workers=_workers(options),
        checkpoint=path,
        sha256=sha256,
        variant=entry.facts["variant"],
        classes=entry.facts["classes"],
        labels=labels_of(metadata, entry.facts["classes"], path),
        pool=pool,
        shapes={layer: tuple(shape) for layer, shape in entry.facts["shapes"].items()},
    )


def assemble_pipeline(
    checkpoint: Checkpoint,
    layers: Sequence[str],
    pool: str = "avg",
    **options: Unpack[ExecutionOptions],
) -> Pipeline:
    """Get a device ready for a loaded checkpoint.

    Parameters
    ----------
    checkpoint : Checkpoint
        A loaded one.
    layers, pool
        As for `open_pipeline`.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    backend : str
        ``torch``, ``openvino`` (for the CPU), or ``auto``: on a CPU openvino where it is
        installed, else torch.
    precision : str
        ``auto`` (the fastest that keeps top-1), ``fp32``, ``bf16`` or ``fp16``.
    batch_size : int or None
        Pictures a batch; None means what suits the device.
    workers : int or None
        Decode threads; None means one a core.
    decode : str
        ``exact``: every pixel decoded at full size; ``auto``: JPEGs of more than twice the
        resize target reduced while they are decoded, within a grey level in the mean.
    image_size : int or None
        The network's input in pixels; the resize target keeps the checkpoint's ratio.
    no_crop : bool
        Stretch the whole picture to the input instead of cropping its centre.
    max_pixels, max_bytes : int
        A picture, or a file, beyond it is a failed row.

    Raises
    ------
    UsageError, DeviceError
        An option or the device does not fit.
    """
    check_options(pool, **options)
    device, precision = options.get("device", "auto"), options.get("precision", "auto")
    batch_size = options.get("batch_size")
    layers = _distinct(layers)
    preprocessing = _preprocessing(checkpoint.preprocessing, options)
    shapes = _shapes(checkpoint, layers, pool, preprocessing)
    engine: Engine
    if find_backend(options.get("backend", "auto"), device) == "torch":
        from r2ncli.engine.pytorch import TorchEngine

        engine = TorchEngine(
            checkpoint.network,
            layers,
            pool,
            preprocessing,
            device=device,
            precision=precision,
            batch_size=batch_size,
        )
    else:
        from r2ncli.engine import openvino

        precision = openvino.find_precision(precision)
        size = batch_size or openvino.BATCH_SIZE
        graph = _graph(checkpoint, layers, pool, preprocessing, precision, size)
        engine = openvino.OpenVinoEngine(graph, layers, precision)
    return Pipeline(
        engine=engine,
        preprocessing=preprocessing,
        rules=_rules(options),
        workers=_workers(options),
        checkpoint=checkpoint.path,
        sha256=checkpoint.sha256,
        variant=checkpoint.variant,
        classes=checkpoint.network.architecture.classes,
        labels=checkpoint.labels,
        pool=pool,
        shapes=shapes,
    )


def _distinct(layers: Sequence[str]) -> tuple[str, ...]:
    layers = tuple(dict.fromkeys([layers] if isinstance(layers, str) else layers))
    if not layers:
        raise UsageError("no layer given. r2n extract --list-layers prints all of them")
    return layers


def _preprocessing(checkpoints: Preprocessing, options: ExecutionOptions) -> Preprocessing:
    return checkpoints.resized(options.get("image_size"), options.get("no_crop", False))


def _shapes(
    checkpoint: Checkpoint, layers: Sequence[str], pool: str, preprocessing: Preprocessing
) -> dict[str, tuple[int, ...]]:
    """Shapes of one picture's outputs, by layer."""
    from r2ncli.model import layer_shapes

    shapes = layer_shapes(checkpoint.network.architecture, preprocessing.image_size)
    for layer in layers:
        if layer not in shapes:
            raise UsageError(_no_such_layer(layer, list(shapes)))
    return {layer: pooled_shape(shapes[layer], pool) for layer in layers}


def _graph(
    checkpoint: Checkpoint,
    layers: Sequence[str],
    pool: str,
    preprocessing: Preprocessing,
    precision: str,
    batch_size: int,
) -> npt.NDArray[np.uint8]:
    from r2ncli.engine.graph import to_graph
    from r2ncli.engine.openvino import compiled

    graph = to_graph(checkpoint.network, layers, pool, preprocessing, batch_size)
    return compiled(graph, precision)


def _rules(options: ExecutionOptions) -> DecodeRules:
    return DecodeRules(
        options.get("decode", "auto"),
        options.get("max_pixels", MAX_PIXELS),
        options.get("max_bytes", MAX_BYTES),
    )


def _workers(options: ExecutionOptions) -> int:
    return min(options.get("workers") or cores(), MAX_WORKERS)


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
    rows = walked_rows(walk, pipeline, on_progress, sources.get("on_error", "continue"))
    return (classification(row, topk, pipeline.labels) for row in rows)


def open_classifier(
    topk: int,
    on_warning: Callable[[str], None] | None = None,
    **options: Unpack[PipelineOptions],
) -> Pipeline:
    """The pipeline that gives logits, after a look at `topk` (see `open_pipeline`)."""
    if topk < 1:
        raise UsageError(f"topk must be at least 1, not {topk}")
    return open_pipeline((LOGITS,), on_warning=on_warning, **options)


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
    pipeline = open_pipeline(layers, pool, on_warning=on_warning, **execution)
    rows = walked_rows(walk, pipeline, on_progress, sources.get("on_error", "continue"))
    return (Features(row.name, row.outputs, row.error) for row in rows)


def split_options(options: RunOptions) -> tuple[SourceOptions, PipelineOptions]:
    """Those for `open_walk`, and those for `open_pipeline`."""
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
        shard=None if shard is None else _shard(shard),
        null=null,
        timeout=timeout,
        max_bytes=max_bytes,
    )
    return Walk(as_sequence(paths), on_warning or _ignore, selection)


def _patterns(given: Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,8})/([1-9]\d{0,8})", text)
    if match is None or int(match[1]) > int(match[2]):
        raise UsageError(f"shard {text!r}: expected I/N with I from 1 to N, such as 2/8")
    return int(match[1]), int(match[2])


def walked_rows(
    walk: Walk,
    pipeline: Pipeline,
    on_progress: Callable[[Progress], None] | None,
    on_error: str = "continue",
) -> Iterator[Row]:
    """A row for every input of `walk`, which is started and ended here.

    Raises
    ------
    InputNotFoundError
        The walk ends without a single input.
    FailedInputError
        `on_error` is ``fail`` and an input failed.
    """
    done = failed = 0
    with walk:
        for row in run(walk, pipeline):
            if row.error is not None and on_error == "fail":
                raise failed_input(row.name, row.error)
            yield row
            done += 1
            failed += row.error is not None
            if on_progress:
                on_progress(Progress(row.name, row.error, done, failed, walk.found, walk.ended))
    if not walk.any_found:
        raise no_image_found()


def failed_input(name: str, error: str) -> FailedInputError:
    """The error of a row that ends a run."""
    return FailedInputError(f"{name}: {error} (--on-error fail)")


def no_image_found() -> InputNotFoundError:
    """The error of a walk without inputs."""
    suffixes = " ".join(sorted(suffix[1:] for suffix in SUFFIXES))
    return InputNotFoundError(f"no image found (looked for files ending in {suffixes})")


def run(inputs: Iterable[Input], pipeline: Pipeline) -> Iterator[Row]:
    """A row for every input, in order, as soon as it is there.

    A picture that fails keeps its place and its reason; its neighbours do not notice.
    """
    engine, workers = pipeline.engine, pipeline.workers
    batch_size = engine.description.batch_size
    streams = engine.description.streams
    ahead = 1 + streams + -(-2 * workers // batch_size)  # batches under way: all threads busy
    side = pipeline.preprocessing.image_size
    buffers: list[Pixels] = []
    pending: deque[Future[list[Row]]] = deque()
    stopped = threading.Event()

    def read_and_decode(source: Input, pixels: Pixels) -> str | None:
        if stopped.is_set():
            return "interrupted"
        try:
            content = source.read(pipeline.rules.max_bytes)
            pixels[...] = decode(content, pipeline.preprocessing, pipeline.rules)
        except ImageError as error:
            pixels[...] = 0
            return str(error)
        return None

    def outcome(decoded: Future[str | None]) -> str | None:
        while not stopped.is_set():
            with suppress(TimeoutError):
                return decoded.result(0.2)
        return "interrupted"

    def finish(names: list[str], pixels: Pixels, decodes: list[Future[str | None]]) -> list[Row]:
        errors = [outcome(decoded) for decoded in decodes]
        if stopped.is_set():
            return []
        pixels[len(names) :] = 0
        outputs = engine(pixels)
        buffers.append(pixels)
        return [
            Row(name, {} if error else {layer: a[i] for layer, a in outputs.items()}, error)
            for i, (name, error) in enumerate(zip(names, errors, strict=True))
        ]

    decoders = _Threads(workers, "r2n-decode")
    fetchers = _Threads(FETCHERS, "r2n-fetch")
    runner = ThreadPoolExecutor(streams, "r2n-engine")
    try:
        remaining = iter(inputs)
        ended = False
        while not ended:
            pixels = buffers.pop() if buffers else _empty_batch(batch_size, side)
            names: list[str] = []
            decodes: list[Future[str | None]] = []
            # each is read as it comes: a source may hold back the next until this one is used
            for source in islice(remaining, batch_size):
                pool = fetchers if source.remote else decoders
                decodes.append(pool.submit(read_and_decode, source, pixels[len(names)]))
                names.append(source.name)
                del source
            ended = len(names) < batch_size
            if names:
                pending.append(runner.submit(finish, names, pixels, decodes))
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


class _Threads:
    """At most so many threads, for which nobody waits at the end of the program.

    It waits for an executor's, and a dead server or network drive may hold them for long.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._count = 0
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._work = queue.SimpleQueue()

    def submit(self, action: Callable[..., T], *arguments: Any) -> Future[T]:
        future: Future[T] = Future()
        self._work.put((future, partial(action, *arguments)))
        if self._count < self._most:
            self._count += 1
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        return future

    def end(self) -> None:
        """Let every thread end once there is no more work."""
        for _ in range(self._count):
            self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            future, action = work
            try:
                future.set_result(action())
            except BaseException as error:  # raised where the result is used
                future.set_exception(error)
            del work, action, future  # what an input holds is free as soon as it was used


def _empty_batch(batch_size: int, side: int) -> Pixels:
    try:
        return np.empty((batch_size, side, side, 3), dtype=np.uint8)
    except MemoryError as error:
        raise DeviceError(
            f"not enough memory for batches of {batch_size}. Try a smaller --batch-size"
        ) from error


def classification(row: Row, topk: int, labels: Labels | None) -> Classification:
    """A row's logits as its `topk` most probable classes (ties: the lower index first)."""
    if row.error is not None:
        return Classification(row.name, (), row.error)
    logits = row.outputs[LOGITS].astype(np.float64)
    exponentials = np.exp(logits - logits.max())
    probabilities = (exponentials / exponentials.sum()).astype(np.float32)
    best = np.argsort(-logits, kind="stable")[:topk]
    return Classification(
        row.name,
        tuple(
            Prediction(
                index=int(index),
                wnid=labels.wnids[index] if labels and labels.wnids else None,
                label=labels.labels[index] if labels else None,
                probability=float(probabilities[index]),
            )
            for index in best
        ),
    )


def as_sequence(paths: Sequence[PathLike] | PathLike) -> Sequence[PathLike]:
    """`paths` as a sequence: one path is a sequence of one."""
    return [paths] if isinstance(paths, str | os.PathLike) else paths


def check_options(pool: str = "avg", **options: Unpack[ExecutionOptions]) -> None:
    """Raise a UsageError for a value that cannot be, whatever the device and the weights are."""
    for name, value, choices in (
        ("pool", pool, POOLS),
        ("backend", options.get("backend", "auto"), BACKENDS),
        ("decode", options.get("decode", "auto"), DECODES),
    ):
        if value not in choices:
            raise UsageError(f"{name} {value!r}: expected one of {', '.join(choices)}")
    for name, number in (
        ("batch size", options.get("batch_size")),
        ("workers", options.get("workers")),
        ("max pixels", options.get("max_pixels")),
        ("max bytes", options.get("max_bytes")),
    ):
        if number is not None and number < 1:
            raise UsageError(f"{name} must be at least 1, not {number}")
    size = options.get("image_size")
    if size is not None and not 32 <= size <= 4096:
        raise UsageError(f"image size must be from 32 to 4096, not {size}")


def _no_such_layer(layer: str, layers: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(layer, layers, n=3, cutoff=0.4)
    hint = f"Did you mean {', '.join(near)}? " if near else ""
    return f"no layer {layer!r}. {hint}r2n extract --list-layers prints all of them"


def _ignore(_warning: str) -> None: ...
