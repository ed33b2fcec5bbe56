"""A language model whose projections are stored in 8 or 4 bits: fewer bytes to read for every token.

Quantised are the projections of every block that are large, and the output head. What is small or sensitive stays as it
is: convolution, step sizes, the scan's own parameters, norms. So does the embedding, which is looked up and not read;
the head, which shares its weight in the plain model, gets a copy of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from cobra.config import QUANTIZED, one_of
from cobra.errors import ConfigError
from cobra.ops import fused
from cobra.ops.quantized import QuantizedWeight, check_finite, quantize, quantized_linear

_PROJECTIONS = ("in_proj", "x_proj", "out_proj", "lm_head")
_AT_LEAST_8_BITS = "x_proj"  # small, and decides on step sizes, B and C: a fifth of the KL of 4 bits, 3 % of the bytes


class QuantizedLinear(nn.Module):
    """Stands in for an `nn.Linear` without bias, for inference; its numbers are buffers, and no optimizer's."""

    values: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        made = quantize(weight, bits)
        self.register_buffer("values", made.values)
        self.register_buffer("scales", made.scales)
        self.bits, self.shape = bits, made.shape

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The weight [out, in]."""
        own: dict[str, Any] = self._buffers  # not by attribute, which is slow, and counts once per token
        return QuantizedWeight(own["values"], own["scales"], self.bits, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype.

        Few rows are multiplied with the integers themselves, where there is a kernel that does; for many a dequantised
        copy is made and dropped again.
        """
        if self.training and torch.is_grad_enabled():
            raise ConfigError(
                "The language model is quantised, which is for inference: its projections cannot learn, and what is "
                "before them would learn from rounded ones. Load the model without quantize to train it."
            )
        weight = self.quantized_weight
        product = fused.linear(x.reshape(-1, x.shape[-1]), weight)
        if product is None:
            return quantized_linear(x, weight)
        return product.to(x.dtype).reshape(*x.shape[:-1], self.shape[0])

    def extra_repr(self) -> str:
        """As `nn.Linear` has it."""
        return f"in_features={self.shape[1]}, out_features={self.shape[0]}, bits={self.bits}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move, but leave scales in float32 whatever the model is cast to."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self


def quantize_projections(llm: nn.Module, name: str) -> None:
    """Quantise the large projections and the head of a Mamba in place, one after the other; all of them or none.

    Args:
        llm: a `MambaLM` with its weights, on its device.
        name: "int8" or "int4", see `cobra.ops.quantized`.

    Raises:
        ConfigError: the name is unknown, or a projection is adapted, hooked or quantised already.
        NumericsError: a weight is NaN or infinite.
    """
    one_of("quantize", name, QUANTIZED)
    paths = [path for path, _ in llm.named_modules() if path.rpartition(".")[2] in _PROJECTIONS]
    for path in paths:
        _check(path, llm.get_submodule(path))
    for path in paths:
        module = llm.get_submodule(path)
        bits = 8 if path.rpartition(".")[2] == _AT_LEAST_8_BITS else QUANTIZED[name]
        llm.set_submodule(path, QuantizedLinear(cast(Tensor, module.weight), bits).train(module.training))


def _check(path: str, module: nn.Module) -> None:
    """Refuse a projection that does more than multiply with its weight, or has one that cannot be quantised."""
    if type(module) is not nn.Linear or any(True for _ in module.children()):
        raise ConfigError(
            f"{path} cannot be quantised: it is a {type(module).__name__}, adapted or quantised already. "
            "Merge adapters first (merge_adapters)."
        )
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or module.bias is not None:
        raise ConfigError(
            f"{path} cannot be quantised: it has hooks, a forward of its own or a bias, which would be lost. "
            "Remove them first, and add hooks again afterwards."
        )
    check_finite(module.weight, path)


def is_quantized(model: nn.Module) -> bool:
    """Whether anything in the model is quantised."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())
