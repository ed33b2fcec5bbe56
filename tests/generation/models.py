"""Small language models for the tests of generation, and the plainest way to continue a text with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cobra.config import LLMConfig
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState

VOCAB = 101
NO_END = -5  # an end token that is never chosen


def make_lm() -> MambaLM:
    """A small model of random weights in float64."""
    lm = MambaLM(LLMConfig(d_model=32, num_layers=2, vocab_size=VOCAB, tokenizer="", prompt="mamba"))
    lm.init_weights(torch.Generator().manual_seed(0))
    return shaken(lm).double().requires_grad_(False)


@torch.no_grad()
def shaken(lm: MambaLM) -> MambaLM:
    """Let every parameter matter; and untie the head, as a random tied model repeats what it reads."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lm.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter += (0.1 if parameter.ndim == 1 or name.endswith("A_log") else 0.15) * noise
    lm.lm_head.weight = torch.nn.Parameter(torch.randn(lm.lm_head.weight.shape, generator=generator))
    return lm


def make_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def make_prefixes(rows: int) -> Tensor:
    """Rows of five random tokens."""
    return torch.randint(VOCAB, (rows, 5), generator=torch.Generator().manual_seed(2))


def make_state(lm: MambaLM, rows: int) -> MambaState:
    """What these leave behind."""
    return lm(lm.embed(make_prefixes(rows)))[1]


def full_pass(lm: MambaLM, ids: Sequence[int]) -> Tensor:
    """Logits of the next token, [1, VOCAB], from one pass over everything."""
    return lm.head(lm(lm.embed(torch.tensor([ids])))[0][:, -1])[:, :VOCAB]


def greedy(lm: MambaLM, ids: Sequence[int], count: int, end_id: int = NO_END) -> list[int]:
    """Continue a text greedily, with a pass over the whole of it for every token."""
    answer: list[int] = []
    while len(answer) < count:
        token = int(full_pass(lm, [*ids, *answer]).argmax())
        if token == end_id:
            break
        answer.append(token)
    return answer


def by_row(steps: Iterable[list[tuple[int, int]]]) -> dict[int, list[int]]:
    """Join what `decode` yields to the answers by row."""
    answers: dict[int, list[int]] = defaultdict(list)
    for step in steps:
        for row, token in step:
            answers[row].append(token)
    return answers
