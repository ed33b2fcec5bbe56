"""Products of a matrix of 8- or 4-bit integers with a few vectors, in integer arithmetic.

Turned into floating point first, integers cost more time to compute with than to read. So the vector's numbers become
integers of 16 bits, with a scale for every 64 of them: 2^-16 of the largest of these is lost at most, which is a
hundredth of what bfloat16 would lose. Products of integers are exact, and sums of groups are added up in float32.
"""
# Numba's intrinsics take one argument less than their definitions show, and llvmlite's types are partial.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportReturnType=false

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable

from cobra.ops.quantized import GROUP

from .vector import Vector, prefetch, total
from .weights import FORCE_INLINE

_LANES = GROUP // 4  # of sums: two products are added up at once, and two halves of a group
_SUMS = Vector(types.float32, _LANES)
_BYTE, _SHORT, _INT, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_LARGEST = 32767.0
_LEAST = 1e-30  # groups with smaller numbers only count as zeros
_BYTES_AHEAD = 1024  # asked for before they are needed


def _row(value_type: ir.Type, count: int) -> ir.VectorType:
    return ir.VectorType(value_type, count)


def _load(builder: ir.IRBuilder, data: ir.Value, offset: ir.Value, count: int) -> ir.Value:
    address = builder.gep(data, [offset])
    return builder.load(builder.bitcast(address, _row(address.type.pointee, count).as_pointer()), align=1)


