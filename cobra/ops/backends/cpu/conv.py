"""Causal depthwise convolution with SiLU, forward and backward.

One work item is one row of the batch and one piece of `PIECE` steps, all channels. The backward pass computes the
gradient before the SiLU once per block of channels, with the few steps after the piece that its inputs also reach.
"""
# Numba's intrinsics take one argument less than their definitions show.
# pyright: reportCallIssue=false

from numba import njit
from torch import Tensor

from .._operators import conv_function
from .._shared import rows
from .compiled import kernel
from .layout import flat, flat_lengths, flat_steps, strided, sum_partial
from .threads import run
from .vector import LANES, load, load_some, sigmoid, store, store_some, work_array, zeros

PIECE = 64


@njit(forceinline=True)
def _input(x, x_row, x_step, initial, row, t, first, width, dim, channel, count):
    """The input at step t, which may lie before the row's first one; zero before `first`, where another text is."""
    if t < first:
        return zeros(x)
    if t >= 0:
        return load_some(x, row * x_row + t * x_step + channel, count)
    if initial.size:
        return load_some(initial, (row * (width - 1) + t + width - 1) * dim + channel, count)
    return zeros(x)


@njit(forceinline=True)
def _filter(weight, width, dim, channel, count, out):
    """Write the [width, dim] taps of a block as [width, LANES]."""
    for k in range(width):
        store(out, k * LANES, load_some(weight, k * dim + channel, count))


@kernel
def _forward(
    start, stop, length, dim, width, lengths, firsts, x, x_row, x_step, weight, bias, initial,
    y,
):  # fmt: skip
    taps = work_array(width * LANES, x)
    pieces = (length + PIECE - 1) // PIECE
    for item in range(start, stop):
        row, begin = item // pieces, item % pieces * PIECE
        end = min(begin + PIECE, length)
        valid_end = max(begin, min(end, lengths[row]))
        for channel in range(0, dim, LANES):
            count = min(LANES, dim - channel)
            _filter(weight, width, dim, channel, count, taps)
            bias_vector = load_some(bias, channel, count) if bias.size else zeros(x)
            for t in range(begin, valid_end):
                first = firsts[row * length + t] if firsts.size else -width
                before = bias_vector
                for k in range(width):
                    at = t - width + 1 + k
                    value = _input(x, x_row, x_step, initial, row, at, first, width, dim, channel, count)
                    before = before + load(taps, k * LANES) * value
                store_some(y, (row * length + t) * dim + channel, count, before * sigmoid(before))
            for t in range(valid_end, end):
                store_some(y, (row * length + t) * dim + channel, count, zeros(x))


@kernel
def _backward(
    start, stop, length, dim, width, lengths, firsts, x, x_row, x_step, weight, bias, initial,
    dy, dy_row, dy_step, dx, dweight, dbias, dinitial,
):  # fmt: skip
    taps = work_array(width * LANES, x)
    dbefore = work_array((PIECE + width - 1) * LANES, x)  # gradient before the SiLU, steps begin to end + width - 1
    pieces = (length + PIECE - 1) // PIECE
    for item in range(start, stop):
        row, begin = item // pieces, item % pieces * PIECE
        end = min(begin + PIECE, length)
        valid_end = max(begin, min(end, lengths[row]))
        for channel in range(0, dim, LANES):
            count = min(LANES, dim - channel)
            _filter(weight, width, dim, channel, count, taps)
            bias_vector = load_some(bias, channel, count) if bias.size else zeros(x)
            for t in range(begin, end + width - 1):
                gradient = zeros(x)
                if t < lengths[row]:
                    first = firsts[row * length + t] if firsts.size else -width
                    before = bias_vector
                    for k in range(width):
                        at = t - width + 1 + k
                        value = _input(x, x_row, x_step, initial, row, at, first, width, dim, channel, count)
                        before = before + load(taps, k * LANES) * value
                    s = sigmoid(before)
                    gradient = load_some(dy, row * dy_row + t * dy_step + channel, count)
                    gradient = gradient * (s + s * before * (1.0 - s))
                store(dbefore, (t - begin) * LANES, gradient)
            dbias_vector = zeros(x)
            for t in range(begin, valid_end):
                dbias_vector = dbias_vector + load(dbefore, (t - begin) * LANES)
            store_some(dbias, item * dim + channel, count, dbias_vector)
            for k in range(width):
                dtap = zeros(x)
                for t in range(begin, valid_end):
                    first = firsts[row * length + t] if firsts.size else -width
                    at = t - width + 1 + k
                    value = _input(x, x_row, x_step, initial, row, at, first, width, dim, channel, count)
                    dtap = dtap + load(dbefore, (t - begin) * LANES) * value
                store_some(dweight, (item * width + k) * dim + channel, count, dtap)
            for t in range(begin if begin else 1 - width, end):
                gradient = zeros(x)
                for k in range(width):
                    reached = t + width - 1 - k
                    if reached < begin or (firsts.size and reached < length and firsts[row * length + reached] > t):
                        continue
                    gradient = gradient + load(dbefore, (reached - begin) * LANES) * load(taps, k * LANES)
                if t >= 0:
                    store_some(dx, (row * length + t) * dim + channel, count, gradient)
                elif dinitial.size:
                    store_some(dinitial, (row * (width - 1) + t + width - 1) * dim + channel, count, gradient)


def _arguments(x, weight, bias, lengths, firsts, initial) -> tuple:
    """The arguments that both kernels share, in their order."""
    batch, length, dim = x.shape
    return (
        length, dim, weight.shape[0], flat_lengths(lengths, batch, length), flat_steps(firsts),
        *strided(x, x), flat(weight, x), flat(bias, x), flat(initial, x),
    )  # fmt: skip


def _num_items(x: Tensor) -> int:
    return x.shape[0] * -(-x.shape[1] // PIECE)


def _convolve(x, weight, bias, lengths, firsts, initial):
    y = x.new_empty(x.shape)
    run(_forward, _num_items(x), x.numel() * 4, *_arguments(x, weight, bias, lengths, firsts, initial), flat(y, x))
    return y


def _convolve_backward(gradients, saved, x, weight, bias, lengths, firsts, initial):
    dy = rows(gradients[0])
    items, (width, dim) = _num_items(x), weight.shape
    dx, dweight, dbias = x.new_empty(x.shape), x.new_empty(items, width, dim), x.new_empty(items, dim)
    dinitial = None if initial is None else x.new_empty(initial.shape)
    run(
        _backward, items, x.numel() * 8, *_arguments(x, weight, bias, lengths, firsts, initial),
        *strided(dy, x), flat(dx, x), flat(dweight, x), flat(dbias, x), flat(dinitial, x),
    )  # fmt: skip
    found = [dx, sum_partial(dweight, 0)]
    if bias is not None:
        found.append(sum_partial(dbias, 0))
    if dinitial is not None:
        found.append(dinitial)
    return found


causal_conv1d = conv_function("cpu", _convolve, _convolve_backward, upcast=True)
