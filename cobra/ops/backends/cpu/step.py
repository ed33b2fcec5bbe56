"""One token through all blocks of a Mamba in one kernel: as fast as the weights can be read from memory.

Every block is four phases of a `team`:

    0  rows of the input projection for some channels, and their convolution
    1  rows of the projection to step size, B and C
    2  step size, recurrence, skip and gate for some channels
    3  rows of the output projection

A number is always computed by one thread in one order, so the result does not depend on the number of threads.
"""
# Numba's intrinsics take one argument less than their definitions show.
# pyright: reportCallIssue=false

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from numba.extending import register_jitable
from torch import Tensor

from cobra.ops.fused import BlockWeights
from cobra.ops.quantized import QuantizedWeight

from .compiled import kernel
from .matvec import MAX_ROWS, dot, most_rows, multiply, prepare, products, room_at, room_size
from .team import finish, new_counters, run_together, take, team_size, wait
from .vector import (
    LANES,
    LOG2_E,
    exp2,
    load,
    load_some,
    pointer,
    sigmoid,
    softplus,
    store,
    store_some,
    widen,
)
from .weights import ELEMENTS, FLOATS, addresses, elements, is_readable, weight_at

_SELECT_ROWS = 4  # per item of phase 1
_OUT_ROWS = 32  # per item of phase 3
_FLOAT32 = ELEMENTS[torch.float32]


@register_jitable
def _round_up(count):
    """To whole cache lines of float32."""
    return (count + 15) // 16 * 16


@njit
def _normalise(residual, weight, batch, width, eps, normed):
    for b in range(batch):
        at = b * width
        scale = np.float32(1.0 / math.sqrt(dot(residual, at, residual, at, width) / width + eps))
        for i in range(width):
            normed[at + i] = residual[at + i] * scale * widen(weight[i])


@njit
def _convolve(x, weight, bias, first, count, batch, inner, taps, old, old_row, old_step, new, matrix):
    """Replace `count` channels of the newest inputs `x`, [batch, inner], by the convolution's outputs.

    matrix: room for [taps + 1, LANES].
    """
    for lane in range(count):
        for k in range(taps):
            matrix[k * LANES + lane] = widen(weight[(first + lane) * taps + k])
        matrix[taps * LANES + lane] = widen(bias[first + lane])
    for b in range(batch):
        newest = load_some(x, b * inner + first, count)
        before = load(matrix, taps * LANES) + load(matrix, (taps - 1) * LANES) * newest
        for k in range(taps - 1):
            value = load_some(old, b * old_row + k * old_step + first, count)
            before = before + load(matrix, k * LANES) * value
            if k > 0:
                store_some(new, (b * (taps - 1) + k - 1) * inner + first, count, value)
        if taps > 1:
            store_some(new, (b * (taps - 1) + taps - 2) * inner + first, count, newest)
        store_some(x, b * inner + first, count, before * sigmoid(before))


@njit
def _recur(
    x, z, selected, first, count, batch, inner, state, rank, dt_proj, dt_bias, A_log, D,
    old, old_row, old_channel, old_state, new, y, matrix, low, steps,
):  # fmt: skip
    """Phase 2 for channels [first, first + count): from x, z [batch, inner] and selected [batch, rank + 2 state].

    matrix, steps: room for [state, LANES] and [batch, LANES]. low: room for LANES numbers, so that reading the last
    numbers of a short row is fast, and for [batch, rank].
    """
    for b in range(batch):
        for r in range(rank):
            low[LANES + b * rank + r] = selected[b * (rank + 2 * state) + r]
    products(dt_proj, first, first + count, low, LANES, batch, rank, steps, 0, LANES)
    for lane in range(count):
        for n in range(state):
            matrix[n * LANES + lane] = A_log[(first + lane) * state + n]
    for n in range(state):
        store(matrix, n * LANES, exp2(load(matrix, n * LANES) * LOG2_E) * -LOG2_E)
    for b in range(batch):
        dt = softplus(load(steps, b * LANES) + load_some(dt_bias, first, count))
        u = load_some(x, b * inner + first, count)
        du = dt * u
        y_vector = load_some(D, first, count) * u
        for n in range(state):
            at = b * old_row + first * old_channel + n * old_state
            if old_channel == 1:
                h = load_some(old, at, count)
            else:
                for lane in range(count):
                    steps[b * LANES + lane] = old[at + lane * old_channel]
                h = load(steps, b * LANES)
            B = selected[b * (rank + 2 * state) + rank + n]
            h = exp2(dt * load(matrix, n * LANES)) * h + du * B
            y_vector = y_vector + h * selected[b * (rank + 2 * state) + rank + state + n]
            store_some(new, (b * state + n) * inner + first, count, h)
        gate = load_some(z, b * inner + first, count)
        store_some(y, b * inner + first, count, y_vector * (gate * sigmoid(gate)))


