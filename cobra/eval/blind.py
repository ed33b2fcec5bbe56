"""What can be scored without looking: the best constant answer, and the answers to similar questions.

A benchmark says something about a model's eyes only beyond these numbers.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from cobra.eval.benchmark import Benchmark, Box, Choices, Prediction, Question
from cobra.eval.rules.boxes import THRESHOLD, iou, parse_box

NUM_CONSTANTS = 300  # most frequent known answers that are tried
NUM_SIMILAR = 40  # known rows, at least, that a guess is made from


def best_constants(
    benchmark: Benchmark, questions: Sequence[Question], answers: Iterable[str]
) -> dict[str, tuple[str, float]]:
    """Return for each part the one known answer that scores best when given to all of its questions, and its score.

    It is chosen on the questions themselves: nobody could know it beforehand, so that it is an upper limit.
    """
    ranked = [answer for answer, _ in Counter(answers).most_common()]
    boxes = [answer for answer in ranked if parse_box(answer)]
    others = [answer for answer in ranked if not parse_box(answer)]
    parts: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        parts[question.part].append(question)
    found: dict[str, tuple[str, float]] = {}
    for part, asked in parts.items():
        match asked[0].answer:
            case Choices(words=words):
                constants = list(words)
            case Box():
                constants = boxes
            case _:
                constants = others
        tried = ((_mean(benchmark, asked, constant), constant) for constant in constants[:NUM_CONSTANTS])
        score, constant = max(tried, key=lambda one: one[0])
        found[part] = constant, 100 * score
    return found


def _mean(benchmark: Benchmark, questions: Sequence[Question], answer: str) -> float:
    scores = [benchmark.score_answer(_prediction(question, answer), question)[0] for question in questions]
    return sum(scores) / len(scores)


def _prediction(question: Question, answer: str) -> Prediction:
    if isinstance(question.answer, Choices):
        words = question.answer.words
        return {word: float(word == answer) if answer in words else 1 / len(words) for word in words}
    return answer


class SimilarQuestions:
    """Guesses from known questions alone: what was the answer where nearly the same was asked about other images?"""

    def __init__(self, known: Iterable[tuple[str, str]]) -> None:
        """Index known (message, answer) pairs by their words and pairs of words."""
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for message, answer in known:
            answers[message][answer] += 1
        self._answers: list[Counter[str]] = list(answers.values())
        rows: dict[str, list[int]] = defaultdict(list)
        for number, message in enumerate(answers):
            for word in _words(message):
                rows[word].append(number)
        self._rows: Mapping[str, np.ndarray] = {word: np.array(numbers) for word, numbers in rows.items()}
        self._sizes = np.array([len(_words(message)) for message in answers])
        self.guess = lru_cache(None)(self._guess)

    def predictions(self, questions: Sequence[Question]) -> dict[str, Prediction]:
        """Guess all answers."""
        return {
            question.id: _prediction(question, self.guess(question.text, isinstance(question.answer, Box)))
            for question in questions
        }

    def _guess(self, message: str, is_box: bool) -> str:
        words = _words(message)
        shared = np.zeros(len(self._sizes))
        for word in words & self._rows.keys():
            shared[self._rows[word]] += 1
        nearest: list[int] = np.argsort(-shared / (self._sizes + len(words) - shared), kind="stable").tolist()
        found: Counter[str] = Counter()
        for number in nearest:
            found.update(self._answers[number])
            if found.total() >= NUM_SIMILAR:
                break
        return _central(list(found)) if is_box else found.most_common(1)[0][0]


def _words(message: str) -> set[str]:
    words = re.findall(r"\w+", message)
    return {*words, *(f"{one} {other}" for one, other in pairwise(words))}


def _central(texts: Sequence[str]) -> str:
    """Return the box that most of the others would count as right."""
    boxes = {text: box for text in texts if (box := parse_box(text))}
    return max(boxes, key=lambda text: sum(iou(boxes[text], other) >= THRESHOLD for other in boxes.values()))
