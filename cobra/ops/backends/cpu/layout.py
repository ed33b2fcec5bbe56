"""Hand tensors to kernels: a flat array and the strides, so that strided views are read in place."""

import numpy as np
import torch
from torch import Tensor

_EMPTY = {torch.float32: np.empty(0, np.float32), torch.float64: np.empty(0, np.float64)}


def flat(tensor: Tensor | None, like: Tensor) -> np.ndarray:
    """The memory that a tensor spans, from its first to its last element, without a copy; empty for None.

    One compiled kernel then serves every layout: it gets the strides as numbers and always sees a contiguous array.
    Gradients must be off, as they are inside of an `autograd.Function`.
    """
    if tensor is None or tensor.numel() == 0:
        return _EMPTY[like.dtype]
    if tensor.is_contiguous():
        span = tensor.numel()
    else:
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).numpy()


def strided(tensor: Tensor | None, like: Tensor) -> tuple[np.ndarray, int, int]:
    """A [batch, length, channels] tensor as kernels take it: memory, stride of a row, stride of a step."""
    return (flat(tensor, like), 0, 0) if tensor is None else (flat(tensor, like), tensor.stride(0), tensor.stride(1))


def strided_state(tensor: Tensor | None, like: Tensor) -> tuple[np.ndarray, int, int, int]:
    """A [batch, dim, state] tensor as kernels take it: memory and the three strides."""
    if tensor is None:
        return flat(tensor, like), 0, 0, 0
    return flat(tensor, like), tensor.stride(0), tensor.stride(1), tensor.stride(2)


def flat_lengths(lengths: Tensor | None, batch: int, length: int) -> np.ndarray:
    """Every row's number of steps, within [0, length]."""
    if lengths is None:
        return np.full(batch, length, np.int64)
    return lengths.clamp(0, length).to(torch.int64).contiguous().numpy()


def sum_partial(partial: Tensor, axis: int) -> Tensor:
    """Sum what work items left, on the calling thread: so little that waking PyTorch's threads, on a busy machine for
    milliseconds, would cost more.
    """
    return torch.from_numpy(partial.numpy().sum(axis))
