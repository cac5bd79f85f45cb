"""Stamps of files are compared only where they are known for certain."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from r2ncli.outputs.record import pack_stamps, read_stamps
from r2ncli.sources.content import Stamp

STAMPS = [Stamp(5, 1_700_000_000_123_456_789), None, Stamp(2**40, 7)]


def test_stamps_come_back_as_they_were_kept(tmp_path: Path) -> None:
    (tmp_path / "x.inputs").write_bytes(pack_stamps(STAMPS))
    assert list(islice(read_stamps(tmp_path / "x.inputs", 3), 5)) == [*STAMPS, None, None]


@pytest.mark.parametrize(
    "content", [b"", pack_stamps(STAMPS)[:-1], pack_stamps(STAMPS[:2]), bytes(48), b"\0" * 49]
)
def test_stamps_that_a_power_cut_lost_are_unknown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.inputs").write_bytes(content)
    assert list(islice(read_stamps(tmp_path / "x.inputs", 3), 3)) == [None] * 3
    assert list(islice(read_stamps(tmp_path / "absent"), 3)) == [None] * 3
