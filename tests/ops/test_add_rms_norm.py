"""The residual norm: every backend against the definition."""

import pytest
import torch

from cobra.ops import reference

from .cases import assert_all_close, run_with_gradients
from .conftest import Backend

# Relative to the largest magnitude of each tensor: see the scan's tests.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}


def _arguments(shape: tuple[int, ...], dtype: torch.dtype, residual: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = {
        "x": torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),
        "weight": torch.randn(shape[-1], generator=generator, dtype=torch.float64).to(wide),
    }
    if residual:
        arguments["residual"] = torch.randn(shape, generator=generator, dtype=torch.float64).to(wide)
    return arguments


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (2, 63, 70), (3, 50, 96), (2, 2, 3, 33)], ids=str)
@pytest.mark.parametrize("residual", [True, False])
def test_norm_matches_definition(backend: Backend, shape, dtype, residual):
    backend.skip_unless_supported(dtype)
    arguments = _arguments(shape, dtype, residual)
    options = {"eps": 1e-5} if residual else {"eps": 1e-5, "residual": None}
    actual = run_with_gradients(backend.function("add_rms_norm"), arguments, backend.device, **options)
    expected = run_with_gradients(reference.add_rms_norm, arguments, torch.device("cpu"), upcast=True, **options)
    assert_all_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("residual", [True, False])
def test_norm_gradients_are_the_derivatives(any_backend: Backend, residual):
    any_backend.skip_unless_supported(torch.float64)
    arguments = _arguments((2, 3, 4), torch.float64, residual)
    leaves = [t.to(any_backend.device).requires_grad_() for t in arguments.values()]

    def call(x, weight, residual=None):
        return any_backend.function("add_rms_norm")(x, residual, weight, 1e-5)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("output", [0, 1])
def test_norm_gradients_through_one_output_alone(backend: Backend, output):
    arguments = _arguments((2, 9, 40), torch.float32, residual=True)
    gradients = []
    for function, device in ((backend.function("add_rms_norm"), backend.device), (reference.add_rms_norm, "cpu")):
        leaves = {name: t.clone().to(device).requires_grad_() for name, t in arguments.items()}
        function(**leaves, eps=1e-5)[output].square().sum().backward()
        gradients.append({n: torch.zeros_like(t).cpu() if t.grad is None else t.grad.cpu() for n, t in leaves.items()})
    assert_all_close(*gradients, TOLERANCE[torch.float32])


def test_norm_reads_strided_views_and_repeats_bit_for_bit(backend: Backend):
    backend.skip_if_slow(40 * 50)
    x = torch.randn(40, 300, 50, generator=torch.Generator().manual_seed(0)).to(backend.device).transpose(1, 2)
    weight = torch.ones(300, device=backend.device)
    norm = backend.function("add_rms_norm")
    first = norm(x, None, weight, 1e-5)
    for again in (norm(x, None, weight, 1e-5), norm(x.contiguous(), None, weight, 1e-5)):
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_norm_keeps_the_residual_in_full_precision(any_backend: Backend):
    x = torch.full((1, 4), 2.0**-12, dtype=torch.bfloat16, device=any_backend.device)
    residual = torch.ones(1, 4, device=any_backend.device)
    normed, total = any_backend.function("add_rms_norm")(x, residual, residual[0], 1e-5)
    assert normed.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert (total == 1 + 2.0**-12).all()
