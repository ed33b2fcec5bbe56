"""Batched decoding against each row alone, and against passes over whole sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from cobra.errors import ConfigError, NumericsError
from cobra.generation.engine import choice_probabilities, decode, prefill
from cobra.generation.sampling import Sampling
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState

from .models import NO_END, VOCAB, full_pass, make_lm, make_prompts, make_state

ROUNDING = 1e-10  # float64 sums of some hundred terms of size 1, in another order


@pytest.fixture
def lm() -> MambaLM:
    return make_lm()


def run(
    lm: MambaLM,
    prompts: Sequence[Sequence[int]],
    state: MambaState | None = None,
    *,
    max_new_tokens: int = 20,
    end_id: int = NO_END,
    is_over: Any = None,
    **options: Any,
) -> list[list[int]]:
    """Tokens of each row."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in decode(
        lm,
        prompts,
        state,
        max_new_tokens=max_new_tokens,
        end_id=end_id,
        sampling=Sampling(**options),
        is_over=is_over,
    ):
        for row, token in step:
            answers[row].append(token)
    return answers


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 12, 13, 100])
@pytest.mark.parametrize("with_state", [False, True])
def test_prefill_in_chunks_equals_each_row_alone(lm: MambaLM, chunk: int, with_state: bool) -> None:
    prompts = make_prompts(7, 1, 13, 5, 3, 12)
    state = make_state(lm, len(prompts)) if with_state else None
    logits, after = prefill(lm, prompts, state, chunk=chunk)
    for row, prompt in enumerate(prompts):
        hidden, alone = lm(lm.embed(torch.tensor([prompt])), state=state[[row]] if state else None)
        torch.testing.assert_close(logits[row], lm.head(hidden[0, -1])[:VOCAB], rtol=0, atol=ROUNDING)
        for ours, theirs in zip([*after.conv, *after.ssm], [*alone.conv, *alone.ssm], strict=True):
            torch.testing.assert_close(ours[[row]], theirs, rtol=0, atol=ROUNDING)


def test_prefill_reads_no_more_than_a_chunk_at_a_time(lm: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    widths, forward = [], lm.forward

    def watched(embeddings: Tensor, **others: Any) -> Any:
        widths.append(embeddings.shape[1])
        return forward(embeddings, **others)

    monkeypatch.setattr(lm, "forward", watched)
    prefill(lm, make_prompts(11, 4), None, chunk=4)
    assert widths == [4, 4, 3]


def test_greedy_batch_equals_full_passes_of_each_row(lm: MambaLM) -> None:
    prompts = make_prompts(7, 1, 13, 5)
    answers = run(lm, prompts)
    assert len({tuple(answer) for answer in answers}) == 4 and len(set(answers[0])) > 3
    for prompt, answer in zip(prompts, answers, strict=True):
        for n, token in enumerate(answer):
            assert token == int(full_pass(lm, [*prompt, *answer[:n]]).argmax())


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 3}])
def test_rows_do_not_depend_on_the_batch(lm: MambaLM, options: dict[str, Any]) -> None:
    """Rows finish at different steps, some by the end token and some by `is_over`, and leave the batch."""
    prompts, seed = make_prompts(7, 1, 13, 5, 3, 9), options.get("seed", 0)
    state = make_state(lm, len(prompts))
    free = run(lm, prompts, state, **options)
    end_id, last = free[0][6], free[1][3]

    def is_over(row: int, token: int) -> bool:
        return token == last

    answers = run(lm, prompts, state, end_id=end_id, is_over=is_over, **options)
    assert len({len(answer) for answer in answers}) > 2
    for row, prompt in enumerate(prompts):
        cut = next((n for n, token in enumerate(free[row]) if token == end_id), len(free[row]))
        over = next((n + 1 for n, token in enumerate(free[row]) if token == last), len(free[row]))
        assert answers[row] == free[row][: min(cut, over)]
        alone = options | ({"seed": seed + row} if options else {})
        assert run(lm, [prompt], state[[row]], end_id=end_id, is_over=is_over, **alone) == [answers[row]]


