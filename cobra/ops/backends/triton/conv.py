"""Causal depthwise convolution with SiLU, forward and backward; the one-token update is a sequence of length one.

A program computes a [BLOCK_T, BLOCK_D] tile of steps and channels. Shifted inputs are read again and come from the L1
cache. The backward pass recomputes the value before the SiLU wherever an input reaches, rather than storing it.

Bytes that must move per element, 2-byte dtypes: forward 2 + 2, backward 4 + 2 and 8 (width + 1) / BLOCK_T for partial
sums; packed rows read 8 more per step and block of channels. FLOPs: 2 width + 5 forward, about 2 width^2 + 20 backward.
Bound by memory. Speed on a GPU has not been measured yet.

Loops over taps stay loops: unrolled, the backward pass of 16 taps took minutes to compile.
"""
# Triton compiles loops that pyright takes for Python's.
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._operators import conv_function
from .._shared import compute_dtype, rows
from .functions import load, load_vector, place, row_end, sigmoid, silu_slope
from .launch import launch, strided, sum_partial

BLOCK_T, BLOCK_D = 16, 64  # with 32 steps the backward pass spills registers on sm_90


@triton.jit
def _first_seen(firsts, t, end, WIDTH: tl.constexpr):
    """[BLOCK_T]: the first step that the outputs at t may see; with `firsts` None all that a filter reaches."""
    if firsts is None:
        return tl.full([t.shape[0]], -WIDTH, tl.int64)
    else:  # noqa: RET505  Triton decides this at compile time and needs both branches
        return tl.load(firsts + t, mask=(t >= 0) & (t < end), other=0)


@triton.jit
def _input(x, x_step, initial, t, first, end, channel, inside, dim, WIDTH: tl.constexpr, acc: tl.constexpr):
    """[BLOCK_T, BLOCK_D] inputs at steps t of a row, which may lie before it; zero before `first`, from `end` on."""
    seen = (t >= first) & (t < end)
    value = load(x + t[:, None] * x_step + channel[None, :], (seen & (t >= 0))[:, None] & inside[None, :], acc)
    if initial is not None:
        mask = (seen & (t < 0) & (t > -WIDTH))[:, None] & inside[None, :]
        value += load(initial + (t[:, None] + WIDTH - 1) * dim + channel[None, :], mask, acc)
    return value


@triton.jit
def _before_silu(
    x, x_step, initial, weight, bias, t, first, end, channel, inside, dim, WIDTH: tl.constexpr, acc: tl.constexpr
):
    value = tl.zeros([t.shape[0], channel.shape[0]], acc) + load_vector(bias, channel, dim, acc)[None, :]
    for k in range(0, WIDTH):
        tap = load(weight + k * dim + channel, inside, acc)
        at = t - (WIDTH - 1) + k
        value += tap[None, :] * _input(x, x_step, initial, at, first, end, channel, inside, dim, WIDTH, acc)
    return value


