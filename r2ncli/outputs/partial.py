"""Write an output as finished blocks in ``OUT.partial/``, joined and renamed at the end.

A run's output grows as blocks of at most 256 rows or 64 MB, each written under a
temporary name, fsynced and renamed: a block that exists is complete. At the end they are
joined under a temporary name, fsynced and renamed to OUT, and the folder is removed.
Every format uses this mechanism.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from os import PathLike as OsPathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from r2ncli.errors import OutputError
from r2ncli.files import (
    belongs_to_us,
    create,
    free_bytes,
    reason,
    release,
    remove_lock,
    replace,
    sync,
    take_lock,
    write_whole,
)
from r2ncli.outputs.formats import Format, Record, format_of
from r2ncli.outputs.reading import DAMAGE, read_json_record, shortened
from r2ncli.outputs.record import (
    STAMP_BYTES,
    may_be_stamps,
    pack_stamps,
    read_stamps,
    record_path,
    stamps_path,
    target_of,
)
from r2ncli.outputs.rows import Batch
from r2ncli.sources.content import Stamp

if TYPE_CHECKING:
    from filelock import BaseFileLock

BLOCK_ROWS = 256
BLOCK_BYTES = 64_000_000
CHOICES = "`overwrite` starts again, `resume` continues it"
ANEW = "Give a new output to start again"

REMOVED = "removed.json"  # what the record of a run is called while its blocks are removed


class PartialOutput:
    """The growing output of one run: ``OUT.partial/``, locked for this process.

    Entering takes the lock and reads the existing blocks; leaving releases it. After an error,
    a folder without blocks is removed. Files that r2n did not write are never
    touched: a folder that holds one, or a link, or belongs to another user, is refused. Files are
    created under temporary names and renamed, never opened for writing where they exist.
    If the output is a link, its target is written, and the folder is beside the target.

    Attributes
    ----------
    again : str
        The words with which an error says how to continue.
    done : int
        Rows in finished blocks.
    """

    def __init__(
        self,
        output: Path,
        format: Format,
        again: str = "continue with `resume`",
        on_warning: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.output = output
        self._target = target_of(output)
        self._on_warning = on_warning
        self.folder = partial_folder(output)
        self.format = format
        self.again = again
        self.done = 0
        self._batches: list[Batch] = []  # of the next block
        self._block_rows = max(1, min(BLOCK_ROWS, BLOCK_BYTES // format.row_bytes()))
        self._next_block = 0
        self._lock: BaseFileLock | None = None

    def __enter__(self) -> PartialOutput:
        _refuse_foreign(self.folder, self.format)
        self._lock = self._locked()
        if (self.folder / REMOVED).exists():
            self._empty_folder()
        self._next_block = len(self.blocks())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is None:
            return
        with suppress(OSError):  # it would hide the error that ended the run
            if not self.blocks():
                self._remove_folder()
        self._release()

    def blocks(self) -> list[Path]:
        """Return the finished blocks, in order."""
        return sorted(self.folder.glob("block-*" + self.format.block_suffix))

    def record(self) -> dict[str, Any] | None:
        """Return the run record that this partial output began with; None if there is none.

        Raises
        ------
        OutputError
            There are blocks, but no record that can be read.
        """
        record = begun_record(self.output)
        if record is None and self.blocks():
            raise OutputError(
                f"{self.folder / 'run.json'}: corrupted or missing, so its blocks cannot be "
                f"resumed. {ANEW}"
            )
        return record

    def names(self) -> Iterator[tuple[str, bool, Stamp | None]]:
        """Yield the name of each finished row, whether it failed, and the stamp of its file.

        Raises
        ------
        OutputError
            A block is missing or corrupted.
        """
        for number, block in enumerate(self.blocks()):
            if block.stem != f"block-{number:08d}":
                raise OutputError(f"{self.folder}: block {number} is missing. {ANEW}")
            try:
                stamps = read_stamps(self._stamps_of(number))
                for (name, failed), stamp in zip(
                    self.format.read_block(block), stamps, strict=False
                ):
                    yield name, failed, stamp
            except DAMAGE as error:
                raise OutputError(f"{block}: corrupted ({shortened(error)}). {ANEW}") from error

    def begin(self, record: Record) -> None:
        """Remove existing blocks and write the run record."""
        try:
            self._empty_folder()
        except OSError as error:
            raise self._cannot_write(error) from error
        self._next_block = 0
        self._write("run.json", json_bytes(record))

    def amend(self, record: Record) -> None:
        """Replace the stored run record; the blocks are kept."""
        self._write("run.json", json_bytes(record))

    def append(self, batch: Batch) -> None:
        """Add rows, and write every block that they fill."""
        while len(batch):
            room = self._block_rows - sum(map(len, self._batches))
            self._batches.append(batch[:room])
            batch = batch[room:]
            if sum(map(len, self._batches)) == self._block_rows:
                self.flush()

    def flush(self) -> None:
        """Write the rows added since the last block as a block."""
        if not self._batches:
            return
        name = f"block-{self._next_block:08d}{self.format.block_suffix}"
        stamps = [stamp for batch in self._batches for stamp in batch.stamps or [None] * len(batch)]
        # not synced: stamps that are lost in a power cut are not compared, and no row is lost
        with (
            suppress(OSError),  # a full disk is reported when the block is written
            create(self._stamps_of(self._next_block)) as file,
        ):
            file.write(pack_stamps(stamps))
        self._write(name, self.format.pack(self._batches))
        # After an interrupt before this, the same block is written again under the same name. None
        # can come in between: Python handles signals at calls and jumps only.
        done, following = self.done + sum(map(len, self._batches)), self._next_block + 1
        self._batches, self._next_block, self.done = [], following, done

    def finish(self, record: Record) -> None:
        """Join the blocks, give the file its name, and remove the folder."""
        self.flush()
        blocks = self.blocks()
        needed = sum(block.stat().st_size for block in blocks)
        free = free_bytes(self.folder)
        if free is not None and needed > free:
            raise OutputError(
                f"{self.output}: {needed:,} bytes are needed to join the finished blocks, "
                f"{free:,} are free. Make room, and {self.again}"
            )
        joined = self.folder / ("joined" + self.format.suffix)
        try:
            self.format.join(blocks, joined, record)
            sync(joined)
            if not self.format.holds_record:
                self._write("final.json", json_bytes(record))
                replace(self.folder / "final.json", record_path(self.output))
            self._finish_stamps(len(blocks))
            replace(joined, self._target)
            sync(self._target.parent)
        except DAMAGE as error:
            with suppress(OSError):
                joined.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise OutputError(
                    f"{self.folder}: a block is corrupted ({shortened(error)}). {ANEW}"
                ) from error
            raise OutputError(
                f"{self.output}: cannot be written: {reason(error)}. All results are kept in "
                f"{self.folder}; {self.again}"
            ) from error
        with suppress(OSError):  # the output is complete
            self._remove_folder()
        self._release()

    def _stamps_of(self, block: int) -> Path:
        return self.folder / f"inputs-{block:08d}.stamps"

    def _finish_stamps(self, blocks: int) -> None:
        """Join the stamps of all blocks into a file beside the output; remove an earlier one."""
        joined = self.folder / "joined.inputs"
        known, most = False, STAMP_BYTES * BLOCK_ROWS
        with create(joined) as file:
            for block in range(blocks):
                try:
                    with open(self._stamps_of(block), "rb") as one:
                        stamps = one.read(most + 1)
                except OSError:
                    stamps = b""
                if not 0 < len(stamps) <= most or len(stamps) % STAMP_BYTES:
                    known = False
                    break
                known = known or stamps.strip(b"\xff") != b""
                file.write(stamps)
        if known:
            replace(joined, stamps_path(self.output))
        else:
            with suppress(FileNotFoundError):
                os.remove(stamps_path(self.output))

    def _locked(self) -> BaseFileLock:
        """Take the folder's lock, and create the folder if it does not exist."""
        try:
            lock = take_lock(self.folder / "lock")
        except OSError as error:
            raise OutputError(f"{self.output}: cannot be written: {reason(error)}") from error
        if lock is None:
            raise _locked_by_another(self.output)
        if not lock.is_locked:
            self._on_warning(
                f"{self.output}: its file system has no locks; do not start a second run on it"
            )
        return lock

    def _remove_folder(self) -> None:
        self._empty_folder()
        if self._lock is not None:
            remove_lock(self._lock)
            self._lock = None
        with suppress(OSError):
            self.folder.rmdir()

    def _empty_folder(self) -> None:
        """Remove r2n's files in an order that leaves no resumable run if the process is killed.

        The record is renamed first and removed last: blocks beside the renamed record belong to a
        run that has ended, and are removed when the folder is entered next.
        """
        with suppress(FileNotFoundError):
            replace(self.folder / "run.json", self.folder / REMOVED)
            sync(self.folder)
        ours = _our_names(self.format)
        for path in sorted(self.folder.glob("*"), key=lambda path: path.name == REMOVED):
            if path.name != "lock" and ours.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _release(self) -> None:
        if self._lock is not None:
            release(self._lock)
            self._lock = None

    def _write(self, name: str, content: bytes) -> None:
        """Write a file in the folder completely or not at all."""
        try:
            write_whole(self.folder / name, [content])
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> OutputError:
        kept = ""
        if self.done and self.folder.is_dir():
            kept = f". {self.done:,} finished rows are kept in {self.folder}; {self.again}"
        return OutputError(f"{self.output}: cannot be written: {reason(error)}{kept}")


