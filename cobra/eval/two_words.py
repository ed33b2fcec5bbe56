"""Benchmarks whose answer is one of two words, whose probabilities the model gives: POPE, VSR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

from cobra.eval.benchmark import Benchmark, Prediction, Question, probabilities
from cobra.eval.rules.binary import areas, says, share


class TwoWords(Benchmark):
    """The likelier word is the answer, of a tie the first, positive one; `truth` is whether that one is right."""

    words: ClassVar[tuple[str, str]]

    def is_positive(self, prediction: Prediction) -> bool:
        """Tell whether a prediction is the first word."""
        return says(probabilities(prediction), *self.words)

    def show_truth(self, question: Question) -> str:
        """The right one of the two words."""
        return self.words[0] if question.truth else self.words[1]

    def score_answer(self, prediction: Prediction, question: Question) -> tuple[float, ...]:
        """All rules are the same."""
        return (float(self.is_positive(prediction) == question.truth),) * len(self.rules)

    def details(
        self, rule: str, questions: Sequence[Question], predictions: Mapping[str, Prediction]
    ) -> dict[str, float | None]:
        """Return the areas under the curves of the first word's probability, where there are probabilities."""
        found = [predictions[question.id] for question in questions]
        shares = [share(prediction, *self.words) for prediction in found if not isinstance(prediction, str)]
        return areas(shares, [cast("bool", question.truth) for question in questions]) if shares else {}
