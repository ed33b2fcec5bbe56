"""Models without values: built on the meta device, counted, and traced with one image of shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cobra.config import ModelConfig
from cobra.models.vlm import CobraVLM
from cobra.models.weights import self_contained


def build_on_meta(config: ModelConfig) -> CobraVLM:
    """Build the model on the meta device: all shapes, no values. Weights that the config names are not looked at."""
    with torch.device("meta"):
        model = CobraVLM(self_contained(config))
    return model.to("meta")  # also what a module makes on the CPU on purpose, such as constants


def count(module: nn.Module) -> int:
    """Return the number of parameters; tied weights once."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(kw_only=True)
class Trace:
    """What one forward pass through a module computes and keeps.

    Attributes:
        matmul: FLOPs of linear layers and convolutions: 2 x weights x output positions.
        attention: FLOPs of q k^T and of its product with v: 4 n^2 d for n tokens of width d, in every layer.
        first: the part of `matmul` in the first layer, which needs no gradient for what it reads.
        kept_values: numbers that all leaf modules read: what a backward pass has to keep.
        attended_values: tokens x width, summed over the attention layers: over the blocks that are run.
        attended_layers: their number.
    """

    matmul: int = 0
    attention: int = 0
    first: int = 0
    kept_values: int = 0
    attended_values: int = 0
    attended_layers: int = 0

    @property
    def forward(self) -> int:
        """FLOPs of the forward pass."""
        return self.matmul + self.attention

    @property
    def backward(self) -> int:
        """FLOPs of the backward pass of a trained module: twice the forward pass, less the first layer's input."""
        return 2 * self.forward - self.first


@dataclass(frozen=True, kw_only=True)
class ImageTrace:
    """One image on its way through a model: a trace of each tower and of the projector, and the tokens it becomes."""

    vision: list[Trace]
    projector: Trace
    tokens: int


@torch.no_grad()
def trace_image(model: CobraVLM) -> ImageTrace:
    """Run one image of shapes through the towers and the projector of a model on the meta device."""
    towers: list[Trace] = []
    for tower, settings in zip(model.vision.towers, model.config.vision.towers, strict=True):
        image = torch.empty(1, 3, settings.image_size, settings.image_size, dtype=torch.uint8, device="meta")
        with _traced(tower) as trace:
            tower(image)
        towers.append(trace)
    features = torch.empty(1, model.vision.num_patches, model.vision.width, device="meta")
    with _traced(model.projector) as projector:
        tokens = model.projector(features)
    return ImageTrace(vision=towers, projector=projector, tokens=int(tokens.shape[1]))


@contextmanager
def _traced(module: nn.Module) -> Iterator[Trace]:
    """Fill a Trace with what runs through `module` inside the context, for one row."""
    trace = Trace()

    def leaf(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            trace.kept_values += inputs[0].numel()
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            positions = output.numel() // layer.weight.shape[0]
            flops = 2 * layer.weight.numel() * positions
            trace.first = trace.first or flops
            trace.matmul += flops

    def attention(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tokens, width = inputs[0].shape[-2:]
        trace.attention += 4 * tokens**2 * width
        trace.attended_values += tokens * width
        trace.attended_layers += 1

    hooks: list[Any] = []
    for layer in module.modules():
        if next(layer.children(), None) is None:
            hooks.append(layer.register_forward_hook(leaf))
        elif hasattr(layer, "num_heads") and hasattr(layer, "qkv"):
            hooks.append(layer.register_forward_hook(attention))
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()
