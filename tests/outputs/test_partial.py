"""Finished blocks become files: whole, in order, under a final name only at the end."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.results import LABELLED, append, batch_of, classified, read_csv, write

from r2ncli.errors import OutputError
from r2ncli.outputs.hdf5 import Hdf5Format
from r2ncli.outputs.partial import BLOCK_ROWS, PartialOutput, checked_output, partial_folder
from r2ncli.outputs.results import existing_result, read_record
from r2ncli.outputs.rows import CLASSES, Features
from r2ncli.sources.content import Stamp


def test_a_block_is_there_after_every_256_rows_and_the_output_only_at_the_end(tmp_path):
    output = tmp_path / "x.csv"
    with PartialOutput(output, LABELLED) as partial:
        partial.begin({"r": 1})
        assert partial.record() == {"r": 1}
        for n in range(2 * BLOCK_ROWS + 1):
            append(partial, classified(f"{n}.jpg", 0.5, 0.5))
        assert len(partial.blocks()) == 2
        assert partial.done == 2 * BLOCK_ROWS
        assert [name for name, *_ in partial.names()] == [f"{n}.jpg" for n in range(512)]
        assert not output.exists()
        partial.finish({"r": 2})
    assert len(read_csv(output)) == 513
    assert not partial.folder.exists()


def test_a_block_of_large_rows_is_written_sooner(tmp_path):
    row = Features("a", {"x": np.zeros((1000, 1000), np.float32)})
    with PartialOutput(tmp_path / "f.h5", Hdf5Format({"x": (1000, 1000)})) as partial:
        partial.begin({})
        for _ in range(16):
            append(partial, row)
        assert len(partial.blocks()) == 1


def test_a_second_run_on_the_same_output_is_refused_while_the_first_lasts(tmp_path):
    with PartialOutput(tmp_path / "x.csv", LABELLED) as partial:
        partial.begin({})
        with (
            pytest.raises(OutputError, match=r"x\.csv: another r2n is writing it"),
            PartialOutput(tmp_path / "x.csv", LABELLED),
        ):
            pass
        with pytest.raises(OutputError, match=r"x\.csv: another r2n is writing it"):
            checked_output(tmp_path / "x.csv", CLASSES, replaced=False)
        append(partial, classified("a", 0.5, 0.5))
        partial.finish({})
    with PartialOutput(tmp_path / "x.csv", LABELLED) as again:
        again.begin({})


def test_an_output_without_its_run_record_is_only_to_be_replaced(tmp_path):
    (tmp_path / "x.csv").write_text("precious")
    with pytest.raises(OutputError, match=r"\(a finished output\)\. `overwrite` starts again$"):
        checked_output(tmp_path / "x.csv", CLASSES, replaced=False)
    (tmp_path / "x.csv.run.json").write_text("{}")
    with pytest.raises(OutputError, match=r"`resume` continues it$"):
        checked_output(tmp_path / "x.csv", CLASSES, replaced=False)


def test_a_run_that_ends_before_its_first_block_leaves_nothing(tmp_path):
    with PartialOutput(tmp_path / "x.csv", LABELLED) as partial:
        partial.begin({})
        append(partial, classified("a", 0.5, 0.5))
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="cannot be written: not a directory"),
        PartialOutput(tmp_path / "file" / "x.csv", LABELLED),
    ):
        pass


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[4])
from pathlib import Path
import numpy as np
from r2ncli.errors import OutputError
from r2ncli.outputs.rows import Classification, Features, Prediction
from r2ncli.outputs.formats import ParquetFormat
from r2ncli.outputs.hdf5 import Hdf5Format
from r2ncli.outputs.partial import PartialOutput
from support.results import append
limit, rows, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
if out.suffix == ".h5":
    format = Hdf5Format({"x": (1000,)})
    make_row = lambda name: Features(name, {"x": np.ones(1000, np.float32)})
else:  # noise does not compress
    format, noise = ParquetFormat(100, False, False), np.random.default_rng(0)
    make_row = lambda name: Classification(
        name, tuple(Prediction(n, None, None, value) for n, value in enumerate(noise.random(100)))
    )
    import pyarrow.parquet
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with PartialOutput(out, format) as partial:
        partial.begin({})
        for n in range(rows):
            append(partial, make_row(f"{n}.jpg"))
            if n % 100 == 99:
                partial.flush()
        partial.finish({})
except OutputError as error:
    print(error)
    sys.exit(6)
"""


