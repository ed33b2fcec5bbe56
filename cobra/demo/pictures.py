"""Pictures for the page: examples to begin with, and boxes drawn on images."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from cobra.data.scenes import scattered_scene

SIZE = 256  # of an example
KINDS = (
    [("red", "circle")],
    [("blue", "rectangle")],
    [("green", "triangle")],
    [("black", "circle")],
    [("yellow", "triangle"), ("teal", "rectangle")],
)
MIN_SIDE = 480  # pixels of the longer side: a line on a smaller image would be coarse
RED = (230, 30, 60)


def examples() -> list[Image.Image]:
    """Draw scenes of coloured shapes, such as the tiny models know."""
    rng = np.random.default_rng(0)
    return [scattered_scene(rng, kinds, SIZE, (0.3, 0.5)).image() for kinds in KINDS]


def draw_box(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """Draw a box in 0..1 on a copy of an image, which is enlarged where it is small."""
    scale = max(1, round(MIN_SIDE / max(image.size)))
    canvas = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    corners = [side * share for side, share in zip(canvas.size * 2, box, strict=True)]
    ImageDraw.Draw(canvas).rectangle(corners, outline=RED, width=max(3, max(canvas.size) // 160))
    return canvas
