"""Control characters of names, labels and messages are escaped where they enter."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.networks import TINY_ARCHITECTURE

import r2ncli
from r2ncli.errors import CheckpointError, ImageError, escaped
from r2ncli.model import Res2Net
from r2ncli.outputs.results import read_rows
from r2ncli.sources.names import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *(("a\0b", r"a\x00b"), ("\x1b[31m", r"\x1b[31m"), ("\x7f", r"\x7f"), ("\n\t", r"\x0a\x09")),
        *(("\x9b", r"\xc2\x9b"), ("\udcff", r"\xff"), ("\ud800", r"\xed\xa0\x80")),
        *((r"\x00", r"\x00"), ("é画\u2028", "é画\u2028"), ("", "")),
    ],
)
def test_control_characters_and_lone_surrogates_are_escaped(text: str, shown: str) -> None:
    assert escaped(text) == shown
    assert escaped(shown) == shown
    shown.encode()


def test_a_name_can_be_told_from_one_that_looks_like_its_escape() -> None:
    assert printable("a\0") == r"a\x00"
    assert printable(r"a\x00") == r"a\x5cx00"


@pytest.mark.parametrize("kind", [CheckpointError, ImageError])
def test_a_message_has_no_control_characters_and_stays_itself_when_pickled(kind: type) -> None:
    error = kind("x\0.pth: holds \x1b]0;title\x07")
    assert str(error) == r"x\x00.pth: holds \x1b]0;title\x07"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.fixture
def hostile_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an archive whose member has a NUL in its name, and labels with one."""
    monkeypatch.chdir(tmp_path)
    torch.save(Res2Net(TINY_ARCHITECTURE).state_dict(), "tiny.pth")
    labels = [f"\0label\x9b {number}\ud800" for number in range(TINY_ARCHITECTURE.classes)]
    Path("tiny.pth.json").write_text(json.dumps({"labels": labels}))
    image = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(image, "PNG")
    with tarfile.open("a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("x\0y\x1b.png", "z.png"):
            member = tarfile.TarInfo("pax")
            member.pax_headers = {"path": name}
            member.size = len(image.getvalue())
            archive.addfile(member, io.BytesIO(image.getvalue()))
    return tmp_path


@pytest.mark.parametrize("output", ["out.h5", "out.csv", "out.jsonl", "out.parquet"])
def test_names_and_labels_with_a_nul_are_written_read_and_resumed(
    hostile_words: Path, output: str
) -> None:
    if output.endswith("parquet"):
        pytest.importorskip("pyarrow")
    run = r2ncli.extract_to if output.endswith("h5") else r2ncli.classify_to
    for resume in (False, True):
        run(output, "a.tar", weights="tiny.pth", image_size=32, resume=resume)
        rows = list(read_rows(Path(output)))
        assert [row.path for row in rows] == [r"a.tar!x\x00y\x1b.png", "a.tar!z.png"]
        assert [row.error for row in rows] == [None, None]
        if output != "out.h5":
            assert rows[0].predictions[0].label.startswith(r"\x00label\xc2\x9b ")
