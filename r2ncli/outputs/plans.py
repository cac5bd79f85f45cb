"""Plan what a run still has to compute, and what it appends to its output.

A plan compares the inputs with the rows that are kept, names those that must be computed, and
gives the rows to append in order. `choose_plan` is the only place that asks which kind of run
was wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from r2ncli.errors import OutputError
from r2ncli.images.decoders import may_be_added
from r2ncli.options import RunOptions
from r2ncli.outputs.partial import PartialOutput, refuse_existing
from r2ncli.outputs.reading import shortened
from r2ncli.outputs.record import EXECUTED, differing_settings, in_words
from r2ncli.outputs.results import known_stamps, read_batches, read_names, read_record
from r2ncli.outputs.rows import Batch
from r2ncli.sources.content import Stamp, stamp_of
from r2ncli.sources.walk import Input

Record = dict[str, Any]


class Output(Protocol):
    """Where the rows of a run go."""

    def begin(self, record: Record) -> None:
        """Start from nothing."""

    def amend(self, record: Record) -> None:
        """Replace the run record; the rows stay."""

    def append(self, batch: Batch) -> None:
        """Add rows."""

    def flush(self) -> None:
        """Store the rows added so far, so that no later error loses them."""

    def finish(self, record: Record) -> None:
        """Complete the output."""


class Fresh:
    """A plan in which every input is computed.

    Attributes
    ----------
    record : dict
        The run record.
    done, failed : int
        Number of kept rows, and of failed ones among them; known once `todo` gave an input.
    """

    def __init__(self, output: Output, record: Record) -> None:
        self._output = output
        self.record = record
        self.done = self.failed = 0

    def todo(self, inputs: Iterator[Input]) -> Iterator[Input]:
        """Yield the inputs that must be computed.

        Raises
        ------
        OutputError
            The inputs are not those whose rows are kept.
        """
        found = next(inputs, None)  # raises where there is no image: then nothing is begun
        self.record["start"] = _now()
        self._output.begin(self.record)
        while found is not None:
            yield found
            found = None  # it may hold bytes, and its archive waits for them before it reads on
            found = next(inputs, None)

    def batches(self, computed: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the rows to append, made from the computed ones."""
        return computed

    def finish(self, done: int, failed: int) -> Record:
        """Write the output, now that all its rows are there, and return the run record."""
        self.record["counts"] = {"inputs": done, "ok": done - failed, "failed": failed}
        self.record["end"] = _now()
        self._output.finish(self.record)
        return self.record


class Resumed(Fresh):
    """A plan that keeps the rows of the finished blocks and computes the rest."""

    def __init__(self, output: PartialOutput, record: Record, begun: Record) -> None:
        super().__init__(output, record)
        self.output = output
        _check_resumable(begun, record, output.folder)
        record["start"] = begun.get("start", _now())
        _keep_executed_batch_size(record, begun)

    def todo(self, inputs: Iterator[Input]) -> Iterator[Input]:
        self._skip_done(inputs)
        yield from inputs

    def _skip_done(self, inputs: Iterator[Input]) -> None:
        for name, failed, stamp in self.output.names():
            found = next(inputs, None)
            _check_input(self.output.folder, name, found, self._compared(failed, stamp))
            del found  # it may hold bytes, and its archive waits for them before it reads on
            self.done += 1
            self.failed += failed
        self.output.done = self.done

    def _compared(self, failed: bool, stamp: Stamp | None) -> Stamp | None:
        """Return the stamp that a kept row's file must still have, if any."""
        return None if failed else stamp


