"""What a benchmark is: how to read its files, how to ask, how to score. Everything else is the engine's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from cobra.errors import DataError
from cobra.eval.rules.boxes import BoxXYXY
from cobra.eval.rules.intervals import interval

OFFICIAL, PAPER = "official", "paper"
MEAN = "all"  # the name of the part that is the mean of the others

# Text, or the probability of each choice.
Prediction: TypeAlias = str | Mapping[str, float]


def text(prediction: Prediction) -> str:
    """Return a prediction that is known to be text."""
    assert isinstance(prediction, str)
    return prediction


def most_common(answers: Iterable[str]) -> str:
    """Return what people said, the most frequent first, for other people to read."""
    return ", ".join(f"{answer} ({count})" for answer, count in Counter(answers).most_common(3))


def probabilities(prediction: Prediction) -> Mapping[str, float]:
    """Return a prediction that is known to be probabilities."""
    assert not isinstance(prediction, str)
    return prediction


@dataclass(frozen=True, kw_only=True)
class FreeText:
    """The model writes."""

    max_new_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The model's first token is one of these words; the prediction is their probabilities, which sum to 1."""

    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Box(FreeText):
    """The model writes a box, `[x1, y1, x2, y2]` in 0..1."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one image. `id` is the same in every process and run, and unique in its benchmark."""

    id: str
    image: Path
    text: str  # the message as the model is asked
    answer: FreeText | Choices | Box = FreeText()
    truth: Any  # what the scorer needs to know
    part: str = ""  # what is scored by itself: a POPE split, a RefCOCO set, a TextVQA prompt order
    types: Mapping[str, str] = field(default_factory=dict[str, str])  # breakdown -> type
    is_counted: bool = True  # in the accuracy

    @property
    def type(self) -> str:
        """The type in the first breakdown."""
        return next(iter(self.types.values()), self.part)


@dataclass(frozen=True)
class Tally:
    """Sums and counts, so that parts can be added."""

    correct: float
    total: int

    @property
    def percent(self) -> float:
        """Accuracy in percent."""
        return 100 * self.correct / self.total


