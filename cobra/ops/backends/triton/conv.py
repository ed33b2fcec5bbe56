"""Causal depthwise convolution with SiLU, forward and backward; the one-token update is a sequence of length one.

A program computes a [BLOCK_T, BLOCK_D] tile of steps and channels. Shifted inputs are read again and come from the L1
cache. The backward pass recomputes the value before the SiLU wherever an input reaches, rather than storing it.

Bytes that must move per element, 2-byte dtypes: forward 2 + 2, backward 4 + 2. FLOPs: 2 width + 5 forward, about
2 width^2 + 20 backward. Bound by memory. Speed on a GPU has not been measured yet.
"""
# Triton compiles loops that pyright takes for Python's.
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._shared import compute_dtype, last_inputs, rows
from .functions import sigmoid, silu_slope
from .launch import launch, strided, sum_partial

BLOCK_T, BLOCK_D = 32, 64


@triton.jit
def _input(x, x_step, initial, t, end, channel, inside, dim, WIDTH: tl.constexpr, acc: tl.constexpr):
    """[BLOCK_T, BLOCK_D] inputs of one row at the steps t, which may lie before the first one; zero from `end` on."""
    value = tl.load(
        x + t[:, None] * x_step + channel[None, :], mask=((t >= 0) & (t < end))[:, None] & inside[None, :], other=0.0
    ).to(acc)
    if initial is not None:
        before = tl.load(
            initial + (t[:, None] + WIDTH - 1) * dim + channel[None, :],
            mask=((t < 0) & (t > -WIDTH))[:, None] & inside[None, :],
            other=0.0,
        )
        value += before.to(acc)
    return value


@triton.jit
def _before_silu(
    x, x_step, initial, weight, bias, t, end, channel, inside, dim, WIDTH: tl.constexpr, acc: tl.constexpr
):
    value = tl.zeros([t.shape[0], channel.shape[0]], acc)
    for k in tl.static_range(WIDTH):
        tap = tl.load(weight + channel * WIDTH + k, mask=inside, other=0.0).to(acc)
        value += tap[None, :] * _input(x, x_step, initial, t - (WIDTH - 1) + k, end, channel, inside, dim, WIDTH, acc)
    if bias is not None:
        value += tl.load(bias + channel, mask=inside, other=0.0).to(acc)[None, :]
    return value


@triton.jit
def _forward(
    x, x_row, x_step, initial, weight, bias, lengths, y, length, dim,
    WIDTH: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < dim
    end = row * 0 + length
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + row), length)
    if initial is not None:
        initial += row * (WIDTH - 1) * dim
    value = _before_silu(x + row * x_row, x_step, initial, weight, bias, t, end, channel, inside, dim, WIDTH, ACC)
    value = tl.where((t < end)[:, None], value * sigmoid(value), 0.0)
    tl.store(
        y + (row * length + t[:, None]) * dim + channel[None, :], value, mask=(t < length)[:, None] & inside[None, :]
    )


@triton.jit
def _backward(
    x, x_row, x_step, initial, weight, bias, lengths, dy, dy_row, dy_step, dx, dinitial, dweight, dbias, length, dim,
    WIDTH: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    # The first tile begins with the inputs of the initial state, which get gradients like any other.
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T) - (WIDTH - 1)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < dim
    end = row * 0 + length
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + row), length)
    if initial is not None:
        initial += row * (WIDTH - 1) * dim
    x += row * x_row
    gradient = tl.zeros([BLOCK_T, BLOCK_D], ACC)  # of the inputs at t
    partial = (row * tl.num_programs(0) + tl.program_id(0)) * dim
    for j in tl.static_range(WIDTH):
        # gradient before the SiLU at step t + j, which the input at t reaches through tap WIDTH - 1 - j
        value = _before_silu(x, x_step, initial, weight, bias, t + j, end, channel, inside, dim, WIDTH, ACC)
        mask = ((t + j >= 0) & (t + j < end))[:, None] & inside[None, :]
        g = tl.load(dy + row * dy_row + (t[:, None] + j) * dy_step + channel[None, :], mask=mask, other=0.0).to(ACC)
        g = tl.where(mask, g * silu_slope(value, sigmoid(value)), 0.0)
        gradient += g * tl.load(weight + channel * WIDTH + (WIDTH - 1 - j), mask=inside, other=0.0).to(ACC)[None, :]
        if j == 0:
            for k in tl.static_range(WIDTH):
                source = _input(x, x_step, initial, t - (WIDTH - 1) + k, end, channel, inside, dim, WIDTH, ACC)
                tl.store(dweight + (partial + channel) * WIDTH + k, tl.sum(g * source, 0), mask=inside)
            if dbias is not None:
                tl.store(dbias + partial + channel, tl.sum(g, 0), mask=inside)
    at = (row * length + t[:, None]) * dim + channel[None, :]
    tl.store(dx + at, gradient, mask=((t >= 0) & (t < length))[:, None] & inside[None, :])
    if dinitial is not None:
        at = (row * (WIDTH - 1) + t[:, None] + WIDTH - 1) * dim + channel[None, :]
        tl.store(dinitial + at, gradient, mask=(t < 0)[:, None] & inside[None, :])


def _grid(steps: int, batch: int, dim: int) -> tuple[int, int, int]:
    return -(-steps // BLOCK_T), -(-dim // BLOCK_D), batch


def _constants(x: Tensor, width: int) -> dict[str, object]:
    acc = tl.float64 if compute_dtype(x) == torch.float64 else tl.float32
    return {"WIDTH": width, "ACC": acc, "BLOCK_T": BLOCK_T, "BLOCK_D": BLOCK_D}


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lengths, initial):
        batch, length, dim = x.shape
        y = x.new_empty(x.shape)
        launch(
            _forward, _grid(length, batch, dim), *strided(x), initial, weight, bias, lengths, y, length, dim,
            on=x, **_constants(x, weight.shape[1]),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, lengths, initial)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, lengths, initial = ctx.saved_tensors
        batch, length, dim = x.shape
        width = weight.shape[1]
        grid = _grid(length + width - 1, batch, dim)
        dx, dinitial = x.new_empty(x.shape), None if initial is None else torch.empty_like(initial)
        dweight = x.new_empty(batch, grid[0], dim, width, dtype=compute_dtype(x))
        dbias = None if bias is None else x.new_empty(batch, grid[0], dim, dtype=compute_dtype(x))
        launch(
            _backward, grid, *strided(x), initial, weight, bias, lengths, *strided(rows(dy)), dx, dinitial,
            dweight, dbias, length, dim, on=x, **_constants(x, width),
        )  # fmt: skip
        return dx, sum_partial(dweight, (0, 1), weight), sum_partial(dbias, (0, 1), bias), None, dinitial


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `cobra.ops.causal_conv1d`."""
    if lengths is not None:
        lengths = lengths.to(x.device, torch.int64).clamp(0, x.shape[1])
    bias = None if bias is None else bias.contiguous()
    initial = None if initial_state is None else initial_state.to(x.dtype)
    contiguous = None if initial is None else initial.contiguous()
    y = _CausalConv1d.apply(rows(x), weight.contiguous(), bias, lengths, contiguous)
    return y, last_inputs(x, weight.shape[1], lengths, initial)


def causal_conv1d_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `cobra.ops.causal_conv1d_update`: a sequence of one step."""
    y, new_state = causal_conv1d(x[:, None], weight, bias, initial_state=state)
    return y[:, 0], new_state
