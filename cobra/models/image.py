"""PIL images to uint8 pixels. Normalisation happens on the device, inside each tower.

A *view* is one resized copy of an image. Towers that agree on size, interpolation and padding colour share a view, so
DINOv2 + SigLIP at the same size resize each image once.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cobra.config import RESIZE_STRATEGIES, one_of
from cobra.errors import DataError

log = logging.getLogger(__name__)

_PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
_WHITE = (255, 255, 255)
_ORIENTATION = 0x0112  # tag of EXIF
_TURNS = {  # EXIF orientation, TIFF 6.0: what brings the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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

    The pixels are those of timm's own transform (torchvision over Pillow, with antialiasing), bit for bit.
    """

    def __init__(self, towers: Sequence[tuple[int, Mapping[str, Any]]], strategy: str) -> None:
        """Take each tower's image size in pixels with its timm data config, and the resize strategy."""
        one_of("model.vision.resize", strategy, RESIZE_STRATEGIES)
        self.strategy = strategy
        wanted: list[View] = []
        for size, data in towers:
            one_of("model.vision: interpolation of timm's encoder", data["interpolation"], tuple(_PILLOW))
            fill = _fill(data["mean"]) if strategy == "letterbox" else (0, 0, 0)
            wanted.append(View(size=size, interpolation=data["interpolation"], fill=fill))
        self.views = list(dict.fromkeys(wanted))
        self.view_of_tower = [self.views.index(view) for view in wanted]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """Return one uint8 tensor [3, size, size] per view.

        Raises:
            DataError: the image does not decode, has no pixels, or is of a kind without defined colours.
        """
        image = to_rgb(image)
        return [torch.from_numpy(self._resize(image, view)) for view in self.views]

    def _resize(self, image: Image.Image, view: View) -> np.ndarray:
        longer = max(image.size)
        # Bars of equal width, as in the public code: an odd rest leaves one pixel, which the crop below takes.
        bars = [(longer - side) // 2 if self.strategy == "letterbox" else 0 for side in image.size]
        canvas = [side + 2 * bar for side, bar in zip(image.size, bars, strict=True)]
        naive = self.strategy == "resize-naive"
        full = [view.size if naive else view.size * whole // min(canvas) for whole in canvas]
        start = [round((side - view.size) / 2) for side in full]
        kernels = _kernels()
        if kernels is None:
            return _resize_with_pillow(image, view, bars, full, start)
        plans = zip(image.size, bars, full, start, strict=True)
        across, down = (kernels.make_axis(view.interpolation, *plan, view.size) for plan in plans)
        return kernels.resample(image, across, down, view.fill)


@cache
def _kernels() -> ModuleType | None:
    """The fast kernels; None where Numba cannot be imported. Pillow then gives the same pixels, slowly."""
    try:
        return importlib.import_module("cobra.ops.resample")
    except Exception as error:  # a Numba that does not fit this Python or NumPy raises anything
        log.warning("Images are resized by Pillow, several times slower: %s.", error)
        return None


def _resize_with_pillow(
    image: Image.Image, view: View, bars: list[int], full: list[int], start: list[int]
) -> np.ndarray:
    if any(bars):
        canvas = Image.new("RGB", (image.width + 2 * bars[0], image.height + 2 * bars[1]), view.fill)
        canvas.paste(image, (bars[0], bars[1]))
        image = canvas
    image = image.resize((full[0], full[1]), _PILLOW[view.interpolation])
    box = (start[0], start[1], start[0] + view.size, start[1] + view.size)
    return np.array(image.crop(box)).transpose(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return what a person would see: EXIF rotation applied, transparency on white, three channels of 8 bits.

    Whole numbers of more than 8 bits are taken as 16-bit grey, as PNG and TIFF store it.

    Raises:
        DataError: the image does not decode, has no pixels, or is of a kind without defined colours.
    """
    if 0 in image.size:
        raise DataError(f"An image of {image.width} x {image.height} has no pixels; leave it out.")
    try:
        image.load()
        orientation = _orientation(image)
        image = _without_transparency(image)
    except Exception as error:  # decoders of damaged files raise anything, and so does nonsense in `info`
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise DataError(
            f"The image of mode {image.mode} cannot be shown as RGB: {reason}. Convert it or leave it out."
        ) from None
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; damaged EXIF data is no reason to refuse a picture, and no viewer does."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # parsers of damaged metadata raise anything
        return 1


def _without_transparency(image: Image.Image) -> Image.Image:
    """Return the image as RGB, on white where it is transparent."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; scale them to 0 ... 255 as uint8")
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow alone would clip, not scale
        return _from_16_bits(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        shown = Image.new("RGB", rgba.size, _WHITE)
        shown.paste(rgba, mask=rgba.getchannel("A"))
        return shown
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"its values {low} ... {high} are not of 16 bits; scale them to 0 ... 255 as uint8")
    levels = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG: this one value is transparent
        levels[values == transparent] = 255
    return Image.fromarray(levels)


def _fill(mean: Sequence[float]) -> tuple[int, int, int]:
    red, green, blue = (int(channel * 255) for channel in mean)
    return red, green, blue
