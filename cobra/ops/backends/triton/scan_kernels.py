"""The kernels of the selective scan; `scan.py` says how they fit together.

All of them: one program has one row, one block of channels and one chunk of steps, walks the chunk step by step and
holds state-like values as [N, BLOCK_D] tiles: channels across the lanes of a warp, all N states of a channel in one
lane's registers, so that sums over the state need no exchange between lanes. N is the state size as a power of two;
what is added is zero in A, B, C and h and stays zero. Time indices are int64: offsets of long sequences pass 2^31.

Tensors named without strides are contiguous: A and initial states [..., state, dim], states and starts [batch, chunks,
state, dim], sums [batch, chunks, dim], resets [batch, length].
"""
# Triton compiles loops and constants that pyright takes for Python's.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from .functions import load, load_tile, load_vector, place, row_end, sigmoid, silu_slope, softplus, store_tile


@triton.jit
def _work(lengths, length, dim, chunk, BLOCK_D: tl.constexpr):
    """This program's row, its chunk among those of all rows, first step and one past the last, block and channels."""
    chunks = tl.cdiv(length, chunk)
    row, piece, block, channel = place(chunks, dim, BLOCK_D)
    begin = piece * chunk
    return row, row * chunks + piece, begin, tl.minimum(begin + chunk, row_end(lengths, row, length)), block, channel


@triton.jit
def _step_size(raw, bias, SOFTPLUS: tl.constexpr):
    shifted = raw + bias
    return softplus(shifted) if SOFTPLUS else shifted


@triton.jit
def _advance(h, dt, a, u, b):
    """One step of the recurrence."""
    return tl.exp(dt[None, :] * a) * h + (dt * u)[None, :] * b[:, None]


@triton.jit
def _forget(tile, cuts, at, within):
    """A state, or its gradient: zero where `cuts` is true, by selection, since it may hold another text's NaN."""
    if cuts is None:
        return tile
    else:  # noqa: RET505  Triton decides this at compile time and needs both branches
        return tl.where(tl.load(cuts + at, mask=within, other=False), 0.0, tile)