@pytest.mark.parametrize(
    ("suffix", "block", "limit", "rows"),
    [("h5", "npz", 500_000, 700), ("parquet", "jsonl", 600_000, 2000)],
)
def test_a_full_disk_is_one_sentence_and_keeps_the_finished_blocks(
    tmp_path, suffix, block, limit, rows
):
    """Blocks of a hundred rows fit below the limit; the joined file does not."""
    out = tmp_path / f"f.{suffix}"
    ended = full_disk(out, limit, rows)
    assert ended.returncode == 6, ended.stderr
    assert "cannot be written: file too large" in ended.stdout
    assert "`resume`" in ended.stdout
    assert ended.stderr == ""
    left = sorted(path.name for path in (tmp_path / f"f.{suffix}.partial").iterdir())
    blocks = range(rows // 100)
    assert left == [
        *(f"block-{n:08d}.{block}" for n in blocks),
        *(f"inputs-{n:08d}.stamps" for n in blocks),
        *("lock", "run.json"),
    ]
    assert not out.exists()


def test_a_disk_that_is_full_from_the_first_block_on_leaves_nothing(tmp_path):
    ended = full_disk(tmp_path / "f.h5", limit=100_000, rows=700)
    assert ended.returncode == 6, ended.stderr
    assert "cannot be written: file too large" in ended.stdout
    assert ended.stderr == ""
    assert list(tmp_path.iterdir()) == []


def full_disk(out, limit, rows):
    """Write `rows` rows, a block every hundred, where no file may exceed `limit` bytes."""
    command = [sys.executable, "-c", FULL_DISK, str(limit), str(rows), str(out)]
    command.append(str(Path(__file__).parents[1]))
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_output_has_ordinary_permissions(tmp_path):
    write(tmp_path / "x.csv", LABELLED, [classified("a", 0.5, 0.5)])
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "x.csv").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("there", ["thesis.txt", "block-x.csv", "sub"])
def test_a_folder_with_what_r2n_did_not_write_is_refused_and_kept(tmp_path, there):
    folder = tmp_path / "x.csv.partial"
    folder.mkdir()
    (folder / there).mkdir() if there == "sub" else (folder / there).write_text("precious")
    with (
        pytest.raises(OutputError, match=f"holds '{there}', which r2n did not write"),
        PartialOutput(tmp_path / "x.csv", LABELLED),
    ):
        pass
    assert [path.name for path in folder.iterdir()] == [there]


def begun(tmp_path, blocks=3):
    """A partial output of some blocks of two rows."""
    with PartialOutput(tmp_path / "x.csv", LABELLED) as partial:
        partial.begin({"r": 1})
        for n in range(2 * blocks):
            append(partial, classified(f"{n}.jpg", 0.5, 0.5))
            if n % 2:
                partial.flush()
    return partial


def test_a_half_written_block_never_counts_as_done(tmp_path):
    partial = begun(tmp_path)
    whole = partial.blocks()[-1]
    half = partial.folder / f"block-00000007{whole.suffix}.tmp"
    half.write_bytes(whole.read_bytes()[:-10])
    with PartialOutput(partial.output, LABELLED) as resumed:
        assert len(list(resumed.names())) == 6
        resumed.finish({"r": 1})
    assert [row["path"] for row in read_csv(partial.output)] == [f"{n}.jpg" for n in range(6)]
    assert not partial.folder.exists()


def cut(block):
    block.write_bytes(block.read_bytes()[:-30])


