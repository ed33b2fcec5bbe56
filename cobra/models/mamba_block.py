"""One block of Mamba-1 over a sequence and for one token; shapes are named in `mamba.py`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cobra import ops
from cobra.config import LLMConfig
from cobra.models.quantized import QuantizedLinear
from cobra.ops.fused import BlockWeights
from cobra.ops.quantized import QuantizedWeight


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is no adapter, sharded or changed in another way: then it does what its weights say."""
    own = module.__dict__
    return type(module) is kind and not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


def _plain_weight(module: Any) -> Tensor | QuantizedWeight | None:
    """The weight of a projection that does nothing but multiply with it, else None."""
    if is_plain(module, QuantizedLinear):
        return module.quantized_weight
    if not is_plain(module, nn.Linear) or module._parameters["bias"] is not None:
        return None
    return module._parameters["weight"]


class RMSNormWeight(nn.Module):
    """The weight of an RMSNorm; the norm itself is fused with the residual addition in `ops.add_rms_norm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the normalised sum in `hidden`'s dtype, and the sum itself in float32. Both [..., D]."""
        return ops.add_rms_norm(hidden, residual, self.weight, self.eps)


class StepSize(nn.Linear):
    """The projection to step sizes; its output lacks the bias, which the scan adds in float32, before the softplus.

    A module that is called, and no product with its weight, so that hooks (adapters, sharding) take part.
    """

    def forward(self, input: Tensor) -> Tensor:
        """input [..., R] -> [..., E], without the bias."""
        return F.linear(input, self.weight)


class MambaMixer(nn.Module):
    """The selective state-space layer (paper, section 3.4 and figure 3)."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.rank, self.d_state = config.rank, config.d_state
        self.in_proj = nn.Linear(config.d_model, 2 * config.d_inner, bias=False)
        self.conv1d = nn.Conv1d(
            config.d_inner, config.d_inner, config.d_conv, groups=config.d_inner, padding=config.d_conv - 1
        )
        self.x_proj = nn.Linear(config.d_inner, self.rank + 2 * config.d_state, bias=False)
        self.dt_proj = StepSize(self.rank, config.d_inner)
        self.A_log = nn.Parameter(torch.empty(config.d_inner, config.d_state))
        self.D = nn.Parameter(torch.empty(config.d_inner))
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    def forward(
        self, hidden: Tensor, state: tuple[Tensor, Tensor] | None, lengths: Tensor | None, resets: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run over a sequence: hidden [B, L, D] -> [B, L, D], and the (conv, ssm) state after each row's end."""
        conv_state, ssm_state = state if state is not None else (None, None)
        x, z = self.in_proj(hidden).chunk(2, dim=-1)  # [B, L, E] each
        x, conv_state = ops.causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            lengths=lengths,
            resets=resets,
            initial_state=conv_state,
        )
        delta, B, C = self._select(x)
        y, ssm_state = ops.selective_scan(
            x,
            delta,
            self._A(),
            B,
            C,
            self.D,
            z=z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            lengths=lengths,
            resets=resets,
            initial_state=ssm_state,
        )
        return self.out_proj(y), (conv_state, ssm_state)

    def step(self, hidden: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run one token: hidden [B, D] -> [B, D]."""
        conv_state, ssm_state = state
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        x, conv_state = ops.causal_conv1d_update(conv_state, x, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        delta, B, C = self._select(x)
        y, ssm_state = ops.selective_state_update(
            ssm_state, x, delta, self._A(), B, C, self.D, z=z, delta_bias=self.dt_proj.bias, delta_softplus=True
        )
        return self.out_proj(y), (conv_state, ssm_state)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the input-dependent step size (before bias and softplus) [..., E], B and C [..., N]."""
        low_rank, B, C = self.x_proj(x).split([self.rank, self.d_state, self.d_state], dim=-1)
        return self.dt_proj(low_rank), B, C

    def _A(self) -> Tensor:
        return -torch.exp(self.A_log if self.A_log.dtype == torch.float64 else self.A_log.float())


class MambaBlock(nn.Module):
    """Pre-norm residual block: add, normalise, mix."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.norm = RMSNormWeight(config.d_model, config.norm_eps)
        self.mixer = MambaMixer(config)
        self.recomputes = False  # set by `MambaLM.checkpoint_activations`

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        state: tuple[Tensor, Tensor] | None,
        lengths: Tensor | None,
        resets: Tensor | None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """hidden [B, L, D] and the float32 residual stream (None at the first block) -> both, and the state."""
        if self.recomputes and self.training and torch.is_grad_enabled():
            # In here and not around the block, so that hooks on the block (sharding) see one forward pass, not two.
            return checkpoint(self._forward, hidden, residual, state, lengths, resets, use_reentrant=False)
        return self._forward(hidden, residual, state, lengths, resets)

    def _forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        state: tuple[Tensor, Tensor] | None,
        lengths: Tensor | None,
        resets: Tensor | None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        normed, total = self.norm(hidden, residual)
        mixed, after = self.mixer(normed, state, lengths, resets)
        return mixed, total, after

    def step(
        self, hidden: Tensor, residual: Tensor | None, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The same for one token, hidden [B, D]."""
        normed, total = self.norm(hidden, residual)
        mixed, after = self.mixer.step(normed, state)
        return mixed, total, after

    def plain_weights(self, eps: float) -> BlockWeights | None:
        """All parameters, for a kernel that runs whole blocks; None unless the block does just what they say."""
        # From the modules' own dictionaries: twelve times as fast as their attributes, which counts once per token.
        outer: dict[str, Any] = self._modules
        inner: dict[str, Any] = self.mixer._modules
        own: dict[str, Any] = self.mixer._parameters
        norm, conv = outer["norm"], inner["conv1d"]
        in_proj, x_proj, out_proj = (_plain_weight(inner[name]) for name in ("in_proj", "x_proj", "out_proj"))
        if (
            in_proj is None
            or x_proj is None
            or out_proj is None
            or not (
                is_plain(self, MambaBlock)
                and is_plain(self.mixer, MambaMixer)
                and is_plain(norm, RMSNormWeight)
                and is_plain(conv, nn.Conv1d)
                and is_plain(inner["dt_proj"], StepSize)
                and norm.eps == eps
            )
        ):
            return None
        dt_proj = inner["dt_proj"]._parameters
        if dt_proj["bias"] is None or conv._parameters["bias"] is None:
            return None
        return BlockWeights(
            norm=norm._parameters["weight"],
            in_proj=in_proj,
            conv_weight=conv._parameters["weight"],
            conv_bias=conv._parameters["bias"],
            x_proj=x_proj,
            dt_proj=dt_proj["weight"],
            dt_bias=dt_proj["bias"],
            A_log=own["A_log"],
            D=own["D"],
            out_proj=out_proj,
        )
