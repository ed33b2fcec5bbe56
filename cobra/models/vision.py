"""The vision encoder: one or several timm vision transformers over the same image.

Each tower gives the output of one inner block (the second-to-last in the paper, section 3.1) without final norm and
without class and register tokens; towers are joined on the channel axis.

Shapes: B images, P patches, V sum of the towers' widths.
"""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from cobra.config import TowerConfig, VisionConfig
from cobra.errors import ConfigError, ShapeError
from cobra.models.image import ImageTransform


class VisionTower(nn.Module):
    """One timm vision transformer, read at one inner block."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        arguments = {"pretrained": config.weights == "timm", "num_classes": 0, "img_size": config.image_size}
        try:
            self.model = timm.create_model(config.timm, **(dict(config.args) | arguments))
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"timm cannot make {config.timm!r} with {arguments | config.args}: {reason}") from None
        num_blocks = len(self.model.blocks)  # type: ignore[arg-type]
        self.layer = config.layer if config.layer >= 0 else num_blocks + config.layer
        if not 0 <= self.layer < num_blocks:
            raise ConfigError(f"model.vision: layer={config.layer} of {config.timm}, which has {num_blocks} blocks.")
        self.width = int(self.model.embed_dim)  # type: ignore[arg-type]
        self.num_patches = int(self.model.patch_embed.num_patches)  # type: ignore[union-attr,arg-type]
        cfg = self.model.pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(3, 1, 1) * 255, persistent=False)  # type: ignore[index]
        self.register_buffer("std", torch.tensor(cfg["std"]).view(3, 1, 1) * 255, persistent=False)  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] -> patch features [B, P, width]."""
        pixels = ((images - self.mean) / self.std).to(self.model.patch_embed.proj.weight.dtype)  # type: ignore[union-attr,arg-type]
        features = self.model.forward_intermediates(  # type: ignore[operator]
            pixels, indices=[self.layer], norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        return features[0]


class VisionEncoder(nn.Module):
    """All towers, joined on the channel axis."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.towers = nn.ModuleList(VisionTower(tower) for tower in config.towers)
        towers: list[VisionTower] = list(self.towers)  # type: ignore[arg-type]
        counts = {tower.num_patches for tower in towers}
        if len(counts) > 1:
            listed = ", ".join(f"{c.timm}: {t.num_patches}" for c, t in zip(config.towers, towers, strict=True))
            raise ConfigError(f"Towers must see the same number of patches to be joined, but have {listed}.")
        self.num_patches = counts.pop()
        self.width = sum(tower.width for tower in towers)
        self.transform = ImageTransform(
            [(c.image_size, dict(t.model.pretrained_cfg)) for c, t in zip(config.towers, towers, strict=True)],  # type: ignore[arg-type]
            config.resize,
        )

    def forward(self, pixels: list[Tensor]) -> Tensor:
        """Encode images.

        Args:
            pixels: the views that `transform` makes, each uint8 [B, 3, H, W].

        Returns:
            Patch features [B, P, V].
        """
        if len(pixels) != len(self.transform.views):
            raise ShapeError(f"pixels has {len(pixels)} views, this encoder needs {len(self.transform.views)}.")
        features = [tower(pixels[view]) for tower, view in zip(self.towers, self.transform.view_of_tower, strict=True)]
        return torch.cat(features, dim=-1)