def glue(block):
    block.write_bytes(block.read_bytes().replace(b"\n", b"", 1))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda block: block.unlink(), "block 1 is missing"),
        (cut, "corrupted"),
        (glue, "corrupted"),
        (lambda block: block.write_bytes(b"\xff\x00\x80"), "corrupted"),
    ],
)
def test_a_corrupted_block_is_never_taken_for_a_whole_one(tmp_path, damage, says):
    partial = begun(tmp_path)
    damage(partial.blocks()[1])
    with pytest.raises(OutputError, match=says):
        list(partial.names())


def test_blocks_without_a_record_cannot_be_resumed(tmp_path):
    partial = begun(tmp_path)
    (partial.folder / "run.json").write_text('{"r"')
    with pytest.raises(OutputError, match=r"run\.json: corrupted or missing"):
        partial.record()
    assert len(partial.blocks()) == 3


def test_a_run_that_has_ended_leaves_the_next_ones_folder_alone(tmp_path):
    with PartialOutput(tmp_path / "x.csv", LABELLED) as partial:
        partial.begin({})
        append(partial, classified("a", 0.5, 0.5))
        partial.finish({})
        with PartialOutput(tmp_path / "x.csv", LABELLED) as following:
            following.begin({})
            partial.__exit__(None, None, None)
            assert following.folder.is_dir()


class PowerCutError(BaseException):
    """Ends the process in the middle, as far as the disk can tell."""


@pytest.mark.parametrize("removed", range(6))
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_while_a_folder_is_emptied_leaves_what_the_next_run_can_begin_with(
    tmp_path, monkeypatch, removed, overwrite
):
    partial = begun(tmp_path)
    unlink, count = Path.unlink, 0

    def until_the_cut(path, missing_ok=False):
        nonlocal count
        if count == removed:
            raise PowerCutError
        count += 1
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", until_the_cut)
        patched.setattr(PartialOutput, "__exit__", lambda self, *_: self._release())
        with suppress(PowerCutError), PartialOutput(partial.output, LABELLED) as cut:
            cut.begin({"r": 2}) if overwrite else cut.finish({"r": 1})
    with PartialOutput(partial.output, LABELLED) as following:
        whole = following.record() == {"r": 1} and len(list(following.names())) == 6
        new = following.record() == {"r": 2} and not following.blocks()
        gone = following.record() is None and not following.blocks()
        assert whole or new or gone
        assert partial.output.exists() == (not overwrite)


# --- files of others --------------------------------------------------------------------------

OURS = (
    *("lock", "run.json", "run.json.tmp", "removed.json", "final.json", "final.json.tmp"),
    *("block-00000000.csv", "block-00000001.csv.tmp", "inputs-00000000.stamps"),
    *("joined.csv", "joined.inputs"),
)


def planted(folder, name, kind, victim):
    """Put something else at the place of a file of r2n."""
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "dangling link":
        path.symlink_to(folder.parent / "new")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
@pytest.mark.parametrize("name", OURS)
def test_what_is_planted_in_a_partial_folder_is_refused_and_its_target_kept(tmp_path, name, kind):
    partial = begun(tmp_path, blocks=1)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    planted(partial.folder, name, kind, victim)
    before = sorted(path.name for path in partial.folder.iterdir())
    message = rf"x\.csv\.partial: holds '{name}', which is not a regular file\. Move it away$"
    for replaced in (False, True):
        with pytest.raises(OutputError, match=message):
            checked_output(partial.output, CLASSES, replaced=replaced)
    with pytest.raises(OutputError, match=message), PartialOutput(partial.output, LABELLED):
        pass
    assert victim.read_text() == "precious"
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in partial.folder.iterdir()) == before


