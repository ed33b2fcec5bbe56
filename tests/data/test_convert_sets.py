"""Conversions: every row by hand, broken ones named, the same bytes again, nothing half after a kill."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from cobra.data.conversations import read_rows
from cobra.data.prepare import convert
from cobra.data.prepare.convert import convert_lrv, convert_lvis, gather, write_rows
from cobra.errors import DataError

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat.\u2028"}]


def write(file: Path, rows: object) -> Path:
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def lvis_row(row_id: object, image: object) -> dict[str, Any]:
    return {"id": row_id, "image": image, "conversations": TALK}


def test_lvis_rows_keep_their_order_and_get_one_folder(tmp_path: Path) -> None:
    names = ["coco/train2017/1.jpg", "./coco/val2017/2.jpg", "train2017/3.jpg", "a/b/val2017/4.jpg"]
    source = write(tmp_path / "raw.json", [lvis_row(i, name) | {"extra": 1} for i, name in enumerate(names)])
    assert convert_lvis(source, tmp_path / "new.json") == 4
    expected = ["coco/train2017/1.jpg", "coco/val2017/2.jpg", "coco/train2017/3.jpg", "coco/val2017/4.jpg"]
    assert json.loads((tmp_path / "new.json").read_text()) == [lvis_row(i, name) for i, name in enumerate(expected)]


def test_lrv_rows_become_conversations(tmp_path: Path) -> None:
    rows = [
        {"image_id": "2392588", "question": "Is the cat black?", "answer": "No, it is white."},
        {"image_id": 17, "question": "How many?", "answer": 3},
    ]
    source = write(tmp_path / "filter_cap1.json", rows)
    assert convert_lrv(source, tmp_path / "new.json", "lrv-vg/{image_id}.jpg") == 2
    first, second = read_rows(tmp_path / "new.json")
    assert (first.id, first.image) == ("filter_cap1/0", "lrv-vg/2392588.jpg")
    assert first.turns == (("<image>\nIs the cat black?", "No, it is white."),)
    assert (second.image, second.turns[0][1]) == ("lrv-vg/17.jpg", "3")
    chart = write(tmp_path / "chart.json", [{"image_id": "chart_1.png", "question": "q", "answer": "a"}])
    convert_lrv(chart, tmp_path / "charts.json", "lrv-chart/{image_id}")
    assert read_rows(tmp_path / "charts.json")[0].image == "lrv-chart/chart_1.png"


def test_broken_rows_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = {"image_id": "1", "question": "q", "answer": "a"}
    rows: list[Any] = [good, 7, good | {"answer": " "}, good | {"image_id": None}, good | {"image_id": "../../x"}]
    rows += [good | {"question": "\ud800"}, {"image_id": "1", "question": "q"}, good | {"answer": True}, good]
    with caplog.at_level(logging.WARNING, "cobra"):
        assert convert_lrv(write(tmp_path / "raw.json", rows), tmp_path / "new.json", "{image_id}.jpg") == 2
    assert [row.id for row in read_rows(tmp_path / "new.json")] == ["raw/0", "raw/8"]
    (message,) = caplog.messages
    assert "7 rows are left out of new.json" in message
    assert "3 x no answer (row 2: 'answer' must be a text, not ' '; row 6:" in message
    assert "2 x no image_id (row 1:" in message and "image leaves the folder (row 4" in message
    with caplog.at_level(logging.WARNING, "cobra"):
        lvis = [lvis_row(1, "train2017/a.jpg"), lvis_row(2, "vg/1.jpg"), "text"]
        assert convert_lvis(write(tmp_path / "lvis.json", lvis), tmp_path / "lvis_new.json") == 1
    assert "1 x not a COCO image (row 1: 'vg/1.jpg' is in neither" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "holds no good row: 2 x no image_id"),
        ("<html>quota exceeded</html>", "is not valid JSON"),
        ('[{"image_id": "1", "question": "q", "answer": "a"}, {"im', "is not valid JSON: row 1"),
    ],
)
def test_useless_source_is_refused_and_leaves_nothing(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "raw.json").write_text(content)
    with pytest.raises(DataError, match=message):
        convert_lrv(tmp_path / "raw.json", tmp_path / "new.json", "{image_id}")
    assert [path.name for path in tmp_path.iterdir()] == ["raw.json"]


def test_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read the annotations .*raw\.json"):
        convert_lvis(tmp_path / "raw.json", tmp_path / "new.json")


def test_converting_again_changes_nothing(tmp_path: Path) -> None:
    source, target = write(tmp_path / "raw.json", [lvis_row(1, "train2017/a.jpg")]), tmp_path / "new.json"
    convert_lvis(source, target)
    os.utime(target, ns=(5, 5))
    before = target.stat()
    convert_lvis(source, target)
    assert (target.stat().st_mtime_ns, target.stat().st_ino) == (5, before.st_ino)
    write(source, [lvis_row(2, "train2017/a.jpg")])
    convert_lvis(source, target)
    assert [row.id for row in read_rows(target)] == ["2"]


def test_killed_conversion_leaves_the_old_file(tmp_path: Path) -> None:
    source, target = write(tmp_path / "raw.json", [lvis_row(i, "train2017/a.jpg") for i in range(500)]), tmp_path / "n"
    convert_lvis(source, target)
    content = target.read_bytes()
    write(source, [lvis_row(i, "train2017/a.jpg") for i in range(900)])
    if not (child := os.fork()):
        original = convert.parse_row

        def parse(raw: Any, number: int) -> Any:
            if number == 700:
                os.kill(os.getpid(), 9)
            return original(raw, number)

        convert.parse_row = parse
        convert_lvis(source, target)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert target.read_bytes() == content
    assert convert_lvis(source, target) == 900 and len(read_rows(target)) == 900
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n", "raw.json"]


def test_no_rows_are_an_empty_list(tmp_path: Path) -> None:
    assert write_rows(tmp_path / "a.json", []) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == []


class TestGather:
    def test_files_lose_their_folders(self, tmp_path: Path) -> None:
        for name in ("top/1.jpg", "top/deep/2.gif", "3.png"):
            (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "from" / name).write_text(name)
        (tmp_path / "to").mkdir()
        (tmp_path / "to" / "0.jpg").touch()  # moved before a kill
        assert gather(tmp_path / "from", tmp_path / "to") == 4
        assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["0.jpg", "1.jpg", "2.gif", "3.png"]
        assert not (tmp_path / "from").exists()
        assert gather(tmp_path / "from", tmp_path / "to") == 4

    def test_other_file_is_not_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "from").mkdir()
        (tmp_path / "to").mkdir()
        for name, content in (("from/same", "1"), ("to/same", "1")):
            (tmp_path / name).write_text(content)
        assert gather(tmp_path / "from", tmp_path / "to") == 1
        (tmp_path / "from").mkdir()
        (tmp_path / "from" / "same").write_text("2")
        with pytest.raises(DataError, match="which is another file"):
            gather(tmp_path / "from", tmp_path / "to")
        assert (tmp_path / "to" / "same").read_text() == "1"

    def test_other_file_gives_way_where_asked(self, tmp_path: Path) -> None:
        for name in ("from/one", "from/a/two", "from/b/two", "to/one", "to/two"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        with pytest.raises(DataError, match="two, which is another file"):  # which of the two is it?
            gather(tmp_path / "from", tmp_path / "to", replace=True)
        for name in ("from/a/two", "from/b/two"):
            (tmp_path / name).unlink(missing_ok=True)
        assert gather(tmp_path / "from", tmp_path / "to", replace=True) == 2
        assert (tmp_path / "to" / "one").read_text() == "from/one" and not (tmp_path / "from").exists()

    def test_hidden_files_stay(self, tmp_path: Path) -> None:
        (tmp_path / "from").mkdir()
        (tmp_path / "from" / ".done").touch()
        assert gather(tmp_path / "from", tmp_path / "to") == 0
        assert (tmp_path / "from" / ".done").exists()
