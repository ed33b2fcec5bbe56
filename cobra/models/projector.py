"""Maps from vision features to image tokens. Adding one: docs/extending.md.

Parameter names are `projector.{0,2,4}`, as in the public Cobra weights (paper, section 3.2).

Shapes: B images, P patches, T image tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from cobra.config import ProjectorConfig
from cobra.errors import ConfigError, ShapeError


class GridPool(nn.Module):
    """Average the patches of a square grid down to a smaller square of tokens."""

    def __init__(self, side: int | None) -> None:
        """Take the tokens' side; None: half the patches', rounded up."""
        super().__init__()
        self.side = side

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, P, D] -> [B, T, D]."""
        pooled = nn.functional.adaptive_avg_pool2d(_as_grid(tokens), self._side(tokens.shape[1]))
        return pooled.flatten(2).transpose(1, 2)

    def num_tokens(self, num_patches: int) -> int:
        """Return T for P patches."""
        return self._side(num_patches) ** 2

    def _side(self, num_patches: int) -> int:
        patches = _grid_side(num_patches)
        side = math.ceil(patches / 2) if self.side is None else self.side
        if side > patches:
            raise ConfigError(
                f"model.projector.grid={side} is more than the {patches} x {patches} patches of the vision encoder; "
                f"use at most {patches}."
            )
        return side


class PositionMixer(nn.Module):
    """A depthwise 3 x 3 convolution over the square of tokens, added to them (LDPv2's "PEG", arXiv:2402.03766)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return tokens + self.peg(_as_grid(tokens)).flatten(2).transpose(1, 2)


def _as_grid(tokens: Tensor) -> Tensor:
    """[B, P, D] -> [B, D, side, side], row by row."""
    side = _grid_side(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def _grid_side(num_patches: int) -> int:
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ShapeError(
            f"{num_patches} patches do not fill a square grid, which the ldpv2 projectors pool; use square images "
            "with square patches, or another projector."
        )
    return side


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


def _ldpv2(vision_width: int, width: int, config: ProjectorConfig) -> nn.Sequential:
    return nn.Sequential(*_mlp([vision_width, width, width]), GridPool(config.grid), PositionMixer(width))


def _fused_ldpv2(vision_width: int, width: int, config: ProjectorConfig) -> nn.Sequential:
    layers = _mlp([vision_width, config.expansion * vision_width, width])
    return nn.Sequential(*layers, GridPool(config.grid), PositionMixer(width))


PROJECTORS: dict[str, Callable[[int, int, ProjectorConfig], nn.Sequential]] = {
    "linear": _linear,
    "gelu-mlp": _gelu_mlp,
    "fused-gelu-mlp": _fused_gelu_mlp,
    "ldpv2": _ldpv2,
    "fused-ldpv2": _fused_ldpv2,
}


class Projector(nn.Module):
    """Vision features [B, P, vision_width] -> image tokens [B, T, width]."""

    def __init__(self, config: ProjectorConfig, vision_width: int, width: int) -> None:
        super().__init__()
        self.projector = PROJECTORS[config.kind](vision_width, width, config)

    def forward(self, features: Tensor) -> Tensor:
        """[B, P, vision_width] -> [B, T, width]."""
        return self.projector(features)

    def num_tokens(self, num_patches: int) -> int:
        """Return how many image tokens, T, become of an image's patches.

        Raises:
            ShapeError: the projector pools a square grid and the patches fill none.
            ConfigError: the projector's grid is finer than the patches'.
        """
        for layer in self.projector:
            count = getattr(layer, "num_tokens", None)  # of a layer that makes fewer tokens, such as GridPool
            num_patches = num_patches if count is None else count(num_patches)
        return num_patches

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights: normal with variance 1 / fan in, zero biases.

        Image tokens then start at about unit size (root mean square 1.4 in the tiny model). PyTorch's default gives
        0.19 there, and a small Mamba is slow to look at such an image. The convolution of the ldpv2 kinds starts at
        zero: what it is added to passes unchanged until training finds a use for the neighbours.
        """
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, PositionMixer):
                for parameter in layer.parameters():
                    nn.init.zeros_(parameter)
