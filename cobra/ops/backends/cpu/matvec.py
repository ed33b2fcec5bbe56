"""Products of a large matrix with a few vectors: as fast as the matrix can be read from memory."""
# Numba's intrinsics take one argument less than their definitions show.
# pyright: reportCallIssue=false

import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from cobra.ops.quantized import GROUP, QuantizedWeight

from .compiled import kernel
from .team import finish, new_counters, run_together, take, team_size, wait
from .vector import LANES, load_wide, load_wide_last, pointer, total, zeros_wide
from .weights import (
    ELEMENTS,
    FLOATS,
    addresses,
    elements,
    is_readable,
    load_weight,
    load_weight_last,
    prefetch_weight,
    row_scale,
    weight_at,
)

MAX_ROWS = 8  # beyond, a product is bound by arithmetic, and libraries that block for caches win

_PIECE = 128 * 1024  # numbers of the weight per item


@njit(forceinline=True)
def dot(weight, row, x, x_at, count):
    """The dot product of a row of `count` numbers with as many of `x`, always summed in the same order."""
    sums, at = zeros_wide(), row * count
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        sums = sums + load_weight(weight, at + i) * load_wide(x, x_at + i)
    if whole < count:
        rest = count - whole
        sums = sums + load_weight_last(weight, at + count, rest) * load_wide_last(x, x_at + count, rest)
    return total(sums) * row_scale(weight, row)


@njit(forceinline=True)
def _dot4(weight, row, x, x_at, count, out, out_at, out_step):
    """`dot` with four consecutive pieces of `x`, in the same order each."""
    sums0 = sums1 = sums2 = sums3 = zeros_wide()
    at, whole = row * count, count // LANES * LANES
    for i in range(0, whole, LANES):
        prefetch_weight(weight, at + i)
        w = load_weight(weight, at + i)
        sums0 = sums0 + w * load_wide(x, x_at + i)
        sums1 = sums1 + w * load_wide(x, x_at + count + i)
        sums2 = sums2 + w * load_wide(x, x_at + 2 * count + i)
        sums3 = sums3 + w * load_wide(x, x_at + 3 * count + i)
    if whole < count:
        rest = count - whole
        w = load_weight_last(weight, at + count, rest)
        sums0 = sums0 + w * load_wide_last(x, x_at + count, rest)
        sums1 = sums1 + w * load_wide_last(x, x_at + 2 * count, rest)
        sums2 = sums2 + w * load_wide_last(x, x_at + 3 * count, rest)
        sums3 = sums3 + w * load_wide_last(x, x_at + 4 * count, rest)
    scale = row_scale(weight, row)
    out[out_at] = total(sums0) * scale
    out[out_at + out_step] = total(sums1) * scale
    out[out_at + 2 * out_step] = total(sums2) * scale
    out[out_at + 3 * out_step] = total(sums3) * scale


@njit(forceinline=True)
def _four_dots(weight, row, distance, x, x_at, count, out, out_at):
    """`dot` of four rows, `distance` apart, in the same order each; to places as far apart."""
    sums0 = sums1 = sums2 = sums3 = zeros_wide()
    at, step, whole = row * count, distance * count, count // LANES * LANES
    for i in range(0, whole, LANES):
        for k in range(4):
            prefetch_weight(weight, at + k * step + i)
        v = load_wide(x, x_at + i)
        sums0 = sums0 + load_weight(weight, at + i) * v
        sums1 = sums1 + load_weight(weight, at + step + i) * v
        sums2 = sums2 + load_weight(weight, at + 2 * step + i) * v
        sums3 = sums3 + load_weight(weight, at + 3 * step + i) * v
    if whole < count:
        rest = count - whole
        v = load_wide_last(x, x_at + count, rest)
        sums0 = sums0 + load_weight_last(weight, at + count, rest) * v
        sums1 = sums1 + load_weight_last(weight, at + step + count, rest) * v
        sums2 = sums2 + load_weight_last(weight, at + 2 * step + count, rest) * v
        sums3 = sums3 + load_weight_last(weight, at + 3 * step + count, rest) * v
    out[out_at] = total(sums0) * row_scale(weight, row)
    out[out_at + distance] = total(sums1) * row_scale(weight, row + distance)
    out[out_at + 2 * distance] = total(sums2) * row_scale(weight, row + 2 * distance)
    out[out_at + 3 * distance] = total(sums3) * row_scale(weight, row + 3 * distance)


@njit
def products(weight, first, last, x, x_at, batch, count, out, out_at, out_step):
    """Write the products of rows [first, last) of `weight` with the rows of `x` from `x_at` on, all of `count` numbers.

    The product of row r with row b goes to `out[out_at + b * out_step + r - first]`.
    """
    if batch == 1:
        # Four places of the memory at once, far apart: it then comes a fifth to a quarter faster.
        distance = (last - first) // 4
        for row in range(first, first + distance):
            _four_dots(weight, row, distance, x, x_at, count, out, out_at + row - first)
        first, out_at = first + 4 * distance, out_at + 4 * distance
    for row in range(first, last):
        target = out_at + row - first
        for b in range(0, batch - 3, 4):
            _dot4(weight, row, x, x_at + b * count, count, out, target + b * out_step, out_step)
        for b in range(batch // 4 * 4, batch):
            out[target + b * out_step] = dot(weight, row, x, x_at + b * count, count)


@kernel
def _linear(thread, counters, address, scales, like, rows, count, x_address, batch, out_address, single):
    weight = weight_at(address, scales, like)
    x, out = pointer(x_address, single), pointer(out_address, single)
    size = max(1, _PIECE // count)
    items = (rows + size - 1) // size
    item = take(counters, 0)
    while item < items:
        first = item * size
        products(weight, first, min(first + size, rows), x, 0, batch, count, out, first, rows)
        finish(counters, 0)
        item = take(counters, 0)
    wait(counters, 0, items)


def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor | None:
    """See `cobra.ops.fused.linear`.

    Taken are float32 and bfloat16, up to `MAX_ROWS` rows, a weight that is a contiguous plain tensor or made of such.
    None, without a result, for anything else, sizes that disagree included.
    """
    if (
        x.dtype not in FLOATS
        or not (is_readable(weight) and type(x) is Tensor and x.is_cpu)
        or not (x.dim() == len(weight.shape) == 2 and x.shape[1] == weight.shape[1])
        or not 1 <= x.shape[0] <= MAX_ROWS
        or 0 in weight.shape
    ):
        return None
    rows, count = weight.shape
    x, out = x.float(), torch.empty(x.shape[0], rows)
    if isinstance(weight, QuantizedWeight) and weight.bits == 4 and count % GROUP:
        x = F.pad(x, (0, -count % GROUP))
    x = x.contiguous()
    run_together(
        _linear, team_size(rows * count), new_counters(1), *addresses(weight), elements(weight), rows, x.shape[1],
        x.data_ptr(), x.shape[0], out.data_ptr(), ELEMENTS[torch.float32],
    )  # fmt: skip
    return out