def checked_output(
    output: str | OsPathLike[str], content: str, *, replaced: bool, choices: str = CHOICES
) -> Path:
    """Check that a run may write `output`, before anything else runs, and return its path.

    Parameters
    ----------
    content : str
        What its rows will hold (see `rows`).
    replaced : bool
        Whether an existing output or unfinished run may be replaced.
    choices : str
        The advice in the error if it may not be replaced.

    Raises
    ------
    UsageError
        No format for such rows has its suffix, or the format needs a library that is missing.
    OutputError
        It cannot be written, or exists.
    """
    out = Path(os.path.expanduser(output))
    format = format_of(out, content)
    try:
        with suppress(FileNotFoundError):
            out.stat()  # raises for links that lead to each other
        folder = target_of(out).parent
        if not folder.is_dir():
            raise OutputError(f"{out}: cannot be written: there is no folder {folder}")
        if out.is_dir():
            raise OutputError(f"{out}: cannot be written: it is a folder")
        for name in (out, partial_folder(out), record_path(out)):
            name.exists()  # raises where a name is too long, or the folder may not be searched
        _refuse_irregular(out)
        _refuse_foreign(partial_folder(out), format)
        if not replaced:
            began = False
            if (folder := partial_folder(out)).exists():
                if (lock := take_lock(folder / "lock")) is None:
                    raise _locked_by_another(out)
                release(lock)
                # a folder that could not be removed may hold nothing else
                began = any(name != "lock" for name in os.listdir(folder))
            refuse_existing(out, began, choices)
    except (OSError, ValueError) as error:  # a NUL in a name is a ValueError
        raise OutputError(f"{out}: cannot be written: {reason(error)}") from error
    return out


