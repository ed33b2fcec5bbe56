"""A summary over benchmarks: the paper's nine columns, what is missing, what is no fair comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cobra.eval import summary
from cobra.releases import COLUMNS

WHOLE = dict(zip(COLUMNS, (214_354, 12_578, 4_319, 5_000, 1_222, 9_000, 10_834, 10_758, 4_896), strict=True))
PAPER = dict(zip(COLUMNS, (77.8, 62.3, 49.7, 58.2, 58.4, 88.4, 52.7, 45.6, 46.9), strict=True))


def results(column: str, accuracy: float, *, is_whole: bool = True) -> dict[str, Any]:
    numbers = {"accuracy": accuracy, "interval_95": [accuracy - 2, accuracy + 2]}
    found = {
        "part": "", "questions": WHOLE[column] if is_whole else 100, "reference": PAPER[column], "is_whole": is_whole,
        "rules": {"official": numbers | {"accuracy": accuracy - 1}, "paper": numbers},
    }  # fmt: skip
    return {"benchmark": column.lower(), "model": "runs/mine", "paper_row": "cobra-3b", "columns": {column: found}}


@pytest.mark.parametrize("count", [1, 4, 9])
def test_summary_has_all_nine_columns(tmp_path: Path, count: int) -> None:
    columns = list(COLUMNS)[:count]
    summary.write(tmp_path, [results(column, 50 + i) for i, column in enumerate(columns)], [])
    data = json.loads((tmp_path / "summary.json").read_text())
    assert list(data["columns"]) == list(COLUMNS)
    for i, column in enumerate(COLUMNS):
        found = data["columns"][column]
        assert (found is None) == (i >= count)
        assert found is None or found["difference"] == pytest.approx(50 + i - PAPER[column])
    text = (tmp_path / "summary.md").read_text()
    assert "| VQA-v2 | 214,354 | 49.00 | 48.00 to 52.00 | 50.00 | 48.00 to 52.00 | 77.80 | -27.80 | 78.50 |" in text
    assert text.count("not evaluated |") == 9 - count and "no fair comparison" not in text
    assert ("Table 5" in text) == (count == 9)
    with Image.open(tmp_path / "summary.png") as image:
        assert image.height < 700 and image.width > 600


def test_limited_benchmarks_have_no_difference(tmp_path: Path) -> None:
    easy = results("POPE", 90, is_whole=False)
    other = {**results("GQA", 70), "columns": {"easyvqa": {
        "part": "", "questions": 9, "reference": None, "is_whole": False,
        "rules": {"official": {"accuracy": 66.0, "interval_95": [60, 70]}},
    }}}  # fmt: skip
    summary.write(tmp_path, [easy, other], [])
    text = (tmp_path / "summary.md").read_text()
    assert "| POPE | 100 | 89.00 | 88.00 to 92.00 | 90.00 | 88.00 to 92.00 | 88.40 | — | 85.90 |" in text
    assert "| easyvqa | 9 | 66.00 | 60.00 to 70.00 | — | — | — | — | — |" in text
    assert "no fair comparison" in text and "8 of the paper's 9 columns are not evaluated" in text
