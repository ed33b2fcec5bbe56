"""easy-VQA from its package: complete, made once, foreign folders left alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cobra.data import easyvqa
from cobra.data.conversations import read_rows
from cobra.errors import DataError


@pytest.fixture(scope="module")
def easyvqa_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("easy_vqa")
    from cobra.data.easyvqa import prepare

    folder = tmp_path_factory.mktemp("prepared") / "easyvqa"
    prepare(folder)
    return folder


@pytest.mark.parametrize(("split", "num_images", "num_rows"), [("train", 4000, 38575), ("test", 1000, 9673)])
def test_easyvqa_is_complete(easyvqa_folder: Path, split: str, num_images: int, num_rows: int) -> None:
    rows = read_rows(easyvqa_folder / f"{split}.json")
    assert len(rows) == num_rows
    assert len({row.id for row in rows}) == num_rows
    images = {row.image for row in rows}
    assert images == {f"{split}/{file.name}" for file in (easyvqa_folder / "images" / split).iterdir()}
    assert len(images) == num_images
    answers = {row.turns[0][1] for row in rows}
    assert {"Yes", "No", "circle"} < answers and not {"yes", "no"} & answers


def test_easyvqa_leaves_a_foreign_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is not empty and holds no easy-VQA"):
        easyvqa.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_easyvqa_is_made_once(easyvqa_folder: Path) -> None:
    from cobra.data.easyvqa import prepare

    before = (easyvqa_folder / "train.json").stat().st_mtime_ns
    prepare(easyvqa_folder)
    assert (easyvqa_folder / "train.json").stat().st_mtime_ns == before


def test_easyvqa_is_made_by_one_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("easy_vqa")
    made: list[Path] = []
    original = easyvqa._prepare
    monkeypatch.setattr(easyvqa, "_prepare", lambda folder: (made.append(folder), original(folder)))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(easyvqa.prepare, [tmp_path / "new" / "easyvqa"] * 3))
    assert len(made) == 1 and (tmp_path / "new" / "easyvqa" / "train.json").is_file()
