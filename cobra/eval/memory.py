"""Memory that ran out: how torch and the libraries below it say so."""

from __future__ import annotations

import torch

# Of torch on a CPU and on a GPU, cuBLAS (CUBLAS_STATUS_ALLOC_FAILED), cuDNN (..._DEVICE_ALLOCATION_FAILED).
_NO_MEMORY = ("can't allocate memory", "out of memory", "alloc_failed", "allocation_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, on any device; torch and CUDA's libraries often raise a plain RuntimeError."""
    message = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in message for sign in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """Return what an error says in its first line, or its name."""
    return next(iter(str(error).splitlines()), type(error).__name__)
