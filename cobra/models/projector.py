"""Maps from vision features to image tokens. Adding one: a function and a line in `PROJECTORS`, and a YAML.

Parameter names are `projector.{0,2,4}`, as in the public Cobra weights (paper, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from cobra.config import ProjectorConfig


def _mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers of these widths with a GELU between each two."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.GELU(), nn.Linear(fan_in, fan_out)]
    return nn.Sequential(*layers[1:])


def _linear(vision_width: int, width: int, config: ProjectorConfig) -> nn.Sequential:
    return _mlp([vision_width, width])


def _gelu_mlp(vision_width: int, width: int, config: ProjectorConfig) -> nn.Sequential:
    return _mlp([vision_width, width, width])


def _fused_gelu_mlp(vision_width: int, width: int, config: ProjectorConfig) -> nn.Sequential:
    return _mlp([vision_width, config.expansion * vision_width, width, width])


PROJECTORS: dict[str, Callable[[int, int, ProjectorConfig], nn.Sequential]] = {
    "linear": _linear,
    "gelu-mlp": _gelu_mlp,
    "fused-gelu-mlp": _fused_gelu_mlp,
}


class Projector(nn.Module):
    """Vision features [B, P, vision_width] -> image tokens [B, P, width]."""

    def __init__(self, config: ProjectorConfig, vision_width: int, width: int) -> None:
        super().__init__()
        self.projector = PROJECTORS[config.kind](vision_width, width, config)

    def forward(self, features: Tensor) -> Tensor:
        """[B, P, vision_width] -> [B, P, width]."""
        return self.projector(features)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights: normal with variance 1 / fan in, zero biases.

        Image tokens then start at about unit size (root mean square 1.4 in the tiny model). PyTorch's default gives
        0.19 there, and a small Mamba is slow to look at such an image.
        """
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
                nn.init.zeros_(layer.bias)
