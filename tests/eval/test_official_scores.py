"""Every score of the fixtures, question by question, under both rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from official import FOLDERS, configured, expected, predictions_file

from cobra.config import PathsConfig, ScoreConfig
from cobra.eval.benchmarks.refcoco import RefCOCO
from cobra.eval.rules.boxes import iou, parse_box
from cobra.eval.scoring import score

SCORERS = Path("fixtures") / "scorers"


@pytest.fixture(params=FOLDERS)
def scored(request: pytest.FixtureRequest, assets: Path, tmp_path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name, expectation, and scores.jsonl by id (TextVQA: by id and prompt order)."""
    name: str = request.param
    benchmark = configured(name, assets / SCORERS / "data_root")
    file = str(predictions_file(assets, name))
    score(ScoreConfig(paths=PathsConfig(), predictions=file, output=str(tmp_path), allow_partial=True), benchmark)
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    found = {str(row["question_id"]) + row.get("prompt", ""): row for row in rows}
    assert len(found) == len(rows)
    return name, expected(assets, name), found


def truth_of(name: str, expectation: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What is known of each rule's scores, from 0 to 1."""
    if name == "vqav2":
        official = {one: percent / 100 for one, percent in expectation["official_percent"].items()}
        return {"official": official, "paper": expectation["paper_harness"]}
    each: dict[str, Any] = expectation["per_question"]
    if name == "gqa":  # made with the harness's cleaning; the official script compares what it is given
        return {"paper": {one: float(row["correct"]) for one, row in each.items()}}
    if name == "refcoco":  # made with the harness's rounded boxes
        return {"paper": {one: float(row["status"] == "correct") for one, row in each.items()}}
    if name == "vizwiz":
        each = {one: percent / 100 for one, percent in each.items()}
    if name == "textvqa":
        orders = {"ocr_first": "ocr", "no_ocr": "no_ocr"}
        each = {one + order: row[key] for one, row in each.items() for order, key in orders.items()}
    each = {one: float(value) for one, value in each.items()}
    return {"official": each, "paper": each}


def test_scores_equal_the_official_ones(scored: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    name, expectation, found = scored
    for rule, truth in truth_of(name, expectation).items():
        rounded_to = 4 if name == "vizwiz" or (name, rule) == ("vqav2", "official") else None  # percent, two decimals
        got = {one: row[rule] if rounded_to is None else round(row[rule], rounded_to) for one, row in found.items()}
        assert got == (truth if rounded_to is None else {one: round(value, 4) for one, value in truth.items()})


def test_gqa_official_compares_the_strings_given(assets: Path) -> None:
    benchmark = configured("gqa", assets / SCORERS / "data_root")
    questions = benchmark.questions()
    for line in predictions_file(assets, "gqa").read_text().splitlines():
        row = json.loads(line)
        (question,) = [question for question in questions if question.id == row["question_id"]]
        official, _ = benchmark.score_answer(row["prediction"], question)
        assert official == (row["prediction"] == question.truth["answer"])


def test_refcoco_boxes_equal_the_harness(assets: Path) -> None:
    benchmark = configured("refcoco", assets / SCORERS / "data_root")
    assert isinstance(benchmark, RefCOCO)
    truths = {question.id: question.truth for question in benchmark.questions()}
    predictions = [json.loads(line) for line in predictions_file(assets, "refcoco").read_text().splitlines()]
    answers = {row["question_id"]: row["prediction"] for row in predictions}
    each = expected(assets, "refcoco")["per_question"]
    for one, row in each.items():
        box = parse_box(answers[one])
        assert list(truths[one].paper) == row["gt_bbox"]
        assert (None if box is None else list(box)) == row["parsed"]
        assert (None if box is None else iou(box, truths[one].paper)) == row["iou"]
    assert len(each) == 81


def test_refcoco_official_box_is_not_rounded(assets: Path) -> None:
    for question in configured("refcoco", assets / SCORERS / "data_root").questions():
        assert question.truth.paper == tuple(round(value, 2) for value in question.truth.official)


def test_refcoco_reads_all_splits_that_the_data_has(assets: Path) -> None:
    benchmark = configured("refcoco", assets / SCORERS / "data_root", splits=["val", "testA", "test"])
    parts = {question.part for question in benchmark.questions()}
    assert parts == {"RefCOCO", "RefCOCO+", "RefCOCOg", "RefCOCO testA", "RefCOCO+ testA", "RefCOCOg test"}


def test_official_file_names_work_as_they_are(assets: Path, tmp_path: Path) -> None:
    """The names as downloaded, in one folder that is given itself."""
    source = assets / SCORERS / "data_root"
    for old, new in (
        ("vqa-v2/v2_val2014_questions.json", "v2_OpenEnded_mscoco_val2014_questions.json"),
        ("vqa-v2/v2_val2014_annotations.json", "v2_mscoco_val2014_annotations.json"),
        ("vizwiz/val.json", "Annotations/val.json"),
        ("gqa/testdev_balanced_questions.json", "questions1.2/testdev_balanced_questions.json"),
    ):
        (tmp_path / new).parent.mkdir(exist_ok=True)
        (tmp_path / new).symlink_to(source / old)
    for name in ("vqav2", "vizwiz", "gqa"):
        known = configured(name, source).questions()
        assert [(q.id, q.truth) for q in configured(name, tmp_path).questions()] == [(q.id, q.truth) for q in known]


def test_public_files_are_read(assets: Path, tmp_path: Path) -> None:
    """Rows of the public POPE and VSR files."""
    pope = configured("pope", assets / "data").questions()
    assert len(pope) == 900 and len({question.id for question in pope}) == 900
    vsr = configured("vsr", assets / "data", split="dev").questions()
    assert len(vsr) == 340 and vsr[3].id == "3"
