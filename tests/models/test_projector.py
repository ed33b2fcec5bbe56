"""Projectors against independent computations in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from cobra.config import PROJECTOR_KINDS, ProjectorConfig, as_config
from cobra.errors import ConfigError, ShapeError
from cobra.models.projector import PROJECTORS, Projector

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VISION_WIDTH, WIDTH = 6, 5


def make(kind: str, **settings: int) -> Projector:
    """A projector in float64 whose parameters are all different from zero."""
    projector = Projector(ProjectorConfig(kind=kind, **settings), VISION_WIDTH, WIDTH).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in projector.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return projector


def features(num_patches: int, batch: int = 2) -> Tensor:
    return torch.randn(
        batch, num_patches, VISION_WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def ldpv2_by_hand(projector: Projector, patches: Tensor, side: int, grid: int) -> Tensor:
    """Loops over images, tokens and neighbours; a pooling window is [floor(i n / g), ceil((i + 1) n / g))."""
    p = dict(projector.named_parameters())
    hidden = gelu(patches @ p["projector.0.weight"].T + p["projector.0.bias"])
    hidden = hidden @ p["projector.2.weight"].T + p["projector.2.bias"]
    kernel, bias = p["projector.4.peg.0.weight"], p["projector.4.peg.0.bias"]
    out = torch.empty(len(patches), grid * grid, WIDTH, dtype=torch.float64)
    windows = [range(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)]
    for b in range(len(patches)):
        pooled = {}
        for y in range(grid):
            for x in range(grid):
                members = [hidden[b, r * side + c] for r in windows[y] for c in windows[x]]
                pooled[y, x] = sum(members) / len(members)
        for y in range(grid):
            for x in range(grid):
                total = pooled[y, x] + bias
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        if (y + dy, x + dx) in pooled:
                            total = total + kernel[:, 0, dy + 1, dx + 1] * pooled[y + dy, x + dx]
                out[b, y * grid + x] = total
    return out


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ldpv2", "fused-ldpv2"])
@pytest.mark.parametrize(("side", "grid"), [(27, 14), (8, 4), (5, 3), (4, 4), (1, 1)])
def test_ldpv2_equals_loops(kind: str, side: int, grid: int) -> None:
    expected = None
    for settings in ({"grid": grid}, {} if grid == math.ceil(side / 2) else {"grid": grid}):
        projector = make(kind, **settings)
        out = projector(features(side * side))
        assert out.shape == (2, grid * grid, WIDTH) and projector.num_tokens(side * side) == grid * grid
        expected = ldpv2_by_hand(projector, features(side * side), side, grid) if expected is None else expected
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


def test_gradients_of_ldpv2() -> None:
    projector = make("fused-ldpv2", expansion=1)
    names, parameters = zip(*projector.named_parameters(), strict=True)
    patches = features(9, batch=1).requires_grad_()

    def run(patches: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(projector, dict(zip(names, parameters, strict=True)), (patches,))

    assert torch.autograd.gradcheck(run, (patches, *parameters))


def test_parameter_names_and_sizes_are_the_public_ones() -> None:
    with torch.device("meta"):
        projector = Projector(ProjectorConfig(kind="fused-ldpv2"), 2176, 2560)
    assert {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()} == {
        "projector.0.weight": (8704, 2176),
        "projector.0.bias": (8704,),
        "projector.2.weight": (2560, 8704),
        "projector.2.bias": (2560,),
        "projector.4.peg.0.weight": (2560, 1, 3, 3),
        "projector.4.peg.0.bias": (2560,),
    }
    assert projector.num_tokens(729) == 196
    assert make("ldpv2").projector[0].out_features == WIDTH  # one encoder: no wide hidden layer


@pytest.mark.parametrize("kind", ["linear", "gelu-mlp", "fused-gelu-mlp"])
def test_mlps_keep_every_patch(kind: str) -> None:
    projector = make(kind)
    assert projector.num_tokens(7) == 7 and projector(features(7)).shape == (2, 7, WIDTH)


def test_patches_that_cannot_be_pooled_are_refused() -> None:
    for ask in (lambda projector: projector.num_tokens(12), lambda projector: projector(features(12))):
        with pytest.raises(ShapeError, match="12 patches do not fill a square grid"):
            ask(make("ldpv2"))
        with pytest.raises(ConfigError, match="grid=4 is more than the 3 x 3 patches"):
            make("ldpv2", grid=4).num_tokens(9)
    with pytest.raises(ConfigError, match="grid=0"):
        ProjectorConfig(kind="ldpv2", grid=0)
    with pytest.raises(ConfigError, match="fused-ldpv2"):
        ProjectorConfig(kind="fused-ldpnet")


def test_fresh_weights_start_as_pooling_and_learn_at_once() -> None:
    """The convolution starts as the identity, yet its first gradient is not zero."""
    projector = Projector(ProjectorConfig(kind="ldpv2"), VISION_WIDTH, WIDTH).double()
    projector.init_weights(torch.Generator().manual_seed(0))
    mlp, pool, mixer = projector.projector[:3], projector.projector[3], projector.projector[4]
    out = projector(features(16))
    assert torch.equal(out, pool(mlp(features(16))))
    out.square().sum().backward()
    assert all(parameter.grad.abs().min() > 0 for parameter in mixer.parameters())
    again = Projector(ProjectorConfig(kind="ldpv2"), VISION_WIDTH, WIDTH).double()
    again.init_weights(torch.Generator().manual_seed(0))
    for ours, theirs in zip(projector.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_every_kind_has_a_config() -> None:
    assert tuple(PROJECTORS) == PROJECTOR_KINDS
    for kind in PROJECTOR_KINDS:
        config = as_config(ProjectorConfig, OmegaConf.load(CONFIGS / "model" / "projector" / f"{kind}.yaml"))
        assert config.kind == kind
