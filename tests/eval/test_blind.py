"""Scores without looking, on the toy's files: what a constant and what the text alone can reach."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from cobra.eval.benchmark import Benchmark, Box, Choices, FreeText, Prediction, Question, text
from cobra.eval.blind import SimilarQuestions, best_constants
from cobra.eval.rules.boxes import iou, parse_box


@dataclass
class Plain(Benchmark):
    name: str = "plain"

    def questions(self) -> list[Question]:
        return []

    def score_answer(self, prediction: Prediction, question: Question) -> tuple[float, float]:
        if isinstance(question.answer, Choices):
            assert not isinstance(prediction, str)
            right = prediction[question.truth] > 0.5
        elif isinstance(question.answer, Box):
            box = parse_box(text(prediction))
            right = box is not None and iou(box, question.truth) >= 0.5
        else:
            right = text(prediction) == question.truth
        return float(right), float(right)


def ask(number: int, message: str, truth: object, answer: FreeText | Choices, part: str = "") -> Question:
    return Question(id=str(number), image=Path("x.jpg"), text=message, truth=truth, answer=answer, part=part)


def test_best_constant_is_the_most_frequent_truth_of_each_part() -> None:
    truths = {"colors": ["red", "red", "blue", "green"], "closed": ["Yes", "No", "No"]}
    kinds = {"colors": FreeText(), "closed": Choices(words=("Yes", "No"))}
    questions = [
        ask(i, "?", truth, kinds[part], part)
        for i, (part, truth) in enumerate((part, truth) for part in truths for truth in truths[part])
    ]
    found = best_constants(Plain(), questions, ["blue", "blue", "red", "green", "Yes", "No"])
    assert found == {"colors": ("red", 50.0), "closed": ("No", pytest.approx(200 / 3))}


def test_best_constant_box_is_one_that_most_boxes_overlap() -> None:
    boxes = [(0.0, 0.0, 0.4, 0.4), (0.0, 0.0, 0.5, 0.4), (0.6, 0.6, 1.0, 1.0)]
    questions = [ask(i, "?", box, Box()) for i, box in enumerate(boxes)]
    answers = ["red", "[0.60, 0.60, 1.00, 1.00]", "[0.00, 0.00, 0.44, 0.40]"]
    assert best_constants(Plain(), questions, answers) == {"": (answers[2], pytest.approx(200 / 3))}


def test_guess_is_the_usual_answer_to_such_a_question() -> None:
    known = [("Is it red?", "no")] * 30 + [("Is it red?", "yes")] * 20 + [("What color is it?", "blue")] * 50
    similar = SimilarQuestions(known)
    asked = [
        ask(0, "Is it red?", "yes", Choices(words=("yes", "no"))),
        ask(1, "What color is it?", "red", FreeText()),
        ask(2, "What color is that?", "red", FreeText()),
    ]
    assert similar.predictions(asked) == {"0": {"yes": 0.0, "no": 1.0}, "1": "blue", "2": "blue"}


def test_guessed_box_lies_where_most_are() -> None:
    left, right = ["[0.00, 0.30, 0.40, 0.70]", "[0.02, 0.30, 0.40, 0.72]"], ["[0.60, 0.30, 1.00, 0.70]"]
    known = [("the left one", box) for box in left * 10 + right * 10] + [("the right one", right[0])] * 40
    guess = SimilarQuestions(known).predictions([ask(0, "the left one", None, Box())])["0"]
    assert guess in left
