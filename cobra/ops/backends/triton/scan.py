"""The selective scan, tiled over time, forward and backward; the one-token update is a sequence of length one.

A long sequence and a small batch would leave most of a GPU idle if one program walked the whole sequence, so it is cut
into chunks, each with a program of its own:

    1. `chunk_states`: what each chunk leaves if it starts from zero, and the sum S of its step sizes.
    2. `combine`: from chunk to chunk, h' = exp(A S) h + what it leaves alone. Now every chunk's start is known.
    3. `forward`: each chunk again, from its start, with outputs.

The backward pass has the same three phases with the adjoint state, backwards in time; it keeps the chunks' starts and
computes the states between them again. If the batch fills the GPU there is one chunk, and phase 3 alone.
No sum uses atomics, so results repeat bit for bit.

Cost, L steps, D channels, N states, chunks of T steps, per row of the batch, e bytes per input element:

    forward       moves (4 e L D) + 2 e L N, several chunks 2 e L D + 12 L D N / T more
    backward      moves (7 e L D) + scratch 8 L D N / SUB + partial dB, dC 16 L N D / BLOCK_D;
                  several chunks 3 e L D + 12 L D N / T more
    memory        from forward to backward 4 L D N / T bytes beside the inputs, with one chunk only the initial state;
                  within the backward pass 4 L D N / SUB of scratch and 8 L N D / BLOCK_D of partial sums
    arithmetic    per step, channel and state about 1 exp + 6 FLOPs in each pass over the recurrence: forward 1 pass (2
                  with several chunks), backward 2 passes and one of 1 exp + 14 FLOPs (one pass more with several)

Exponentials, 16 per cycle and multiprocessor, and not bytes should bound it from N = 8 on. Speed on a GPU has not been
measured yet: BLOCK_D, MIN_CHUNK and PROGRAMS are estimates, and SUB is what the compiler for sm_90 fits into registers.
"""

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._shared import compute_dtype, rows
from . import scan_kernels as kernels
from .launch import launch, strided, sum_partial, zeros_behind

BLOCK_D = 32  # channels of a program: one warp's lanes
SUB = 4  # states held in registers in the backward pass; with N = 16, 8 of them spill
MIN_CHUNK = 32
PROGRAMS = 2048  # about what a large GPU needs in flight to hide latencies: 16 warps on each of 132 multiprocessors


