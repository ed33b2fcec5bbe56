"""What several backends need and no kernel does."""

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that an operation on this tensor computes in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself if its last axis is contiguous, else a copy of which that is true."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def first_steps(resets: Tensor) -> Tensor:
    """int64 [batch, length]: the first step of the text that each step belongs to.

    Before a row's first reset the text is what came before the row; its first step is negative, further back than any
    filter reaches.
    """
    steps = torch.arange(resets.shape[1], device=resets.device)
    return torch.where(resets, steps, -(2**31)).cummax(1).values


def last_inputs(x: Tensor, width: int, lengths: Tensor | None, firsts: Tensor | None, initial: Tensor | None) -> Tensor:
    """The last `width - 1` inputs of a convolution at each row's own end; plain operations, so autograd knows them.

    x: [batch, length, dim]. firsts: see `first_steps`; what is older than the last text's first step is zero.
    initial: the inputs before the first, [batch, width - 1, dim]; zeros if None.
    """
    batch, length, dim = x.shape
    if lengths is None and firsts is None and length >= width - 1:
        return x[:, length - width + 1 :].clone()  # a view would keep all of x alive
    initial = x.new_zeros(batch, width - 1, dim) if initial is None else initial.to(x.dtype)
    if lengths is None and firsts is None:
        return torch.cat([initial[:, length:], x], 1)
    ends = torch.full((batch,), length, device=x.device) if lengths is None else lengths
    at = (ends[:, None] + torch.arange(1 - width, 0, device=x.device))[..., None]  # negative before the start
    inside = x.gather(1, at.clamp(min=0).expand(-1, -1, dim))
    outside = initial.gather(1, (at + width - 1).clamp(max=width - 2).expand(-1, -1, dim))
    inputs = torch.where(at >= 0, inside, outside)
    if firsts is None:
        return inputs
    first = torch.where(ends > 0, firsts.gather(1, (ends - 1).clamp(min=0)[:, None])[:, 0], -(2**31))
    return torch.where(at >= first[:, None, None], inputs, 0.0)
