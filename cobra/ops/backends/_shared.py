"""What several backends need and no kernel does."""

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that an operation on this tensor computes in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous, else a copy of which that is true."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def last_inputs(x: Tensor, width: int, lengths: Tensor | None, initial: Tensor | None) -> Tensor:
    """The last `width - 1` inputs of a convolution at each row's own end; plain operations, so autograd knows them.

    x: [batch, length, dim]. initial: the inputs before the first, [batch, width - 1, dim]; zeros if None.
    """
    batch, length, dim = x.shape
    if lengths is None and length >= width - 1:
        return x[:, length - width + 1 :].clone()  # a view would keep all of x alive
    initial = x.new_zeros(batch, width - 1, dim) if initial is None else initial.to(x.dtype)
    if lengths is None:
        return torch.cat([initial[:, length:], x], 1)
    ends = lengths.clamp(0, length)
    at = (ends[:, None] + torch.arange(1 - width, 0, device=x.device))[..., None]  # negative before the start
    inside = x.gather(1, at.clamp(min=0).expand(-1, -1, dim))
    outside = initial.gather(1, (at + width - 1).clamp(max=width - 2).expand(-1, -1, dim))
    return torch.where(at >= 0, inside, outside)
