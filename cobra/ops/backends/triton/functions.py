"""Scalar functions and tile access that several kernels share."""

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
def load_tile(pointer, n, n_stride, STATE: tl.constexpr, channel, channel_stride, dim):
    """A [N, BLOCK_D] tile of states or of A, zero outside."""
    mask = (n < STATE)[:, None] & (channel < dim)[None, :]
    return tl.load(pointer + n[:, None] * n_stride + channel[None, :] * channel_stride, mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, tile, n, STATE: tl.constexpr, channel, dim):
    """Write a [N, BLOCK_D] tile into a contiguous [STATE, dim] matrix."""
    mask = (n < STATE)[:, None] & (channel < dim)[None, :]
    tl.store(pointer + n[:, None] * dim + channel[None, :], tile, mask=mask)
