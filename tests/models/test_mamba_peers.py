"""Our Mamba against the official one's fixture, against transformers, and against the authors' initialisation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from cobra.config import LLMConfig
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState
from cobra.models.weights import assign

from .mamba_cases import ROUNDING, assert_states_equal, decode, logits_of, make_config, make_lm, random_ids


def transformers_mamba(config: LLMConfig) -> torch.nn.Module:
    """A `MambaForCausalLM` of transformers with the same sizes; skips the test where that is not installed."""
    transformers = pytest.importorskip("transformers")
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.d_model,
            state_size=config.d_state,
            num_hidden_layers=config.num_layers,
            layer_norm_epsilon=config.norm_eps,
            conv_kernel=config.d_conv,
            expand=config.expand,
            time_step_rank=config.rank,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


class TestOfficialFixture:
    """`mamba-m32`: computed by the official implementation in float64."""

    @pytest.fixture
    def expected(self, assets: Path) -> dict[str, Tensor]:
        arrays = np.load(assets / "fixtures" / "mamba-m32" / "m32.npz")
        return {key: torch.from_numpy(arrays[key]) for key in arrays}

    @pytest.fixture
    def lm(self, assets: Path) -> MambaLM:
        tensors = load_file(assets / "fixtures" / "mamba-m32" / "m32.safetensors")
        assert torch.equal(tensors.pop("lm_head.weight"), tensors["backbone.embedding.weight"])
        lm = MambaLM(make_config(dt_rank=2))
        assign(lm, tensors, "m32")
        return lm.double().requires_grad_(False)

    def test_full_forward(self, lm: MambaLM, expected: dict[str, Tensor]) -> None:
        ids = torch.cat([expected["input_ids"], expected["continuation_ids"]], dim=1)
        logits, _ = logits_of(lm, ids)
        torch.testing.assert_close(logits, expected["float64/logits_full_forward"], rtol=0, atol=ROUNDING)

    @pytest.mark.parametrize("kind", ["prefill", "short_prefill"])
    def test_prefill_and_decode(self, lm: MambaLM, expected: dict[str, Tensor], kind: str) -> None:
        def state(name: str) -> MambaState:
            return MambaState(
                [expected[f"float64/{kind}/conv_state{name}.{i}"][:, :, 1:].transpose(1, 2) for i in range(2)],
                [expected[f"float64/{kind}/ssm_state{name}.{i}"] for i in range(2)],
            )

        length = expected[f"float64/{kind}/logits"].shape[1]  # 2 when short: less than the convolution is wide
        logits, after = logits_of(lm, expected["input_ids"][:, :length])
        torch.testing.assert_close(logits, expected[f"float64/{kind}/logits"], rtol=0, atol=ROUNDING)
        assert_states_equal(after, state(""))
        logits, after = decode(lm, expected["continuation_ids"], after)
        torch.testing.assert_close(logits, expected[f"float64/{kind}/decode_logits"], rtol=0, atol=ROUNDING)
        assert_states_equal(after, state("_after_decode"))


class TestTransformers:
    """`MambaForCausalLM` of transformers with the same weights, in float32."""

    SHAPES = (  # batch, length, sizes
        (1, 1, {}),
        (2, 37, {}),
        (3, 64, {"d_model": 48, "num_layers": 3, "d_state": 8, "dt_rank": 5}),
        (2, 100, {"d_model": 24, "num_layers": 1, "d_conv": 3, "expand": 3}),
    )

    @pytest.fixture(params=SHAPES, ids=str)
    def both(self, request: pytest.FixtureRequest) -> tuple[MambaLM, torch.nn.Module, Tensor]:
        batch, length, sizes = request.param
        ours = make_lm(dtype=torch.float32, **sizes)
        theirs = transformers_mamba(ours.config)
        state = {name.replace(".embedding.", ".embeddings."): value for name, value in ours.state_dict().items()}
        theirs.load_state_dict(state, strict=True)
        return ours, theirs, random_ids(batch, length)

    def test_logits_are_equal(self, both: tuple[MambaLM, torch.nn.Module, Tensor]) -> None:
        ours, theirs, ids = both
        with torch.no_grad():
            assert (logits_of(ours, ids)[0] - theirs(input_ids=ids).logits).abs().max() < 1e-4

    def test_gradients_are_equal(self, both: tuple[MambaLM, torch.nn.Module, Tensor]) -> None:
        ours, theirs, ids = both
        targets = random_ids(ids.numel())
        for logits in (logits_of(ours, ids)[0], theirs(input_ids=ids).logits):
            F.cross_entropy(logits.flatten(0, 1), targets).backward()
        expected = {name.replace(".embeddings.", ".embedding."): p.grad for name, p in theirs.named_parameters()}
        assert expected.keys() == dict(ours.named_parameters()).keys()
        for name, parameter in ours.named_parameters():
            scale = float(expected[name].abs().max())  # float32: relative to the largest entry of each gradient
            assert scale > 0 or (name.endswith("A_log") and ids.shape[1] == 1)  # nothing decays before the first token
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-4 * scale, msg=name)


def assert_uniform(sample: Tensor, low: float, high: float) -> None:
    """Kolmogorov-Smirnov test at 0.1 %, and no value outside."""
    values = sample.double().flatten().sort().values
    assert low <= values[0] and values[-1] <= high
    expected = torch.arange(1, len(values) + 1) / len(values)
    assert ((values - low) / (high - low) - expected).abs().max() < 1.95 / len(values) ** 0.5


def test_init_weights_follow_the_authors() -> None:
    lm = MambaLM(make_config(d_model=64, num_layers=4, vocab_size=500)).requires_grad_(False)
    lm.init_weights(torch.Generator().manual_seed(0))
    assert lm.lm_head.weight is lm.backbone.embedding.weight
    normal = torch.distributions.Normal(0, 0.02)
    assert_uniform(normal.cdf(lm.backbone.embedding.weight), 0, 1)
    for block in lm.backbone.layers:
        mixer = block.mixer
        low, high = math.log(0.001), math.log(0.1)
        assert_uniform(F.softplus(mixer.dt_proj.bias.double()).log(), low - 1e-5, high + 1e-5)  # rounded to float32
        assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
        assert torch.equal(mixer.D, torch.ones(128)) and torch.equal(block.norm.weight, torch.ones(64))
        for weight, bound in (
            (mixer.in_proj.weight, 64**-0.5),
            (mixer.x_proj.weight, 128**-0.5),
            (mixer.out_proj.weight, 128**-0.5 / 4**0.5),
            (mixer.conv1d.weight, 0.5),
            (mixer.conv1d.bias, 0.5),
            (mixer.dt_proj.weight, 4**-0.5),
        ):
            assert_uniform(weight, -bound, bound)
    assert torch.equal(lm.backbone.norm_f.weight, torch.ones(64))


PUBLIC_SIZES = {  # millions of parameters
    "mamba-130m": 129.1,
    "mamba-370m": 371.5,
    "mamba-790m": 793.2,
    "mamba-1.4b": 1372.2,
    "mamba-2.8b": 2768.3,
    "mamba-7b": 6946.6,
}


@pytest.mark.parametrize("name", PUBLIC_SIZES)
def test_public_sizes_have_as_many_parameters_as_transformers(tiny_config, name: str) -> None:
    config = tiny_config(f"model/llm={name}").model.llm
    with torch.device("meta"):
        ours = MambaLM(config)
        theirs = transformers_mamba(config)

    def shapes(lm: torch.nn.Module) -> dict[str, torch.Size]:
        return {key.replace(".embeddings.", ".embedding."): p.shape for key, p in lm.named_parameters()}

    assert shapes(ours) == shapes(theirs)
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 1) == PUBLIC_SIZES[name]
