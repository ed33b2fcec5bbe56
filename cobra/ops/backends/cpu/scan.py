"""Selective scan, forward and backward.

One work item is one row of the batch and one block of `LANES` channels. Time is cut into chunks of `CHUNK` steps
whose inputs are prepared once (`_prepare`) and then read for every state index, with that index's state in registers.
The forward pass keeps the state at chunk borders only; the backward pass rebuilds a chunk from there, then walks it in
reverse. So memory for states is length / CHUNK, and each exponential is computed once per pass.
"""
# Numba's intrinsics take one argument less than their definitions show.
# pyright: reportCallIssue=false

from numba import njit
from torch import Tensor

from .._operators import scan_functions
from .._shared import rows
from .compiled import kernel
from .layout import flat, flat_lengths, flat_mask, strided, sum_partial
from .threads import run
from .vector import (
    LANES,
    LOG2_E,
    exp2,
    load,
    load_some,
    sigmoid,
    softplus,
    store,
    store_some,
    total,
    work_array,
    zeros,
)

CHUNK = 32


@njit(forceinline=True)
def _load_states(array, at, dim, state, width, scale, out):
    """Write `scale` times the [state, width] piece that begins at `at` as [state, LANES]; unused lanes are zero."""
    for n in range(state):
        store(out, n * LANES, load_some(array, at + n * dim, width) * scale)


@njit(forceinline=True)
def _step_size(raw, bias, use_softplus):
    shifted = raw + bias
    return softplus(shifted) if use_softplus else shifted


