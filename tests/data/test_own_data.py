"""Own data: three formats become one, every problem has its line, the config trains."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import hydra
import pytest
from data_sets import TRANSFORM
from PIL import Image

from cobra.config import PretrainConfig, as_config
from cobra.data.conversations import read_rows
from cobra.data.dataset import open_data
from cobra.data.prepare.own import prepare_own
from cobra.errors import ConfigError, DataError
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ROWS = [
    {"image": "1.png", "question": "What is it?", "answer": 'A "cat", asleep.'},
    {"image": "sub/2.png", "question": "Two\nlines?", "answer": "yes\u2028no"},
    {"image": "1.png", "question": "How many?", "answer": "3"},
]


def make_images(folder: Path) -> Path:
    (folder / "images" / "sub").mkdir(parents=True)
    for name in ("1.png", "sub/2.png"):
        Image.new("RGB", (8, 8)).save(folder / "images" / name)
    return folder / "images"


def write(folder: Path, ending: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"rows{ending}"
    if ending == ".json":
        file.write_text(json.dumps(rows, indent=1))
    elif ending == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with file.open("w", newline="", encoding="utf-8-sig") as handle:
            writer = csv.DictWriter(handle, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return file


def prepare(folder: Path, file: Path) -> Path:
    return prepare_own(file, folder / "images", "mine", folder / "out", folder / "configs" / "data")


def problems_of(folder: Path, content: str, ending: str) -> list[str]:
    file = folder / f"rows{ending}"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        prepare(folder, file)
    assert not (folder / "configs").exists() and not (folder / "out" / "mine.json").exists()
    listed = (folder / "out" / "mine-problems.txt").read_text().splitlines()
    assert f"has {len(listed):,} problems" in str(caught.value) and listed[0] in str(caught.value)
    return listed


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_all_formats_give_the_same_rows(tmp_path: Path, ending: str) -> None:
    make_images(tmp_path)
    prepare(tmp_path, write(tmp_path, ending, ROWS))
    rows = read_rows(tmp_path / "out" / "mine.json")
    assert [row.id for row in rows] == ["row 0", "row 1", "row 2"]
    assert [row.image for row in rows] == [row["image"] for row in ROWS]
    assert [row.turns for row in rows] == [((f"<image>\n{row['question']}", row["answer"]),) for row in ROWS]


def test_conversations_numbers_and_text_alone(tmp_path: Path) -> None:
    make_images(tmp_path)
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}] * 2
    rows: list[dict[str, Any]] = [
        {"id": 0, "image": "1.png", "conversations": talk},
        {"id": "", "image": None, "question": "q", "answer": 3},
    ]
    prepare(tmp_path, write(tmp_path, ".json", rows))
    first, second = read_rows(tmp_path / "out" / "mine.json")
    assert (first.id, first.turns) == ("0", (("a", "b"), ("a", "b")))
    assert (second.id, second.image, second.turns) == ("row 1", None, (("q", "3"),))


def test_config_is_ready_for_training(tmp_path: Path, tokenizer: Tokenizer) -> None:
    images = make_images(tmp_path)
    assert prepare(tmp_path, write(tmp_path, ".csv", ROWS)) == tmp_path / "configs" / "data" / "mine.yaml"
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        search = f"hydra.searchpath=[file://{tmp_path}/configs]"
        composed = hydra.compose("pretrain", [search, "+experiment=tiny", "data=mine", f"paths.data={tmp_path}/data"])
    config = as_config(PretrainConfig, composed).data
    data = open_data(config, tokenizer, prompt_format("mamba"), TRANSFORM, max_length=64, captions_only=False)
    assert data.num_rows == 3 and data[(0, 2)].ids == ("row 0", "row 2")
    assert Path(str(config.images)) == images


def test_every_problem_of_a_json_list_has_its_line(tmp_path: Path) -> None:
    make_images(tmp_path)
    (tmp_path / "images" / "broken.png").write_bytes(b"nothing")
    rows = [
        '{"image": "1.png", "question": "q", "answer": "a"}',
        '{"image": "1.png",\n  "question": "q"}',
        '"text"',
        '{"image": "gone.png", "question": "q", "answer": "a"}',
        '{"image": "broken.png", "question": "q", "answer": "a"}',
        '{"image": "../1.png", "question": "q", "answer": "a"}',
        '{"id": 1, "question": " ", "answer": "a"}',
        '{"id": 1, "question": "q", "answer": "a"}',
        '{"id": 1, "question": "q", "answer": "a"}',
        '{"conversations": [{"from": "human", "value": "q"}]}',
        '{"question": "q", "answer"}',
        '{"question": ""}',
    ]
    found = problems_of(tmp_path, "[\n" + ",\n".join(rows) + "\n]", ".json")
    starts = [
        "3: 'answer' must",
        "5: not an object",
        "6: image gone.png is no file",
        "7: image broken.png cannot be used",
    ]
    starts += ["8: \"image\" '../1.png' leaves", "9: 'question' must be", "11: id '1' is that of line 10"]
    starts += ["12: the conversation has no answer", "13: not JSON: Expecting ':'"]
    assert len(found) == len(starts)
    for line, start in zip(found, starts, strict=True):
        assert line.startswith(f"line {start}"), line


def test_every_problem_of_json_lines_has_its_line(tmp_path: Path) -> None:
    make_images(tmp_path)
    good = json.dumps(ROWS[0])
    found = problems_of(tmp_path, f"{good}\n{{\n\n{good}\n[]\n{good[:-1]}\n", ".jsonl")
    assert [line.partition(":")[0] for line in found] == ["line 2", "line 5", "line 6"]


def test_every_problem_of_csv_has_its_line(tmp_path: Path) -> None:
    make_images(tmp_path)
    content = 'Image, Question ,answer\n1.png,"two\nlines",a\n1.png,q\n1.png,"q"x,a\n,q,a\n1.png,,a\n\n3.png,q,a\n'
    found = problems_of(tmp_path, content, ".csv")
    starts = ["4: 2 cells, not 3", "5: not CSV", "7: 'question' must be", "9: image 3.png is no file"]
    assert [line.startswith(f"line {start}") for line, start in zip(found, starts, strict=True)] == [True] * 4, found
    header = problems_of(tmp_path, "image;question;answer\n1.png;q;a\n", ".csv")
    assert header == ["line 1: the header 'image;question;answer' lacks answer, image, question; separate with commas."]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"image": "1.png"}', "line 1: the file is no JSON list: it does not start with '['."),
        ('[{"question": "q", "answer": "a"}\n', "line 2: after a row stands the end instead of ',' or ']'."),
        ('[{"question": "q", "answer": "a"}]\n\n[]', "line 3: more text follows the list."),
        ('[{"question": "q", "answer": "a"},', "line 1: not JSON: Expecting value."),
        ('[{"question": "q", "answer": "a"},\n\n]', "line 1: a comma follows the last row."),
    ],
)
def test_json_that_ends_early_or_late(tmp_path: Path, content: str, problem: str) -> None:
    make_images(tmp_path)
    assert problems_of(tmp_path, content, ".json") == [problem]


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_integers_that_python_does_not_read(tmp_path: Path, ending: str) -> None:
    make_images(tmp_path)
    row = f'{{"question": "q", "answer": {"9" * 5000}}}'
    (found,) = problems_of(tmp_path, f"[{row}]" if ending == ".json" else row, ending)
    assert found.startswith("line 1: not JSON: Exceeds the limit")


def test_column_that_is_there_twice(tmp_path: Path) -> None:
    make_images(tmp_path)
    found = problems_of(tmp_path, "image,question,answer,Answer\n1.png,q,a,b\n", ".csv")
    assert found == ["line 1: the header has answer more than once."]


def test_place_of_the_image_may_be_written_out(tmp_path: Path) -> None:
    make_images(tmp_path)
    prepare(tmp_path, write(tmp_path, ".csv", [ROWS[0] | {"question": "<image>\nWhat is it?"}]))
    assert read_rows(tmp_path / "out" / "mine.json")[0].turns == (("<image>\nWhat is it?", 'A "cat", asleep.'),)


def test_many_problems_are_all_in_the_file(tmp_path: Path) -> None:
    make_images(tmp_path)
    found = problems_of(tmp_path, "\n".join(["{}"] * 100), ".jsonl")
    assert [line.partition(":")[0] for line in found] == [f"line {number}" for number in range(1, 101)]


def test_mended_data_replaces_the_list_of_problems(tmp_path: Path) -> None:
    make_images(tmp_path)
    problems_of(tmp_path, "{}", ".jsonl")
    prepare(tmp_path, write(tmp_path, ".jsonl", ROWS))
    config = prepare(tmp_path, write(tmp_path, ".jsonl", ROWS[:1]))  # again, with other rows
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.json"]
    assert len(read_rows(tmp_path / "out" / "mine.json")) == 1 and config.exists()


def test_what_cannot_be_prepared_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, ".jsonl", ROWS)
    with pytest.raises(DataError, match="There is no image folder"):
        prepare(tmp_path, file)
    images = make_images(tmp_path)
    with pytest.raises(ConfigError, match="is no name for a data set"):
        prepare_own(file, images, "../x", tmp_path / "out", tmp_path)
    with pytest.raises(DataError, match=r"must end in \.json, \.jsonl, \.csv"):
        prepare(tmp_path, tmp_path / "rows.xlsx")
    with pytest.raises(DataError, match=r"Cannot read .*none\.csv: No such file"):
        prepare(tmp_path, tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("image,question,answer\n1.png,é,a".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        prepare(tmp_path, tmp_path / "latin.csv")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="holds no row"):
        prepare(tmp_path, tmp_path / "empty.jsonl")
    other = tmp_path / "mine.yaml"
    other.write_text("name: mine\n")
    with pytest.raises(ConfigError, match="was written by somebody else"):
        prepare_own(file, images, "mine", tmp_path / "out", other)
    assert other.read_text() == "name: mine\n"
