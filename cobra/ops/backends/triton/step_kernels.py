"""The kernels of a step; `matvec.py` says how products are cut into programs, `step.py` how the kernels fit together.

A program of `project` has BLOCK_R rows of the matrix and one of `splits` pieces of its columns. Numbers are widened in
registers and summed in float32. Two ways to sum:

    `_vector_products`   products and sums in float32, for so few vectors that reading the matrix takes longer
    `_tile_products`     on the tensor cores, which round: so a vector is the sum of two of the matrix's dtype, and a
                         product is exact to 2^-16 in bfloat16, 2^-21 in float16

The matrix may be of 8 or 4 bits a number (BITS; 16 stands for any floating point dtype), see `cobra.ops.quantized`: a
loaded column of 4 bits holds two, `piece` 0 and 1 below, 32 columns apart. Scales of rows are applied to sums, those of
4-bit groups to products: a tile for the tensor cores is one such group wide.

Only `_vector_products` is compiled for every number of vectors, ROWS, whose sums it keeps in registers. All else takes
`batch` as an ordinary number that nothing is specialised on: requests that come and go compile nothing anew.
"""
# Triton compiles loops and constants that pyright takes for Python's.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false

import triton
import triton.language as tl

from .functions import load, sigmoid, softplus


@triton.jit
def _column(loaded, piece: tl.constexpr, BITS: tl.constexpr):
    """The column of the matrix that this piece of a loaded column holds."""
    if BITS == 4:
        return loaded // 32 * 64 + loaded % 32 + 32 * piece
    else:  # noqa: RET505  Triton decides this at compile time and needs both branches
        return loaded


