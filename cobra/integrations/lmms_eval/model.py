"""The classes that lmms-eval asks; loaded by lmms-eval alone.

lmms-eval knows chat models, whose tasks hand over messages, and simple ones, whose tasks hand over visuals and a text.
Only the latter are asked for likelihoods.
"""
# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import os
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from cobra.api import GenerateOptions, ImageState, load
from cobra.errors import ConfigError
from cobra.integrations.lmms_eval.likelihood import log_likelihoods
from cobra.integrations.lmms_eval.requests import Query, image_key, read_messages, read_options, read_visuals


class _CobraModel(lmms):
    """What both kinds share: loading, batches, likelihoods."""

    def __init__(
        self,
        pretrained: str,
        dtype: str = "float32",
        device: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # lmms-eval hands it over; batches have one size here
    ) -> None:
        """Load a model.

        Args:
            pretrained: what `cobra.load` takes.
            dtype: "float32" or "bfloat16".
            device: "auto", "cpu", "cuda", ...; of several processes each takes the GPU of its local rank.
            batch_size: questions answered at once.
            max_batch_size: has no effect.

        Raises:
            CobraError: there is no such model, or an argument does not fit.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size} must be a whole number, such as --batch_size 64.")
        self.batch_size = int(batch_size)
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self._world_size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self._cobra = load(pretrained, device=device, dtype=dtype)
        self._states: dict[Hashable, ImageState] = {}

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers counts there."""
        return self._cobra.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request; those with the same generation settings share batches."""
        results: list[GenerationResult | None] = [None] * len(requests)
        with self._progress(len(requests)) as bar:
            for options, numbers in _alike([self._settings(request) for request in requests]):
                for batch in _batches(numbers, self.batch_size):
                    queries = [self._query(requests[i]) for i in batch]
                    for i, result in zip(batch, self._answer(queries, options, batch), strict=True):
                        results[i] = result
                    bar.update(len(batch))
        return [result for result in results if result is not None]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return each continuation's negative log-probability after image and context, and whether it is greedy.

        Negative, although lmms-eval documents the log-probability: its scoring takes the lowest for the likeliest, as
        its own models return losses.
        White space at a continuation's beginning, which separates it from a plain context, is dropped: Cobra's prompt
        formats bring their own. The end of the answer is not part of it.
        """
        results: list[tuple[float, bool]] = []
        with self._progress(len(requests)) as bar:
            for batch in _batches(range(len(requests)), self.batch_size):
                results += self._likelihoods([requests[i] for i in batch])
                bar.update(len(batch))
        # Bare pairs, as lmms-eval documents them, reach its scoring as text (0.7.3); what is in a result stays a pair.
        return [GenerationResult((-found, is_greedy)) for found, is_greedy in results]  # type: ignore[arg-type]

    def clean(self) -> None:
        """Free the model, as lmms-eval wants it when all requests are answered."""
        del self._cobra
        self._states = {}
        super().clean()

    def _answer(
        self, queries: Sequence[Query], options: GenerateOptions, seeds: Sequence[int]
    ) -> list[GenerationResult]:
        texts: dict[int, str] = {}
        for rows, state in self._read([query.image for query in queries]):
            own: GenerateOptions = {**options, "seed": [seeds[row] for row in rows]}
            answers = self._cobra.generate(state, [queries[row].message for row in rows], **own)
            texts |= zip(rows, answers, strict=True)
        tokenizer = self._cobra.tokenizer
        return [
            GenerationResult(texts[row], TokenCounts(output_tokens=len(tokenizer.encode(texts[row]))))
            for row in range(len(queries))
        ]

    def _likelihoods(self, batch: Sequence[Instance]) -> list[tuple[float, bool]]:
        cobra, prompt = self._cobra, self._cobra.prompt
        pairs: list[tuple[Query, str]] = []
        for request in batch:
            context, continuation, *where = request.args
            if callable(continuation):  # of tasks that compare one answer only
                continuation = continuation(self._doc(*where[1:]))
            # nothing but a text where a task asks how likely an answer is without image and question
            visuals = where[0](self._doc(*where[1:])) if where else None
            pairs.append((read_visuals(visuals, context, prompt), str(continuation).lstrip()))
        found: dict[int, tuple[float, bool]] = {}
        for rows, state in self._read([query.image for query, _ in pairs]):
            numbers: dict[tuple[Hashable, str], int] = {}  # contexts are read once for all their continuations
            first: list[int] = []
            answers: list[tuple[int, list[int]]] = []
            for k, row in enumerate(rows):
                query, continuation = pairs[row]
                number = numbers.setdefault((image_key(query.image), query.message), len(numbers))
                if number == len(first):
                    first.append(k)
                answers.append((number, cobra.tokenizer.encode(continuation)))
            prompts = [cobra.tokenizer.encode(prompt.question(pairs[rows[k]][0].message)) for k in first]
            states = None if state is None else state[first].state
            found |= zip(rows, log_likelihoods(cobra.model.llm, prompts, states, answers), strict=True)
        return [found[row] for row in range(len(batch))]

    def _read(self, images: Sequence[Any | None]) -> Iterator[tuple[list[int], ImageState | None]]:
        """Yield the rows with an image and their states, then those without; an image is read once.

        The states of one batch are kept for the next, into which a neighbour's questions may reach.
        """
        keys = {row: image_key(image) for row, image in enumerate(images) if image is not None}
        fresh: dict[Hashable, Any] = {key: images[row] for row, key in keys.items() if key not in self._states}
        if fresh:
            states = self._cobra.encode_image(list(fresh.values()))
            self._states |= {key: states[i] for i, key in enumerate(fresh)}
        self._states = {key: self._states[key] for key in keys.values()}
        if keys:
            yield list(keys), self._cobra.encode_image([self._states[key] for key in keys.values()])
        plain = [row for row, image in enumerate(images) if image is None]
        if plain:
            yield plain, None

    def _doc(self, doc_id: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _progress(self, total: int) -> Any:
        return tqdm(total=total, unit=" requests", desc="Cobra", disable=self.rank != 0)

    def _settings(self, request: Instance) -> Mapping[str, Any]:
        raise NotImplementedError

    def _query(self, request: Instance) -> Query:
        raise NotImplementedError


class CobraChat(_CobraModel):
    """Cobra below lmms-eval's chat tasks, which nearly all its tasks can be."""

    is_simple = False

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Answer every request round by round; what a round asks may depend on the answers before it."""
        results: list[list[str]] = [[] for _ in requests]
        with self._progress(len(requests)) as bar:
            for options, numbers in _alike([self._settings(request) for request in requests]):
                for batch in _batches(numbers, self.batch_size):
                    talks = {i: self._rounds(requests[i], results[i]) for i in batch}
                    open_queries = {i: next(talk) for i, talk in talks.items()}
                    while open_queries:
                        answers = self._answer(list(open_queries.values()), options, list(open_queries))
                        for i, answer in zip(list(open_queries), answers, strict=True):
                            results[i].append(answer.text)
                        following = {i: next(talks[i], None) for i in open_queries}
                        open_queries = {i: query for i, query in following.items() if query is not None}
                    bar.update(len(batch))
        return results

    def _rounds(self, request: Instance, answers: list[str]) -> Generator[Query, None, None]:
        """Yield what each round asks; by the next round its answer has been appended to `answers`."""
        _, doc_to_messages, _, *where = request.args
        doc, info = self._doc(*where), None
        messages = doc_to_messages(doc)
        while True:
            yield read_messages(messages, self._cobra.prompt)
            found = doc_to_messages(
                doc, round_idx=len(answers), previous_output=list(answers), previous_round_info=info
            )
            if not isinstance(found, tuple):  # a task that knows of no rounds
                return
            messages, is_over, _, info = found
            if is_over:
                return

    def _settings(self, request: Instance) -> Mapping[str, Any]:
        return request.args[2]

    def _query(self, request: Instance) -> Query:
        _, doc_to_messages, _, *where = request.args
        return read_messages(doc_to_messages(self._doc(*where)), self._cobra.prompt)


class CobraSimple(_CobraModel):
    """Cobra below tasks of the older kind: with --force_simple, for tasks that compare likelihoods."""

    is_simple = True

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Refuse: rounds are for chat models."""
        raise ConfigError("Tasks of several rounds need Cobra's chat model; leave out --force_simple.")

    def _settings(self, request: Instance) -> Mapping[str, Any]:
        return request.args[1]

    def _query(self, request: Instance) -> Query:
        context, _, doc_to_visual, *where = request.args
        return read_visuals(doc_to_visual(self._doc(*where)), context, self._cobra.prompt)


def _alike(settings: Sequence[Mapping[str, Any]]) -> Iterator[tuple[GenerateOptions, list[int]]]:
    """Yield the options of `Cobra.generate` and the numbers of the requests that have them."""
    groups: dict[str, list[int]] = {}
    for i, given in enumerate(settings):
        groups.setdefault(repr(sorted(given.items())), []).append(i)
    for numbers in groups.values():
        yield read_options(settings[numbers[0]]), numbers


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
