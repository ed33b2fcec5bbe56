"""What every kernel launch here needs: strides, outputs, and the device that the tensors are on."""

from typing import Any

import torch
from torch import Tensor


def strided(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A [batch, length, channels] tensor as kernels take it: pointer, stride of a row, stride of a step."""
    return (None, 0, 0) if tensor is None else (tensor, tensor.stride(0), tensor.stride(1))


def zeros_behind(lengths: Tensor | None, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An output: kernels leave what lies behind `lengths` as it is, so there it must be zero from the start."""
    return like.new_empty(shape, dtype=dtype) if lengths is None else like.new_zeros(shape, dtype=dtype)


def sum_partial(partial: Tensor | None, axes: int | tuple[int, ...], like: Tensor | None) -> Tensor | None:
    """The gradient of `like` from the sums that programs left of it; None where there is none."""
    return None if partial is None or like is None else partial.sum(axes).to(like.dtype)


def launch(kernel: Any, programs: int, *arguments: Any, on: Tensor, **constants: Any) -> None:
    """Run that many programs of a kernel on the device of the tensor `on`, which need not be the current one.

    Products and sums may be fused, which Triton 3.10 and later do only if asked to.
    """
    with torch.cuda.device_of(on):
        kernel[(programs,)](*arguments, enable_fp_fusion=True, **constants)
