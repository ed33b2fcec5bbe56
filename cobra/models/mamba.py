"""The Mamba-1 language model (Gu and Dao 2023, arXiv:2312.00752), with the public weights' own parameter names.

What is unusual here: the model reads embeddings, not only token ids (image tokens come first), and every pass may
start from a `MambaState` and returns the next one, so a prefix is read once and continued many times. Rows of different
length are padded on the right; `lengths` keeps the padding out of the states.

Shapes: B batch, L length, D model width, E inner width (expand * D), N state size, K convolution width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cobra import ops
from cobra.config import LLMConfig
from cobra.errors import ShapeError


@dataclass(frozen=True)
class MambaState:
    """What a Mamba knows after reading a prefix: constant size, whatever the prefix's length.

    Attributes:
        conv: per layer [B, K - 1, E]: the last inputs of the convolution, oldest first.
        ssm: per layer [B, E, N], float32 (float64 in a float64 model).
    """

    conv: list[Tensor]
    ssm: list[Tensor]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.ssm[0].shape[0]

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> MambaState:
        """Select, repeat or reorder rows: an int64 index tensor, a slice or a list of row numbers."""
        if isinstance(rows, slice):
            return MambaState([t[rows] for t in self.conv], [t[rows] for t in self.ssm])
        index = torch.as_tensor(rows, device=self.ssm[0].device)
        # Not t[index]: its gradient adds up repeated rows in any order, and a run could not be repeated bit for bit.
        return MambaState([t.index_select(0, index) for t in self.conv], [t.index_select(0, index) for t in self.ssm])

    @staticmethod
    def concat(states: Sequence[MambaState]) -> MambaState:
        """Stack the rows of several states."""
        return MambaState(
            [torch.cat(parts) for parts in zip(*(s.conv for s in states), strict=True)],
            [torch.cat(parts) for parts in zip(*(s.ssm for s in states), strict=True)],
        )

    def detach(self) -> MambaState:
        """Cut the autograd graph."""
        return MambaState([t.detach() for t in self.conv], [t.detach() for t in self.ssm])

    def to(self, device: torch.device | str) -> MambaState:
        """Move to a device."""
        return MambaState([t.to(device) for t in self.conv], [t.to(device) for t in self.ssm])


class RMSNormWeight(nn.Module):
    """The weight of an RMSNorm; the norm itself is fused with the residual addition in `ops.add_rms_norm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the normalised sum in `hidden`'s dtype, and the sum itself in float32. Both [..., D]."""
        return ops.add_rms_norm(hidden, residual, self.weight, self.eps)


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
        self.dt_proj = nn.Linear(self.rank, config.d_inner)
        self.A_log = nn.Parameter(torch.empty(config.d_inner, config.d_state))
        self.D = nn.Parameter(torch.empty(config.d_inner))
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    def forward(
        self, hidden: Tensor, state: tuple[Tensor, Tensor] | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run over a sequence: hidden [B, L, D] -> [B, L, D], and the (conv, ssm) state after each row's end."""
        conv_state, ssm_state = state if state is not None else (None, None)
        x, z = self.in_proj(hidden).chunk(2, dim=-1)  # [B, L, E] each
        x, conv_state = ops.causal_conv1d(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, lengths=lengths, initial_state=conv_state
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
        return F.linear(low_rank, self.dt_proj.weight), B, C

    def _A(self) -> Tensor:
        return -torch.exp(self.A_log if self.A_log.dtype == torch.float64 else self.A_log.float())


class MambaBlock(nn.Module):
    """Pre-norm residual block: add, normalise, mix."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.norm = RMSNormWeight(config.d_model, config.norm_eps)
        self.mixer = MambaMixer(config)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, state: tuple[Tensor, Tensor] | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """hidden [B, L, D] and the float32 residual stream (None at the first block) -> both, and the state."""
        normed, total = self.norm(hidden, residual)
        mixed, after = self.mixer(normed, state, lengths)
        return mixed, total, after

    def step(
        self, hidden: Tensor, residual: Tensor | None, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The same for one token, hidden [B, D]."""
        normed, total = self.norm(hidden, residual)
        mixed, after = self.mixer.step(normed, state)
        return mixed, total, after


class MambaBackbone(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(MambaBlock(config) for _ in range(config.num_layers))
        self.norm_f = RMSNormWeight(config.d_model, config.norm_eps)


class MambaLM(nn.Module):
    """Mamba with a tied output head."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = MambaBackbone(config)
        self.lm_head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.backbone.embedding.weight

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, L, D]."""
        return self.backbone.embedding(input_ids)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V]."""
        return self.lm_head(hidden)

    def forward(
        self, embeddings: Tensor, *, state: MambaState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """Read a sequence.

        Args:
            embeddings: [B, L, D]; rows shorter than L are padded on the right with anything.
            state: what was read before, B rows; None for the start of a text.
            lengths: int64 [B], real tokens per row; None: all L.

        Returns:
            Final-norm hidden states [B, L, D] (meaningless at pads), and the state after each row's last real token.

        Raises:
            ShapeError: a state of another batch size or another model.
        """
        if state is not None:
            self._check_state(state, embeddings.shape[0])
        hidden, residual, states = embeddings, None, []
        for i, block in enumerate(self.backbone.layers):
            before = None if state is None else (state.conv[i], state.ssm[i])
            hidden, residual, after = block(hidden, residual, before, lengths)
            states.append(after)
        hidden, _ = self.backbone.norm_f(hidden, residual)
        return hidden, MambaState(*map(list, zip(*states, strict=True)))

    def step(self, input_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Read one token per row: ids [B] -> hidden states [B, D] and the next state."""
        self._check_state(state, input_ids.shape[0])
        hidden, residual, states = self.embed(input_ids), None, []
        for i, block in enumerate(self.backbone.layers):
            hidden, residual, after = block.step(hidden, residual, (state.conv[i], state.ssm[i]))  # type: ignore[operator]
            states.append(after)
        hidden, _ = self.backbone.norm_f(hidden, residual)
        return hidden, MambaState(*map(list, zip(*states, strict=True)))

    def _check_state(self, state: MambaState, batch_size: int) -> None:
        config = self.config
        expected = (config.num_layers, batch_size, config.d_inner, config.d_state)
        found = (len(state.ssm), *state.ssm[0].shape)
        if found != expected:
            raise ShapeError(
                f"state is (layers, batch, dim, state) = {found}, but this model and batch need {expected}; "
                "was it made by another model, or for another batch?"
            )

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights as the Mamba authors do (state-spaces/mamba: mamba_simple.py, mixer_seq_simple.py).

        | parameter | distribution |
        |---|---|
        | embedding (tied with the head) | normal, 0.02 |
        | in_proj, x_proj, conv1d | uniform, +-1 / sqrt(fan in) |
        | out_proj | the same, divided by sqrt(number of layers) |
        | dt_proj.weight | uniform, +-1 / sqrt(rank) |
        | dt_proj.bias | so that softplus(bias) is log-uniform in [0.001, 0.1] |
        | A_log | log(1 .. N) in every channel |
        | D, norms | 1 |

        `config.init="small"` then draws three of them larger, which a small model trained from scratch needs to look
        at the image early: embedding normal 0.1, in_proj normal 1 / sqrt(fan in), rows of x_proj for B and C normal
        0.1. (Tiny model, train.max_steps=200, seed 0: 99.70 % on easy-VQA instead of 92.61 %.)
        """
        embedding_std = 0.1 if self.config.init == "small" else 0.02
        nn.init.normal_(self.backbone.embedding.weight, std=embedding_std, generator=generator)
        for module in self.modules():
            if isinstance(module, RMSNormWeight):
                nn.init.ones_(module.weight)
            elif isinstance(module, MambaMixer):
                self._init_mixer(module, generator)

    def _init_mixer(self, mixer: MambaMixer, generator: torch.Generator | None) -> None:
        def uniform(tensor: Tensor, bound: float) -> None:
            nn.init.uniform_(tensor, -bound, bound, generator=generator)

        for weight in (mixer.in_proj.weight, mixer.x_proj.weight, mixer.out_proj.weight):
            uniform(weight, 1 / math.sqrt(weight.shape[1]))
        mixer.out_proj.weight /= math.sqrt(self.config.num_layers)
        uniform(mixer.conv1d.weight, 1 / math.sqrt(self.config.d_conv))
        assert mixer.conv1d.bias is not None
        uniform(mixer.conv1d.bias, 1 / math.sqrt(self.config.d_conv))
        uniform(mixer.dt_proj.weight, mixer.rank**-0.5)
        log_min, log_max = math.log(0.001), math.log(0.1)
        draw = torch.rand(self.config.d_inner, generator=generator)
        delta = torch.exp(draw * (log_max - log_min) + log_min).clamp(min=1e-4)
        mixer.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # inverse of softplus
        mixer.A_log.copy_(torch.log(torch.arange(1, self.config.d_state + 1)).expand_as(mixer.A_log))
        nn.init.ones_(mixer.D)
        if self.config.init == "small":
            nn.init.normal_(mixer.in_proj.weight, std=mixer.in_proj.in_features**-0.5, generator=generator)
            nn.init.normal_(mixer.x_proj.weight[mixer.rank :], std=0.1, generator=generator)
