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

    forward       moves (4 e L D) + 2 e L N, several chunks 2 e L D + 12 L D N / T more; lengths e L D more
    backward      moves (7 e L D) + scratch 8 L D N / SUB + partial dB, dC 16 L N D / BLOCK_D;
                  several chunks 3 e L D + 12 L D N / T more; lengths 3 e L D + 8 L N D / BLOCK_D more
    resets        1 byte per step, block of channels and pass over the recurrence
    memory        from forward to backward 4 L D N / T bytes beside the inputs, with one chunk only the initial state;
                  within the backward pass 4 L D N / SUB of scratch and 8 L N D / BLOCK_D of partial sums
    arithmetic    per step, channel and state about 1 exp + 6 FLOPs in each pass over the recurrence: forward 1 pass (2
                  with several chunks), backward 2 passes and one of 1 exp + 14 FLOPs (one pass more with several)

Exponentials, 16 per cycle and multiprocessor, and not bytes should bound it from N = 8 on. Speed on a GPU has not been
measured yet: BLOCK_D, MIN_CHUNK and PROGRAMS are estimates, and SUB is what the compiler for sm_90 fits into registers.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from cobra.errors import BackendError

from .._operators import scan_functions
from .._shared import compute_dtype, rows
from . import scan_kernels as kernels
from .launch import launch, strided, sum_partial, zeros_behind

BLOCK_D = 32  # channels of a program: one warp's lanes
SUB = 4  # states held in registers in the backward pass; with N = 16, 8 of them spill
MIN_CHUNK = 32
PROGRAMS = 2048  # about what a large GPU needs in flight to hide latencies: 16 warps on each of 132 multiprocessors
MAX_STATE = 256  # beyond it the backward pass would live in spilled registers