@triton.jit
def _forward(
    x, x_row, x_step, initial, weight, bias, lengths, firsts, y, length, dim,
    WIDTH: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, piece, _, channel = place(tl.cdiv(length, BLOCK_T), dim, BLOCK_D)
    t = piece * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = channel < dim
    end = row_end(lengths, row, length)
    if initial is not None:
        initial += row * (WIDTH - 1) * dim
    if firsts is not None:
        firsts += row * length
    first = _first_seen(firsts, t, end, WIDTH)
    value = _before_silu(
        x + row * x_row, x_step, initial, weight, bias, t, first, end, channel, inside, dim, WIDTH, ACC
    )
    value = tl.where((t < end)[:, None], value * sigmoid(value), 0.0)
    at = (row * length + t[:, None]) * dim + channel[None, :]
    tl.store(y + at, value, mask=(t < length)[:, None] & inside[None, :])


@triton.jit
def _backward(
    x, x_row, x_step, initial, weight, bias, lengths, firsts, dy, dy_row, dy_step, dx, dinitial, dweight, dbias,
    length, dim, WIDTH: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pieces = tl.cdiv(length + WIDTH - 1, BLOCK_T)
    row, piece, _, channel = place(pieces, dim, BLOCK_D)
    # The first tile begins with the inputs of the initial state, which get gradients like any other.
    t = piece * BLOCK_T + tl.arange(0, BLOCK_T) - (WIDTH - 1)
    inside = channel < dim
    end = row_end(lengths, row, length)
    if initial is not None:
        initial += row * (WIDTH - 1) * dim
    if firsts is not None:
        firsts += row * length
    x += row * x_row
    gradient = tl.zeros([BLOCK_T, BLOCK_D], ACC)  # of the inputs at t
    partial = row * pieces + piece
    for j in range(0, WIDTH):
        # gradient before the SiLU at step t + j, which the input at t reaches through tap WIDTH - 1 - j
        first = _first_seen(firsts, t + j, end, WIDTH)
        value = _before_silu(x, x_step, initial, weight, bias, t + j, first, end, channel, inside, dim, WIDTH, ACC)
        mask = ((t + j >= 0) & (t + j < end))[:, None] & inside[None, :]
        g = load(dy + row * dy_row + (t[:, None] + j) * dy_step + channel[None, :], mask, ACC)
        g = tl.where(mask, g * silu_slope(value, sigmoid(value)), 0.0)
        if j == 0:
            for k in range(0, WIDTH):
                source = _input(x, x_step, initial, t - (WIDTH - 1) + k, first, end, channel, inside, dim, WIDTH, ACC)
                tl.store(dweight + (partial * WIDTH + k) * dim + channel, tl.sum(g * source, 0), mask=inside)
            if dbias is not None:
                tl.store(dbias + partial * dim + channel, tl.sum(g, 0), mask=inside)
        if firsts is not None:
            g = tl.where((t >= first)[:, None], g, 0.0)
        gradient += g * load(weight + (WIDTH - 1 - j) * dim + channel, inside, ACC)[None, :]
    at = (row * length + t[:, None]) * dim + channel[None, :]
    tl.store(dx + at, gradient, mask=((t >= 0) & (t < length))[:, None] & inside[None, :])
    if dinitial is not None:
        at = (row * (WIDTH - 1) + t[:, None] + WIDTH - 1) * dim + channel[None, :]
        tl.store(dinitial + at, gradient, mask=(t < 0)[:, None] & inside[None, :])


def _constants(x: Tensor, weight: Tensor) -> dict[str, object]:
    acc = tl.float64 if compute_dtype(x) == torch.float64 else tl.float32
    return {"WIDTH": weight.shape[0], "ACC": acc, "BLOCK_T": BLOCK_T, "BLOCK_D": BLOCK_D}


def _convolve(x, weight, bias, lengths, firsts, initial):
    batch, length, dim = x.shape
    y = x.new_empty(x.shape)
    launch(
        _forward, batch * -(-length // BLOCK_T) * -(-dim // BLOCK_D),
        *strided(x), initial, weight, bias, lengths, firsts, y, length, dim, on=x, **_constants(x, weight),
    )  # fmt: skip
    return y


def _convolve_backward(gradients, saved, x, weight, bias, lengths, firsts, initial):
    batch, length, dim = x.shape
    width = weight.shape[0]
    pieces = batch * -(-(length + width - 1) // BLOCK_T)
    dx, dinitial = x.new_empty(x.shape), None if initial is None else initial.new_empty(initial.shape)
    dweight = x.new_empty(pieces, width, dim, dtype=compute_dtype(x))
    dbias = None if bias is None else x.new_empty(pieces, dim, dtype=compute_dtype(x))
    launch(
        _backward, pieces * -(-dim // BLOCK_D), *strided(x), initial, weight, bias, lengths, firsts,
        *strided(rows(gradients[0])), dx, dinitial, dweight, dbias, length, dim, on=x, **_constants(x, weight),
    )  # fmt: skip
    found = [dx, sum_partial(dweight, 0, weight), sum_partial(dbias, 0, bias), dinitial]
    return [gradient for gradient in found if gradient is not None]


causal_conv1d = conv_function("triton", _convolve, _convolve_backward, upcast=False)


def causal_conv1d_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `cobra.ops.causal_conv1d_update`: a sequence of one step."""
    y, new_state = causal_conv1d(x[:, None], weight, bias, initial_state=state)
    return y[:, 0], new_state
