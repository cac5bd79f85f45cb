"""Which inputs are taken: by pattern, number and shard."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import pytest
from support.archives import tar_bytes
from support.files import touch

import r2ncli
from r2ncli.errors import InputNotFoundError, OutputError, UsageError
from r2ncli.sources.selection import LeftOut, Selection, in_shard, no_image_found
from r2ncli.sources.walk import Walk, find_images


def takes(name: str, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> bool:
    return Selection(include=include, exclude=exclude).left_out_by(name) is None


@pytest.mark.parametrize(
    ("name", "pattern", "taken"),
    [
        ("x/a.jpg", "*.jpg", True),
        ("x/a.JPG", "*.jpg", False),  # upper and lower case differ
        ("x/a.jpg", "a.*", True),
        ("x/a.jpg", "x", False),  # no slash: the last part alone
        ("x/a.jpg", "x/*", True),
        ("y/x/a.jpg", "x/*", False),  # a slash: the whole name
        ("y/x/a.jpg", "*/x/*", True),
        ("x/a.jpg", "[ab].jpg", True),
        ("x/c.jpg", "[!ab].jpg", True),
        ("a.tar!x/b.jpg", "b.jpg", True),
        ("a.tar!b.jpg", "b.*", True),
        ("a.tar.gz!b.jpg", "a*", False),
        ("a.tar!x/b.jpg", "a.tar!x/*", True),
        ("what!/b!.jpg", "b!.jpg", True),
        ("http://h/x/a.jpg", "a.jpg", True),
        ("http://h/x/a.jpg", "http://h/*", True),
    ],
)
def test_include_takes_what_matches(name: str, pattern: str, taken: bool) -> None:
    assert takes(name, include=(pattern,)) == taken
    assert takes(name, include=("nothing", pattern)) == taken


@pytest.mark.parametrize(
    ("name", "pattern", "left_out"),
    [
        ("x/y/a.jpg", "*.jpg", True),
        ("x/y/a.jpg", "x", True),  # a folder, and all in it
        ("x/y/a.jpg", "y", True),
        ("x/y/a.jpg", "y/", True),
        ("x/y/a.jpg", "x/y", True),
        ("x/y/a.jpg", "x/y/", True),
        ("z/x/y/a.jpg", "x/y", False),
        ("x/y/a.jpg", "*/y", True),
        ("x/yy/a.jpg", "y", False),
        ("/x/y/a.jpg", "/x", True),
        ("a.tar!x/b.jpg", "x", True),
        ("a.tar!x/b.jpg", "a.tar", True),
        ("d/a.tar!x/b.jpg", "d/a.tar", True),
        ("a.tar!x/b.jpg", "a.tar!x/b*", True),
        ("d/a.tar.bz2!x/b.jpg", "d/a.tar.bz2!x", True),
        ("http://h/x/a.jpg", "x", True),
    ],
)
def test_exclude_leaves_out_images_and_whole_folders(
    name: str, pattern: str, left_out: bool
) -> None:
    assert takes(name, exclude=(pattern,)) == (not left_out)
    assert takes(name, include=("*",), exclude=(pattern,)) == (not left_out)


def names(*paths: str, **selection: Any) -> list[str]:
    return [source.name for source in find_images(paths or ["."], print, Selection(**selection))]


def test_an_excluded_folder_is_not_even_listed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("a/1.jpg", "b/2.jpg", "c/b/3.jpg")
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert names() == ["a/1.jpg", "b", "c/b"]
    assert names(exclude=("b",)) == ["a/1.jpg"]
    assert names(exclude=("c/b",)) == ["a/1.jpg", "b"]


def test_patterns_hold_for_files_that_are_named_and_for_entries_of_lists(here: Path) -> None:
    touch("a.jpg", "b.jpg", "c.txt")
    Path("list").write_text("a.jpg\nb.jpg\nc.txt\n")
    for arguments in (("a.jpg", "b.jpg", "c.txt"), ("@list",)):
        assert names(*arguments, include=("*.jpg",)) == ["a.jpg", "b.jpg"]
        assert names(*arguments, exclude=("a*", "c.*")) == ["b.jpg"]


def test_max_takes_the_first(here: Path) -> None:
    touch(*(f"{n}.jpg" for n in range(9)))
    assert names(max=3) == ["0.jpg", "1.jpg", "2.jpg"]
    assert names(max=3, exclude=("1*",)) == ["0.jpg", "2.jpg", "3.jpg"]
    assert len(names(max=99)) == 9


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_shards_cover_all_names_exactly_once(count: int) -> None:
    all_names = [f"x/{n}.jpg" for n in range(500)] + ["é.jpg", "\\xff.jpg"]
    shares = [[n for n in all_names if in_shard(n, (i + 1, count))] for i in range(count)]
    assert sorted(sum(shares, [])) == sorted(all_names)  # noqa: RUF017  few
    if count <= 7:
        assert all(len(share) > 300 / count for share in shares)


def test_a_shard_is_the_same_on_every_machine() -> None:
    assert [i for i in range(1, 6) if in_shard("photos/a.jpg", (i, 5))] == [3]
    assert [i for i in range(1, 6) if in_shard("é.jpg", (i, 5))] == [2]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_outputs_of_all_shards_have_every_image_once(
    tmp_path: Path, pictures: Path, tiny_weights: Path
) -> None:
    seen: list[str] = []
    for share in range(1, 4):
        out = tmp_path / f"{share}.csv"
        record = r2ncli.classify_to(out, pictures, weights=tiny_weights, shard=f"{share}/3", max=15)
        assert record["shard"] == f"{share}/3"
        seen += [row["path"] for row in rows_of(out)]
    assert sorted(seen) == [f"{pictures}/{n:05d}.jpg" for n in range(15)]  # max comes first


def test_an_empty_shard_is_an_empty_finished_output(tmp_path: Path, tiny_weights: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    empty = next(i for i in range(1, 3) if not in_shard(f"{tmp_path}/a.jpg", (i, 2)))
    options: dict[str, Any] = {"weights": tiny_weights, "shard": f"{empty}/2"}
    record = r2ncli.classify_to(tmp_path / "x.csv", tmp_path, **options)
    assert record["counts"] == {"inputs": 0, "ok": 0, "failed": 0}
    assert (tmp_path / "x.csv").read_text().startswith("path,status,error,index_1")
    assert rows_of(tmp_path / "x.csv") == []
    r2ncli.extract_to(tmp_path / "x.h5", tmp_path, **options)
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["features/layer4"].shape == (0, 64)
        assert len(file["paths"]) == 0
    assert list(r2ncli.classify(tmp_path, **options)) == []


def test_a_shard_of_no_image_at_all_is_no_image_found(tmp_path: Path, tiny_weights: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no image found"):
        r2ncli.classify_to(tmp_path / "x.csv", tmp_path, weights=tiny_weights, shard="1/2")


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3", "", "1 / 2"])
def test_a_bad_shard_is_a_usage_error(tmp_path: Path, shard: str) -> None:
    with pytest.raises(UsageError, match="must be I/N") as raised:
        r2ncli.classify(tmp_path, shard=shard)
    assert raised.value.exit_code == 2


def test_another_shard_is_not_resumed(tmp_path: Path, pictures: Path, tiny_weights: Path) -> None:
    out = tmp_path / "x.csv"
    r2ncli.classify_to(out, pictures, weights=tiny_weights, shard="1/2")
    with pytest.raises(OutputError, match="shard was 1/2, is 2/2"):
        r2ncli.classify_to(out, pictures, weights=tiny_weights, shard="2/2", resume=True)
    with pytest.raises(OutputError, match="shard was 1/2, is None"):
        r2ncli.classify_to(out, pictures, weights=tiny_weights, resume=True)
    r2ncli.classify_to(out, pictures, weights=tiny_weights, shard="1/2", resume=True)


@pytest.mark.parametrize(
    "options", [{"max": 0}, {"timeout": 0}, {"timeout": float("nan")}, {"on_error": "stop"}]
)
def test_an_option_of_sources_that_cannot_be_is_a_usage_error(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError):
        r2ncli.classify(tmp_path, **options)


# --- why no image was found ---------------------------------------------------------------


def why_nothing(*paths: str, **selection: Any) -> str:
    with Walk(paths, print, Selection(**selection)) as walk:
        assert list(walk) == []
    error = no_image_found(walk.left_out)
    assert error.exit_code == 3
    return str(error)


def test_an_empty_folder_says_which_suffixes_were_looked_for(here: Path) -> None:
    text = why_nothing(".")
    assert text.startswith("no image found (looked for files ending in apng avif ")
    assert text.endswith(" webp)")


def test_other_suffixes_are_counted_and_named(here: Path) -> None:
    for name in ("a.txt", "b.TXT", "c.mp4", "README"):
        Path(name).touch()
    text = why_nothing(".")
    assert text.startswith("no image found (looked for files ending in apng ")
    assert text.endswith("): files with other suffixes: 2 .txt, 1 without a suffix, 1 .mp4")


def test_a_filter_that_left_nothing_is_named(here: Path) -> None:
    Path("d").mkdir()
    for name in ("a.jpg", "b.jpg", "d/c.png"):
        Path(name).touch()
    assert why_nothing(".", include=("*.gif", "x*")) == (
        "no image found: `include` (*.gif, x*) left out 3 names"
    )
    assert why_nothing(".", include=("*.jpg",), exclude=("?.jpg", "d")) == (
        "no image found: `exclude` (?.jpg, d) left out 3 names"
    )
    assert why_nothing("a.jpg", exclude=("a*",)) == (
        "no image found: `exclude` (a*) left out 1 name"
    )


def test_an_empty_list_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("names").write_text("\n")
    assert why_nothing("@names") == "no image found: the list @names is empty"
    with open("names") as file:
        monkeypatch.setattr("sys.stdin", file)
        assert why_nothing("-") == "no image found: the list on standard input (-) is empty"


def test_archives_inside_a_folder_are_named_with_what_to_do(here: Path) -> None:
    Path("d").mkdir()
    for name in ("d/a.zip", "d/b.tar.gz"):
        Path(name).touch()
    assert why_nothing("d") == (
        "no image found: archives inside a folder are not searched (2 archives, such as "
        "d/a.zip): name an archive to read it"
    )


def test_an_archive_without_images_says_what_it_has(here: Path) -> None:
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.writestr("notes.txt", "x")
    assert why_nothing("a.zip").endswith("files with other suffixes: 1 .txt")


def test_what_is_counted_takes_little_memory(here: Path) -> None:
    left_out = LeftOut(Selection())
    for number in range(5000):
        left_out.add_file(f"x.{number}")
        left_out.add_empty_list(f"@{number}")
    assert len(left_out.suffixes) <= 1001
    assert left_out.suffixes.total() == 5000
    assert len(left_out.empty_lists) == 5


@pytest.mark.parametrize("argument", ["-", "@names"])
def test_an_empty_list_is_exit_3(here: Path, tiny_weights: Path, argument: str) -> None:
    Path("names").touch()
    done = subprocess.run(
        [sys.executable, "-m", "r2ncli", "classify", argument, "--weights", str(tiny_weights)],
        env={**os.environ, "PYTHONPATH": str(Path(r2ncli.__file__).parents[1])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "is empty" in done.stderr
    assert done.stdout == ""


# --- what is left out -------------------------------------------------------------------------


SYSTEM = ["@eaDir", "#recycle", "$RECYCLE.BIN", "$Recycle.Bin", "lost+found", "__MACOSX"]
SYSTEM += ["System Volume Information", "@Recycle", "@Recently-Snapshot", "#snapshot", ".Trashes"]


def test_folders_of_nas_systems_and_trash_are_skipped(here: Path) -> None:
    for folder in (*SYSTEM, "photos"):
        (here / "d" / folder).mkdir(parents=True)
        (here / "d" / folder / "a.jpg").write_bytes(b"x")
        (here / "d" / folder / "a.xmp").write_bytes(b"x")
    left_out = LeftOut(Selection())
    found = find_images(["d"], print, left_out=left_out)
    assert [source.name for source in found] == ["d/photos/a.jpg"]
    assert left_out.sentence() == "left out 1 file: 1 .xmp"
    assert [one.name for one in find_images([f"d/{SYSTEM[0]}"], print)] == ["d/@eaDir/a.jpg"]
    (here / "a.tar").write_bytes(
        tar_bytes({f"{folder}/a.jpg": b"x" for folder in SYSTEM} | {"lost+found\\._a.jpg": b"x"})
    )
    assert list(find_images(["a.tar"], print)) == []


def test_the_sentence_at_the_end_counts_what_was_left_out_by_suffix() -> None:
    left_out = LeftOut(Selection())
    assert left_out.sentence() == ""
    for name in ("a.CR2", *(f"{n}.xmp" for n in range(22)), "README", "x." + "y" * 99, "z.\x1b[1m"):
        left_out.add_file(name)
    sentence = left_out.sentence()
    assert sentence.startswith(
        "left out 26 files: 1 without a suffix, 1 .\\x1b[1m, 1 .cr2, 22 .xmp, 1 others; RAW images "
        "(.cr2) are not decoded: convert them, or extract the JPEG preview"
    )
    for number in range(2000):
        left_out.add_file(f"a.{number}")
    assert len(left_out.sentence()) < 1000


def test_a_folder_of_raw_images_says_what_to_do(here: Path) -> None:
    (here / "d").mkdir()
    (here / "d/a.NEF").write_bytes(b"x")
    left_out = LeftOut(Selection())
    assert list(find_images(["d"], print, left_out=left_out)) == []
    assert "RAW images (.nef) are not decoded" in str(no_image_found(left_out))


def test_a_run_says_at_its_end_what_it_left_out(
    here: Path, tiny_weights: Path, pictures: Path
) -> None:
    shutil.copytree(pictures, here / "d")
    (here / "d/a.xmp").touch()
    said: list[str] = []
    list(r2ncli.classify("d", weights=tiny_weights, on_warning=said.append))
    r2ncli.classify_to("x.csv", "d", weights=tiny_weights, on_warning=said.append)
    assert said == ["left out 1 file: 1 .xmp"] * 2


# --- URLs -------------------------------------------------------------------------------------


def test_urls_that_differ_in_their_query_are_different_inputs_in_every_shard(here: Path) -> None:
    urls = [f"http://h/image.php?id={n}&token=secret" for n in range(40)]
    names = [source.name for source in find_images(urls, print)]
    assert names == [f"http://h/image.php?id={n}" for n in range(40)]
    shares = [sum(in_shard(name, (index, 4)) for name in names) for index in (1, 2, 3, 4)]
    assert sum(shares) == 40
    assert all(shares)


def test_patterns_compare_a_url_without_its_query() -> None:
    url = "http://h/a/x.jpg?w=640"
    for selection, taken in (
        (Selection(include=("*.jpg",)), True),
        (Selection(include=("*.png",)), False),
        (Selection(exclude=("*.jpg",)), False),
    ):
        assert bool(list(find_images([url], print, selection))) is taken
