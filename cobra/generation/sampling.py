"""Logits -> next token: penalty, filters, and draws that belong to one row whatever else is in the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypedDict

import torch
from torch import Tensor

from cobra.errors import ConfigError

NOT_FINITE = -1  # in the place of a token id: the row's logits hold NaN or infinity
DRAWN_AHEAD = 256  # steps; random numbers go to the device in blocks, which bounds memory whatever the answer's limit


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

    def row_seeds(self, num_rows: int) -> list[int]:
        """Return the seed of each row.

        Raises:
            ConfigError: a sequence of another length.
        """
        if not isinstance(self.seed, Sequence):
            return [self.seed + row for row in range(num_rows)]
        if len(self.seed) != num_rows:
            raise ConfigError(
                f"seed holds {len(self.seed)} numbers for {num_rows} answers; pass one per answer, or a single number."
            )
        return list(self.seed)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class Sampler:
    """Chooses the tokens of one call, and remembers what that needs: tokens seen, random streams."""

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device
    ) -> None:
        self._sampling = sampling
        self._rows = torch.arange(len(prompts), device=device)
        self._uniforms = _uniforms(sampling.row_seeds(len(prompts)), device)
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
            for row, prompt in zip(seen, prompts, strict=True):
                row[list(prompt)] = True
            self._seen = seen.to(device)

    def choose(self, logits: Tensor) -> Tensor:
        """Choose a token for each row that is left: logits [B, V] -> ids [B], `NOT_FINITE` for a broken row."""
        if self._seen is not None:
            logits = penalize(logits, self._seen, self._sampling.repetition_penalty)
        if self._sampling.temperature == 0:
            tokens = logits.argmax(dim=-1)
        else:
            tokens = draw(probabilities(logits, self._sampling), next(self._uniforms)[self._rows])
        if self._seen is not None:
            self._seen = self._seen.scatter(1, tokens[:, None], True)
        return torch.where(logits.isfinite().all(dim=-1), tokens, NOT_FINITE)

    def keep(self, kept: Tensor) -> None:
        """Let all rows go but `kept`, positions among those that were left."""
        self._rows = self._rows[kept]
        if self._seen is not None:
            self._seen = self._seen[kept]


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were `seen`, bool [B, V], less likely: logits [B, V] -> float64 [B, V]."""
    scores = logits.double()
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Distribution that tokens are drawn from, temperature above 0: logits [B, V] -> float64 [B, V], 0 if removed."""
    scores = logits.double()
    # With the largest at 0, no temperature makes a score overflow upwards.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        smallest = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -math.inf)
    if sampling.top_p < 1:
        ordered, order = scores.softmax(dim=-1).sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(dim=-1) - ordered
        removed = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, mass_before >= sampling.top_p)
        scores = scores.masked_fill(removed, -math.inf)
    if sampling.min_p > 0:
        scores = scores.masked_fill(scores < math.log(sampling.min_p), -math.inf)
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


def _uniforms(seeds: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Yield a number in [0, 1) per row for each step, float64 [R].

    From the CPU's generators on every device, so that a seed means the same everywhere.
    """
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    while True:
        block = [torch.rand(DRAWN_AHEAD, generator=generator, dtype=torch.float64) for generator in generators]
        yield from torch.stack(block, dim=1).to(device)
