"""Adapters: each of them acts and learns on every backend, and merging changes nothing but the weights.

Triton's kernels run on a GPU, or are interpreted in a process of their own (see tests/ops/test_triton.py).
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from cobra import ops
from cobra.config import LORA_TARGETS, LoraConfig, ModelConfig
from cobra.errors import CheckpointError, ConfigError
from cobra.models.build import build_model, cast_parameters
from cobra.models.lora import adapters, attach_adapters, has_adapters, merge_adapters, merged_state
from cobra.models.mamba import MambaBlock, MambaLM
from cobra.models.vlm import CobraVLM
from cobra.models.weights import KEPT_IN_FLOAT32
from cobra.ops import dispatch, fused
from cobra.text.prompt import IGNORE_INDEX

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LORA = LoraConfig(rank=3, alpha=6.0)
PLACES = [f"llm.backbone.layers.{i}.mixer.{name}" for i in range(2) for name in LORA_TARGETS[:-1]] + ["llm.lm_head"]
IDS = torch.randint(1, 365, (2, 5), generator=torch.Generator().manual_seed(1))
# Of the largest logit: float32 sums of some ten terms in another order, through two layers.
ROUNDING = 1e-5


@pytest.fixture
def config(small_model_config: ModelConfig) -> ModelConfig:
    return replace(small_model_config, llm=replace(small_model_config.llm, d_model=16))


@pytest.fixture
def plain(config: ModelConfig) -> CobraVLM:
    return make_plain(config)


@pytest.fixture
def model(plain: CobraVLM) -> CobraVLM:
    """The same weights, with fresh adapters."""
    return attached(copy.deepcopy(plain))


@pytest.fixture(params=dispatch.discover())
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Run the test once per backend, on the device that this backend takes here."""
    backend = dispatch.discover()[request.param]
    kinds = [torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()]
    fitting = [kind for kind in kinds if backend.supports(kind, torch.float32) is None]
    if backend.available() is not None or not fitting:
        pytest.skip(f"{request.param} does not run here: {backend.available() or 'no device for it'}")
    with ops.use_backend(request.param):
        yield fitting[0]


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels are tested in this process")
def test_triton_through_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", __file__, "-k", "triton and not through", "-p", "no:cacheprovider"]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "3 passed" in result.stdout, result.stdout[-5000:] + result.stderr[-2000:]


@torch.no_grad()
def make_plain(config: ModelConfig) -> CobraVLM:
    """A model in which each projection matters; fresh ones take too small steps to see their input."""
    model = build_model(config, seed=0).eval().requires_grad_(False)
    for block in model.llm.backbone.layers:
        mixer = block.mixer
        mixer.x_proj.weight *= 4
        mixer.out_proj.weight *= 4
        mixer.dt_proj.bias += 3
    return model


def attached(model: CobraVLM, config: LoraConfig = LORA) -> CobraVLM:
    attach_adapters(model, config, torch.Generator().manual_seed(2))
    return model


@torch.no_grad()
def fill(model: CobraVLM, *places: str) -> CobraVLM:
    """Give B values at these places, or everywhere, and zeros elsewhere; the added weights are about 0.1 large."""
    generator = torch.Generator().manual_seed(3)
    for name, adapter in adapters(model).items():
        drawn = torch.randn(adapter.B.shape, generator=generator)
        size = 0.1 / adapter.scale / adapter.A.abs().mean().cpu()
        adapter.B.copy_(drawn * size * (name in places or not places))
    return model


def read(llm: MambaLM, ids: Tensor = IDS) -> Tensor:
    """Logits of a sequence read at once, [B, L, V]."""
    ids = ids.to(llm.lm_head.weight.device)
    return llm.head(llm(llm.embed(ids))[0])


def decode(llm: MambaLM, ids: Tensor = IDS) -> Tensor:
    """The same, token by token after the second."""
    ids = ids.to(llm.lm_head.weight.device)
    hidden, state = llm(llm.embed(ids[:, :2]))
    logits = [llm.head(hidden[:, 0]), llm.head(hidden[:, 1])]
    for column in ids[:, 2:].T:
        hidden, state = llm.step(column, state)
        logits.append(llm.head(hidden))
    return torch.stack(logits, dim=1)


def effective(model: CobraVLM) -> dict[str, Tensor]:
    """What each adapted weight amounts to, in float64 and differentiable, by the plain model's names."""
    return {
        f"{name}.weight": model.get_submodule(name).weight.double()
        + LORA.alpha / LORA.rank * adapter.B.double() @ adapter.A.double()
        for name, adapter in adapters(model).items()
    }


