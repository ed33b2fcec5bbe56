"""Parameter groups, AdamW, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from cobra.config import TrainConfig


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to biases, norms, `A_log` and `D` (the Mamba authors mark the last two)."""
    return parameter.ndim > 1 and not name.endswith("A_log")


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the parameters that learn, in two groups: with and without weight decay."""
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in trained if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in trained if not decays(n, p)], "weight_decay": 0.0},
    ]
    first, second = config.betas
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(first, second), fused=True)


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Return the rate of a step (from 0): linear warm-up over `warmup_ratio` of the run, then a cosine to 0."""
    warmup = round(config.warmup_ratio * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