@triton.jit
def chunk_states(
    u, u_row, u_step, delta, delta_row, delta_step, B, B_row, B_step, A, bias, lengths, resets,
    states, sums, length, dim, chunk,
    STATE: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Each chunk alone: the state that it leaves if it starts from zero, and the sum of its step sizes."""
    acc: tl.constexpr = states.dtype.element_ty
    row, at_chunk, begin, end, _, channel = _work(lengths, length, dim, chunk, BLOCK_D)
    n, inside = tl.arange(0, N), channel < dim
    a = load_tile(A, 0, n, STATE, channel, dim, acc)
    bias_vector = load_vector(bias, channel, dim, acc)
    u += row * u_row + channel
    delta += row * delta_row + channel
    B += row * B_row + n
    h = tl.zeros([N, BLOCK_D], acc)
    total = tl.zeros([BLOCK_D], acc)
    for t in range(begin, end):
        dt = _step_size(load(delta + t * delta_step, inside, acc), bias_vector, SOFTPLUS)
        h = _forget(h, resets, row * length + t, t < end)
        h = _advance(h, dt, a, load(u + t * u_step, inside, acc), load(B + t * B_step, n < STATE, acc))
        total += dt
    store_tile(states, at_chunk, h, n, STATE, channel, dim)
    tl.store(sums + at_chunk * dim + channel, total, mask=inside)


@triton.jit
def chunk_adjoints(
    delta, delta_row, delta_step, z, z_row, z_step, C, C_row, C_step, dy, dy_row, dy_step, A, bias, lengths, resets,
    states, sums, length, dim, chunk,
    STATE: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Each chunk alone: the gradient of the state before it if none comes from behind it, and its step sizes' sum."""
    acc: tl.constexpr = states.dtype.element_ty
    row, at_chunk, begin, end, _, channel = _work(lengths, length, dim, chunk, BLOCK_D)
    n, inside = tl.arange(0, N), channel < dim
    a = load_tile(A, 0, n, STATE, channel, dim, acc)
    bias_vector = load_vector(bias, channel, dim, acc)
    delta += row * delta_row + channel
    C += row * C_row + n
    dy += row * dy_row + channel
    if z is not None:
        z += row * z_row + channel
    dh = tl.zeros([N, BLOCK_D], acc)
    total = tl.zeros([BLOCK_D], acc)
    for i in range(0, end - begin):
        t = end - 1 - i
        dt = _step_size(load(delta + t * delta_step, inside, acc), bias_vector, SOFTPLUS)
        gradient = load(dy + t * dy_step, inside, acc)
        if z is not None:
            gate = load(z + t * z_step, inside, acc)
            gradient *= gate * sigmoid(gate)
        c = load(C + t * C_step, n < STATE, acc)
        dh = tl.exp(dt[None, :] * a) * (dh + gradient[None, :] * c[:, None])
        dh = _forget(dh, resets, row * length + t, t < end)
        total += dt
    store_tile(states, at_chunk, dh, n, STATE, channel, dim)
    tl.store(sums + at_chunk * dim + channel, total, mask=inside)


@triton.jit
def combine(
    states, sums, initial, A, cuts, chunks, dim,
    STATE: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn what each chunk leaves alone into what each chunk starts from, in place; backwards in time if REVERSE.

    The decay of a whole chunk is exp(A sum(dt)), because A is diagonal and does not change. `initial` is [batch, state,
    dim], or None for zeros. Through a chunk where `cuts`, [batch, chunks], is true nothing passes.
    """
    acc: tl.constexpr = states.dtype.element_ty
    row, _, _, channel = place(1, dim, BLOCK_D)
    n, inside = tl.arange(0, N), channel < dim
    a = load_tile(A, 0, n, STATE, channel, dim, acc)
    h = load_tile(initial, row, n, STATE, channel, dim, acc)
    for i in range(0, chunks):
        at = row * chunks + (chunks - 1 - i if REVERSE else i)
        alone = load_tile(states, at, n, STATE, channel, dim, acc)
        total = load(sums + at * dim + channel, inside, acc)
        store_tile(states, at, h, n, STATE, channel, dim)
        h = _forget(tl.exp(total[None, :] * a) * h, cuts, at, i < chunks) + alone


@triton.jit
def forward(
    u, u_row, u_step, delta, delta_row, delta_step, z, z_row, z_step, B, B_row, B_step, C, C_row, C_step,
    A, D, bias, lengths, resets, starts, y, final, length, dim, chunk,
    STATE: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Outputs of every chunk from its starting state; the last chunk writes the final state, [batch, state, dim]."""
    acc: tl.constexpr = final.dtype.element_ty
    row, at_chunk, begin, end, _, channel = _work(lengths, length, dim, chunk, BLOCK_D)
    n, inside = tl.arange(0, N), channel < dim
    a = load_tile(A, 0, n, STATE, channel, dim, acc)
    bias_vector = load_vector(bias, channel, dim, acc)
    skip = load_vector(D, channel, dim, acc)
    u += row * u_row + channel
    delta += row * delta_row + channel
    B += row * B_row + n
    C += row * C_row + n
    y += row * length * dim + channel
    if z is not None:
        z += row * z_row + channel
    h = load_tile(starts, at_chunk, n, STATE, channel, dim, acc)
    for t in range(begin, end):
        dt = _step_size(load(delta + t * delta_step, inside, acc), bias_vector, SOFTPLUS)
        u_t = load(u + t * u_step, inside, acc)
        h = _forget(h, resets, row * length + t, t < end)
        h = _advance(h, dt, a, u_t, load(B + t * B_step, n < STATE, acc))
        out = tl.sum(h * load(C + t * C_step, n < STATE, acc)[:, None], 0) + skip * u_t
        if z is not None:
            gate = load(z + t * z_step, inside, acc)
            out *= gate * sigmoid(gate)
        tl.store(y + t * dim, out, mask=inside)
    if begin + chunk >= length:
        store_tile(final, row, h, n, STATE, channel, dim)


@triton.jit
def backward(
    u, u_row, u_step, delta, delta_row, delta_step, z, z_row, z_step, B, B_row, B_step, C, C_row, C_step,
    dy, dy_row, dy_step, A, D, bias, lengths, resets, starts, ends, scratch,
    du, ddelta, dz, dB, dC, dA, dD, dbias, dinitial, length, dim, chunk,
    STATE: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, SOFTPLUS: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Gradients of every chunk, given its starting state and, in `ends`, the gradient of the state behind it.

    The states inside the chunk are computed again twice: once to note every SUB-th in `scratch`, [batch, length / SUB,
    state, dim], then SUB of them at a time, which stay in registers while the adjoint walks back over them.

    dB and dC are partial sums over one block of channels, [batch, blocks, length, state]; dA, dD and dbias are sums
    over one chunk, [batch, chunks, state, dim] and [batch, chunks, dim]. dinitial is [batch, state, dim].
    """
    acc: tl.constexpr = scratch.dtype.element_ty
    row, at_chunk, begin, end, block, channel = _work(lengths, length, dim, chunk, BLOCK_D)
    n, inside = tl.arange(0, N), channel < dim
    a = load_tile(A, 0, n, STATE, channel, dim, acc)
    bias_vector = load_vector(bias, channel, dim, acc)
    skip = load_vector(D, channel, dim, acc)
    u += row * u_row + channel
    delta += row * delta_row + channel
    B += row * B_row + n
    C += row * C_row + n
    dy += row * dy_row + channel
    du += row * length * dim + channel
    ddelta += row * length * dim + channel
    if z is not None:
        z += row * z_row + channel
        dz += row * length * dim + channel
    partial = (row * tl.cdiv(dim, BLOCK_D) + block) * length * STATE + n
    at_scratch = row * tl.cdiv(length, SUB)

    h = load_tile(starts, at_chunk, n, STATE, channel, dim, acc)
    for t in range(begin, end):
        if t % SUB == 0:
            store_tile(scratch, at_scratch + t // SUB, h, n, STATE, channel, dim)
        dt = _step_size(load(delta + t * delta_step, inside, acc), bias_vector, SOFTPLUS)
        h = _forget(h, resets, row * length + t, t < end)
        h = _advance(h, dt, a, load(u + t * u_step, inside, acc), load(B + t * B_step, n < STATE, acc))
    tl.debug_barrier()  # another thread of this program may read back what this one wrote

    dh = load_tile(ends, at_chunk, n, STATE, channel, dim, acc)
    dA_tile = tl.zeros([N, BLOCK_D], acc)
    dD_vector = tl.zeros([BLOCK_D], acc)
    dbias_vector = tl.zeros([BLOCK_D], acc)
    pieces = tl.cdiv(tl.maximum(end - begin, 0), SUB)
    for i in range(0, pieces):
        first = begin + (pieces - 1 - i) * SUB
        states = (load_tile(scratch, at_scratch + first // SUB, n, STATE, channel, dim, acc),)
        for k in tl.static_range(SUB):
            t = first + k
            # Behind the end no channel is live: everything loaded is zero, and so is the step, which changes nothing.
            live = channel < tl.where(t < end, dim, 0)
            live_n = n < tl.where(t < end, STATE, 0)
            dt = tl.where(live, _step_size(load(delta + t * delta_step, live, acc), bias_vector, SOFTPLUS), 0.0)
            h = _forget(states[k], resets, row * length + t, t < end)
            h = _advance(h, dt, a, load(u + t * u_step, live, acc), load(B + t * B_step, live_n, acc))
            states = states + (h,)  # noqa: RUF005
        for k in tl.static_range(SUB - 1, -1, -1):
            t = first + k
            live = channel < tl.where(t < end, dim, 0)
            live_n = n < tl.where(t < end, STATE, 0)
            raw = load(delta + t * delta_step, live, acc)
            dt = tl.where(live, _step_size(raw, bias_vector, SOFTPLUS), 0.0)
            u_t = load(u + t * u_step, live, acc)
            b = load(B + t * B_step, live_n, acc)
            c = load(C + t * C_step, live_n, acc)
            gradient = load(dy + t * dy_step, live, acc)
            if z is not None:
                gate = load(z + t * z_step, live, acc)
                s = sigmoid(gate)
                ungated = tl.sum(states[k + 1] * c[:, None], 0) + skip * u_t
                tl.store(dz + t * dim, gradient * ungated * silu_slope(gate, s), mask=live)
                gradient *= gate * s
            dh += gradient[None, :] * c[:, None]
            out = partial + t * STATE
            tl.store(dC + out, tl.sum(states[k + 1] * gradient[None, :], 1), mask=live_n)
            tl.store(dB + out, tl.sum(dh * (dt * u_t)[None, :], 1), mask=live_n)
            dx = tl.sum(dh * b[:, None], 0)
            dh *= tl.exp(dt[None, :] * a)
            through_decay = dh * _forget(states[k], resets, row * length + t, t < end)
            dh = _forget(dh, resets, row * length + t, t < end)
            dA_tile += through_decay * dt[None, :]
            ddt = tl.sum(through_decay * a, 0) + dx * u_t
            if SOFTPLUS:
                ddt *= sigmoid(raw + bias_vector)
            ddt = tl.where(live, ddt, 0.0)
            dbias_vector += ddt
            dD_vector += gradient * u_t
            tl.store(ddelta + t * dim, ddt, mask=live)
            tl.store(du + t * dim, dx * dt + gradient * skip, mask=live)
    store_tile(dA, at_chunk, dA_tile, n, STATE, channel, dim)
    if dD is not None:
        tl.store(dD + at_chunk * dim + channel, dD_vector, mask=inside)
    if dbias is not None:
        tl.store(dbias + at_chunk * dim + channel, dbias_vector, mask=inside)
    if dinitial is not None and begin == 0:
        store_tile(dinitial, row, dh, n, STATE, channel, dim)
