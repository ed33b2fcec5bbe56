"""Annotation files that are empty, or rows in them that cannot be asked or scored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from official import FOLDERS, config_of, configured, rows_of

from cobra.config import PathsConfig, ScoreConfig
from cobra.errors import DataError
from cobra.eval.run import evaluate
from cobra.eval.scoring import score


@pytest.fixture
def data_root(assets: Path) -> Path:
    return assets / "fixtures" / "scorers" / "data_root"


@pytest.fixture
def copied(data_root: Path, tmp_path: Path) -> Callable[..., Path]:
    """A benchmark's annotations with one file changed: `change(text) -> text`."""

    def copy(name: str, file: str, change: Callable[[str], str]) -> Path:
        folder = tmp_path / FOLDERS[name]
        shutil.copytree(data_root / FOLDERS[name], folder, ignore=shutil.ignore_patterns("*.jpg"))
        (folder / file).write_text(change((folder / file).read_text()))
        return tmp_path

    return copy


@pytest.mark.parametrize(
    ("name", "file", "empty"),
    [("vsr", "test.jsonl", ""), ("gqa", "testdev_balanced_questions.json", "{}"), ("vizwiz", "val.json", "[]")],
)
def test_empty_annotations_are_said_to_be_empty(
    copied: Callable[..., Path], tmp_path: Path, name: str, file: str, empty: str
) -> None:
    root = copied(name, file, lambda _: empty)
    (tmp_path / "answers.jsonl").write_text('{"prediction": "x"}\n')
    words = rf"annotations of {name} hold no questions \(looked for in {root}\)"
    with pytest.raises(DataError, match=words):
        evaluate(config_of(tmp_path / "model", tmp_path / "out"), configured(name, root))
    with pytest.raises(DataError, match=words):
        score(ScoreConfig(paths=PathsConfig(), predictions=str(tmp_path / "answers.jsonl")), configured(name, root))


def change_first(key: str, value: Any, rows: str = "") -> Callable[[str], str]:
    def change(text: str) -> str:
        data = json.loads(text)
        row = (data[rows] if rows else data)[0]
        if value is None:
            del row[key]
        else:
            row[key] = value
        return json.dumps(data)

    return change


@pytest.mark.parametrize(
    ("name", "file", "change", "words"),
    [
        ("vqav2", "v2_val2014_annotations.json", change_first("answers", [], "annotations"), r"question \d+ has no an"),
        (
            "vqav2",
            "v2_val2014_annotations.json",
            change_first("answers", None, "annotations"),
            r"question \d+ has no an",
        ),
        ("vizwiz", "val.json", change_first("answers", []), r"question VizWiz_val_\d+.jpg has no answers"),
        ("vizwiz", "val.json", change_first("answers", None), r"question VizWiz_val_\d+.jpg has no answers"),
        ("textvqa", "TextVQA_0.5.1_val.json", change_first("question_id", "a1", "data"), "'a1' is no whole number"),
        ("textvqa", "TextVQA_0.5.1_val.json", change_first("image_id", None, "data"), "has no 'image_id'"),
    ],
)
def test_row_that_cannot_be_used_is_named(
    copied: Callable[..., Path], name: str, file: str, change: Callable[[str], str], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        configured(name, copied(name, file, change)).questions()


def test_ids_of_vqav2_are_numbers(copied: Callable[..., Path]) -> None:
    root = copied("vqav2", "v2_val2014_annotations.json", lambda text: text.replace("300097000", '"x"'))
    file = root / "vqa-v2" / "v2_val2014_questions.json"
    file.write_text(file.read_text().replace("300097000", '"x"'))
    with pytest.raises(DataError, match="'x' is no whole number"):
        configured("vqav2", root).questions()


def test_vqav2_takes_any_number_of_answers(copied: Callable[..., Path]) -> None:
    """As its script does."""
    change = change_first("answers", [{"answer": "yes", "answer_id": 1}], "annotations")
    benchmark = configured("vqav2", copied("vqav2", "v2_val2014_annotations.json", change))
    assert benchmark.questions()[0].truth[0] == ("yes",)


def test_braces_in_textvqas_texts_stay(copied: Callable[..., Path]) -> None:
    def change(text: str) -> str:
        first, rest = text.split("\n", 1)
        row = json.loads(first) | {"text": "What is {ocr}?\nReference OCR token: {question}, {ocr}\nAnswer"}
        return json.dumps(row) + "\n" + rest

    benchmark = configured("textvqa", copied("textvqa", "textvqa_val_v051_ocr.jsonl", change))
    texts = {q.part: q.text.rpartition("\n")[0] for q in benchmark.questions()[::109]}
    assert texts == {
        "ocr_first": "Reference OCR token: {question}, {ocr}\nWhat is {ocr}?",
        "ocr_last": "What is {ocr}?\nReference OCR token: {question}, {ocr}",
        "no_ocr": "What is {ocr}?",
    }


def test_results_of_fewer_answers_do_not_outlive_new_ones(
    trained_run: Path, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = configured("vsr", data_root)
    evaluate(config_of(trained_run, tmp_path, limit=3), benchmark)
    made = {"results.json", "scores.jsonl", "report.md", "examples.html", "examples.png"}
    assert made <= {file.name for file in tmp_path.iterdir()}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cobra.eval.run.ask", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config_of(trained_run, tmp_path, limit=5), benchmark)
    assert not made & {file.name for file in tmp_path.iterdir()} and len(rows_of(tmp_path)) == 3