def test_finished_rows_are_not_computed(lm: MambaLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, step = [], lm.step

    def watched(input_ids: Tensor, state: MambaState) -> Any:
        sizes.append(len(input_ids))
        return step(input_ids, state)

    monkeypatch.setattr(lm, "step", watched)
    counts = [0, 0, 0]

    def is_over(row: int, token: int) -> bool:
        counts[row] += 1
        return counts[row] == (5, 2, 4)[row]

    answers = run(lm, make_prompts(3, 4, 5), max_new_tokens=9, is_over=is_over)
    assert [len(answer) for answer in answers] == [5, 2, 4]
    assert sizes == [3, 2, 2, 1]  # and none after the last token


def test_seeds_belong_to_rows(lm: MambaLM) -> None:
    prompts = make_prompts(6) * 4
    answers = run(lm, prompts, temperature=2.0, seed=[8, 5, 8, 6])
    assert answers[0] == answers[2] and len({tuple(answer) for answer in answers}) == 3
    assert run(lm, prompts, temperature=2.0, seed=5)[:2] == [answers[1], answers[3]]


def test_longer_limit_continues_the_same_answer(lm: MambaLM) -> None:
    prompts = make_prompts(6, 3)
    short, long = (run(lm, prompts, temperature=2.0, max_new_tokens=n) for n in (6, 15))
    assert short == [answer[:6] for answer in long]
    assert all(len(set(zip(*[iter(answer[:12])] * 4, strict=True))) == 3 for answer in long)  # no draws come twice


@pytest.mark.parametrize("penalty", [1.5, 0.6])
def test_penalty_counts_prompt_and_answer(lm: MambaLM, penalty: float) -> None:
    prompts = make_prompts(7, 2, 13)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)
    answers = run(lm, prompts, repetition_penalty=penalty)
    assert answers != run(lm, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        for n, token in enumerate(answer):
            ids = [*prompt, *answer[:n]]
            assert token == int(theirs(torch.tensor([ids]), full_pass(lm, ids)).argmax())  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"temperature": 5.0}, {"temperature": 1.0, "repetition_penalty": 1.5}])
def test_padding_of_the_vocabulary_is_never_chosen(lm: MambaLM, options: dict[str, Any]) -> None:
    prompts = make_prompts(7, 2, 13)
    expected, scores = run(lm, prompts, **options), choice_probabilities(lm, prompts, None, [3, 50])
    with torch.no_grad():
        direction = torch.randn(32, generator=torch.Generator().manual_seed(3)).double()
        lm.lm_head.weight[VOCAB:] = 1e4 * torch.stack([direction, -direction, direction])
    for prompt in prompts:
        hidden, _ = lm(lm.embed(torch.tensor([prompt])))
        assert int(lm.head(hidden[0, -1]).argmax()) >= VOCAB
    assert run(lm, prompts, **options) == expected
    torch.testing.assert_close(choice_probabilities(lm, prompts, None, [3, 50]), scores)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1}])
def test_broken_models_are_reported(lm: MambaLM, options: dict[str, Any]) -> None:
    prompts, state = make_prompts(4, 3, 5), make_state(lm, 3)
    state.ssm[0][1, 0, 0] = math.nan
    with pytest.raises(NumericsError, match="token 1 of answer 1 hold NaN or infinity") as caught:
        run(lm, prompts, state, **options)
    assert "float64" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(NumericsError, match="the choices"):
        choice_probabilities(lm, prompts, state, [1, 2])


def test_broken_models_are_reported_later(lm: MambaLM) -> None:
    """The first row has gone when the second one meets a token with a broken embedding."""
    prompts = make_prompts(4, 5)
    second = run(lm, prompts)[1]
    step = next(n for n, token in enumerate(second) if n and token not in (*prompts[0], *prompts[1], *second[:n]))
    with torch.no_grad():
        lm.backbone.embedding.weight[second[step]] = math.inf
    with pytest.raises(NumericsError, match=f"token {step + 2} of answer 1"):
        run(lm, prompts, is_over=lambda row, token: row == 0)


def test_wrong_use_is_refused_at_once(lm: MambaLM) -> None:
    prompts = make_prompts(4, 3)
    for options, message in (
        ({"max_new_tokens": 0, "sampling": Sampling()}, "max_new_tokens=0 must be a whole number, at least 1"),
        ({"max_new_tokens": 1, "sampling": Sampling(seed=[1, 2, 3])}, "seed holds 3 numbers for 2 answers"),
    ):
        with pytest.raises(ConfigError, match=message):
            decode(lm, prompts, None, end_id=0, **options)
    with pytest.raises(ConfigError, match="chunk=0 must be at least 1"):
        prefill(lm, prompts, None, chunk=0)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "There are no prompts"),
        ([[1], []], "Prompt 1 is empty"),
        ([[1], [3, VOCAB, 2]], f"Prompt 1 holds token {VOCAB}, outside of the {VOCAB} tokens"),  # a row of the padding
        ([[1, -1], [2]], "Prompt 0 holds token -1, outside"),
        ([[2**40]], f"Prompt 0 holds token {2**40}, outside"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_read_are_refused_at_once(lm: MambaLM, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prefill(lm, prompts, None)
    with pytest.raises(ConfigError, match=message):
        decode(lm, prompts, None, max_new_tokens=1, end_id=0, sampling=Sampling(repetition_penalty=1.1))


@pytest.mark.parametrize(
    ("choices", "message"),
    [([], "choice_ids is empty"), ([3, VOCAB], f"holds token {VOCAB}, outside"), ([-1, 3], "holds token -1, outside")],
    ids=str,
)
def test_choices_that_are_no_tokens_are_refused(lm: MambaLM, choices: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choice_probabilities(lm, make_prompts(4), None, choices)
