"""Residual addition and RMSNorm in one pass over memory, forward and backward.

Bytes that must move per row of `dim` channels (2-byte x, 4-byte residual): forward 2 + 4 in, 2 + 4 out; backward reads
2 + 4 + 4 and writes 2 + 4. About 5 and 12 FLOPs per element: bound by memory. Speed on a GPU has not been measured yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._shared import compute_dtype
from .launch import launch

PROGRAMS = 512  # of the backward pass at most: each sums the weight's gradient over its rows


# EPS is a constant of the compiled kernel: an argument would be rounded to float32 where sums are float64.
@triton.jit
def _forward(
    x, x_row, residual, residual_row, weight, normed, sums, scales, dim, EPS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < dim
    acc = sums.dtype.element_ty
    value = tl.load(x + row * x_row + channel, mask=inside, other=0.0).to(acc)
    if residual is not None:
        value += tl.load(residual + row * residual_row + channel, mask=inside, other=0.0).to(acc)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / dim + EPS)
    tl.store(sums + row * dim + channel, value, mask=inside)
    tl.store(scales + row, scale)
    w = tl.load(weight + channel, mask=inside, other=0.0).to(acc)
    tl.store(normed + row * dim + channel, value * scale * w, mask=inside)


@triton.jit
def _backward(
    sums, scales, weight, dnormed, dnormed_row, dsums, dsums_row, dx, dresidual, dweight, num_rows, dim, group,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < dim
    acc = sums.dtype.element_ty
    w = tl.load(weight + channel, mask=inside, other=0.0).to(acc)
    dw = tl.zeros([BLOCK], acc)
    for row in range(program * group, tl.minimum((program + 1) * group, num_rows)):
        scale = tl.load(scales + row)
        unit = tl.load(sums + row * dim + channel, mask=inside, other=0.0) * scale
        gradient = tl.load(dnormed + row * dnormed_row + channel, mask=inside, other=0.0).to(acc)
        dw += gradient * unit
        gradient *= w
        gradient = (gradient - unit * (tl.sum(gradient * unit, 0) / dim)) * scale
        if dsums is not None:
            gradient += tl.load(dsums + row * dsums_row + channel, mask=inside, other=0.0).to(acc)
        tl.store(dx + row * dim + channel, gradient, mask=inside)
        if dresidual is not None:
            tl.store(dresidual + row * dim + channel, gradient, mask=inside)
    tl.store(dweight + program * dim + channel, dw, mask=inside)


def _matrix(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """[..., dim] as rows with a contiguous last axis, and the stride of a row; a view where that is possible."""
    if tensor is None:
        return None, 0
    matrix = tensor.reshape(-1, tensor.shape[-1])
    matrix = matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()
    return matrix, matrix.stride(0)


def _tile(dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(dim)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        dim, acc = x.shape[-1], compute_dtype(x)
        num_rows = x.numel() // dim
        normed, sums = x.new_empty(x.shape), x.new_empty(x.shape, dtype=acc)
        scales = x.new_empty(num_rows, dtype=acc)
        launch(
            _forward, (num_rows,), *_matrix(x), *_matrix(residual), weight.contiguous(), normed, sums, scales, dim,
            on=x, EPS=float(eps), **_tile(dim),
        )  # fmt: skip
        ctx.save_for_backward(sums, scales, weight)
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return normed, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, dnormed, dsums):
        sums, scales, weight = ctx.saved_tensors
        x_dtype, residual_dtype = ctx.dtypes
        if dnormed is None:
            if dsums is None:
                return None, None, None, None
            return dsums.to(x_dtype), None if residual_dtype is None else dsums.to(residual_dtype), None, None
        dim, num_rows = sums.shape[-1], scales.numel()
        group = -(-num_rows // PROGRAMS)
        programs = -(-num_rows // group)
        dx = sums.new_empty(sums.shape, dtype=x_dtype)
        dresidual = None if residual_dtype is None else sums.new_empty(sums.shape, dtype=residual_dtype)
        dweight = sums.new_empty(programs, dim)
        launch(
            _backward, (programs,), sums, scales, weight.contiguous(), *_matrix(dnormed), *_matrix(dsums),
            dx, dresidual, dweight, num_rows, dim, group, on=sums, **_tile(dim),
        )  # fmt: skip
        return dx, dresidual, dweight.sum(0).to(weight.dtype), None


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `cobra.ops.add_rms_norm`."""
    return _AddRmsNorm.apply(x, residual, weight, eps)
