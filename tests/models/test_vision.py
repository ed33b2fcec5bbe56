"""Towers against timm itself, and every vision config of the repository."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from cobra.config import PretrainConfig, TowerConfig, VisionConfig, as_config
from cobra.errors import ConfigError, ShapeError
from cobra.hub import resolve_file
from cobra.models.public import VISION
from cobra.models.vision import VisionEncoder, VisionTower
from cobra.models.weights import parameters_on_meta

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


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


def test_towers_of_one_size_share_a_view(vision: VisionConfig) -> None:
    assert len(VisionEncoder(vision).transform(Image.new("RGB", (30, 40)))) == 1


# Of each kind of vision transformer one, at a size that a test can pay for.
SMALL = {
    "registers": ("vit_small_patch14_reg4_dinov2", 56, {}, 5),
    "class token": ("vit_small_patch14_dinov2", 56, {}, 1),
    "no class token": ("vit_base_patch16_siglip_224", 64, {}, 0),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224.openai", 64, {}, 1),
    "distilled": ("deit_tiny_distilled_patch16_224", 64, {}, 2),
    "no embedded class": ("vit_small_patch16_224", 64, {"no_embed_class": True, "pos_embed": "none"}, 1),
}
REDUCED = {"depth": 3, "embed_dim": 48, "num_heads": 3}


def small_tower(name: str, **arguments: Any) -> VisionTower:
    kind, size, args, _ = SMALL[name]
    tower = VisionTower(TowerConfig(timm=kind, image_size=size, weights="random", args=REDUCED | args, **arguments))
    generator = torch.Generator().manual_seed(0)
    for parameter in tower.parameters():  # larger than timm's, whose tokens and biases are next to zero
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return tower.double().eval()


def by_hand(tower: VisionTower, images: Tensor, num_blocks: int) -> Tensor:
    """The first blocks of timm's module, called one by one: patches, tokens, positions, norm, blocks."""
    model = tower.model
    mean, std = (torch.tensor(model.pretrained_cfg[key], dtype=torch.float64).view(3, 1, 1) for key in ("mean", "std"))
    x = model.patch_embed.proj((images.double() / 255 - mean) / std).flatten(2).transpose(1, 2)
    tokens = [getattr(model, name, None) for name in ("cls_token", "reg_token", "dist_token")]
    prefix = [token.expand(len(x), -1, -1) for token in tokens if token is not None]
    if model.pos_embed is None:
        x = torch.cat([*prefix, x], dim=1)
    elif model.pos_embed.shape[1] == x.shape[1]:  # positions of the patches alone
        x = torch.cat([*prefix, x + model.pos_embed], dim=1)
    else:
        x = torch.cat([*prefix, x], dim=1) + model.pos_embed
    x = model.norm_pre(x)
    for block in list(model.blocks)[:num_blocks]:
        x = block(x)
    return x[:, sum(token.shape[1] for token in prefix) :]


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_features_equal_the_blocks_run_by_hand(name: str) -> None:
    size, num_prefix = SMALL[name][1], SMALL[name][3]
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, size, size), dtype=np.uint8))
    for layer, num_blocks in ((-2, 2), (0, 1), (-1, 3)):
        tower = small_tower(name, layer=layer)
        assert tower.model.num_prefix_tokens == num_prefix
        features = tower(images)
        assert features.shape == (2, tower.num_patches, 48) and tower.num_patches == 16
        torch.testing.assert_close(features, by_hand(tower, images, num_blocks), rtol=0, atol=1e-6)
    assert type(tower.model.norm_pre).__name__ == ("LayerNorm" if name == "CLIP" else "Identity")
    assert type(tower.model.blocks[0].mlp.act).__name__ == ("QuickGELU" if name == "CLIP" else "GELU")


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch14_dinov2"])
def test_dinov2_position_table_is_resampled_as_timm_does(name: str) -> None:
    """A checkpoint made for 518 pixels (37 x 37 patches) in a tower of 384 (27 x 27)."""
    trained = timm.create_model(name, num_classes=0, img_size=518, **REDUCED)
    torch.nn.init.normal_(trained.pos_embed, generator=torch.Generator().manual_seed(0))
    tensors = trained.state_dict()
    expected = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": dict(tensors)},
        num_classes=0,
        img_size=384,
        **REDUCED,
    )
    with parameters_on_meta():
        tower = VisionTower(TowerConfig(timm=name, image_size=384, ignore_rest=True, args=REDUCED))
    adapted = tower.adapt_weights(tensors | {"head.weight": torch.zeros(1), "head.bias": torch.zeros(1)})
    assert adapted["pos_embed"].shape[1] == 27 * 27 + (0 if "reg4" in name else 1) != tensors["pos_embed"].shape[1]
    assert adapted.keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(adapted[key], tensor), key
    # timm's rule is the paper's: bicubic with antialiasing over the patches' positions, the class token's untouched
    old = tensors["pos_embed"][:, -37 * 37 :].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    new = torch.nn.functional.interpolate(old, (27, 27), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(adapted["pos_embed"][:, -27 * 27 :], new)
    tower.model.load_state_dict(adapted, assign=True)
    assert tower(torch.zeros(1, 3, 384, 384, dtype=torch.uint8)).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_tower_built_on_meta_equals_one_built_in_memory(name: str) -> None:
    """Also those with rotary tables and relative positions, which no checkpoint holds."""
    config = TowerConfig(timm=name, image_size=56 if "14" in name else 64, weights="random", args=REDUCED)
    real = VisionTower(config).eval()
    with parameters_on_meta():
        tower = VisionTower(replace(config, weights="timm")).eval()  # and nothing is downloaded
    assert all(parameter.is_meta for parameter in tower.parameters())
    assert not any(buffer.is_meta for buffer in tower.buffers())
    images = torch.randint(0, 256, (2, 3, config.image_size, config.image_size), dtype=torch.uint8)
    tower.model.load_state_dict(real.model.state_dict(), assign=True)
    assert torch.equal(tower(images), real(images))


def test_tower_without_a_patch_projection_has_features() -> None:
    """Some timm models cut patches with a stem of convolutions alone."""
    with torch.device("meta"):
        tower = VisionTower(TowerConfig(timm="vit_base_mci_224", image_size=224, weights="random"))
    images = torch.zeros(2, 3, 224, 224, dtype=torch.uint8, device="meta")
    features = tower.to("meta").to(torch.bfloat16)(images)
    assert features.shape == (2, tower.num_patches, tower.width) and features.dtype == torch.bfloat16


def test_normalisation_survives_casts(vision: VisionConfig) -> None:
    tower = VisionTower(replace(vision.towers[0], weights="random"))
    mean = tower.mean.clone()
    tower.to(torch.bfloat16)
    assert tower.mean.dtype == torch.float32 and torch.equal(tower.mean, mean)
    assert tower(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).dtype == torch.bfloat16
    tower.to_empty(device="cpu")
    assert torch.equal(tower.mean, mean)


EXPECTED = {  # patches, width of each tower
    "dinov2-siglip-384": (729, [1024, 1152]),
    "siglip-so400m-384": (729, [1152]),
    "siglip-so400m-224": (256, [1152]),
    "siglip-b16-224": (196, [768]),
    "siglip-b16-256": (256, [768]),
    "siglip-b16-384": (576, [768]),
    "dinov2-reg-224": (256, [1024]),
    "dinov2-224": (256, [1024]),
    "clip-l14-224": (256, [1024]),
    "clip-l14-336": (576, [1024]),
    "clip-b16-224": (196, [768]),
    "dinov2-clip-336": (576, [1024, 1024]),
    "in1k-l16-224": (196, [1024]),
}


def test_every_vision_config_is_expected() -> None:
    assert {file.stem for file in (CONFIGS / "model" / "vision").glob("*.yaml")} == {
        *EXPECTED,
        "tiny",
        "toy",
        "toy-siglip",
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_vision_config_builds_on_meta(name: str) -> None:
    config = as_config(VisionConfig, OmegaConf.load(CONFIGS / "model" / "vision" / f"{name}.yaml"))
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    assert (encoder.num_patches, [tower.width for tower in encoder.towers]) == EXPECTED[name]
    assert encoder.width == sum(EXPECTED[name][1]) and len(encoder.transform.views) == 1
    for tower, given in zip(encoder.towers, config.towers, strict=True):
        assert given.timm in timm.list_pretrained()
        assert tower.model.num_prefix_tokens == {"reg4": 5, "sigl": 0}.get(
            "reg4" if "reg4" in given.timm else given.timm.split("patch")[1][3:7], 1
        )
        is_clip = "_clip_" in given.timm
        assert is_clip == (type(tower.model.blocks[0].mlp.act).__name__ == "QuickGELU")
        assert tower.layer == len(tower.model.blocks) - 2


PUBLIC_IDS = {
    "dinov2-siglip-384": "dinosiglip-vit-so-384px",
    "siglip-so400m-384": "siglip-vit-so400m-384px",
    "siglip-so400m-224": "siglip-vit-so400m",
    "siglip-b16-224": "siglip-vit-b16-224px",
    "siglip-b16-256": "siglip-vit-b16-256px",
    "siglip-b16-384": "siglip-vit-b16-384px",
    "dinov2-reg-224": "dinov2-vit-l",
    "clip-l14-224": "clip-vit-l",
    "clip-l14-336": "clip-vit-l-336px",
    "clip-b16-224": "clip-vit-b",
    "dinov2-clip-336": "dinoclip-vit-l-336px",
    "in1k-l16-224": "in1k-vit-l",
}


@pytest.mark.parametrize("name", PUBLIC_IDS)
def test_vision_config_is_what_its_public_id_stands_for(name: str) -> None:
    config = as_config(VisionConfig, OmegaConf.load(CONFIGS / "model" / "vision" / f"{name}.yaml"))
    assert config == as_config(VisionConfig, {"towers": VISION[PUBLIC_IDS[name]]})


def test_every_public_id_has_a_config_or_is_known_to_have_none() -> None:
    assert VISION.keys() - PUBLIC_IDS.values() == {"dinosiglip-vit-so-224px"}
    assert EXPECTED.keys() - PUBLIC_IDS.keys() == {"dinov2-224"}  # without registers


def test_gelu_for_quickgelu_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        VisionTower(TowerConfig(timm="vit_base_patch16_clip_224.openai", image_size=224))
    assert "vit_base_patch16_clip_quickgelu_224.openai" in caplog.text


def test_wrong_pixels_are_refused(vision: VisionConfig) -> None:
    encoder = VisionEncoder(vision)
    for pixels, message in (
        ([torch.zeros(1, 3, 64, 60)], r"\[1, 3, 64, 60\] must be \[images, 3, 64, 64\]"),
        ([torch.zeros(3, 64, 64)], r"\[3, 64, 64\]"),
        ([], "0 views"),
    ):
        with pytest.raises(ShapeError, match=message):
            encoder(pixels)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vit_small_patch14_dinov2", 384, r"image_size=384 .* patch size 14; use 378 or 392, or set ignore_rest=true"),
        ("vit_tiny_patch16_224", 9, r"use 16, or"),
        ("resnet18", 224, "no vision transformer"),
        ("swin_tiny_patch4_window7_224", 224, "SwinTransformer"),
        ("convnext_tiny", 224, "no vision transformer"),
        ("mixer_s16_224", 224, "MlpMixer"),
    ],
)
def test_model_or_size_that_gives_no_patches_is_refused(name: str, size: int, message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        VisionTower(TowerConfig(timm=name, image_size=size))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": 64, "args": {"dynamic_img_size": True}}, "dynamic_img_size"),
        ({"image_size": 64, "args": {"img_size": 32}}, "img_size"),
    ],
)
def test_impossible_tower_config_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TowerConfig(timm="vit_tiny_patch16_224", **settings)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vision.towers.0.timm=vit_smal_patch14_dinov2", "'vit_smal.*'. Did you mean 'vit_small_patch14_dinov2'"),
        (
            "model.vision.towers.0.timm=vit_small_patch14_dinov2.lvd42",
            r"no weights 'lvd42' of 'vit_small_patch14_dinov2'; it has vit_small_patch14_dinov2\.lvd142m\.",
        ),
        ("model.vision.towers.0.layer=7", "layer=7"),
        ("model.vision.towers.0.args.patch_sizes=8", "patch_sizes"),
        ("model.vision.towers.0.args.act_layer=nope", r"vit_small.*it knows no 'nope'; correct .*args"),
        ("model.vision.towers.0.args.num_heads=0", "timm cannot make"),
    ],
)
def test_impossible_tower_is_refused(tiny_config: Callable[..., PretrainConfig], override: str, message: str) -> None:
    extra = "++" if "layer" in override or "args" in override else ""
    with pytest.raises(ConfigError, match=message):
        VisionEncoder(tiny_config(extra + override).model.vision)
