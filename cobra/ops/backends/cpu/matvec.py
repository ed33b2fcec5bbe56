"""Products of a large matrix with a few vectors: as fast as the matrix can be read from memory."""
# Numba's intrinsics take one argument less than their definitions show.
# pyright: reportCallIssue=false

from typing import Any

import numpy as np
import torch
from numba import njit
from numba.extending import overload, register_jitable
from torch import Tensor

from cobra.ops.quantized import QuantizedWeight

from .compiled import kernel
from .integers import integer_products, round_inputs, rounded_sizes
from .team import finish, new_counters, run_together, take, team_size, wait
from .vector import LANES, load_wide, load_wide_last, pointer, prefetch, total, zeros_wide
from .weights import FLOATS, FORCE_INLINE, SHORTS, SINGLES, addresses, elements, has_scales, is_readable, weight_at

MAX_ROWS = 8  # at once; beyond, a product is bound by arithmetic, and libraries that block for caches win
# Those of quantised weights take so many, `MAX_ROWS` at a time: the libraries would need a dequantised copy for each.
MAX_QUANTIZED_ROWS = 64

_PIECE = 128 * 1024  # numbers of the weight per item
_AHEAD = 256  # numbers that are asked for before they are needed: a fifth faster where the machine is shared


@njit(forceinline=True)
def dot(weight, at, x, x_at, count):
    """The dot product of two pieces of `count` numbers, always summed in the same order."""
    sums = zeros_wide()
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        sums = sums + load_wide(weight, at + i) * load_wide(x, x_at + i)
    if whole < count:
        rest = count - whole
        sums = sums + load_wide_last(weight, at + count, rest) * load_wide_last(x, x_at + count, rest)
    return total(sums)


@njit(forceinline=True)
def _dot4(weight, at, x, x_at, count, out, out_at, out_step):
    """`dot` with four consecutive pieces of `x`, in the same order each."""
    sums0 = sums1 = sums2 = sums3 = zeros_wide()
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        prefetch(weight, at + i + _AHEAD)
        w = load_wide(weight, at + i)
        sums0 = sums0 + w * load_wide(x, x_at + i)
        sums1 = sums1 + w * load_wide(x, x_at + count + i)
        sums2 = sums2 + w * load_wide(x, x_at + 2 * count + i)
        sums3 = sums3 + w * load_wide(x, x_at + 3 * count + i)
    if whole < count:
        rest = count - whole
        w = load_wide_last(weight, at + count, rest)
        sums0 = sums0 + w * load_wide_last(x, x_at + count, rest)
        sums1 = sums1 + w * load_wide_last(x, x_at + 2 * count, rest)
        sums2 = sums2 + w * load_wide_last(x, x_at + 3 * count, rest)
        sums3 = sums3 + w * load_wide_last(x, x_at + 4 * count, rest)
    out[out_at] = total(sums0)
    out[out_at + out_step] = total(sums1)
    out[out_at + 2 * out_step] = total(sums2)
    out[out_at + 3 * out_step] = total(sums3)


@njit(forceinline=True)
def _four_dots(weight, at, distance, x, x_at, count, out, out_at, out_step):
    """`dot` of four pieces of `weight`, `distance` numbers apart, in the same order each."""
    sums0 = sums1 = sums2 = sums3 = zeros_wide()
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        for row in range(4):
            prefetch(weight, at + row * distance + i + _AHEAD)
        v = load_wide(x, x_at + i)
        sums0 = sums0 + load_wide(weight, at + i) * v
        sums1 = sums1 + load_wide(weight, at + distance + i) * v
        sums2 = sums2 + load_wide(weight, at + 2 * distance + i) * v
        sums3 = sums3 + load_wide(weight, at + 3 * distance + i) * v
    if whole < count:
        rest = count - whole
        v = load_wide_last(x, x_at + count, rest)
        sums0 = sums0 + load_wide_last(weight, at + count, rest) * v
        sums1 = sums1 + load_wide_last(weight, at + distance + count, rest) * v
        sums2 = sums2 + load_wide_last(weight, at + 2 * distance + count, rest) * v
        sums3 = sums3 + load_wide_last(weight, at + 3 * distance + count, rest) * v
    out[out_at] = total(sums0)
    out[out_at + out_step] = total(sums1)
    out[out_at + 2 * out_step] = total(sums2)
    out[out_at + 3 * out_step] = total(sums3)