@kernel
def _stack(
    thread, counters, table, work, large_like, select_like, step_like, small_like, float_like,
    num_layers, batch, width, inner, state, rank, taps, eps, residual_address, conv_address, ssm_address, all_rows,
):  # fmt: skip
    """New states are [num_layers, all_rows, ...]: the addresses are those of this batch's first row."""
    chosen = rank + 2 * state
    address = np.int64(work.ctypes.data)
    hidden = pointer(address, float_like)  # [num_layers + 1, batch, width]
    address += 4 * _round_up((num_layers + 1) * batch * width)
    x = pointer(address, float_like)
    z = pointer(address + 4 * _round_up(batch * inner), float_like)
    y = pointer(address + 8 * _round_up(batch * inner), float_like)
    selected = pointer(address + 12 * _round_up(batch * inner), float_like)
    address += 12 * _round_up(batch * inner) + 4 * _round_up(batch * chosen)
    address += 4 * thread * _own_size(batch, width, inner, state, rank, taps)
    residual = pointer(address, float_like)
    normed = pointer(address + 4 * _round_up(batch * width), float_like)
    address += 8 * _round_up(batch * width)
    matrix = pointer(address, float_like)
    steps = pointer(address + 4 * max(state, taps + 1) * LANES, float_like)
    address += 4 * (max(state, taps + 1) + batch) * LANES
    low = pointer(address, float_like)
    room = room_at(address + 4 * LANES + 4 * _round_up(batch * rank), batch, max(width, inner))

    for i in range(batch * width):
        residual[i] = 0.0
    for layer in range(num_layers):
        for i in range(batch * width):
            residual[i] += hidden[layer * batch * width + i]

        phase = 4 * layer
        items = (inner + LANES - 1) // LANES
        item = take(counters, phase)
        if item < items:
            weight = weight_at(table[layer, 1], table[layer, 17], large_like)
            _normalise(residual, pointer(table[layer, 0], small_like), batch, width, eps, normed)
            prepare(weight, normed, batch, width, room)
            if item == 0 and layer == num_layers - 1:
                out = pointer(residual_address, float_like)
                for i in range(batch * width):
                    out[i] = residual[i]
        while item < items:
            first = item * LANES
            last = min(first + LANES, inner)
            weight = weight_at(table[layer, 1], table[layer, 17], large_like)
            multiply(weight, first, last, normed, room, batch, width, x, first, inner)
            multiply(weight, inner + first, inner + last, normed, room, batch, width, z, first, inner)
            _convolve(
                x, pointer(table[layer, 2], small_like), pointer(table[layer, 3], small_like),
                first, last - first, batch, inner, taps,
                pointer(table[layer, 10], float_like), table[layer, 11], table[layer, 12],
                pointer(conv_address + 4 * layer * all_rows * (taps - 1) * inner, float_like), matrix,
            )  # fmt: skip
            finish(counters, phase)
            item = take(counters, phase)
        wait(counters, phase, items)

        phase += 1
        items = (chosen + _SELECT_ROWS - 1) // _SELECT_ROWS
        item = take(counters, phase)
        if item < items:
            prepare(weight_at(table[layer, 4], table[layer, 18], select_like), x, batch, inner, room)
        while item < items:
            first = item * _SELECT_ROWS
            last = min(first + _SELECT_ROWS, chosen)
            weight = weight_at(table[layer, 4], table[layer, 18], select_like)
            multiply(weight, first, last, x, room, batch, inner, selected, first, chosen)
            finish(counters, phase)
            item = take(counters, phase)
        wait(counters, phase, items)

        phase += 1
        items = (inner + LANES - 1) // LANES
        item = take(counters, phase)
        while item < items:
            first = item * LANES
            _recur(
                x, z, selected, first, min(LANES, inner - first), batch, inner, state, rank,
                pointer(table[layer, 5], step_like), pointer(table[layer, 6], float_like),
                pointer(table[layer, 7], float_like), pointer(table[layer, 8], float_like),
                pointer(table[layer, 13], float_like), table[layer, 14], table[layer, 15], table[layer, 16],
                pointer(ssm_address + 4 * layer * all_rows * state * inner, float_like), y, matrix, low, steps,
            )  # fmt: skip
            finish(counters, phase)
            item = take(counters, phase)
        wait(counters, phase, items)

        phase += 1
        items = (width + _OUT_ROWS - 1) // _OUT_ROWS
        item = take(counters, phase)
        if item < items:
            prepare(weight_at(table[layer, 9], table[layer, 19], large_like), y, batch, inner, room)
        while item < items:
            first = item * _OUT_ROWS
            last = min(first + _OUT_ROWS, width)
            at = (layer + 1) * batch * width + first
            weight = weight_at(table[layer, 9], table[layer, 19], large_like)
            multiply(weight, first, last, y, room, batch, inner, hidden, at, width)
            finish(counters, phase)
            item = take(counters, phase)
        wait(counters, phase, items)


