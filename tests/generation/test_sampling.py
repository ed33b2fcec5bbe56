"""Each filter against transformers' own; draws against their distribution; streams that belong to rows."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cobra.errors import ConfigError
from cobra.generation import sampling as module
from cobra.generation.sampling import Sampler, Sampling, SamplingOptions, draw, penalize, splitmix, uniforms

ROWS, VOCAB = 16, 300
CPU = torch.device("cpu")
ROUNDING = 1e-12  # float64 sums of 300 terms below 1

THEIRS: dict[str, Any] = {  # in the order in which transformers' generate applies them
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


def make_logits(scale: float = 3.0) -> Tensor:
    return scale * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Ours, with the same sampling in all rows."""
    sampler = make_sampler(sampling, [[0]] * len(logits), logits.shape[1])
    return module.probabilities(logits, sampler.options, sampler.filters)


def make_sampler(sampling: Sampling, prompts: list[list[int]], vocab_size: int) -> Sampler:
    return Sampler(sampling.per_row(len(prompts)), prompts, vocab_size, CPU)


def warped(logits: Tensor, **options: Any) -> Tensor:
    """The distribution that transformers draws from."""
    processors = LogitsProcessorList([THEIRS[name](options[name]) for name in THEIRS if name in options])
    return processors(torch.zeros(ROWS, 0, dtype=torch.int64), logits).softmax(dim=-1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"temperature": 4.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": VOCAB + 5},
        {"top_p": 1e-6},
        {"top_p": 0.5},
        {"top_p": 0.99},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 2.5, "min_p": 0.1},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 3.0, "top_k": 90, "top_p": 0.8, "min_p": 0.2},
    ],
    ids=str,
)
def test_distribution_equals_transformers(options: dict[str, Any]) -> None:
    options = {"temperature": 1.0} | options
    ours, theirs = probabilities(make_logits(), Sampling(**options)), warped(make_logits(), **options)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p"])
def test_order_of_filters_shows(name: str) -> None:
    """Each filter of the last case above removes something the others leave; else that case would not test it."""
    options: dict[str, Any] = {"temperature": 3.0, "top_k": 90, "top_p": 0.8, "min_p": 0.2}
    fewer = {key: value for key, value in options.items() if key != name}
    counts = [int((probabilities(make_logits(), Sampling(**chosen)) > 0).sum()) for chosen in (options, fewer)]
    assert ROWS < counts[0] < counts[1]


def test_tokens_as_likely_as_the_last_of_the_top_stay() -> None:
    kept = probabilities(torch.tensor([[1.0, 3.0, 1.0, 0.0]]), Sampling(temperature=1.0, top_k=2)) > 0
    assert kept.tolist() == [[True, True, True, False]]


def test_min_p_is_a_share_of_the_largest_after_temperature() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    at = {t: probabilities(logits, Sampling(temperature=t, min_p=0.25))[0] for t in (1.0, 2.0)}
    torch.testing.assert_close(at[1.0], torch.tensor([0.5, 0.3, 0.15, 0]).double() / 0.95, rtol=1e-6, atol=0)
    assert bool((at[2.0] > 0).all())  # sqrt(0.1) > 0.25


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_penalty_equals_transformers(penalty: float) -> None:
    logits, ids = make_logits(), torch.randint(VOCAB, (ROWS, 40), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(ROWS, VOCAB, dtype=torch.bool).scatter(1, ids, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())  # type: ignore[arg-type]
    torch.testing.assert_close(
        penalize(logits, seen, torch.full([ROWS], penalty, dtype=torch.float64)), theirs, rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e300])
def test_extreme_temperatures_give_a_distribution(temperature: float) -> None:
    found = probabilities(make_logits(), Sampling(temperature=temperature))
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(ROWS).double(), rtol=0, atol=ROUNDING)
    expected = torch.zeros_like(found).scatter(1, make_logits().argmax(1, keepdim=True), 1.0)
    torch.testing.assert_close(found, expected if temperature < 1 else torch.full_like(found, 1 / VOCAB))


def test_draws_follow_the_distribution() -> None:
    """16384 draws, 64 rows of 256 steps. Five standard deviations: one of 40 tokens leaves them once in 40,000 runs."""
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).expand(64, 40)
    sampling = Sampling(temperature=1.5, min_p=0.05, seed=11)
    sampler = make_sampler(sampling, [[0]] * 64, 40)
    drawn = torch.stack([sampler.choose(logits) for _ in range(256)])
    share = torch.bincount(drawn.flatten(), minlength=40) / drawn.numel()
    expected = probabilities(logits[:1], sampling)[0]
    bound = 5 * (expected * (1 - expected) / drawn.numel()).sqrt()
    assert bool(((share - expected).abs() <= bound).all())
    unfiltered = probabilities(logits[:1], Sampling(temperature=1.5))[0]
    assert bool(((share - unfiltered).abs() > bound).any())  # so fine is the bound


