"""One run from arguments to finished OUT: record, lock, blocks, resume.

The command line and Python call the same two functions.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from os import PathLike as OsPathLike
from pathlib import Path
from typing import Any, TypeVar, Unpack

from PIL import features as pillow_features

from r2ncli import __version__
from r2ncli.engine import Engine
from r2ncli.errors import OutputError, UsageError
from r2ncli.outputs.formats import ROW_FORMATS, Format, Hdf5Format, RowFormat
from r2ncli.outputs.partial import PartialOutput, begun_record, checked_output, refuse_existing
from r2ncli.outputs.record import differing_settings, fingerprint, in_words
from r2ncli.outputs.results import read_names, read_record, read_rows
from r2ncli.outputs.rows import Features
from r2ncli.pipeline import (
    Progress,
    RunOptions,
    SourceOptions,
    classification,
    failed_input,
    open_walk,
    run,
    split_options,
    top_classes,
)
from r2ncli.predictor import Pipeline, PipelineOptions, open_classifier, open_extractor
from r2ncli.sources.names import printable
from r2ncli.sources.selection import no_image_found
from r2ncli.sources.walk import Input, PathLike, Walk
from r2ncli.weights.checkpoints import Labels

SCHEMA = 1
DTYPES = ("float32", "float16")
EXECUTED = "executed_batch_size"  # in the record only where memory did not hold a whole batch

OnProgress = Callable[[Progress], None]
Warn = Callable[[str], None]
R = TypeVar("R", bound=RowFormat)


def classify_to(
    output: str | OsPathLike[str],
    paths: Sequence[PathLike] | PathLike = (),
    *,
    topk: int = 5,
    overwrite: bool = False,
    resume: bool = False,
    retry_failed: bool = False,
    on_warning: Warn | None = None,
    on_progress: OnProgress | None = None,
    **options: Unpack[RunOptions],
) -> dict[str, Any]:
    """Classify every picture among `paths` into the file `output`, a row each.

    Parameters
    ----------
    output : path
        Ends in ``.csv``, ``.jsonl`` or ``.parquet``. While the run goes on its finished blocks
        are in ``OUT.partial/``.
    paths : path or sequence of paths
        Pictures, folders, archives, patterns, ``@list``, ``-``, addresses; none means the
        current folder.
    topk : int
        Classes a picture; at most the network's number of them.
    overwrite, resume : bool
        Start again over what is there, or go on with it, with its batch size unless one is given.
    retry_failed : bool
        Try the failed rows of the finished `output` again and keep the others. Limits may have
        been raised since, nothing else that decides values.
    on_warning, on_progress : callable, optional
        Take a sentence, and a `Progress` after each picture.
    **options
        As for `open_walk` and `open_pipeline`.

    Returns
    -------
    dict
        The run record, as in ``OUT.run.json``.

    Raises
    ------
    R2NError
        Before anything is written if an argument does not fit; later if the device or the
        disk fails: finished blocks are kept then.
    """
    out = checked_output(
        output,
        tuple(ROW_FORMATS),
        overwrite=overwrite,
        resume=resume,
        retry_failed=retry_failed,
    )
    sources, execution = split_options(options)
    if resume or retry_failed:
        execution = _with_begun_batch_size(execution, out)
    walk = open_walk(paths, on_warning, **sources)
    pipeline = open_classifier(topk, on_warning, **execution)
    return _run_to(
        out,
        walk,
        pipeline.engine,
        row_format(ROW_FORMATS[out.suffix.lower()], pipeline, topk),
        lambda inputs: (
            classification(row, pipeline.labels) for row in run(inputs, pipeline, top_classes(topk))
        ),
        run_record(
            "classify",
            pipeline,
            sources,
            topk=min(topk, pipeline.classes),
            labels_sha256=_labels_digest(pipeline.labels),
            classes=pipeline.classes,
            packages=("pyarrow",) if out.suffix.lower() == ".parquet" else (),
        ),
        overwrite,
        resume,
        retry_failed,
        sources.get("on_error", "continue"),
        on_progress or _ignore,
    )


def extract_to(
    output: str | OsPathLike[str],
    paths: Sequence[PathLike] | PathLike = (),
    *,
    layers: Sequence[str] = ("layer4",),
    pool: str = "avg",
    dtype: str = "float32",
    overwrite: bool = False,
    resume: bool = False,
    retry_failed: bool = False,
    on_warning: Warn | None = None,
    on_progress: OnProgress | None = None,
    **options: Unpack[RunOptions],
) -> dict[str, Any]:
    """Extract the features of every picture among `paths` into the HDF5 file `output`.

    Parameters
    ----------
    output : path
        Ends in ``.h5``. While the run goes on its finished blocks are in ``OUT.partial/``.
    paths : path or sequence of paths
        Pictures, folders, archives, patterns, ``@list``, ``-``, addresses; none means the
        current folder.
    layers : sequence of str
        Names of modules, as ``r2n extract --list-layers`` prints them.
    pool : str
        ``avg`` or ``max`` over height and width, or ``none`` for whole feature maps.
    dtype : str
        ``float32`` or ``float16``, as stored.
    overwrite, resume : bool
        Start again over what is there, or go on with it, with its batch size unless one is given.
    retry_failed : bool
        Try the failed rows of the finished `output` again and keep the others. Limits may have
        been raised since, nothing else that decides values.
    on_warning, on_progress : callable, optional
        Take a sentence, and a `Progress` after each picture.
    **options
        As for `open_walk` and `open_pipeline`.

    Returns
    -------
    dict
        The run record, as in the file's root attributes.

    Raises
    ------
    R2NError
        Before anything is written if an argument does not fit; later if the device or the
        disk fails: finished blocks are kept then.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    out = checked_output(
        output, (".h5",), overwrite=overwrite, resume=resume, retry_failed=retry_failed
    )
    sources, execution = split_options(options)
    if resume or retry_failed:
        execution = _with_begun_batch_size(execution, out)
    walk = open_walk(paths, on_warning, **sources)
    pipeline = open_extractor(layers, pool, on_warning, **execution)
    return _run_to(
        out,
        walk,
        pipeline.engine,
        Hdf5Format(pipeline.shapes, dtype),
        lambda inputs: (
            Features(row.name, row.outputs, row.error) for row in run(inputs, pipeline)
        ),
        run_record(
            "extract", pipeline, sources, layers=list(pipeline.shapes), pool=pool, dtype=dtype
        ),
        overwrite,
        resume,
        retry_failed,
        sources.get("on_error", "continue"),
        on_progress or _ignore,
    )


