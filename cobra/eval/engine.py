"""Ask a model all questions of a benchmark: an image is read once, and all its questions continue from its state."""

from __future__ import annotations

import gc
import logging
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from cobra.config import SUBSETS
from cobra.errors import DataError, ResourceError
from cobra.eval.benchmark import Choices, FreeText, Prediction, Question
from cobra.eval.memory import first_line, is_out_of_memory
from cobra.eval.predictions import checked
from cobra.eval.store import AnswerStore
from cobra.ranks import Ranks
from cobra.runtime import num_cores

log = logging.getLogger(__name__)

_BATCH_SIZE = 16  # of a model that says nothing
_MAX_READERS = 16  # threads that decode and resize images


class Rows(Protocol):
    """States of several images; a list of numbers selects and repeats them."""

    def __getitem__(self, rows: list[int], /) -> Any:
        """Return the states of these images, in this order."""
        ...


State = TypeVar("State", bound=Rows)


class Answerer(Protocol[State]):
    """What the engine needs of a model; `cobra.Cobra` has it. Two more methods are used where a model has them.

    `prepare_image(path)` does the host's work on an image (read, decode, resize), in several threads while the model
    answers; `encode_image` then gets what it returned. `max_batch_size()` says how many questions about as many images
    should fit into memory at once.
    """

    def encode_image(self, image: list[Any]) -> State:
        """Read images once, given by their paths or prepared; the result can be indexed by a list of image numbers."""
        ...

    def generate(self, image: State, prompt: list[str], *, max_new_tokens: int) -> list[str]:
        """Answer one prompt per image state, greedily."""
        ...

    def score(self, image: State, prompt: list[str], choices: Sequence[str]) -> list[list[float]]:
        """Return each choice's probability as the answer's first token, per image state; a row sums to 1."""
        ...

    def choice_ids(self, choices: Sequence[str]) -> list[int]:
        """Return the token ids of words for `score`; ConfigError if one is not a single token."""
        ...


def select(questions: Sequence[Question], limit: int | None = None, subset: str | None = None) -> list[Question]:
    """Return a part of the questions, always the same one, in their order.

    Args:
        questions: all of them.
        limit: the first so many of one fixed shuffled order, so that small sets nest in large ones.
        subset: a name in `SUBSETS`: all questions about the first images of one fixed shuffled order, until each part
            has at least so many; an evaluation is as fast per question as the whole one, and parts stay balanced.
    """
    chosen = list(questions)
    if subset is not None:
        chosen = _of_whole_images(chosen, SUBSETS[subset])
    if limit is not None:
        order: list[int] = np.random.default_rng(0).permutation(len(chosen)).tolist()
        chosen = [chosen[i] for i in sorted(order[:limit])]
    return chosen


def _of_whole_images(questions: Sequence[Question], wanted: int) -> list[Question]:
    by_image: dict[Path, list[Question]] = defaultdict(list)
    for question in questions:
        by_image[question.image].append(question)
    images = list(by_image)
    missing = Counter({part: min(count, wanted) for part, count in Counter(q.part for q in questions).items()})
    kept: set[Path] = set()
    order: list[int] = np.random.default_rng(0).permutation(len(images)).tolist()
    for i in order:
        parts = Counter(question.part for question in by_image[images[i]])
        if any(missing[part] > 0 for part in parts):
            kept.add(images[i])
            missing.subtract(parts)
    return [question for question in questions if question.image in kept]


def share(questions: Sequence[Question], ranks: Ranks) -> list[Question]:
    """Return the questions that are this rank's to ask: all those about its part of the images."""
    images = list(dict.fromkeys(question.image for question in questions))
    own = set(images[ranks.rank :: ranks.world_size])
    return [question for question in questions if question.image in own]


