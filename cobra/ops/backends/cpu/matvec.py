"""Products of a large matrix with a few vectors: as fast as the matrix can be read from memory."""
# Numba's intrinsics take one argument less than their definitions show.
# pyright: reportCallIssue=false

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .compiled import kernel
from .team import finish, new_counters, run_together, take, team_size, wait
from .vector import LANES, load_wide, load_wide_last, pointer, prefetch, total, zeros_wide

MAX_ROWS = 8  # beyond, a product is bound by arithmetic, and libraries that block for caches win

# How weights look to kernels: Numba knows no bfloat16.
ELEMENTS = {torch.float32: np.empty(0, np.float32), torch.bfloat16: np.empty(0, np.uint16)}
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


@kernel
def _linear(thread, counters, address, like, rows, count, x_address, batch, out_address, single):
    weight, x, out = pointer(address, like), pointer(x_address, single), pointer(out_address, single)
    size = max(1, _PIECE // count)
    items = (rows + size - 1) // size
    item = take(counters, 0)
    while item < items:
        first = item * size
        products(weight, first, min(first + size, rows), x, 0, batch, count, out, first, rows)
        finish(counters, 0)
        item = take(counters, 0)
    wait(counters, 0, items)


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel may read the tensor's memory in place: no subclass, on the CPU, contiguous."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu and tensor.is_contiguous()


def linear(x: Tensor, weight: Tensor) -> Tensor | None:
    """See `cobra.ops.fused.linear`.

    Taken are float32 and bfloat16, up to `MAX_ROWS` rows, a weight that is a contiguous plain tensor. None, without a
    result, for anything else, sizes that disagree included.
    """
    if (
        x.dtype not in ELEMENTS
        or weight.dtype not in ELEMENTS
        or not (is_plain(weight) and type(x) is Tensor and x.is_cpu)
        or not (x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1])
        or not 1 <= x.shape[0] <= MAX_ROWS
        or weight.numel() == 0
    ):
        return None
    rows, count = weight.shape
    x, out = x.float().contiguous(), torch.empty(x.shape[0], rows)
    run_together(
        _linear, team_size(weight.numel()), new_counters(1), weight.data_ptr(), ELEMENTS[weight.dtype], rows, count,
        x.data_ptr(), x.shape[0], out.data_ptr(), ELEMENTS[torch.float32],
    )  # fmt: skip
    return out
