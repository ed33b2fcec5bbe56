"""What a benchmark is: how to read its files, how to ask, how to score. Everything else is the engine's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one image. `id` is the same in every process and run."""

    id: str
    image: Path
    text: str
    truth: str
    type: str


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
class Scores:
    """The headline accuracy, the same per question type, and each question's score from 0 to 1."""

    overall: Tally
    by_type: dict[str, Tally]
    per_question: dict[str, float]


class Benchmark(ABC):
    """Base class; a benchmark is a subclass in `cobra/eval/benchmarks/` and a YAML that names it."""

    name: str
    max_new_tokens: int = 128

    @abstractmethod
    def questions(self) -> list[Question]:
        """Read the questions in their official order; DataError when a file is missing or broken."""

    @abstractmethod
    def score_answer(self, prediction: str, question: Question) -> float:
        """Return the score of one answer, from 0 to 1."""

    def score(self, predictions: Mapping[str, str], questions: Sequence[Question]) -> Scores:
        """Score saved answers; needs no model."""
        per_question = {q.id: self.score_answer(predictions[q.id], q) for q in questions}
        types: dict[str, list[float]] = defaultdict(list)
        for question in questions:
            types[question.type].append(per_question[question.id])
        return Scores(
            overall=Tally(sum(per_question.values()), len(per_question)),
            by_type={name: Tally(sum(scores), len(scores)) for name, scores in sorted(types.items())},
            per_question=per_question,
        )
