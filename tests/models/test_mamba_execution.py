"""Ways to run the same Mamba that must not change its numbers: recomputed, fused, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cobra import ops
from cobra.errors import ConfigError
from cobra.models.build import cast_parameters
from cobra.models.mamba import MambaLM
from cobra.models.state import MambaState
from cobra.ops import fused

from .mamba_cases import assert_states_equal, logits_of, make_lm, random_ids


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
        monkeypatch.setattr("cobra.models.mamba_block.checkpoint", lambda *_, **__: pytest.fail("recomputed"))
        lm.train(mode != "eval")
        with torch.set_grad_enabled(mode != "no_grad"):
            self.run(lm)

    def test_impossible_setting_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="every=0 must be at least 1"):
            make_lm().checkpoint_activations(0)


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
