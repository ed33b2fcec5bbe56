"""Captured runs of steps against single steps, with a stand-in for CUDA's graphs that is as frozen as they are."""

from __future__ import annotations

import gc
import logging
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from cobra.generation import graph
from cobra.generation import scheduler as scheduler_module
from cobra.generation.engine import decode
from cobra.generation.graph import Capture, GraphStepper, lent_stepper, release_graphs
from cobra.generation.rows import one_step, run_limit
from cobra.generation.sampling import Sampling
from cobra.generation.scheduler import Request, Scheduler
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState
from cobra.ops import use_backend

from .models import NO_END, by_row, greedy, make_lm, make_prefixes, make_prompts, make_state


class Recorder(TorchDispatchMode):
    """Notes every operation; `replay` does them again on the same memory, with all Python values as they were.

    So whatever a run reads that is not in its buffers stays what it was at the capture, as in a CUDA graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), "a host sync"
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        made: dict[int, Tensor] = {}

        def current(value: Any) -> Any:
            return made.get(id(value), value) if isinstance(value, Tensor) else value

        for func, args, kwargs, result in self.operations:
            again = func(*tree_map(current, args), **tree_map(current, kwargs))
            pairs = zip(result, again, strict=True) if isinstance(result, (tuple, list)) else [(result, again)]
            for old, new in pairs:
                if isinstance(old, Tensor):
                    made[id(old)] = new


class StandIn:
    """Makes captures that do as `CudaCapture` does: a few runs first, whose results do not matter.

    The graphs of one capture share memory that goes with the last of them: then it must not be used again.
    """

    def __init__(self) -> None:
        self.captures = 0
        self.last = Recorder()

    def __call__(self) -> Capture:
        alive: weakref.WeakSet[Recorder] = weakref.WeakSet()
        is_used = False

        def capture(body: Callable[[], None]) -> Callable[[], object]:
            nonlocal is_used
            assert alive or not is_used, "this capture's memory is gone"
            is_used = True
            self.captures += 1
            for _ in range(2):
                body()
            recorder = Recorder()
            with recorder:
                body()
            alive.add(recorder)
            self.last = weakref.proxy(recorder)
            return recorder.replay

        return capture


@pytest.fixture
def lm() -> Iterator[MambaLM]:
    with use_backend("reference"):  # plain operations, which the recorder sees
        yield make_lm()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Let all decoding go through captured runs."""
    capture = StandIn()
    for module in (graph, scheduler_module):
        monkeypatch.setattr(module, "new_stepper", lambda llm: GraphStepper(capture))
    return capture


def run(lm: MambaLM, rows: int, *, limit: int, end_id: int = NO_END, is_over: Any = None, **options: Any) -> Any:
    prompts, state = make_prompts(*range(2, 2 + rows)), make_state(lm, rows)
    sampling = Sampling(**options)
    steps = decode(lm, prompts, state, max_new_tokens=limit, end_id=end_id, sampling=sampling, is_over=is_over)
    answers = by_row(steps)
    return [answers[row] for row in range(rows)]


def until(tokens: list[int], end_id: int, last: int) -> list[int]:
    """Cut before the first `end_id`, or behind the first `last`."""
    for n, token in enumerate(tokens):
        if token in (end_id, last):
            return tokens[: n + (token == last)]
    return tokens


