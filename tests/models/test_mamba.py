"""Our Mamba against the official one's fixture, against transformers, and against itself."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from cobra import ops
from cobra.config import LLMConfig
from cobra.errors import ConfigError, ShapeError
from cobra.models.build import cast_parameters
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState
from cobra.models.weights import assign
from cobra.ops import fused

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


class TestPackedRows:
    """Several texts in one row, kept apart by `resets`."""

    TEXTS = ([5, 1, 9], [8, 5, 2])  # tokens of each text, per row; one is shorter than the convolution is wide

    def packed(self, lm: MambaLM, state: MambaState | None) -> tuple[Tensor, MambaState]:
        resets = torch.zeros(2, 15, dtype=torch.bool)
        for row, texts in enumerate(self.TEXTS):
            resets[row, [texts[0], texts[0] + texts[1]]] = True
        return lm(lm.embed(random_ids(2, 15)), state=state, resets=resets)

    def alone(self, lm: MambaLM, state: MambaState | None) -> tuple[Tensor, MambaState]:
        rows, ends = [], []
        for row, (ids, texts) in enumerate(zip(random_ids(2, 15), self.TEXTS, strict=True)):
            before, pieces, after = None if state is None else state[[row]], [], None
            for text in ids.split(texts):
                hidden, after = lm(lm.embed(text[None]), state=before)
                before = None  # the state belongs to the first text
                pieces.append(hidden)
            assert after is not None
            rows.append(torch.cat(pieces, dim=1))
            ends.append(after)
        return torch.cat(rows), MambaState.concat(ends)

    @pytest.mark.parametrize("every", [None, 1], ids=["kept", "recomputed"])
    @pytest.mark.parametrize("has_prefix", [False, True])
    def test_packed_texts_equal_each_text_alone(self, has_prefix: bool, every: int | None) -> None:
        lm = make_lm()
        lm.checkpoint_activations(every)
        weight = torch.randn(2, 15, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        found = []
        for run in (self.packed, self.alone):
            prefix = logits_of(lm, random_ids(2, 6))[1] if has_prefix else None
            hidden, state = run(lm, prefix)
            loss = (hidden * weight).sum() + sum(t.sum() for t in (*state.conv, *state.ssm))
            found.append((hidden, state, torch.autograd.grad(loss, list(lm.backbone.parameters()))))
        (hidden, state, gradients), (expected, expected_state, expected_gradients) = found
        torch.testing.assert_close(hidden, expected, rtol=0, atol=ROUNDING)
        assert_states_equal(state, expected_state)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))

    @torch.no_grad()
    def test_reset_at_the_first_token_forgets_the_prefix(self) -> None:
        lm, ids = make_lm(), random_ids(2, 7)
        _, prefix = logits_of(lm, random_ids(2, 6))
        resets = torch.zeros(2, 7, dtype=torch.bool)
        resets[1, 0] = True
        hidden, _ = lm(lm.embed(ids), state=prefix, resets=resets)
        torch.testing.assert_close(hidden[0], lm(lm.embed(ids), state=prefix)[0][0], rtol=0, atol=ROUNDING)
        torch.testing.assert_close(hidden[1], lm(lm.embed(ids))[0][1], rtol=0, atol=ROUNDING)

    def test_resets_that_do_not_fit_are_refused(self) -> None:
        lm = make_lm()
        with pytest.raises(ShapeError, match="resets"):
            lm(lm.embed(random_ids(2, 4)), resets=torch.zeros(2, 3, dtype=torch.bool))


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


def test_init_weights_depend_on_the_generator_only() -> None:
    first, again, other = (MambaLM(make_config()) for _ in range(3))
    for lm, seed in ((first, 3), (again, 3), (other, 4)):
        lm.init_weights(torch.Generator().manual_seed(seed))
    assert all(map(torch.equal, first.parameters(), again.parameters()))
    assert not torch.equal(first.backbone.embedding.weight, other.backbone.embedding.weight)


@pytest.mark.parametrize(
    ("sizes", "rows", "found", "expected"),
    [
        ({"d_model": 48}, 2, "[2, 96, 16]", "[2, 64, 16]"),
        ({"num_layers": 3}, 2, "3 and 3 layers", "has 2"),
        ({"d_state": 8}, 2, "[2, 64, 8]", "[2, 64, 16]"),
        ({"d_conv": 3}, 2, "[2, 2, 64]", "[2, 3, 64]"),
        ({}, 3, "[3, 64, 16]", "[2, 64, 16]"),
    ],
    ids=["width", "depth", "state size", "convolution", "rows"],
)
def test_foreign_state_is_refused(sizes: dict[str, int], rows: int, found: str, expected: str) -> None:
    _, state = logits_of(make_lm(**sizes), random_ids(rows, 4))
    assert_refused(state, found, expected)


def test_state_of_which_one_layer_differs_is_refused() -> None:
    _, state = logits_of(make_lm(), random_ids(2, 4))
    conv, ssm = state.conv, state.ssm
    assert_refused(MambaState([conv[0], conv[1][:, 1:]], ssm), "layer 1", "[2, 2, 64]")
    assert_refused(MambaState(conv, [ssm[0], ssm[1][:1]]), "layer 1", "[1, 64, 16]")
    assert_refused(MambaState(conv[:1], ssm), "1 and 2 layers", "has 2")
    assert_refused(MambaState(conv, [ssm[0], ssm[1].to("meta")]), "meta (ssm)", "input is on cpu")
    assert_refused(MambaState(conv, [ssm[0], ssm[1].long()]), "int64", "floating point")


def assert_refused(state: MambaState, *parts: str) -> None:
    lm = make_lm()
    for take in (lambda: logits_of(lm, random_ids(2, 4), state), lambda: lm.step(random_ids(2), state)):
        with pytest.raises(ShapeError) as caught:
            take()
        assert all(part in str(caught.value) for part in ("state", *parts))


@torch.no_grad()
def test_state_of_another_precision_is_taken() -> None:
    lm, ids = make_lm(dtype=torch.float32), random_ids(2, 4)
    _, state = logits_of(lm, random_ids(2, 6))
    coarse = MambaState([t.bfloat16() for t in state.conv], [t.bfloat16() for t in state.ssm])
    rounded = MambaState([t.float() for t in coarse.conv], [t.float() for t in coarse.ssm])
    for (actual, after), (expected, _) in (
        (logits_of(lm, ids, coarse), logits_of(lm, ids, rounded)),
        (lm.step(ids[:, 0], coarse), lm.step(ids[:, 0], rounded)),
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)  # float32, logits of size 1
        assert {t.dtype for t in (*after.conv, *after.ssm)} == {torch.float32}


def test_inputs_of_the_wrong_kind_are_refused() -> None:
    lm = make_lm()
    for embeddings in (torch.zeros(2, 4, 31), torch.zeros(4, 32), torch.zeros(2, 4, 32, dtype=torch.int64)):
        with pytest.raises(ShapeError, match=r"embeddings are .*expected floating point \[batch, length, 32\]"):
            lm(embeddings)
    with pytest.raises(ShapeError, match=r"input_ids are torch.float32 \[2, 4\], expected int64 \[batch, length\]"):
        lm.embed(torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"\[4\], expected int64 \[batch, length\]"):
        lm.embed(torch.zeros(4, dtype=torch.int64))
    _, state = logits_of(lm, random_ids(2, 4))
    with pytest.raises(ShapeError, match=r"\[2, 1\], expected int64 \[batch\]"):
        lm.step(random_ids(2, 1), state)


@torch.no_grad()
def test_saved_state_continues_as_the_one_in_memory(tmp_path: Path) -> None:
    lm = make_lm()
    _, state = logits_of(lm, random_ids(2, 9))
    state.save(tmp_path / "state.safetensors")
    loaded = MambaState.load(tmp_path / "state.safetensors")
    expected, actual = (decode(lm, random_ids(2, 3), start)[0] for start in (state, loaded))
    assert torch.equal(actual, expected)


class TestCheckpointing:
    """Blocks computed again in the backward pass instead of being kept."""

    @staticmethod
    def run(lm: MambaLM) -> tuple[Tensor, MambaState]:
        """Two chunks of rows of different lengths, the second from the state of the first."""
        ids = random_ids(3, 20)
        _, state = lm(lm.embed(ids[:, :11]), lengths=torch.tensor([11, 3, 1]))
        hidden, state = lm(lm.embed(ids[:, 11:]), state=state, lengths=torch.tensor([9, 2, 5]))
        return hidden.square().sum() + sum(t.sum() for t in (*state.conv, *state.ssm)), state

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("every", [1, 2])
    def test_gradients_are_bit_equal(self, every: int, dtype: torch.dtype) -> None:
        lm = make_lm(dtype=dtype, num_layers=3)
        expected_loss, expected_state = self.run(lm)
        expected = torch.autograd.grad(expected_loss, list(lm.parameters()))
        lm.checkpoint_activations(every)
        loss, state = self.run(lm)
        assert torch.equal(loss, expected_loss)
        assert_states_equal(state, expected_state, tolerance=0)
        assert all(map(torch.equal, torch.autograd.grad(loss, list(lm.parameters())), expected))

    def test_memory_kept_for_backward_shrinks(self) -> None:
        lm, block_inputs = make_lm(dtype=torch.float32, num_layers=4), 2 * 64 * (32 + 32) * 4  # hidden and residual

        def kept() -> int:
            """Bytes saved for the backward pass, besides parameters and what checkpointed blocks start from."""
            sizes = {parameter.untyped_storage().data_ptr(): 0 for parameter in lm.parameters()}

            def pack(tensor: Tensor) -> Tensor:
                sizes.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                hidden, _ = lm(lm.embed(random_ids(2, 64)))
            hidden.sum().backward()
            return sum(sizes.values())

        everything = kept()
        lm.checkpoint_activations(2)
        half = kept() + 2 * block_inputs
        lm.checkpoint_activations(1)
        least = kept() + 4 * block_inputs
        assert half < 0.65 * everything and least < 0.3 * everything
        lm.checkpoint_activations(None)
        assert kept() == everything

    @pytest.mark.parametrize("mode", ["eval", "no_grad"])
    def test_only_training_recomputes(self, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        lm = make_lm()
        lm.checkpoint_activations(1)
        monkeypatch.setattr("cobra.models.mamba.checkpoint", lambda *_, **__: pytest.fail("recomputed"))
        lm.train(mode != "eval")
        with torch.set_grad_enabled(mode != "no_grad"):
            self.run(lm)

    def test_impossible_setting_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="every=0 must be at least 1"):
            make_lm().checkpoint_activations(0)


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
    transformers = pytest.importorskip("transformers")
    config = tiny_config(f"model/llm={name}").model.llm
    with torch.device("meta"):
        ours = MambaLM(config)
        theirs = transformers.MambaForCausalLM(
            transformers.MambaConfig(
                vocab_size=config.padded_vocab_size,
                hidden_size=config.d_model,
                num_hidden_layers=config.num_layers,
                tie_word_embeddings=True,
            )
        )

    def shapes(lm: torch.nn.Module) -> dict[str, torch.Size]:
        return {key.replace(".embeddings.", ".embedding."): p.shape for key, p in lm.named_parameters()}

    assert shapes(ours) == shapes(theirs)
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 1) == PUBLIC_SIZES[name]


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


class TestFusedStep:
    """One kernel for all blocks: the same numbers, and never past a module that someone has changed."""

    @pytest.fixture
    def lm(self) -> MambaLM:
        pytest.importorskip("numba")
        return make_lm(dtype=torch.float32).requires_grad_(False)

    @staticmethod
    def step(lm: MambaLM) -> tuple[Tensor, MambaState]:
        _, state = logits_of(lm, random_ids(3, 9))
        hidden, after = lm.step(random_ids(3), state)
        return lm.head(hidden), after

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @torch.no_grad()
    def test_equals_the_ordinary_step(self, lm: MambaLM, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []
        for name in ("stack_step", "linear"):
            kernel = getattr(fused, name)
            monkeypatch.setattr(fused, name, lambda *args, kernel=kernel: calls.append(1) or kernel(*args))
        cast_parameters(lm, dtype)
        logits, state = self.step(lm)
        assert len(calls) == 2
        with ops.use_backend("reference"):
            expected, expected_state = self.step(lm)
        assert logits.dtype == expected.dtype == dtype
        # bfloat16: the ordinary step rounds between all operations, to 8 bits
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        scale = float(expected.float().abs().max())
        torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * scale)
        for ours, theirs in zip([*state.conv, *state.ssm], [*expected_state.conv, *expected_state.ssm], strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))

    @pytest.mark.parametrize(
        "path", ["mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj", "mixer.conv1d"]
    )
    @torch.no_grad()
    def test_adapters_take_part(self, lm: MambaLM, path: str) -> None:
        plain, _ = self.step(lm)
        parent, name = lm.backbone.layers[1].get_submodule(path.split(".")[0]), path.split(".")[1]
        module = getattr(parent, name)

        class Adapted(type(module)):
            @property
            def weight(self) -> Tensor:
                return 2 * super().__getattr__("weight")

        module.__class__ = Adapted
        adapted, _ = self.step(lm)
        with ops.use_backend("reference"):
            expected, _ = self.step(lm)
        torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(adapted, plain, rtol=1e-3)

    @pytest.mark.parametrize("change", ["in_proj bias", "out_proj bias", "head bias", "no conv bias", "eps"])
    @torch.no_grad()
    def test_whatever_a_block_has_takes_part(self, lm: MambaLM, change: str) -> None:
        mixer = lm.backbone.layers[1].mixer
        plain, _ = self.step(lm)
        if change == "in_proj bias":
            mixer.in_proj.bias = torch.nn.Parameter(torch.ones(mixer.in_proj.out_features))
        elif change == "out_proj bias":
            mixer.out_proj.bias = torch.nn.Parameter(torch.ones(mixer.out_proj.out_features))
        elif change == "head bias":
            lm.lm_head.bias = torch.nn.Parameter(torch.ones(lm.lm_head.out_features))
        elif change == "no conv bias":
            mixer.conv1d.bias = None
        else:
            lm.backbone.layers[1].norm.eps = 1.0
        changed, _ = self.step(lm)
        with ops.use_backend("reference"):
            expected, _ = self.step(lm)
        torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(changed, plain, rtol=1e-3)

    @torch.no_grad()
    def test_states_of_another_dtype_become_the_models(self, lm: MambaLM) -> None:
        """As after a prefill under autocast."""
        _, state = logits_of(lm, random_ids(3, 9))
        state = MambaState([tensor.bfloat16() for tensor in state.conv], state.ssm)
        _, after = lm.step(random_ids(3), state)
        with ops.use_backend("reference"):
            _, expected = lm.step(random_ids(3), state)
        for ours, theirs in zip([*after.conv, *after.ssm], [*expected.conv, *expected.ssm], strict=True):
            assert ours.dtype == theirs.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("path", ["backbone.layers.0.mixer.in_proj", "backbone.layers.1.norm", "lm_head"])
    @torch.no_grad()
    def test_hooks_are_called(self, lm: MambaLM, path: str) -> None:
        calls: list[int] = []
        _, state = logits_of(lm, random_ids(3, 9))
        lm.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
        hidden, _ = lm.step(random_ids(3), state)
        lm.head(hidden)
        assert calls == [1]


@pytest.mark.parametrize("every", [None, 1])
def test_compiled_model_equals_eager(every: int | None) -> None:
    """Whole, for sequences of any length, with states, and step by step."""
    lm = make_lm(dtype=torch.float32, num_layers=1)
    lm.checkpoint_activations(every)
    torch._dynamo.reset()
    compiled = torch.compile(lm, backend="aot_eager", fullgraph=True, dynamic=True)

    def gradients(model: Any, length: int) -> list[Tensor]:
        hidden, state = model(lm.embed(random_ids(2, length)), lengths=torch.tensor([length, 3]))
        hidden, state = model(lm.embed(random_ids(2, 4)), state=state)
        loss = hidden.square().sum() + state.ssm[0].sum()
        return list(torch.autograd.grad(loss, list(lm.parameters()), materialize_grads=True))

    for length in (7, 11):
        for actual, expected in zip(gradients(compiled, length), gradients(lm, length), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()) + 1e-12)
    with torch.no_grad():
        _, state = lm(lm.embed(random_ids(2, 5)))
        step = torch.compile(lm.step, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(step(random_ids(2), state)[0], lm.step(random_ids(2), state)[0])
