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
import shutil
from collections.abc import Iterator
from contextlib import suppress
from os import PathLike as OsPathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from r2ncli.errors import OutputError
from r2ncli.files import reason, remove_lock, sync, take_lock, write_whole
from r2ncli.outputs.damage import DAMAGE
from r2ncli.outputs.formats import Format, Record, format_of
from r2ncli.outputs.rows import Batch
from r2ncli.outputs.stamps import pack_stamps, read_stamps, stamps_path
from r2ncli.sources.content import Stamp

if TYPE_CHECKING:
    from filelock import BaseFileLock

BLOCK_ROWS = 256
BLOCK_BYTES = 64_000_000
CHOICES = "`overwrite` starts again, `resume` continues it"

REMOVED = "removed.json"  # what the record of a run is called while its blocks are removed

# every name that r2n gives to a file of a partial folder
OURS = re.compile(
    r"lock|run\.json|removed\.json|final\.json|joined\.\w+|(block|inputs)-\d{8}\.\w+|.*\.tmp"
)


class PartialOutput:
    """The growing output of one run: ``OUT.partial/``, locked for this process.

    Entering takes the lock and reads the existing blocks; leaving releases it. After an error,
    a folder without blocks is removed. Files that r2n did not write are never
    touched: a folder that holds one is refused.

    Attributes
    ----------
    again : str
        The words with which an error says how to continue.
    done : int
        Rows in finished blocks.
    """

    def __init__(self, output: Path, format: Format, again: str = "continue with `resume`") -> None:
        self.output = output
        self.folder = partial_folder(output)
        self.format = format
        self.again = again
        self.done = 0
        self._batches: list[Batch] = []  # of the next block
        self._block_rows = max(1, min(BLOCK_ROWS, BLOCK_BYTES // format.row_bytes()))
        self._next_block = 0
        self._lock: BaseFileLock | None = None

    def __enter__(self) -> PartialOutput:
        _refuse_foreign(self.folder)
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
                "resumed. `overwrite` starts again"
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
                raise OutputError(
                    f"{self.folder}: block {number} is missing. `overwrite` starts again"
                )
            try:
                stamps = read_stamps(self._stamps_of(number))
                for (name, failed), stamp in zip(
                    self.format.read_block(block), stamps, strict=False
                ):
                    yield name, failed, stamp
            except DAMAGE as error:
                raise OutputError(
                    f"{block}: corrupted ({error}). `overwrite` starts again"
                ) from error

    def begin(self, record: Record) -> None:
        """Remove existing blocks and write the run record."""
        self._empty_folder()
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
        with suppress(OSError):  # a full disk is reported when the block is written
            self._stamps_of(self._next_block).write_bytes(pack_stamps(stamps))
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
        free = shutil.disk_usage(self.folder).free
        if needed > free:
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
                os.replace(self.folder / "final.json", record_path(self.output))
            self._finish_stamps(len(blocks))
            os.replace(joined, self.output)
            sync(self.output.parent)
        except OSError as error:
            joined.unlink(missing_ok=True)
            raise OutputError(
                f"{self.output}: cannot be written: {reason(error)}. All results are kept in "
                f"{self.folder}; {self.again}"
            ) from error
        self._remove_folder()
        self._release()

    def _stamps_of(self, block: int) -> Path:
        return self.folder / f"inputs-{block:08d}.stamps"

    def _finish_stamps(self, blocks: int) -> None:
        """Join the stamps of all blocks into a file beside the output; remove an earlier one."""
        joined = self.folder / "joined.inputs"
        known = False
        with open(joined, "wb") as file:
            for block in range(blocks):
                try:
                    stamps = self._stamps_of(block).read_bytes()
                except OSError:
                    known = False
                    break
                known = known or stamps.strip(b"\xff") != b""
                file.write(stamps)
        if known:
            os.replace(joined, stamps_path(self.output))
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
            os.replace(self.folder / "run.json", self.folder / REMOVED)
            sync(self.folder)
        for path in sorted(self.folder.glob("*"), key=lambda path: path.name == REMOVED):
            if path.name != "lock" and OURS.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _write(self, name: str, content: bytes) -> None:
        """Write a file in the folder completely or not at all."""
        try:
            write_whole(self.folder / name, [content])
        except OSError as error:
            kept = ""
            if self.done and self.folder.is_dir():
                kept = f". {self.done:,} finished rows are kept in {self.folder}; {self.again}"
            raise OutputError(f"{self.output}: cannot be written: {reason(error)}{kept}") from error


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
    out = Path(output)
    format_of(out, content)
    try:
        if not out.parent.is_dir():
            raise OutputError(f"{out}: cannot be written: there is no folder {out.parent}")
        if out.is_dir():
            raise OutputError(f"{out}: cannot be written: it is a folder")
        for name in (out, partial_folder(out), record_path(out)):
            name.exists()  # raises where a name is too long, or the folder may not be searched
        if not replaced:
            began = partial_folder(out).exists()
            if began and (lock := take_lock(partial_folder(out) / "lock")) is None:
                raise _locked_by_another(out)
            if began and lock:
                lock.release()
            refuse_existing(out, began, choices)
    except OSError as error:
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
    """Return the folder in which an output grows: ``OUT.partial`` beside it."""
    return output.with_name(output.name + ".partial")


def begun_record(output: Path) -> dict[str, Any] | None:
    """Return the run record of an unfinished output; None if it cannot be read."""
    try:
        record = json.loads((partial_folder(output) / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def record_path(output: Path) -> Path:
    """Return the path of an output's run record: ``OUT.run.json`` beside it."""
    return output.with_name(output.name + ".run.json")


def json_bytes(record: Record) -> bytes:
    """Return a record as the content of a JSON file."""
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def _refuse_foreign(folder: Path) -> None:
    """Raise an OutputError if a partial folder has files not written by r2n: they would be lost."""
    try:
        foreign = [path.name for path in folder.iterdir() if not OURS.fullmatch(path.name)]
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {reason(error)}") from error
    if foreign:
        raise OutputError(f"{folder}: holds {foreign[0]!r}, which r2n did not write. Move it away")