@njit
def products(weight, first, last, x, x_at, batch, count, out, out_at, out_step):
    """Write the products of rows [first, last) of `weight` with the rows of `x` from `x_at` on, all of `count` numbers.

    The product of row r with row b goes to `out[out_at + b * out_step + r - first]`.
    """
    if batch == 1:
        # Four places of the memory at once, far apart: it then comes a fifth to a quarter faster.
        distance = (last - first) // 4
        for row in range(first, first + distance):
            _four_dots(weight, row * count, distance * count, x, x_at, count, out, out_at + row - first, distance)
        first, out_at = first + 4 * distance, out_at + 4 * distance
    for row in range(first, last):
        target = out_at + row - first
        for b in range(0, batch - 3, 4):
            _dot4(weight, row * count, x, x_at + b * count, count, out, target + b * out_step, out_step)
        for b in range(batch // 4 * 4, batch):
            out[target + b * out_step] = dot(weight, row * count, x, x_at + b * count, count)


def prepare(weight: Any, x: Any, batch: int, count: int, room: Any) -> None:
    """Round the inputs [batch, count] of `multiply`, if its weight wants them rounded, into `room`."""


@overload(prepare, jit_options=FORCE_INLINE)
def _prepare(weight, x, batch, count, room):
    if has_scales(weight):
        return lambda weight, x, batch, count, room: round_inputs(x, batch, count, room[0], room[1])
    return lambda weight, x, batch, count, room: None


def multiply(
    weight: Any, first: int, last: int, x: Any, room: Any, batch: int, count: int, out: Any, out_at: int, out_step: int
) -> None:
    """`products` with a weight of any kind; `room` is as `prepare` has left it."""


@overload(multiply, jit_options=FORCE_INLINE)
def _multiply(weight, first, last, x, room, batch, count, out, out_at, out_step):
    if has_scales(weight):
        return lambda weight, first, last, x, room, batch, count, out, out_at, out_step: integer_products(
            weight, first, last, room[0], room[1], batch, count, out, out_at, out_step
        )
    return lambda weight, first, last, x, room, batch, count, out, out_at, out_step: products(
        weight, first, last, x, 0, batch, count, out, out_at, out_step
    )


@njit(forceinline=True)
def room_at(address, batch, count):
    """What `prepare` may write to; of `room_size` bytes."""
    return pointer(address, SHORTS), pointer(address + rounded_sizes(batch, count)[0], SINGLES)


@register_jitable
def room_size(batch, count):
    """In bytes, whole cache lines."""
    integers, scales = rounded_sizes(batch, count)
    return integers + scales


@kernel
def _linear(thread, counters, address, scales, like, rows, count, x_address, batch, out_address, work):
    weight, x, out = weight_at(address, scales, like), pointer(x_address, SINGLES), pointer(out_address, SINGLES)
    room = room_at(np.int64(work.ctypes.data) + thread * room_size(batch, count), batch, count)
    size = max(1, _PIECE // count)
    items = (rows + size - 1) // size
    item = take(counters, 0)
    if item < items:
        prepare(weight, x, batch, count, room)
    while item < items:
        first = item * size
        multiply(weight, first, min(first + size, rows), x, room, batch, count, out, first, rows)
        finish(counters, 0)
        item = take(counters, 0)
    wait(counters, 0, items)


def most_rows(weight: Tensor | QuantizedWeight) -> int:
    """How many vectors a weight is multiplied with here."""
    return MAX_QUANTIZED_ROWS if isinstance(weight, QuantizedWeight) else MAX_ROWS


def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor | None:
    """See `cobra.ops.fused.linear`.

    Taken are float32 and bfloat16, up to `most_rows` rows, a weight that is a contiguous plain tensor, or made of such
    and, in 8 bits, has rows of whole groups. None, without a result, for anything else, sizes that disagree included.
    """
    if (
        x.dtype not in FLOATS
        or not (is_readable(weight) and type(x) is Tensor and x.is_cpu)
        or not (x.dim() == len(weight.shape) == 2 and x.shape[1] == weight.shape[1])
        or not 1 <= x.shape[0] <= most_rows(weight)
        or 0 in weight.shape
    ):
        return None
    (rows, count), batch = weight.shape, x.shape[0]
    x, out = x.float().contiguous(), torch.empty(batch, rows)
    threads = team_size(rows * count)
    for part, products_of_part in zip(x.split(MAX_ROWS), out.split(MAX_ROWS), strict=True):
        size = threads * room_size(len(part), count) if isinstance(weight, QuantizedWeight) else 0
        run_together(
            _linear, threads, new_counters(1), *addresses(weight), elements(weight), rows, count, part.data_ptr(),
            len(part), products_of_part.data_ptr(), np.empty(size, np.uint8),
        )  # fmt: skip
    return out
