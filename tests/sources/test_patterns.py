"""Patterns match what a shell would match, in the order of a walk."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from r2ncli.errors import InputNotFoundError
from r2ncli.sources.patterns import has_pattern, matching_paths
from r2ncli.sources.walk import find_images

TREE = [
    *("a.jpg", "b.jpg", "B.jpg", "c.png", "10.jpg", "9.jpg", ".hidden.jpg", "notes.txt", "é.jpg"),
    *("x/a.jpg", "x/b.png", "x/.h.jpg", "x/y/a.jpg", "x/y/z/a.jpg", "x/y/z/deep.png"),
    *("x-1/a.jpg", "train/a.jpg", "x/train/b.jpg", "train/train/c.jpg", ".git/a.jpg"),
    *("x y/a b.jpg", "[1]/a.jpg", "1/a.jpg", "x/[1].jpg", "x/1.jpg", "-f.jpg"),
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tree as the current folder."""
    monkeypatch.chdir(tmp_path)
    for path in TREE:
        os.makedirs(os.path.dirname(path) or os.curdir, exist_ok=True)
        Path(path).write_bytes(b"x")
    return tmp_path


def matches(pattern: str) -> list[str]:
    return list(matching_paths(pattern, print))


def names(*arguments: str) -> list[str]:
    return [source.name for source in find_images(arguments, print)]


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "*",
            "*.jpg",
            "?.jpg",
            "[ab].jpg",
            "[!a].jpg",
            "[a-c].*",
            ".*.jpg",
            "*/",
            "x*/",
            "*/*.jpg",
        ),
        *("*/a.jpg", "x/*", "x/y/*", "*/*/a.jpg", "./*.jpg", "x//*.jpg", "x/../*.jpg", "nothing*"),
        *("**/*.jpg", "**/a.jpg", "x/**/*.jpg", "x/**/a.jpg", "**/*.png", "x/**/y/*.jpg"),
        *("**/y/**/*.jpg", "[[]1]/*", "x/[[]1].jpg", "é*", "x y/*", "-*", "x/*/", "**/nothing*"),
    ],
)
def test_a_pattern_matches_what_bash_matches(here: Path, pattern: str) -> None:
    script = f"export LC_ALL=C.UTF-8; shopt -s globstar nullglob; printf '%s\\0' {pattern}"
    done = subprocess.run(
        ["bash", "-c", script.replace(" y/", "\\ y/")], capture_output=True, check=True
    )
    expected = [os.path.normpath(os.fsdecode(path)) for path in done.stdout.split(b"\0") if path]
    assert sorted(map(os.path.normpath, matches(pattern))) == sorted(set(expected))
    absolute = matches(f"{here}/{pattern}")
    assert [os.path.relpath(path) for path in absolute] == [
        *map(os.path.normpath, matches(pattern))
    ]


def test_matches_come_in_the_order_of_a_walk() -> None:
    assert matches("*.jpg") == ["-f.jpg", "10.jpg", "9.jpg", "B.jpg", "a.jpg", "b.jpg", "é.jpg"]
    walked = [name for name in names(".") if name.endswith(".jpg")]
    assert matches("**/*.jpg") == walked
    assert names("**") == names(".")
    assert names("x/**") == names("x/**/") == names("x")


def test_hidden_names_match_only_what_begins_with_a_dot() -> None:
    assert ".hidden.jpg" not in matches("*")
    assert matches(".h*") == [".hidden.jpg"]
    assert matches(".g*/*") == [".git/a.jpg"]
    assert not any("/." in path or path.startswith(".") for path in matches("**/*.jpg"))


def test_a_folder_that_matches_is_walked_and_nothing_in_it_comes_twice() -> None:
    assert matches("**/train") == ["train", "x/train"]
    assert names("**/train") == ["train/a.jpg", "train/train/c.jpg", "x/train/b.jpg"]
    for pattern in ("**/*", "**/x*", "**/**/*.jpg", "**/train/**", "**/t*/*", "x/**/**"):
        found = names(pattern)
        assert len(found) == len(set(found)), pattern


def test_links_back_do_not_make_a_pattern_endless() -> None:
    os.symlink("..", "x/up")
    os.symlink(".", "self")
    os.symlink("nowhere", "broken.jpg")
    found = matches("**/*.jpg")
    assert len(found) == len(set(found)) < 500
    assert "x/y/z/a.jpg" in found
    assert "broken.jpg" in found


def names_and_warnings(*arguments: str) -> tuple[list[str], list[str]]:
    warnings: list[str] = []
    return [source.name for source in find_images(arguments, warnings.append)], warnings


@pytest.mark.parametrize("pattern", ["d/*", "d/**/*.jpg", "d/**/*", "{here}/d/*", "?/*", "?"])
def test_a_link_back_to_a_folder_above_it_is_a_sentence_and_not_followed(
    here: Path, pattern: str
) -> None:
    os.makedirs("d/sub")
    Path("d/a.jpg").write_bytes(b"x")
    Path("d/sub/b.jpg").write_bytes(b"x")
    os.symlink(".", "d/self")
    os.symlink("../..", "d/sub/up")
    shutil.rmtree("1")  # so that ? matches d alone
    shutil.rmtree("x")
    found, warnings = names_and_warnings(pattern.format(here=here))
    top = f"{here}/" if "here" in pattern else ""
    assert found == [f"{top}d/a.jpg", f"{top}d/sub/b.jpg"]
    assert sorted(warnings) == [
        f"{top}d/{link}: a link back to a folder above it, not followed"
        for link in ("self", "sub/up")
    ]


def test_a_link_to_a_folder_elsewhere_is_matched_and_followed() -> None:
    os.symlink("../train", "x/elsewhere")
    found, warnings = names_and_warnings("x/**/*.jpg", "x/else*")
    assert found.count("x/elsewhere/a.jpg") == 2
    assert warnings == []


def test_an_argument_that_exists_is_itself_whatever_characters_it_has() -> None:
    assert names("x/[1].jpg") == ["x/[1].jpg"]
    assert names("[1]") == ["[1]/a.jpg"]
    Path("@x.jpg").write_bytes(b"x")
    Path("a*.jpg").write_bytes(b"x")
    assert names("@x.jpg", "a*.jpg") == ["@x.jpg", "a*.jpg"]
    os.remove("x/[1].jpg")
    assert names("x/[1].jpg") == ["x/1.jpg"]


def test_a_pattern_that_matches_nothing_is_missing_and_named() -> None:
    for pattern in ("nothing*", "x/*.gif", "[q].jpg", "nowhere/**/*.jpg", "nowhere/**", "c.png/*"):
        with pytest.raises(InputNotFoundError) as raised:
            find_images([pattern], print)
        assert str(raised.value) == f"no such file or folder: {pattern}, and nothing matches it"


def test_what_cannot_be_listed_matches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refusing(path: str) -> Any:
        if path == "x":
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert matches("x/*") == []
    assert "train/a.jpg" in matches("**/*.jpg")


def test_what_makes_a_pattern() -> None:
    assert all(map(has_pattern, ("*", "a?b", "[a]", "x/[")))
    assert not any(map(has_pattern, ("a.jpg", "a]b", "")))
