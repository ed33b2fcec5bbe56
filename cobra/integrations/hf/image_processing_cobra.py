"""Pictures to the pixels that an exported Cobra model reads.

This file is shipped with every exported model and needs nothing but transformers, torch and Pillow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import load_image, make_flat_list_of_images
from transformers.utils.versions import require_version

require_version("transformers>=5.23", "pip install -U transformers")  # older ones place images otherwise

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
_WHITE = (255, 255, 255)


class CobraImageProcessor(BaseImageProcessor):
    """Resizes pictures; the model itself normalises them, in float32 whatever its dtype.

    Args:
        resize: "resize-naive" (both sides, the aspect ratio is not kept), "resize-crop" (the shorter side, then the
            centre square) or "letterbox" (bars to a square first).
        views: the resized copies that the towers read: `size` in pixels, `interpolation`, and `fill`, the bars' colour.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers declares it so)

    def __init__(self, resize: str = "resize-naive", views: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.resize = resize
        self.views = views or []

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open files and addresses, in lists too; a file keeps its transparency until `preprocess`."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        if isinstance(image_url_or_urls, str):
            is_file = len(image_url_or_urls) < 4096 and Path(image_url_or_urls).is_file()  # it may be base64
            return Image.open(image_url_or_urls) if is_file else load_image(image_url_or_urls)
        return image_url_or_urls

    def preprocess(self, images: Any, return_tensors: str | None = None) -> BatchFeature:
        """Return `pixel_values`, uint8 [images, 3, height, width], an image's views side by side, from their tops."""
        flat: list[Any] = make_flat_list_of_images(self.fetch_images(images))  # type: ignore[assignment]
        pictures = [_to_rgb(image) for image in flat]
        height, width = max(view["size"] for view in self.views), sum(view["size"] for view in self.views)
        pixels = torch.zeros(len(pictures), 3, height, width, dtype=torch.uint8)
        for row, picture in zip(pixels, pictures, strict=True):
            left = 0
            for view in self.views:
                size = view["size"]
                row[:, :size, left : left + size] = self._view(picture, **view)
                left += size
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _view(self, image: Image.Image, size: int, interpolation: str, fill: list[int]) -> torch.Tensor:
        if self.resize == "letterbox":
            bars = [(max(image.size) - side) // 2 for side in image.size]
            canvas = Image.new("RGB", (image.width + 2 * bars[0], image.height + 2 * bars[1]), tuple(fill))
            canvas.paste(image, (bars[0], bars[1]))
            image = canvas
        naive = self.resize == "resize-naive"
        width, height = (size if naive else size * side // min(image.size) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = _resize(image, width, height, _RESAMPLING[interpolation])
        image = image.crop((left, top, left + size, top + size))
        return torch.from_numpy(np.array(image).transpose(2, 0, 1))


def _resize(image: Image.Image, width: int, height: int, resampling: Image.Resampling) -> Image.Image:
    """Resize as Pillow 13 does, whichever is installed: the side that loses most goes first, where 12 begins across."""
    if image.height - height > max(2 * (image.width - width), 0):
        turned = image.transpose(Image.Transpose.TRANSPOSE).resize((height, width), resampling)
        return turned.transpose(Image.Transpose.TRANSPOSE)
    return image.resize((width, height), resampling)


def _to_rgb(image: Any) -> Image.Image:
    """Return what a person would see: EXIF rotation applied, transparency on white, 16-bit grey as 8 bits."""
    if not isinstance(image, Image.Image):
        image = to_pil_image(image)
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow alone would clip, not scale
        levels = ((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)
        return Image.fromarray(levels).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        shown = Image.new("RGB", rgba.size, _WHITE)
        shown.paste(rgba, mask=rgba.getchannel("A"))
        return shown
    return image.convert("RGB")