def logits_with(plain: CobraVLM, weights: dict[str, Tensor], ids: Tensor = IDS) -> Tensor:
    """The plain model's logits with other weights (a tied one counts at both places)."""

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llm = plain.llm

        def forward(self, ids: Tensor) -> Tensor:
            return read(self.llm, ids)

    return torch.func.functional_call(Read(), weights, (ids,))


class TestOnEveryBackend:
    def test_fresh_adapters_change_nothing(self, device: torch.device, plain: CobraVLM, model: CobraVLM) -> None:
        plain, model = plain.to(device), model.to(device)
        assert torch.equal(read(model.llm), read(plain.llm))
        # with gradients on, the plain model too takes the ordinary step, not the kernel for all blocks at once
        assert torch.equal(decode(model.llm), decode(plain.llm))

    @torch.no_grad()
    def test_each_adapter_alone_acts(self, device: torch.device, plain: CobraVLM, model: CobraVLM) -> None:
        exact = copy.deepcopy(plain).double()
        plain, model = plain.to(device), model.to(device)
        before = {run: run(plain.llm) for run in (read, decode)}
        for place in PLACES:
            fill(model, place)
            expected = logits_with(exact, {name: weight.cpu() for name, weight in effective(model).items()})
            size = float(expected.abs().max())
            for run, unadapted in before.items():
                logits = run(model.llm)
                torch.testing.assert_close(logits.cpu().double(), expected, rtol=0, atol=ROUNDING * size)
                assert (logits - unadapted).abs().max() > 1000 * ROUNDING * size, (place, run)

    def test_each_adapter_learns(self, device: torch.device, model: CobraVLM) -> None:
        llm = fill(model.to(device)).llm
        F.cross_entropy(read(llm)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten().to(device)).backward()
        for name, parameter in llm.named_parameters():
            if ".adapter." in name:
                assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
            else:
                assert parameter.grad is None, name


class TestAttaching:
    def test_names_and_numbers(self, plain: CobraVLM, model: CobraVLM, config: ModelConfig) -> None:
        llm, r = config.llm, LORA.rank
        assert list(adapters(model)) == PLACES and has_adapters(model) and not has_adapters(plain)
        added = {f"{place}.adapter.{part}" for place in PLACES for part in "AB"}
        assert model.state_dict().keys() == plain.state_dict().keys() | added
        sums = [  # of the two sides of each projection
            llm.d_model + 2 * llm.d_inner,
            llm.d_inner + llm.rank + 2 * llm.d_state,
            llm.rank + llm.d_inner,
            llm.d_inner + llm.d_model,
        ]
        learn = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert learn.keys() == added
        expected = r * (llm.num_layers * sum(sums) + llm.d_model + llm.padded_vocab_size)
        assert sum(parameter.numel() for parameter in learn.values()) == expected

    @pytest.mark.parametrize("target", LORA_TARGETS)
    def test_targets_are_chosen(self, plain: CobraVLM, target: str) -> None:
        model = attached(plain, replace(LORA, targets=[target]))
        assert list(adapters(model)) == [place for place in PLACES if place.removeprefix("llm.lm_").endswith(target)]

    def test_neither_order_nor_repetition_of_targets_matters(self, plain: CobraVLM, model: CobraVLM) -> None:
        other = attached(plain, replace(LORA, targets=[*reversed(LORA_TARGETS), "in_proj"]))
        assert torch.equal(read(fill(other).llm), read(fill(model).llm))

    def test_a_seed_gives_the_same_adapters(self, plain: CobraVLM, model: CobraVLM) -> None:
        other = attached(plain.to(torch.bfloat16))
        for name, adapter in adapters(model).items():
            assert torch.equal(adapter.A, adapters(other)[name].A)
            assert adapter.A.dtype == adapter.B.dtype == torch.float32
            assert adapter.A.std() > 0 and not adapter.B.any()

    def test_works_without_memory(self, plain: CobraVLM) -> None:
        assert all(adapter.B.is_meta and adapter.A.is_meta for adapter in adapters(attached(plain.to("meta"))).values())

    def test_twice_is_an_error(self, model: CobraVLM) -> None:
        with pytest.raises(ConfigError, match="has adapters already"):
            attached(model)

    def test_state_is_saved_and_loaded(self, plain: CobraVLM, model: CobraVLM, tmp_path: Path) -> None:
        fill(model)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other = attached(plain)
        assert not torch.equal(read(other.llm), read(model.llm))
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
        assert torch.equal(read(other.llm), read(model.llm))

    def test_a_copy_has_its_own(self, model: CobraVLM) -> None:
        fill(model)
        before, other = read(model.llm), copy.deepcopy(model)
        for adapter in adapters(other).values():
            nn.init.zeros_(adapter.B)
        assert torch.equal(read(model.llm), before) and not torch.equal(read(other.llm), before)
        merge_adapters(other)
        assert torch.equal(read(model.llm), before)