def chunk_length(batch: int, length: int, dim: int) -> int:
    """Steps of a chunk, a multiple of SUB: enough chunks to fill the GPU, or one if two phases would not pay."""
    chunks = PROGRAMS // (batch * -(-dim // BLOCK_D))
    chunk = max(-(-length // max(chunks, 1)), MIN_CHUNK) if chunks >= 3 else length
    return -(-chunk // SUB) * SUB


def _constants(A: Tensor) -> dict[str, int]:
    size = max(triton.next_power_of_2(A.shape[1]), 2)
    return {"STATE": A.shape[1], "N": size, "BLOCK_D": BLOCK_D, "num_warps": min(max(size // 16, 1), 16)}


def _combine(states: Tensor, sums: Tensor, initial: Tensor | None, A: Tensor, *, reverse: bool) -> None:
    batch, chunks, _, dim = states.shape
    launch(
        kernels.combine, (-(-dim // BLOCK_D), batch), states, sums, initial, A, *A.stride(), chunks, dim,
        on=states, REVERSE=reverse, **_constants(A),
    )  # fmt: skip


def _scan(u, delta, A, B, C, D, z, delta_bias, use_softplus, lengths, initial, chunk):
    """Outputs, the final state and the states that chunks start from, None if that is one zero state."""
    batch, length, dim = u.shape
    state = A.shape[1]
    acc = compute_dtype(u)
    chunks = -(-length // chunk)
    grid = (chunks, -(-dim // BLOCK_D), batch)
    constants = _constants(A) | {"SOFTPLUS": use_softplus}
    starts = initial
    if chunks > 1:
        starts = u.new_empty(batch, chunks, state, dim, dtype=acc)
        sums = u.new_empty(batch, chunks, dim, dtype=acc)
        launch(
            kernels.chunk_states, grid, *strided(u), *strided(delta), *strided(B), A, *A.stride(), delta_bias, lengths,
            starts, sums, length, dim, chunk, on=u, **constants,
        )  # fmt: skip
        _combine(starts, sums, initial, A, reverse=False)
    y = zeros_behind(lengths, u, u.shape, u.dtype)
    final = u.new_empty(batch, state, dim, dtype=acc)
    launch(
        kernels.forward, grid, *strided(u), *strided(delta), *strided(z), *strided(B), *strided(C), A, *A.stride(),
        D, delta_bias, lengths, starts, y, final, length, dim, chunk, on=u, **constants,
    )  # fmt: skip
    return y, final, starts


class _SelectiveScan(torch.autograd.Function):
    """States are [batch, state, dim] here."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, use_softplus, lengths, initial):
        chunk = chunk_length(*u.shape)
        y, final, starts = _scan(u, delta, A, B, C, D, z, delta_bias, use_softplus, lengths, initial, chunk)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, lengths, starts)
        ctx.use_softplus, ctx.chunk, ctx.has_initial = use_softplus, chunk, initial is not None
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        u, delta, A, B, C, D, z, bias, lengths, starts = ctx.saved_tensors
        batch, length, dim = u.shape
        state, chunk, acc = A.shape[1], ctx.chunk, compute_dtype(u)
        chunks, blocks = -(-length // chunk), -(-dim // BLOCK_D)
        grid = (chunks, blocks, batch)
        constants = _constants(A) | {"SOFTPLUS": ctx.use_softplus}
        dy = u.new_zeros(1, 1, dim).expand(u.shape) if dy is None else rows(dy)
        ends = None if dfinal is None else dfinal.contiguous()
        if chunks > 1:
            dfinal = ends
            ends = u.new_empty(batch, chunks, state, dim, dtype=acc)
            sums = u.new_empty(batch, chunks, dim, dtype=acc)
            launch(
                kernels.chunk_adjoints, grid, *strided(delta), *strided(z), *strided(C), *strided(dy), A, *A.stride(),
                bias, lengths, ends, sums, length, dim, chunk, on=u, **constants,
            )  # fmt: skip
            _combine(ends, sums, dfinal, A, reverse=True)

        def new(*shape: int) -> Tensor:
            return u.new_empty(shape, dtype=acc)

        du, ddelta = (zeros_behind(lengths, u, u.shape, tensor.dtype) for tensor in (u, delta))
        dz = None if z is None else zeros_behind(lengths, u, u.shape, z.dtype)
        dB, dC = (zeros_behind(lengths, u, (batch, blocks, length, state), acc) for _ in range(2))
        dA = new(batch, chunks, state, dim)
        dD = None if D is None else new(batch, chunks, dim)
        dbias = None if bias is None else new(batch, chunks, dim)
        dinitial = new(batch, state, dim) if ctx.has_initial else None
        launch(
            kernels.backward, grid,
            *strided(u), *strided(delta), *strided(z), *strided(B), *strided(C), *strided(dy), A, *A.stride(),
            D, bias, lengths, starts, ends, new(batch, -(-length // SUB), state, dim),
            du, ddelta, dz, dB, dC, dA, dD, dbias, dinitial, length, dim, chunk, on=u, SUB=SUB, **constants,
        )  # fmt: skip
        return (
            du, ddelta, dA.sum((0, 1)).t().to(A.dtype), sum_partial(dB, 1, B), sum_partial(dC, 1, C),
            sum_partial(dD, (0, 1), D), dz, sum_partial(dbias, (0, 1), bias), None, None, dinitial,
        )  # fmt: skip


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    lengths: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `cobra.ops.selective_scan`."""
    u, delta, B, C = (rows(tensor) for tensor in (u, delta, B, C))
    z = None if z is None else rows(z)
    D, delta_bias = (None if tensor is None else tensor.contiguous() for tensor in (D, delta_bias))
    if lengths is not None:
        lengths = lengths.to(u.device, torch.int64).clamp(0, u.shape[1])
    # Kernels hold states as [batch, state, dim], and so does a state that came from here: then this copies nothing.
    initial = None if initial_state is None else initial_state.transpose(1, 2).to(compute_dtype(u)).contiguous()
    y, final = _SelectiveScan.apply(u, delta, A, B, C, D, z, delta_bias, delta_softplus, lengths, initial)
    return y, final.transpose(1, 2)


def selective_state_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `cobra.ops.selective_state_update`: a sequence of one step."""
    y, new_state = selective_scan(
        u[:, None],
        delta[:, None],
        A,
        B[:, None],
        C[:, None],
        D,
        z=None if z is None else z[:, None],
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        initial_state=state,
    )
    return y[:, 0], new_state
