"""Read prompts once, then step token by token; rows that have finished leave the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cobra.errors import ConfigError
from cobra.generation.sampling import Sampling, sample
from cobra.models.mamba import MambaLM, MambaState


def prefill(llm: MambaLM, prompts: Sequence[Sequence[int]], state: MambaState | None) -> tuple[Tensor, MambaState]:
    """Read token ids after a prefix.

    Args:
        prompts: B lists of ids, not empty, of any lengths.
        state: the prefix of each row, B rows; None for the start of a text.

    Returns:
        Logits of the next token [B, V], and the state after each prompt. Both equal those of each row alone.
    """
    if not all(prompts):
        raise ConfigError("A prompt is empty; there must be at least one token to continue from.")
    device = llm.backbone.embedding.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    input_ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, : len(prompt)] = torch.tensor(prompt)
    hidden, after = llm(llm.embed(input_ids.to(device)), state=state, lengths=lengths)
    last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
    return llm.head(last), after


def decode(
    llm: MambaLM,
    prompts: Sequence[Sequence[int]],
    state: MambaState | None,
    *,
    max_new_tokens: int,
    end_id: int,
    sampling: Sampling,
) -> Iterator[list[tuple[int, int]]]:
    """Continue prompts; yield the (row, token id) pairs of each step. `end_id` ends a row and is not yielded."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    logits, state = prefill(llm, prompts, state)
    generator = sampling.generator(logits.device)
    rows = torch.arange(len(prompts), device=logits.device)
    for i in range(max_new_tokens):
        tokens = sample(logits, sampling, generator)
        going = tokens != end_id
        if not bool(going.all()):
            kept = going.nonzero().squeeze(-1)
            rows, tokens, state = rows[kept], tokens[kept], state[kept]
        if len(rows) == 0:
            return
        yield list(zip(rows.tolist(), tokens.tolist(), strict=True))
        if i + 1 < max_new_tokens:
            hidden, state = llm.step(tokens, state)
            logits = llm.head(hidden)


def choice_probabilities(
    llm: MambaLM, prompts: Sequence[Sequence[int]], state: MambaState | None, choice_ids: Sequence[int]
) -> Tensor:
    """Probability of each single-token choice as the next token, renormalised over the choices: [B, choices]."""
    logits, _ = prefill(llm, prompts, state)
    return torch.softmax(logits[:, list(choice_ids)].float(), dim=-1)
