"""Logits -> next token: penalty, filters, and draws that belong to one row whatever else is in the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from cobra.errors import ConfigError

NOT_FINITE = -1  # in the place of a token id: the row's logits hold NaN or infinity


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` as keywords."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The steps follow in the order of the attributes, as in transformers.

    Attributes:
        repetition_penalty: a logit is divided by it if positive, else multiplied, for every token that the row's
            prompt text or answer already holds (Keskar et al. 2019, arXiv:1909.05858, section 4.1). Greedy decoding
            applies it too. Images have no token ids and do not count, nor does what a given state has read.
        temperature: logits are divided by it; 0 chooses the likeliest token, and what follows does not matter.
        top_k: the so many likeliest tokens remain, with ties; 0: all.
        top_p: the smallest set of likeliest tokens with this probability remains (Holtzman et al. 2020,
            arXiv:1904.09751).
        min_p: tokens at least this many times as likely as the likeliest remain (Nguyen et al. 2024,
            arXiv:2407.01082); 0: all.
        seed: row r draws from a stream of its own with seed `seed + r`, or `seed[r]` of a sequence with one per row.
            So a row's tokens do not depend on the other rows, nor on the answers' limit.

    Raises:
        ConfigError: a value is no number, or out of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        for name in ("repetition_penalty", "temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ConfigError(f"{name}={value!r} must be a number.")
        # Written so that NaN, which compares as false, is refused.
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(
                f"repetition_penalty={self.repetition_penalty} must be greater than 0 and finite; use 1 for none."
            )
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or greater, and finite.")
        if not (_is_whole(self.top_k) and self.top_k >= 0):
            raise ConfigError(f"top_k={self.top_k!r} must be a whole number, 0 (all tokens) or greater.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be in (0, 1]; use 1 for all tokens.")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p} must be in [0, 1]; use 0 for all tokens.")
        for seed in self.seed if isinstance(self.seed, Sequence) else [self.seed]:
            if not (_is_whole(seed) and 0 <= seed < 2**63):
                raise ConfigError(f"seed={seed!r} must be a whole number in [0, 2**63), or one such number per answer.")

    def per_row(self, num_rows: int) -> list[Sampling]:
        """Return each row's own sampling, with a single seed.

        Raises:
            ConfigError: a sequence of another length.
        """
        if not isinstance(self.seed, Sequence):
            seeds = [(self.seed + row) % 2**63 for row in range(num_rows)]
        elif len(self.seed) == num_rows:
            seeds = list(self.seed)
        else:
            raise ConfigError(
                f"seed holds {len(self.seed)} numbers for {num_rows} answers; pass one per answer, or a single number."
            )
        return [replace(self, seed=seed) for seed in seeds]


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class Filters(NamedTuple):
    """Which steps some of the rows need; the others are spared. Known to the host, so that no device is awaited."""

    penalty: bool
    draw: bool
    top_k: int  # the largest of any row, as a power of two; 0: no row has one
    top_p: bool
    min_p: bool


class RowOptions(NamedTuple):
    """What the steps need of each row, [B] each but for `seen`; the real numbers are float64."""

    penalty: Tensor
    temperature: Tensor  # 0: greedy
    top_k: Tensor  # int64, 0: all, as in greedy rows
    top_p: Tensor
    log_min_p: Tensor
    seed: Tensor  # int64
    step: Tensor  # int64, tokens chosen so far
    seen: Tensor  # bool [B, V]: in the prompt or the answer; [B, 0] while no row has a penalty


class Sampler:
    """Chooses tokens for rows that each have a `Sampling` of their own; rows may join and leave.

    Attributes:
        filters: what the rows need together.
        options: the rows' numbers. `choose` changes `step` and `seen` in place.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        prompts: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device | str,
    ) -> None:
        """Begin rows; each sampling has a single seed."""
        self._samplings = list(samplings)
        self._vocab_size = vocab_size
        self.filters = _filters(samplings)
        seen = torch.zeros(len(prompts), vocab_size if self.filters.penalty else 0, dtype=torch.bool)
        if self.filters.penalty:
            for row, prompt in zip(seen, prompts, strict=True):
                row[list(prompt)] = True

        def column(values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device)

        self.options = RowOptions(
            penalty=column([s.repetition_penalty for s in samplings]),
            temperature=column([s.temperature for s in samplings]),
            top_k=column([s.top_k if s.temperature > 0 else 0 for s in samplings], torch.int64),
            top_p=column([s.top_p for s in samplings]),
            log_min_p=column([math.log(s.min_p) if s.min_p > 0 else -math.inf for s in samplings]),
            seed=column([s.seed for s in samplings if isinstance(s.seed, int)], torch.int64),
            step=torch.zeros(len(prompts), dtype=torch.int64, device=device),
            seen=seen.to(device),
        )

    def choose(self, logits: Tensor) -> Tensor:
        """Choose a token for each row: logits [B, V] -> ids [B], `NOT_FINITE` for a broken row."""
        options, filters = self.options, self.filters
        scores = penalize(logits, options.seen, options.penalty) if filters.penalty else logits
        tokens = scores.argmax(dim=-1)
        if filters.draw:
            drawn = draw(probabilities(scores, options, filters), uniforms(options.seed, options.step))
            tokens = torch.where(options.temperature > 0, drawn, tokens)
            options.step.add_(1)
        if filters.penalty:
            options.seen.scatter_(1, tokens[:, None], True)
        return torch.where(logits.isfinite().all(dim=-1), tokens, NOT_FINITE)

    def keep(self, kept: Sequence[int]) -> None:
        """Let all rows go but these."""
        index = torch.tensor(kept, dtype=torch.int64).to(self.options.step.device)
        self._samplings = [self._samplings[row] for row in kept]
        self.options = RowOptions(*(tensor.index_select(0, index) for tensor in self.options))
        self._fit(_filters(self._samplings))

    def join(self, others: Sampler) -> None:
        """Append the rows of another sampler, which is used up."""
        self._samplings += others._samplings
        for sampler in (self, others):
            sampler._fit(_filters(self._samplings))
        self.options = RowOptions(*(torch.cat(pair) for pair in zip(self.options, others.options, strict=True)))

    def _fit(self, filters: Filters) -> None:
        """Take up filters; make room for the tokens seen, or let it go."""
        self.filters = filters
        seen, width = self.options.seen, self._vocab_size if filters.penalty else 0
        if seen.shape[1] != width:  # what rows without a penalty have seen does not matter
            self.options = self.options._replace(seen=seen.new_zeros(seen.shape[0], width))


