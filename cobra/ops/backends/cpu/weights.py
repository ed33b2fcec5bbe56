"""How weight matrices are handed to kernels: plain numbers, or integers of 8 or 4 bits with scales."""
# Numba's intrinsics take one argument less than their definitions show.
# pyright: reportCallIssue=false

from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from cobra.ops import quantized
from cobra.ops.quantized import GROUP, QuantizedWeight

from .vector import pointer

# How numbers look to kernels: Numba knows no bfloat16. Of integers, uint8 are pairs of 4 bits.
ELEMENTS = {
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.int8: np.empty(0, np.int8),
    torch.uint8: np.empty(0, np.uint8),
}
FLOATS = (torch.float32, torch.bfloat16)
_CPU = torch.device("cpu")
FORCE_INLINE = {"forceinline": True}
SINGLES, SHORTS = ELEMENTS[torch.float32], np.empty(0, np.int16)


def weight_at(address: int, scales_address: int, like: np.ndarray) -> Any:
    """In a kernel: the weight at an address, a pointer, or a pair of pointers to integers and scales."""


@overload(weight_at, jit_options=FORCE_INLINE)
def _weight_at(address, scales_address, like):
    if like.dtype in (types.int8, types.uint8):
        return lambda address, scales_address, like: (pointer(address, like), pointer(scales_address, SINGLES))
    return lambda address, scales_address, like: pointer(address, like)


def has_scales(weight: types.Type) -> bool:
    """Whether this is the type of a quantised weight in a kernel."""
    return isinstance(weight, types.BaseTuple)


def is_readable(weight: Tensor | QuantizedWeight) -> bool:
    """Whether our kernels may read a weight's memory in place; 8 bits only of rows that do not end within a group."""
    if isinstance(weight, QuantizedWeight):
        return quantized.is_readable(weight, _CPU) and (weight.bits == 4 or weight.shape[1] % GROUP == 0)
    return weight.dtype in FLOATS and quantized.is_plain(weight, _CPU)


def addresses(weight: Tensor | QuantizedWeight) -> tuple[int, int]:
    """Of a weight's numbers and of its scales, 0 if it has none."""
    if isinstance(weight, QuantizedWeight):
        return weight.values.data_ptr(), weight.scales.data_ptr()
    return weight.data_ptr(), 0


def elements(weight: Tensor | QuantizedWeight) -> np.ndarray:
    """What tells kernels of which kind a weight is."""
    return ELEMENTS[weight.values.dtype if isinstance(weight, QuantizedWeight) else weight.dtype]
