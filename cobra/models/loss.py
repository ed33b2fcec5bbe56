"""Cross-entropy where there are labels, without ever holding all logits.

Most positions of a batch are patches, prompts or padding. Only the labelled ones reach the output head, and those a
chunk at a time: the logits of 4,096 tokens over 50,280 words are 824 MB in float32, and the loss holds three such
tensors at once.

Shapes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cobra.errors import ConfigError, DataError, ShapeError
from cobra.text.prompt import IGNORE_INDEX

# Tokens whose logits exist at one time: 1,024 x 50,280 x 4 bytes = 206 MB. On a CPU, for 4,096 tokens of width 768,
# forward and backward take 1.39 times the time of one piece; chunks of 2,048 take 1.34 times, chunks of 256 1.7 times.
CHUNK = 1024


def labelled_loss(
    head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy over the labelled positions.

    With more than one chunk, each chunk's logits are computed again in the backward pass instead of being kept: that
    costs one more product with the head's weight, and memory then depends on `chunk` instead of on the labels.
    `head` is called as it is (so hooks, adapters and sharding work), once per chunk of rows, at least once. A head
    that talks to other ranks in its own forward pass would need the same number of chunks on all of them.

    Args:
        head: hidden states [T, D] -> logits [T, V].
        hidden: [..., D].
        labels: int64 [...], the token that each hidden state should predict, `IGNORE_INDEX` where none.
        chunk: labelled positions whose logits are held at one time.

    Returns:
        The sum, float32 (float64 if `hidden` is), and the number of labelled positions, int64. Without any label
        the sum is a zero whose gradients are zeros, so that every rank of a run can go backward.

    Raises:
        ConfigError: a chunk without positions.
        ShapeError: `labels` does not fit `hidden`.
        DataError: a label is neither a token nor `IGNORE_INDEX`. Seen on the CPU only: on a GPU the look would wait
            for the head's product that is queued before it, and the device's own assertion stops the run.
    """
    if chunk < 1:
        raise ConfigError(f"chunk={chunk} must be at least 1 labelled position.")
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ShapeError(
            f"labels are {labels.dtype} {list(labels.shape)}, expected int64 {list(hidden.shape[:-1])} to fit hidden "
            f"{list(hidden.shape)}."
        )
    is_labelled = labels != IGNORE_INDEX
    positions = is_labelled.flatten().nonzero().squeeze(1)
    # [T, D] each; without any label one empty chunk, so that the head is called and its weight gets a gradient.
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions).split(chunk)
    targets = labels.flatten().index_select(0, positions).split(chunk)
    recompute = len(rows) > 1 and torch.is_grad_enabled()
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for part, wanted in zip(rows, targets, strict=True):
        if recompute:
            total = total + checkpoint(_sum_of, head, part, wanted, use_reentrant=False)
        else:
            total = total + _sum_of(head, part, wanted)
    return total, is_labelled.sum()


def _sum_of(head: Callable[[Tensor], Tensor], rows: Tensor, wanted: Tensor) -> Tensor:
    logits = head(rows)  # [T, V]
    if wanted.device.type == "cpu" and wanted.numel() > 0:
        lowest, highest = wanted.aminmax()
        if lowest < 0 or highest >= logits.shape[-1]:
            wrong = int(lowest if lowest < 0 else highest)
            raise DataError(
                f"A label is {wrong}, outside of the {logits.shape[-1]} tokens that the model knows; tokenise with the "
                f"model's own tokenizer, and mark positions without a label with {IGNORE_INDEX}."
            )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, wanted, reduction="sum")