def test_first_draws_of_neighbouring_seeds_are_independent() -> None:
    """4096 rows; the standard deviations are those of uniform numbers: 1/sqrt(12 n) of a mean, 1/sqrt(n) of r."""
    numbers = uniforms(torch.arange(4096), torch.zeros(4096, dtype=torch.int64))
    assert bool(((numbers >= 0) & (numbers < 1)).all())
    assert abs(float(numbers.mean()) - 0.5) < 4 / math.sqrt(12 * 4096)
    assert abs(float(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1])) < 4 / math.sqrt(4096)


def test_numbers_of_a_stream_are_independent() -> None:
    numbers = uniforms(torch.full([4096], 7), torch.arange(4096))
    assert bool(((numbers >= 0) & (numbers < 1)).all()) and numbers.unique().numel() == 4096
    assert abs(float(numbers.mean()) - 0.5) < 4 / math.sqrt(12 * 4096)
    assert abs(float(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1])) < 4 / math.sqrt(4096)


@pytest.mark.parametrize("seed", [0, 1234567, 2**63 - 1])
def test_numbers_are_those_of_splitmix64(seed: int) -> None:
    """The generator in Python's integers; its first number for 1234567 is published in several places."""

    def scramble(state: int) -> int:
        z = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    assert scramble(1234567) == 6457827717110365317
    assert int(splitmix(torch.tensor([seed]))) % 2**64 == scramble(seed)
    expected = [(scramble(scramble(seed) + step * 0x9E3779B97F4A7C15) >> 11) / 2**53 for step in range(5)]
    assert uniforms(torch.full([5], seed), torch.arange(5)).tolist() == expected


BELOW_1 = 1 - 2**-53


@pytest.mark.parametrize(
    ("weights", "uniform", "token"),
    [
        ([0.0, 0.5, 0.5, 0.0], 0.0, 1),  # the first token that is possible, not the first
        ([0.0, 0.5, 0.5, 0.0], 0.5, 2),
        ([0.0, 0.5, 0.0, 0.5], 0.5, 3),
        ([0.0, 0.5, 0.5, 0.0], BELOW_1, 2),
        ([0.0, 0.5, 0.5, 0.0], 1.0, 2),  # as if the product had been rounded up
        ([0.0, 0.1, 0.2, 0.0], BELOW_1, 2),  # sums below 1
        ([1.0, 0.0, 0.0, 0.0], BELOW_1, 0),
        ([1.0, 1e-20, 0.0, 0.0], BELOW_1, 0),  # vanishes in the sum
        ([0.0, 5e-324, 0.0, 0.0], BELOW_1, 1),
    ],
)
def test_draws_at_the_edges(weights: list[float], uniform: float, token: int) -> None:
    drawn = draw(torch.tensor([weights], dtype=torch.float64), torch.tensor([uniform], dtype=torch.float64))
    assert drawn.tolist() == [token]


