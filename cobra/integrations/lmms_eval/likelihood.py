"""How likely given answers are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cobra.errors import NumericsError
from cobra.generation.engine import prefill
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState


@torch.inference_mode()
def log_likelihoods(
    llm: MambaLM,
    prompts: Sequence[Sequence[int]],
    state: MambaState | None,
    answers: Sequence[tuple[int, Sequence[int]]],
) -> list[tuple[float, bool]]:
    """Return each answer's log-probability, and whether greedy decoding writes it.

    Args:
        prompts: token ids, read once each.
        state: the prefix of each prompt; None for the start of a text.
        answers: the number of the prompt that an answer follows, and its token ids.

    Raises:
        NumericsError: logits that are NaN or infinite.
    """
    logits, after = prefill(llm, prompts, state)
    rows = [row for row, _ in answers]
    device, size = logits.device, llm.config.vocab_size
    lengths = torch.tensor([len(ids) for _, ids in answers], device=device)
    longest = max(1, int(lengths.max()))
    ids = torch.zeros(len(answers), longest, dtype=torch.int64)
    for i, (_, answer) in enumerate(answers):
        ids[i, : len(answer)] = torch.tensor(answer, dtype=torch.int64)
    ids = ids.to(device)
    logits = logits[rows][:, None]  # of the first token of each answer
    if longest > 1:
        hidden, _ = llm(llm.embed(ids[:, :-1]), state=after[rows], lengths=(lengths - 1).clamp(min=0))
        logits = torch.cat([logits, llm.head(hidden)[..., :size]], dim=1)
    is_token = torch.arange(longest, device=device) < lengths[:, None]
    found = torch.log_softmax(logits.float(), dim=-1).gather(2, ids[..., None]).squeeze(2)
    found = found.masked_fill(~is_token, 0).sum(1)
    if not bool(found.isfinite().all()):
        raise NumericsError("The log-likelihood of an answer is NaN or infinite; check the weights, or try float32.")
    is_greedy = ((logits.argmax(-1) == ids) | ~is_token).all(1)
    return list(zip(found.tolist(), is_greedy.tolist(), strict=True))
