"""Products of a large matrix with a few vectors: the matrix is read once, in 16-byte loads, and widened in registers.

How many vectors, by arithmetic for an H200, whose multiprocessors get 21 bytes of the matrix per cycle each:

    float32    128 products per cycle: time for 12 vectors with numbers of 2 bytes, 6 with 1; registers end at
               `VECTOR_ROWS`. A number of 4 bits costs 7 instructions, where there is time for 3: so few bits save
               memory, but less time than 8 bits
    tensor     about 1,300 products per cycle (mma): enough for 64 vectors, each as two of half the precision. But a
    cores      tile of 64 rows reads all vectors again, from the cache: beyond `TILE_ROWS` that takes longer than the
               matrix from memory, and a library with larger tiles should win. It has none for quantised weights,
               which would be widened in memory, at 5 bytes moved per number: these are taken up to `MAX_ROWS`.
               Numbers of 4 bytes have no tensor core that is as exact

For sm_80 and sm_90 the compiler makes 16-byte loads of the blocks chosen here (8 bytes for quantised weights in
tiles), and spills no registers. `PROGRAMS` is an estimate of what fills the GPU. Speed on a GPU has not been measured
yet: `benchmarks/ops.py --only step`.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from cobra.ops.quantized import QuantizedWeight, is_plain, is_readable

from .launch import launch
from .step_kernels import project

VECTOR_ROWS = 4
TILE_ROWS = 32
MAX_ROWS = 64
PROGRAMS = 1024  # at most by splitting; five fit on each of 132 multiprocessors
MAX_SPLITS = 16  # of the columns: whoever needs the product adds them up
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Matrix(NamedTuple):
    """A weight as the kernels take it."""

    values: Tensor
    scales: Tensor | None
    bits: int  # 16 stands for any floating point dtype
    shape: tuple[int, int]


def as_matrix(weight: Tensor | QuantizedWeight, rows: int, device: torch.device) -> Matrix | None:
    """None if there is no kernel for this weight and so many vectors."""
    if isinstance(weight, QuantizedWeight):
        if not is_readable(weight, device):
            return None
        matrix, most = Matrix(weight.values, weight.scales, weight.bits, weight.shape), MAX_ROWS
    elif weight.dim() == 2 and weight.dtype in DTYPES and is_plain(weight, device):
        matrix = Matrix(weight, None, 16, (weight.shape[0], weight.shape[1]))
        most = VECTOR_ROWS if weight.dtype == torch.float32 else TILE_ROWS
    else:
        return None
    return matrix if 1 <= rows <= most and matrix.values.numel() > 0 else None


def _blocks(matrix: Matrix, rows: int) -> dict[str, int]:
    size = matrix.values.dtype.itemsize
    if rows > VECTOR_ROWS:
        # 64 x 64 becomes wgmma on Hopper, and keeps the vectors' tile in registers
        block_r, block_k = (32, 128) if rows <= 16 else (64, 64)
        block_k = 32 if matrix.bits == 4 else block_k
        block_b = max(triton.next_power_of_2(rows), 16)
        return {"ROWS": 0, "BLOCK_B": block_b, "BLOCK_R": block_r, "BLOCK_K": block_k, "num_stages": 4}
    block_r = min(16 // triton.next_power_of_2(rows), 8 if size > 1 else 16)
    block_k = 256 if matrix.bits == 4 else min(1024 // size, 512)
    return {"ROWS": rows, "BLOCK_B": triton.next_power_of_2(rows), "BLOCK_R": block_r, "BLOCK_K": block_k}


def _splits(chunks: int, most: int) -> int:
    """Pieces of equal size, so that no program works longer than others."""
    return max(n for n in range(1, max(min(chunks, most, MAX_SPLITS), 1) + 1) if chunks % n == 0)


class Normalisation(NamedTuple):
    """What to do with vectors before they are multiplied: add the residual, note the sum, normalise it."""

    residual: Tensor | None
    weight: Tensor
    total: Tensor
    eps: float


class Convolution(NamedTuple):
    """What to do with the first half of the products; states [rows, taps - 1, out / 2] of any strides."""

    weight: Tensor
    bias: Tensor
    old: Tensor
    new: Tensor


def product(
    matrix: Matrix, x: Tensor, norm: Normalisation | None = None, convolution: Convolution | None = None
) -> Tensor:
    """Launch the kernel `project`.

    Args:
        x: [splits, rows, in], contiguous; vectors are the sums over the splits. More than one, or `norm`, only for at
            most `VECTOR_ROWS` rows.

    Returns: [splits, rows, out], partial sums, float32; with a convolution [2, rows, out / 2]: both halves, whole.
    """
    in_splits, rows, _ = x.shape
    blocks = _blocks(matrix, rows)
    parts = 1 if convolution is None else 2
    out_rows, width = matrix.shape[0] // parts, matrix.values.shape[1]
    programs = parts * triton.cdiv(out_rows, blocks["BLOCK_R"])
    chunks = triton.cdiv(width, blocks["BLOCK_K"])
    splits = 1 if parts == 2 else _splits(chunks, PROGRAMS // programs)
    span = chunks // splits * blocks["BLOCK_K"]
    out = torch.empty(splits * parts, rows, out_rows, device=x.device)
    residual, norm_weight, total, eps = norm or (None, None, None, 0.0)
    taps, bias, old, new = convolution or (None, None, None, None)
    launch(
        project, splits * programs, matrix.values, matrix.scales, x, residual, norm_weight, total, taps, bias,
        old, *(old.stride() if old is not None else (0, 0, 0)), new, *(new.stride() if new is not None else (0, 0, 0)),
        out, out_rows, matrix.shape[1], width, span, rows, on=x, SPLITS=in_splits, PARTS=parts, EPS=eps,
        BITS=matrix.bits, TAPS=1 if taps is None else taps.shape[-1], **blocks,
    )  # fmt: skip
    return out


def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor | None:
    """See `cobra.ops.fused.linear`.

    Taken are float32 weights up to `VECTOR_ROWS` rows, those of 2 bytes up to `TILE_ROWS`, quantised ones up to
    `MAX_ROWS`; weights that are contiguous plain tensors. None, without a result, for anything else, sizes that
    disagree included.
    """
    if x.dim() != 2 or x.dtype not in DTYPES or type(x) is not Tensor:
        return None
    matrix = as_matrix(weight, x.shape[0], x.device)
    if matrix is None or matrix.shape[1] != x.shape[1]:
        return None
    out = product(matrix, x.contiguous()[None])
    return out[0] if out.shape[0] == 1 else out.sum(0)
