"""Residual addition and RMSNorm in one pass over memory, forward and backward.

Bytes that must move per row of `dim` channels (2-byte x, 4-byte residual): forward 2 + 4 in, 2 + 4 out; backward reads
2 + 4 + 4 and writes 2 + 4. About 5 and 12 FLOPs per element: bound by memory. Speed on a GPU has not been measured yet.
"""

import triton
import triton.language as tl
from torch import Tensor

from cobra.errors import BackendError

from .._operators import norm_function
from .._shared import compute_dtype, rows
from .functions import load
from .launch import launch, sum_partial

PROGRAMS = 512  # of the backward pass at most: each sums the weight's gradient over its rows
MAX_DIM = 65536  # a program holds a whole row in registers


# EPS is a constant of the compiled kernel: an argument would be rounded to float32 where sums are float64.
@triton.jit
def _forward(x, residual, weight, normed, sums, scales, dim, EPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < dim
    acc: tl.constexpr = sums.dtype.element_ty
    value = load(x + row * dim + channel, inside, acc)
    if residual is not None:
        value += load(residual + row * dim + channel, inside, acc)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / dim + EPS)
    tl.store(sums + row * dim + channel, value, mask=inside)
    tl.store(scales + row, scale)
    tl.store(normed + row * dim + channel, value * scale * load(weight + channel, inside, acc), mask=inside)


@triton.jit
def _backward(
    sums, scales, weight, dnormed, dnormed_row, dsums, dsums_row, dx, dresidual, dweight, num_rows, dim, group,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < dim
    acc: tl.constexpr = sums.dtype.element_ty
    w = load(weight + channel, inside, acc)
    dw = tl.zeros([BLOCK], acc)
    for row in range(program * group, tl.minimum((program + 1) * group, num_rows)):
        scale = tl.load(scales + row)
        unit = load(sums + row * dim + channel, inside, acc) * scale
        gradient = load(dnormed + row * dnormed_row + channel, inside, acc)
        dw += gradient * unit
        gradient *= w
        gradient = (gradient - unit * (tl.sum(gradient * unit, 0) / dim)) * scale
        if dsums is not None:
            gradient += load(dsums + row * dsums_row + channel, inside, acc)
        tl.store(dx + row * dim + channel, gradient, mask=inside)
        if dresidual is not None:
            tl.store(dresidual + row * dim + channel, gradient, mask=inside)
    tl.store(dweight + program * dim + channel, dw, mask=inside)


def _tile(dim: int) -> dict[str, int]:
    if dim > MAX_DIM:
        raise BackendError(
            f"The ops backend 'triton' normalises at most {MAX_DIM} channels, x has {dim}; use 'reference'."
        )
    block = triton.next_power_of_2(dim)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _normalise(x, residual, weight, eps):
    num_rows, dim = x.shape
    acc = compute_dtype(x)
    normed, sums, scales = x.new_empty(x.shape), x.new_empty(x.shape, dtype=acc), x.new_empty(num_rows, dtype=acc)
    launch(_forward, num_rows, x, residual, weight, normed, sums, scales, dim, on=x, EPS=eps, **_tile(dim))
    return normed, sums, scales


def _normalise_backward(gradients, saved, x, residual, weight, eps):
    dnormed, dsums, _ = gradients
    sums, scales = saved
    num_rows, dim = x.shape
    dx = x.new_empty(x.shape)
    dresidual = None if residual is None else residual.new_empty(residual.shape)
    if dnormed is None:
        sums_alone = [out.copy_(dsums) for out in (dx, dresidual) if out is not None]
        return [*sums_alone, weight.new_zeros(weight.shape)]
    group = -(-num_rows // PROGRAMS)
    programs = -(-num_rows // group)
    dweight = sums.new_empty(programs, dim)
    launch(
        _backward, programs, sums, scales, weight, *_strided(dnormed), *_strided(dsums), dx, dresidual, dweight,
        num_rows, dim, group, on=sums, **_tile(dim),
    )  # fmt: skip
    found = [dx, dresidual, sum_partial(dweight, 0, weight)]
    return [gradient for gradient in found if gradient is not None]


def _strided(matrix: Tensor | None) -> tuple[Tensor | None, int]:
    """A gradient as the kernel takes it: pointer, stride of a row."""
    if matrix is None:
        return None, 0
    matrix = rows(matrix)
    return matrix, matrix.stride(0)


add_rms_norm = norm_function("triton", _normalise, _normalise_backward, upcast=False)