@pytest.mark.parametrize("name", OURS)
def test_a_hard_link_in_a_partial_folder_is_never_written_through(tmp_path, name):
    for again in ("resume", "overwrite"):
        partial = begun(tmp_path, blocks=1)
        victim = tmp_path / "victim"
        victim.write_text("precious")
        (partial.folder / name).unlink(missing_ok=True)
        os.link(victim, partial.folder / name)
        with suppress(OutputError), PartialOutput(partial.output, LABELLED) as following:
            if again == "overwrite":
                following.begin({"r": 2})
            append(following, classified("z", 0.5, 0.5))
            following.finish({"r": 2})
        assert victim.read_text() == "precious"
        for path in (*partial.folder.glob("*"), partial.output, victim):
            path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "name",
    [
        *("notes.tmp", "run.json.bak", "block-1.csv", "block-00000000.npz", "joined.h5"),
        *(
            "block-000000000.csv",
            "block-" + "\u0660" * 8 + ".csv",
            "joined.csv.tmp.tmp",
            "lock.tmp",
        ),
    ],
)
def test_a_file_of_the_user_in_a_partial_folder_is_refused_and_kept(tmp_path, name):
    partial = begun(tmp_path, blocks=1)
    (partial.folder / name).write_text("precious")
    with (
        pytest.raises(OutputError, match=rf"holds '{name}', which r2n did not write\. Move it"),
        PartialOutput(partial.output, LABELLED) as again,
    ):
        again.begin({})
    assert (partial.folder / name).read_text() == "precious"


@pytest.mark.parametrize("target", ["elsewhere", "missing"])
def test_a_partial_folder_that_is_a_link_is_refused(tmp_path, target):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "x.csv.partial").symlink_to(target)
    message = r"x\.csv\.partial: cannot be used: it is a link\. Move it away"
    with pytest.raises(OutputError, match=message):
        checked_output(tmp_path / "x.csv", CLASSES, replaced=True)
    with pytest.raises(OutputError, match=message), PartialOutput(tmp_path / "x.csv", LABELLED):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "x.csv.partial"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_partial_folder_is_for_its_user_alone(tmp_path):
    with PartialOutput(tmp_path / "x.csv", LABELLED) as partial:
        assert partial.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_partial_folder_of_another_user_is_refused(tmp_path):
    partial = begun(tmp_path)
    os.chown(partial.folder, 4242, 4242)
    message = r"x\.csv\.partial: belongs to another user \(number 4242\)\. Give another output"
    with pytest.raises(OutputError, match=message):
        checked_output(partial.output, CLASSES, replaced=True)
    with pytest.raises(OutputError, match=message), PartialOutput(partial.output, LABELLED):
        pass
    assert len(partial.blocks()) == 3


def test_where_the_file_system_gives_all_files_to_one_user_a_run_goes_on(tmp_path, monkeypatch):
    partial = begun(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with PartialOutput(partial.output, LABELLED) as resumed:
        assert len(list(resumed.names())) == 6


def test_a_link_beside_the_output_is_replaced_and_its_target_kept(tmp_path):
    victim, out = tmp_path / "victim", tmp_path / "x.csv"
    for beside in (".run.json", ".inputs"):
        victim.write_bytes(bytes(16))
        (tmp_path / f"x.csv{beside}").symlink_to(victim)
    checked_output(out, CLASSES, replaced=True)
    with PartialOutput(out, LABELLED) as partial:
        partial.begin({"r": 1})
        row = batch_of([classified("a", 0.5, 0.5)], LABELLED)
        partial.append(replace(row, stamps=[Stamp(5, 6)]))
        partial.finish({"r": 1})
    assert victim.read_bytes() == bytes(16)
    for beside in (".run.json", ".inputs"):
        assert not (tmp_path / f"x.csv{beside}").is_symlink()


def test_a_list_of_the_user_where_the_stamps_belong_is_refused_and_kept(tmp_path):
    (tmp_path / "x.csv.inputs").write_text("a.jpg\nb.jpg\n")
    with pytest.raises(OutputError, match=r"x\.csv\.inputs: r2n did not write it.* Move it away"):
        checked_output(tmp_path / "x.csv", CLASSES, replaced=True)
    assert (tmp_path / "x.csv.inputs").read_text() == "a.jpg\nb.jpg\n"


@pytest.mark.parametrize("name", ["x.csv", "x.csv.run.json", "x.csv.inputs"])
def test_a_pipe_at_the_place_of_an_output_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OutputError, match=f"{name}: cannot be replaced: it is not a regular file"):
        checked_output(tmp_path / "x.csv", CLASSES, replaced=True)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, bytes(10_000), b"\xff" * 40])