class TestFusedKernels:
    """They read weights directly; whatever has an adapter is not for them."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        found: list[str] = []
        for name in ("stack_step", "linear"):
            kernel = getattr(fused, name)

            def counted(*args: Any, name: str = name, kernel: Any = kernel) -> Any:
                found.append(name)
                return kernel(*args)

            monkeypatch.setattr(fused, name, counted)
        return found

    @pytest.mark.parametrize("target", LORA_TARGETS)
    @torch.no_grad()
    def test_step_aside(self, plain: CobraVLM, target: str, calls: list[str]) -> None:
        decode(plain.llm, IDS[:, :3])
        assert {*calls} == {"stack_step", "linear"}
        model = attached(plain, replace(LORA, targets=[target]))
        calls.clear()
        decode(model.llm, IDS[:, :3])
        assert {*calls} == ({"stack_step"} if target == "head" else {"linear"})
        for block in model.llm.backbone.layers:
            assert isinstance(block, MambaBlock)
            assert (block.plain_weights(model.config.llm.norm_eps) is None) == (target != "head")
        merge_adapters(model)
        calls.clear()
        decode(model.llm, IDS[:, :3])
        assert {*calls} == {"stack_step", "linear"}


class TestLearning:
    def test_gradients_are_the_derivatives(self, plain: CobraVLM, model: CobraVLM) -> None:
        """Against the plain model whose weights are computed from A and B."""
        plain, model = plain.double(), fill(model.double())
        parts = [part for adapter in adapters(model).values() for part in (adapter.A, adapter.B)]
        results = [
            torch.autograd.grad(logits.logsumexp(-1).sum(), parts)
            for logits in (read(model.llm), logits_with(plain, effective(model)))
        ]
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)

    def test_through_image_and_loss(self, model: CobraVLM) -> None:
        model.projector.requires_grad_(True)
        fill(model)
        pixels = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        loss = model(IDS, pixels=[pixels], labels=IDS).loss
        loss.backward()
        for name, parameter in model.named_parameters():
            learns = ".adapter." in name or name.startswith("projector.")
            assert (parameter.grad is not None and bool(parameter.grad.any())) == learns, name

    def test_the_input_is_dropped_in_training_alone(self, plain: CobraVLM) -> None:
        model = attached(plain, replace(LORA, dropout=0.5))
        fill(model)
        at_rest = read(model.llm)
        assert torch.equal(at_rest, read(model.llm))
        model.train()
        drawn = read(model.llm)
        assert not torch.allclose(drawn, at_rest) and not torch.equal(drawn, read(model.llm))

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_recomputed_blocks_have_the_same_gradients(self, plain: CobraVLM, dropout: float) -> None:
        model = attached(plain, replace(LORA, dropout=dropout)).train()
        fill(model)
        results = []
        for every in (None, 1):
            model.llm.checkpoint_activations(every)
            torch.manual_seed(0)
            results.append(gradients(model))
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)

    @pytest.mark.parametrize("every", [None, 1])
    def test_compiled_blocks_equal_eager(self, model: CobraVLM, every: int | None) -> None:
        fill(model).train()
        expected = gradients(model)
        model.llm.checkpoint_activations(every)
        torch._dynamo.reset()
        for block in model.llm.backbone.layers:
            block.compile(backend="aot_eager", fullgraph=True)
        for actual, wanted in zip(gradients(model), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))

    @pytest.mark.parametrize("autocast", [False, True])
    def test_frozen_weights_in_16_bits(self, model: CobraVLM, autocast: bool) -> None:
        """Weights rest and compute in bfloat16, adapters learn in float32."""
        fill(model)
        expected = gradients(model)
        freeze_in_bfloat16(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = gradients(model)
        for actual, wanted in zip(found, expected, strict=True):
            assert actual.dtype == torch.float32
            assert (actual - wanted).norm() < 0.1 * wanted.norm()  # bfloat16 has 8 bits, and every operation rounds


def gradients(model: CobraVLM) -> list[Tensor]:
    loss = F.cross_entropy(read(model.llm)[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())
    return list(torch.autograd.grad(loss, [part for each in adapters(model).values() for part in (each.A, each.B)]))


def freeze_in_bfloat16(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not name.endswith(KEPT_IN_FLOAT32):
            parameter.data = parameter.data.bfloat16()


class TestMerging:
    def test_merged_equals_unmerged(self, plain: CobraVLM, model: CobraVLM) -> None:
        fill(model)
        weights, unmerged = effective(model), read(model.llm)
        merge_adapters(model)
        assert model.state_dict().keys() == plain.state_dict().keys() and not has_adapters(model)
        assert not any(module._forward_hooks for module in model.modules())
        for name, expected in weights.items():
            torch.testing.assert_close(model.get_parameter(name).double(), expected, rtol=1e-6, atol=1e-7)
        expected = logits_with(copy.deepcopy(plain).double(), weights).detach()
        size = float(expected.abs().max())
        for logits in (unmerged, read(model.llm), decode(model.llm)):
            torch.testing.assert_close(logits.double(), expected, rtol=0, atol=ROUNDING * size)
        assert not torch.allclose(read(plain.llm), unmerged, atol=100 * ROUNDING * size)

    def test_the_head_stays_tied(self, plain: CobraVLM, model: CobraVLM) -> None:
        fill(model, "llm.lm_head")
        merge_adapters(model)
        assert model.llm.lm_head.weight is model.llm.backbone.embedding.weight
        assert not torch.equal(model.llm.lm_head.weight, plain.llm.lm_head.weight)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_state_is_merged_like_the_modules(self, plain: CobraVLM, dtype: torch.dtype) -> None:
        cast_parameters(plain, dtype)
        model = attached(plain)
        fill(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        untied = {name: tensor for name, tensor in state.items() if name != "llm.lm_head.weight"}
        before = {name: tensor.clone() for name, tensor in state.items()}
        merged = merged_state(state, LORA)
        assert all(torch.equal(before[name], state[name]) for name in before)
        merge_adapters(model)
        expected = model.state_dict()
        assert merged.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(merged[name], tensor) and merged[name].dtype == tensor.dtype, name
        assert merged["llm.lm_head.weight"] is merged["llm.backbone.embedding.weight"]
        of_part = merged_state({name.removeprefix("llm."): tensor for name, tensor in untied.items()}, LORA)
        assert torch.equal(of_part["backbone.embedding.weight"], expected["llm.lm_head.weight"])
        assert "lm_head.weight" not in of_part

    def test_a_plain_state_stays_as_it_is(self, plain: CobraVLM) -> None:
        state = plain.state_dict()
        assert merged_state(state, LORA) == dict(state)

    @pytest.mark.parametrize("part", ["weight", "adapter.A", "adapter.B"])
    def test_an_incomplete_state_is_an_error(self, model: CobraVLM, part: str) -> None:
        state = model.state_dict()
        del state[f"{PLACES[2]}.{part}"]
        with pytest.raises(CheckpointError, match=f"lacks a part of {PLACES[2]}"):
            merged_state(state, LORA)

    def test_another_rank_is_an_error(self, model: CobraVLM) -> None:
        with pytest.raises(CheckpointError, match=r"train\.lora\.rank=4"):
            merged_state(model.state_dict(), replace(LORA, rank=4))


def test_sharded_blocks_learn_the_same(model: CobraVLM, config: ModelConfig, tmp_path: Path) -> None:
    """Two ranks with the same rows; bfloat16 weights that are frozen and float32 adapters in one unit of FSDP."""
    fill(model)
    freeze_in_bfloat16(model)
    expected = gradients(model)
    mp.spawn(_learn_sharded, (config, tmp_path), nprocs=2)
    for found in (torch.load(tmp_path / f"{rank}.pt") for rank in range(2)):
        for stored, compiled, cast, wanted in zip(*found.values(), expected, strict=True):
            for actual in (stored, compiled):
                torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
            assert (cast - wanted).norm() < 0.1 * wanted.norm()  # adapters too compute in bfloat16 everywhere


def _learn_sharded(rank: int, config: ModelConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, list[Tensor]] = {}
    for way in ("stored", "compiled", "cast"):
        model = attached(make_plain(config))
        fill(model)
        freeze_in_bfloat16(model)
        kept = {id(parameter) for name, parameter in model.named_parameters() if name.endswith(KEPT_IN_FLOAT32)}
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if way == "cast":
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
                param_dtype_override_fn=lambda parameter, kept=kept: torch.float32 if id(parameter) in kept else None,
            )
        if way == "compiled":
            model.llm.checkpoint_activations(1)
            model.train()
        for block in model.llm.backbone.layers:
            if way == "compiled":
                block.compile(backend="aot_eager")
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        labels = torch.cat([torch.full_like(IDS[:, :1], IGNORE_INDEX), IDS[:, 1:]], dim=1)
        model(IDS, labels=labels).loss.backward()
        parts = [part for adapter in adapters(model).values() for part in (adapter.A, adapter.B)]
        found[way] = [part.grad.full_tensor() for part in parts]
        assert all(part.grad.dtype == torch.float32 for part in parts)
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.llm.parameters())
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # a plain exit after gloo sometimes aborts
