"""Triton's kernels that read the weights once, through the interpreter; `test_triton.py` starts the process for it."""

import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cobra.ops import dispatch, fused
from cobra.ops.fused import BlockWeights
from cobra.ops.quantized import QuantizedWeight, dequantize, quantize

from .cases import assert_all_close
from .test_step import EPS, _expected, _inputs, _layers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")
matvec = importlib.import_module("cobra.ops.backends.triton.matvec")

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU, or Triton's interpreter"
)

# Relative to the largest magnitude. Tensor cores (more than 4 rows) see a vector as the sum of two numbers of half the
# precision, which is exact to 2^-16 in bfloat16, and a block of the stack has three products in a row.
FEW_ROWS = 1e-5
MANY_ROWS = {torch.bfloat16: 2e-4, torch.float16: 1e-5}

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def inference_with_products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No gradients; and the interpreter multiplies bfloat16, which it keeps as the integers of their bits."""
    if INTERPRETED:
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        plain = InterpreterBuilder.create_dot

        def widened(operand: Any) -> Any:
            if operand.dtype.scalar != tl.bfloat16:
                return operand
            return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
            return plain(self, widened(a), widened(b), *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    with torch.no_grad(), dispatch.use_backend("triton"):
        yield


@pytest.fixture
def scratch_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was never written to shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))


def _quantized(layers: list[BlockWeights], bits: int) -> tuple[list[BlockWeights], list[BlockWeights]]:
    """The layers with quantised projections, and with what these stand for."""
    names = ("in_proj", "x_proj", "out_proj")
    quantised = [layer._replace(**{n: quantize(getattr(layer, n), bits) for n in names}) for layer in layers]
    exact = [layer._replace(**{n: dequantize(getattr(layer, n), torch.float64) for n in names}) for layer in quantised]
    return quantised, exact


def _on_device(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_on_device, value))
    return [_on_device(item) for item in value] if isinstance(value, list) else value


def _actual(layers: list[BlockWeights], hidden: Tensor, conv: list[Tensor], ssm: list[Tensor]) -> dict[str, Tensor]:
    result = fused.stack_step(*map(_on_device, (layers, hidden, conv, ssm)), EPS)
    assert result is not None
    hidden, residual, new_conv, new_ssm = result
    new = {f"conv {i}": t for i, t in enumerate(new_conv)} | {f"ssm {i}": t for i, t in enumerate(new_ssm)}
    return {name: t.cpu() for name, t in {"hidden": hidden, "residual": residual, **new}.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (17, 1100)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_triton_linear_of_few_rows_is_the_product(scratch_of_nan, rows, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, shape[1], generator=generator), torch.randn(shape, generator=generator).to(dtype)
    actual = fused.linear(_on_device(x), _on_device(weight))
    assert actual is not None and actual.dtype == torch.float32
    assert_all_close({"product": actual.cpu()}, {"product": F.linear(x.double(), weight.double())}, FEW_ROWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (17, 1100)], ids=str)
@pytest.mark.parametrize("rows", [5, 32])
def test_triton_linear_of_many_rows_is_the_product(scratch_of_nan, rows, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, shape[1], generator=generator), torch.randn(shape, generator=generator).to(dtype)
    actual = fused.linear(_on_device(x), _on_device(weight))
    assert actual is not None and actual.dtype == torch.float32
    expected = F.linear(x.double(), weight.double())
    assert_all_close({"product": actual.cpu()}, {"product": expected}, MANY_ROWS[dtype])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(7, 5), (3, 65), (17, 768)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_triton_linear_of_quantised_weight_is_the_product(scratch_of_nan, rows, shape, bits):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, shape[1], generator=generator), torch.randn(shape, generator=generator)
    few = quantize(weight, bits)
    actual = fused.linear(_on_device(x), _on_device(few))
    assert actual is not None
    expected = F.linear(x.double(), dequantize(few, torch.float64))
    tolerance = FEW_ROWS if rows <= 4 else MANY_ROWS[torch.bfloat16]
    assert_all_close({"product": actual.cpu()}, {"product": expected}, tolerance)


def test_triton_linear_does_not_depend_on_the_other_rows():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 200, generator=generator), torch.randn(20, 200, generator=generator).bfloat16()
    both = fused.linear(_on_device(x), _on_device(weight))
    damaged = x.clone()
    damaged[1:] = torch.nan
    alone = fused.linear(_on_device(damaged), _on_device(weight))
    assert both is not None and alone is not None
    assert torch.equal(both[0], alone[0]) and alone[1:].isnan().all()


_SIZES = (12, 20, 4, 3, 4)  # width, inner, state, rank, taps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_triton_stack_of_few_rows_matches_definition(scratch_of_nan, batch, dtype):
    layers = _layers(2, *_SIZES, dtype, torch.float32)
    inputs = _inputs(layers, batch)
    assert_all_close(_actual(layers, *inputs), _expected(layers, *inputs), FEW_ROWS)


@pytest.mark.parametrize(("batch", "dtype"), [(8, torch.bfloat16), (8, torch.float16), (32, torch.bfloat16)], ids=str)
def test_triton_stack_of_many_rows_matches_definition(scratch_of_nan, batch, dtype):
    layers = _layers(2, 6, 7, 3, 2, 4, dtype, dtype)
    inputs = _inputs(layers, batch)
    assert_all_close(_actual(layers, *inputs), _expected(layers, *inputs), MANY_ROWS[dtype])


@pytest.mark.parametrize("sizes", [(19, 9, 16, 3, 3), (5, 7, 1, 1, 2), (8, 9, 5, 70, 1)], ids=str)
@pytest.mark.parametrize("batch", [2, 6])
def test_triton_stack_matches_definition_for_odd_sizes(scratch_of_nan, sizes, batch):
    layers = _layers(2, *sizes, torch.float16, torch.float32)
    inputs = _inputs(layers, batch)
    assert_all_close(_actual(layers, *inputs), _expected(layers, *inputs), FEW_ROWS)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("batch", [1, 6])
def test_triton_stack_takes_quantised_weights(scratch_of_nan, batch, bits):
    quantised, exact = _quantized(_layers(2, *_SIZES, torch.bfloat16, torch.float32), bits)
    inputs = _inputs(quantised, batch)
    tolerance = FEW_ROWS if batch == 1 else MANY_ROWS[torch.bfloat16]
    assert_all_close(_actual(quantised, *inputs), _expected(exact, *inputs), tolerance)


@pytest.mark.parametrize(("batch", "bits"), [(2, 16), (1, 4), (6, 16), (6, 8)])
def test_triton_stack_adds_up_what_programs_share(scratch_of_nan, monkeypatch, batch, bits):
    """Small blocks: every sum has several steps, and those of x_proj and out_proj several programs."""
    plain = matvec._blocks
    monkeypatch.setattr(matvec, "_blocks", lambda *given: plain(*given) | {"BLOCK_K": 32 if bits == 4 else 16})
    layers = exact = _layers(1, 33, 35, 4, 3, 4, torch.bfloat16, torch.float32)
    if bits < 16:
        layers, exact = _quantized(layers, bits)
    inputs = _inputs(layers, batch)
    tolerance = FEW_ROWS if batch < 6 else MANY_ROWS[torch.bfloat16]
    assert_all_close(_actual(layers, *inputs), _expected(exact, *inputs), tolerance)


def test_triton_kernels_are_not_compiled_for_every_number_of_rows(monkeypatch):
    """What they are compiled for is the same for 5 to 16 rows, 17 to 32 and 33 to 64."""
    layers = _on_device(_quantized(_layers(2, *_SIZES, torch.bfloat16, torch.float32), 8)[0])
    step = importlib.import_module("cobra.ops.backends.triton.step")

    def compiled(batch: int) -> list[tuple[Any, dict[str, Any]]]:
        kernels: list[tuple[Any, dict[str, Any]]] = []
        for module in (matvec, step):
            monkeypatch.setattr(
                module, "launch", lambda kernel, *_, on, **constants: kernels.append((kernel, constants))
            )
        assert fused.stack_step(layers, *map(_on_device, _inputs(layers, batch)), EPS) is not None
        return kernels

    for first, *others in ((5, 7, 16), (17, 25, 32), (33, 50, 64)):
        assert all(compiled(batch) == compiled(first) for batch in others)
    assert compiled(5) != compiled(64) and compiled(2) != compiled(3)


@pytest.mark.parametrize(("strided", "dtype"), [(True, torch.float32), (False, torch.bfloat16)], ids=str)
def test_triton_stack_takes_states_of_any_strides_and_leaves_its_inputs(strided, dtype):
    layers = _layers(2, *_SIZES, torch.float32, torch.float32)
    hidden, conv, ssm = _inputs(layers, 2, strided=strided)
    hidden = hidden.to(dtype)
    before = [t.clone() for t in (hidden, *conv, *ssm)]
    assert_all_close(_actual(layers, hidden, conv, ssm), _expected(layers, hidden, conv, ssm), FEW_ROWS)
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, *conv, *ssm), strict=True))


def test_triton_stack_keeps_the_dtype_of_conv_states():
    layers = _layers(1, *_SIZES, torch.bfloat16, torch.float32)
    hidden, conv, ssm = _inputs(layers, 1)
    full = _actual(layers, hidden, [conv[0].bfloat16().float()], ssm)
    short = _actual(layers, hidden, [conv[0].bfloat16()], ssm)
    assert short["conv 0"].dtype == torch.bfloat16
    assert_all_close({n: t.float() for n, t in short.items()}, {**full, "conv 0": full["conv 0"].bfloat16()}, 1e-2)
    assert all(torch.equal(full[name], short[name]) for name in full if name != "conv 0")


def test_triton_kernels_refuse_what_they_do_not_take():
    layers = _on_device(_layers(3, 8, 12, 4, 2, 4, torch.bfloat16, torch.float32))
    hidden, conv, ssm = map(_on_device, _inputs(layers, 2))

    def refuses(layers=layers, hidden=hidden, conv=conv, ssm=ssm) -> bool:
        return fused.stack_step(layers, hidden, conv, ssm, EPS) is None

    assert not refuses()
    assert refuses(hidden=hidden.double()) and refuses(hidden=hidden[:, :-1]) and refuses(hidden=hidden[:1])
    assert (
        refuses(conv=conv[:-1]) and refuses(conv=[t.double() for t in conv]) and refuses(conv=[t[:, 1:] for t in conv])
    )
    assert refuses(ssm=ssm[:-1]) and refuses(ssm=[t.double() for t in ssm]) and refuses(ssm=[t[:, 1:] for t in ssm])
    assert refuses(layers=layers[:-1]) and refuses(layers=[])
    for batch in (0, 33):
        wide = map(_on_device, _inputs(layers, batch))
        assert refuses(**dict(zip(("hidden", "conv", "ssm"), wide, strict=True)))
    for name in BlockWeights._fields:
        weight = getattr(layers[1], name)
        for other in (weight.double(), weight.repeat(2, *[1] * (weight.dim() - 1))[::2]):
            assert refuses(layers=[layers[0], layers[1]._replace(**{name: other}), layers[2]]), name
    x, single = hidden[:1].repeat(5, 1), torch.randn(4, 8, device=DEVICE)
    assert fused.linear(x[:4], single) is not None and fused.linear(x, single) is None  # no tensor core for float32
    assert fused.linear(x, single.bfloat16()) is not None and fused.linear(x.double(), single.bfloat16()) is None
    few = quantize(single, 8)
    assert fused.linear(x[:1].repeat(64, 1), few) is not None and fused.linear(x[:1].repeat(65, 1), few) is None
    assert fused.linear(x[:, :5], few) is None
    assert fused.linear(x, QuantizedWeight(few.values.t().contiguous().t(), few.scales, 8, few.shape)) is None
    for damaged in (
        few._replace(values=few.values[:3]),
        few._replace(values=few.values.to(torch.int32)),
        few._replace(scales=few.scales[:3]),
        few._replace(scales=few.scales.double()),
        few._replace(bits=4),
    ):
        assert fused.linear(x, damaged) is None
    with torch.enable_grad():
        assert fused.linear(x[:4], single) is None and fused.stack_step(layers, hidden, conv, ssm, EPS) is None