def test_stamps_of_a_block_may_have_any_length(tmp_path, content):
    partial = begun(tmp_path)
    for number in range(3):
        (partial.folder / f"inputs-{number:08d}.stamps").write_bytes(content)
    with PartialOutput(partial.output, LABELLED) as resumed:
        assert len(list(resumed.names())) == 6
        resumed.finish({})
    assert len(read_csv(partial.output)) == 6
    assert not (tmp_path / "x.csv.inputs").exists()


@pytest.mark.parametrize("failing", ["unlink", "rmdir"])
def test_cleaning_up_does_not_hide_why_a_run_ended(tmp_path, monkeypatch, failing):
    def refusing(*_arguments, **_options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, failing, refusing)

    def begin_and_end():
        with PartialOutput(tmp_path / "x.csv", LABELLED) as partial:
            partial.begin({})
            raise PowerCutError

    with pytest.raises(PowerCutError):
        begin_and_end()


def test_an_output_that_is_complete_is_so_although_its_folder_cannot_be_removed(
    tmp_path, monkeypatch
):
    def refusing(*_arguments, **_options):
        raise OSError(errno.EIO, "Input/output error")

    with PartialOutput(tmp_path / "x.csv", LABELLED) as partial:
        partial.begin({})
        append(partial, classified("a", 0.5, 0.5))
        monkeypatch.setattr(Path, "unlink", refusing)
        partial.finish({})
    assert len(read_csv(tmp_path / "x.csv")) == 1


# --- where outputs are -------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_where_the_output_is_a_link_its_target_is_written(tmp_path, there):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "x.csv", tmp_path / "disk" / "y.csv"
    if there:
        target.write_text("old")
    link.symlink_to("z")
    (tmp_path / "z").symlink_to("disk/y.csv")
    checked_output(link, CLASSES, replaced=there)
    with PartialOutput(link, LABELLED) as partial:
        partial.begin({"r": 1})
        assert partial.folder == tmp_path / "disk" / "y.csv.partial"
        row = batch_of([classified("a", 0.5, 0.5)], LABELLED)
        partial.append(replace(row, stamps=[Stamp(5, 6)]))
        partial.finish({"r": 1})
    assert link.is_symlink()
    assert [row["path"] for row in read_csv(target)] == ["a"]
    beside = ["y.csv", "y.csv.inputs", "y.csv.run.json"]
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == beside
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "x.csv", "z"]
    assert read_record(link) == {"r": 1}


def test_an_output_behind_a_link_is_kept_and_named_as_it_was_typed(tmp_path):
    write(tmp_path / "y.csv", LABELLED, [classified("a", 0.5, 0.5)])
    (tmp_path / "x.csv").symlink_to("y.csv")
    with pytest.raises(OutputError, match=r"x\.csv exists \(a finished output\)"):
        checked_output(tmp_path / "x.csv", CLASSES, replaced=False)


def test_a_run_record_beside_a_link_is_read_where_its_target_has_none(tmp_path):
    """As in the folders of tools that keep large files elsewhere under a digest."""
    write(tmp_path / "y.csv", LABELLED, [classified("a", 0.5, 0.5)], {"r": 1})
    (tmp_path / "y.csv").rename(tmp_path / "0123")
    (tmp_path / "y.csv").symlink_to("0123")
    assert read_record(tmp_path / "y.csv") == {"r": 1}


def test_links_that_lead_to_each_other_are_an_output_error(tmp_path):
    (tmp_path / "x.csv").symlink_to("y.csv")
    (tmp_path / "y.csv").symlink_to("x.csv")
    with pytest.raises(OutputError, match=r"x\.csv: cannot be written: too many levels of symbol"):
        checked_output(tmp_path / "x.csv", CLASSES, replaced=True)


