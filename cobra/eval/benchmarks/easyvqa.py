"""easy-VQA's test split: 9,673 questions about 1,000 images of one shape (github.com/vzhou842/easy-VQA)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cobra.data import easyvqa
from cobra.data.conversations import read_rows
from cobra.eval.benchmark import OFFICIAL, Benchmark, FreeText, Prediction, Question, text

_SHAPE = re.compile(r"\b(circle|rectangle|triangle)\b")


@dataclass
class EasyVQA(Benchmark):
    """Exact match, capitals and outer spaces aside."""

    rules = (OFFICIAL,)
    folder: str  # with images/ and the questions, as `data=easyvqa` makes it
    name: str = "easyvqa"  # of its folder below `paths.results`
    max_new_tokens: int = 8  # limit of an answer

    def questions(self) -> list[Question]:
        """Read test.json; it is made from the PyPI package when it is not there yet."""
        folder = Path(self.folder)
        easyvqa.prepare(folder)
        return [
            Question(
                id=row.id,
                image=folder / "images" / str(row.image),
                text=row.turns[0][0],
                truth=row.turns[0][1],
                answer=FreeText(max_new_tokens=self.max_new_tokens),
                types={"type": question_type(row.turns[0][0])},
            )
            for row in read_rows(folder / "test.json")
        ]

    def score_answer(self, prediction: Prediction, question: Question) -> tuple[float]:
        """1 for the same answer, 0 for any other."""
        return (float(text(prediction).strip().lower() == question.truth.lower()),)


def question_type(text: str) -> str:
    """Tell what a question asks for: the shape, the colour, or whether one of them is (not) there."""
    words = set(re.findall(r"\w+", text.lower()))
    if "what" in words:
        return "what color" if "color" in words else "what shape"
    subject = "shape" if _SHAPE.search(text) else "color"
    return f"is {subject} absent" if words & {"no", "not"} else f"is {subject} present"
