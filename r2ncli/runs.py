"""Execute a run, from its options to the finished output.

A task (see `pipeline`) says what the network computes, a plan (see `outputs.plans`) what is
still to compute; the same steps serve output files, streams and Python iterators.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from os import PathLike as OsPathLike
from typing import Any

from r2ncli import __version__
from r2ncli.errors import OutputError
from r2ncli.images.decoders import decoder_versions
from r2ncli.options import Listeners, PathLike, Progress, RunOptions
from r2ncli.outputs.formats import FORMATS
from r2ncli.outputs.partial import PartialOutput, begun_record, checked_output
from r2ncli.outputs.plans import Fresh, Output, choose_plan
from r2ncli.outputs.record import EXECUTED, fingerprint
from r2ncli.outputs.results import read_record
from r2ncli.outputs.rows import Batch
from r2ncli.pipeline import Task, run, until_failure
from r2ncli.predictor import Predictor, open_predictor
from r2ncli.sources.names import printable
from r2ncli.sources.selection import no_image_found
from r2ncli.sources.walk import Input, Walk

SCHEMA = 2
MOST_IMAGES = 4096  # in a batch whose size a run record gives

Paths = Sequence[PathLike] | PathLike | None
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A network that is ready to compute what a task asks for, and the inputs for it."""

    task: Task
    options: RunOptions
    listeners: Listeners
    walk: Walk
    predictor: Predictor

    def inputs(self) -> Iterator[Input]:
        """Yield all inputs; raise an InputNotFoundError at the end if there was none."""
        yield from self.walk
        if not self.walk.any_found:
            raise no_image_found(self.walk.left_out)

    def compute(self, inputs: Iterator[Input]) -> Iterator[Batch]:
        """Yield the results of `inputs` in their order.

        Raises
        ------
        FailedInputError
            An input failed and `options.on_error` is ``fail``.
        """
        results = run(inputs, self.predictor, self.task.keep(self.options, self.predictor))
        return until_failure(results) if self.options.on_error == "fail" else results

    def report(self, batch: Batch, done: int, failed: int) -> None:
        """Report `batch` to the listener; `done` rows came before it, of which `failed` failed."""
        failures = tuple(
            (name, error)
            for name, error in zip(batch.names, batch.errors, strict=True)
            if error is not None
        )
        done, failed = done + len(batch), failed + len(failures)
        self.listeners.on_progress(
            Progress(len(batch), failures, done, failed, self.walk.found, self.walk.ended)
        )

    def report_left_out(self) -> None:
        """Tell the listener, at the end, how many files of which suffixes were left out."""
        if sentence := self.walk.left_out.sentence():
            self.listeners.on_warning(sentence)


def open_run(task: Task, paths: Paths, options: RunOptions, listeners: Listeners) -> Run:
    """Check that every argument exists, load the weights and get the device ready.

    Raises
    ------
    R2NError
        An option, a path, the weights or the device cannot be used.
    """
    walk = Walk(_as_sequence(paths), listeners.on_warning, options.selection())
    predictor = open_predictor(task.layers(options), options, listeners)
    listeners.on_ready()
    return Run(task, options, listeners, walk, predictor)


def records(task: Task, paths: Paths, options: RunOptions, listeners: Listeners) -> Iterator[Any]:
    """Yield the result of every input as a record, in input order.

    Raises
    ------
    R2NError
        At the call: an option, a path, the weights or the device cannot be used.
    """
    opened = open_run(task, paths, options, listeners)

    def computed() -> Iterator[Any]:
        done = failed = 0
        with opened.walk:
            for batch in opened.compute(opened.inputs()):
                yield from task.records(batch)
                opened.report(batch, done, failed)
                done, failed = done + len(batch), failed + batch.failed
        opened.report_left_out()

    return computed()


def run_to_file(
    task: Task,
    output: str | OsPathLike[str],
    paths: Paths,
    options: RunOptions,
    listeners: Listeners,
) -> Record:
    """Write the results of every input into a file; `options` decide what is computed.

    Returns
    -------
    dict
        The run record.

    Raises
    ------
    R2NError
        Before anything is written if an argument cannot be used; later if the device or the
        disk fails: finished blocks are kept then.
    """
    continues = options.resume or options.retry_failed
    out = checked_output(output, task.content, replaced=options.overwrite or continues)
    if options.retry_failed and not out.exists():
        raise OutputError(f"{out}: there is no finished output for `retry_failed`")
    if continues:
        options = _with_begun_batch_size(options, begun_record(out) or read_record(out))
    opened = open_run(task, paths, options, listeners)
    kind = FORMATS[out.suffix.lower()]
    record = run_record(opened, kind.packages)
    again = "`retry_failed`" if options.retry_failed else "`resume`"
    format = task.format(kind, options, opened.predictor)
    again = f"continue with {again}"
    with PartialOutput(out, format, again, listeners.on_warning) as partial, opened.walk:
        return _execute(opened, partial, choose_plan(partial, options, record))


