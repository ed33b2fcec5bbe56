"""Small Mambas to test, and what the tests do with them."""

from __future__ import annotations

import torch
from torch import Tensor

from cobra.config import LLMConfig
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState

ROUNDING = 1e-10  # float64 sums of some hundred terms of size 1, in another order


def make_config(**sizes: int) -> LLMConfig:
    return LLMConfig(**({"d_model": 32, "num_layers": 2, "vocab_size": 101} | sizes), tokenizer="", prompt="mamba")


def make_lm(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: int) -> MambaLM:
    """A model in which every parameter matters: nothing is left at 1 or too small to be seen."""
    lm = MambaLM(make_config(**sizes))
    generator = torch.Generator().manual_seed(seed)
    lm.init_weights(generator)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.1 * noise if parameter.ndim == 1 or name.endswith("A_log") else 0.05 * noise
    return lm.to(dtype)


def random_ids(*shape: int, vocab: int = 101) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(1))


def logits_of(lm: MambaLM, ids: Tensor, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
    hidden, state = lm(lm.embed(ids), state=state)
    return lm.head(hidden), state


def decode(lm: MambaLM, ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
    """Logits of feeding `ids` token by token."""
    logits = []
    for column in ids.T:
        hidden, state = lm.step(column, state)
        logits.append(lm.head(hidden))
    return torch.stack(logits, dim=1), state


def assert_states_equal(actual: MambaState, expected: MambaState, tolerance: float = ROUNDING) -> None:
    for ours, theirs in zip([*actual.conv, *actual.ssm], [*expected.conv, *expected.ssm], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
