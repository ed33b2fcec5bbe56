"""Resizing of 8-bit RGB images: bit for bit Pillow's result, several times faster.

Pillow resamples in two passes with weights rounded to 22 binary places and a byte between the passes. The weights here
are computed in the same order of float64 operations and everything after them is whole numbers, so any order of the
sums gives the same bytes. The speed comes from the order: lanes of a vector are 32 rows of the image in the first pass
and neighbouring columns in the second, where Pillow computes pixel by pixel.

What Pillow cannot do without an intermediate image is free here: an output that is cut out of a larger one, and bars
of one colour around the input, for which their weights are summed ahead.
The result is that of Pillow 13, whichever is installed: until 12 the horizontal pass always came first, so images that
lose much more height than width differ by a few levels there (https://github.com/python-pillow/Pillow/pull/9549).
Source of the weights: Pillow, `src/libImaging/Resample.c`, `precompute_coeffs` and `normalize_coeffs_8bpc`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from PIL import Image

_BITS = 22  # Pillow's PRECISION_BITS for 8-bit channels
_HALF = np.int32(1 << (_BITS - 1))
_BYTE = np.uint32(255)
_GREEN, _BLUE = np.uint32(8), np.uint32(16)  # where they stand in a pixel of four bytes
_ROWS = 32  # resampled at once in the first pass
_STRIP_PIXELS = 1 << 20  # copied out of Pillow's memory at once: 4 MiB

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Axis:
    """How each output position along one axis is summed from input positions.

    Attributes:
        lost: pixels by which the input, with its bars, is longer than the output that these positions are cut from.
        first, count: int32 [n], the input positions that output position x reads.
        weights: int32 [n, taps], units of 2 ** -22.
        outside: int32 [n], the weight of positions that lie in the bars beside the input.
    """

    lost: int
    first: NDArray[np.int32]
    count: NDArray[np.int32]
    weights: NDArray[np.int32]
    outside: NDArray[np.int32]


def _triangle(x: Floats) -> Floats:
    return np.where(np.abs(x) < 1.0, 1.0 - np.abs(x), 0.0)


def _cubic(x: Floats) -> Floats:
    x, a = np.abs(x), -0.5
    inner = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, inner, np.where(x < 2.0, outer, 0.0))


def _lanczos(x: Floats) -> Floats:
    return np.where((x >= -3.0) & (x < 3.0), np.sinc(x) * np.sinc(x / 3), 0.0)


# Half the width of the filter in output pixels, and its shape. "nearest" has none: it copies one pixel.
FILTERS: dict[str, tuple[float, Callable[[Floats], Floats]]] = {
    "bilinear": (1.0, _triangle),
    "bicubic": (2.0, _cubic),
    "lanczos": (3.0, _lanczos),
}


@lru_cache(maxsize=64)
def make_axis(interpolation: str, size: int, bar: int, full: int, start: int, wanted: int) -> Axis:
    """Plan one axis.

    Args:
        interpolation: "nearest" or a key of `FILTERS`.
        size: pixels of the input.
        bar: pixels of fill before the input and after it.
        full: pixels that input and bars together are resized to.
        start, wanted: which of them are kept.
    """
    canvas = size + 2 * bar
    scale = canvas / full
    if interpolation == "nearest":
        steps = np.full(start + wanted, scale)
        steps[0] = scale * 0.5
        first = np.add.accumulate(steps)[start:].astype(np.int64)
        count, taps = np.ones_like(first), np.ones((wanted, 1))
    else:
        radius, shape = FILTERS[interpolation]
        stretch = max(scale, 1.0)
        support = radius * stretch
        center = (np.arange(start, start + wanted) + 0.5) * scale
        first = np.maximum((center - support + 0.5).astype(np.int64), 0)
        count = np.minimum((center + support + 0.5).astype(np.int64), canvas) - first
        k = np.arange(count.max())
        taps = shape((k + first[:, None] - center[:, None] + 0.5) * (1.0 / stretch))
        taps = np.where(k < count[:, None], taps, 0.0)
        taps = taps / np.add.accumulate(taps, axis=1)[:, -1:]  # summed from left to right, as Pillow does
    fixed = np.trunc(np.where(taps < 0, -0.5, 0.5) + taps * (1 << _BITS)).astype(np.int32)
    return _without_bars(canvas - full, first - bar, count, fixed, size)


def _without_bars(
    lost: int, first: NDArray[np.int64], count: NDArray[np.int64], weights: NDArray[np.int32], size: int
) -> Axis:
    """Sum the weights of positions outside of [0, size) and keep the others."""
    skipped = np.minimum(np.maximum(-first, 0), count)
    kept = np.maximum(np.minimum(first + count, size) - (first + skipped), 0)
    k = np.arange(weights.shape[1])
    positions = k + skipped[:, None]
    inside = np.where(
        k < kept[:, None], np.take_along_axis(weights, np.minimum(positions, weights.shape[1] - 1), axis=1), 0
    )
    inside = np.ascontiguousarray(inside[:, : max(int(kept.max()), 1)], dtype=np.int32)
    first = np.where(kept > 0, first + skipped, np.clip(first, 0, size - 1))  # reads nothing, but names a real pixel
    outside = weights.sum(axis=1, dtype=np.int64) - inside.sum(axis=1, dtype=np.int64)
    return Axis(lost, first.astype(np.int32), kept.astype(np.int32), inside, outside.astype(np.int32))


def resample(image: Image.Image, columns: Axis, rows: Axis, fill: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return `image`, of mode RGB, resampled to [3, rows, columns] bytes."""
    if rows.lost > max(2 * columns.lost, 0):  # then Pillow's vertical pass is the first
        turned = _resample(image, rows, columns, fill, turn=True)
        return torch.from_numpy(turned).transpose(1, 2).contiguous().numpy()  # NumPy takes several times as long
    return _resample(image, columns, rows, fill, turn=False)


