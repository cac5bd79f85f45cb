"""An entry of the cache is whole, its own, and of these settings, or it is none."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import r2ncli
from r2ncli.engine import cache, openvino
from r2ncli.engine.cache import Entry, cache_folder, loaded_entry, read_entry, write_entry
from r2ncli.errors import DeviceError

SETTINGS = {"sha256": "ab", "layers": ("fc",), "batch_size": 8}
ENTRY = Entry({"variant": "tiny", "classes": 6}, np.tile(np.arange(256, dtype=np.uint8), 40))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("R2N_CACHE", str(tmp_path / "cache"))


def is_the_entry(entry):
    return entry.facts == ENTRY.facts and np.array_equal(entry.graph, ENTRY.graph)


def files():
    return sorted(cache_folder().iterdir())


def test_what_is_written_is_read():
    assert read_entry(SETTINGS) is None
    write_entry(SETTINGS, ENTRY)
    assert is_the_entry(read_entry(SETTINGS))
    assert len(files()) == 1  # nothing temporary is left


@pytest.mark.parametrize(
    "other", [{"sha256": "cd"}, {"layers": ("fc", "layer4")}, {"batch_size": 9}, {"pool": "max"}]
)
def test_other_settings_have_another_entry(other):
    write_entry(SETTINGS, ENTRY)
    assert read_entry(SETTINGS | other) is None


def test_the_graph_begins_at_a_whole_cache_line():
    for length in range(10):
        settings = SETTINGS | {"name": "x" * length}
        write_entry(settings, ENTRY)
        assert read_entry(settings).graph.ctypes.data % cache.ALIGNMENT == 0


def test_an_entry_stays_whole_for_its_reader_while_it_is_replaced_and_removed():
    write_entry(SETTINGS, ENTRY)
    entry = read_entry(SETTINGS)
    write_entry(SETTINGS, Entry({}, ENTRY.graph[::-1].copy()))
    files()[0].unlink()
    assert is_the_entry(entry)


def test_another_version_has_another_entry(monkeypatch):
    write_entry(SETTINGS, ENTRY)
    monkeypatch.setattr(cache, "__version__", "99")
    assert read_entry(SETTINGS) is None


@pytest.mark.parametrize("where", [0, 31, 32, 40, 60, 200, -1])
def test_a_corrupted_entry_is_none_and_is_replaced(where):
    write_entry(SETTINGS, ENTRY)
    content = bytearray(files()[0].read_bytes())
    content[where] ^= 1
    files()[0].write_bytes(content)
    assert read_entry(SETTINGS) is None
    write_entry(SETTINGS, ENTRY)
    assert is_the_entry(read_entry(SETTINGS))


@pytest.mark.parametrize("length", [0, 10, 32, 35, 40, 100, 10_000])
def test_a_truncated_entry_is_none(length):
    write_entry(SETTINGS, ENTRY)
    os.truncate(files()[0], length)
    assert read_entry(SETTINGS) is None


def forged(path, header, length=None):
    """Write an entry with this header and a digest that matches."""
    content = json.dumps(header).encode() if not isinstance(header, bytes) else header
    rest = (len(content) if length is None else length).to_bytes(8, "little") + content
    path.write_bytes(hashlib.sha256(rest).digest() + rest)


@pytest.mark.parametrize(
    ("header", "length"),
    [
        *(([], None), ("x", None), ({}, None), ({"settings": 1, "facts": {}}, None)),
        *((b"\xff\xfe", None), (b"{", None), (b"[" * 100_000, None), ({}, 2**63), ({}, 0)),
    ],
)
def test_an_entry_with_a_forged_header_is_none(header, length):
    write_entry(SETTINGS, ENTRY)
    forged(files()[0], header, length)
    assert read_entry(SETTINGS) is None


@pytest.mark.parametrize("facts", [1, "facts", [1], None])
def test_an_entry_whose_facts_are_no_object_is_none(facts):
    write_entry(SETTINGS, ENTRY)
    forged(files()[0], {"settings": cache._settings(SETTINGS), "facts": facts})
    assert read_entry(SETTINGS) is None


def test_a_link_a_pipe_and_a_folder_are_no_entries(tmp_path):
    write_entry(SETTINGS, ENTRY)
    (entry,) = files()
    elsewhere = entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(elsewhere)
    assert read_entry(SETTINGS) is None
    entry.unlink()
    os.mkfifo(entry)
    assert read_entry(SETTINGS) is None
    entry.unlink()
    entry.mkdir()
    assert read_entry(SETTINGS) is None


ROOT, ME, FRIEND = 0, 1000, 1001


@pytest.mark.parametrize(
    ("user", "folder_of", "entry_of", "trusted"),
    [
        *((ME, ME, ME, True), (ME, ME, ROOT, True), (ME, ME, FRIEND, False)),
        *((ME, FRIEND, ME, True), (ME, FRIEND, FRIEND, True), (ME, ROOT, FRIEND, False)),
        *((ROOT, ROOT, ROOT, True), (ROOT, ME, ME, False), (ROOT, ROOT, ME, False)),
    ],
)
def test_an_entry_of_another_user_is_none(user, folder_of, entry_of, trusted, monkeypatch):
    write_entry(SETTINGS, ENTRY)
    real = os.stat(files()[0])
    fields = [*real]
    fields[4] = entry_of
    file = open(files()[0], "rb")  # noqa: SIM115
    monkeypatch.setattr(cache, "open_regular", lambda _: (file, os.stat_result(fields)))
    monkeypatch.setattr(cache, "_user", lambda: user)
    monkeypatch.setattr(cache, "_owner", lambda _: folder_of)
    assert (read_entry(SETTINGS) is not None) == trusted


def test_users_who_share_a_folder_do_not_replace_each_others_entries(monkeypatch):
    write_entry(SETTINGS, ENTRY)
    monkeypatch.setattr(cache, "_owner", lambda _: ME)
    write_entry(SETTINGS, ENTRY)
    assert len(files()) == 2


def test_an_entry_under_anothers_name_is_none():
    write_entry(SETTINGS, ENTRY)
    (mine,) = files()
    write_entry(SETTINGS | {"sha256": "cd"}, ENTRY)
    (other,) = set(files()) - {mine}
    other.replace(mine)
    assert read_entry(SETTINGS) is None


def test_least_recently_used_entries_beyond_the_limit_go(monkeypatch):
    settings = [SETTINGS | {"batch_size": n} for n in range(4)]
    monkeypatch.setattr(cache, "LIMIT", 35_000)  # three of them
    for age, each in zip((300, 200, 100), settings, strict=False):
        before = set(files()) if cache_folder().exists() else set()
        write_entry(each, ENTRY)
        (new,) = set(files()) - before
        os.utime(new, (os.stat(new).st_mtime - age,) * 2)
    assert is_the_entry(read_entry(settings[0]))  # the oldest, but used just now
    write_entry(settings[3], ENTRY)
    assert [read_entry(each) is not None for each in settings] == [True, False, True, True]


def test_an_entry_larger_than_the_limit_stays_until_the_next(monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 1)
    write_entry(SETTINGS, ENTRY)
    assert is_the_entry(read_entry(SETTINGS))
    write_entry(SETTINGS | {"batch_size": 9}, ENTRY)
    assert read_entry(SETTINGS) is None


def test_many_writers_and_readers_at_once_see_whole_entries():
    def write_and_read(_number):
        write_entry(SETTINGS, ENTRY)
        return read_entry(SETTINGS)

    with ThreadPoolExecutor(8) as threads:
        assert all(is_the_entry(entry) for entry in threads.map(write_and_read, range(40)))
    assert len(files()) == 1


def test_without_the_variable_it_is_the_platforms_folder(monkeypatch):
    monkeypatch.delenv("R2N_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder().name == "r2n"
    if sys.platform == "linux":
        assert cache_folder() == Path("/somewhere/r2n")


def test_a_tilde_in_the_variable_is_the_users_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("R2N_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


def no_home(*_arguments, **_options):
    raise RuntimeError("could not determine the home directory")


def test_a_user_without_a_home_has_no_cache_and_makes_no_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "expanduser", no_home)
    for variable in ("~/cache", ""):
        monkeypatch.setenv("R2N_CACHE", variable)
        said = []
        assert loaded_entry(SETTINGS, lambda: ENTRY, lambda entry: entry, said.append) is ENTRY
        assert [sentence for sentence in said if "has no home folder" in sentence] == said != []
    assert list(tmp_path.iterdir()) == []


# --- in a run -------------------------------------------------------------------------


def settings_of(file):
    content = file.read_bytes()
    size = int.from_bytes(content[32:40], "little")
    return json.loads(content[40 : 40 + size])["settings"]


def rows(*args, **options):
    return list(r2ncli.classify(*args, backend="openvino", **options))


def test_a_run_out_of_the_cache_gives_the_same_as_the_one_that_filled_it(pictures, tiny_weights):
    first = rows(pictures, weights=tiny_weights)
    (entry,) = files()
    written = entry.read_bytes()
    assert rows(pictures, weights=tiny_weights) == first
    assert entry.read_bytes() == written


def test_a_corrupted_entry_is_rebuilt_by_the_next_run(pictures, tiny_weights):
    first = rows(pictures, weights=tiny_weights)
    (entry,) = files()
    entry.write_bytes(entry.read_bytes()[:-100])
    assert rows(pictures, weights=tiny_weights) == first
    assert len(files()) == 1


@pytest.mark.parametrize("length", [0, 100, 100_000])
def test_a_whole_entry_that_openvino_cannot_load_is_rebuilt_once(pictures, tiny_weights, length):
    first = rows(pictures, weights=tiny_weights)
    (entry,) = files()
    settings = settings_of(entry)
    whole = read_entry(settings)
    write_entry(settings, Entry(whole.facts, whole.graph[:length].copy()))
    assert rows(pictures, weights=tiny_weights) == first
    rebuilt = entry.read_bytes()
    assert len(rebuilt) > 100_000 + length
    assert rows(pictures, weights=tiny_weights) == first
    assert entry.read_bytes() == rebuilt
    assert files() == [entry]


@pytest.mark.parametrize("there", [False, True])
def test_what_cannot_be_loaded_though_just_made_is_an_error_and_is_not_kept(there):
    made = []

    def make():
        made.append("once")
        return Entry({}, ENTRY.graph)

    def load(_entry):
        raise DeviceError("no memory")

    if there:
        write_entry(SETTINGS, ENTRY)
    with pytest.raises(DeviceError, match="no memory"):
        loaded_entry(SETTINGS, make, load, print)
    assert made == ["once"]
    assert is_the_entry(read_entry(SETTINGS)) if there else read_entry(SETTINGS) is None


@pytest.mark.parametrize(
    "facts", [{}, {"variant": "x"}, {"classes": "many"}, {"shapes": 3}, {"shapes": {"fc": "x"}}]
)
def test_an_entry_with_forged_facts_is_rebuilt(pictures, tiny_weights, facts):
    first = rows(pictures, weights=tiny_weights)
    (entry,) = files()
    settings = settings_of(entry)
    whole = read_entry(settings)
    write_entry(settings, Entry({**whole.facts, **facts} if facts else {}, whole.graph))
    assert rows(pictures, weights=tiny_weights) == first


def test_a_processor_with_other_instructions_has_another_entry(pictures, tiny_weights, monkeypatch):
    first = rows(pictures, weights=tiny_weights)
    monkeypatch.setattr(openvino, "cpu_flags", lambda: ["sse2"])
    assert rows(pictures, weights=tiny_weights) == first
    assert len(files()) == 2


def test_labels_beside_the_checkpoint_may_change(pictures, tiny_weights, tmp_path):
    weights = tmp_path / "mine.pth"
    torch.save(r2ncli.load_model(tiny_weights).state_dict(), weights)
    beside = weights.with_suffix(".json")
    beside.write_text('{"labels": ["a", "b", "c", "d", "e", "f"], "preprocessing": {}}')
    assert rows(pictures, weights=weights)[0].predictions[0].label in "abcdef"
    beside.write_text('{"labels": ["u", "v", "w", "x", "y", "z"], "preprocessing": {}}')
    assert rows(pictures, weights=weights)[0].predictions[0].label in "uvwxyz"


def test_a_folder_that_cannot_be_written_costs_one_warning_and_no_row(
    pictures, tiny_weights, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("R2N_CACHE", str(tmp_path / "file" / "cache"))
    said = []
    found = rows(pictures, weights=tiny_weights, on_warning=said.append)
    assert len(found) == 20
    assert len(said) == 1
    assert str(tmp_path / "file" / "cache") in said[0]


@pytest.mark.parametrize(
    "command", ["classify", pytest.param("extract -o features.h5", marks=pytest.mark.slow)]
)
def test_a_warm_start_imports_no_torch(pictures, tiny_weights, tmp_path, command):
    program = (
        "import sys; from r2ncli.cli.app import app\n"
        "try: app()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    arguments = [*command.split(), str(pictures), "--weights", str(tiny_weights), "--overwrite"]
    if command == "classify":
        arguments[-1:] = ["-q"]
    with_torch = [
        subprocess.run(
            [sys.executable, "-c", program, *arguments, "--device", "cpu"], capture_output=True,
            text=True, check=True, cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(r2ncli.__file__).parents[1])},
        ).stderr.split()[-1]
        for _ in range(2)
    ]  # fmt: skip
    assert with_torch == ["True", "False"]
