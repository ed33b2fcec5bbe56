"""Continuous batching: answers join and leave the running batch at any step. The state of a row has constant size."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from cobra.errors import ConfigError, ShapeError
from cobra.generation.engine import check_ids, read, start_state
from cobra.generation.graph import new_stepper
from cobra.generation.options import check_limit
from cobra.generation.rows import Event, Request, Running, next_logits
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState

__all__ = ["Event", "Request", "Scheduler"]

CHUNK = 512  # tokens of prompts that are read between two steps of the running answers


@dataclass
class _Reading:
    """A prompt that is being read."""

    ticket: int
    request: Request
    state: MambaState
    num_read: int = 0

    @property
    def num_left(self) -> int:
        return len(self.request.prompt) - self.num_read


class Scheduler:
    """Generates many answers at once, first come, first served. One thread owns it.

    The tokens of an answer do not depend on what else is running: they are those that `decode` gives it alone, as far
    as a batch of another size adds up to the same numbers.
    """

    def __init__(self, llm: MambaLM, *, end_id: int, max_rows: int = 64, chunk: int = CHUNK) -> None:
        """Begin without answers.

        Args:
            llm: the model, whose weights stay as they are.
            end_id: the token that ends an answer; it is not handed out.
            max_rows: answers that are read or generated at the same time; others wait.
            chunk: tokens of prompts, padding included, that are read in one `step`, so that a long prompt does not keep
                the running answers waiting.

        Raises:
            ConfigError: `max_rows` or `chunk` is less than 1.
        """
        for name, value in (("max_rows", max_rows), ("chunk", chunk)):
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
        self._llm = llm
        self._max_rows = max_rows
        self._chunk = chunk
        self._tickets = count()
        self._start = start_state(llm)
        self._waiting: deque[tuple[int, Request]] = deque()
        self._reading: deque[_Reading] = deque()
        self._running = Running(llm, end_id, new_stepper(llm))

    def __len__(self) -> int:
        """Count the answers that wait, are read, or are generated."""
        return len(self._waiting) + len(self._reading) + len(self._running)

    def add(self, request: Request) -> int:
        """Take an answer to be generated; it joins when there is room. Return its ticket.

        Raises:
            ConfigError: a limit below 1, a prompt that is empty or holds what is no token, or several seeds.
            ShapeError: a state of another model, on another device, or of several rows.
        """
        check_limit(request.max_new_tokens)
        check_ids(self._llm, "The prompt", request.prompt)
        if isinstance(request.sampling.seed, Sequence):
            raise ConfigError(f"seed={request.sampling.seed!r} must be a single number for a single answer.")
        state = request.state
        if state is not None and (state.batch_size != 1 or state.describe() != self._start.describe()):
            raise ShapeError(
                f"The request's state has {state.batch_size} rows of {state.describe()}, but this model needs one of "
                f"{self._start.describe()}."
            )
        ticket = next(self._tickets)
        self._waiting.append((ticket, request))
        return ticket

    def cancel(self, ticket: int) -> None:
        """Let an answer go; nothing more is heard of it. One that has ended, or never was, is fine."""
        self._waiting = deque(item for item in self._waiting if item[0] != ticket)
        self._reading = deque(item for item in self._reading if item.ticket != ticket)
        with torch.inference_mode():
            self._running.drop(ticket)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Continue all running answers, and read a chunk of the prompts of new ones; [] when there is nothing to do.

        An answer's events come in order. It has one per step on a CPU, and may have several on a GPU.
        """
        while self._waiting and len(self._reading) + len(self._running) < self._max_rows:
            ticket, request = self._waiting.popleft()
            state = self._start if request.state is None else request.state
            self._reading.append(_Reading(ticket, replace(request, state=None), state))  # the prefix may be freed
        events = self._running.advance(others_wait=bool(self._reading))
        if self._reading:
            events += self._read_chunk()
        return events

    def _read_chunk(self) -> list[Event]:
        """Read some tokens of the first prompts; those that are not at their end then go to the back of the queue."""
        group: list[_Reading] = []
        width = 0
        while self._reading:
            wider = max(width, min(self._reading[0].num_left, self._chunk))
            if group and (len(group) + 1) * wider > self._chunk:
                break
            group.append(self._reading.popleft())
            width = wider
        pieces = [item.request.prompt[item.num_read : item.num_read + width] for item in group]
        try:
            hidden, after = read(self._llm, pieces, MambaState.concat([item.state for item in group]))
        except BaseException:
            self._reading.extendleft(reversed(group))  # as before the step, for a caller that can make room
            raise
        done: list[int] = []
        for row, (item, piece) in enumerate(zip(group, pieces, strict=True)):
            item.num_read += len(piece)
            if item.num_left == 0:
                done.append(row)
            else:
                item.state = after[[row]]
                self._reading.append(item)
        return self._begin(group, done, hidden, after)

    def _begin(self, group: Sequence[_Reading], done: Sequence[int], hidden: Tensor, after: MambaState) -> list[Event]:
        if not done:
            return []
        if len(done) < len(group):
            hidden, after = hidden[torch.tensor(done).to(hidden.device)], after[list(done)]
        requests = [(group[row].ticket, group[row].request) for row in done]
        return self._running.begin(requests, next_logits(self._llm, hidden), after)
