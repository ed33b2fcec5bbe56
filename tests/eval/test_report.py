"""What a benchmark's one number is, and the report: both rules, the paper's number, all breakdowns."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from made import Made, write_evaluation, write_numbers
from official import FOLDERS, configured
from PIL import Image

from cobra.eval import paper, plots
from cobra.eval.benchmark import Benchmark, Choices, Prediction, Question, Scores
from cobra.eval.markdown import plain, table
from cobra.releases import COLUMNS, RELEASES


@pytest.fixture
def data_root(assets: Path) -> Path:
    return assets / "fixtures" / "scorers" / "data_root"


def answer(benchmark: Benchmark, question: Question, is_right: bool) -> Prediction:
    truth = benchmark.show_truth(question)
    if isinstance(question.answer, Choices):
        return {word: 0.9 if (word == truth) == is_right else 0.1 for word in question.answer.words}
    return truth.split(" (")[0] if is_right else "something else"


def scored(benchmark: Benchmark, keep: Callable[[int, Question], bool] = lambda i, question: True) -> Scores:
    """Scores of answers of which every third is wrong."""
    questions = [question for i, question in enumerate(benchmark.questions()) if keep(i, question)]
    return benchmark.score({q.id: answer(benchmark, q, i % 3 > 0) for i, q in enumerate(questions)}, questions)


def mean(scores: Scores, start: str = "", end: str = "") -> float:
    return 100 * fmean(score for one, score in scores.main.items() if one.startswith(start) and one.endswith(end))


def test_headline_of_pope_is_the_mean_of_its_splits(data_root: Path) -> None:
    """Also where they have different sizes; pooled, it would be another number."""
    scores = scored(configured("pope", data_root), lambda i, q: q.part != "random" or i % 7 == 1)
    splits = [mean(scores, split) for split in ("random/", "popular/", "adversarial/")]
    assert scores.overall.percent == pytest.approx(fmean(splits)) != pytest.approx(mean(scores))
    assert scores.columns == {"POPE": "all"} and scores.overall.total == len(scores.main)
    assert scores.overall.interval == scores.parts["official"]["all"].interval


def test_headline_of_textvqa_is_the_papers_prompt_order(data_root: Path) -> None:
    scores = scored(configured("textvqa", data_root), lambda i, q: q.part != "ocr_first" or i % 3 == 1)
    assert scores.overall.percent == pytest.approx(mean(scores, end="/ocr_first")) != pytest.approx(mean(scores))
    assert scores.columns == {"TextVQA": "ocr_first"}
    scores = scored(configured("textvqa", data_root, orders=["ocr_last", "no_ocr"]))
    assert scores.columns == {"textvqa ocr_last": "ocr_last", "textvqa no_ocr": "no_ocr"}
    assert scores.overall.percent == pytest.approx(fmean([mean(scores, end="ocr_last"), mean(scores, end="no_ocr")]))


def test_headline_of_refcoco_is_the_mean_of_its_sets(data_root: Path) -> None:
    scores = scored(configured("refcoco", data_root), lambda i, q: q.part != "RefCOCO" or i % 5 == 0)
    sets = ["RefCOCO", "RefCOCO+", "RefCOCOg"]
    assert scores.columns == {name: name for name in sets}
    assert scores.overall.percent == pytest.approx(fmean(mean(scores, f"{name}/") for name in sets))
    low, high = scores.overall.interval
    assert low < scores.overall.percent < high
    assert scored(configured("refcoco", data_root, sets=["RefCOCOg"])).columns == {"RefCOCOg": "RefCOCOg"}


def test_benchmarks_fill_the_papers_nine_columns(data_root: Path) -> None:
    filled = [column for name in FOLDERS for column in configured(name, data_root).columns]
    assert sorted(filled) == sorted(COLUMNS)


@pytest.mark.parametrize(
    ("model", "row"),
    [
        ("runs/cobra-3b", "cobra-3b"),
        ("cobra-8b", "cobra-8b"),
        ("runs/cobra-8b/", "cobra-8b"),
        ("runs/cobra-3b-siglip/checkpoints/step-000100", "cobra-3b"),
        ("cobra-8b/sweep/mine", "cobra-3b"),
        ("han1997/cobra/cobra+3b", "cobra-3b"),
        ("runs/tiny", "cobra-3b"),
        ("cobra-8b/sweep/cobra-3b-aligned", "cobra-3b-aligned"),
    ],
)
def test_model_is_held_against_its_own_row(model: str, row: str) -> None:
    assert paper.row_name(model) == row


def test_rows_are_those_of_the_paper() -> None:
    assert paper.ROWS.keys() == RELEASES.keys()
    assert len(paper.LLAVA.scores) == len(COLUMNS) == 9
    comparable = partial(paper.comparable, is_fair=True)
    assert comparable("cobra-3b", "POPE", "all", 9_000) == (88.4, True)
    assert paper.comparable("cobra-3b", "POPE", "all", 9_000, is_fair=False) == (88.4, False)
    assert comparable("cobra-3b", "POPE", "all", 3_000) == (88.4, False)  # one split, or a limit
    assert comparable("cobra-8b", None, "no_ocr", 5_000) == (50.7, True)
    assert comparable("cobra-3b-base", "TextVQA", "ocr_first", 5_000) == (57.9, True)
    assert comparable("cobra-3b", None, "random", 3_000) == (None, False)
    assert comparable("cobra-3b", "easyvqa", "", 5_000) == (None, False)


@pytest.mark.parametrize("name", FOLDERS)
def test_benchmarks_ask_as_the_paper_does_unless_told_otherwise(data_root: Path, name: str) -> None:
    benchmark = configured(name, data_root)
    for part in {"textvqa": ("ocr_first", "ocr_last", "no_ocr")}.get(name, ("",)):
        assert paper.asked_as_in_paper({"limit": None, "subset": None}, benchmark, part)
        for left_out in ({"limit": 9_000}, {"subset": "lite"}, {"missing_images": 1}, {"broken_images": ["a.jpg"]}):
            assert not paper.asked_as_in_paper(left_out, benchmark, part)
    if name != "textvqa":
        assert not paper.asked_as_in_paper({}, configured(name, data_root, prompt="{question}"), "")


@pytest.mark.parametrize(
    ("name", "changes"), [("gqa", {"tier": "val_balanced"}), ("vsr", {"split": "dev"}), ("pope", {"ask": "text"})]
)
def test_other_settings_are_no_fair_comparison(data_root: Path, name: str, changes: dict[str, str]) -> None:
    assert not paper.asked_as_in_paper({}, configured(name, data_root, **changes), "")


def test_wording_of_one_prompt_order_concerns_that_one(data_root: Path) -> None:
    benchmark: Any = configured("textvqa", data_root)
    benchmark.prompts = {**benchmark.prompts, "no_ocr": "{question}"}
    assert not paper.asked_as_in_paper({}, benchmark, "no_ocr")
    assert paper.asked_as_in_paper({}, benchmark, "ocr_first")


def test_text_of_pope_has_the_official_rule_alone(data_root: Path) -> None:
    benchmark = configured("pope", data_root, ask="text")
    questions = benchmark.questions()
    assert set(benchmark.score({q.id: "Yes" for q in questions}, questions).parts) == {"official"}


def some_answers(benchmark: Made) -> dict[str, Prediction]:
    """The third of six is another thing, the last is none."""
    return {
        q.id: "a story" if q.id.endswith("5") else "thing x" if q.id.endswith("2") else q.truth
        for q in benchmark.questions()
    }


def test_report_holds_the_papers_rule_against_the_papers_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = Made(tmp_path / "images")
    write_evaluation(tmp_path, benchmark, some_answers(benchmark), "runs/cobra-8b")
    report = (tmp_path / "report.md").read_text()
    assert "| all | 60 | 62.50 | 62.50 to 62.50 | 75.00 | 75.00 to 75.00 | 87.60 | — |" in report
    assert "**no fair comparison**" in report and "none of the paper's" not in report
    monkeypatch.setitem(paper._QUESTIONS, "POPE", (60,))
    monkeypatch.setitem(paper._SETTINGS, "POPE", {"num_types": 3})  # type: ignore[arg-type]
    write_evaluation(tmp_path, benchmark, some_answers(benchmark), "runs/mine")
    report, results = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert "| all | 60 | 62.50 | 62.50 to 62.50 | 75.00 | 75.00 to 75.00 | 88.40 | -13.40 |" in report
    assert "no fair comparison" not in report
    assert "none of the paper's; its row Cobra-3.5B" in report
    assert "**62.50 %** of 60 questions" in report and "the mean of the parts" in report
    assert (results["accuracy"], results["num_questions"], results["paper_row"]) == (62.5, 60, "cobra-3b")
    assert results["by_type"]["b"] == {"accuracy": 50, "num_questions": 20}
    assert results["columns"]["POPE"] == {
        "part": "all", "questions": 60, "reference": 88.4, "is_whole": True,
        "rules": {
            "official": {"accuracy": 62.5, "interval_95": [62.5, 62.5]},
            "paper": {"accuracy": 75.0, "interval_95": [75.0, 75.0]},
        },
    }  # fmt: skip


def test_every_breakdown_has_a_table_and_a_picture(data_root: Path, tmp_path: Path) -> None:
    benchmark = configured("gqa", data_root)
    answers = {q.id: answer(benchmark, q, i % 3 > 0) for i, q in enumerate(benchmark.questions())}
    write_evaluation(tmp_path, benchmark, answers)
    report = (tmp_path / "report.md").read_text()
    scores = benchmark.score(answers, benchmark.questions())
    for name in ("answer", "structural", "semantic", "steps", "words"):
        assert f"## By {name}\n" in report and f"](by_{name}.png)" in report
        assert (tmp_path / f"by_{name}.png").is_file()
    asked = [q for q in benchmark.questions() if q.is_counted and q.types["structural"] == "verify"]
    rules = [fmean(100 * values[q.id] for q in asked) for values in scores.per_question.values()]
    assert f"| verify | {rules[0]:.2f} | {rules[1]:.2f} | {len(asked)} |" in report
    assert "distribution" in report and "[More examples, to filter and search](examples.html)" in report


def test_tables_keep_their_shape(tmp_path: Path) -> None:
    """Names with bars and dollars are no new cells and no formulas."""
    benchmark = Made(tmp_path / "images", num_types=65)
    write_evaluation(tmp_path, benchmark, some_answers(benchmark), "runs/a|b")
    lines = (tmp_path / "report.md").read_text().replace("\\|", "").splitlines()
    sizes: list[set[int]] = [set()]
    for line in lines:
        sizes[-1].add(line.count("|")) if line.startswith("|") else sizes.append(set())
    assert all(len(counts) == 1 for counts in sizes if counts) and sum(bool(counts) for counts in sizes) == 2
    assert len([line for line in lines if line.startswith("| a | type ")]) == 40  # each image has four in `a`
    with Image.open(tmp_path / "by_kind_x_.png") as image:
        assert image.width < 3500 and 1000 < image.height < 3000  # three panels of up to 60 types


def test_markdown_shows_any_text_as_it_is() -> None:
    assert plain("a|b\n<script>*") == "a\\|b \\<script\\>\\*"
    assert table(["x", "y"], [["a", "1"]]) == ["| x | y |", "|---|---:|", "| a | 1 |", ""]


def test_scores_file_knows_images_and_parts(tmp_path: Path) -> None:
    benchmark = Made(tmp_path / "images", num_images=2)
    write_numbers(tmp_path, benchmark, some_answers(benchmark))
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert rows[2] == {
        "question_id": "0/2", "official": 0.0, "paper": 1.0, "image": "0.png", "part": "a", "counts": True,
    }  # fmt: skip
    assert len(rows) == 12 and rows[11]["part"] == "b"


def test_pictures_are_of_the_main_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_plot_panels", lambda file, panels, title: drawn.append((file.name, panels)) or file)
    benchmark = Made(tmp_path / "images")
    answers = some_answers(benchmark)
    plots.plot_breakdowns(tmp_path, benchmark.score(answers, benchmark.questions()), "title")
    (part_file, parts), (type_file, types) = drawn
    assert (part_file, type_file) == ("by_part.png", "by_kind_x_.png")
    assert [(bar.name, bar.percent, bar.total) for bar in parts[""]] == [
        ("a", 75, 40), ("b", 50, 20), ("mean of the parts", 62.5, 60),
    ]  # fmt: skip
    assert list(types) == ["a", "b", "all"] and sum(bar.total for bar in types["b"]) == 20
