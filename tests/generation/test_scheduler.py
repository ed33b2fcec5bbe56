"""Continuous batching against each answer alone: one pass over the whole text for every token."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cobra.errors import ConfigError, ShapeError
from cobra.generation.engine import decode
from cobra.generation.sampling import Sampling
from cobra.generation.scheduler import Event, Request, Scheduler
from cobra.models.state import MambaState

from .models import NO_END, VOCAB, greedy, make_lm, make_prefixes, make_prompts, make_state

ROUNDING = 1e-10  # float64 sums of some hundred terms of size 1, in another order

LM = make_lm()  # not changed by any test
PREFIXES = 3
PREFIX_IDS, STATES = make_prefixes(PREFIXES).tolist(), make_state(LM, PREFIXES)
PROMPTS = make_prompts(7, 1, 13, 5, 3, 29, 2, 11)
LIMIT = 12
WHOLES = [greedy(LM, prompt, LIMIT) for prompt in PROMPTS]
ENDS = {token: {whole.index(token) for whole in WHOLES if token in whole} for token in range(VOCAB)}
END = max(ENDS, key=lambda token: len(ENDS[token]))  # ends answers at different steps


def request(row: int, prefix: int | None = None, **options: Any) -> Request:
    state = None if prefix is None else STATES[[prefix]]
    return Request(**({"prompt": PROMPTS[row], "state": state, "max_new_tokens": LIMIT} | options))


def run(scheduler: Scheduler) -> dict[int, list[Event]]:
    """All events by ticket, until there are no more."""
    events: dict[int, list[Event]] = defaultdict(list)
    while len(scheduler):
        for event in scheduler.step():
            events[event.ticket].append(event)
    assert scheduler.step() == []
    return events


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


@dataclass(frozen=True)
class Case:
    prompt: int
    prefix: int | None
    limit: int
    arrival: int  # the step before which it is added
    leaves: int | None  # the step before which it is cancelled
    sampling: Sampling


@cache
def alone(case: Case) -> list[int]:
    prefix = [] if case.prefix is None else PREFIX_IDS[case.prefix]
    if case.sampling == Sampling():
        return greedy(LM, [*prefix, *PROMPTS[case.prompt]], case.limit, END)
    state = None if case.prefix is None else STATES[[case.prefix]]
    prompts, limit = [PROMPTS[case.prompt]], case.limit
    steps = decode(LM, prompts, state, max_new_tokens=limit, end_id=END, sampling=case.sampling)
    return [token for step in steps for _, token in step]


SAMPLINGS = st.one_of(
    st.just(Sampling()),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.8, 3.0]),
        top_k=st.sampled_from([0, 3, 20]),
        top_p=st.sampled_from([1.0, 0.7]),
        repetition_penalty=st.sampled_from([1.0, 1.4]),
        seed=st.integers(0, 3),
    ),
)
CASES = st.builds(
    Case,
    prompt=st.integers(0, len(PROMPTS) - 1),
    prefix=st.one_of(st.none(), st.integers(0, PREFIXES - 1)),
    limit=st.integers(1, LIMIT),
    arrival=st.integers(0, 10),
    leaves=st.one_of(st.none(), st.none(), st.integers(0, 16)),
    sampling=SAMPLINGS,
)


@settings(max_examples=25, deadline=None)
@given(
    cases=st.lists(CASES, min_size=1, max_size=8), max_rows=st.integers(1, 5), chunk=st.sampled_from([1, 6, 30, 512])
)
def test_answers_equal_those_alone_whoever_comes_and_goes(cases: list[Case], max_rows: int, chunk: int) -> None:
    scheduler = Scheduler(LM, end_id=END, max_rows=max_rows, chunk=chunk)
    tickets: dict[int, Case] = {}
    found: dict[int, list[Event]] = defaultdict(list)
    ended: set[int] = set()
    for step in range(10_000):
        for case in cases:
            if case.arrival == step:
                changes = {"max_new_tokens": case.limit, "sampling": case.sampling}
                tickets[scheduler.add(request(case.prompt, case.prefix, **changes))] = case
        for ticket, case in tickets.items():
            if case.leaves is not None and step == max(case.leaves, case.arrival):
                scheduler.cancel(ticket)
                ended.add(ticket)
        for event in scheduler.step():
            assert event.ticket not in ended
            found[event.ticket].append(event)
            if event.finish is not None:
                ended.add(event.ticket)
        assert len(scheduler) == len(tickets.keys() - ended)
        if step > 10 and not len(scheduler):
            break
    for ticket, case in tickets.items():
        expected, events = alone(replace(case, arrival=0, leaves=None)), found[ticket]
        if case.leaves is not None and not (events and events[-1].finish):
            assert tokens(events) == expected[: len(events)]
            continue
        assert tokens(events) == expected
        assert events[-1].finish == ("length" if len(expected) == case.limit else "stop")
        assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)


def test_answers_end_at_different_steps() -> None:
    """Else the test above would see little."""
    assert len(ENDS[END]) > 2 and any(END not in whole for whole in WHOLES)


def test_first_come_first_served() -> None:
    scheduler = Scheduler(LM, end_id=NO_END, max_rows=2)
    order: list[int] = []
    tickets = [scheduler.add(request(row, max_new_tokens=2 + row)) for row in range(5)]
    while len(scheduler):
        for event in scheduler.step():
            if event.ticket not in order:
                order.append(event.ticket)
            assert len({*order}) <= 2 + sum(ticket < event.ticket for ticket in tickets)
    assert order == tickets


def test_a_long_prompt_keeps_nobody_waiting() -> None:
    """Neither answers that run nor those that come later; and every step reads a chunk at most."""
    widths: list[int] = []
    lm = make_lm()
    forward = lm.forward

    def watched(embeddings: Tensor, **others: Any) -> Any:
        widths.append(embeddings.shape[0] * embeddings.shape[1])
        return forward(embeddings, **others)

    lm.forward = watched  # type: ignore[method-assign]
    scheduler = Scheduler(lm, end_id=NO_END, chunk=8)
    long = make_prompts(200)[0]
    first = scheduler.add(request(3, max_new_tokens=40))
    scheduler.step()
    slow = scheduler.add(Request(prompt=long, max_new_tokens=3))
    scheduler.step()
    late = scheduler.add(request(4, max_new_tokens=40))
    starts: dict[int, int] = {}
    for step in range(30):
        events = scheduler.step()
        assert [event.token is not None for event in events if event.ticket == first] == [True]
        for event in events:
            starts.setdefault(event.ticket, step)
    assert starts[late] <= 2 and 200 // 8 - 3 <= starts[slow] < 30
    assert max(widths) <= 8 and sum(widths) == 5 + 200 + 3
    assert tokens(run(scheduler)[slow])[-1:] in ([], greedy(LM, long, 3)[-1:])


def test_prompts_that_come_together_are_read_together() -> None:
    sizes: list[list[int]] = []
    lm = make_lm()
    forward = lm.forward

    def watched(embeddings: Tensor, **others: Any) -> Any:
        sizes.append(list(embeddings.shape[:2]))
        return forward(embeddings, **others)

    lm.forward = watched  # type: ignore[method-assign]
    scheduler = Scheduler(lm, end_id=NO_END)
    tickets = [scheduler.add(request(row, row if row < 2 else None, max_new_tokens=1)) for row in range(5)]
    assert [event.ticket for event in scheduler.step()] == tickets
    assert sizes == [[5, 13]]


@pytest.mark.parametrize("ending", ["length", "end token", "is_over", "at once", "end token at once", "in a chunk"])
@pytest.mark.parametrize("prefix", [None, 1])
def test_final_state_is_that_of_the_whole_text(ending: str, prefix: int | None) -> None:
    before = [] if prefix is None else PREFIX_IDS[prefix]
    whole = greedy(LM, [*before, *PROMPTS[2]], LIMIT)
    options: dict[str, Any] = {"end_id": NO_END, "max_new_tokens": LIMIT, "chunk": 512}
    options |= {
        "length": {},
        "end token": {"end_id": whole[5]},
        "is_over": {},
        "at once": {"max_new_tokens": 1},
        "end token at once": {"end_id": whole[0]},
        "in a chunk": {"chunk": 4},
    }[ending]
    end_id, chunk = options.pop("end_id"), options.pop("chunk")
    if ending == "is_over":
        options["is_over"] = lambda token: token == whole[6]
    scheduler = Scheduler(LM, end_id=end_id, chunk=chunk)
    other = scheduler.add(request(1))
    scheduler.step()
    kept = scheduler.add(request(2, prefix, keep_state=True, **options))
    events = run(scheduler)
    assert all(event.state is None for event in [*events[other], *events[kept][:-1]])
    answer = tokens(events[kept])
    assert answer == whole[: len(answer)] and (len(answer) < LIMIT) == (ending not in ("length", "in a chunk"))
    _, expected = LM(LM.embed(torch.tensor([[*before, *PROMPTS[2], *answer]])))
    state = events[kept][-1].state
    assert state is not None
    for ours, theirs in zip([*state.conv, *state.ssm], [*expected.conv, *expected.ssm], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


def test_stopping_is_told_each_token_once() -> None:
    heard: dict[int, list[int]] = defaultdict(list)
    scheduler = Scheduler(LM, end_id=END)

    def listener(row: int) -> Any:
        def is_over(token: int) -> bool:
            heard[row].append(token)
            return len(heard[row]) == 3 + row

        return is_over

    tickets = [scheduler.add(request(row, is_over=listener(row))) for row in range(4)]
    events = run(scheduler)
    for row, ticket in enumerate(tickets):
        assert heard[row] == tokens(events[ticket]) == greedy(LM, PROMPTS[row], 3 + row, END)
        assert events[ticket][-1].finish == "stop"


def test_broken_rows_end_alone() -> None:
    scheduler = Scheduler(LM, end_id=NO_END)
    broken = STATES[[1]]
    broken.ssm[0][0, 0, 0] = math.nan
    fine = scheduler.add(request(2, 0))
    bad = scheduler.add(replace(request(2, 0), state=broken, keep_state=True))
    events = run(scheduler)
    assert events[bad] == [Event(ticket=bad, token=None, finish="error")]
    assert tokens(events[fine]) == greedy(LM, [*PREFIX_IDS[0], *PROMPTS[2]], LIMIT)


def test_rows_that_break_later_end_alone() -> None:
    lm = make_lm()
    first, second = greedy(lm, PROMPTS[0], LIMIT), greedy(lm, PROMPTS[3], LIMIT)
    read = {*PROMPTS[0], *PROMPTS[3], *first}
    step = next(n for n, token in enumerate(second) if n and token not in read)
    with torch.no_grad():
        lm.backbone.embedding.weight[second[step]] = math.inf
    scheduler = Scheduler(lm, end_id=NO_END)
    fine, bad = scheduler.add(request(0)), scheduler.add(request(3, keep_state=True))
    events = run(scheduler)
    assert tokens(events[bad]) == second[: step + 1]
    assert events[bad][-1] == Event(ticket=bad, token=None, finish="error")
    assert tokens(events[fine]) == first


def test_cancelling_what_is_not_there_is_fine() -> None:
    scheduler = Scheduler(LM, end_id=NO_END)
    scheduler.cancel(7)
    ticket = scheduler.add(request(0, max_new_tokens=1))
    assert len(run(scheduler)[ticket]) == 1
    scheduler.cancel(ticket)
    assert len(scheduler) == 0 and scheduler.step() == []


def test_wrong_requests_are_refused_at_once() -> None:
    scheduler = Scheduler(LM, end_id=NO_END)
    other = MambaState([torch.zeros(1, 3, 32)] * 2, [torch.zeros(1, 32, 16)] * 2)
    for wrong, error, message in (
        (request(0, max_new_tokens=0), ConfigError, "max_new_tokens=0 must be a whole number, at least 1"),
        (request(0, prompt=[]), ConfigError, "The prompt is empty"),
        (request(0, prompt=[3, VOCAB]), ConfigError, f"The prompt holds token {VOCAB}, outside"),
        (request(0, sampling=Sampling(seed=[1])), ConfigError, r"seed=\[1\] must be a single number"),
        (request(0, state=STATES[[0, 1]]), ShapeError, "state has 2 rows of 2 layers"),
        (request(0, state=other), ShapeError, r"ssm \[32, 16\].*needs one of 2"),
    ):
        with pytest.raises(error, match=message) as caught:
            scheduler.add(wrong)
        assert "\n" not in str(caught.value)
    assert len(scheduler) == 0
    for options in ({"max_rows": 0}, {"chunk": 0}):
        with pytest.raises(ConfigError, match="=0 must be at least 1"):
            Scheduler(LM, end_id=NO_END, **options)