@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_tokens_equal_full_passes(lm: MambaLM, stand_in: StandIn, rows: int) -> None:
    prefixes, prompts = make_prefixes(rows).tolist(), make_prompts(*range(2, 2 + rows))
    wholes = [greedy(lm, [*prefix, *prompt], 40) for prefix, prompt in zip(prefixes, prompts, strict=True)]
    end_id, last = wholes[0][20], wholes[-1][9]
    expected = [until(whole, end_id, last) for whole in wholes]
    heard: dict[int, list[int]] = defaultdict(list)

    def is_over(row: int, token: int) -> bool:
        heard[row].append(token)
        return token == last

    assert run(lm, rows, limit=40, end_id=end_id, is_over=is_over) == expected
    assert [heard[row] for row in range(rows)] == expected  # nothing behind an answer's end is told
    assert run(lm, rows, limit=40) == wholes
    assert stand_in.captures > 2


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 2.0, "top_k": 9, "repetition_penalty": 1.3},
        {"temperature": 1.0, "top_p": 0.8, "min_p": 0.01},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_sampled_tokens_equal_those_of_single_steps(
    lm: MambaLM, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    expected = run(lm, 5, limit=35, **options)
    request.getfixturevalue("stand_in")
    assert run(lm, 5, limit=35, **options) == expected
    assert run(lm, 2, limit=35, **options) == expected[:2]


def test_rows_come_and_go(lm: MambaLM, request: pytest.FixtureRequest) -> None:
    """Buckets of 1 to 4 rows, with other options in every row, and states handed out."""
    prompts, states, prefixes = make_prompts(7, 2, 13, 5, 3), make_state(lm, 5), make_prefixes(5).tolist()
    samplings = [Sampling(), Sampling(temperature=1.0, top_k=5), Sampling(repetition_penalty=1.4), Sampling()]
    samplings.append(Sampling(temperature=3.0, top_k=90, seed=8))
    limits = [33, 50, 18, 7, 41]
    expected: list[list[int]] = []
    for row, (sampling, limit) in enumerate(zip(samplings, limits, strict=True)):
        steps = decode(lm, [prompts[row]], states[[row]], max_new_tokens=limit, end_id=NO_END, sampling=sampling)
        expected.append([token for step in steps for _, token in step])
    assert expected[0] == greedy(lm, [*prefixes[0], *prompts[0]], limits[0])

    request.getfixturevalue("stand_in")
    scheduler = Scheduler(lm, end_id=NO_END, max_rows=4, chunk=8)
    found: dict[int, list[int]] = defaultdict(list)
    after: dict[int, MambaState | None] = {}
    for row in range(5):
        options: dict[str, Any] = {"sampling": samplings[row], "keep_state": row % 2 == 0}
        one = Request(prompt=prompts[row], state=states[[row]], max_new_tokens=limits[row], **options)
        assert scheduler.add(one) == row
        while len(scheduler) and (row == 4 or not found[row]):
            for event in scheduler.step():
                found[event.ticket] += [] if event.token is None else [event.token]
                after |= {event.ticket: event.state} if event.finish == "length" else {}
    assert [found[row] for row in range(5)] == expected
    for row, state in sorted(after.items()):
        assert (state is not None) == (row % 2 == 0)
        if state is not None:
            _, whole = lm(lm.embed(torch.tensor([[*prefixes[row], *prompts[row], *found[row]]])))
            for ours, theirs in zip([*state.conv, *state.ssm], [*whole.conv, *whole.ssm], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert len(after) == 5


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of each run, as they are made."""
    found: list[int] = []
    call = GraphStepper.__call__

    def watched(self: Any, *args: Any) -> Tensor:
        tokens = call(self, *args)
        found.append(len(tokens))
        return tokens

    monkeypatch.setattr(GraphStepper, "__call__", watched)
    return found


@pytest.mark.parametrize(("limit", "expected"), [(1, []), (2, [1]), (4, [1, 1, 1]), (40, [1, 4, 16, 16, 1, 1])])
def test_runs_grow_and_end_with_the_answers(
    lm: MambaLM, stand_in: StandIn, lengths: list[int], limit: int, expected: list[int]
) -> None:
    run(lm, 2, limit=limit)
    assert lengths == expected


@pytest.mark.parametrize(
    ("counts", "left", "others_wait", "expected"),
    [
        ([1, 1], [50, 9], False, 1),
        ([1, 90], [50, 60], False, 4),
        ([5, 90], [50, 60], False, 50),
        ([5, 90], [50, 60], True, 4),
        ([5, 90], [50, 2], False, 4),  # and no run of 2 or 1 for all, because one is nearly done
        ([5, 90], [3, 2], True, 3),
        ([1, 1], [1, 1], True, 1),
    ],
)
def test_newcomers_shorten_a_run_but_not_to_single_steps(
    counts: list[int], left: list[int], others_wait: bool, expected: int
) -> None:
    assert run_limit(counts, left, others_wait) == expected


def test_steady_arrivals_leave_runs_of_several_steps(lm: MambaLM, stand_in: StandIn, lengths: list[int]) -> None:
    scheduler = Scheduler(lm, end_id=NO_END, max_rows=4)
    scheduler.add(Request(prompt=[1, 2], max_new_tokens=200))
    told: dict[int, int] = {}  # the call of `step` in which an answer's first token came
    for call in range(20):
        newcomer = scheduler.add(Request(prompt=[3], max_new_tokens=10))
        for event in scheduler.step():
            told.setdefault(event.ticket, call)
        assert newcomer > 3 or told[newcomer] == call  # while there is room
    assert lengths[:1] == [1] and set(lengths[1:]) == {4}


def test_graphs_are_kept_for_the_next_call(lm: MambaLM, stand_in: StandIn) -> None:
    first = run(lm, 3, limit=20)
    assert stand_in.captures == 2  # runs of 1 and 4
    assert run(lm, 3, limit=20) == first and stand_in.captures == 2
    run(lm, 4, limit=20)
    assert stand_in.captures == 2  # the same bucket
    run(lm, 5, limit=20)
    assert stand_in.captures == 4
    release_graphs(lm)
    assert run(lm, 3, limit=20) == first and stand_in.captures == 6


def test_few_graphs_are_kept(lm: MambaLM, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last used of one batch, and those of two batches."""
    expected = [run(lm, rows, limit=12) for rows in (1, 2, 3)]
    before = stand_in.captures
    release_graphs(lm)
    monkeypatch.setattr(graph, "MOST_GRAPHS", 3)
    assert [run(lm, rows, limit=12) for rows in (1, 2, 3, 3)] == [*expected, expected[2]]
    assert stand_in.captures == 2 * before  # those of three rows were there again
    assert run(lm, 1, limit=12) == expected[0] and stand_in.captures > 2 * before  # those of one row were not

    settings: dict[str, Any] = {"max_new_tokens": 12, "end_id": NO_END, "sampling": Sampling()}
    iterators = [decode(lm, [prompt], None, **settings) for prompt in make_prompts(2, 2, 2)]
    for iterator in iterators:
        next(iterator), next(iterator)
    for iterator in iterators:
        iterator.close()
    assert len(graph._idle[lm]) == 2


def test_graphs_used_long_ago_go_first(lm: MambaLM, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MOST_GRAPHS", 2)

    def captures(rows: int) -> int:
        before = stand_in.captures
        run(lm, rows, limit=2)  # a run of one step: one graph
        return stand_in.captures - before

    assert [captures(rows) for rows in (1, 2, 1)] == [1, 1, 0]  # that of two rows is older now, though made later
    assert [captures(rows) for rows in (4, 1, 2)] == [1, 0, 1]


def test_a_temperature_alone_costs_no_sorting(lm: MambaLM, stand_in: StandIn) -> None:
    def sorts(**options: Any) -> int:
        run(lm, 1, limit=2, **options)
        return sum("sort" in str(func) for func, *_ in stand_in.last.operations)

    assert sorts(temperature=1.0) == 0
    assert sorts(temperature=1.0, top_p=0.9) == 1


def test_decoding_in_between_changes_nothing(lm: MambaLM, stand_in: StandIn) -> None:
    """Two answers that are generated by turns do not share buffers."""
    prompts = make_prompts(6, 4)
    expected = [greedy(lm, prompt, 30) for prompt in prompts]
    options: dict[str, Any] = {"max_new_tokens": 30, "end_id": NO_END, "sampling": Sampling()}
    iterators = [decode(lm, [prompt], None, **options) for prompt in prompts]
    found: list[list[int]] = [[], []]
    while any(len(tokens) < 30 for tokens in found):
        for tokens, iterator in zip(found, iterators, strict=True):
            tokens += [token for _, token in next(iterator, [])]
    assert found == expected


def test_new_weights_and_backends_make_new_graphs(lm: MambaLM, stand_in: StandIn) -> None:
    first = run(lm, 1, limit=9)
    with torch.no_grad():
        lm.backbone.norm_f.weight.mul_(torch.linspace(-1, 2, 32).double())  # in place: graphs read it
    second, captures = run(lm, 1, limit=9), stand_in.captures
    assert second != first
    lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.flip(0), requires_grad=False)
    third = run(lm, 1, limit=9)
    assert third != second and stand_in.captures > captures
    prompt, prefix = make_prompts(2)[0], make_prefixes(1)[0].tolist()
    assert third[0] == greedy(lm, [*prefix, *prompt], 9)


def test_a_changed_dtype_makes_new_graphs(lm: MambaLM, stand_in: StandIn) -> None:
    run(lm, 2, limit=9)
    captures = stand_in.captures
    lm.float()
    expected = [greedy(lm, prompt, 9) for prompt in make_prompts(4, 2)]
    steps = decode(lm, make_prompts(4, 2), None, max_new_tokens=9, end_id=NO_END, sampling=Sampling())
    assert list(by_row(steps).values()) == expected
    assert stand_in.captures == 2 * captures


def test_hooks_are_run_at_every_step(lm: MambaLM, stand_in: StandIn) -> None:
    """A graph holds what they did when it was captured, so there is none while there are hooks."""
    first, captures = run(lm, 2, limit=9), stand_in.captures
    calls = Counter[str]()

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        calls["all"] += 1
        return -output

    handle = lm.lm_head.register_forward_hook(hook)
    assert run(lm, 2, limit=9) != first
    assert calls["all"] == 9 and stand_in.captures == captures
    handle.remove()
    assert run(lm, 2, limit=9) == first and stand_in.captures == 2 * captures


@pytest.mark.parametrize(("failures", "attempts", "warnings"), [(1, 4, 0), (9, 2, 1)])
def test_captures_that_fail_twice_are_given_up_and_told_once(
    lm: MambaLM,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failures: int,
    attempts: int,
    warnings: int,
) -> None:
    expected = run(lm, 3, limit=25)
    made = Counter[str]()
    stand_in = StandIn()

    def new_capture() -> Capture:
        capture = stand_in()

        def failing(body: Callable[[], None]) -> Any:
            made["attempts"] += 1
            body()
            if made["attempts"] <= failures:
                raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
            return capture(body)

        return failing

    monkeypatch.setattr(graph, "new_stepper", lambda llm: GraphStepper(new_capture))
    monkeypatch.setattr(graph, "_told", False)
    with caplog.at_level(logging.WARNING):
        assert run(lm, 3, limit=25) == expected
        assert run(lm, 3, limit=25) == expected
        assert made["attempts"] == attempts and len(caplog.records) == warnings
        release_graphs(lm)
        assert run(lm, 3, limit=25) == expected  # another stepper, which does not say it again
    assert len(caplog.records) == warnings
    if warnings:
        assert "without CUDA graphs" in caplog.text and "not permitted" in caplog.text
        assert "more of it" not in caplog.text


def test_models_are_freed(stand_in: StandIn) -> None:
    with use_backend("reference"):
        lm = make_lm()
        run(lm, 2, limit=5)
    gone = weakref.ref(lm)
    del lm
    gc.collect()
    assert gone() is None


def test_a_cpu_does_one_step_at_a_time(lm: MambaLM) -> None:
    with lent_stepper(lm) as stepper:
        assert stepper is one_step
