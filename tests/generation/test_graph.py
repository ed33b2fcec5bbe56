"""Captured runs of steps against single steps, with a stand-in for CUDA's graphs that is as frozen as they are."""

from __future__ import annotations

import gc
import logging
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from cobra.generation import graph
from cobra.generation import scheduler as scheduler_module
from cobra.generation.engine import decode
from cobra.generation.graph import GraphStepper, lent_stepper
from cobra.generation.rows import one_step
from cobra.generation.sampling import Sampling
from cobra.generation.scheduler import Request, Scheduler
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState
from cobra.ops import use_backend

from .models import NO_END, greedy, make_lm, make_prefixes, make_prompts, make_state


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
    """Captures as `CudaCapture` does: a few runs first, whose results do not matter."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, body: Callable[[], None]) -> Callable[[], object]:
        self.captures += 1
        for _ in range(2):
            body()
        recorder = Recorder()
        with recorder:
            body()
        return recorder.replay


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


def by_row(steps: Iterable[list[tuple[int, int]]]) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = defaultdict(list)
    for step in steps:
        for row, token in step:
            answers[row].append(token)
    return answers


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
    assert stand_in.captures > 3


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


@pytest.mark.parametrize(("limit", "counts"), [(1, []), (2, [1]), (4, [1, 2]), (40, [1, 2, 4, 8, 16, 8])])
def test_runs_double_and_end_with_the_answers(
    lm: MambaLM, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, limit: int, counts: list[int]
) -> None:
    found: list[int] = []
    call = GraphStepper.__call__

    def watched(self: Any, *args: Any) -> Tensor:
        tokens = call(self, *args)
        found.append(len(tokens))
        return tokens

    monkeypatch.setattr(GraphStepper, "__call__", watched)
    run(lm, 2, limit=limit)
    assert found == counts


def test_graphs_are_kept_for_the_next_call(lm: MambaLM, stand_in: StandIn) -> None:
    first = run(lm, 3, limit=20)
    assert stand_in.captures == 4  # runs of 1, 2, 4 and 8; the last four tokens need none of their own
    assert run(lm, 3, limit=20) == first and stand_in.captures == 4
    run(lm, 4, limit=20)
    assert stand_in.captures == 4  # the same bucket
    run(lm, 5, limit=20)
    assert stand_in.captures == 8


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


def test_failing_captures_are_told_once_and_decoding_goes_on(
    lm: MambaLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(lm, 3, limit=25)
    attempts = Counter[str]()

    def fail(body: Callable[[], None]) -> Any:
        attempts["all"] += 1
        body()
        if attempts["all"] > 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        return body

    monkeypatch.setattr(graph, "new_stepper", lambda llm: GraphStepper(fail))
    with caplog.at_level(logging.WARNING):
        assert run(lm, 3, limit=25) == expected
        assert run(lm, 3, limit=25) == expected
    assert attempts["all"] == 3 and len(caplog.records) == 1
    assert "without CUDA graphs" in caplog.text and "not permitted" in caplog.text and "more of it" not in caplog.text


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_a_gpu_gives_the_tokens_of_single_steps(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Real CUDA graphs; in float32, as sums of a batch may round otherwise and tokens be as likely."""
    lm = make_lm().float().cuda()
    prompts = make_prompts(7, 2, 13)
    settings: dict[str, Any] = {"max_new_tokens": 50, "end_id": NO_END, "sampling": Sampling(**options)}
    with caplog.at_level(logging.WARNING, logger=graph.__name__):
        found = by_row(decode(lm, prompts, None, **settings))
    assert not caplog.records
    monkeypatch.setattr(graph, "new_stepper", lambda llm: one_step)
    graph._idle.clear()
    assert found == by_row(decode(lm, prompts, None, **settings))
