"""Every combination of depth, layout and transparency is right, or refused with its name."""

from __future__ import annotations

from types import ModuleType

import pytest
from support.scripts import example


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return example("image_table", monkeypatch)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about metadata, which r2n ignores
def test_some_hundred_combinations_are_right_or_refused(table: ModuleType) -> None:
    document = table.check(list(table.OWN), own=True, every=7)
    assert document["garbled"] == []
    assert sum(found["equal"] for found in document["formats"].values()) > 500


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_combination_is_right_or_refused(table: ModuleType) -> None:
    for module in ("imagecodecs", "tifffile", "cv2"):
        pytest.importorskip(module)
    document = table.check(list(table.CELLS), own=False)
    assert document["garbled"] == []
    assert sum(found["cells"] for found in document["formats"].values()) >= 1500


def test_a_garbled_image_and_a_refusal_without_a_name_are_found(table: ModuleType) -> None:
    cell = next(table.png_cells(True))
    assert table.verdict(cell)[0] == "equal"
    negative = table.Cell("PNG", "negative", cell.content, 255 - cell.truth)
    truncated = table.Cell("PNG", "cut", cell.content[:60], cell.truth)
    unknown = table.Cell("PNG", "unknown", cell.content, None)
    for wrong in (negative, truncated, unknown):
        assert table.verdict(wrong)[0] == "garbled"
