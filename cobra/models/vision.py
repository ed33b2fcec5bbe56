"""The vision encoder: one or several timm vision transformers over the same image.

Each tower gives the output of one inner block (the second-to-last in the paper, section 3.1) without final norm and
without class and register tokens; towers are joined on the channel axis.

Shapes: B images, P patches, V sum of the towers' widths.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor, nn
from typing_extensions import Self

from cobra.config import TowerConfig, VisionConfig, nearest
from cobra.errors import ConfigError, ShapeError
from cobra.models.image import ImageTransform

logger = logging.getLogger(__name__)


class VisionTower(nn.Module):
    """One timm vision transformer, read at one inner block.

    It starts with fresh weights, whatever the config names, and never downloads; `models/pretrained.py` loads. Built
    within `parameters_on_meta` its weights take no memory, but what it keeps beside them is computed: no file has it.

    Attributes:
        width: channels of a patch feature.
        num_patches: patch features of an image.
        data: timm's `mean`, `std` and `interpolation` of this encoder.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.model = _create(config)
        self.image_size = config.image_size
        self.width = int(self.model.embed_dim)  # type: ignore[arg-type]
        self.num_patches = int(self.model.patch_embed.num_patches)  # type: ignore[union-attr,arg-type]
        num_blocks = len(self.model.blocks)  # type: ignore[arg-type]
        self.layer = config.layer if config.layer >= 0 else num_blocks + config.layer
        if not 0 <= self.layer < num_blocks:
            raise ConfigError(f"model.vision: layer={config.layer} of {config.timm}, which has {num_blocks} blocks.")
        self.data: dict[str, Any] = resolve_data_config(pretrained_cfg=dict(self.model.pretrained_cfg))  # type: ignore[arg-type]
        self._set_normalisation(torch.device("cpu"))  # real numbers even inside `torch.device("meta")`

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] -> patch features [B, P, width]."""
        dtype = next(self.model.patch_embed.parameters()).dtype  # type: ignore[union-attr]
        pixels = ((images - self.mean) / self.std).to(dtype)
        features = self.model.forward_intermediates(  # type: ignore[operator]
            pixels, indices=[self.layer], norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        return features[0]

    def adapt_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a timm checkpoint's tensors as this tower's model wants them, by timm's own rules.

        The position table is resampled to this tower's grid (DINOv2's, made for 518 pixels, to 384), other layouts that
        timm knows are renamed, and the classifier, which no tower has, is left out.
        """
        adapt: Callable[..., dict[str, Tensor]] | None = None
        for kind in type(self.model).__mro__:  # a subclass may live in another module than its filter
            adapt = adapt or getattr(sys.modules[kind.__module__], "checkpoint_filter_fn", None)
        adapted = dict(tensors) if adapt is None else adapt(dict(tensors), self.model)
        heads = self.model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr,operator]
        dropped = {
            f"{head}.{end}" for head in ([heads] if isinstance(heads, str) else heads) for end in ("weight", "bias")
        }
        return {key: tensor for key, tensor in adapted.items() if key not in dropped}

    def _set_normalisation(self, device: torch.device) -> None:
        """Keep mean and standard deviation of a channel, in units of the 256 levels."""
        for key in ("mean", "std"):
            values = torch.tensor(self.data[key], dtype=torch.float32, device=device).view(3, 1, 1) * 255
            self.register_buffer(key, values, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the tower, but never round mean and std: `bfloat16` would put them half a level off."""
        super()._apply(fn, recurse)
        self._set_normalisation(self.mean.device)
        return self


class VisionEncoder(nn.Module):
    """All towers, joined on the channel axis.

    Attributes:
        width: channels of a patch feature, V.
        num_patches: patch features of an image, P; how many image tokens they become is the projector's choice.
        transform: PIL image to the pixels that `forward` reads.
    """

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
        self.transform = ImageTransform([(tower.image_size, tower.data) for tower in towers], config.resize)

    def forward(self, pixels: list[Tensor]) -> Tensor:
        """Encode images.

        Args:
            pixels: the views that `transform` makes, each uint8 [B, 3, H, W].

        Returns:
            Patch features [B, P, V].
        """
        views = self.transform.views
        if len(pixels) != len(views):
            raise ShapeError(f"pixels has {len(pixels)} views, this encoder needs {len(views)}.")
        for given, view in zip(pixels, views, strict=True):
            if given.ndim != 4 or given.shape[1:] != (3, view.size, view.size):
                raise ShapeError(f"pixels {list(given.shape)} must be [images, 3, {view.size}, {view.size}].")
        features = [tower(pixels[view]) for tower, view in zip(self.towers, self.transform.view_of_tower, strict=True)]
        return torch.cat(features, dim=-1)


def _create(config: TowerConfig) -> nn.Module:
    """Build the timm model and check that it is one that a tower can read."""
    _check_name(config.timm)
    arguments = {"pretrained": False, "num_classes": 0, "img_size": config.image_size}
    try:
        model = timm.create_model(config.timm, **(dict(config.args) | arguments))
    except Exception as error:  # timm checks no arguments: a wrong one fails wherever it is used first
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, KeyError):
            reason = f"it knows no {reason}; correct model.vision.towers[].args"
        no_vit = "img_size" in reason and "unexpected keyword" in reason
        hint = f" It is no vision transformer with a fixed image size; {_SUITABLE}" if no_vit else ""
        raise ConfigError(f"timm cannot make {config.timm!r} with {arguments | config.args}: {reason}.{hint}") from None
    patches = getattr(model, "patch_embed", None)
    grid = getattr(patches, "grid_size", None)
    parts = ("blocks", "forward_intermediates", "num_prefix_tokens")
    if grid is None or len(grid) != 2 or not all(hasattr(model, part) for part in parts):
        raise ConfigError(
            f"{config.timm!r} is a {type(model).__name__}, which has no sequence of blocks over one grid of patches; "
            f"{_SUITABLE}"
        )
    _check_size(config, _stride(patches))
    notes = " ".join(model.pretrained_cfg.get("notes") or ())  # type: ignore[union-attr,operator]
    if "natively QuickGELU" in notes and type(model.blocks[0].mlp.act).__name__ != "QuickGELU":  # type: ignore[index]
        logger.warning(
            "%s was trained with QuickGELU but computes GELU; name timm's variant %s for its true features.",
            config.timm,
            config.timm.replace("_clip_", "_clip_quickgelu_"),
        )
    return model


_SUITABLE = "choose one of timm.list_models('vit_*'), or of 'eva02_*', 'beit*' and 'deit*'."


def _check_name(name: str) -> None:
    """Refuse an architecture that timm does not know, or a tag of one."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ConfigError(f"timm knows no model {architecture!r}.{nearest(architecture, timm.list_models())}")
    known = get_arch_pretrained_cfgs(architecture)
    if tag and name not in known:
        listed = ", ".join(full for full in known if "." in full) or "none"
        raise ConfigError(f"timm knows no weights {tag!r} of {architecture!r}; it has {listed}.")


def _stride(patches: Any) -> int:
    """Pixels between neighbouring patches; more than the patch size where a convolutional stem comes first."""
    if hasattr(patches, "feat_ratio"):
        return int(patches.feat_ratio())
    return max(patches.patch_size)


def _check_size(config: TowerConfig, patch: int) -> None:
    """Refuse an image size that leaves pixels over, unless the config says that they may be lost."""
    size, rest = config.image_size, config.image_size % patch
    if rest and not config.ignore_rest:
        raise ConfigError(
            f"model.vision.towers: image_size={size} of {config.timm} is not divisible by its patch size {patch}; use "
            f"{' or '.join(str(n) for n in (size - rest, size - rest + patch) if n)}, or set ignore_rest=true to leave "
            f"the last {rest} pixels of each side unseen."
        )
