"""Image transforms against the public release's pixels, towers against timm itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from cobra.config import PretrainConfig, VisionConfig
from cobra.errors import ConfigError
from cobra.hub import resolve_file
from cobra.models.image import ImageTransform, to_rgb
from cobra.models.vision import VisionEncoder

PUBLIC = "dinosiglip-vit-so-384px"
HALF_TRANSPARENT_RED, GREY = (255, 0, 0, 128), 100


@pytest.fixture
def vision(tiny_config: Callable[..., PretrainConfig]) -> VisionConfig:
    return tiny_config().model.vision


@torch.no_grad()
def test_features_equal_timm_block_outputs(vision: VisionConfig) -> None:
    """Each tower's second-to-last block, without final norm and prefix tokens, by a hook on timm's own forward."""
    encoder = VisionEncoder(vision).eval()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8))
    expected = []
    for i, tower in enumerate(vision.towers):
        weights = load_file(resolve_file(tower.weights, ""))
        encoder.towers[i].model.load_state_dict(weights)
        reference = timm.create_model(tower.timm, num_classes=0, img_size=tower.image_size, **tower.args).eval()
        reference.load_state_dict(weights)
        outputs: list[Tensor] = []
        reference.blocks[-2].register_forward_hook(lambda _m, _in, out, outputs=outputs: outputs.append(out))
        mean, std = (torch.tensor(reference.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        reference((images / 255 - mean) / std)
        expected.append(outputs[0][:, reference.num_prefix_tokens :])
    assert [tower.model.num_prefix_tokens for tower in encoder.towers] == [5, 0]  # cls and four registers; none
    features = encoder([images])
    assert features.shape == (3, 64, 128)
    torch.testing.assert_close(
        features, torch.cat(expected, dim=-1), rtol=1e-4, atol=1e-5
    )  # pixels divided in another order


def test_towers_share_a_view_where_they_can(vision: VisionConfig) -> None:
    encoder = VisionEncoder(vision)
    assert len(encoder.transform(Image.new("RGB", (30, 40)))) == 1
    cfg = {"mean": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
    other = cfg | {"mean": (0.4, 0.5, 0.6)}
    assert len(ImageTransform([(64, cfg), (64, other)], "letterbox").views) == 2  # bars of another colour
    assert len(ImageTransform([(64, cfg), (64, other)], "resize-crop").views) == 1
    assert len(ImageTransform([(64, cfg), (56, cfg)], "resize-naive").views) == 2


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
def test_pixels_equal_the_public_release(assets: Path, strategy: str) -> None:
    folder = assets / "fixtures" / "public-cobra-tiny"
    expected = np.load(folder / "pixels_56px.npz")
    cfgs = json.loads((folder / "pixels_meta.json").read_text())[f"{PUBLIC}/data_cfg"]
    transform = ImageTransform([(56, cfgs[name]) for name in ("dino", "siglip")], strategy)
    for file in sorted((folder / "images").iterdir()):
        views = transform(Image.open(file))
        for name, view in zip(("dino", "siglip"), transform.view_of_tower, strict=True):
            mean, std = (np.array(cfgs[name][key], np.float32)[:, None, None] for key in ("mean", "std"))
            pixels = (views[view].numpy().astype(np.float32) / 255 - mean) / std
            difference = np.abs(pixels - expected[f"{PUBLIC}/{strategy}/{name}/{file.stem}"]).max()
            assert difference < 1e-5, (file.stem, name)  # one of 255 levels would be 0.015


def test_letterbox_keeps_the_whole_image_between_bars_of_the_mean() -> None:
    transform = ImageTransform([(40, {"mean": (0.2, 0.4, 0.6), "interpolation": "nearest"})], "letterbox")
    (pixels,) = transform(Image.new("RGB", (80, 40), (255, 0, 0)))
    assert pixels[:, 0, 0].tolist() == [51, 102, 153] and pixels[:, -1, -1].tolist() == [51, 102, 153]
    assert (pixels[:, 10:30] == torch.tensor([255, 0, 0]).view(3, 1, 1)).all()


def exif_rotated() -> Image.Image:
    """A 2 x 1 image, red then blue, which its EXIF data says to turn by 90 degrees clockwise."""
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    image.getexif()[0x0112] = 6
    return image


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (1, 1), 0)
    image.putpalette([255, 0, 0])
    image.info["transparency"] = 0
    return image


@pytest.mark.parametrize(
    ("image", "pixels"),
    [
        (Image.new("RGBA", (1, 1), HALF_TRANSPARENT_RED), [(255, 127, 127)]),  # on white
        (Image.new("P", (1, 1)).quantize(2), [(0, 0, 0)]),
        (palette_with_transparency(), [(255, 255, 255)]),
        (Image.new("L", (1, 1), GREY), [(GREY, GREY, GREY)]),
        (Image.new("LA", (1, 1), (GREY, 255)), [(GREY, GREY, GREY)]),
        (Image.new("LA", (1, 1), (GREY, 0)), [(255, 255, 255)]),
        (Image.new("1", (1, 1), 1), [(255, 255, 255)]),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [(255, 0, 0)]),
        (Image.fromarray(np.full((1, 1), 65535, np.uint16)), [(255, 255, 255)]),
        (Image.fromarray(np.full((1, 1), 257 * GREY, np.uint16)), [(GREY, GREY, GREY)]),
        (Image.fromarray(np.full((1, 1), 257 * GREY, np.int32)), [(GREY, GREY, GREY)]),
        (exif_rotated(), [(255, 0, 0), (0, 0, 255)]),
    ],
    ids=["RGBA", "P", "P transparent", "L", "LA", "LA transparent", "1", "CMYK", "16 bit white", "16 bit", "I", "EXIF"],
)
def test_image_modes_become_what_a_person_sees(image: Image.Image, pixels: list[tuple[int, int, int]]) -> None:
    shown = to_rgb(image)
    assert shown.mode == "RGB"
    assert shown.size == (1, len(pixels))  # the EXIF image is turned to 1 x 2
    assert [shown.getpixel((0, y)) for y in range(shown.height)] == pixels


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (64, 64)], ids=str)
def test_any_size_becomes_a_square(strategy: str, size: tuple[int, int]) -> None:
    transform = ImageTransform([(64, {"mean": (0.5, 0.5, 0.5), "interpolation": "bicubic"})], strategy)
    (pixels,) = transform(Image.new("RGB", size, (10, 20, 30)))
    assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.uint8
    if strategy != "letterbox" or size[0] == size[1]:
        assert (pixels == torch.tensor([10, 20, 30]).view(3, 1, 1)).all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vision.towers.0.timm=vit_smal_patch14", "vit_smal_patch14"),
        ("model.vision.towers.0.layer=7", "layer=7"),
        ("model.vision.towers.0.args.patch_sizes=8", "patch_sizes"),
    ],
)
def test_impossible_tower_is_refused(tiny_config: Callable[..., PretrainConfig], override: str, message: str) -> None:
    extra = "+" if "patch_sizes" in override else ("++" if "layer" in override else "")
    with pytest.raises(ConfigError, match=message):
        VisionEncoder(tiny_config(extra + override).model.vision)