def chunk_length(batch: int, length: int, dim: int) -> int:
    """Steps of a chunk, a multiple of SUB: enough chunks to fill the GPU, or one if two phases would not pay."""
    chunks = PROGRAMS // (batch * -(-dim // BLOCK_D))
    chunk = max(-(-length // max(chunks, 1)), MIN_CHUNK) if chunks >= 3 else length
    return -(-chunk // SUB) * SUB


def _constants(A: Tensor) -> dict[str, int]:
    state = A.shape[0]
    if state > MAX_STATE:
        raise BackendError(
            f"The ops backend 'triton' takes at most {MAX_STATE} states per channel, A has {state}; use 'reference'."
        )
    size = max(triton.next_power_of_2(state), 2)
    return {"STATE": state, "N": size, "BLOCK_D": BLOCK_D, "num_warps": max(size // 16, 1)}


def _cuts(resets: Tensor | None, lengths: Tensor | None, chunk: int) -> Tensor | None:
    """[batch, chunks]: where a text begins inside a chunk, so that nothing passes through it; None without resets."""
    if resets is None:
        return None
    batch, length = resets.shape
    if lengths is not None:
        resets = resets & (torch.arange(length, device=resets.device) < lengths[:, None])
    return F.pad(resets, (0, -length % chunk)).view(batch, -1, chunk).any(-1)


def _combine(
    states: Tensor, sums: Tensor, initial: Tensor | None, A: Tensor, cuts: Tensor | None, *, reverse: bool
) -> None:
    batch, chunks, _, dim = states.shape
    launch(
        kernels.combine, batch * -(-dim // BLOCK_D), states, sums, initial, A, cuts, chunks, dim,
        on=states, REVERSE=reverse, **_constants(A),
    )  # fmt: skip


def _starts_shape(batch: int, length: int, dim: int, state: int) -> tuple[int, ...]:
    chunks = -(-length // chunk_length(batch, length, dim))
    return (batch, chunks, state, dim) if chunks > 1 else (0,)


def _scan(u, delta, A, B, C, D, z, bias, use_softplus, lengths, resets, initial, keep):
    """Outputs, final state and, for the backward pass, the states that chunks start from; one starts from `initial`."""
    batch, length, dim = u.shape
    state, acc, chunk = A.shape[0], compute_dtype(u), chunk_length(batch, length, dim)
    chunks, blocks = -(-length // chunk), -(-dim // BLOCK_D)
    constants = _constants(A) | {"SOFTPLUS": use_softplus}
    starts = initial
    if chunks > 1:
        starts = u.new_empty(batch, chunks, state, dim, dtype=acc)
        sums = u.new_empty(batch, chunks, dim, dtype=acc)
        launch(
            kernels.chunk_states, batch * chunks * blocks, *strided(u), *strided(delta), *strided(B),
            A, bias, lengths, resets, starts, sums, length, dim, chunk, on=u, **constants,
        )  # fmt: skip
        _combine(starts, sums, initial, A, _cuts(resets, lengths, chunk), reverse=False)
    y = zeros_behind(lengths, u, u.shape, u.dtype)
    final = u.new_empty(batch, state, dim, dtype=acc)
    launch(
        kernels.forward, batch * chunks * blocks, *strided(u), *strided(delta), *strided(z), *strided(B), *strided(C),
        A, D, bias, lengths, resets, starts, y, final, length, dim, chunk, on=u, **constants,
    )  # fmt: skip
    return y, final, starts if keep and chunks > 1 else u.new_empty(0, dtype=acc)


def _scan_backward(gradients, saved, u, delta, A, B, C, D, z, bias, use_softplus, lengths, resets, initial, keep):
    dy, dfinal, _ = gradients
    batch, length, dim = u.shape
    state, acc, chunk = A.shape[0], compute_dtype(u), chunk_length(batch, length, dim)
    chunks, blocks = -(-length // chunk), -(-dim // BLOCK_D)
    constants = _constants(A) | {"SOFTPLUS": use_softplus}
    dy = u.new_zeros(1, 1, dim).expand(u.shape) if dy is None else rows(dy)
    starts, ends = initial, None if dfinal is None else dfinal.contiguous()

    def new(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=acc)

    if chunks > 1:
        starts, behind = saved[0], ends
        ends, sums = new(batch, chunks, state, dim), new(batch, chunks, dim)
        launch(
            kernels.chunk_adjoints, batch * chunks * blocks, *strided(delta), *strided(z), *strided(C), *strided(dy),
            A, bias, lengths, resets, ends, sums, length, dim, chunk, on=u, **constants,
        )  # fmt: skip
        _combine(ends, sums, behind, A, _cuts(resets, lengths, chunk), reverse=True)

    du, ddelta = (zeros_behind(lengths, u, u.shape, tensor.dtype) for tensor in (u, delta))
    dz = None if z is None else zeros_behind(lengths, u, u.shape, z.dtype)
    dB, dC = (zeros_behind(lengths, u, (batch, blocks, length, state), acc) for _ in range(2))
    dA = new(batch, chunks, state, dim)
    dD = None if D is None else new(batch, chunks, dim)
    dbias = None if bias is None else new(batch, chunks, dim)
    dinitial = None if initial is None else new(batch, state, dim)
    launch(
        kernels.backward, batch * chunks * blocks,
        *strided(u), *strided(delta), *strided(z), *strided(B), *strided(C), *strided(dy),
        A, D, bias, lengths, resets, starts, ends, new(batch, -(-length // SUB), state, dim),
        du, ddelta, dz, dB, dC, dA, dD, dbias, dinitial, length, dim, chunk, on=u, SUB=SUB, **constants,
    )  # fmt: skip
    found = [
        du, ddelta, sum_partial(dA, (0, 1), A), sum_partial(dB, 1, B), sum_partial(dC, 1, C),
        sum_partial(dD, (0, 1), D), dz, sum_partial(dbias, (0, 1), bias), dinitial,
    ]  # fmt: skip
    return [gradient for gradient in found if gradient is not None]


selective_scan, selective_state_update = scan_functions("triton", _scan, _scan_backward, _starts_shape, upcast=False)
