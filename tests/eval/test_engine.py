"""Evaluation: batched answers, the store that survives kills, scores, reports and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

import cobra
from cobra.config import EvaluateConfig, PathsConfig
from cobra.data.conversations import read_rows
from cobra.errors import CobraError, DataError
from cobra.eval import engine
from cobra.eval.benchmark import OFFICIAL, Benchmark, FreeText, Prediction, Question
from cobra.eval.benchmarks.easyvqa import question_type
from cobra.eval.gallery import choose_examples
from cobra.eval.run import evaluate
from cobra.eval.store import AnswerStore


@dataclass
class Small(Benchmark):
    """The small data's questions about images, in an order in which no two neighbours share one."""

    rules: ClassVar[tuple[str, ...]] = (OFFICIAL,)
    annotations: Path
    images: Path
    name: str = "small"

    def questions(self) -> list[Question]:
        rows = [row for row in read_rows(self.annotations) if row.image]
        return [
            Question(
                id=row.id,
                image=self.images / str(row.image),
                text=row.turns[0][0],
                answer=FreeText(max_new_tokens=6),
                truth=row.turns[0][1],
                types={"kind": kind},
            )
            for kind, start in (("shape", 0), ("color", 1), ("closed", 2))
            for row in rows[start::3]
        ]

    def score_answer(self, prediction: Prediction, question: Question) -> tuple[float]:
        return (float(prediction == question.truth),)


@pytest.fixture
def benchmark(small_data) -> Small:
    return Small(small_data.annotations, small_data.images)


@pytest.fixture
def config(trained_run: Path, tmp_path: Path) -> EvaluateConfig:
    return EvaluateConfig(
        paths=PathsConfig(results=str(tmp_path / "results")), load=str(trained_run), batch_size=10, device="cpu"
    )