def row_format(kind: type[R], pipeline: Pipeline, topk: int) -> R:
    """The columns that a checkpoint's labels allow; k clamped to its classes."""
    labels = pipeline.labels
    return kind(
        min(topk, pipeline.classes),
        with_wnids=labels is not None and labels.wnids is not None,
        with_labels=labels is not None,
    )


# --- the record -----------------------------------------------------------------------


def run_record(
    command: str,
    pipeline: Pipeline,
    sources: SourceOptions,
    packages: Sequence[str] = (),
    **settings: Any,
) -> dict[str, Any]:
    """What is known of a run before it starts, its fingerprint included.

    `packages` are those that write its output, beyond the ones that every run needs.
    """
    description = pipeline.engine.description
    if pipeline.card_decoder is not None:
        packages = (*packages, "torchcodec")
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "versions": {
            "r2n": __version__,
            "engine": description.library,
            "pillow": version("pillow"),
            "libjpeg": pillow_features.version("libjpeg_turbo") or pillow_features.version("jpg"),
            "littlecms2": pillow_features.version("littlecms2"),
            "pillow-heif": _version_if_installed("pillow-heif"),
            "numpy": version("numpy"),
            "h5py": version("h5py"),
            "python": ".".join(map(str, sys.version_info[:3])),
            **{package: version(package) for package in packages},
        },
        "checkpoint": {
            "file": printable(str(pipeline.checkpoint)),
            "sha256": pipeline.sha256,
            "variant": pipeline.variant,
        },
        **settings,
        "inputs": {
            "include": list(sources.get("include", ())),
            "exclude": list(sources.get("exclude", ())),
            "max": sources.get("max"),
        },
        "preprocessing": asdict(pipeline.preprocessing),
        "decode_rules": asdict(pipeline.rules),
        "device": {
            "name": description.device,
            "kind": description.device_kind,
            "model": description.device_model,
        },
        "backend": description.backend,
        "precision": description.precision,
        "batch_size": description.batch_size,
        "threads": pipeline.workers,
        "streams": description.streams,
        "stream_threads": description.stream_threads,
        "shard": sources.get("shard"),
    }
    if pipeline.calibration is not None:
        record["calibration"] = asdict(pipeline.calibration)
    record = json.loads(json.dumps(record))  # tuples as the lists that they are read back as
    record["fingerprint"] = fingerprint(record)
    return record