def test_a_link_into_a_folder_that_does_not_exist_is_an_output_error(tmp_path):
    (tmp_path / "x.csv").symlink_to("nowhere/y.csv")
    message = r"x\.csv: cannot be written: there is no folder .*nowhere$"
    with pytest.raises(OutputError, match=message):
        checked_output(tmp_path / "x.csv", CLASSES, replaced=True)


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    for given in ("~/x.csv", Path("~/x.csv")):
        assert checked_output(given, CLASSES, replaced=False) == tmp_path / "home" / "x.csv"
        assert partial_folder(Path(given)) == tmp_path / "home" / "x.csv.partial"
    write(tmp_path / "home" / "x.csv", LABELLED, [classified("a", 0.5, 0.5)])
    assert existing_result("~/x.csv") == tmp_path / "home" / "x.csv"
    with pytest.raises(OutputError, match="there is no folder ~nobody-of-this-name"):
        checked_output("~nobody-of-this-name/x.csv", CLASSES, replaced=False)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_of_an_output_has_the_permissions_that_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        with PartialOutput(tmp_path / "x.csv", LABELLED) as partial:
            partial.begin({"r": 1})
            row = batch_of([classified("a", 0.5, 0.5)], LABELLED)
            partial.append(replace(row, stamps=[Stamp(5, 6)]))
            partial.finish({"r": 1})
        write(tmp_path / "f.h5", Hdf5Format({"x": (1,)}), [Features("a", {"x": np.ones(1, "f4")})])
    finally:
        os.umask(before)
    for name in ("x.csv", "x.csv.run.json", "x.csv.inputs", "f.h5"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask, name


@pytest.mark.parametrize(
    "usage", [(0, 0, 0), (1000, 1000, 0), OSError(errno.ENOSYS, "Function not implemented")]
)
def test_a_file_system_that_does_not_know_its_free_space_is_tried(tmp_path, monkeypatch, usage):
    def answer(_):
        if isinstance(usage, OSError):
            raise usage
        return SimpleNamespace(total=usage[0], used=usage[1], free=usage[2])

    monkeypatch.setattr(shutil, "disk_usage", answer)
    write(tmp_path / "x.csv", LABELLED, [classified("a", 0.5, 0.5)])
    assert len(read_csv(tmp_path / "x.csv")) == 1


def test_a_full_disk_is_noticed_before_blocks_are_joined(tmp_path, monkeypatch):
    usage = SimpleNamespace(total=1000, used=995, free=5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = r"bytes are needed .* 5 are free.*continue with `resume`"
    with pytest.raises(OutputError, match=message):
        write(tmp_path / "x.csv", LABELLED, [classified("a", 0.5, 0.5)])


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_with_one_warning(tmp_path, monkeypatch, number):
    def refusing(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refusing)
    said = []
    with PartialOutput(tmp_path / "x.csv", LABELLED, on_warning=said.append) as partial:
        partial.begin({})
        append(partial, classified("a", 0.5, 0.5))
        partial.finish({})
    assert len(read_csv(tmp_path / "x.csv")) == 1
    assert said == [
        f"{tmp_path}/x.csv: its file system has no locks; do not start a second run on it"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "x.csv.run.json"]


def test_advice_never_destroys_rows_that_are_whole(tmp_path):
    """What is written where a run cannot be resumed names no option that removes its rows."""
    for damage in (lambda block: block.unlink(), cut):
        partial = begun(tmp_path)
        damage(partial.blocks()[1])
        with pytest.raises(OutputError) as raised:
            list(partial.names())
        assert "overwrite" not in str(raised.value)
        shutil.rmtree(partial.folder)


@pytest.mark.parametrize("left", [[], ["lock"]])
def test_a_folder_that_could_not_be_removed_is_no_unfinished_run(tmp_path, left):
    folder = tmp_path / "x.csv.partial"
    folder.mkdir()
    for name in left:
        (folder / name).touch()
    checked_output(tmp_path / "x.csv", CLASSES, replaced=False)
    write(tmp_path / "x.csv", LABELLED, [classified("a", 0.5, 0.5)])
    assert not folder.exists()


def test_a_nul_in_the_name_of_an_output_is_an_output_error():
    with pytest.raises(OutputError, match="cannot be written: embedded null byte"):
        checked_output("x\0y.csv", CLASSES, replaced=False)
