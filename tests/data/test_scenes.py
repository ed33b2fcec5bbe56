"""Rendered scenes match their ground truth, and the shipped towers see what is in them."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from cobra.data.scenes import COLORS, LIGHT, SHADE, SHAPES, SIDES, Item, Scene, random_scene
from cobra.errors import DataError

ASSETS = Path(__file__).parents[2] / "cobra" / "assets" / "tiny"
COMMON = {"num_classes": 0, "img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
TOWERS = {
    "dino": ("vit_small_patch14_reg4_dinov2", COMMON | {"init_values": 1.0}),
    "siglip": ("vit_base_patch16_siglip_224", COMMON | {"global_pool": "avg", "fc_norm": False}),
}


def scenes(seed: int, count: int, size: int = 64) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, size) for _ in range(count)]


def test_seed_names_the_scenes() -> None:
    first, again, other = scenes(3, 20), scenes(3, 20), scenes(4, 20)
    assert first == again != other
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.pixels(), b.pixels())


@pytest.mark.parametrize("size", [32, 64, 96])
def test_box_holds_exactly_the_object(size: int) -> None:
    for scene in scenes(0, 100, size):
        pixels = scene.pixels()
        assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
        (item,) = scene.items
        rows, columns = np.nonzero((pixels != scene.background).any(-1))
        seen = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        left, top, right, bottom = item.box
        assert min(left, top) >= 0 and max(right, bottom) <= size
        assert left - 1 < seen[0] and top - 1 < seen[1] and right + 1 > seen[2] and bottom + 1 > seen[3]  # none outside
        assert np.allclose(seen, item.box, atol=2)  # a tip or a thin edge may cover too little of its pixel to show
        assert SIDES[0] * size <= right - left <= SIDES[1] * size


def test_colors_are_painted() -> None:
    for scene in scenes(1, 100):
        (item,) = scene.items
        x, y = int((item.box[0] + item.box[2]) / 2), int((item.box[1] + item.box[3]) / 2)
        assert tuple(scene.pixels()[y, x]) == item.rgb
        assert np.abs(np.subtract(item.rgb, COLORS[item.color])).max() <= SHADE
        assert min(scene.background) >= LIGHT


def test_every_shape_and_color_is_drawn() -> None:
    items = [scene.items[0] for scene in scenes(2, 300)]
    assert {item.shape for item in items} == {*SHAPES}
    assert {item.color for item in items} == {*COLORS}


@pytest.mark.parametrize(("shape", "share"), [("circle", np.pi / 4), ("rectangle", 1.0), ("triangle", 0.5)])
def test_area_of_a_shape(shape: str, share: float) -> None:
    item = Item(shape, "red", COLORS["red"], (10.25, 12.5, 50.25, 42.5))
    assert item.coverage(64).sum() == pytest.approx(share * 40 * 30, rel=0.02)


def test_later_objects_cover_earlier_ones() -> None:
    back = Item("rectangle", "red", (255, 0, 0), (0, 0, 8, 8))
    front = Item("rectangle", "blue", (0, 0, 255), (4, 0, 12, 8))  # runs past the right edge
    image = Scene((back, front), (255, 255, 255), 10).image()
    assert image.size == (10, 10) and image.mode == "RGB"
    assert [image.getpixel(at) for at in [(3, 7), (4, 7), (9, 7), (9, 8)]] == [
        (255, 0, 0),
        (0, 0, 255),
        (0, 0, 255),
        (255, 255, 255),
    ]


@pytest.mark.parametrize("box", [(-9, 0, -1, 8), (10, 0, 18, 8), (0, -9, 8, -1)])
def test_object_outside_the_picture_is_not_seen(box: tuple[float, float, float, float]) -> None:
    assert not Item("rectangle", "red", (255, 0, 0), box).coverage(10).any()


def test_unknown_shape_is_named() -> None:
    with pytest.raises(DataError, match="hexagon"):
        Item("hexagon", "red", (255, 0, 0), (0, 0, 8, 8)).coverage(10)


def tower(name: str) -> torch.nn.Module:
    model = timm.create_model(TOWERS[name][0], pretrained=False, **TOWERS[name][1])
    model.load_state_dict(load_file(ASSETS / f"{name}.safetensors"), strict=True)
    return model.eval()


@torch.no_grad()
def patch_tokens(model: torch.nn.Module, pixels: np.ndarray) -> torch.Tensor:
    """The second-to-last block's patch tokens [N, 64, 64] of uint8 pixels [N, 64, 64, 3]."""
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    block = len(model.blocks) - 2
    return model.forward_intermediates(images, indices=[block], output_fmt="NLC", intermediates_only=True)[0]


def test_towers_are_small_and_in_half_precision() -> None:
    files = [ASSETS / f"{name}.safetensors" for name in TOWERS]
    assert sum(file.stat().st_size for file in files) < 2**20
    for file in files:
        assert {weight.dtype for weight in load_file(file).values()} == {torch.float16}


def test_towers_tell_shapes_and_colors_apart() -> None:
    sample = scenes(5, 1200)
    pixels = np.stack([scene.pixels() for scene in sample])
    tokens = torch.cat([patch_tokens(tower(name), pixels) for name in TOWERS], -1)
    assert tokens.shape == (1200, 64, 128) and tokens.isfinite().all()
    pooled = torch.nn.functional.pad(tokens.mean(1), (0, 1), value=1.0)  # with a constant, as an offset
    for known, truth in (
        (SHAPES, [scene.items[0].shape for scene in sample]),
        (tuple(COLORS), [scene.items[0].color for scene in sample]),
    ):
        labels = torch.tensor([known.index(name) for name in truth])
        head = torch.linalg.lstsq(pooled[:800], torch.nn.functional.one_hot(labels[:800]).float()).solution
        assert ((pooled[800:] @ head).argmax(1) == labels[800:]).float().mean() > 0.97
