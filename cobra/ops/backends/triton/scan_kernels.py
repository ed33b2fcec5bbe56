"""The kernels of the selective scan; `scan.py` says how they fit together.

All of them: one program has one row, one block of channels and one chunk of steps, walks the chunk step by step and
holds state-like values as [N, BLOCK_D] tiles: channels across the lanes of a warp, all N states of a channel in one
lane's registers, so that sums over the state need no exchange between lanes. N is the state size as a power of two;
what is added is zero in A, B, C and h and stays zero. Time indices are int64: offsets of long sequences pass 2^31.

Tensors named without strides are contiguous: states and starts [batch, chunks, state, dim], sums [batch, chunks, dim].
"""
# Triton compiles loops and constants that pyright takes for Python's.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from .functions import load_tile, sigmoid, silu_slope, softplus, store_tile


@triton.jit
def _step_size(raw, bias, SOFTPLUS: tl.constexpr):
    shifted = raw + bias
    return softplus(shifted) if SOFTPLUS else shifted


@triton.jit
def _range(lengths, row, length, chunk):
    """First step of this program's chunk, and one past its last; none if the row ends earlier."""
    begin = tl.program_id(0).to(tl.int64) * chunk
    end = begin * 0 + length
    if lengths is not None:
        end = tl.minimum(end, tl.load(lengths + row))
    return begin, tl.minimum(begin + chunk, end)


@triton.jit
def _vector(pointer, channel, inside, acc: tl.constexpr):
    """[BLOCK_D] values of an optional parameter; zeros if it is None."""
    if pointer is None:
        return tl.zeros([channel.shape[0]], acc)
    else:  # noqa: RET505  Triton decides this at compile time and needs both branches
        return tl.load(pointer + channel, mask=inside, other=0.0).to(acc)