def run_to_stream(
    task: Task,
    write: Callable[[Batch], None],
    paths: Paths,
    options: RunOptions,
    listeners: Listeners,
) -> Record:
    """Pass the results of every input to `write`, batch by batch; return the run record."""
    opened = open_run(task, paths, options, listeners)
    stream = _Stream(write)
    with opened.walk:
        return _execute(opened, stream, Fresh(stream, run_record(opened)))


def _execute(opened: Run, output: Output, plan: Fresh) -> Record:
    done = failed = 0
    try:
        for batch in plan.batches(opened.compute(plan.todo(opened.inputs()))):
            if _note_executed_batch_size(plan.record, opened.predictor):
                output.amend(plan.record)  # before a row that it concerns
            output.append(batch)
            opened.report(batch, plan.done + done, plan.failed + failed)
            done, failed = done + len(batch), failed + batch.failed
    except OutputError:
        raise
    except BaseException:  # Ctrl-C, a failed device: keep the finished rows
        with suppress(OutputError):  # it would hide the error that ended the run
            output.flush()
        raise
    record = plan.finish(plan.done + done, plan.failed + failed)
    opened.report_left_out()
    return record


class _Stream:
    """An output (see `plans.Output`) that passes on every batch and keeps nothing."""

    def __init__(self, write: Callable[[Batch], None]) -> None:
        self.append = write

    def flush(self, _record: Record | None = None) -> None: ...

    begin = amend = finish = flush


def run_record(opened: Run, packages: Sequence[str] = ()) -> Record:
    """Return the run record as known before the run starts, with its fingerprint.

    `packages` are those that write its output, besides the ones that every run needs.
    """
    task, options, predictor = opened.task, opened.options, opened.predictor
    description = predictor.engine.description
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "command": task.command,
        "versions": {
            "r2n": __version__,
            "engine": description.library,
            **decoder_versions(),
            "numpy": version("numpy"),
            "h5py": version("h5py"),
            "python": ".".join(map(str, sys.version_info[:3])),
            **{package: version(package) for package in packages},
        },
        "checkpoint": {
            "file": printable(str(predictor.checkpoint)),
            "sha256": predictor.sha256,
            "variant": predictor.variant,
        },
        **task.settings(options, predictor),
        "inputs": {
            "include": [*map(printable, options.include)],
            "exclude": [*map(printable, options.exclude)],
            "max": options.max,
        },
        "preprocessing": asdict(predictor.preprocessing),
        "decode_rules": asdict(predictor.rules),
        "device": {
            "name": description.device,
            "kind": description.device_kind,
            "model": description.device_model,
        },
        "backend": description.backend,
        "precision": description.precision,
        "batch_size": description.batch_size,
        "threads": predictor.workers,
        "streams": description.streams,
        "stream_threads": description.stream_threads,
        "shard": options.shard,
    }
    if predictor.calibration is not None:
        record["calibration"] = asdict(predictor.calibration)
    record = json.loads(json.dumps(record))  # tuples as the lists that they are read back as
    record["fingerprint"] = fingerprint(record)
    return record


def _as_sequence(paths: Paths) -> Sequence[PathLike]:
    """Return `paths` as a sequence: one path gives a sequence of one, None the current folder."""
    if paths is None:
        return (".",)
    return [paths] if isinstance(paths, str | OsPathLike) else paths


def _note_executed_batch_size(record: Record, predictor: Predictor) -> bool:
    """Record that the device computes less than a batch at a time; return whether that is new."""
    executed = predictor.engine.description.executed_batch_size
    before: int = record[EXECUTED] if EXECUTED in record else record["batch_size"]
    if executed is None or executed >= before:
        return False
    record[EXECUTED] = executed
    return True


def _with_begun_batch_size(options: RunOptions, begun: Record) -> RunOptions:
    """Return `options` with the batch size that the run was begun with, unless they name one.

    It affects the last bits of the values, and the size that is chosen for a device may change
    from version to version. A larger size than r2n chooses is not taken from a file: a batch is
    held in memory.
    """
    batch_size = begun.get("batch_size")
    sound = isinstance(batch_size, int) and 1 <= batch_size <= MOST_IMAGES
    if options.batch_size is not None or not sound:
        return options
    return replace(options, batch_size=batch_size)
