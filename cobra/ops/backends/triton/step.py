"""One token through all blocks of a Mamba: four kernels per block, six for more than `VECTOR_ROWS` rows.

    project      add, normalise, input projection, convolution. With many rows the norm is a kernel of its own, because
                 every program would compute it again
    project      projection to step size, B and C: partial sums over the channels. With many rows a kernel adds them up
    recur        adds them up; step size, recurrence, skip and gate
    project      output projection, whose partial sums the next block adds up

Two kernels cannot be one where every program of the second needs all of the first. The kernels neither look at values
nor wait for the device, so a step can be captured in a CUDA graph; without one, starting 4 kernels per block takes
longer than running them. New states are new tensors: writing them moves the same bytes as writing in place, and who
keeps states at fixed addresses copies them once per run of steps.

MB per block, Mamba-2.8B, which the memory must move once, and what programs together read of vectors and partial sums,
which the cache should give:

    bits, rows                16, 1            8, 1            4, 1           16, 32            8, 64
                         memory  cache   memory  cache   memory  cache    memory  cache    memory  cache
    norm                      -      -        -      -        -      -       0.0    5.2       0.0   10.5
    project (in)           52.6   45.9     26.4   42.6     14.9   42.6      56.4   52.4      34.2  104.9
    project (select)        2.0    0.5      1.0    0.2      0.5    0.2       2.0    3.6       1.0    7.0
    recur                   2.7    3.2      2.7    3.2      2.7    3.2      23.0   25.6      43.9   33.4
    project (out)          26.2    6.6     13.1    3.3      7.4    3.3      26.2   26.2      13.1   52.4
    all                    83.5            43.2            25.5            107.6             92.2

So 64 blocks and the output head move 5.6 GB at 1 row of bfloat16, of which 5.5 are weights that no kernel can spare.
Speed on a GPU has not been measured yet, for none of the fusions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from cobra.ops.fused import BlockWeights
from cobra.ops.quantized import is_plain

from .launch import launch
from .matvec import DTYPES, VECTOR_ROWS, Convolution, Matrix, Normalisation, as_matrix, product
from .norm import MAX_DIM
from .step_kernels import normalise, recur

BLOCK_D = 32  # channels of a program of `recur`
PROGRAMS = 2048  # of `recur` at most, about: each reads the step size's weights of its channels once
MAX_STATE = 64  # beyond these two a program's numbers leave the registers
MAX_RANK = 512


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


def stack_step(
    layers: Sequence[BlockWeights],
    hidden: Tensor,
    conv_states: Sequence[Tensor],
    ssm_states: Sequence[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]] | None:
    """See `cobra.ops.fused.stack_step`. Taken is what `linear` takes; conv states keep their dtype."""
    sizes = _sizes(layers, hidden)
    if sizes is None:
        return None
    count, device, (batch, width, inner, state, rank, taps) = len(layers), hidden.device, sizes
    matrices = [_matrices(weights, sizes, device) for weights in layers]
    if (
        None in matrices
        or not _are_states(conv_states, (batch, taps - 1, inner), count, device)
        or not _are_states(ssm_states, (batch, inner, state), count, device)
    ):
        return None
    blocks = triton.cdiv(inner, BLOCK_D)
    group = triton.cdiv(batch * blocks, PROGRAMS)
    n, r = triton.next_power_of_2(state), triton.next_power_of_2(rank)
    new_conv = torch.empty(count, batch, taps - 1, inner, device=device, dtype=conv_states[0].dtype).unbind()
    # neighbouring channels beside each other, as the kernels read and write them
    new_ssm = torch.empty(count, batch, state, inner, device=device).transpose(2, 3).unbind()
    totals = torch.empty(2, batch, width, device=device)  # in turns: other programs still read the one before
    normed, y = torch.empty(1, batch, width, device=device), torch.empty(1, batch, inner, device=device)
    partial, residual = hidden.contiguous()[None], None
    for i, (weights, block) in enumerate(zip(layers, matrices, strict=True)):
        assert block is not None
        total = totals[i % 2]
        convolution = Convolution(weights.conv_weight, weights.conv_bias, conv_states[i], new_conv[i])
        if batch <= VECTOR_ROWS:
            xz = product(block.in_proj, partial, Normalisation(residual, weights.norm, total, eps), convolution)
        else:
            size = triton.next_power_of_2(width)
            launch(
                normalise, batch, partial, residual, weights.norm, total, normed, width, batch, on=hidden,
                SPLITS=partial.shape[0], EPS=eps, BLOCK=size, num_warps=min(max(size // 512, 1), 16),
            )  # fmt: skip
            xz = product(block.in_proj, normed, None, convolution)
        selected = product(block.x_proj, xz[:1])
        if batch > VECTOR_ROWS and selected.shape[0] > 1:  # else every program would read every row's partial sums
            selected = selected.sum(0, keepdim=True)
        launch(
            recur, blocks * triton.cdiv(batch, group), selected, xz, weights.dt_proj, weights.dt_bias, weights.A_log,
            weights.D, ssm_states[i], *ssm_states[i].stride(), new_ssm[i], *new_ssm[i].stride(), y, inner, group,
            batch, on=hidden, SPLITS=selected.shape[0], STATE=state, N=n, RANK=rank, R=r, BLOCK_D=BLOCK_D,
        )  # fmt: skip
        partial, residual = product(block.out_proj, y), total
    assert residual is not None
    return partial[0] if partial.shape[0] == 1 else partial.sum(0), residual, list(new_conv), list(new_ssm)
