"""Our Mamba against the official one's fixture, against transformers, and against itself."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from cobra.config import LLMConfig
from cobra.errors import ShapeError
from cobra.models.mamba import MambaLM, MambaState
from cobra.models.weights import assign

ROUNDING = 1e-10  # float64 sums of some hundred terms of size 1, in another order


def make_config(**sizes: int) -> LLMConfig:
    return LLMConfig(**({"d_model": 32, "num_layers": 2, "vocab_size": 101} | sizes), tokenizer="", prompt="mamba")


def make_lm(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: int) -> MambaLM:
    """A model in which every parameter matters: nothing is left at 1 or too small to be seen."""
    lm = MambaLM(make_config(**sizes))
    generator = torch.Generator().manual_seed(seed)
    lm.init_weights(generator)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.1 * noise if parameter.ndim == 1 or name.endswith("A_log") else 0.05 * noise
    return lm.to(dtype)


def random_ids(*shape: int, vocab: int = 101) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(1))


def logits_of(lm: MambaLM, ids: Tensor, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
    hidden, state = lm(lm.embed(ids), state=state)
    return lm.head(hidden), state


def decode(lm: MambaLM, ids: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
    """Logits of feeding `ids` token by token."""
    logits = []
    for column in ids.T:
        hidden, state = lm.step(column, state)
        logits.append(lm.head(hidden))
    return torch.stack(logits, dim=1), state


def assert_states_equal(actual: MambaState, expected: MambaState, tolerance: float = ROUNDING) -> None:
    for ours, theirs in zip([*actual.conv, *actual.ssm], [*expected.conv, *expected.ssm], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


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
        transformers = pytest.importorskip("transformers")
        batch, length, sizes = request.param
        ours = make_lm(dtype=torch.float32, **sizes)
        config = ours.config
        theirs = transformers.MambaForCausalLM(
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


@torch.no_grad()
def test_step_by_step_equals_full_scan() -> None:
    lm, ids = make_lm(), random_ids(3, 21)
    full, state = logits_of(lm, ids)
    first, carried = logits_of(lm, ids[:, :1])
    rest, carried = decode(lm, ids[:, 1:], carried)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), full, rtol=0, atol=ROUNDING)
    assert_states_equal(carried, state)


@pytest.mark.parametrize("cuts", [(1, 2), (2, 9), (3, 4), (16, 20)])
@torch.no_grad()
def test_chunked_prefill_equals_one(cuts: tuple[int, int]) -> None:
    lm, ids = make_lm(), random_ids(2, 21)
    full, expected = logits_of(lm, ids)
    pieces, state = [], None
    for chunk in ids.tensor_split(cuts, dim=1):
        logits, state = logits_of(lm, chunk, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=ROUNDING)
    assert state is not None
    assert_states_equal(state, expected)


@pytest.mark.parametrize("has_prefix", [False, True])
@torch.no_grad()
def test_padded_rows_equal_each_row_alone(has_prefix: bool) -> None:
    lm, ids, lengths = make_lm(), random_ids(5, 11), torch.tensor([1, 2, 11, 3, 7])
    before = logits_of(lm, random_ids(5, 6))[1] if has_prefix else None
    embeddings = lm.embed(ids)
    for row, length in enumerate(lengths):
        embeddings[row, length:] = math.nan  # padding may be anything
    hidden, state = lm(embeddings, state=before, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, after = lm(lm.embed(ids[[row], :length]), state=None if before is None else before[[row]])
        torch.testing.assert_close(hidden[row, :length], alone[0], rtol=0, atol=ROUNDING)
        assert_states_equal(state[[row]], after)


@torch.no_grad()
def test_state_rows_can_be_selected_and_joined() -> None:
    lm, ids = make_lm(), random_ids(3, 8)
    _, state = logits_of(lm, ids)
    chosen = MambaState.concat([state[torch.tensor([2, 2])], state[0:1]])
    expected, _ = logits_of(lm, random_ids(3, 4), logits_of(lm, ids[[2, 2, 0]])[1])
    actual, _ = logits_of(lm, random_ids(3, 4), chosen)
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING)


def test_gradients_flow_through_the_state() -> None:
    lm, ids = make_lm(), random_ids(2, 12)
    weight = torch.randn(12, lm.config.padded_vocab_size, dtype=torch.float64)

    def gradients(*chunks: Tensor) -> list[Tensor]:
        pieces, state = [], None
        for chunk in chunks:
            logits, state = logits_of(lm, chunk, state)
            pieces.append(logits)
        return list(torch.autograd.grad((torch.cat(pieces, dim=1) * weight).sum(), list(lm.parameters())))

    for actual, expected in zip(gradients(ids[:, :5], ids[:, 5:]), gradients(ids), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_init_weights_follow_the_authors() -> None:
    lm = MambaLM(make_config(d_model=64, num_layers=4, vocab_size=500)).requires_grad_(False)
    lm.init_weights(torch.Generator().manual_seed(0))
    assert lm.backbone.embedding.weight.std() == pytest.approx(0.02, rel=0.02)
    assert lm.lm_head.weight is lm.backbone.embedding.weight
    for block in lm.backbone.layers:
        mixer = block.mixer
        steps = F.softplus(mixer.dt_proj.bias)
        assert steps.min() >= 0.001 * 0.999 and steps.max() <= 0.1 * 1.001  # float32 there and back
        assert steps.log().mean() == pytest.approx(math.log(0.01), abs=0.4)  # the middle on a log scale: 3.9 std errors
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
            assert 0.95 * bound < weight.abs().max() <= bound
            assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.12)


def test_init_weights_depend_on_the_generator_only() -> None:
    first, again, other = (MambaLM(make_config()) for _ in range(3))
    for lm, seed in ((first, 3), (again, 3), (other, 4)):
        lm.init_weights(torch.Generator().manual_seed(seed))
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not torch.equal(first.backbone.embedding.weight, other.backbone.embedding.weight)


@pytest.mark.parametrize(
    ("sizes", "rows"), [({"d_model": 48}, 2), ({"num_layers": 3}, 2), ({"d_state": 8}, 2), ({}, 3)]
)
def test_foreign_state_is_refused(sizes: dict[str, int], rows: int) -> None:
    _, state = logits_of(make_lm(**sizes), random_ids(rows, 4))
    lm = make_lm()
    with pytest.raises(ShapeError, match="state"):
        logits_of(lm, random_ids(2, 4), state)
    with pytest.raises(ShapeError, match="state"):
        lm.step(random_ids(2), state)


def test_repeated_states_have_repeatable_gradients() -> None:
    """Rows that share an image add up their gradients in the same order, however busy the machine is.

    (Plain indexing does not: under this load it gave other bits in 569 of 600 repeats.)
    """
    image_index = torch.arange(190) * 32 // 190
    tensor, grad = torch.randn(32, 3, 256), torch.randn(190, 3, 256)

    def gradient() -> torch.Tensor:
        leaf = tensor.clone().requires_grad_()
        MambaState([leaf], [leaf])[image_index].conv[0].backward(grad)
        assert leaf.grad is not None
        return leaf.grad

    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(200))
    finally:
        for process in load:
            process.kill()
            process.wait()