@dataclass(frozen=True, kw_only=True)
class PartScores:
    """What one rule says of one part. Everything is in percent, except for counts."""

    accuracy: float
    interval: tuple[float, float]  # 95 %, bootstrap over images
    num_questions: int
    details: Mapping[str, float | None]
    by_type: Mapping[str, Mapping[str, Tally]]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        breakdowns = {
            f"by_{name.replace(' ', '_')}": {
                kind: {"accuracy": tally.percent, "questions": tally.total} for kind, tally in tallies.items()
            }
            for name, tallies in self.by_type.items()
        }
        numbers = {"accuracy": self.accuracy, "interval_95": list(self.interval), "questions": self.num_questions}
        return {**numbers, **self.details, **breakdowns}


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A benchmark's one number by one rule: the mean accuracy of its columns."""

    percent: float
    interval: tuple[float, float]
    total: int  # questions


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores by rule: each part's numbers, and each question's score from 0 to 1. The first rule is the main one."""

    parts: Mapping[str, Mapping[str, PartScores]]
    per_question: Mapping[str, Mapping[str, float]]
    columns: Mapping[str, str]  # column of a table of models -> part
    headlines: Mapping[str, Headline]

    @property
    def main(self) -> Mapping[str, float]:
        """Each question's score by the main rule."""
        return next(iter(self.per_question.values()))

    @property
    def overall(self) -> Headline:
        """The headline by the main rule."""
        return next(iter(self.headlines.values()))

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: rule -> numbers, or rule -> part -> numbers."""
        return {
            rule: parts[""].as_dict() if set(parts) == {""} else {name: part.as_dict() for name, part in parts.items()}
            for rule, parts in self.parts.items()
        }


class Benchmark(ABC):
    """Base class; a benchmark is a subclass in `cobra/eval/benchmarks/` and a YAML that names it."""

    name: str
    rules: tuple[str, ...] = (OFFICIAL, PAPER)
    mean_of_parts: ClassVar[bool] = False  # one more part, named MEAN
    columns: ClassVar[Mapping[str, str]] = {}  # column of the paper's table -> the part that stands in it
    image_url: ClassVar[str] = ""  # where to get the images

    @abstractmethod
    def questions(self) -> list[Question]:
        """Read the questions in their official order; DataError when annotations are missing or broken."""

    def some_questions(self) -> list[Question]:
        """Return the questions; DataError where there are none."""
        found = self.questions()
        if not found:
            place = getattr(self, "data_root", getattr(self, "folder", ""))
            raise DataError(
                f"The annotations of {self.name} hold no questions (looked for in {place}). Are the files complete? "
                "Fetch them again."
            )
        return found

    @abstractmethod
    def score_answer(self, prediction: Prediction, question: Question) -> tuple[float, ...]:
        """Return the score of one answer from 0 to 1, by each of the rules."""

    def details(
        self, rule: str, questions: Sequence[Question], predictions: Mapping[str, Prediction]
    ) -> dict[str, float | None]:
        """Return further numbers of one part's questions; the uncounted ones are among them."""
        return {}

    def show_truth(self, question: Question) -> str:
        """Return the right answer for people to read."""
        return str(question.truth)

    def true_box(self, question: Question) -> BoxXYXY | None:
        """Return the box to be drawn, where the right answer is one."""
        return None

    def row_id(self, row: Mapping[str, Any]) -> str:
        """Return the question id that a row of a predictions file belongs to."""
        return str(row["question_id"])

    def id_fields(self, question: Question) -> dict[str, Any]:
        """Return what tells in a predictions file which question a row belongs to; `row_id` reads it."""
        return {"question_id": question.id}

    def score(self, predictions: Mapping[str, Prediction], questions: Sequence[Question]) -> Scores:
        """Score saved answers; needs no model."""
        per_question: dict[str, dict[str, float]] = {rule: {} for rule in self.rules}
        for question in questions:
            values = self.score_answer(predictions[question.id], question)
            for rule, value in zip(self.rules, values, strict=True):
                per_question[rule][question.id] = value
        counted = [question for question in questions if question.is_counted]
        if not counted:
            raise DataError(f"{self.name}: none of the {len(questions)} questions counts in the accuracy.")
        parts: dict[str, list[Question]] = defaultdict(list)
        for question in questions:
            parts[question.part].append(question)
        if self.mean_of_parts:
            parts[MEAN] = list(questions)
        scored = {
            rule: {
                part: self._score_part(rule, asked, predictions, per_question[rule]) for part, asked in parts.items()
            }
            for rule in self.rules
        }
        columns = self.columns_of(parts)
        return Scores(
            parts=scored,
            per_question=per_question,
            columns=columns,
            headlines={rule: _headline(scored[rule], columns, counted, per_question[rule]) for rule in self.rules},
        )

    def columns_of(self, parts: Iterable[str]) -> dict[str, str]:
        """Return the columns that some parts fill in a table of models; parts that no column is for have their own."""
        there = list(parts)
        columns = {column: part for column, part in self.columns.items() if part in there}
        return columns or {f"{self.name} {part}".strip(): part for part in there if part != MEAN}

    def _score_part(
        self,
        rule: str,
        questions: Sequence[Question],
        predictions: Mapping[str, Prediction],
        scores: Mapping[str, float],
    ) -> PartScores:
        counted = [question for question in questions if question.is_counted]
        values = [scores[question.id] for question in counted]
        parts = _by_type((question.part, scores[question.id]) for question in counted)
        kinds: dict[str, dict[str, Tally]] = {}
        for name in dict.fromkeys(name for question in counted for name in question.types):
            kinds[name] = _by_type((q.types[name], scores[q.id]) for q in counted if name in q.types)
        return PartScores(
            accuracy=sum(tally.percent for tally in parts.values()) / len(parts),
            interval=interval(values, [q.image for q in counted], [q.part for q in counted]),
            num_questions=len(counted),
            details=self.details(rule, questions, predictions),
            by_type=kinds,
        )


def _headline(
    parts: Mapping[str, PartScores],
    columns: Mapping[str, str],
    counted: Sequence[Question],
    scores: Mapping[str, float],
) -> Headline:
    chosen = [parts[part] for part in columns.values()]
    if len(chosen) == 1:
        return Headline(percent=chosen[0].accuracy, interval=chosen[0].interval, total=chosen[0].num_questions)
    asked = [question for question in counted if question.part in columns.values()]
    return Headline(
        percent=sum(part.accuracy for part in chosen) / len(chosen),
        interval=interval([scores[q.id] for q in asked], [q.image for q in asked], [q.part for q in asked]),
        total=len(asked),
    )


def _by_type(rows: Iterable[tuple[str, float]]) -> dict[str, Tally]:
    values: dict[str, list[float]] = defaultdict(list)
    for kind, score in rows:
        values[kind].append(score)
    return {kind: _tally(values[kind]) for kind in sorted(values, key=_numbers_in_order)}


def _numbers_in_order(kind: str) -> tuple[int, str]:
    return (int(kind) if kind.isdecimal() else 0, kind)


def _tally(scores: Iterable[float]) -> Tally:
    values = list(scores)
    return Tally(sum(values), len(values))
