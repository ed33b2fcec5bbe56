"""Scalar functions and access to memory that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def silu_slope(x, s):
    """The derivative of x sigmoid(x), given s = sigmoid(x)."""
    return s + s * x * (1.0 - s)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), accurate where it is tiny, NaN for NaN."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    # Rounding of w cancels in log(w) / (w - 1), which is log(1 + e) / e to full precision.
    log1p = tl.where(w == 1.0, e, tl.log(w) * e / tl.where(w == 1.0, 1.0, w - 1.0))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def place(pieces, dim, BLOCK_D: tl.constexpr):
    """What this program works on: a row, one of its `pieces`, a block of channels, and that block's channels.

    One grid axis holds all of them, because CUDA ends the other two at 65,535; neighbours share what they read.
    """
    blocks = tl.cdiv(dim, BLOCK_D)
    program = tl.program_id(0)
    block = program % blocks
    at = program // blocks
    # offsets of large tensors pass 2^31
    return (at // pieces).to(tl.int64), (at % pieces).to(tl.int64), block, block * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def row_end(lengths, row, length):
    """One past the last step that a row has."""
    end = row * 0 + length
    if lengths is not None:
        end = tl.minimum(end, tl.load(lengths + row))
    return end


@triton.jit
def load(pointer, mask, acc: tl.constexpr):
    """Values in the dtype that the kernel computes in, zero where the mask is false."""
    return tl.load(pointer, mask=mask, other=0.0).to(acc)


@triton.jit
def load_vector(pointer, channel, dim, acc: tl.constexpr):
    """[BLOCK_D] values of a parameter; zeros if it is None."""
    if pointer is None:
        return tl.zeros([channel.shape[0]], acc)
    else:  # noqa: RET505  Triton decides this at compile time and needs both branches
        return load(pointer + channel, channel < dim, acc)


@triton.jit
def load_tile(pointer, at, n, STATE: tl.constexpr, channel, dim, acc: tl.constexpr):
    """[N, BLOCK_D] values of the matrix number `at` of contiguous [STATE, dim] matrices; zeros if they are None."""
    if pointer is None:
        return tl.zeros([n.shape[0], channel.shape[0]], acc)
    else:  # noqa: RET505
        mask = (n < STATE)[:, None] & (channel < dim)[None, :]
        return load(pointer + at * STATE * dim + n[:, None] * dim + channel[None, :], mask, acc)


@triton.jit
def store_tile(pointer, at, tile, n, STATE: tl.constexpr, channel, dim):
    """Write what `load_tile` reads."""
    mask = (n < STATE)[:, None] & (channel < dim)[None, :]
    tl.store(pointer + at * STATE * dim + n[:, None] * dim + channel[None, :], tile, mask=mask)