@register_jitable
def _own_size(batch, width, inner, state, rank, taps):
    """Work memory of one thread, in numbers."""
    size = 2 * _round_up(batch * width) + (max(state, taps + 1) + batch + 1) * LANES + _round_up(batch * rank)
    return size + room_size(batch, max(width, inner)) // 4


def _kind(weight: Tensor | QuantizedWeight) -> torch.dtype | int:
    return weight.bits if isinstance(weight, QuantizedWeight) else weight.dtype


def _fits(layers: Sequence[BlockWeights], hidden: Tensor, conv: Sequence[Tensor], ssm: Sequence[Tensor]) -> bool:
    """Whether every tensor is where, what and as large as the kernel expects."""
    if hidden.dim() != 2 or not 0 < len(layers) == len(conv) == len(ssm):
        return False
    if not 1 <= hidden.shape[0] <= most_rows(layers[0].in_proj):
        return False
    batch, width = hidden.shape
    (inner, state), rank, taps = layers[0].A_log.shape, layers[0].dt_proj.shape[1], layers[0].conv_weight.shape[-1]
    large, select, small, single = (
        _kind(layers[0].in_proj),
        _kind(layers[0].x_proj),
        layers[0].norm.dtype,
        torch.float32,
    )
    step = layers[0].dt_proj.dtype
    expected = [
        (small, (width,)), (large, (2 * inner, width)), (small, tuple(layers[0].conv_weight.shape)),
        (small, (inner,)), (select, (rank + 2 * state, inner)), (step, (inner, rank)), (single, (inner,)),
        (single, (inner, state)), (single, (inner,)), (large, (width, inner)),
    ]  # fmt: skip
    return (
        (large == select == step or (isinstance(large, int) and isinstance(select, int)))
        and expected[2][1] in ((inner, taps), (inner, 1, taps))
        and all([(_kind(t), t.shape) for t in layer] == expected and all(map(is_readable, layer)) for layer in layers)
        and all(t.dtype in FLOATS and t.is_cpu and t.shape == (batch, taps - 1, inner) for t in conv)
        and all(t.dtype == single and t.is_cpu and t.shape == (batch, inner, state) for t in ssm)
    )