def refuse_existing(out: Path, began: bool, choices: str = CHOICES) -> None:
    """Raise an OutputError if a new run would replace an output or an unfinished run."""
    for there, path, what in (
        (began, partial_folder(out), "an unfinished run"),
        (out.exists(), out, "a finished output"),
        (record_path(out).exists(), record_path(out), "a run record"),
    ):
        if there:
            if not (began or format_of(out).holds_record or record_path(out).exists()):
                choices = choices.partition(", `resume`")[0]  # which needs the run record
            raise OutputError(f"{path} exists ({what}). {choices}")


def _locked_by_another(out: Path) -> OutputError:
    return OutputError(f"{out}: another r2n is writing it at this moment")


def partial_folder(output: Path) -> Path:
    """Return the folder in which an output grows: ``OUT.partial`` beside its file."""
    target = target_of(output)
    return target.with_name(target.name + ".partial")


def begun_record(output: Path) -> dict[str, Any] | None:
    """Return the run record of an unfinished output; None if it cannot be read."""
    try:
        return read_json_record(partial_folder(output) / "run.json")
    except DAMAGE:
        return None


def json_bytes(record: Record) -> bytes:
    """Return a record as the content of a JSON file."""
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def _our_names(format: Format | type[Format]) -> re.Pattern[str]:
    """Return a pattern of every name that r2n gives to a file of a partial folder."""
    block, joined = re.escape(format.block_suffix), re.escape(format.suffix)
    written = rf"(run|final|removed)\.json|joined({joined}|\.inputs)|block-[0-9]{{8}}{block}"
    return re.compile(rf"lock|inputs-[0-9]{{8}}\.stamps|({written})(\.tmp)?(\.old)?")


def _refuse_foreign(folder: Path, format: Format | type[Format]) -> None:
    """Raise an OutputError if a partial folder is not one of r2n and of this user.

    Nothing in it could be written or removed without harm to someone else's files.
    """
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode):
            what = "a link" if stat.S_ISLNK(status.st_mode) else "no folder"
            raise OutputError(f"{folder}: cannot be used: it is {what}. Move it away")
        if not belongs_to_us(folder, status):
            raise OutputError(
                f"{folder}: belongs to another user (number {status.st_uid}). "
                "Give another output, or continue as that user"
            )
        ours = _our_names(format)
        with os.scandir(folder) as entries:
            for entry in entries:
                if not ours.fullmatch(entry.name):
                    raise OutputError(
                        f"{folder}: holds {entry.name!r}, which r2n did not write. Move it away"
                    )
                if not entry.is_file(follow_symlinks=False):
                    raise OutputError(
                        f"{folder}: holds {entry.name!r}, which is not a regular file. Move it away"
                    )
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {reason(error)}") from error


def _refuse_irregular(out: Path) -> None:
    """Raise an OutputError if what a run replaces is no regular file, or not r2n's."""
    for path in (out, record_path(out), stamps_path(out)):
        if path.exists() and not path.is_file():
            raise OutputError(f"{path}: cannot be replaced: it is not a regular file")
    if not may_be_stamps(stamps_path(out)):
        raise OutputError(
            f"{stamps_path(out)}: r2n did not write it, and needs this name. Move it away"
        )