def _fill(like: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(like, [value] * like.count)


def _splat(builder: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    single = builder.insert_element(ir.Constant(_row(value.type, count), ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(single, single, _fill(_row(_INT, count), 0))


def _pairs(builder: ir.IRBuilder, left: ir.Value, right: ir.Value) -> ir.Value:
    """Sums of two neighbouring products each, of 16-bit integers: most processors have one instruction for this."""
    wide, half = _row(_INT, GROUP // 2), _row(_INT, _LANES)
    product = builder.mul(builder.sext(left, wide), builder.sext(right, wide))
    even, odd = (ir.Constant(half, list(range(first, GROUP // 2, 2))) for first in (0, 1))
    return builder.add(builder.shuffle_vector(product, product, even), builder.shuffle_vector(product, product, odd))


@intrinsic
def _no_sums(typing_context):
    """Sixteen zeros."""
    return _SUMS(), lambda context, builder, signature, arguments: _fill(_row(_FLOAT, _LANES), 0.0)


@intrinsic
def _add_group(typing_context, sums, values, offset, x, x_at, scale):
    """`sums` and the products of a group of integers, whose bytes begin at `offset`, with 64 of `x`, times `scale`."""
    half = GROUP // 2

    def generate(context, builder, signature, arguments):
        before, data, first, inputs, inputs_first, factor = arguments
        shorts = _row(_SHORT, half)
        if values.dtype == types.uint8:
            packed = builder.zext(_load(builder, data, first, half), shorts)
            eight = _fill(shorts, 8)
            low = builder.sub(builder.and_(packed, _fill(shorts, 15)), eight)
            high = builder.sub(builder.lshr(packed, _fill(shorts, 4)), eight)
        else:
            low, high = (
                builder.sext(_load(builder, data, builder.add(first, first.type(start)), half), shorts)
                for start in (0, half)
            )
        left, right = (
            _load(builder, inputs, builder.add(inputs_first, first.type(start)), half) for start in (0, half)
        )
        found = builder.add(_pairs(builder, low, left), _pairs(builder, high, right))
        found = builder.sitofp(found, _row(_FLOAT, _LANES))
        product = builder.fmul(found, _splat(builder, factor, _LANES), flags=("contract",))
        return builder.fadd(before, product, flags=("contract",))

    return _SUMS(sums, values, types.intp, x, types.intp, types.float32), generate


@intrinsic
def _round_group(typing_context, x, at, integers, to):
    """Write 64 numbers of `x` as integers and return what they are to be multiplied with; NaN stays NaN."""

    def generate(context, builder, signature, arguments):
        data, first, target, target_first = arguments
        numbers = _load(builder, data, first, GROUP)
        # As integers, so that NaN is larger than infinity, which is larger than all other magnitudes.
        largest = builder.and_(builder.bitcast(numbers, _row(_INT, GROUP)), _fill(_row(_INT, GROUP), 0x7FFFFFFF))
        count = GROUP
        while count > 1:
            count //= 2
            halves = [
                builder.shuffle_vector(largest, largest, ir.Constant(_row(_INT, count), list(range(at, at + count))))
                for at in (0, count)
            ]
            largest = builder.select(builder.icmp_signed(">", *halves), *halves)
        magnitude = builder.bitcast(builder.extract_element(largest, _INT(0)), _FLOAT)
        factor = builder.fdiv(_FLOAT(_LARGEST), magnitude)
        factor = builder.select(builder.fcmp_ordered(">", magnitude, _FLOAT(_LEAST)), factor, _FLOAT(0.0))
        scaled = builder.fmul(numbers, _splat(builder, factor, GROUP))
        kind = ir.FunctionType(scaled.type, [scaled.type])
        rounded = builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.rint.v{GROUP}f32"), [scaled])
        whole = builder.trunc(builder.fptosi(rounded, _row(_INT, GROUP)), _row(_SHORT, GROUP))
        address = builder.gep(target, [target_first])
        builder.store(whole, builder.bitcast(address, whole.type.as_pointer()), align=2)
        return builder.fmul(magnitude, _FLOAT(1 / _LARGEST))

    return types.float32(x, types.intp, integers, types.intp), generate


@njit
def round_inputs(x, batch, count, integers, scales):
    """Turn [batch, count] numbers into integers with scales, rows filled up with zeros to whole groups.

    scales: room for one per group, and for 64 more numbers behind them.
    """
    groups = (count + GROUP - 1) // GROUP
    spare = batch * groups
    for b in range(batch):
        for group in range(count // GROUP):
            to = b * groups + group
            scales[to] = _round_group(x, b * count + group * GROUP, integers, to * GROUP)
        if count % GROUP:
            to, begin = b * groups + groups - 1, count // GROUP * GROUP
            for i in range(GROUP):
                scales[spare + i] = x[b * count + begin + i] if begin + i < count else 0.0
            scales[to] = _round_group(scales, spare, integers, to * GROUP)


@register_jitable
def rounded_sizes(batch, count):
    """Bytes of the integers and of the scales that `round_inputs` writes, each in whole cache lines."""
    groups = batch * ((count + GROUP - 1) // GROUP)
    return groups * GROUP * 2, (groups + GROUP + 15) // 16 * 64


def _group_bytes(weight: Any) -> int:
    """Bytes of a group's integers; this and the next two depend on the number of bits."""


def _group_scale(weight: Any, group: int) -> float:
    """Of a group, counted from the matrix's first one."""


def _row_scale(weight: Any, row: int) -> float:
    """Of a row."""


@overload(_group_bytes, jit_options=FORCE_INLINE)
def _group_bytes_of(weight):
    count = GROUP // 2 if weight[0].dtype == types.uint8 else GROUP
    return lambda weight: count


@overload(_group_scale, jit_options=FORCE_INLINE)
def _group_scale_of(weight, group):
    if weight[0].dtype == types.uint8:
        return lambda weight, group: weight[1][group]
    return lambda weight, group: np.float32(1.0)


@overload(_row_scale, jit_options=FORCE_INLINE)
def _row_scale_of(weight, row):
    if weight[0].dtype == types.uint8:
        return lambda weight, row: np.float32(1.0)
    return lambda weight, row: weight[1][row]


@njit(forceinline=True)
def _add(sums, weight, group, x, scales, x_group):
    return _add_group(
        sums, weight[0], group * _group_bytes(weight), x, x_group * GROUP, _group_scale(weight, group) * scales[x_group]
    )


@njit(forceinline=True)
def _four(weight, row, row_step, x, scales, b, b_step, groups, out, out_at, out_step):
    """Four dot products: of rows `row_step` apart with inputs `b_step` apart, to places `out_step` apart."""
    sums0 = sums1 = sums2 = sums3 = _no_sums()
    at, step = row * groups, row_step * groups
    x_at, x_step = b * groups, b_step * groups
    for i in range(groups):
        for k in range(4 if row_step else 1):
            prefetch(weight[0], (at + k * step + i) * _group_bytes(weight) + _BYTES_AHEAD)
        sums0 = _add(sums0, weight, at + i, x, scales, x_at + i)
        sums1 = _add(sums1, weight, at + step + i, x, scales, x_at + x_step + i)
        sums2 = _add(sums2, weight, at + 2 * step + i, x, scales, x_at + 2 * x_step + i)
        sums3 = _add(sums3, weight, at + 3 * step + i, x, scales, x_at + 3 * x_step + i)
    out[out_at] = total(sums0) * _row_scale(weight, row)
    out[out_at + out_step] = total(sums1) * _row_scale(weight, row + row_step)
    out[out_at + 2 * out_step] = total(sums2) * _row_scale(weight, row + 2 * row_step)
    out[out_at + 3 * out_step] = total(sums3) * _row_scale(weight, row + 3 * row_step)


@njit
def integer_products(weight, first, last, x, scales, batch, count, out, out_at, out_step):
    """Write the products of rows [first, last) of `weight` with the rows of `x`, as `round_inputs` leaves them.

    The product of row r with row b goes to `out[out_at + b * out_step + r - first]`.
    """
    groups = (count + GROUP - 1) // GROUP
    if batch == 1:
        # Four places of the memory at once, far apart: it then comes a fifth to a quarter faster.
        distance = (last - first) // 4
        for row in range(first, first + distance):
            _four(weight, row, distance, x, scales, 0, 0, groups, out, out_at + row - first, distance)
        first, out_at = first + 4 * distance, out_at + 4 * distance
    for row in range(first, last):
        target = out_at + row - first
        for b in range(0, batch - 3, 4):
            _four(weight, row, 0, x, scales, b, 1, groups, out, target + b * out_step, out_step)
        for b in range(batch // 4 * 4, batch):
            sums = _no_sums()
            for i in range(groups):
                sums = _add(sums, weight, row * groups + i, x, scales, b * groups + i)
            out[target + b * out_step] = total(sums) * _row_scale(weight, row)