def _labels_digest(labels: Labels | None) -> str | None:
    """What the label cells depend on, which may stand beside the checkpoint, not in it."""
    if labels is None:
        return None
    return hashlib.sha256(json.dumps([labels.labels, labels.wnids]).encode()).hexdigest()


def _version_if_installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- the run ----------------------------------------------------------------------------


def _run_to(
    out: Path,
    walk: Walk,
    engine: Engine,
    format: Format,
    results_of: Callable[[Iterator[Input]], Iterator[Any]],
    record: dict[str, Any],
    overwrite: bool,
    resume: bool,
    retry_failed: bool,
    on_error: str,
    on_progress: OnProgress,
) -> dict[str, Any]:
    again = "go on with --retry-failed" if retry_failed else "go on with --resume"
    with PartialOutput(out, format, again) as partial, walk:
        inputs = iter(walk)
        if not overwrite and not resume and not retry_failed:
            refuse_existing(out, began=bool(partial.blocks()))  # now that no one else can write
        done = failed = 0
        begun = partial.record() if resume or retry_failed else None
        if retry_failed:
            finished = read_record(out)
            _check_resumable(finished, record, out, retry_failed)
            if begun is None and finished.get("counts", {}).get("failed") == 0:
                return finished
        if begun is not None:
            _check_resumable(begun, record, partial.folder)
            record["start"] = begun["start"]
            _keep_halving(record, begun)
            done, failed = _skip_done(partial, inputs)
        elif resume and out.exists():
            _check_resumable(read_record(out), record, out)
            deque(_failed_inputs(out, inputs), maxlen=0)  # only compares the names
            return read_record(out)
        else:
            record["start"] = _now()
            inputs = _begun(inputs, walk)
            if retry_failed:
                _keep_halving(record, finished)
            partial.begin(record)
        if retry_failed:
            tried = results_of(_failed_inputs(out, inputs, done))
            results = _with_failed_replaced(out, done, tried)
        else:
            results = results_of(inputs)
        try:
            for result in results:
                if result.error is not None and on_error == "fail":
                    raise failed_input(result.path, result.error)
                if _note_halving(record, engine):
                    partial.amend(record)  # before a row that it concerns
                partial.append(result)
                done += 1
                failed += result.error is not None
                on_progress(
                    Progress(result.path, result.error, done, failed, walk.found, walk.ended)
                )
        except OutputError:
            raise
        except BaseException:  # Ctrl-C, a failed device: keep what is there
            partial.flush()
            raise
        record["counts"] = {"inputs": done, "ok": done - failed, "failed": failed}
        record["end"] = _now()
        partial.finish(record)
    return record


def _note_halving(record: dict[str, Any], engine: Engine) -> bool:
    """Note that the device computes less than a batch at a time; whether that is news."""
    executed = engine.description.executed_batch_size
    if executed is None or executed >= record.get(EXECUTED, record["batch_size"]):
        return False
    record[EXECUTED] = executed
    return True


def _keep_halving(record: dict[str, Any], begun: dict[str, Any]) -> None:
    """What was noted of rows that are kept holds still."""
    if EXECUTED in begun:
        record[EXECUTED] = begun[EXECUTED]


def _with_begun_batch_size(execution: PipelineOptions, out: Path) -> PipelineOptions:
    """`execution`, which names no batch size, with the one that `out` was begun with.

    It decides the values' last bits, and what suits a device is not what every version thinks.
    """
    begun = begun_record(out) or read_record(out)
    batch_size = begun.get("batch_size")
    if execution.get("batch_size") is not None or not isinstance(batch_size, int) or batch_size < 1:
        return execution
    return {**execution, "batch_size": batch_size}


