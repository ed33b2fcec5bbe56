"""The towers of the miniature benchmarks tell from one patch what object it belongs to, and where that lies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from cobra.config import PretrainConfig
from cobra.data.scenes import Item, Scene
from cobra.data.toy.asking import KINDS, SIZE, random_scene
from cobra.models.build import build_model
from cobra.models.vision import VisionEncoder

PATCH = 8
NUM_TRAIN, NUM_TEST = 600, 200


@pytest.fixture(scope="module")
def encoder(tiny_config: Callable[..., PretrainConfig]) -> VisionEncoder:
    return build_model(tiny_config("+experiment=tiny-toy").model, seed=0).vision


def centres(scene: Scene) -> list[int]:
    """The patch at each object's centre."""

    def patch(item: Item) -> int:
        column, row = (int(edge) // PATCH for edge in item.center)
        return row * (SIZE // PATCH) + column

    return [patch(item) for item in scene.items]


@torch.no_grad()
def read_off(encoder: VisionEncoder, scenes: list[Scene], wanted: Tensor) -> Tensor:
    """Fit a linear map from central patches to what is wanted on the first scenes; its output on the others."""
    pixels = torch.from_numpy(np.stack([scene.pixels() for scene in scenes])).permute(0, 3, 1, 2)
    tokens = encoder([pixels])
    features = torch.stack([tokens[i, patch] for i, scene in enumerate(scenes) for patch in centres(scene)])
    features = torch.nn.functional.pad(features, (0, 1), value=1.0)  # with a constant, as an offset
    split = sum(len(scene.items) for scene in scenes[:NUM_TRAIN])
    return features[split:] @ torch.linalg.lstsq(features[:split], wanted[:split]).solution


def test_patches_name_their_object_and_its_box(encoder: VisionEncoder) -> None:
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng, (2, 3)) for _ in range(NUM_TRAIN + NUM_TEST)]
    items = [item for scene in scenes for item in scene.items]
    kinds = torch.eye(len(KINDS))[[KINDS.index((item.color, item.shape)) for item in items]]
    boxes = torch.tensor([item.box for item in items]) / SIZE
    found = read_off(encoder, scenes, torch.cat([kinds, boxes], 1))
    kind, box = found.split([len(KINDS), 4], 1)
    assert (kind.argmax(1) == kinds[-len(kind) :].argmax(1)).float().mean() > 0.95
    assert (box - boxes[-len(box) :]).abs().mean() < 0.04