def stack_step(
    layers: Sequence[BlockWeights],
    hidden: Tensor,
    conv_states: Sequence[Tensor],
    ssm_states: Sequence[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]] | None:
    """See `cobra.ops.fused.stack_step`.

    Taken are float32 and bfloat16, up to `most_rows` rows, weights that are contiguous plain tensors or made of such.
    None, without a result, for anything else, sizes that disagree included.
    """
    if hidden.dtype not in FLOATS or not hidden.is_cpu:
        return None
    if not _fits(layers, hidden, conv_states, ssm_states):
        return None
    (batch, width), num_layers = hidden.shape, len(layers)
    (inner, state), taps = layers[0].A_log.shape, layers[0].conv_weight.shape[-1]
    conv_states = [t if t.dtype == torch.float32 and t.stride(2) == 1 else t.float().contiguous() for t in conv_states]
    last, residual = torch.empty(2, batch, width)
    new_conv = torch.empty(num_layers, batch, taps - 1, inner)
    new_ssm = torch.empty(num_layers, batch, state, inner)  # read and written fastest in this order
    for first in range(0, batch, MAX_ROWS):
        rows = slice(first, first + MAX_ROWS)
        _step_rows(
            layers, hidden[rows], [t[rows] for t in conv_states], [t[rows] for t in ssm_states], eps,
            last[rows], residual[rows], new_conv[:, rows], new_ssm[:, rows],
        )  # fmt: skip
    return last, residual, list(new_conv.unbind()), list(new_ssm.transpose(2, 3).unbind())


def _step_rows(
    layers: Sequence[BlockWeights], hidden: Tensor, conv_states: Sequence[Tensor], ssm_states: Sequence[Tensor],
    eps: float, last: Tensor, residual: Tensor, new_conv: Tensor, new_ssm: Tensor,
) -> None:  # fmt: skip
    """Run the kernel for at most `MAX_ROWS` rows, and write to the last four: the same rows of what they are part of.

    new_conv: [num_layers, batch, taps - 1, inner]. new_ssm: [num_layers, batch, state, inner].
    """
    (batch, width), num_layers = hidden.shape, len(layers)
    (inner, state), rank, taps = layers[0].A_log.shape, layers[0].dt_proj.shape[1], layers[0].conv_weight.shape[-1]
    table = np.array(
        [
            [
                *(addresses(t)[0] for t in layer),
                conv.data_ptr(),
                *conv.stride()[:2],
                ssm.data_ptr(),
                *ssm.stride(),
                *(addresses(t)[1] for t in (layer.in_proj, layer.x_proj, layer.out_proj)),
            ]
            for layer, conv, ssm in zip(layers, conv_states, ssm_states, strict=True)
        ],
        np.int64,
    )
    threads = team_size(3 * num_layers * width * inner)
    sizes = [(num_layers + 1) * batch * width, *[batch * inner] * 3, batch * (rank + 2 * state)]
    own = _own_size(batch, width, inner, state, rank, taps)
    work = torch.empty(sum(map(_round_up, sizes)) + threads * own)
    work[: batch * width].view(batch, width).copy_(hidden)
    run_together(
        _stack, threads, new_counters(4 * num_layers), table, work.numpy(),
        *map(elements, (layers[0].in_proj, layers[0].x_proj, layers[0].dt_proj, layers[0].norm)), _FLOAT32,
        num_layers, batch, width, inner, state, rank, taps, eps,
        residual.data_ptr(), new_conv.data_ptr(), new_ssm.data_ptr(), new_ssm.stride(0) // (state * inner),
    )  # fmt: skip
    last.copy_(work[num_layers * batch * width :][: batch * width].view(batch, width))
