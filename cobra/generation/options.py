"""The keywords that say how an answer is generated."""

from __future__ import annotations

from collections.abc import Sequence

from cobra.generation.sampling import SamplingOptions


class GenerateOptions(SamplingOptions, total=False):
    """Keywords of `Cobra.generate`, which explains them, of `Cobra.stream` and of chats."""

    max_new_tokens: int
    stop: str | Sequence[str]
