"""One token through all blocks of a Mamba: four kernels per block, five for more than `VECTOR_ROWS` rows.

    project      add, normalise, input projection, convolution (the first three rows of kernels in one; with many rows
                 the norm is a kernel of its own, because every program would compute it again)
    project      projection to step size, B and C: partial sums over the channels
    recur        adds them up; step size, recurrence, skip and gate
    project      output projection, whose partial sums the next block adds up

Two kernels cannot be one where every program of the second needs all of the first. The kernels neither look at values
nor wait for the device, so a step can be captured in a CUDA graph; without one, starting 4 kernels per block takes
longer than running them.

Bytes per block, D = 2560, E = 5120, N = 16, R = 160, 4 taps (Mamba-2.8B), weights of 2 bytes, in MB; "rest" is vectors,
partial sums and what several programs read, nearly all of it from the L2 cache:

    rows               1                        64
               weights  states  rest    weights  states  rest
    norm             -       -     -        0.0       -   2.6
    project       52.6     0.1   0.0       52.6     7.9   5.9
    project        2.0       -   0.1        2.0       -   2.1
    recur          2.0     0.7   1.2        2.0    41.9  11.5
    project       26.2       -   0.0       26.2       -   5.2

A step of 64 blocks moves at least 5.3 GB of weights (and 0.26 GB for the output head), and 0.05 GB of states per row,
two thirds of which are written in the same place by `stack_step_`. Speed on a GPU has not been measured yet.
"""

# Triton compiles loops and constants that pyright takes for Python's.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cobra.ops.fused import BlockWeights

from .functions import load, sigmoid, softplus
from .launch import launch
from .matvec import DTYPES, VECTOR_ROWS, Convolution, Matrix, Normalisation, as_matrix, is_plain, product
from .norm import MAX_DIM
from .products import normalise

BLOCK_D = 32  # channels of a program of `recur`
PROGRAMS = 2048  # of `recur` at most, about: each reads the step size's weights of its channels once
MAX_STATE = 64  # beyond these two a program's numbers leave the registers
MAX_RANK = 512


