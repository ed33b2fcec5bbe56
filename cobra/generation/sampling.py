"""Logits -> next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cobra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0, else drawn from the smallest set with probability `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or greater.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be in (0, 1].")

    def generator(self, device: torch.device) -> torch.Generator:
        """Return a fresh generator for one call."""
        return torch.Generator(device).manual_seed(self.seed)


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Choose a token per row: logits [B, V] -> ids [B]."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        mass_before = ordered.cumsum(dim=-1) - ordered
        kept = torch.where(mass_before < sampling.top_p, ordered, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
