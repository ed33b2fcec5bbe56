"""A Mamba with quantised projections: near the plain one, the same on every path, and for inference only."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cobra import ops
from cobra.config import LoraConfig
from cobra.errors import ConfigError, NumericsError
from cobra.models.lora import attach_adapters
from cobra.models.mamba import MambaLM
from cobra.models.quantized import QuantizedLinear, is_quantized, quantize_projections
from cobra.ops import fused
from cobra.ops.quantized import dequantize

from .mamba_cases import decode, logits_of, make_lm, random_ids

NAMES = ["int8", "int4"]


def quantized_lm(name: str, dtype: torch.dtype = torch.float32, **sizes: int) -> MambaLM:
    lm = make_lm(dtype=dtype, **({"d_model": 64} | sizes)).requires_grad_(False)
    quantize_projections(lm, name)
    return lm.eval()


def dequantized(lm: MambaLM) -> MambaLM:
    """The same numbers in ordinary modules."""
    plain = copy.deepcopy(lm)
    for path, module in lm.named_modules():
        if isinstance(module, QuantizedLinear):
            linear = nn.Linear(module.shape[1], module.shape[0], bias=False)
            linear.weight = nn.Parameter(dequantize(module.quantized_weight, torch.float32), requires_grad=False)
            plain.set_submodule(path, linear)
    return plain


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_path_computes_with_the_dequantised_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill of many rows and of few, steps with the kernel and without one."""
    lm = quantized_lm(name)
    plain, ids = dequantized(lm), random_ids(2, 12)
    expected, expected_state = logits_of(plain, ids)
    logits, state = logits_of(lm, ids)  # 24 rows
    assert_close(logits, expected)
    assert_close(logits_of(lm, ids[:, :3])[0], expected[:, :3])  # 6 rows
    expected, _ = decode(plain, ids[:, :5], expected_state)
    kernels: list[str] = []

    def counted(kernel: str, run: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            found = run(*args)
            kernels.append(kernel if found is not None else "none")
            return found

        return call

    for kernel in ("stack_step", "linear"):
        monkeypatch.setattr(fused, kernel, counted(kernel, getattr(fused, kernel)))
    stepped, after = decode(lm, ids[:, :5], state)
    if ops.dispatch.choose("cpu", torch.float32, None)[0][0].NAME == "cpu":
        assert kernels == ["stack_step", "linear"] * 5
    assert_close(stepped, expected)
    assert all(tensor.dtype == torch.float32 for tensor in (*after.conv, *after.ssm))
    with ops.use_backend("reference"):
        assert_close(decode(lm, ids[:, :5], state)[0], expected)


@pytest.mark.parametrize(("name", "error"), [("int8", 0.02), ("int4", 0.4)])
@torch.no_grad()
def test_logits_are_near_the_plain_models(name: str, error: float) -> None:
    ids = random_ids(2, 12)
    expected, _ = logits_of(make_lm(dtype=torch.float32, d_model=64), ids)
    logits, _ = logits_of(quantized_lm(name), ids)
    relative = float((logits - expected).norm() / expected.norm())
    assert error / 100 < relative < error


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_any_width_and_bfloat16(name: str) -> None:
    """Rows that end within a group, and activations of 16 bits."""
    lm = quantized_lm(name, d_model=40)
    ids = random_ids(3, 4)
    assert_close(logits_of(lm, ids)[0], logits_of(dequantized(lm), ids)[0])
    half = quantized_lm(name, torch.bfloat16)
    logits, state = logits_of(half, ids)
    assert logits.dtype == torch.bfloat16 and state.ssm[0].dtype == torch.float32
    assert_close(logits.float(), logits_of(dequantized(half).float(), ids)[0], 0.05)


def test_what_is_quantised_and_what_is_not() -> None:
    lm = quantized_lm("int4")
    quantised = {name for name, module in lm.named_modules() if isinstance(module, QuantizedLinear)}
    blocks = {f"backbone.layers.{i}.mixer.{name}" for i in range(2) for name in ("in_proj", "x_proj", "out_proj")}
    assert quantised == blocks | {"lm_head"} and is_quantized(lm) and not is_quantized(make_lm())
    bits = {name.split(".")[-1]: module.bits for name, module in lm.named_modules() if hasattr(module, "bits")}
    assert bits == {"in_proj": 4, "x_proj": 8, "out_proj": 4, "lm_head": 4}
    assert lm.backbone.embedding.weight.dtype == torch.float32
    names = {name.split(".", 3)[-1] for name, _ in lm.named_parameters()}
    assert "mixer.dt_proj.weight" in names and not any("in_proj" in name for name in names)


def test_scales_stay_float32_when_the_model_is_cast() -> None:
    lm = quantized_lm("int8")
    before = lm.lm_head.scales.clone()
    lm.to(torch.bfloat16)
    assert torch.equal(lm.lm_head.scales, before) and lm.lm_head.values.dtype == torch.int8
    assert lm.to("meta").lm_head.scales.device.type == "meta"


@torch.no_grad()
def test_hooks_on_a_quantised_projection_are_called() -> None:
    lm = quantized_lm("int8")
    calls: list[int] = []
    lm.backbone.layers[1].mixer.in_proj.register_forward_hook(lambda *_: calls.append(1))
    _, state = logits_of(lm, random_ids(2, 1))
    lm.step(random_ids(2), state)
    assert len(calls) == 2


def test_it_cannot_learn() -> None:
    lm = quantized_lm("int8")
    with pytest.raises(ConfigError, match="Load the model without quantize to train it"):
        logits_of(lm.train(), random_ids(1, 3))
    with pytest.raises(ConfigError, match="quantised already"):
        quantize_projections(lm, "int4")
    with pytest.raises(ConfigError, match="do not fit a quantised model"):
        attach_adapters(lm, LoraConfig(rank=2), torch.Generator())  # type: ignore[arg-type]


def test_a_model_that_is_refused_is_left_as_it_was() -> None:
    """Whatever is wrong, and however late it is found."""
    lm = make_lm(dtype=torch.float32, d_model=64).requires_grad_(False)
    with pytest.raises(ConfigError, match="int3"):
        quantize_projections(lm, "int3")
    last = lm.backbone.layers[1].mixer.out_proj
    hook = last.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=r"layers\.1\.mixer\.out_proj cannot be quantised: it has hooks"):
        quantize_projections(lm, "int8")
    hook.remove()
    before = last.weight[3, 3].item()
    last.weight[3, 3] = torch.nan
    with pytest.raises(NumericsError, match=r"layers\.1\.mixer\.out_proj cannot be quantised"):
        quantize_projections(lm, "int4")
    assert not is_quantized(lm)
    last.weight[3, 3] = before
    quantize_projections(lm, "int4")
    assert is_quantized(lm)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (0, 64)], ids=str)
@torch.no_grad()
def test_inputs_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    module = QuantizedLinear(torch.randn(10, 64, generator=torch.Generator().manual_seed(0)), 8).eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.linear(x, dequantize(module.quantized_weight, torch.float32))
    assert module(x).shape == expected.shape
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-3)
