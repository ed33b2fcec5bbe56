"""PIL images to uint8 pixels. Normalisation happens on the device, inside each tower.

A *view* is one resized copy of an image. Towers that agree on size, interpolation and padding colour share a view, so
DINOv2 + SigLIP at the same size resize each image once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

_INTERPOLATION = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class View:
    """How one resized copy is made: a square of `size` pixels."""

    size: int
    interpolation: str
    fill: tuple[int, int, int]  # colour of the bars that `letterbox` adds


class ImageTransform:
    """Turns a PIL image into the views that a vision encoder reads.

    Strategies (public Cobra code's names):
        resize-naive: both sides to `size`, the aspect ratio is not kept.
        resize-crop: the shorter side to `size`, then the centre square.
        letterbox: bars of the tower's mean colour to a square, then to `size`.
    """

    def __init__(self, towers: Sequence[tuple[int, Mapping[str, Any]]], strategy: str) -> None:
        """Take each tower's image size in pixels with its timm `pretrained_cfg`, and the resize strategy."""
        self.strategy = strategy
        wanted = [
            View(
                size=size,
                interpolation=cfg["interpolation"],
                fill=_fill(cfg["mean"]) if strategy == "letterbox" else (0, 0, 0),
            )
            for size, cfg in towers
        ]
        self.views = list(dict.fromkeys(wanted))
        self.view_of_tower = [self.views.index(view) for view in wanted]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """Return one uint8 tensor [3, size, size] per view."""
        image = to_rgb(image)
        return [torch.from_numpy(np.array(self._resize(image, view))).permute(2, 0, 1) for view in self.views]

    def _resize(self, image: Image.Image, view: View) -> Image.Image:
        resample, square = _INTERPOLATION[view.interpolation], (view.size, view.size)
        if self.strategy == "letterbox" and image.width != image.height:
            left, top = ((max(image.size) - side) // 2 for side in image.size)  # an odd rest is cropped away below
            canvas = Image.new("RGB", (image.width + 2 * left, image.height + 2 * top), view.fill)
            canvas.paste(image, (left, top))
            image = canvas
        if self.strategy != "resize-naive" and image.width != image.height:
            scale = view.size / min(image.size)
            width, height = (max(view.size, int(side * scale)) for side in image.size)
            left, top = round((width - view.size) / 2), round((height - view.size) / 2)
            image = image.resize((width, height), resample)
            return image.crop((left, top, left + view.size, top + view.size))
        return image if image.size == square else image.resize(square, resample)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return what a person would see: EXIF rotation applied, transparency on white, three channels of 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (*_WHITE, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16 bits a channel: PIL alone would clip, not scale
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _fill(mean: Sequence[float]) -> tuple[int, int, int]:
    red, green, blue = (int(channel * 255) for channel in mean)
    return red, green, blue