@kernel
def _forward(
    start, stop, batch, length, dim, state, lengths, resets, use_softplus,
    u, u_row, u_step, delta, delta_row, delta_step, z, z_row, z_step,
    B, B_row, B_step, C, C_row, C_step, A, D, bias, initial, y, final, borders,
):  # fmt: skip
    matrix = work_array(state * LANES, u)
    h_all = work_array(state * LANES, u)
    dts = work_array(CHUNK * LANES, u)
    xs = work_array(CHUNK * LANES, u)
    ys = work_array(CHUNK * LANES, u)
    num_chunks = (length + CHUNK - 1) // CHUNK
    loaded = -1
    for item in range(start, stop):
        block, row = item // batch, item % batch
        channel = block * LANES
        width = min(LANES, dim - channel)
        if block != loaded:
            _load_states(A, channel, dim, state, width, LOG2_E, matrix)
            loaded = block
        bias_vector = load_some(bias, channel, width) if bias.size else zeros(u)
        D_vector = load_some(D, channel, width) if D.size else zeros(u)
        h_all[:] = 0.0
        if initial.size:
            _load_states(initial, row * state * dim + channel, dim, state, width, 1.0, h_all)
        for begin in range(0, lengths[row], CHUNK):
            steps = min(CHUNK, lengths[row] - begin)
            if borders.size:
                border = ((row * num_chunks + begin // CHUNK) * state) * dim + channel
                for n in range(state):
                    store_some(borders, border + n * dim, width, load(h_all, n * LANES))
            for t in range(steps):
                raw = load_some(delta, row * delta_row + (begin + t) * delta_step + channel, width)
                dt = _step_size(raw, bias_vector, use_softplus)
                u_vector = load_some(u, row * u_row + (begin + t) * u_step + channel, width)
                store(dts, t * LANES, dt)
                store(xs, t * LANES, dt * u_vector)
                store(ys, t * LANES, D_vector * u_vector)
            for n in range(state):
                A_vector = load(matrix, n * LANES)
                h = load(h_all, n * LANES)
                B_at = row * B_row + begin * B_step + n
                C_at = row * C_row + begin * C_step + n
                for t in range(steps):
                    if resets.size and resets[row * length + begin + t]:
                        h = zeros(u)
                    h = exp2(load(dts, t * LANES) * A_vector) * h + load(xs, t * LANES) * B[B_at + t * B_step]
                    store(ys, t * LANES, load(ys, t * LANES) + h * C[C_at + t * C_step])
                store(h_all, n * LANES, h)
            for t in range(steps):
                y_vector = load(ys, t * LANES)
                if z.size:
                    gate = load_some(z, row * z_row + (begin + t) * z_step + channel, width)
                    y_vector = y_vector * (gate * sigmoid(gate))
                store_some(y, (row * length + begin + t) * dim + channel, width, y_vector)
        for t in range(lengths[row], length):
            store_some(y, (row * length + t) * dim + channel, width, zeros(u))
        for n in range(state):
            store_some(final, (row * state + n) * dim + channel, width, load(h_all, n * LANES))


@kernel
def _backward(
    start, stop, batch, length, dim, state, lengths, resets, use_softplus,
    u, u_row, u_step, delta, delta_row, delta_step, z, z_row, z_step,
    B, B_row, B_step, C, C_row, C_step, A, D, bias, borders,
    dy, dy_row, dy_step, dfinal,
    du, ddelta, dz, dB, dC, dA, dD, dbias, dinitial,
):  # fmt: skip
    matrix = work_array(state * LANES, u)
    dh_all = work_array(state * LANES, u)
    dA_all = work_array(state * LANES, u)
    dts = work_array(CHUNK * LANES, u)
    xs = work_array(CHUNK * LANES, u)
    ys = work_array(CHUNK * LANES, u)
    dys = work_array(CHUNK * LANES, u)
    ddts = work_array(CHUNK * LANES, u)
    dxs = work_array(CHUNK * LANES, u)
    decays = work_array(CHUNK * LANES, u)
    hs = work_array((CHUNK + 1) * LANES, u)
    num_chunks = (length + CHUNK - 1) // CHUNK
    num_blocks = (dim + LANES - 1) // LANES
    loaded = -1
    for item in range(start, stop):
        block, row = item // batch, item % batch
        channel = block * LANES
        width = min(LANES, dim - channel)
        if block != loaded:
            _load_states(A, channel, dim, state, width, 1.0, matrix)
            loaded = block
        bias_vector = load_some(bias, channel, width) if bias.size else zeros(u)
        D_vector = load_some(D, channel, width) if D.size else zeros(u)
        dbias_vector = zeros(u)
        dD_vector = zeros(u)
        dA_all[:] = 0.0
        dh_all[:] = 0.0
        if dfinal.size:
            _load_states(dfinal, row * state * dim + channel, dim, state, width, 1.0, dh_all)
        last_chunk = (lengths[row] + CHUNK - 1) // CHUNK - 1
        for chunk in range(last_chunk, -1, -1):
            begin = chunk * CHUNK
            steps = min(CHUNK, lengths[row] - begin)
            for t in range(steps):
                raw = load_some(delta, row * delta_row + (begin + t) * delta_step + channel, width)
                dt = _step_size(raw, bias_vector, use_softplus)
                u_vector = load_some(u, row * u_row + (begin + t) * u_step + channel, width)
                dy_vector = load_some(dy, row * dy_row + (begin + t) * dy_step + channel, width)
                if z.size:
                    gate = load_some(z, row * z_row + (begin + t) * z_step + channel, width)
                    dy_vector = dy_vector * (gate * sigmoid(gate))
                store(dts, t * LANES, dt)
                store(xs, t * LANES, dt * u_vector)
                store(ys, t * LANES, D_vector * u_vector)
                store(dys, t * LANES, dy_vector)
                store(ddts, t * LANES, zeros(u))
                store(dxs, t * LANES, zeros(u))
            for n in range(state):
                A_vector = load(matrix, n * LANES)
                A_scaled = A_vector * LOG2_E
                B_at = row * B_row + begin * B_step + n
                C_at = row * C_row + begin * C_step + n
                h = load_some(borders, ((row * num_chunks + chunk) * state + n) * dim + channel, width)
                store(hs, 0, h)
                for t in range(steps):
                    if resets.size and resets[row * length + begin + t]:
                        h = zeros(u)
                    decay = exp2(load(dts, t * LANES) * A_scaled)
                    h = decay * h + load(xs, t * LANES) * B[B_at + t * B_step]
                    store(decays, t * LANES, decay)
                    store(hs, (t + 1) * LANES, h)
                dh = load(dh_all, n * LANES)
                dA_vector = load(dA_all, n * LANES)
                out = ((row * num_blocks + block) * length + begin) * state + n
                for t in range(steps - 1, -1, -1):
                    dy_vector = load(dys, t * LANES)
                    h = load(hs, (t + 1) * LANES)
                    c = C[C_at + t * C_step]
                    dh = dh + dy_vector * c
                    dC[out + t * state] = total(dy_vector * h)
                    dB[out + t * state] = total(dh * load(xs, t * LANES))
                    if z.size:
                        store(ys, t * LANES, load(ys, t * LANES) + h * c)
                    store(dxs, t * LANES, load(dxs, t * LANES) + dh * B[B_at + t * B_step])
                    if resets.size and resets[row * length + begin + t]:
                        dh = zeros(u)
                        continue
                    dh = dh * load(decays, t * LANES)
                    through_decay = dh * load(hs, t * LANES)
                    store(ddts, t * LANES, load(ddts, t * LANES) + through_decay * A_vector)
                    dA_vector = dA_vector + through_decay * load(dts, t * LANES)
                store(dh_all, n * LANES, dh)
                store(dA_all, n * LANES, dA_vector)
            for t in range(steps):
                at = (row * length + begin + t) * dim + channel
                u_vector = load_some(u, row * u_row + (begin + t) * u_step + channel, width)
                dx = load(dxs, t * LANES)
                dy_vector = load(dys, t * LANES)
                store_some(du, at, width, dx * load(dts, t * LANES) + dy_vector * D_vector)
                dD_vector = dD_vector + dy_vector * u_vector
                ddt = load(ddts, t * LANES) + dx * u_vector
                if use_softplus:
                    raw = load_some(delta, row * delta_row + (begin + t) * delta_step + channel, width)
                    ddt = ddt * sigmoid(raw + bias_vector)
                dbias_vector = dbias_vector + ddt
                store_some(ddelta, at, width, ddt)
                if z.size:
                    gate = load_some(z, row * z_row + (begin + t) * z_step + channel, width)
                    gated = load_some(dy, row * dy_row + (begin + t) * dy_step + channel, width)
                    s = sigmoid(gate)
                    slope = s + s * gate * (1.0 - s)
                    store_some(dz, at, width, gated * load(ys, t * LANES) * slope)
        for t in range(lengths[row], length):
            at = (row * length + t) * dim + channel
            store_some(du, at, width, zeros(u))
            store_some(ddelta, at, width, zeros(u))
            if z.size:
                store_some(dz, at, width, zeros(u))
            out = ((row * num_blocks + block) * length + t) * state
            dB[out : out + state] = 0.0
            dC[out : out + state] = 0.0
        for n in range(state):
            at = (row * state + n) * dim + channel
            store_some(dA, at, width, load(dA_all, n * LANES))
            store_some(dinitial, at, width, load(dh_all, n * LANES))
        store_some(dD, row * dim + channel, width, dD_vector)
        store_some(dbias, row * dim + channel, width, dbias_vector)


def _arguments(u, delta, A, B, C, D, z, delta_bias, use_softplus, lengths, resets) -> tuple:
    """The arguments that both kernels share, in their order."""
    batch, length, dim = u.shape
    return (
        batch, length, dim, A.shape[0], flat_lengths(lengths, batch, length), flat_mask(resets), use_softplus,
        *strided(u, u), *strided(delta, u), *strided(z, u), *strided(B, u), *strided(C, u),
        flat(A, u), flat(D, u), flat(delta_bias, u),
    )  # fmt: skip


def _num_items(u: Tensor) -> int:
    return u.shape[0] * -(-u.shape[2] // LANES)


def _borders_shape(batch: int, length: int, dim: int, state: int) -> tuple[int, ...]:
    return batch, -(-length // CHUNK), state, dim


def _scan(u, delta, A, B, C, D, z, delta_bias, use_softplus, lengths, resets, initial, keep):
    """Outputs, final state and, for the backward pass, the states at the borders of chunks."""
    batch, length, dim = u.shape
    state = A.shape[0]
    y, final = u.new_empty(u.shape), u.new_empty(batch, state, dim)
    borders = u.new_empty(_borders_shape(batch, length, dim, state) if keep else (0,))
    run(
        _forward, _num_items(u), u.numel() * state,
        *_arguments(u, delta, A, B, C, D, z, delta_bias, use_softplus, lengths, resets),
        flat(initial, u), flat(y, u), flat(final, u), flat(borders, u),
    )  # fmt: skip
    return y, final, borders


def _scan_backward(gradients, saved, u, delta, A, B, C, D, z, delta_bias, use_softplus, lengths, resets, initial, keep):
    dy, dfinal, _ = gradients
    batch, length, dim = u.shape
    state = A.shape[0]
    dy = u.new_zeros(u.shape) if dy is None else rows(dy)
    dfinal = None if dfinal is None else dfinal.contiguous()
    du, ddelta = u.new_empty(u.shape), u.new_empty(u.shape)
    dz = None if z is None else u.new_empty(u.shape)
    blocks = -(-dim // LANES)
    dB, dC = u.new_empty(batch, blocks, length, state), u.new_empty(batch, blocks, length, state)
    dA, dinitial = u.new_empty(batch, state, dim), u.new_empty(batch, state, dim)
    dD, dbias = u.new_empty(batch, dim), u.new_empty(batch, dim)
    run(
        _backward, _num_items(u), u.numel() * state,
        *_arguments(u, delta, A, B, C, D, z, delta_bias, use_softplus, lengths, resets),
        flat(saved[0], u), *strided(dy, u), flat(dfinal, u),
        *(flat(out, u) for out in (du, ddelta, dz, dB, dC, dA, dD, dbias, dinitial)),
    )  # fmt: skip
    found = [du, ddelta, sum_partial(dA, 0), sum_partial(dB, 1), sum_partial(dC, 1)]
    if D is not None:
        found.append(sum_partial(dD, 0))
    if dz is not None:
        found.append(dz)
    if delta_bias is not None:
        found.append(sum_partial(dbias, 0))
    if initial is not None:
        found.append(dinitial)
    return found


selective_scan, selective_state_update = scan_functions("cpu", _scan, _scan_backward, _borders_shape, upcast=True)