def _begun(inputs: Iterator[Input], walk: Walk) -> Iterator[Input]:
    """`inputs`, after making sure that there is one: nothing is begun for nothing.

    A shard may be empty, so that every one of N is there to be merged.
    """
    first = next(inputs, None)
    if first is None and not walk.any_found:
        raise no_image_found(walk.left_out)

    def onwards(found: Input | None) -> Iterator[Input]:
        while found is not None:
            yield found
            found = None  # it may hold its bytes, and an archive the next until these are free
            found = next(inputs, None)

    return onwards(first)


def _check_resumable(
    begun: dict[str, Any], record: dict[str, Any], where: Path, retry_failed: bool = False
) -> None:
    """Raise unless both records decide the same rows; the error names what differs."""
    same_shard = begun.get("shard") == record["shard"]
    if begun.get("fingerprint") == record["fingerprint"] and same_shard:
        return
    if "fingerprint" not in begun:
        raise OutputError(
            f"{where}: cannot be resumed: it has no run record of r2n. --overwrite starts again"
        )
    differing = differing_settings(begun, record)
    if not same_shard:
        differing["shard"] = begun.get("shard"), record["shard"]
    if retry_failed:
        differing = {
            key: (then, now)
            for key, (then, now) in differing.items()
            if not _keeps_ok_rows(key, then, now)
        }
    if differing:
        raise OutputError(
            f"{where}: cannot be resumed: {in_words(differing)}. "
            "Give the same settings, or --overwrite to start again"
        )


def _keeps_ok_rows(key: str, then: Any, now: Any) -> bool:
    """Whether a changed setting can change failed rows only.

    A picture within a limit is within a higher one, and a picture that could be decoded did
    not need the decoder that was not there. (LittleCMS decodes none: it changes colours.)
    """
    if key in ("decode_rules max_pixels", "decode_rules max_bytes"):
        return isinstance(then, int) and isinstance(now, int) and now > then
    return key in ("versions libjpeg", "versions pillow-heif") and then is None


def _with_failed_replaced(out: Path, done: int, tried: Iterator[Any]) -> Iterator[Any]:
    """The rows of a finished output from row `done` on, the failed ones taken from `tried`.

    `tried` compares names while it reads the same output by itself, so that no more rows wait
    in memory than the pipeline has under way, however far apart the failed ones are.
    """
    for row in islice(read_rows(out), done, None):
        yield row if row.error is None else next(tried)
    for _ in tried:  # none: this walks to the end, where a new input would be found
        raise AssertionError("more rows were tried again than had failed")


def _skip_done(partial: PartialOutput, inputs: Iterator[Input]) -> tuple[int, int]:
    """Walk past the finished rows, comparing each name; how many there are, and how many failed."""
    failed = 0
    for done_name, was_failed in partial.names():
        found = next(inputs, None)
        if found is None or found.name != done_name:
            raise OutputError(_differing_name(partial.folder, done_name, found))
        del found  # it may hold its bytes, and an archive the next until these are free
        partial.done += 1
        failed += was_failed
    return partial.done, failed


def _failed_inputs(out: Path, inputs: Iterator[Input], first: int = 0) -> Iterator[Input]:
    """The inputs whose rows failed, from row `first` of a finished output on, after a look at
    every name up to the last."""
    for name, failed in islice(read_names(out), first, None):
        found = next(inputs, None)
        if found is None or found.name != name:
            raise OutputError(_differing_name(out, name, found))
        if failed:
            yield found
        del found  # it may hold its bytes, and an archive the next until these are free
    if (found := next(inputs, None)) is not None:
        raise OutputError(_differing_name(out, None, found))


def _differing_name(where: Path, done_name: str | None, found: Input | None) -> str:
    return (
        f"{where}: cannot be resumed, the inputs changed: it has "
        f"{done_name if done_name is not None else 'no more rows'}, "
        f"here is {found.name if found is not None else 'no more input'}. "
        "--overwrite starts again"
    )


def _ignore(_: object) -> None: ...
