"""Low-rank adapters on the language model (Hu et al. 2021, arXiv:2106.09685): few numbers learn, the model is frozen.

An adapted module keeps its own weight and name, gets a child `adapter`, and adds the child's output to its own by a
forward hook. So the state has the plain model's keys plus `<module>.adapter.A` and `<module>.adapter.B`, and what
reads weights directly (`cobra.ops.fused`) sees the hook and steps aside. Adapters can be merged into the weights: in
the modules (`merge_adapters`), or in a state gathered from them (`merged_state`).

Order: weights first, and what freezes or casts whole parts; then `attach_adapters`; then compilation and sharding, as
both take modules and hooks as they find them. Frozen weights may be cast to 16 bits at any time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cobra.config import LORA_TARGETS, LoraConfig
from cobra.errors import CheckpointError, ConfigError
from cobra.models.mamba import MambaBlock
from cobra.models.quantized import is_quantized
from cobra.models.vlm import CobraVLM

EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"  # one tensor, so one adapter: the head's


class Adapter(nn.Module):
    """The low-rank part of a weight [out, in]: alpha / rank x B A.

    A [rank, in] starts random and B [out, rank] at zero, so that the adapted model starts as the plain one. Both are
    at least float32, as small updates of 16-bit numbers would be lost; they compute in the dtype of their input.
    """

    def __init__(self, weight: Tensor, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        (num_out, num_in), device = weight.shape, weight.device
        dtype = torch.promote_types(weight.dtype, torch.float32)
        # On the generator's device, so that a seed gives the same numbers wherever the weight is.
        drawn = torch.empty(config.rank, num_in, dtype=dtype, device=generator.device)
        bound = 1 / math.sqrt(num_in)  # Kaiming uniform with a = sqrt(5), as the authors and nn.Linear have it
        self.A = nn.Parameter(drawn.uniform_(-bound, bound, generator=generator).to(device))
        self.B = nn.Parameter(torch.zeros(num_out, config.rank, dtype=dtype, device=device))
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        self.hooks: list[RemovableHandle] = []

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the product of x [..., in] with the weight: [..., out]."""
        low_rank = F.linear(self.dropout(x), self.A.to(x.dtype)) * self.scale
        return F.linear(low_rank, self.B.to(low_rank.dtype))

    def look_up(self, ids: Tensor) -> Tensor:
        """What is added to the weight's rows `ids` [...]: [..., in]. Ids have no dropout."""
        return F.linear(F.embedding(ids, self.B) * self.scale, self.A.T)


def _adapt_product(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + module.adapter(inputs[0]).to(output.dtype)  # type: ignore[operator]


def _adapt_lookup(adapter: Adapter, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + adapter.look_up(inputs[0]).to(output.dtype)


def attach_adapters(model: CobraVLM, config: LoraConfig, generator: torch.Generator) -> None:
    """Freeze the language model and give it adapters that learn, in place; its outputs stay the same at first.

    The head shares its weight with the embedding, and so its adapter: the words are looked up in the adapted weight.

    Args:
        model: with its weights, on their device (the meta device too).
        config: rank, scale, dropout, and which projections of every block (and the head) are adapted.
        generator: of the adapters' fresh weights.

    Raises:
        ConfigError: the model has adapters already, or is quantised.
    """
    if is_quantized(model):
        raise ConfigError("Adapters do not fit a quantised model; load it without quantize to train it.")
    if has_adapters(model):
        raise ConfigError("The model has adapters already; merge them (merge_adapters) before attaching others.")
    llm = model.llm.requires_grad_(False)
    for linear in _targets(model, config):
        linear.adapter = adapter = Adapter(linear.weight, config, generator).train(linear.training)
        adapter.hooks.append(linear.register_forward_hook(_adapt_product))
        if linear is llm.lm_head:
            adapter.hooks.append(llm.backbone.embedding.register_forward_hook(partial(_adapt_lookup, adapter)))


def _targets(model: CobraVLM, config: LoraConfig) -> Iterator[nn.Linear]:
    names = [name for name in LORA_TARGETS if name in config.targets and name != "head"]  # each once, in one order
    for block in model.llm.backbone.layers:
        assert isinstance(block, MambaBlock)
        yield from (getattr(block.mixer, name) for name in names)
    if "head" in config.targets:
        yield model.llm.lm_head


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """All adapters, by the names of the modules that they adapt."""
    return {
        name.removesuffix(".adapter"): module for name, module in model.named_modules() if isinstance(module, Adapter)
    }


def has_adapters(model: nn.Module) -> bool:
    """Whether anything in the model is adapted."""
    return bool(adapters(model))


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add the adapters to the weights, in place, and remove them: the plain model again, and it computes the same.

    Not for a sharded model: there, gather the state and use `merged_state`. Weights of 16 bits round what is added.
    """
    for name, adapter in adapters(model).items():
        linear = model.get_submodule(name)
        weight = linear.get_parameter("weight")
        weight.copy_(_merge(weight, adapter.A, adapter.B, adapter.scale))  # in place: a tied weight stays tied
        for hook in adapter.hooks:
            hook.remove()
        del linear.adapter


@torch.no_grad()
def merged_state(state: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Return a model's state as it is after merging: the plain model's keys alone. `state` is left as it is.

    Args:
        state: whole tensors by name, of the model or a part of it, with or without the tied head's weight.
        config: of the adapters in it.

    Raises:
        CheckpointError: the state's adapters lack a part, or have another rank than `config`.
    """
    merged = {name: tensor for name, tensor in state.items() if not name.endswith((".adapter.A", ".adapter.B"))}
    adapted = sorted({name[: -len(".adapter.A")] for name in state.keys() - merged.keys()})
    for module in adapted:
        tied = {f"{module}.weight", f"{module}.weight".replace(HEAD, EMBEDDING)} & merged.keys()
        A, B = state.get(f"{module}.adapter.A"), state.get(f"{module}.adapter.B")
        if A is None or B is None or not tied:
            raise CheckpointError(
                f"The state lacks a part of {module}, which is adapted: it needs weight, adapter.A and adapter.B."
            )
        if (A.shape[0], B.shape[1]) != (config.rank, config.rank):
            raise CheckpointError(
                f"The adapter of {module} has A {list(A.shape)} and B {list(B.shape)}, but train.lora.rank="
                f"{config.rank}; give the config that it was trained with."
            )
        merged |= dict.fromkeys(tied, _merge(merged[min(tied)], A, B, config.alpha / config.rank))
    return merged


def _merge(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """weight [out, in] + scale x B [out, rank] A [rank, in], computed in float32 or better, in the weight's dtype."""
    dtype = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
    return torch.addmm(weight.to(dtype), B.to(dtype), A.to(dtype), alpha=scale).to(weight.dtype)