@triton.jit
def _number(loaded, piece: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """What a loaded number stands for, before its scale."""
    if BITS == 4:
        nibble = loaded & 15 if piece == 0 else loaded >> 4
        return (nibble.to(tl.float32) - 8.0).to(dtype)
    else:  # noqa: RET505
        return loaded.to(tl.float32).to(dtype) if BITS == 8 else loaded.to(dtype)


@triton.jit
def _coarse(value, half: tl.constexpr):
    """A number near `value` that `half` holds exactly."""
    if half == tl.bfloat16:  # cut off, which takes an eighth of the time of rounding
        return (value.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    else:  # noqa: RET505
        return value.to(half).to(tl.float32)


@triton.jit
def _vector(x, residual, b, column, live, count, batch, SPLITS: tl.constexpr):
    """Numbers of vector b: the sum of its SPLITS partial sums in `x`, [SPLITS, batch, count], and of the residual."""
    value = load(x + b * count + column, live, tl.float32)
    for split in tl.static_range(1, SPLITS):
        value += load(x + (split * batch + b) * count + column, live, tl.float32)
    if residual is not None:
        value += load(residual + b * count + column, live, tl.float32)
    return value


@triton.jit(do_not_specialize=["batch"])
def normalise(
    x, residual, norm, total, normed, count, batch, SPLITS: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add up a row's partial sums and its residual into `total`, and the RMSNorm of that; [batch, count] both."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    live = column < count
    value = _vector(x, residual, row, column, live, count, batch, SPLITS)
    tl.store(total + row * count + column, value, mask=live)
    value *= 1.0 / tl.sqrt(tl.sum(value * value, 0) / count + EPS)
    tl.store(normed + row * count + column, value * load(norm + column, live, tl.float32), mask=live)


@triton.jit
def _summand(
    x, residual, total, b, column, live, mine, weight, count,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Numbers of vector b, times the norm's weight, and their squares before that."""
    value = _vector(x, residual, b, column, live, count, ROWS, SPLITS)
    if NORM:
        tl.store(total + b * count + column, value, mask=column < tl.where(mine, count, 0))
    return value * weight, value * value


@triton.jit
def _vector_products(
    matrix, scales, row, inside, begin, end, stride, x, residual, norm, total, count,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, EPS: tl.constexpr, BITS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_B] products with all vectors; with `norm` they are normalised, see `project`."""
    NORM: tl.constexpr = norm is not None
    sums = ()
    squares = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([BLOCK_R, BLOCK_K], tl.float32),)  # noqa: RUF005
        squares = squares + (tl.zeros([BLOCK_K], tl.float32),)  # noqa: RUF005
    for at in range(begin, end, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (k < end)[None, :]
        loaded = tl.load(matrix + row[:, None] * stride + k[None, :], mask=mask, other=0, eviction_policy="evict_first")
        mine = at // BLOCK_K % tl.num_programs(0) == tl.program_id(0)  # programs take turns in writing `total`
        column = _column(k, 0, BITS)
        live = (k < end) & (column < count)
        weight = load(norm + column, live, tl.float32) if NORM else 1.0
        if BITS == 4:
            group = at // 32 + tl.arange(0, BLOCK_K // 32)
            live_group = inside[:, None] & (group < end // 32)[None, :]
            scale = tl.load(scales + row[:, None] * (stride // 32) + group[None, :], mask=live_group, other=0.0)
            scale = tl.broadcast_to(scale[:, :, None], [BLOCK_R, BLOCK_K // 32, 32]).reshape([BLOCK_R, BLOCK_K])
            low = (loaded & 15).to(tl.float32)
            high = (loaded >> 4).to(tl.float32)
            column_high = _column(k, 1, BITS)
            live_high = (k < end) & (column_high < count)
            weight_high = load(norm + column_high, live_high, tl.float32) if NORM else 1.0
        else:
            low = loaded.to(tl.float32)
        new_sums = ()
        new_squares = ()
        for b in tl.static_range(ROWS):
            value, square = _summand(x, residual, total, b, column, live, mine, weight, count, ROWS, SPLITS, NORM)
            if BITS == 4:
                other, square_high = _summand(
                    x, residual, total, b, column_high, live_high, mine, weight_high, count, ROWS, SPLITS, NORM
                )
                square += square_high
                # the 8 that nibbles are too large by: subtracted once for all rows
                found = low * value[None, :] + (high * other[None, :] - 8.0 * (value + other)[None, :])
                new_sums = new_sums + (sums[b] + found * scale,)  # noqa: RUF005
            else:
                new_sums = new_sums + (sums[b] + low * value[None, :],)  # noqa: RUF005
            new_squares = new_squares + (squares[b] + square,)  # noqa: RUF005
        sums = new_sums
        squares = new_squares
    out = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    for b in tl.static_range(ROWS):
        found = tl.sum(sums[b], 1)
        if NORM:
            found *= 1.0 / tl.sqrt(tl.sum(squares[b], 0) / count + EPS)
        out = tl.where(tl.arange(0, BLOCK_B)[None, :] == b, found[:, None], out)
    return out


@triton.jit
def _tile_products(
    matrix, scales, row, inside, begin, end, stride, x, count, batch,
    BITS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_B] products with all vectors of `x`, [batch, count]."""
    half: tl.constexpr = tl.float16 if matrix.dtype.element_ty == tl.float16 else tl.bfloat16
    b = tl.arange(0, BLOCK_B)
    sums = tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
    for at in range(begin, end, BLOCK_K):
        k = at + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (k < end)[None, :]
        loaded = tl.load(matrix + row[:, None] * stride + k[None, :], mask=mask, other=0, eviction_policy="evict_first")
        found = sums if BITS != 4 else tl.zeros([BLOCK_R, BLOCK_B], tl.float32)
        for piece in tl.static_range(2 if BITS == 4 else 1):
            number = _number(loaded, piece, BITS, half)
            column = _column(k, piece, BITS)
            live = ((k < end) & (column < count))[:, None] & (b < batch)[None, :]
            value = load(x + b[None, :] * count + column[:, None], live, tl.float32)
            high = _coarse(value, half)
            found = tl.dot(number, high.to(half), found)
            found = tl.dot(number, (value - high).to(half), found)
        if BITS == 4:
            scale = tl.load(scales + row * (stride // 32) + at // 32, mask=inside, other=0.0)
            sums += found * scale[:, None]
        else:
            sums = found
    return sums


@triton.jit
def _convolve(
    newest, taps, bias, old, old_row, old_step, old_channel, new, new_row, new_step, new_channel,
    channel, b, inside, mask, TAPS: tl.constexpr,
):  # fmt: skip
    """The causal convolution's output for the newest inputs, [BLOCK_R, BLOCK_B]."""
    value = load(bias + channel, inside, tl.float32)[:, None]
    value += load(taps + channel * TAPS + TAPS - 1, inside, tl.float32)[:, None] * newest
    before = ()
    for step in tl.static_range(TAPS - 1):
        at = old + b[None, :] * old_row + step * old_step + channel[:, None] * old_channel
        before = before + (load(at, mask, tl.float32),)  # noqa: RUF005
        value += load(taps + channel * TAPS + step, inside, tl.float32)[:, None] * before[step]
    at = new + b[None, :] * new_row + channel[:, None] * new_channel
    for step in tl.static_range(TAPS - 2):
        tl.store(at + step * new_step, before[step + 1], mask=mask)
    if TAPS > 1:
        tl.store(at + (TAPS - 2) * new_step, newest, mask=mask)
    return value * sigmoid(value)


@triton.jit(do_not_specialize=["batch"])
def project(
    matrix, scales, x, residual, norm, total, taps, bias, old, old_row, old_step, old_channel,
    new, new_row, new_step, new_channel, out, rows, count, width, span, batch,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, BITS: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products of a matrix [PARTS rows, count], stored `width` numbers or bytes wide, with `batch` vectors.

    out: [splits, PARTS, batch, rows], a sum for each `span` columns. With `norm` the vectors are normalised after the
    residual has been added; `total` gets the sum. With `taps` the products of the first part go through the causal
    convolution and its SiLU; `old` and `new` are its states, [batch, TAPS - 1, rows], of any strides. ROWS: `batch`,
    or 0 for products in tiles.
    """
    blocks = tl.cdiv(rows, BLOCK_R)
    program = tl.program_id(0)
    part = program // blocks % PARTS
    split = program // (blocks * PARTS)
    channel = program % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = channel < rows
    row = (part * rows + channel).to(tl.int64)
    begin = split * span
    end = tl.minimum(begin + span, width)
    b = tl.arange(0, BLOCK_B)
    if ROWS == 0:
        value = _tile_products(
            matrix, scales, row, inside, begin, end, width, x, count, batch, BITS, BLOCK_B, BLOCK_R, BLOCK_K
        )
    else:
        value = _vector_products(
            matrix, scales, row, inside, begin, end, width, x, residual, norm, total, count,
            ROWS, SPLITS, EPS, BITS, BLOCK_B, BLOCK_R, BLOCK_K,
        )  # fmt: skip
    if BITS == 8:
        value *= load(scales + row, inside, tl.float32)[:, None]
    mask = inside[:, None] & (b < batch)[None, :]
    if taps is not None and part == 0:
        value = _convolve(
            value, taps, bias, old, old_row, old_step, old_channel, new, new_row, new_step, new_channel,
            channel, b, inside, mask, TAPS,
        )  # fmt: skip
    at = ((split * PARTS + part) * batch + b).to(tl.int64)[None, :] * rows + channel[:, None]
    tl.store(out + at, value, mask=mask)


@triton.jit(do_not_specialize=["batch"])
def recur(
    selected, xz, dt_proj, dt_bias, A_log, D, old, old_row, old_channel, old_state, new, new_row, new_channel,
    new_state, y, dim, group, batch,
    SPLITS: tl.constexpr, STATE: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One step of the recurrence for BLOCK_D channels of `group` rows; states [batch, dim, STATE] of any strides.

    selected: [SPLITS, batch, RANK + 2 STATE], partial sums. xz: [2, batch, dim], input and gate. y: [batch, dim].
    """
    blocks = tl.cdiv(dim, BLOCK_D)
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.program_id(0) // blocks * group
    n, r = tl.arange(0, N), tl.arange(0, R)
    inside = channel < dim
    in_tile = (n < STATE)[:, None] & inside[None, :]
    to_step = load(dt_proj + channel[:, None] * RANK + r[None, :], inside[:, None] & (r < RANK)[None, :], tl.float32)
    a = -tl.exp(load(A_log + channel[None, :] * STATE + n[:, None], in_tile, tl.float32))
    shift = load(dt_bias + channel, inside, tl.float32)
    skip = load(D + channel, inside, tl.float32)
    old += channel[None, :] * old_channel + n[:, None] * old_state
    new += channel[None, :] * new_channel + n[:, None] * new_state
    for row in range(first, tl.minimum(first + group, batch)):
        h = load(old + row * old_row, in_tile, tl.float32)
        low = tl.zeros([R], tl.float32)
        b = tl.zeros([N], tl.float32)
        c = tl.zeros([N], tl.float32)
        for split in tl.static_range(SPLITS):
            at = selected + (split * batch + row) * (RANK + 2 * STATE)
            low += load(at + r, r < RANK, tl.float32)
            b += load(at + RANK + n, n < STATE, tl.float32)
            c += load(at + RANK + STATE + n, n < STATE, tl.float32)
        dt = softplus(tl.sum(to_step * low[None, :], 1) + shift)
        u = load(xz + row * dim + channel, inside, tl.float32)
        gate = load(xz + (batch + row) * dim + channel, inside, tl.float32)
        h = tl.exp(dt[None, :] * a) * h + (dt * u)[None, :] * b[:, None]
        tl.store(new + row * new_row, h, mask=in_tile)
        out = tl.sum(h * c[:, None], 0) + skip * u
        tl.store(y + row * dim + channel, out * gate * sigmoid(gate), mask=inside)
