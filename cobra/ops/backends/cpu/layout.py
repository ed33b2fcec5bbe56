"""Hand tensors to kernels: a flat array and the strides, so that strided views are read in place."""

import numpy as np
import torch
from torch import Tensor

_EMPTY = {torch.float32: np.empty(0, np.float32), torch.float64: np.empty(0, np.float64)}
_TYPES = {torch.float32: np.dtype(np.float32).str, torch.float64: np.dtype(np.float64).str}


class _Memory:
    """Lends a tensor's memory to NumPy. `Tensor.numpy()` would, but pins the storage's size for good, and FSDP frees
    and refills the storage of gathered parameters by resizing it.
    """

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, tensor: Tensor, span: int) -> None:
        self.tensor = tensor  # lives as long as the array
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": (span,),
            "typestr": _TYPES[tensor.dtype],
            "version": 3,
        }


def flat(tensor: Tensor | None, like: Tensor) -> np.ndarray:
    """The memory that a tensor spans, from its first to its last element, without a copy; empty for None.

    One compiled kernel then serves every layout: it gets the strides as numbers and always sees a contiguous array.
    """
    if tensor is None or tensor.numel() == 0:
        return _EMPTY[like.dtype]
    if tensor.is_contiguous():
        span = tensor.numel()
    else:
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return np.asarray(_Memory(tensor, span))


def strided(tensor: Tensor | None, like: Tensor) -> tuple[np.ndarray, int, int]:
    """A [batch, length, channels] tensor as kernels take it: memory, stride of a row, stride of a step."""
    return (flat(tensor, like), 0, 0) if tensor is None else (flat(tensor, like), tensor.stride(0), tensor.stride(1))


def flat_lengths(lengths: Tensor | None, batch: int, length: int) -> np.ndarray:
    """Every row's number of steps."""
    return np.full(batch, length, np.int64) if lengths is None else lengths.numpy()


def flat_mask(mask: Tensor | None) -> np.ndarray:
    """A contiguous tensor of bools as a flat array; empty for None."""
    return np.empty(0, np.bool_) if mask is None else mask.view(-1).numpy()


def flat_steps(steps: Tensor | None) -> np.ndarray:
    """A contiguous tensor of int64 as a flat array; empty for None."""
    return np.empty(0, np.int64) if steps is None else steps.view(-1).numpy()


def sum_partial(partial: Tensor, axis: int) -> Tensor:
    """Sum what work items left, on the calling thread: so little that waking PyTorch's threads, on a busy machine for
    milliseconds, would cost more.
    """
    return torch.from_numpy(partial.numpy().sum(axis))