def _filters(samplings: Sequence[Sampling]) -> Filters:
    drawing = [sampling for sampling in samplings if sampling.temperature > 0]
    top_k = max((sampling.top_k for sampling in drawing), default=0)
    return Filters(
        penalty=any(sampling.repetition_penalty != 1 for sampling in samplings),
        draw=bool(drawing),
        top_k=1 << (top_k - 1).bit_length() if top_k else 0,
        top_p=any(sampling.top_p < 1 for sampling in drawing),
        min_p=any(sampling.min_p > 0 for sampling in drawing),
    )


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make tokens that were `seen`, bool [B, V], less likely by `penalty` [B]: logits [B, V] -> float64 [B, V]."""
    scores, penalty = logits.double(), penalty[:, None]
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def probabilities(logits: Tensor, options: RowOptions, filters: Filters) -> Tensor:
    """Distributions that tokens are drawn from: logits [B, V] -> float64 [B, V], 0 if removed.

    A row without a filter comes out as if no row had it. Greedy rows get some distribution.
    """
    scores = logits.double()
    temperature = torch.where(options.temperature > 0, options.temperature, 1.0)
    # With the largest at 0, no temperature makes a score overflow upwards.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature[:, None]
    if filters.top_k:
        largest = scores.topk(min(filters.top_k, scores.shape[-1]), dim=-1).values
        has_it = (options.top_k > 0) & (options.top_k < scores.shape[-1])
        place = torch.where(has_it, options.top_k - 1, 0)
        smallest = largest.gather(1, place[:, None])
        scores = scores.masked_fill(has_it[:, None] & (scores < smallest), -math.inf)
    if filters.top_p:
        ordered, order = scores.softmax(dim=-1).sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(dim=-1) - ordered
        top_p = torch.where(options.top_p < 1, options.top_p, math.inf)[:, None]  # sums may round to 1 before the end
        removed = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, mass_before >= top_p)
        scores = scores.masked_fill(removed, -math.inf)
    if filters.min_p:
        scores = scores.masked_fill(scores < options.log_min_p[:, None], -math.inf)
    return scores.softmax(dim=-1)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw by inverting the cumulative distribution: [B, V] and numbers [B] in [0, 1) -> ids [B].

    A token of probability 0 is never drawn, however the sums round.
    """
    possible = probabilities > 0
    cumulative = probabilities.cumsum(dim=-1)
    # Not searchsorted: sums that a GPU adds up in parallel need not rise monotonically.
    reached = possible & (cumulative > uniforms[:, None] * cumulative[:, -1:])
    first = reached.int().argmax(dim=-1)
    last = probabilities.shape[-1] - 1 - possible.flip(-1).int().argmax(dim=-1)
    return torch.where(reached.any(dim=-1), first, last)  # none is reached when the product rounds up to the sum


def uniforms(seeds: Tensor, steps: Tensor) -> Tensor:
    """Numbers in [0, 1), float64 [B]: the `steps`-th of the stream of each seed, int64 [B] both.

    A function of the two alone (SplitMix64, Steele et al. 2014, doi:10.1145/2660193.2660195), so that nothing waits
    for the host and a seed means the same on every device.
    """
    bits = splitmix(splitmix(seeds) + steps * _GAMMA)
    return _shifted(bits, 11).double() * 2.0**-53


def splitmix(numbers: Tensor) -> Tensor:
    """Scramble int64 numbers, one to one; sums and products wrap around."""
    z = numbers + _GAMMA
    z = (z ^ _shifted(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shifted(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shifted(z, 31)


_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # as a signed number


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shift right as if unsigned."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