class Engine:
    """Asks a model in batches. While it answers one, the images of the next are read.

    Attributes:
        batch_size: questions that are answered at once; halved whenever the memory is too small for them.
        broken: images that do not decode, found so far; their questions get no answer.
    """

    def __init__(self, model: Answerer[Any], batch_size: int | None, *, skip_broken: bool = False) -> None:
        """Take a model.

        Args:
            model: what is asked.
            batch_size: None: what the model's `max_batch_size` says, or 16.
            skip_broken: leave out questions about images that do not decode, instead of raising DataError.
        """
        self._model = model
        self.batch_size = batch_size or getattr(model, "max_batch_size", lambda: _BATCH_SIZE)()
        self._skip_broken = skip_broken
        self.broken: list[Path] = []

    def answers(self, batches: Iterable[Sequence[Question]]) -> Iterator[dict[str, Prediction]]:
        """Yield the predictions by question id, batch by batch, perhaps in smaller batches.

        Raises:
            DataError: an image does not decode.
            ResourceError: the memory is too small for a single question.
        """
        with ThreadPoolExecutor(_num_readers()) as pool:
            try:
                for batch, images in _read_ahead(self._model, batches, pool):
                    yield from self._answers(batch, self._decoded(images))
            finally:
                pool.shutdown(cancel_futures=True)  # after an error, nobody waits for images

    def _decoded(self, reading: Mapping[Path, Future[Any]]) -> dict[Path, Any]:
        images: dict[Path, Any] = {}
        for path, future in reading.items():
            try:
                images[path] = future.result()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise ResourceError(
                    f"The memory is too small to read {path} beside {len(reading) - 1:,} others: {first_line(error)} "
                    "Free some, or choose a smaller batch_size: as many images are read ahead."
                ) from None
            except DataError as error:
                if not self._skip_broken:
                    raise DataError(f"{path}: {error} on_missing=skip leaves its questions out.") from None
                log.warning("Left out: %s: %s", path, error)
                self.broken.append(path)
        return images

    def _answers(self, batch: Sequence[Question], images: Mapping[Path, Any]) -> Iterator[dict[str, Prediction]]:
        known = [question for question in batch if question.image in images]
        waiting = deque([known] if known else [])
        while waiting:
            part, *rest = group_by_image(waiting.popleft(), self.batch_size)
            waiting.extendleft(reversed(rest))
            found = self._try(part, images)
            if found is not None:
                yield found
                continue
            self.batch_size = len(part) // 2
            log.warning("The memory is too small for %s questions at once; trying %s.", len(part), self.batch_size)
            waiting.appendleft(part)

    def _try(self, part: Sequence[Question], images: Mapping[Path, Any]) -> dict[str, Prediction] | None:
        """Return the answers; None when the memory was too small, and half of the questions could fit."""
        try:
            return answer(self._model, part, images)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(part) == 1:
                raise ResourceError(
                    f"The memory is too small for a single question ({part[0].id}): {first_line(error)} "
                    "Free some, or choose dtype=bfloat16 or another device."
                ) from None
        # Out of the handler, so that what the failed attempt held is free.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def _num_readers() -> int:
    return min(num_cores(), _MAX_READERS)


def _read_ahead(
    model: Answerer[Any], batches: Iterable[Sequence[Question]], pool: ThreadPoolExecutor
) -> Iterator[tuple[Sequence[Question], dict[Path, Future[Any]]]]:
    """Yield batches with their images, the next one's being read already."""
    ahead: deque[tuple[Sequence[Question], dict[Path, Future[Any]]]] = deque()
    prepare: Callable[[Path], Any] = getattr(model, "prepare_image", lambda path: path)
    for batch in batches:
        images = dict.fromkeys(question.image for question in batch)
        ahead.append((batch, {image: pool.submit(prepare, image) for image in images}))
        if len(ahead) > 1:
            yield ahead.popleft()
    yield from ahead


def ask(engine: Engine, questions: Sequence[Question], store: AnswerStore) -> None:
    """Answer the questions that the store has no answer to yet, and write each answer when it is there.

    The batches are the same whatever the store has: sums in another order round differently, and a run that was killed
    shall end with the answers of one that was not.
    """
    plan = list(group_by_image(questions, engine.batch_size))
    plan = [batch for batch in plan if any(question.id not in store.answers for question in batch)]
    with tqdm(
        total=len(questions),
        initial=sum(question.id in store.answers for question in questions),
        unit=" questions",
        mininterval=0.5 if sys.stderr.isatty() else 15,
        desc=store.benchmark.name,
        disable=not store.ranks.is_first,
    ) as bar:
        for found in engine.answers(plan):
            new = {one: prediction for one, prediction in found.items() if one not in store.answers}
            store.append(new.items())
            bar.update(len(new))


def answer(model: Answerer[State], batch: Sequence[Question], prepared: Mapping[Path, Any]) -> dict[str, Prediction]:
    """Return the model's answers by question id; each image of the batch is read once.

    Args:
        model: what is asked.
        batch: questions about images of `prepared`.
        prepared: what the model's `prepare_image` returned, by path; the path itself if it has none.

    Raises:
        DataError: the model returned something else than answers, such as NaN for a probability.
    """
    images = list(dict.fromkeys(question.image for question in batch))
    number = {image: i for i, image in enumerate(images)}
    states = model.encode_image([prepared[image] for image in images])
    alike: dict[FreeText | Choices, list[Question]] = {}
    for question in batch:
        alike.setdefault(question.answer, []).append(question)
    answers: dict[str, Prediction] = {}
    for kind, questions in alike.items():
        rows, texts = states[[number[q.image] for q in questions]], [q.text for q in questions]
        found: Sequence[object]
        if isinstance(kind, Choices):
            found = [_by_word(kind.words, row) for row in model.score(rows, texts, kind.words)]
        else:
            found = model.generate(rows, texts, max_new_tokens=kind.max_new_tokens)
        name = getattr(model, "name", type(model).__name__)
        if len(found) != len(questions):
            raise DataError(f"{name} gave {len(found):,} answers to {len(questions):,} questions.")
        for question, prediction in zip(questions, found, strict=True):
            try:
                answers[question.id] = checked(question, prediction)
            except DataError as error:
                raise DataError(f"{name} answered question {question.id} in a wrong form: {error}") from None
    return answers


def _by_word(words: Sequence[str], row: Sequence[float]) -> object:
    return dict(zip(words, row, strict=True)) if len(row) == len(words) else row


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
