"""How kernels read a weight matrix, whatever it is made of: float32, bfloat16, or integers of 8 or 4 bits with scales.

A matrix is a pointer to its numbers, or a pair of pointers to integers and scales; the functions below are compiled for
each. They count in numbers from the matrix's beginning. Rows of 4-bit weights are whole groups, so they are read with
inputs that end in zeros.
"""
# Numba's intrinsics take one argument less than their definitions show, and llvmlite's types are partial.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportReturnType=false

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from cobra.ops.quantized import GROUP, QuantizedWeight

from .vector import LANES, Vector, load_wide, load_wide_last, pointer, prefetch, zeros_wide

# How numbers look to kernels: Numba knows no bfloat16. Of integers, uint8 are pairs of 4 bits.
ELEMENTS = {
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.int8: np.empty(0, np.int8),
    torch.uint8: np.empty(0, np.uint8),
}
FLOATS = (torch.float32, torch.bfloat16)
_SCALES = np.empty(0, np.float32)
_INLINE = {"forceinline": True}
_BYTES_AHEAD = 1024  # asked for before they are needed: a fifth faster where the machine is shared


def _kind(weight: types.Type) -> types.Type:
    """The type of a weight's numbers; int8 and uint8 come with scales."""
    return weight[0].dtype if isinstance(weight, types.BaseTuple) else weight.dtype


def weight_at(address: int, scales_address: int, like: np.ndarray) -> Any:
    """The weight at an address, of the kind of numbers in `like`; in compiled code only, like all below."""


@overload(weight_at, jit_options=_INLINE)
def _weight_at(address, scales_address, like):
    if like.dtype in (types.int8, types.uint8):
        return lambda address, scales_address, like: (pointer(address, like), pointer(scales_address, _SCALES))
    return lambda address, scales_address, like: pointer(address, like)


def load_weight(weight: Any, at: int) -> Any:
    """`LANES` numbers as float32; of 8-bit weights without the row's scale."""


@overload(load_weight, jit_options=_INLINE)
def _load_weight(weight, at):
    if _kind(weight) == types.uint8:
        return lambda weight, at: (
            _load_nibbles(weight[0], at // GROUP * (GROUP // 2), at % GROUP) * weight[1][at // GROUP]
        )
    if _kind(weight) == types.int8:
        return lambda weight, at: load_wide(weight[0], at)
    return lambda weight, at: load_wide(weight, at)


def load_weight_last(weight: Any, end: int, count: int) -> Any:
    """The `count` numbers before `end` in the last lanes, zeros in the others."""


@overload(load_weight_last, jit_options=_INLINE)
def _load_weight_last(weight, end, count):
    if _kind(weight) == types.uint8:  # never called: rows are whole groups, and these are whole vectors
        return lambda weight, end, count: zeros_wide()
    if _kind(weight) == types.int8:
        return lambda weight, end, count: load_wide_last(weight[0], end, count)
    return lambda weight, end, count: load_wide_last(weight, end, count)


def row_scale(weight: Any, row: int) -> Any:
    """What the sum over a row is to be multiplied with."""


@overload(row_scale, jit_options=_INLINE)
def _row_scale(weight, row):
    if _kind(weight) == types.int8:
        return lambda weight, row: weight[1][row]
    return lambda weight, row: np.float32(1.0)


def prefetch_weight(weight: Any, at: int) -> None:
    """Have the numbers some way behind `at` brought into the cache, if there is such memory."""


@overload(prefetch_weight, jit_options=_INLINE)
def _prefetch_weight(weight, at):
    if _kind(weight) == types.uint8:
        return lambda weight, at: prefetch(weight[0], at // 2 + _BYTES_AHEAD)
    if _kind(weight) == types.int8:
        return lambda weight, at: prefetch(weight[0], at + _BYTES_AHEAD)
    ahead = _BYTES_AHEAD * 8 // _kind(weight).bitwidth
    return lambda weight, at: prefetch(weight, at + ahead)


@intrinsic
def _load_nibbles(typing_context, array, offset, column):
    """`LANES` columns of the group whose bytes begin at `offset`, from `column` on, as float32 without the scale."""
    lanes = GROUP // 2

    def generate(context, builder, signature, arguments):
        data, at, first = arguments
        byte = ir.IntType(8)
        integers = ir.VectorType(byte, lanes)
        packed = builder.load(builder.bitcast(builder.gep(data, [at]), integers.as_pointer()), align=1)
        low = builder.and_(packed, ir.Constant(integers, [15] * lanes))
        high = builder.lshr(packed, ir.Constant(integers, [4] * lanes))
        if LANES == GROUP:
            both = ir.Constant(ir.VectorType(ir.IntType(32), GROUP), list(range(GROUP)))
            nibbles = builder.shuffle_vector(low, high, both)
        else:
            nibbles = builder.select(builder.icmp_signed("<", first, first.type(lanes)), low, high)
        centred = builder.sub(nibbles, ir.Constant(nibbles.type, [8] * LANES))
        wide = builder.sext(centred, ir.VectorType(ir.IntType(32), LANES))
        return builder.sitofp(wide, ir.VectorType(ir.FloatType(), LANES))

    return Vector(types.float32)(array, types.intp, types.intp), generate


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may read the tensor's memory in place: no subclass, on the CPU, contiguous."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu and tensor.is_contiguous()


def is_readable(weight: Tensor | QuantizedWeight) -> bool:
    """Whether kernels may read a weight in place: plain tensors of types and sizes that fit each other."""
    if not isinstance(weight, QuantizedWeight):
        return weight.dtype in FLOATS and is_plain(weight)
    values, scales, (rows, width) = weight.values, weight.scales, weight.shape
    groups = -(-width // GROUP)
    expected = (torch.int8, (rows, width), 1) if weight.bits == 8 else (torch.uint8, (rows, groups * 32), groups)
    return (
        (values.dtype, values.shape, scales.shape[-1]) == expected
        and (scales.dtype, scales.shape[:-1]) == (torch.float32, (rows,))
        and is_plain(values)
        and is_plain(scales)
    )


def addresses(weight: Tensor | QuantizedWeight) -> tuple[int, int]:
    """Of a weight's numbers and of its scales, 0 if it has none."""
    if isinstance(weight, QuantizedWeight):
        return weight.values.data_ptr(), weight.scales.data_ptr()
    return weight.data_ptr(), 0


def elements(weight: Tensor | QuantizedWeight) -> np.ndarray:
    """What says to kernels of which kind a weight is."""
    return ELEMENTS[weight.values.dtype if isinstance(weight, QuantizedWeight) else weight.dtype]
