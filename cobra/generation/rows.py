"""Rows that decode together: what of them is on the device, and what the host knows of the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from cobra.generation.sampling import NOT_FINITE, Sampler, Sampling
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState

SHORT_RUN = 4  # steps; nobody waits long for a first token then, and those who go on are hardly slowed down


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer to be generated.

    Attributes:
        prompt: token ids after the prefix, at least one.
        state: the prefix, one row; None for the start of a text.
        max_new_tokens: the answer's limit.
        sampling: how tokens are chosen; the seed is a single number, the row's own.
        is_over: told each token once, in order; True ends the answer after it.
        keep_state: hand out the final state.
    """

    prompt: Sequence[int]
    state: MambaState | None = None
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    is_over: Callable[[int], bool] | None = None
    keep_state: bool = False


@dataclass(frozen=True, kw_only=True)
class Event:
    """A token of an answer, its end, or both.

    Attributes:
        ticket: which answer.
        token: its next token; None if it ended without one.
        finish: "stop" (the end token, which is not handed out, or `is_over`), "length", or "error" for logits that are
            NaN or infinite; None while the answer goes on.
        state: at the end, where the request keeps it: the state after the prompt and all tokens handed out.
    """

    ticket: int
    token: int | None
    finish: str | None = None
    state: MambaState | None = None


@dataclass
class Rows:
    """What the device knows of B rows.

    Attributes:
        tokens: the last token of each, int64 [B], which is chosen but not read yet.
        state: after all tokens before it.
        sampler: of the same rows.
    """

    tokens: Tensor
    state: MambaState
    sampler: Sampler

    def keep(self, kept: Sequence[int]) -> None:
        """Let all rows go but these."""
        index = torch.tensor(kept).to(self.tokens.device)
        self.tokens, self.state = self.tokens[index], self.state[index]
        self.sampler.keep(kept)

    def join(self, others: Rows) -> None:
        """Append other rows, which are used up."""
        self.tokens = torch.cat([self.tokens, others.tokens])
        self.state = MambaState.concat([self.state, others.state])
        self.sampler.join(others.sampler)


def next_logits(llm: MambaLM, hidden: Tensor) -> Tensor:
    """Hidden states [B, D] -> logits [B, V]; the embedding's padding rows are no tokens and take no part."""
    return llm.head(hidden)[:, : llm.config.vocab_size]


def advance(llm: MambaLM, rows: Rows, count: int) -> Tensor:
    """Read and choose `count` tokens in every row: [count, B]. The device is not awaited."""
    found: list[Tensor] = []
    for _ in range(count):
        # A broken row holds no token; it goes on with any until the host has seen it.
        hidden, rows.state = llm.step(rows.tokens.clamp(min=0), rows.state)
        rows.tokens = rows.sampler.choose(next_logits(llm, hidden))
        found.append(rows.tokens)
    return torch.stack(found)


class Stepper(Protocol):
    """A way to run `advance`."""

    def __call__(self, llm: MambaLM, rows: Rows, limit: int) -> Tensor:
        """Advance the rows by at least one token and at most `limit`: [count, B]."""
        ...


def one_step(llm: MambaLM, rows: Rows, limit: int) -> Tensor:
    """Advance by one token, as it suits a CPU: nothing is computed that is not needed."""
    return advance(llm, rows, 1)


def run_limit(counts: Sequence[int], left: Sequence[int], others_wait: bool) -> int:
    """Return how many steps may be taken before the host sees their tokens.

    Args:
        counts: tokens of each answer so far; each has one from its prompt.
        left: tokens that each may still get.
        others_wait: prompts are being read.
    """
    if max(counts) == 1:
        steps = 1  # the whole batch is new, and answers of one word are common
    elif others_wait or min(counts) <= SHORT_RUN:
        steps = SHORT_RUN
    else:
        steps = max(SHORT_RUN, min(left))  # an answer that ends sooner holds its row no longer than a short run
    return min(steps, max(left))


@dataclass
class _Answer:
    """What the host knows of a row."""

    ticket: int
    request: Request
    last: int  # token
    count: int = 0  # tokens handed out


