"""Read prompts once, then step token by token; rows that have finished leave the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from functools import partial

import torch
from torch import Tensor

from cobra.errors import ConfigError, NumericsError
from cobra.generation.graph import lent_stepper
from cobra.generation.rows import Request, Running, next_logits
from cobra.generation.sampling import Sampling
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState

PREFILL_TOKENS = 2**16  # read at a time, over all rows: Mamba-2.8B in bfloat16 has 1.25 GiB for the widest activation


def prefill(
    llm: MambaLM, prompts: Sequence[Sequence[int]], state: MambaState | None, *, chunk: int | None = None
) -> tuple[Tensor, MambaState]:
    """Read token ids after a prefix.

    Args:
        prompts: B lists of ids below V, at least one of each, of any lengths.
        state: the prefix of each row, B rows; None for the start of a text.
        chunk: tokens of each row that are read at a time, which bounds memory; the results do not depend on it. None:
            so many that a chunk of all rows has `PREFILL_TOKENS`.

    Returns:
        Logits of the next token [B, V], V without the embedding's padding, and the state after each prompt. Both
        equal those of each row alone.

    Raises:
        ConfigError: no prompts, an empty one, an id that is no token, or a chunk without tokens.
    """
    _check_prompts(llm, prompts)
    if chunk is None:
        chunk = max(1, PREFILL_TOKENS // len(prompts))
    if chunk < 1:
        raise ConfigError(f"chunk={chunk} must be at least 1 token.")
    if max(len(prompt) for prompt in prompts) <= chunk:
        last, after = read(llm, prompts, state)
    else:
        last, after = _read_in_chunks(llm, prompts, state, chunk)
    return next_logits(llm, last), after


def start_state(llm: MambaLM) -> MambaState:
    """Return the state before any token, one row: the same as none."""
    config, weight = llm.config, llm.backbone.embedding.weight
    conv = weight.new_zeros(1, config.d_conv - 1, config.d_inner)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    ssm = weight.new_zeros(1, config.d_inner, config.d_state, dtype=dtype)
    return MambaState([conv] * config.num_layers, [ssm] * config.num_layers)


def _read_in_chunks(
    llm: MambaLM, prompts: Sequence[Sequence[int]], state: MambaState | None, chunk: int
) -> tuple[Tensor, MambaState]:
    """As `read`; the longest prompts come first, so that those that have ended leave from the batch's end."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    left = [prompts[row] for row in order]
    after = None if state is None else state[order]
    ended: list[tuple[Tensor, MambaState]] = []
    for start in range(0, len(left[0]), chunk):
        last, after = read(llm, [prompt[start : start + chunk] for prompt in left], after)
        going_on = sum(len(prompt) > start + chunk for prompt in left)
        if going_on < len(left):
            ended.append((last[going_on:], after[going_on:]))
            left, after = left[:going_on], after[:going_on]
    place = {row: i for i, row in enumerate(order)}
    back = torch.tensor([place[row] for row in range(len(prompts))], device=ended[0][0].device)
    hidden = torch.cat([last for last, _ in reversed(ended)])
    return hidden[back], MambaState.concat([state for _, state in reversed(ended)])[back]


def read(llm: MambaLM, prompts: Sequence[Sequence[int]], state: MambaState | None) -> tuple[Tensor, MambaState]:
    """Return the hidden state of each row's last token [B, D], and the state after it."""
    device = llm.backbone.embedding.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    input_ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, : len(prompt)] = torch.tensor(prompt)
    lengths = lengths.to(device)
    hidden, after = llm(llm.embed(input_ids.to(device)), state=state, lengths=lengths)
    return hidden[torch.arange(len(prompts), device=device), lengths - 1], after


