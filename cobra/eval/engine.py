"""Ask a model all questions of a benchmark: an image is read once per batch, its questions continue from its state."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from cobra.eval.benchmark import Choices, FreeText, Prediction, Question
from cobra.eval.store import AnswerStore
from cobra.ranks import Ranks


class Rows(Protocol):
    """States of several images; a list of numbers selects and repeats them."""

    def __getitem__(self, rows: list[int], /) -> Any:
        """Return the states of these images, in this order."""
        ...


State = TypeVar("State", bound=Rows)


class Answerer(Protocol[State]):
    """What the engine needs of a model; `cobra.Cobra` has it."""

    def encode_image(self, image: list[Path]) -> State:
        """Read images once; the result can be indexed by a list of image numbers."""
        ...

    def generate(self, image: State, prompt: list[str], *, max_new_tokens: int) -> list[str]:
        """Answer one prompt per image state, greedily."""
        ...

    def score(self, image: State, prompt: list[str], choices: Sequence[str]) -> list[list[float]]:
        """Return each choice's probability as the answer's first token, per image state; a row sums to 1."""
        ...


def select(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return the first `limit` questions of one fixed shuffled order, so that small sets nest in large ones."""
    if limit is None:
        return list(questions)
    order: list[int] = np.random.default_rng(0).permutation(len(questions)).tolist()
    return [questions[i] for i in sorted(order[:limit])]


def share(questions: Sequence[Question], ranks: Ranks) -> list[Question]:
    """Return the questions that are this rank's to ask: all those about its part of the images."""
    images = list(dict.fromkeys(question.image for question in questions))
    own = set(images[ranks.rank :: ranks.world_size])
    return [question for question in questions if question.image in own]


def ask(model: Answerer[State], questions: Sequence[Question], store: AnswerStore, batch_size: int) -> None:
    """Answer the questions that the store has no answer to yet, and write each answer when it is there."""
    waiting = [question for question in questions if question.id not in store.answers]
    with tqdm(
        total=len(questions),
        initial=len(questions) - len(waiting),
        unit=" questions",
        mininterval=0.5 if sys.stderr.isatty() else 15,
        desc=store.benchmark.name,
        disable=not store.ranks.is_first,
    ) as bar:
        for batch in group_by_image(waiting, batch_size):
            store.append(answer(model, batch).items())
            bar.update(len(batch))


def answer(model: Answerer[State], batch: Sequence[Question]) -> dict[str, Prediction]:
    """Return the model's answers by question id; each image of the batch is read once."""
    images = list(dict.fromkeys(question.image for question in batch))
    number = {image: i for i, image in enumerate(images)}
    states = model.encode_image(images)
    alike: dict[FreeText | Choices, list[Question]] = {}
    for question in batch:
        alike.setdefault(question.answer, []).append(question)
    answers: dict[str, Prediction] = {}
    for kind, questions in alike.items():
        rows, texts = states[[number[q.image] for q in questions]], [q.text for q in questions]
        found: Sequence[Prediction]
        if isinstance(kind, Choices):
            found = [dict(zip(kind.words, row, strict=True)) for row in model.score(rows, texts, kind.words)]
        else:
            found = model.generate(rows, texts, max_new_tokens=kind.max_new_tokens)
        answers |= zip((question.id for question in questions), found, strict=True)
    return answers


def group_by_image(questions: Sequence[Question], batch_size: int) -> Iterator[list[Question]]:
    """Yield batches of at most `batch_size` questions; those about one image share a batch if they fit in one."""
    groups: dict[Path, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.image, []).append(question)
    batch: list[Question] = []
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            if len(batch) + len(part) > batch_size:
                yield batch
                batch = []
            batch += part
    if batch:
        yield batch