class Retried(Resumed):
    """A plan that computes the failed rows of a finished output again and keeps the others."""

    def __init__(self, output: PartialOutput, record: Record, finished: Record) -> None:
        Fresh.__init__(self, output, record)
        self.output = output
        _check_resumable(finished, record, output.output, retry_failed=True)
        begun = output.record()
        if begun is not None:
            _check_resumable(begun, record, output.folder)
        record["start"] = (begun or {}).get("start", _now())
        _keep_executed_batch_size(record, begun or finished)
        self._begun = begun is not None

    def todo(self, inputs: Iterator[Input]) -> Iterator[Input]:
        if self._begun:
            self._skip_done(inputs)
        else:
            self.output.begin(self.record)
        yield from _failed_inputs(self.output.output, inputs, self.done)

    def batches(self, computed: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the rows of the finished output, with the failed ones replaced by computed ones.

        `todo` reads the same output separately, so that only the rows being computed wait in
        memory, however far apart the failed ones are.
        """
        tried: Batch | None = None
        for kept in read_batches(self.output.output, self._first_row()):
            while len(kept):
                failed = [row for row, error in enumerate(kept.errors) if error is not None]
                if not failed:
                    yield kept
                    break
                if tried is None or not len(tried):
                    tried = next(computed, None)
                    assert tried is not None, "fewer rows were tried again than had failed"
                count = min(len(failed), len(tried))
                end = failed[count] if count < len(failed) else len(kept)
                yield kept[:end].with_rows(failed[:count], tried[:count])
                kept, tried = kept[end:], tried[count:]
        for _ in computed:  # none: this walks to the end, where a new input would be found
            raise AssertionError("more rows were tried again than had failed")

    def _compared(self, failed: bool, stamp: Stamp | None) -> Stamp | None:
        return None  # the files, or their archives, may have been repaired meanwhile

    def _first_row(self) -> int:
        """Return how many rows the blocks have; they are not counted yet when the first is read."""
        return sum(1 for _ in self.output.names()) if self._begun else 0


class Finished(Fresh):
    """A plan for a finished output: nothing is computed, and its inputs are only compared."""

    def __init__(
        self, output: PartialOutput, record: Record, finished: Record, retry_failed: bool = False
    ) -> None:
        super().__init__(output, finished)
        self.output = output
        _check_resumable(finished, record, output.output, retry_failed)
        self._compares = not retry_failed

    def todo(self, inputs: Iterator[Input]) -> Iterator[Input]:
        if self._compares:
            self._compare(inputs)
        yield from ()

    def _compare(self, inputs: Iterator[Input]) -> None:
        out = self.output.output
        for (name, failed), stamp in zip(read_names(out), known_stamps(out), strict=False):
            _check_input(out, name, next(inputs, None), None if failed else stamp)
        if (found := next(inputs, None)) is not None:
            _check_input(out, None, found)

    def finish(self, done: int, failed: int) -> Record:
        return self.record


def choose_plan(output: PartialOutput, options: RunOptions, record: Record) -> Fresh:
    """Choose the plan of a run whose output is locked.

    Raises
    ------
    OutputError
        The output exists although a new one is wanted, or was made with other settings.
    """
    out = output.output
    if options.retry_failed:
        finished = read_record(out)
        if output.record() is None and finished.get("counts", {}).get("failed") == 0:
            return Finished(output, record, finished, retry_failed=True)
        return Retried(output, record, finished)
    if options.resume:
        if (begun := output.record()) is not None:
            return Resumed(output, record, begun)
        if out.exists():
            return Finished(output, record, read_record(out))
    elif not options.overwrite:
        refuse_existing(out, began=bool(output.blocks()))  # now that no one else can write
    return Fresh(output, record)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _failed_inputs(out: Path, inputs: Iterator[Input], start: int = 0) -> Iterator[Input]:
    """Yield the inputs whose rows failed, from row `start` of a finished output on.

    Every name is compared up to the last.
    """
    for name, failed in islice(read_names(out), start, None):
        found = next(inputs, None)
        _check_input(out, name, found)
        if failed:
            assert found is not None
            yield found
        del found  # it may hold bytes, and its archive waits for them before it reads on
    if (found := next(inputs, None)) is not None:
        _check_input(out, None, found)


def _check_input(
    where: Path, name: str | None, found: Input | None, stamp: Stamp | None = None
) -> None:
    """Raise an OutputError unless `found` is the input `name` and its file has this `stamp`."""
    if found is None or found.name != name:
        raise OutputError(
            f"{where}: cannot be resumed because the inputs changed: it has "
            f"{shortened(name) if name is not None else 'no more rows'}, now there is "
            f"{found.name if found is not None else 'no more input'}. "
            "Give a new output for the new inputs, or `overwrite` to start again"
        )
    if stamp is None or found.path is None:
        return
    now = stamp_of(found.path)
    if now != stamp:
        raise OutputError(
            f"{where}: cannot be resumed because {name} changed since it was read: it had "
            f"{stamp.size:,} bytes, now it has {now.size if now else 0:,}, or another "
            "modification time. Give a new output, or `overwrite` to start again"
        )


def _keep_executed_batch_size(record: Record, begun: Record) -> None:
    """Copy the executed batch size of the kept rows from the earlier record."""
    if EXECUTED in begun:
        record[EXECUTED] = begun[EXECUTED]


def _check_resumable(
    begun: Record, record: Record, where: Path, retry_failed: bool = False
) -> None:
    """Raise an OutputError unless both records give the same rows; it names what differs."""
    same_shard = begun.get("shard") == record["shard"]
    if begun.get("fingerprint") == record["fingerprint"] and same_shard:
        return
    if "fingerprint" not in begun:
        raise OutputError(
            f"{where}: cannot be resumed: its run record is missing or corrupted. "
            "Give a new output to start again"
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
            "Give the same settings, or `overwrite` to start again"
        )


def _keeps_ok_rows(key: str, then: Any, now: Any) -> bool:
    """Return whether a changed setting can change failed rows only.

    An image within a limit is within a higher one, and an image that could be decoded did not
    need the decoder that was missing. (LittleCMS decodes nothing: it changes colours.)
    """
    if key in ("decode_rules max_pixels", "decode_rules max_bytes"):
        return isinstance(then, int) and isinstance(now, int) and now > then
    return then is None and key.removeprefix("versions ") in may_be_added()
