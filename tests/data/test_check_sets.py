"""The check of a finished folder: what is missing, broken, doubled or left over is counted and named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from data_sets import make_config, make_folder, make_row, write_rows
from PIL import Image

from cobra.config.train import DataConfig, DataSetConfig
from cobra.data import images as images_module
from cobra.data.index import open_index
from cobra.data.prepare.check import CheckReport, check, rows_to_check
from cobra.data.prepare.report import write_report
from cobra.data.sizes import image_sizes
from cobra.errors import DataError
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def make_noise(folder: Path, name: str) -> Path:
    """An image whose header survives when its end is cut off."""
    file = folder / "images" / name
    Image.fromarray(NOISE).save(file, quality=95)
    return file


def check_folder(folder: Path, *, full: bool = False) -> CheckReport:
    return check(make_config(folder), full=full, jobs=1)


def test_folder_in_order(tmp_path: Path) -> None:
    make_folder(tmp_path)
    report = check_folder(tmp_path, full=True)
    (part,) = report.sets
    assert report.is_good
    assert (part.rows, part.text_rows, part.images) == (5, 1, 3)
    assert (part.missing, part.broken, part.orphans) == ([], {}, [])
    assert (part.duplicate_ids, part.problems.empty_answers) == (0, 0)


def test_everything_wrong_is_counted_and_named(tmp_path: Path) -> None:
    make_folder(tmp_path)
    cut = make_noise(tmp_path, "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:-400])
    (tmp_path / "images" / "page.jpg").write_text("<html>")
    (tmp_path / "images" / "empty.png").touch()
    (tmp_path / "images" / "sub" / "left.png").touch()
    names = ["0.png", "gone.jpg", "cut.jpg", "page.jpg", "empty.png", "sub/2.png", "sub/2.png"]
    rows: list[object] = [make_row(i, name) for i, name in enumerate(names)]
    rows += [make_row(0, None, answer=" "), make_row(1, None), make_row("new", "0.png", question="<image>\nq"), 7]
    write_rows(tmp_path, rows)

    fast, full = (check_folder(tmp_path, full=full).sets[0] for full in (False, True))
    assert fast.missing == full.missing == ["gone.jpg"]
    assert set(fast.broken) == {"page.jpg", "empty.png"} and set(full.broken) == {"page.jpg", "empty.png", "cut.jpg"}
    assert "truncated" in full.broken["cut.jpg"] and "unknown format" in fast.broken["page.jpg"]
    assert fast.orphans == ["1.png", "sub/left.png"]
    assert fast.duplicate_ids == 2  # 0 and 1
    assert fast.duplicate_questions == 2  # sub/2.png and 0.png; rows of text alone have no image
    assert (fast.rows, fast.text_rows, fast.problems.empty_answers) == (10, 2, 1)
    assert fast.problems.counts == {"not an object": 1} and not fast.is_good


def test_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    monkeypatch.setattr(images_module, "_PER_TASK", 2)
    cut = make_noise(tmp_path, "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:-400])
    names = ["0.png", "cut.jpg", "1.png", "sub/2.png", "gone.png"]
    found = [images_module.probe_images(tmp_path / "images", names, "five", decode=True, jobs=jobs) for jobs in (1, 2)]
    assert found[0][0].tolist() == found[1][0].tolist() == [[8, 8], [0, 0], [8, 8], [8, 8], [0, 0]]
    assert found[0][1] == found[1][1] and set(found[0][1]) == {1, 4}


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    (part,) = check(make_config(tmp_path), full=True).sets
    assert part.missing == ["0.png", "1.png", "sub/2.png"] and part.orphans == []


def end_process(*_: object, **__: object) -> None:
    os.kill(os.getpid(), 9)


def test_killed_process_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    monkeypatch.setattr(images_module, "_PER_TASK", 1)
    monkeypatch.setattr(images_module, "_probe", end_process)
    with pytest.raises(DataError, match="images of five was killed, perhaps for want of memory"):
        images_module.probe_images(tmp_path / "images", ["0.png", "1.png"], "five", decode=False, jobs=2)


def test_images_that_sets_share_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    (tmp_path / "images" / "other.png").touch()
    (tmp_path / "b.json").write_text(json.dumps([make_row("b", "0.png"), make_row("c", "other.png")]))
    read: list[str] = []
    original = images_module._probe_one
    monkeypatch.setattr(
        images_module, "_probe_one", lambda file, decode: (read.append(file.name), original(file, decode))[1]
    )
    mix = {
        name: DataSetConfig(annotations=f"{tmp_path}/{name}.json", images=f"{tmp_path}/images") for name in ("a", "b")
    }
    report = check(DataConfig(name="both", mix=mix, index=str(tmp_path / "index")), jobs=1)
    assert sorted(read) == ["0.png", "1.png", "2.png", "other.png"]
    assert [list(part.broken) for part in report.sets] == [[], ["other.png"]]
    assert [part.orphans for part in report.sets] == [[], []]


def test_report_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    make_folder(tmp_path)
    (tmp_path / "images" / "0.png").unlink()
    (tmp_path / "images" / "1.png").write_text("x")
    prompt = prompt_format("mamba")
    report = check(make_config(tmp_path), jobs=1, tokens=(tokenizer, prompt))
    report.unmet.append("three are missing")
    write_report(report, tmp_path / "check")
    found = json.loads((tmp_path / "check" / "report.json").read_text())
    assert (found["check"], found["is_good"], found["unmet"]) == ("fast", False, ["three are missing"])
    part = found["sets"]["five"]
    assert (part["images"], part["images present"], part["images missing"], part["images broken"]) == (3, 1, 1, 1)
    lengths = [
        sum(len(tokenizer.encode(segment.text)) for segment in prompt.conversation((("q", "a" * (i + 1)),)))
        for i in range(5)
    ]
    assert (part["tokens"]["longest"], part["tokens"]["median"]) == (max(lengths), sorted(lengths)[2])
    text = (tmp_path / "check" / "report.md").read_text()
    assert "# five: not in order" in text and "- three are missing" in text and "| images missing | 1 |" in text
    assert (tmp_path / "check" / "missing_images.txt").read_text() == "0.png\n"
    assert (tmp_path / "check" / "broken_images.txt").read_text() == "1.png\tunknown format or damaged\n"
    assert Image.open(tmp_path / "check" / "lengths.png").size[0] > 300

    make_folder(tmp_path / "new")
    write_report(check(make_config(tmp_path / "new"), jobs=1), tmp_path / "check")
    assert "# five: complete" in (tmp_path / "check" / "report.md").read_text()
    assert not (tmp_path / "check" / "missing_images.txt").exists()


def test_benchmark_is_checked_as_rows(tmp_path: Path) -> None:
    make_folder(tmp_path)
    images = tmp_path / "images"
    questions = [("1", images / "0.png", "q?", "a"), ("2", images / "none.png", "q?", "a")]
    (part,) = check(rows_to_check("bench", questions, tmp_path / "out"), jobs=1).sets
    assert (part.name, part.rows, part.missing) == ("bench", 2, ["none.png"])
    questions.append(("3", images / "sub" / "2.png", "q?", "a"))
    with pytest.raises(DataError, match="must lie in one folder"):
        rows_to_check("bench", questions, tmp_path / "out")


class TestSizes:
    def test_sizes_are_those_of_the_images(self, tmp_path: Path) -> None:
        make_folder(tmp_path)
        make_noise(tmp_path, "1.png")
        (tmp_path / "images" / "sub" / "2.png").unlink()
        index = open_index(tmp_path / "a.json", "five", tmp_path / "index")
        sizes = image_sizes(index, "five", tmp_path / "images", jobs=1)
        assert sizes.dtype == np.int32 and sizes.tolist() == [[8, 8], [60, 40], [0, 0]]
        assert sizes[index.images][[0, 1, 3, 4]].tolist() == [[8, 8], [60, 40], [60, 40], [0, 0]]

    def test_sizes_are_read_once_and_again_after_a_change(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_folder(tmp_path)
        check_folder(tmp_path)  # keeps what it read
        index = open_index(tmp_path / "a.json", "five", tmp_path / "index")
        with monkeypatch.context() as patch:
            patch.setattr(images_module, "_probe_one", None)
            assert image_sizes(index, "five", tmp_path / "images", jobs=1).tolist() == [[8, 8]] * 3
        make_noise(tmp_path, "0.png")
        assert image_sizes(index, "five", tmp_path / "images", jobs=1)[0].tolist() == [60, 40]
