"""Images per second and core of Cobra's image transform beside torchvision's, on 640 x 480 JPEGs that it makes itself.

    python benchmarks/transforms.py
    python benchmarks/transforms.py --size 224 --strategy resize-crop --json transforms.json

`cobra` gives the uint8 pixels that a batch is made of: towers of one size share them, and normalise them on the device.
`v1` is torchvision's pipeline over PIL images, which is also timm's; `v2` the same over uint8 tensors. Both give
normalised floats, once for each tower, as any encoder's own transform does. `v2 uint8` stops before that: the least
that can be compared with Cobra. Everything runs on one thread; ways take turns, and ratios are between medians.
`differs` is the largest difference from timm's pixels, in levels of 256.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

from cobra.models.image import ImageTransform

WIDTH, HEIGHT = 640, 480
TOWERS = {  # mean and std of each tower
    "one tower": [((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))],
    "two towers": [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))],
}

Way = Callable[[Image.Image], Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to transform; `ratio` is its speed in multiples of Cobra's."""

    towers: str
    shape: str
    work: str
    way: str
    images_per_second: float
    ratio: float
    differs: int


def jpegs(count: int, width: int, height: int) -> list[bytes]:
    """Pictures of smooth colours with some noise, about 60 kB each."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
        noisy = np.asarray(smooth) + rng.normal(0, 6, (height, width, 1))
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def make_ways(towers: str, size: int, strategy: str) -> dict[str, Way]:
    """Every way to transform a decoded image for these towers."""
    cubic = InterpolationMode.BICUBIC
    shape = [size, size] if strategy == "resize-naive" else size
    data = [(size, {"mean": mean, "interpolation": "bicubic"}) for mean, _ in TOWERS[towers]]
    resize_v1 = [v1.Resize(shape, cubic), v1.CenterCrop(size)]
    resize_v2 = [v2.ToImage(), v2.Resize(shape, cubic, antialias=True), v2.CenterCrop(size)]
    ways_v1 = [v1.Compose([*resize_v1, v1.ToTensor(), v1.Normalize(*values)]) for values in TOWERS[towers]]
    to_float = v2.ToDtype(torch.float32, scale=True)
    ways_v2 = [v2.Compose([*resize_v2, to_float, v2.Normalize(*values)]) for values in TOWERS[towers]]
    pixels_v2 = v2.Compose(resize_v2)
    return {
        "cobra": ImageTransform(data, strategy),
        "v1": lambda image: [way(image) for way in ways_v1],
        "v2": lambda image: [way(image) for way in ways_v2],
        "v2 uint8": lambda image: [pixels_v2(image)],
    }


def levels(towers: str, outputs: list[torch.Tensor]) -> torch.Tensor:
    """Return the first tower's pixels as whole numbers."""
    pixels = outputs[0]
    if pixels.dtype != torch.uint8:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in TOWERS[towers][0])
        pixels = ((pixels * std + mean) * 255).round()
    return pixels.int()


def measure(towers: str, files: list[bytes], size: int, strategy: str, rounds: int) -> list[Row]:
    ways = make_ways(towers, size, strategy)
    decoded = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    shape = f"{decoded[0].width} x {decoded[0].height}"
    expected = levels(towers, ways["v1"](decoded[0]))
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds + 1):  # the first does not count
        for name, way in ways.items():
            for work in ("transform", "decode + transform"):
                start = time.perf_counter()
                for image, file in zip(decoded, files, strict=True):
                    way(image if work == "transform" else Image.open(io.BytesIO(file)))
                seconds.setdefault((work, name), []).append((time.perf_counter() - start) / len(files))
    medians = {key: statistics.median(times[1:]) for key, times in seconds.items()}
    return [
        Row(
            towers=towers,
            shape=shape,
            work=work,
            way=name,
            images_per_second=1 / medians[work, name],
            ratio=medians[work, "cobra"] / medians[work, name],
            differs=int((levels(towers, ways[name](decoded[0])) - expected).abs().max()),
        )
        for work in ("transform", "decode + transform")
        for name in ways
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=384, help="pixels of the encoders' images")
    parser.add_argument("--strategy", default="resize-naive", choices=["resize-naive", "resize-crop"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for towers in TOWERS:
        for shape in ((WIDTH, HEIGHT), (HEIGHT, WIDTH)):
            rows += measure(towers, jpegs(args.images, *shape), args.size, args.strategy, args.rounds)
    print(f"{'':<12}{'image':<12}{'work':<20}{'way':<10}{'images/s':>10}{'x cobra':>10}{'differs':>9}")
    for row in rows:
        print(
            f"{row.towers:<12}{row.shape:<12}{row.work:<20}{row.way:<10}"
            f"{row.images_per_second:>10.0f}{row.ratio:>10.2f}{row.differs:>9}"
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
