"""Products of a large matrix with a few vectors: the matrix is read once, in 16-byte loads, and widened in registers.

How many vectors: a multiprocessor of an H200 gets 21 bytes of the matrix per cycle and does 128 float32 products, so
numbers of 2, 1 and 0.5 bytes leave time for 12, 6 and 3 vectors; registers for the sums end at `VECTOR_ROWS`. Beyond,
tensor cores take tiles of 16 vectors or more, each vector as two of half the precision. They do about 1,300 products
per cycle (mma, not wgmma): 2 times 64 vectors on 10 numbers of 2 bytes come to that, so `MAX_ROWS` is where the matrix
stops being the bottleneck and a library's blocked product should win. Products in float32 have no tensor core.

Block sizes are what the compiler turns into 16-byte loads without spilling registers (sm_80, sm_90), and `PROGRAMS` is
an estimate of what fills the GPU. Speed on a GPU has not been measured yet: `benchmarks/ops.py --only step`.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from cobra.ops.quantized import QuantizedWeight

from .launch import launch
from .step_kernels import project

VECTOR_ROWS = 4
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


def is_plain(tensor: Tensor, device: torch.device) -> bool:
    """Whether a kernel may read the tensor's memory in place: no subclass, on this device, contiguous."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device == device and tensor.is_contiguous()


def as_matrix(weight: Tensor | QuantizedWeight, rows: int, device: torch.device) -> Matrix | None:
    """None if there is no kernel for this weight and so many vectors."""
    if isinstance(weight, QuantizedWeight):
        matrix = Matrix(weight.values, weight.scales, weight.bits, weight.shape)
        fits = is_plain(weight.values, device) and is_plain(weight.scales, device)
    else:
        if weight.dim() != 2 or weight.dtype not in DTYPES:
            return None
        matrix = Matrix(weight, None, 16, (weight.shape[0], weight.shape[1]))
        fits = is_plain(weight, device) and (rows <= VECTOR_ROWS or weight.dtype != torch.float32)
    return matrix if fits and 1 <= rows <= MAX_ROWS and matrix.values.numel() > 0 else None


def _blocks(matrix: Matrix, rows: int) -> dict[str, int | bool]:
    size = matrix.values.dtype.itemsize
    if rows > VECTOR_ROWS:
        # 64 x 64 becomes wgmma on Hopper, and keeps the vectors' tile in registers
        block_r, block_k = (32, 128) if rows <= 16 else (64, 64)
        block_k = 32 if matrix.bits == 4 else block_k
        block_b = max(triton.next_power_of_2(rows), 16)
        return {"IN_TILES": True, "BLOCK_B": block_b, "BLOCK_R": block_r, "BLOCK_K": block_k, "num_stages": 4}
    block_r = min(16 // triton.next_power_of_2(rows), 8 if size > 1 else 16)
    block_k = 256 if matrix.bits == 4 else min(1024 // size, 512)
    return {"IN_TILES": False, "BLOCK_B": triton.next_power_of_2(rows), "BLOCK_R": block_r, "BLOCK_K": block_k}


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
        out, out_rows, matrix.shape[1], width, span, on=x, ROWS=rows, SPLITS=in_splits, PARTS=parts, EPS=eps,
        BITS=matrix.bits, TAPS=1 if taps is None else taps.shape[-1], **blocks,
    )  # fmt: skip
    return out


def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor | None:
    """See `cobra.ops.fused.linear`.

    Taken are floating point weights of 2 bytes and quantised ones up to `MAX_ROWS` rows, float32 up to `VECTOR_ROWS`;
    weights that are contiguous plain tensors. None, without a result, for anything else, sizes that disagree included.
    """
    if x.dim() != 2 or x.dtype not in DTYPES or type(x) is not Tensor:
        return None
    matrix = as_matrix(weight, x.shape[0], x.device)
    if matrix is None or matrix.shape[1] != x.shape[1]:
        return None
    out = product(matrix, x.contiguous()[None])
    return out[0] if out.shape[0] == 1 else out.sum(0)