@triton.jit
def recur(
    selected, xz, dt_proj, dt_bias, A_log, D, old, old_row, old_channel, old_state, new, new_row, new_channel,
    new_state, y, dim, group,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, STATE: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One step of the recurrence for BLOCK_D channels of `group` rows; states [ROWS, dim, STATE] of any strides.

    selected: [SPLITS, ROWS, RANK + 2 STATE], partial sums. xz: [2, ROWS, dim], input and gate. y: [ROWS, dim].
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
    for row in range(first, tl.minimum(first + group, ROWS)):
        h = load(old + row * old_row, in_tile, tl.float32)
        low = tl.zeros([R], tl.float32)
        b = tl.zeros([N], tl.float32)
        c = tl.zeros([N], tl.float32)
        for split in tl.static_range(SPLITS):
            at = selected + (split * ROWS + row) * (RANK + 2 * STATE)
            low += load(at + r, r < RANK, tl.float32)
            b += load(at + RANK + n, n < STATE, tl.float32)
            c += load(at + RANK + STATE + n, n < STATE, tl.float32)
        dt = softplus(tl.sum(to_step * low[None, :], 1) + shift)
        u = load(xz + row * dim + channel, inside, tl.float32)
        gate = load(xz + (ROWS + row) * dim + channel, inside, tl.float32)
        tl.debug_barrier()  # several threads may hold the same number: all have read it before one writes
        h = tl.exp(dt[None, :] * a) * h + (dt * u)[None, :] * b[:, None]
        tl.store(new + row * new_row, h, mask=in_tile)
        out = tl.sum(h * c[:, None], 0) + skip * u
        tl.store(y + row * dim + channel, out * gate * sigmoid(gate), mask=inside)


class _Sizes(NamedTuple):
    batch: int
    width: int
    inner: int
    state: int
    rank: int
    taps: int


class _Matrices(NamedTuple):
    in_proj: Matrix
    x_proj: Matrix
    out_proj: Matrix


def _sizes(layers: Sequence[BlockWeights], hidden: Tensor) -> _Sizes | None:
    """None unless kernels are made for such sizes; whether all tensors have them is for others to check."""
    if hidden.dim() != 2 or hidden.dtype not in DTYPES or type(hidden) is not Tensor or not layers:
        return None
    first = layers[0]
    if first.A_log.dim() != 2 or first.dt_proj.dim() != 2 or first.conv_weight.dim() not in (2, 3):
        return None
    (batch, width), (inner, state) = hidden.shape, first.A_log.shape
    sizes = _Sizes(batch, width, inner, state, first.dt_proj.shape[1], first.conv_weight.shape[-1])
    fits = 0 < width <= MAX_DIM and 0 < state <= MAX_STATE and 0 < sizes.rank <= MAX_RANK and sizes.taps > 0
    return sizes if fits else None


def _matrices(weights: BlockWeights, sizes: _Sizes, device: torch.device) -> _Matrices | None:
    """The three large weights; None unless every tensor of the block is where, what and as large as is expected."""
    batch, width, inner, state, rank, taps = sizes
    expected = {
        "norm": [(width,)], "conv_weight": [(inner, taps), (inner, 1, taps)], "conv_bias": [(inner,)],
        "dt_proj": [(inner, rank)], "dt_bias": [(inner,)], "A_log": [(inner, state)], "D": [(inner,)],
    }  # fmt: skip
    for name, shapes in expected.items():
        tensor = getattr(weights, name)
        if tensor.dtype not in DTYPES or tensor.shape not in shapes or not is_plain(tensor, device):
            return None
    found = [as_matrix(weight, batch, device) for weight in (weights.in_proj, weights.x_proj, weights.out_proj)]
    shapes = [(2 * inner, width), (rank + 2 * state, inner), (width, inner)]
    if any(matrix is None or matrix.shape != shape for matrix, shape in zip(found, shapes, strict=True)):
        return None
    return _Matrices(*found)  # type: ignore[arg-type]


def _are_states(tensors: Sequence[Tensor], shape: tuple[int, ...], count: int, device: torch.device) -> bool:
    return len(tensors) == count and all(
        t.shape == shape and t.dtype in DTYPES and t.device == device and type(t) is Tensor for t in tensors
    )


def _prepare(
    layers: Sequence[BlockWeights], hidden: Tensor, conv: Sequence[Tensor], ssm: Sequence[Tensor]
) -> tuple[_Sizes, list[_Matrices]] | None:
    """None if anything is not as the kernels expect it."""
    sizes = _sizes(layers, hidden)
    if sizes is None:
        return None
    batch, _, inner, state, _, taps = sizes
    matrices = [_matrices(weights, sizes, hidden.device) for weights in layers]
    if (
        None in matrices
        or not _are_states(conv, (batch, taps - 1, inner), len(layers), hidden.device)
        or not _are_states(ssm, (batch, inner, state), len(layers), hidden.device)
    ):
        return None
    return sizes, matrices  # type: ignore[return-value]


def _read_token(
    layers: Sequence[BlockWeights], matrices: list[_Matrices], sizes: _Sizes, hidden: Tensor, eps: float,
    conv: Sequence[Tensor], ssm: Sequence[Tensor], new_conv: Sequence[Tensor], new_ssm: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns: output of the last block and the residual stream before it. The new states may be the old ones."""
    batch, width, inner, state, rank, _ = sizes
    blocks = triton.cdiv(inner, BLOCK_D)
    group = triton.cdiv(batch * blocks, PROGRAMS)
    n, r = triton.next_power_of_2(state), triton.next_power_of_2(rank)
    # other programs still read the sum that came before
    totals = torch.empty(2, batch, width, device=hidden.device)
    normed = torch.empty(1, batch, width, device=hidden.device)
    y = torch.empty(1, batch, inner, device=hidden.device)
    partial, residual = hidden.contiguous()[None], None
    for i, (weights, block) in enumerate(zip(layers, matrices, strict=True)):
        total = totals[i % 2]
        convolution = Convolution(weights.conv_weight, weights.conv_bias, conv[i], new_conv[i])
        if batch <= VECTOR_ROWS:
            norm = Normalisation(residual, weights.norm, total, eps)
            xz = product(block.in_proj, partial, norm, convolution)
        else:
            size = triton.next_power_of_2(width)
            launch(
                normalise, batch, partial, residual, weights.norm, total, normed, width, on=hidden,
                ROWS=batch, SPLITS=partial.shape[0], EPS=eps, BLOCK=size, num_warps=min(max(size // 512, 1), 16),
            )  # fmt: skip
            xz = product(block.in_proj, normed, None, convolution)
        selected = product(block.x_proj, xz[:1])
        launch(
            recur, blocks * triton.cdiv(batch, group), selected, xz, weights.dt_proj, weights.dt_bias, weights.A_log,
            weights.D, ssm[i], *ssm[i].stride(), new_ssm[i], *new_ssm[i].stride(), y, inner, group, on=hidden,
            ROWS=batch, SPLITS=selected.shape[0], STATE=state, N=n, RANK=rank, R=r, BLOCK_D=BLOCK_D,
        )  # fmt: skip
        partial, residual = product(block.out_proj, y), total
    assert residual is not None
    return partial[0] if partial.shape[0] == 1 else partial.sum(0), residual


def stack_step(
    layers: Sequence[BlockWeights],
    hidden: Tensor,
    conv_states: Sequence[Tensor],
    ssm_states: Sequence[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]] | None:
    """See `cobra.ops.fused.stack_step`. Taken is what `linear` takes, with states of any strides."""
    prepared = _prepare(layers, hidden, conv_states, ssm_states)
    if prepared is None:
        return None
    sizes, matrices = prepared
    count, (batch, _, inner, state, _, taps) = len(layers), sizes
    new_conv = torch.empty(count, batch, taps - 1, inner, device=hidden.device).unbind()
    # neighbouring channels beside each other, as the kernels read and write them
    new_ssm = torch.empty(count, batch, state, inner, device=hidden.device).transpose(2, 3).unbind()
    out, residual = _read_token(layers, matrices, sizes, hidden, eps, conv_states, ssm_states, new_conv, new_ssm)
    return out, residual, list(new_conv), list(new_ssm)


def stack_step_(
    layers: Sequence[BlockWeights],
    hidden: Tensor,
    conv_states: Sequence[Tensor],
    ssm_states: Sequence[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor] | None:
    """See `cobra.ops.fused.stack_step_`."""
    prepared = _prepare(layers, hidden, conv_states, ssm_states)
    if prepared is None:
        return None
    sizes, matrices = prepared
    return _read_token(layers, matrices, sizes, hidden, eps, conv_states, ssm_states, conv_states, ssm_states)