def decode(
    llm: MambaLM,
    prompts: Sequence[Sequence[int]],
    state: MambaState | None,
    *,
    max_new_tokens: int,
    end_id: int,
    sampling: Sampling,
    is_over: Callable[[int, int], bool] | None = None,
    on_end: Callable[[int, MambaState], None] | None = None,
) -> Generator[list[tuple[int, int]]]:
    """Continue prompts; yield (row, token id) pairs, a row's in order: those of each step, or of several on a GPU.

    Closing the iterator ends the work.

    Args:
        prompts, state: as in `prefill`.
        max_new_tokens: limit of each row.
        end_id: the token that ends a row; it is not yielded.
        sampling: how tokens are chosen.
        is_over: told each row and token once, in order, before they are yielded; True ends the row after this token.
        on_end: told each row that ends and its state after the prompt and all tokens, before the last are yielded.

    Raises:
        ConfigError: at once, a limit below 1, prompts that `prefill` refuses, or seeds for another number of rows.
        NumericsError: when iterated, logits that are NaN or infinite.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    _check_prompts(llm, prompts)
    samplings = sampling.per_row(len(prompts))

    def told(row: int) -> Callable[[int], bool] | None:
        return None if is_over is None else partial(is_over, row)

    requests = [
        Request(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            sampling=samplings[row],
            is_over=told(row),
            keep_state=on_end is not None,
        )
        for row, prompt in enumerate(prompts)
    ]

    def steps() -> Generator[list[tuple[int, int]]]:
        counts = Counter[int]()
        with lent_stepper(llm) as stepper:
            running = Running(llm, end_id, stepper)
            with torch.inference_mode():  # not across a yield: the caller's code runs there
                events = running.begin(list(enumerate(requests)), *prefill(llm, prompts, state))
            while events:
                for event in events:
                    if event.finish == "error":
                        raise _not_finite(llm, f"token {counts[event.ticket] + 1} of answer {event.ticket}")
                    counts[event.ticket] += 1
                    if on_end is not None and event.state is not None:
                        on_end(event.ticket, event.state)
                pairs = [(event.ticket, event.token) for event in events if event.token is not None]
                if pairs:
                    yield pairs
                with torch.inference_mode():
                    events = running.advance()

    return steps()


def choice_probabilities(
    llm: MambaLM, prompts: Sequence[Sequence[int]], state: MambaState | None, choice_ids: Sequence[int]
) -> Tensor:
    """Probability of each single-token choice as the next token, renormalised over the choices: [B, choices].

    Raises:
        ConfigError: no choices, one that is no token, or prompts that `prefill` refuses.
        NumericsError: logits that are NaN or infinite.
    """
    check_ids(llm, "choice_ids", choice_ids)
    logits, _ = prefill(llm, prompts, state)
    logits = logits[:, list(choice_ids)].float()
    if not bool(logits.isfinite().all()):
        raise _not_finite(llm, "the choices")
    return torch.softmax(logits, dim=-1)


def _check_prompts(llm: MambaLM, prompts: Sequence[Sequence[int]]) -> None:
    if not prompts:
        raise ConfigError("There are no prompts; pass at least one.")
    for row, prompt in enumerate(prompts):
        check_ids(llm, f"Prompt {row}", prompt)


def check_ids(llm: MambaLM, name: str, ids: Sequence[int]) -> None:
    """Raise ConfigError unless there are ids, and all are tokens."""
    if not ids:
        raise ConfigError(f"{name} is empty; there must be at least one token.")
    for token in (min(ids), max(ids)):
        if not 0 <= token < llm.config.vocab_size:
            raise ConfigError(
                f"{name} holds token {token}, outside of the {llm.config.vocab_size} tokens that the model knows; "
                "tokenise with the model's own tokenizer."
            )


def _not_finite(llm: MambaLM, place: str) -> NumericsError:
    dtype = str(llm.backbone.embedding.weight.dtype).removeprefix("torch.")
    return NumericsError(
        f"The logits for {place} hold NaN or infinity, where all must be finite: the weights are damaged or too large "
        f"for {dtype}. Check the model folder, or load it with another dtype."
    )