def _resample(
    image: Image.Image, first: Axis, second: Axis, fill: tuple[int, int, int], *, turn: bool
) -> NDArray[np.uint8]:
    """Resample along one axis, then along the other: of each row first, or with `turn` of each column."""
    length, other = image.size[::-1] if turn else image.size
    begin, end = int(second.first.min()), int((second.first + second.count).max())  # no others are looked at
    end = max(end, begin + 1)
    middle = np.empty((3, end - begin, len(first.first)), np.uint8)
    color = np.array(fill, np.int32)
    strip = max(_STRIP_PIXELS // length // _ROWS, 1) * _ROWS
    for start in range(begin, end, strip):
        stop = min(start + strip, end)
        part = image
        if (start, stop) != (0, other):
            part = image.crop((start, 0, stop, length) if turn else (0, start, length, stop))
        pixels = np.frombuffer(part.tobytes("raw", "RGBX"), np.uint32).reshape(part.height, part.width)
        to = middle[:, start - begin : stop - begin]
        _resample_rows(pixels.T if turn else pixels, first.first, first.count, first.weights, first.outside, color, to)
    out = np.empty((3, len(second.first), len(first.first)), np.uint8)
    starts = second.first - np.int32(begin)
    _resample_columns(middle, starts, second.count, second.weights, second.outside, color, out)
    return out


@njit(nogil=True, cache=True, inline="always")
def _to_byte(total):
    return min(max(total >> _BITS, 0), 255)


@njit(nogil=True, cache=True)
def _resample_rows(pixels, first, count, weights, outside, fill, out):
    """uint32 pixels [height, width] -> bytes [3, height, n]: every row, by blocks with the rows as lanes."""
    height, width = pixels.shape
    n = out.shape[2]
    block = np.zeros((width, _ROWS), np.uint32)  # of the input, turned
    done = np.empty((n, _ROWS), np.uint32)
    red, green, blue = np.empty(_ROWS, np.int32), np.empty(_ROWS, np.int32), np.empty(_ROWS, np.int32)
    for top in range(0, height, _ROWS):
        valid = min(_ROWS, height - top)
        for left in range(0, width, 16):  # a cache line of each row
            for y in range(valid):
                row = pixels[top + y]
                for x in range(left, min(left + 16, width)):
                    block[x, y] = row[x]
        for x in range(n):
            red[:] = _HALF + fill[0] * outside[x]
            green[:] = _HALF + fill[1] * outside[x]
            blue[:] = _HALF + fill[2] * outside[x]
            for j in range(count[x]):
                line = block[first[x] + j]
                weight = weights[x, j]
                for y in range(_ROWS):
                    pixel = line[y]
                    red[y] += np.int32(pixel & _BYTE) * weight
                    green[y] += np.int32((pixel >> _GREEN) & _BYTE) * weight
                    blue[y] += np.int32((pixel >> _BLUE) & _BYTE) * weight
            to = done[x]
            for y in range(_ROWS):
                high = (np.uint32(_to_byte(green[y])) << _GREEN) | (np.uint32(_to_byte(blue[y])) << _BLUE)
                to[y] = np.uint32(_to_byte(red[y])) | high
        for y in range(valid):
            reds, greens, blues = out[0, top + y], out[1, top + y], out[2, top + y]
            for x in range(n):
                pixel = done[x, y]
                reds[x] = np.uint8(pixel & _BYTE)
                greens[x] = np.uint8((pixel >> _GREEN) & _BYTE)
                blues[x] = np.uint8((pixel >> _BLUE) & _BYTE)


@njit(nogil=True, cache=True)
def _resample_columns(middle, first, count, weights, outside, fill, out):
    """Bytes [3, height, n] -> bytes [3, m, n]: every column, with the columns as lanes."""
    _, m, n = out.shape
    total = np.empty(n, np.int32)
    for c in range(3):
        for y in range(m):
            total[:] = _HALF + fill[c] * outside[y]
            for j in range(count[y]):
                line = middle[c, first[y] + j]
                weight = weights[y, j]
                for x in range(n):
                    total[x] += np.int32(line[x]) * weight
            to = out[c, y]
            for x in range(n):
                to[x] = np.uint8(_to_byte(total[x]))
