"""Toy scenes: plain shapes on a light background, rendered together with their ground truth.

The tiny vision towers learn from them. A scene is a pure function of a NumPy generator, so a seed names a data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, floor, hypot, log, sqrt

import numpy as np
from PIL import Image

from cobra.errors import DataError

RGB = tuple[int, int, int]

SHAPES = ("circle", "rectangle", "triangle")
COLORS: dict[str, RGB] = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}

OVERSAMPLE = 4  # sample points along a pixel's side: an edge pixel has one of 17 shares of coverage
SHADE = 16  # a painted channel lies at most this far from its named colour
LIGHT = 226  # every channel of a background is at least this bright
SIDES = (0.12, 0.55)  # shortest and longest side of an object, as a share of the picture's side
TRIES = 40  # places tried for an object before the whole scene is begun again


@dataclass(frozen=True)
class Item:
    """One object. `shape` and `color` name it, `rgb` is its paint, `box` is left, top, right, bottom in pixels.

    A circle fills its box as an ellipse does; a triangle stands on the bottom edge, its tip at the middle of the top.
    """

    shape: str
    color: str
    rgb: RGB
    box: tuple[float, float, float, float]

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.color} {self.shape}"

    @property
    def center(self) -> tuple[float, float]:
        """The middle of the box, x and y."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def area(self) -> float:
        """The area of the box."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)

    def gap(self, other: Item) -> float:
        """The distance between two boxes, 0 where they touch or overlap."""
        return hypot(*(max(0.0, self.box[i] - other.box[i + 2], other.box[i] - self.box[i + 2]) for i in range(2)))

    def coverage(self, size: int) -> np.ndarray:
        """The share of each pixel that the object covers, in a picture of `size` pixels: float64 [size, size]."""
        left, top, right, bottom = self.box
        columns, u = _samples(left, right, size)
        rows, v = _samples(top, bottom, size)
        v = v[:, None]
        if self.shape == "circle":
            inside = u * u + v * v <= 1
        elif self.shape == "rectangle":
            inside = (abs(u) <= 1) & (abs(v) <= 1)
        elif self.shape == "triangle":
            inside = (2 * abs(u) <= v + 1) & (v <= 1)
        else:
            known = ", ".join(SHAPES)
            raise DataError(f"A scene cannot hold the shape {self.shape!r}. Its shape must be one of {known}.")
        share = np.zeros((size, size))
        height, width = share[rows, columns].shape
        share[rows, columns] = inside.reshape(height, OVERSAMPLE, width, OVERSAMPLE).mean((1, 3))
        return share


@dataclass(frozen=True)
class Scene:
    """Objects on a plain background of `size` x `size` pixels; later objects cover earlier ones."""

    items: tuple[Item, ...]
    background: RGB
    size: int

    def pixels(self) -> np.ndarray:
        """The antialiased picture: uint8 [size, size, 3]."""
        canvas = np.full((self.size, self.size, 3), self.background, float)
        for item in self.items:
            canvas += item.coverage(self.size)[..., None] * (item.rgb - canvas)
        return np.rint(canvas).astype(np.uint8)

    def image(self) -> Image.Image:
        """The picture for an image processor."""
        return Image.fromarray(self.pixels())


def _samples(low: float, high: float, size: int) -> tuple[slice, np.ndarray]:
    """The pixels that low..high touches along one axis, and their sample points in units where it is -1..1."""
    first, last = (min(max(edge, 0), size) for edge in (floor(low), ceil(high)))
    points = first + (np.arange((last - first) * OVERSAMPLE) + 0.5) / OVERSAMPLE
    return slice(first, last), (2 * points - low - high) / (high - low)


def _rgb(values: np.ndarray) -> RGB:
    red, green, blue = np.clip(values, 0, 255).tolist()
    return red, green, blue


def random_item(rng: np.random.Generator, size: int) -> Item:
    """One object of any shape, colour, size and place that lies wholly in a picture of `size` pixels."""
    shape = str(rng.choice(SHAPES))
    color = str(rng.choice(list(COLORS)))
    return _place(rng, shape, color, size, SIDES)


def _place(rng: np.random.Generator, shape: str, color: str, size: int, sides: tuple[float, float]) -> Item:
    rgb = _rgb(COLORS[color] + rng.integers(-SHADE, SHADE, 3, endpoint=True))
    # Uniform on a logarithmic scale, for many small objects: they are the hard ones to tell apart.
    width, height = (size * exp(rng.uniform(log(sides[0]), log(sides[1]))) for _ in range(2))
    if shape == "circle":
        height = width
    elif shape == "triangle":
        height = width * sqrt(3) / 2  # equilateral
    left, top = rng.uniform(0, size - width), rng.uniform(0, size - height)
    return Item(shape, color, rgb, (left, top, left + width, top + height))


def random_scene(rng: np.random.Generator, size: int = 64) -> Scene:
    """A scene with one random object on a random light background."""
    background = _background(rng)
    return Scene((random_item(rng, size),), background, size)


def scattered_scene(
    rng: np.random.Generator, kinds: Sequence[tuple[str, str]], size: int, sides: tuple[float, float]
) -> Scene:
    """A scene whose objects do not touch each other.

    Args:
        rng: draws places, sizes and shades.
        kinds: colour and shape of each object.
        size: side of the picture in pixels.
        sides: shortest and longest side of an object, as a share of the picture's side.
    """
    background = _background(rng)
    while True:  # objects that were placed badly leave no room for the others
        items: list[Item] = []
        for color, shape in kinds:
            places = (_place(rng, shape, color, size, sides) for _ in range(TRIES))
            found = next((item for item in places if all(item.gap(other) >= 1 for other in items)), None)
            if found is None:
                break
            items.append(found)
        else:
            return Scene(tuple(items), background, size)


def _background(rng: np.random.Generator) -> RGB:
    return _rgb(rng.integers(LIGHT, 255, 3, endpoint=True))