def test_draws_endure_sums_that_do_not_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU adds in parallel, and the sum at a token of probability 0 may round above the one before it."""
    weights, uniform = torch.tensor([[0.5, 0.0, 0.0, 0.5]]), torch.tensor([0.55])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_, **__: torch.tensor([[0.5, 0.6, 0.5, 1.0]]))
    assert draw(weights, uniform).tolist() == [3]


def test_impossible_tokens_are_never_drawn() -> None:
    kept = probabilities(make_logits(1.0).repeat(500, 1), Sampling(temperature=1.0, top_k=3))
    uniforms = torch.rand(len(kept), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert bool((kept.gather(1, draw(kept, uniforms)[:, None]) > 0).all())


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits = torch.tensor([[3.0, 2.0, -1.0]] * 2)
    sampler = make_sampler(Sampling(repetition_penalty=2.0), [[0], [2]], 3)
    chosen = [sampler.choose(logits).tolist() for _ in range(3)]
    assert chosen == [[1, 0], [0, 1], [0, 0]]  # halved one after another, the order is as before


def test_broken_rows_are_marked() -> None:
    logits = make_logits()
    logits[2, 5], logits[7, 0], logits[11, 3] = math.nan, math.inf, -math.inf
    for options in ({}, {"temperature": 1.0, "top_p": 0.9, "top_k": 9, "min_p": 0.1}, {"repetition_penalty": 2.0}):
        tokens = make_sampler(Sampling(**options), [[1]] * ROWS, VOCAB).choose(logits)
        assert [row for row, token in enumerate(tokens.tolist()) if token == module.NOT_FINITE] == [2, 7, 11]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, r"temperature=-0.5 must be 0 \(greedy\) or greater"),
        ({"temperature": math.nan}, "temperature=nan must"),
        ({"temperature": math.inf}, "temperature=inf must"),
        ({"temperature": None}, "temperature=None must be a number"),
        ({"temperature": True}, "temperature=True must be a number"),
        ({"top_p": "0.5"}, "top_p='0.5' must be a number"),
        ({"min_p": [0.1]}, r"min_p=\[0.1\] must be a number"),
        ({"repetition_penalty": 1j}, "repetition_penalty=1j must be a number"),
        ({"top_k": True}, "top_k=True must be a whole number"),
        ({"top_k": "5"}, "top_k='5' must be a whole number"),
        ({"seed": True}, "seed=True must be a whole number"),
        ({"seed": None}, "seed=None must be a whole number"),
        ({"top_k": -1}, r"top_k=-1 must be a whole number, 0 \(all tokens\) or greater"),
        ({"top_k": 2.5}, "top_k=2.5 must"),
        ({"top_k": math.nan}, "top_k=nan must"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p=1.1 must"),
        ({"top_p": math.nan}, "top_p=nan must"),
        ({"min_p": -0.1}, r"min_p=-0.1 must be in \[0, 1\]"),
        ({"min_p": 1.5}, "min_p=1.5 must"),
        ({"min_p": math.nan}, "min_p=nan must"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be greater than 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty=-1.0 must"),
        ({"repetition_penalty": math.nan}, "repetition_penalty=nan must"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf must"),
        ({"seed": -1}, r"seed=-1 must be a whole number in \[0, 2\*\*63\)"),
        ({"seed": 2**63}, "seed=9223372036854775808 must"),
        ({"seed": 0.5}, "seed=0.5 must"),
        ({"seed": [3, -2]}, "seed=-2 must"),
        ({"seed": "12"}, "seed='1' must"),
    ],
    ids=str,
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


def test_seeds_are_one_per_row() -> None:
    def seeds(sampling: Sampling, rows: int) -> list[Any]:
        return [one.seed for one in sampling.per_row(rows)]

    assert seeds(Sampling(seed=5), 3) == [5, 6, 7]
    assert seeds(Sampling(seed=[9, 9, 2]), 3) == [9, 9, 2]
    assert seeds(Sampling(seed=2**63 - 1), 2) == [2**63 - 1, 0]
    assert Sampling(seed=3, top_k=4).per_row(1) == [Sampling(seed=3, top_k=4)]
    with pytest.raises(ConfigError, match="seed holds 2 numbers for 3 answers"):
        Sampling(seed=[1, 2]).per_row(3)


MIXED = [
    Sampling(top_k=70, top_p=0.5, seed=4),
    Sampling(temperature=0.7, seed=5),
    Sampling(temperature=2.0, top_k=9, seed=6),
    Sampling(repetition_penalty=1.7, seed=7),
    Sampling(temperature=1.3, top_p=0.6, min_p=0.01, seed=8),
    Sampling(temperature=5.0, top_k=VOCAB, repetition_penalty=0.8, seed=9),
    Sampling(temperature=1.0, top_k=1, top_p=0.9, seed=10),
]


def test_rows_with_other_options_come_and_go() -> None:
    """Seven rows, each with its own options, in one batch that they join and leave, against each alone."""
    logits = make_logits().repeat(2, 1)[: len(MIXED) * 4].reshape(4, len(MIXED), VOCAB)  # of four steps
    prompts = [[row, 2 * row] for row in range(len(MIXED))]

    def alone(row: int) -> list[int]:
        sampler = Sampler([MIXED[row]], [prompts[row]], VOCAB, CPU)
        return [int(sampler.choose(step[row : row + 1])) for step in logits]

    expected = [alone(row) for row in range(len(MIXED))]
    for first in range(1, len(MIXED)):
        for order in ([*range(len(MIXED))], [*reversed(range(len(MIXED)))]):
            rows, late = order[:first], order[first:]
            parts = [Sampler([MIXED[r] for r in part], [prompts[r] for r in part], VOCAB, CPU) for part in (rows, late)]
            found: dict[int, list[int]] = {row: [] for row in order}
            for step in range(4):  # the late ones begin when the others have had a token, and stay alone at the end
                if step == 1:
                    parts[0].join(parts[1])
                    rows = order
                if step == 3:
                    parts[0].keep([*range(first, len(order))])
                    rows = late
                steps = [logits[len(found[row]), row] for row in rows]
                for row, token in zip(rows, parts[0].choose(torch.stack(steps)).tolist(), strict=True):
                    found[row].append(token)
            assert found == {row: expected[row][: len(found[row])] for row in order}
            assert {len(tokens) for tokens in found.values()} == {3}


def test_options_are_the_fields() -> None:
    assert {field.name for field in fields(Sampling)} == set(SamplingOptions.__annotations__)
