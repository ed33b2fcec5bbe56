"""The Mamba-1 language model (Gu and Dao 2023, arXiv:2312.00752), with the public weights' own parameter names.

What is unusual here: the model reads embeddings, not only token ids (image tokens come first), and every pass may
start from a `MambaState` and returns the next one, so a prefix is read once and continued many times. Rows of different
length are padded on the right; `lengths` keeps the padding out of the states. Or a row holds several texts one after
the other; `resets` keeps them apart.

Shapes: B batch, L length, D model width, E inner width (expand * D), N state size, K convolution width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cobra.config import LLMConfig
from cobra.errors import ConfigError, ShapeError
from cobra.models.mamba_block import MambaBlock, MambaMixer, RMSNormWeight, is_plain
from cobra.models.state import MambaState
from cobra.ops import fused


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
        """Token ids, int64 or int32, [B, L] -> embeddings [B, L, D]."""
        self._check_ids(input_ids, "[batch, length]")
        return self.backbone.embedding(input_ids)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V]."""
        head = self.lm_head
        can_be_fused = is_plain(head, nn.Linear) and head.bias is None and hidden.dtype == head.weight.dtype
        if can_be_fused and hidden.dim() == 2 and not torch.is_grad_enabled():
            logits = fused.linear(hidden, head.weight)
            if logits is not None:
                return logits.to(hidden.dtype)
        return head(hidden)

    def checkpoint_activations(self, every: int | None) -> None:
        """Trade time for memory in training: compute blocks again in the backward pass instead of keeping their inside.

        Args:
            every: 1 for all blocks, k for every k-th, counted from the first; None for none, as at the start.

        Raises:
            ConfigError: `every` is less than 1.
        """
        if every is not None and every < 1:
            raise ConfigError(f"every={every} must be at least 1 (all blocks), or None to recompute none.")
        for i, block in enumerate(self.backbone.layers):
            block.recomputes = every is not None and i % every == 0  # type: ignore[assignment]

    def forward(
        self,
        embeddings: Tensor,
        *,
        state: MambaState | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, MambaState]:
        """Read a sequence.

        Args:
            embeddings: [B, L, D], floating point; rows shorter than L are padded on the right with anything.
            state: what was read before, B rows, in any floating point dtype; None for the start of a text.
            lengths: int64 [B], real tokens per row; None: all L.
            resets: bool [B, L], true at the first token of each new text of a packed row, which then knows nothing of
                the texts before it. `state` belongs to what stands before a row's first reset. None: one text per row.

        Returns:
            Final-norm hidden states [B, L, D] (meaningless at pads), and the state after each row's last real token.

        Raises:
            ShapeError: embeddings, lengths or resets that do not fit, a state of another batch size, model or device.
        """
        width = self.config.d_model
        if embeddings.dim() != 3 or embeddings.shape[2] != width or not embeddings.is_floating_point():
            raise ShapeError(
                f"embeddings are {embeddings.dtype} {list(embeddings.shape)}, expected floating point "
                f"[batch, length, {width}]; token ids become embeddings by `embed`."
            )
        if state is not None:
            self._check_state(state, embeddings)
        hidden, residual, states = embeddings, None, []
        for i, block in enumerate(self.backbone.layers):
            before = None if state is None else (state.conv[i], state.ssm[i])
            hidden, residual, after = block(hidden, residual, before, lengths, resets)
            states.append(after)
        hidden, _ = self.backbone.norm_f(hidden, residual)
        return hidden, MambaState(*map(list, zip(*states, strict=True)))

    def step(self, input_ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Read one token per row: ids [B] -> hidden states [B, D] and the next state."""
        self._check_ids(input_ids, "[batch]")
        self._check_state(state, input_ids)
        embedded = self.backbone.embedding(input_ids)
        done = self._fused_step(embedded, state)
        if done is not None:
            hidden, residual, after = done
        else:
            hidden, residual, states = embedded, None, []
            for i, block in enumerate(self.backbone.layers):
                hidden, residual, both = block.step(hidden, residual, (state.conv[i], state.ssm[i]))  # type: ignore[operator]
                states.append(both)
            after = MambaState(*map(list, zip(*states, strict=True)))
        hidden, _ = self.backbone.norm_f(hidden, residual)
        return hidden.to(embedded.dtype), after

    def _fused_step(self, embedded: Tensor, state: MambaState) -> tuple[Tensor, Tensor, MambaState] | None:
        """All blocks in one kernel, if there is one and nothing but the blocks' own weights takes part."""
        if torch.is_grad_enabled():
            return None
        weights = [block.plain_weights(self.config.norm_eps) for block in self.backbone.layers]  # type: ignore[operator]
        if None in weights:
            return None
        found = fused.stack_step(weights, embedded, state.conv, state.ssm, self.config.norm_eps)
        if found is None:
            return None
        hidden, residual, conv, ssm = found
        return hidden, residual, MambaState([tensor.to(embedded.dtype) for tensor in conv], ssm)

    def _check_ids(self, input_ids: Tensor, axes: str) -> None:
        # Whether they are in the vocabulary is not looked at: on a GPU that would wait for the device.
        if input_ids.dim() != len(axes.split()) or input_ids.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"input_ids are {input_ids.dtype} {list(input_ids.shape)}, expected int64 {axes}.")

    def _check_state(self, state: MambaState, rows: Tensor) -> None:
        """Raise ShapeError unless `state` can precede `rows` [B, ...]; values are not looked at."""
        config, batch = self.config, rows.shape[0]
        found, layers = (len(state.conv), len(state.ssm)), config.num_layers
        if found != (layers, layers):
            raise ShapeError(
                f"state has conv and ssm of {found[0]} and {found[1]} layers, but this model has {layers}; "
                "it was made by another model."
            )
        needed_conv, needed_ssm = (batch, config.d_conv - 1, config.d_inner), (batch, config.d_inner, config.d_state)
        for i, (conv, ssm) in enumerate(zip(state.conv, state.ssm, strict=True)):
            if conv.shape != needed_conv or ssm.shape != needed_ssm:
                raise ShapeError(
                    f"state of layer {i} is conv {list(conv.shape)} and ssm {list(ssm.shape)}, but this model and "
                    f"{batch} rows need conv {list(needed_conv)} and ssm {list(needed_ssm)}; was it made by another "
                    "model, or for another batch? Rows are selected by state[rows], repeated by state.expand(count)."
                )
            if conv.device != rows.device or ssm.device != rows.device:
                raise ShapeError(
                    f"state of layer {i} is on {conv.device} (conv) and {ssm.device} (ssm), but the input is on "
                    f"{rows.device}; move it with state.to({str(rows.device)!r})."
                )
            if not (conv.is_floating_point() and ssm.is_floating_point()):
                raise ShapeError(f"state of layer {i} is {conv.dtype} and {ssm.dtype}, expected floating point dtypes.")

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights as the Mamba authors do (state-spaces/mamba: mamba_simple.py, mixer_seq_simple.py).

        | parameter | distribution |
        |---|---|
        | embedding (tied with the head) | normal, 0.02 |
        | in_proj, x_proj, conv1d | uniform, +-1 / sqrt(fan in) |
        | out_proj | the same, divided by sqrt(number of layers) |
        | dt_proj.weight | uniform, +-1 / sqrt(rank) |
        | dt_proj.bias | so that softplus(bias) is log-uniform in [0.001, 0.1] (their floor of 0.0001 is below it) |
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
        delta = torch.exp(draw * (log_max - log_min) + log_min)
        mixer.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # inverse of softplus
        mixer.A_log.copy_(torch.log(torch.arange(1, self.config.d_state + 1)).expand_as(mixer.A_log))
        nn.init.ones_(mixer.D)
        if self.config.init == "small":
            nn.init.normal_(mixer.in_proj.weight, std=mixer.in_proj.in_features**-0.5, generator=generator)
            nn.init.normal_(mixer.x_proj.weight[mixer.rank :], std=0.1, generator=generator)
