"""Real captures on a GPU against single steps."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cobra.generation import graph
from cobra.generation.engine import decode
from cobra.generation.graph import release_graphs
from cobra.generation.rows import advance, one_step
from cobra.generation.sampling import Sampling
from cobra.generation.scheduler import Request, Scheduler
from cobra.models.mamba import MambaLM
from cobra.ops import use_backend

from .models import NO_END, by_row, make_lm, make_prompts

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(lm: MambaLM, device: str = "cuda", **options: Any) -> list[list[int]]:
    """Three answers, in buckets of 4, 2 and 1 rows as they end."""
    whole = dict[str, Any](max_new_tokens=50, end_id=7, sampling=Sampling(**options))
    answers = by_row(decode(lm.to(device), make_prompts(7, 2, 13), None, **whole))
    return [answers[row] for row in range(3)]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[int]]]:
    """As `on_gpu`, by single steps."""

    def decode_eagerly(*args: Any, **options: Any) -> list[list[int]]:
        with monkeypatch.context() as patch:
            patch.setattr(graph, "new_stepper", lambda llm: one_step)
            return on_gpu(*args, **options)

    return decode_eagerly


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count what real captures do; a test that sees none would have compared single steps with themselves."""
    counts = Counter[str]()
    call = graph.CudaCapture.__call__

    def counted(self: Any, body: Callable[[], None]) -> Any:
        replay = call(self, body)
        counts["made"] += 1

        def replayed() -> None:
            counts["replayed"] += 1
            replay()

        return replayed

    monkeypatch.setattr(graph.CudaCapture, "__call__", counted)
    return counts


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_a_gpu_gives_the_tokens_of_single_steps(options: Any, eager: Any, captures: Counter[str]) -> None:
    lm = make_lm()
    assert on_gpu(lm, **options) == eager(lm, **options)
    assert captures["made"] and captures["replayed"] > captures["made"]


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_captures_again_after_new_weights(eager: Any, captures: Counter[str]) -> None:
    """All graphs are dropped in between, and the memory that they shared with them; and so for a model that moves."""
    lm = make_lm()
    first, made = on_gpu(lm), captures["made"]
    lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.flip(0), requires_grad=False)
    second = on_gpu(lm)
    assert second != first and captures["made"] > made
    assert second == eager(lm)
    made = captures["made"]
    on_gpu(lm, "cpu")
    assert captures["made"] == made
    assert on_gpu(lm) == second


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_decodes_on_when_captures_fail(
    eager: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lm = make_lm()
    expected = eager(lm)

    def waits(*args: Any) -> Tensor:
        tokens = advance(*args)
        tokens.sum().item()  # what a capture cannot hold
        return tokens

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger=graph.__name__):
        patch.setattr(graph, "advance", waits)
        patch.setattr(graph, "_told", False)
        before = torch.cuda.current_stream()
        assert on_gpu(lm) == expected
        assert torch.cuda.current_stream() == before
        assert len(caplog.records) == 1 and "without CUDA graphs" in caplog.text
    release_graphs(lm)
    assert on_gpu(lm) == expected  # by graphs again: the failures have left nothing behind


@pytest.mark.gpu
@needs_gpu
def test_rows_come_and_go_on_a_gpu(captures: Counter[str]) -> None:
    lm = make_lm()
    prompts, limits = make_prompts(7, 2, 13, 5, 3), [33, 50, 18, 7, 41]
    samplings = [Sampling(), Sampling(temperature=1.0, top_k=5), Sampling(repetition_penalty=1.4), Sampling()]
    samplings.append(Sampling(temperature=3.0, top_k=90, top_p=0.9, seed=8))
    expected: list[list[int]] = []
    for prompt, limit, sampling in zip(prompts, limits, samplings, strict=True):
        steps = decode(lm, [prompt], None, max_new_tokens=limit, end_id=NO_END, sampling=sampling)  # on the CPU
        expected.append(by_row(steps)[0])
    scheduler = Scheduler(lm.cuda(), end_id=NO_END, max_rows=4, chunk=8)
    found: dict[int, list[int]] = defaultdict(list)
    for prompt, limit, sampling in zip(prompts, limits, samplings, strict=True):
        ticket = scheduler.add(Request(prompt=prompt, max_new_tokens=limit, sampling=sampling))
        while len(scheduler) and (ticket == 4 or not found[ticket]):
            for event in scheduler.step():
                found[event.ticket] += [] if event.token is None else [event.token]
    assert [found[row] for row in range(5)] == expected
    assert captures["replayed"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_capture_each_their_own(eager: Any, captures: Counter[str]) -> None:
    """The current device stays the first."""
    first, second = make_lm(), make_lm()
    expected = eager(first, "cuda:0")
    assert on_gpu(first, "cuda:0") == expected
    made = captures["made"]
    assert on_gpu(second, "cuda:1") == expected and captures["made"] == 2 * made
    assert on_gpu(first, "cuda:0") == expected and captures["made"] == 2 * made
    assert on_gpu(first, "cuda:1") == expected  # moved


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_capture_holds_the_triton_step(dtype: torch.dtype, captures: Counter[str]) -> None:
    """Logits and not tokens, which may be as likely as others in these types; the same kernels give the same."""
    pytest.importorskip("triton")
    lm = make_lm().to("cuda", dtype)
    tokens = torch.tensor([5, 9], device="cuda")
    with use_backend("triton"), torch.inference_mode():
        _, state = lm(lm.embed(tokens[:, None]))
        expected, after = lm.step(tokens, state)
        found = torch.zeros_like(expected)
        ssm = torch.zeros_like(after.ssm[-1])

        def body() -> None:
            hidden, moved = lm.step(tokens, state)
            found.copy_(hidden)
            ssm.copy_(moved.ssm[-1])

        replay = graph.CudaCapture()(body)
        found.zero_()
        ssm.zero_()
        replay()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(ssm, after.ssm[-1], rtol=0, atol=0)
        tokens += 1  # read at the same address
        replay()
        torch.testing.assert_close(found, lm.step(tokens, state)[0], rtol=0, atol=0)