@triton.jit
def chunk_states(
    u, u_row, u_step, delta, delta_row, delta_step, B, B_row, B_step, A, A_channel, A_state, bias, lengths,
    states, sums, length, dim, chunk,
    STATE: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Each chunk alone: the state that it leaves if it starts from zero, and the sum of its step sizes."""
    acc: tl.constexpr = states.dtype.element_ty
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < dim
    n = tl.arange(0, N)
    begin, end = _range(lengths, row, length, chunk)
    a = load_tile(A, n, A_state, STATE, channel, A_channel, dim).to(acc)
    bias_vector = _vector(bias, channel, inside, acc)
    u += row * u_row + channel
    delta += row * delta_row + channel
    B += row * B_row + n
    h = tl.zeros([N, BLOCK_D], acc)
    total = tl.zeros([BLOCK_D], acc)
    for t in range(begin, end):
        dt = _step_size(tl.load(delta + t * delta_step, mask=inside, other=0.0).to(acc), bias_vector, SOFTPLUS)
        x = dt * tl.load(u + t * u_step, mask=inside, other=0.0).to(acc)
        b = tl.load(B + t * B_step, mask=n < STATE, other=0.0).to(acc)
        h = tl.exp(dt[None, :] * a) * h + x[None, :] * b[:, None]
        total += dt
    at = row * tl.num_programs(0) + tl.program_id(0)
    store_tile(states + at * STATE * dim, h, n, STATE, channel, dim)
    tl.store(sums + at * dim + channel, total, mask=inside)


@triton.jit
def chunk_adjoints(
    delta, delta_row, delta_step, z, z_row, z_step, C, C_row, C_step, dy, dy_row, dy_step, A, A_channel, A_state,
    bias, lengths, states, sums, length, dim, chunk,
    STATE: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Each chunk alone: the gradient of the state before it if none comes from behind it, and its step sizes' sum."""
    acc: tl.constexpr = states.dtype.element_ty
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < dim
    n = tl.arange(0, N)
    begin, end = _range(lengths, row, length, chunk)
    a = load_tile(A, n, A_state, STATE, channel, A_channel, dim).to(acc)
    bias_vector = _vector(bias, channel, inside, acc)
    delta += row * delta_row + channel
    C += row * C_row + n
    dy += row * dy_row + channel
    if z is not None:
        z += row * z_row + channel
    dh = tl.zeros([N, BLOCK_D], acc)
    total = tl.zeros([BLOCK_D], acc)
    for i in range(0, end - begin):
        t = end - 1 - i
        dt = _step_size(tl.load(delta + t * delta_step, mask=inside, other=0.0).to(acc), bias_vector, SOFTPLUS)
        gradient = tl.load(dy + t * dy_step, mask=inside, other=0.0).to(acc)
        if z is not None:
            gate = tl.load(z + t * z_step, mask=inside, other=0.0).to(acc)
            gradient *= gate * sigmoid(gate)
        c = tl.load(C + t * C_step, mask=n < STATE, other=0.0).to(acc)
        dh = tl.exp(dt[None, :] * a) * (dh + gradient[None, :] * c[:, None])
        total += dt
    at = row * tl.num_programs(0) + tl.program_id(0)
    store_tile(states + at * STATE * dim, dh, n, STATE, channel, dim)
    tl.store(sums + at * dim + channel, total, mask=inside)


@triton.jit
def combine(
    states, sums, initial, A, A_channel, A_state, chunks, dim,
    STATE: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn what each chunk leaves alone into what each chunk starts from, in place; backwards in time if REVERSE.

    The decay of a whole chunk is exp(A sum(dt)), because A is diagonal and does not change. `initial` is contiguous,
    [batch, state, dim], or None for zeros.
    """
    acc: tl.constexpr = states.dtype.element_ty
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    a = load_tile(A, n, A_state, STATE, channel, A_channel, dim).to(acc)
    h = tl.zeros([N, BLOCK_D], acc)
    if initial is not None:
        h += load_tile(initial + row * STATE * dim, n, dim, STATE, channel, 1, dim)
    for i in range(0, chunks):
        at = row * chunks + (chunks - 1 - i if REVERSE else i)
        alone = load_tile(states + at * STATE * dim, n, dim, STATE, channel, 1, dim)
        total = tl.load(sums + at * dim + channel, mask=channel < dim, other=0.0)
        store_tile(states + at * STATE * dim, h, n, STATE, channel, dim)
        h = tl.exp(total[None, :] * a) * h + alone


@triton.jit
def forward(
    u, u_row, u_step, delta, delta_row, delta_step, z, z_row, z_step, B, B_row, B_step, C, C_row, C_step,
    A, A_channel, A_state, D, bias, lengths, starts, y, final, length, dim, chunk,
    STATE: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Outputs of every chunk from its starting state; the last chunk writes the final state, [batch, state, dim]."""
    acc: tl.constexpr = final.dtype.element_ty
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < dim
    n = tl.arange(0, N)
    begin, end = _range(lengths, row, length, chunk)
    a = load_tile(A, n, A_state, STATE, channel, A_channel, dim).to(acc)
    bias_vector = _vector(bias, channel, inside, acc)
    skip = _vector(D, channel, inside, acc)
    u += row * u_row + channel
    delta += row * delta_row + channel
    B += row * B_row + n
    C += row * C_row + n
    y += row * length * dim + channel
    if z is not None:
        z += row * z_row + channel
    h = tl.zeros([N, BLOCK_D], acc)
    if starts is not None:
        at = row * tl.num_programs(0) + tl.program_id(0)
        h += load_tile(starts + at * STATE * dim, n, dim, STATE, channel, 1, dim)
    for t in range(begin, end):
        dt = _step_size(tl.load(delta + t * delta_step, mask=inside, other=0.0).to(acc), bias_vector, SOFTPLUS)
        u_t = tl.load(u + t * u_step, mask=inside, other=0.0).to(acc)
        b = tl.load(B + t * B_step, mask=n < STATE, other=0.0).to(acc)
        c = tl.load(C + t * C_step, mask=n < STATE, other=0.0).to(acc)
        h = tl.exp(dt[None, :] * a) * h + (dt * u_t)[None, :] * b[:, None]
        out = tl.sum(h * c[:, None], 0) + skip * u_t
        if z is not None:
            gate = tl.load(z + t * z_step, mask=inside, other=0.0).to(acc)
            out *= gate * sigmoid(gate)
        tl.store(y + t * dim, out, mask=inside)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        store_tile(final + row * STATE * dim, h, n, STATE, channel, dim)


@triton.jit
def backward(
    u, u_row, u_step, delta, delta_row, delta_step, z, z_row, z_step, B, B_row, B_step, C, C_row, C_step,
    dy, dy_row, dy_step, A, A_channel, A_state, D, bias, lengths, starts, ends, scratch,
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
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < dim
    n = tl.arange(0, N)
    begin, end = _range(lengths, row, length, chunk)
    at_chunk = row * tl.num_programs(0) + tl.program_id(0)
    a = load_tile(A, n, A_state, STATE, channel, A_channel, dim).to(acc)
    bias_vector = _vector(bias, channel, inside, acc)
    skip = _vector(D, channel, inside, acc)
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
    partial = (row * tl.num_programs(1) + tl.program_id(1)) * length * STATE + n
    scratch += row * tl.cdiv(length, SUB) * STATE * dim

    h = tl.zeros([N, BLOCK_D], acc)
    if starts is not None:
        h += load_tile(starts + at_chunk * STATE * dim, n, dim, STATE, channel, 1, dim)
    for t in range(begin, end):
        if t % SUB == 0:
            store_tile(scratch + (t // SUB) * STATE * dim, h, n, STATE, channel, dim)
        dt = _step_size(tl.load(delta + t * delta_step, mask=inside, other=0.0).to(acc), bias_vector, SOFTPLUS)
        x = dt * tl.load(u + t * u_step, mask=inside, other=0.0).to(acc)
        b = tl.load(B + t * B_step, mask=n < STATE, other=0.0).to(acc)
        h = tl.exp(dt[None, :] * a) * h + x[None, :] * b[:, None]
    tl.debug_barrier()  # another thread of this program may read back what this one wrote

    dh = tl.zeros([N, BLOCK_D], acc)
    if ends is not None:
        dh += load_tile(ends + at_chunk * STATE * dim, n, dim, STATE, channel, 1, dim)
    dA_tile = tl.zeros([N, BLOCK_D], acc)
    dD_vector = tl.zeros([BLOCK_D], acc)
    dbias_vector = tl.zeros([BLOCK_D], acc)
    pieces = tl.cdiv(tl.maximum(end - begin, 0), SUB)
    for i in range(0, pieces):
        first = begin + (pieces - 1 - i) * SUB
        states = (load_tile(scratch + (first // SUB) * STATE * dim, n, dim, STATE, channel, 1, dim),)
        for k in tl.static_range(SUB):
            t = first + k
            # Behind the end no channel is live: everything loaded is zero, and so is the step, which changes nothing.
            live = channel < tl.where(t < end, dim, 0)
            live_n = n < tl.where(t < end, STATE, 0)
            dt = _step_size(tl.load(delta + t * delta_step, mask=live, other=0.0).to(acc), bias_vector, SOFTPLUS)
            dt = tl.where(live, dt, 0.0)
            x = dt * tl.load(u + t * u_step, mask=live, other=0.0).to(acc)
            b = tl.load(B + t * B_step, mask=live_n, other=0.0).to(acc)
            states = states + (tl.exp(dt[None, :] * a) * states[k] + x[None, :] * b[:, None],)  # noqa: RUF005
        for k in tl.static_range(SUB - 1, -1, -1):
            t = first + k
            live = channel < tl.where(t < end, dim, 0)
            live_n = n < tl.where(t < end, STATE, 0)
            raw = tl.load(delta + t * delta_step, mask=live, other=0.0).to(acc)
            dt = tl.where(live, _step_size(raw, bias_vector, SOFTPLUS), 0.0)
            u_t = tl.load(u + t * u_step, mask=live, other=0.0).to(acc)
            b = tl.load(B + t * B_step, mask=live_n, other=0.0).to(acc)
            c = tl.load(C + t * C_step, mask=live_n, other=0.0).to(acc)
            gradient = tl.load(dy + t * dy_step, mask=live, other=0.0).to(acc)
            if z is not None:
                gate = tl.load(z + t * z_step, mask=live, other=0.0).to(acc)
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
            through_decay = dh * states[k]
            dA_tile += through_decay * dt[None, :]
            ddt = tl.sum(through_decay * a, 0) + dx * u_t
            if SOFTPLUS:
                ddt *= sigmoid(raw + bias_vector)
            ddt = tl.where(live, ddt, 0.0)
            dbias_vector += ddt
            dD_vector += gradient * u_t
            tl.store(ddelta + t * dim, ddt, mask=live)
            tl.store(du + t * dim, dx * dt + gradient * skip, mask=live)
    store_tile(dA + at_chunk * STATE * dim, dA_tile, n, STATE, channel, dim)
    if dD is not None:
        tl.store(dD + at_chunk * dim + channel, dD_vector, mask=inside)
    if dbias is not None:
        tl.store(dbias + at_chunk * dim + channel, dbias_vector, mask=inside)
    if dinitial is not None and tl.program_id(0) == 0:
        store_tile(dinitial + row * STATE * dim, dh, n, STATE, channel, dim)