class Running:
    """A batch of answers; those that have ended leave it at once."""

    def __init__(self, llm: MambaLM, end_id: int, stepper: Stepper) -> None:
        self._llm = llm
        self._end_id = end_id
        self._stepper = stepper
        self._answers: list[_Answer] = []
        self._rows: Rows | None = None

    def __len__(self) -> int:
        return len(self._answers)

    def begin(self, requests: Sequence[tuple[int, Request]], logits: Tensor, state: MambaState) -> list[Event]:
        """Take in answers, by ticket, whose prompts have been read: their first tokens' logits and states."""
        samplings, prompts = [one.sampling for _, one in requests], [one.prompt for _, one in requests]
        sampler = Sampler(samplings, prompts, self._llm.config.vocab_size, logits.device)
        rows = Rows(sampler.choose(logits), state, sampler)
        answers = [_Answer(ticket, request, NOT_FINITE) for ticket, request in requests]
        events: list[Event] = []
        kept: list[int] = []
        for row, (answer, token) in enumerate(zip(answers, rows.tokens.tolist(), strict=True)):
            heard = self._hear(answer, [token])
            if heard[-1].finish is None:
                kept.append(row)
            elif answer.request.keep_state:
                heard[-1] = self._with_state(heard, state[[row]], [])
            events += heard
        if kept:
            if len(kept) < len(answers):
                rows.keep(kept)
            self._answers += [answers[row] for row in kept]
            if self._rows is None:
                self._rows = rows
            else:
                self._rows.join(rows)
        return events

    def advance(self, *, others_wait: bool = False) -> list[Event]:
        """Continue every answer by one token or several, and by few if others wait to begin."""
        if self._rows is None:
            return []
        counts = [answer.count for answer in self._answers]
        left = [answer.request.max_new_tokens - answer.count for answer in self._answers]
        watched = [row for row, answer in enumerate(self._answers) if answer.request.keep_state]
        before = self._rows.state[watched] if watched else None
        # The device is awaited here: once for the tokens of all rows. (Picking rows by number, above and when some
        # leave, sends the numbers to it.)
        columns = self._stepper(self._llm, self._rows, run_limit(counts, left, others_wait)).T.tolist()
        events: list[Event] = []
        kept: list[int] = []
        for row, (answer, tokens) in enumerate(zip(self._answers, columns, strict=True)):
            last = answer.last
            heard = self._hear(answer, tokens)
            if heard[-1].finish is None:
                kept.append(row)
            elif before is not None and answer.request.keep_state:
                heard[-1] = self._with_state(heard, before[[watched.index(row)]], [last])
            events += heard
        self._keep(kept)
        return events

    def drop(self, ticket: int) -> None:
        """Let an answer go, if it is here."""
        self._keep([row for row, answer in enumerate(self._answers) if answer.ticket != ticket])

    def _keep(self, kept: Sequence[int]) -> None:
        if len(kept) == len(self._answers):
            return
        self._answers = [self._answers[row] for row in kept]
        if not kept:
            self._rows = None
        elif self._rows is not None:
            self._rows.keep(kept)

    def _hear(self, answer: _Answer, tokens: Sequence[int]) -> list[Event]:
        """Tell what chosen tokens mean for their answer, as far as they belong to it; at least one event."""
        events: list[Event] = []
        for token in tokens:
            if token in (NOT_FINITE, self._end_id):
                finish = "error" if token == NOT_FINITE else "stop"
                return [*events, Event(ticket=answer.ticket, token=None, finish=finish)]
            answer.last = token
            answer.count += 1
            finish = "length" if answer.count == answer.request.max_new_tokens else None
            if answer.request.is_over is not None and answer.request.is_over(token):
                finish = "stop"
            events.append(Event(ticket=answer.ticket, token=token, finish=finish))
            if finish is not None:
                break
        return events

    def _with_state(self, heard: Sequence[Event], state: MambaState, unread: Sequence[int]) -> Event:
        """Return the last event with the final state: that of one row, which `unread` and the tokens heard follow."""
        ids = [*unread, *(event.token for event in heard if event.token is not None)]
        if heard[-1].finish == "error":
            return heard[-1]
        if ids:
            _, state = self._llm(self._llm.embed(torch.tensor([ids], device=state.ssm[0].device)), state=state)
        return replace(heard[-1], state=state)
