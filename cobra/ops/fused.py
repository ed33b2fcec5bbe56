"""Whole steps of a Mamba in one kernel, which some backends have on top of the five operations.

All functions return None, and have done nothing, where no such kernel fits: then the caller takes the ordinary path,
which computes the same. They read weights directly: whoever calls them makes sure that no hook, adapter or sharding
stands between a module and its weight. What watches all modules or all operations, such as a counter of FLOPs, sees
nothing of them; `use_backend("reference")` takes the ordinary path.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import fused_implementation
from .quantized import QuantizedWeight


class BlockWeights(NamedTuple):
    """The parameters of one block, with width D, inner width E, N states, rank R and K taps.

    The four projections share one dtype, norm and convolution another; the rest is float32. All of the three large
    projections may be quantised instead, each with bits of its own.
    """

    norm: Tensor  # [D]
    in_proj: Tensor | QuantizedWeight  # [2 E, D]
    conv_weight: Tensor  # [E, K] or [E, 1, K]
    conv_bias: Tensor  # [E]
    x_proj: Tensor | QuantizedWeight  # [R + 2 N, E]
    dt_proj: Tensor  # [E, R]
    dt_bias: Tensor  # [E]
    A_log: Tensor  # [E, N]
    D: Tensor  # [E]
    out_proj: Tensor | QuantizedWeight  # [D, E]


def _is_plain_inference(main: Tensor) -> bool:
    is_eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    return is_eager and not torch.is_autocast_enabled(main.device.type)


def stack_step(
    layers: Sequence[BlockWeights],
    hidden: Tensor,
    conv_states: Sequence[Tensor],
    ssm_states: Sequence[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]] | None:
    """Run one token through all blocks, in float32 whatever the weights' dtype.

    Args:
        hidden: embedding of the token, [batch, D].
        conv_states: per block, [batch, K - 1, E], oldest first; not changed.
        ssm_states: per block, [batch, E, N], float32, any strides; not changed.
        eps: of the norms.

    Returns: output of the last block and the residual stream before it, [batch, D] both, for the final norm; the new
        states, like the old ones; all float32, but the conv states may keep a shorter dtype. Or None, see the module.
    """
    kernel = fused_implementation("stack_step", hidden) if _is_plain_inference(hidden) else None
    return None if kernel is None else kernel(layers, hidden, conv_states, ssm_states, eps)


def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor | None:
    """Multiply a few rows with a large matrix at the speed at which it can be read, in float32.

    Args:
        x: [rows, in].
        weight: [out, in].

    Returns: x times weight transposed, [rows, out], float32. Or None, see the module.
    """
    kernel = fused_implementation("linear", x) if _is_plain_inference(x) else None
    return None if kernel is None else kernel(x, weight)