def lines(file: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({row["question_id"] for row in rows}) == len(rows)
    return {row["question_id"]: row["prediction"] for row in rows}


def test_batched_answers_equal_one_by_one(benchmark: Small, config: EvaluateConfig, tmp_path: Path) -> None:
    evaluate(config, benchmark)
    predictions = lines(tmp_path / "results" / "small" / "tiny" / "predictions.jsonl")
    model = cobra.load(config.load, device="cpu")
    questions = benchmark.questions()
    assert predictions == {q.id: model.generate(q.image, q.text, max_new_tokens=6) for q in questions}
    assert len(predictions) == 72 and len(set(predictions.values())) > 4


def test_evaluation_writes_everything(benchmark: Small, config: EvaluateConfig, tmp_path: Path) -> None:
    scores = evaluate(config, benchmark)
    folder = tmp_path / "results" / "small" / "tiny"
    results = json.loads((folder / "results.json").read_text())
    predictions, questions = lines(folder / "predictions.jsonl"), benchmark.questions()
    num_correct = sum(predictions[q.id] == q.truth for q in questions)
    assert results["accuracy"] == scores.overall.percent == pytest.approx(100 * num_correct / 72)
    assert results["num_questions"] == results["asked_now"] == 72
    assert {kind: part["num_questions"] for kind, part in results["by_type"].items()} == dict.fromkeys(
        ["shape", "color", "closed"], 24
    )
    report = (folder / "report.md").read_text()
    assert f"**{scores.overall.percent:.2f} %** of 72 questions" in report
    for picture in ("by_kind.png", "examples.png"):
        assert picture in report
        with Image.open(folder / picture) as image:
            image.load()
            assert min(image.size) > 100 and len(image.getcolors(10**6) or "many") > 10


class Counting:
    """A model that remembers what it was asked and breaks down after some batches."""

    def __init__(self, breaks_after: int = 1000) -> None:
        self.asked: list[str] = []
        self.read: list[Path] = []
        self.batches_left = breaks_after

    def prepare_image(self, image: Path) -> Path:
        return image

    def encode_image(self, image: Sequence[Path]) -> Rows:
        self.read += image
        return Rows(list(image))

    def generate(self, image: Rows, prompt: Sequence[str], *, max_new_tokens: int) -> list[str]:
        if self.batches_left == 0:
            raise KeyboardInterrupt
        self.batches_left -= 1
        self.asked += prompt
        return [f"{path.stem}: {text}" for path, text in zip(image.images, prompt, strict=True)]


@dataclass
class Rows:
    images: list[Path] = field(default_factory=list)

    def __getitem__(self, rows: Sequence[int]) -> Rows:
        return Rows([self.images[row] for row in rows])


def test_each_image_is_read_once(benchmark: Small, tmp_path: Path) -> None:
    model, store = Counting(), AnswerStore(tmp_path, {}, benchmark, benchmark.questions())
    questions = benchmark.questions()
    engine.ask(engine.Engine(model, 12), questions, store)
    assert len(model.read) == len(set(model.read)) == 24  # three questions each: batches of 12 cut no image
    assert store.answers == {q.id: f"{q.image.stem}: {q.text}" for q in questions}


def test_stopped_evaluation_asks_only_the_rest(benchmark: Small, tmp_path: Path) -> None:
    questions, first, second = benchmark.questions(), Counting(breaks_after=3), Counting()
    store = AnswerStore(tmp_path, {"model": "a"}, benchmark, questions)
    with pytest.raises(KeyboardInterrupt):
        engine.ask(engine.Engine(first, 10), questions, store)  # three images of three questions each
    store.close()
    assert len(lines(tmp_path / "predictions.jsonl")) == 27
    with (tmp_path / "predictions.jsonl").open("a") as file:
        file.write('{"question_id": "99/0", "predic')  # a kill in the middle of a line
    store = AnswerStore(tmp_path, {"model": "a"}, benchmark, questions)
    engine.ask(engine.Engine(second, 10), questions, store)
    store.close()
    assert len(first.asked) == 27 and len(second.asked) == 45
    assert lines(tmp_path / "predictions.jsonl") == {q.id: f"{q.image.stem}: {q.text}" for q in questions}


def test_store_keeps_any_text(benchmark: Small, tmp_path: Path) -> None:
    questions = benchmark.questions()
    texts = ['quote " and \n line', "\u2028 é \x85", "", "\ud83d"]
    answers = {question.id: text for question, text in zip(questions, texts, strict=False)}
    store = AnswerStore(tmp_path, {}, benchmark, questions)
    store.append(answers.items())
    store.close()
    store = AnswerStore(tmp_path, {}, benchmark, questions)
    assert store.answers == answers
    store.close()


def test_answers_of_another_model_are_refused_by_name(benchmark: Small, tmp_path: Path) -> None:
    questions = benchmark.questions()
    store = AnswerStore(tmp_path, {"model": "a", "questions": "x", "dtype": "float32"}, benchmark, questions)
    store.append([(questions[0].id, "yes")])
    store.close()
    with pytest.raises(DataError, match="another dtype, model;"):
        AnswerStore(tmp_path, {"model": "b", "questions": "x", "dtype": "bfloat16"}, benchmark, questions)
    assert lines(tmp_path / "predictions.jsonl") == {questions[0].id: "yes"}


def test_second_evaluation_asks_nothing(benchmark: Small, config: EvaluateConfig, tmp_path: Path) -> None:
    first = evaluate(config, benchmark)
    again = evaluate(config, benchmark)
    assert again == first
    assert json.loads((tmp_path / "results" / "small" / "tiny" / "results.json").read_text())["asked_now"] == 0


def test_missing_image_is_named(benchmark: Small, config: EvaluateConfig) -> None:
    benchmark.images = Path("absent")
    with pytest.raises(
        CobraError, match=r"small lacks 24 images, about which there are 72 questions:\n  absent/\d+\.png"
    ):
        evaluate(config, benchmark)


def test_small_limits_nest_in_large_ones(benchmark: Small) -> None:
    questions = benchmark.questions()
    chosen = [{q.id for q in engine.select(questions, limit)} for limit in (5, 20, None, 1000)]
    assert [len(ids) for ids in chosen] == [5, 20, 72, 72]
    assert chosen[0] < chosen[1] < chosen[2]
    assert len({q.type for q in engine.select(questions, 20)}) == 3  # not the first ones of the file


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("what shape is in the image?", "what shape"),
        ("what color is the circle?", "what color"),
        ("is there a triangle?", "is shape present"),
        ("does the image not contain a rectangle?", "is shape absent"),
        ("is there a red shape?", "is color present"),
        ("is no gray shape present?", "is color absent"),
        ("<image>\nwhat is the color of the shape?", "what color"),
    ],
)
def test_question_type(text: str, kind: str) -> None:
    assert question_type(text) == kind


def test_examples_show_wrong_answers_first(benchmark: Small) -> None:
    questions = benchmark.questions()
    scores = benchmark.score({q.id: q.truth if i % 10 else "wrong" for i, q in enumerate(questions)}, questions)
    chosen = choose_examples(questions, scores, num_wrong=4, num_all=12)
    assert [scores.main[q.id] for q in chosen] == [0.0] * 4 + [1.0] * 8
    assert len({q.id for q in chosen}) == 12 and len({q.type for q in chosen[4:]}) == 3
