"""Weights of few bits, for reading them faster: 8 bits with a scale per row, 4 bits with a scale per 64 columns.

Symmetric and weight-only: a weight is a small integer times its group's scale, and products are computed in floating
point from what the integers stand for. `quantized_linear` is the definition of that product; backends have kernels for
it (`cobra.ops.fused.linear`), which read the integers instead of a dequantised copy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cobra.errors import ConfigError, NumericsError, ShapeError

GROUP = 64  # columns that share a scale, of 4-bit weights

_LARGEST = 1e18  # squares of a group's numbers can be added up in float32
_AT_ONCE = 2**18  # numbers that are quantised at once: candidates stay in the cache
# How far the largest number of a group is stretched over the 4-bit range of -8 to 7: beyond 8 it is clipped, and the
# many small ones are rounded finer. Each group takes the one with the least squared error. For normal numbers that is
# 4.5 % less than with 8 alone; ten times as many candidates would come to 5.6 %. Whether answers gain is not settled:
# the KL of a small trained model's was 0.0265 with these and 0.0260 with 8 alone; on bare prompts 0.062 and 0.082.
_STRETCHES = (7.0, 7.5, 8.0, 8.5, 9.0)


class QuantizedWeight(NamedTuple):
    """A matrix [out, in] of 8 or 4 bits a number.

    8 bits: int8 [out, in], one scale per row. 4 bits: groups of 64 columns, the last one filled up with zeros if `in`
    is no multiple of 64; a number is (nibble - 8) * scale, and byte j (0 to 31) of a group's 32 holds column j in its
    low nibble and column j + 32 in its high one. Scales may be negative.
    """

    values: Tensor  # 8 bits: int8 [out, in]; 4 bits: uint8 [out, 32 * groups]
    scales: Tensor  # float32; 8 bits: [out, 1]; 4 bits: [out, groups]
    bits: int
    shape: tuple[int, int]  # [out, in]

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes


def is_plain(tensor: Tensor, device: torch.device) -> bool:
    """Whether a kernel may read the tensor's memory in place: no subclass, on this device, contiguous."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device == device and tensor.is_contiguous()


def is_readable(weight: QuantizedWeight, device: torch.device) -> bool:
    """Whether a kernel may read the weight in place: plain tensors, of dtypes and sizes that fit `bits` and `shape`."""
    rows, width = weight.shape
    groups = -(-width // GROUP)
    expected = {
        8: (torch.int8, (rows, width), (rows, 1)),
        4: (torch.uint8, (rows, groups * GROUP // 2), (rows, groups)),
    }
    return (
        (weight.values.dtype, weight.values.shape, weight.scales.shape) == expected.get(weight.bits)
        and weight.scales.dtype == torch.float32
        and is_plain(weight.values, device)
        and is_plain(weight.scales, device)
    )


@torch.no_grad()
def check_finite(weight: Tensor, name: str = "The weight") -> None:
    """Refuse a matrix with numbers that no scale can stand for.

    Raises: NumericsError, which names the matrix.
    """
    largest = float(torch.stack(weight.aminmax()).abs().amax()) if weight.numel() > 0 else 0.0  # NaN if any is
    if not largest <= _LARGEST:
        raise NumericsError(
            f"{name} cannot be quantised: its largest number is {largest:g}, which has to be at most {_LARGEST:g}. "
            "The weights are damaged, or of a training that diverged: load others."
        )


@torch.no_grad()
def quantize(weight: Tensor, bits: int) -> QuantizedWeight:
    """Return the nearest matrix of `bits` bits a number: a copy, on the weight's device.

    Args:
        weight: [out, in], floating point, finite.
        bits: 8 or 4.

    Raises:
        ConfigError: `bits` is neither.
        ShapeError: the weight is no matrix of floating point numbers.
        NumericsError: it is not finite, or too large to measure errors in float32.
    """
    if bits not in (8, 4):
        raise ConfigError(f"bits={bits!r} must be 8 or 4.")
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ShapeError(f"The weight is {weight.dtype} {list(weight.shape)}, expected floating point [out, in].")
    check_finite(weight)
    shape = (weight.shape[0], weight.shape[1])
    quantize_rows = _to_8_bits if bits == 8 else _to_4_bits
    parts = [quantize_rows(rows.float()) for rows in weight.detach().split(max(1, _AT_ONCE // shape[1]))]
    values, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return QuantizedWeight(values, scales, bits, shape)


def _to_8_bits(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = _without_zeros(rows.abs().amax(dim=1, keepdim=True) / 127)
    return (rows / scales).round().to(torch.int8), scales


def _to_4_bits(rows: Tensor) -> tuple[Tensor, Tensor]:
    groups = F.pad(rows, (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))  # [out, groups, 64]
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    best_scale, least_error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for stretch in _STRETCHES:
        scale = _without_zeros(largest / -stretch)  # the largest on the longer side of the range
        error = (_rounded(groups, scale) * scale - groups).square().sum(dim=2, keepdim=True)
        best_scale = torch.where(error < least_error, scale, best_scale)
        least_error = torch.minimum(error, least_error)
    nibbles = (_rounded(groups, best_scale) + 8).to(torch.uint8)
    low, high = nibbles.chunk(2, dim=2)
    return (low | high << 4).flatten(1), best_scale.squeeze(2)


def _rounded(groups: Tensor, scale: Tensor) -> Tensor:
    return (groups / scale).round().clamp(-8, 7)


def _without_zeros(scales: Tensor) -> Tensor:
    """A row or group of zeros has any scale but zero."""
    return torch.where(scales == 0, 1.0, scales)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return the matrix [out, in] that a quantised one stands for, rounded once to `dtype`."""
    exact = torch.promote_types(dtype, torch.float32)
    scales = weight.scales.to(exact)
    if weight.bits == 8:
        return (weight.values.to(exact) * scales).to(dtype)
    groups = weight.values.unflatten(1, (-1, GROUP // 2))
    nibbles = torch.cat([groups & 15, groups >> 4], dim=2)
    matrix = ((nibbles.to(exact) - 8) * scales.unsqueeze(2)).flatten(1)
    return matrix[:, : weight.shape[1]].to(dtype)


def quantized_linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Multiply x [..., in] with the weight transposed, in x's dtype: [..., out]."""
    return F.linear(x, dequantize(weight, x.dtype))
