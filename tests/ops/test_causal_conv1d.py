"""The convolution and its single step: every backend against the definition, the definition against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import cobra.ops
from cobra.ops import reference

from .cases import assert_all_close, conv_arguments, run_with_gradients
from .conftest import Backend

# Relative to the largest magnitude of each tensor. float32: weight gradients are sums of some hundred terms in another
# order. bfloat16: outputs and gradients are rounded to 8 bits, float16: to 11. float64: rounding only.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}

SHAPES = [(1, 1, 5, 4), (2, 63, 70, 4), (3, 100, 5, 2), (2, 200, 32, 4), (2, 2, 33, 4), (2, 9, 8, 1)]


def test_definition_matches_pytorch():
    arguments = conv_arguments(2, 30, 6, 4, dtype=torch.float64, initial=False)
    y, final = reference.causal_conv1d(**arguments)
    x = F.pad(arguments["x"].transpose(1, 2), (3, 0))
    expected = F.conv1d(x, arguments["weight"][:, None], arguments["bias"], groups=6)
    torch.testing.assert_close(y, F.silu(expected).transpose(1, 2))
    torch.testing.assert_close(final, arguments["x"][:, -3:])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("optional", [True, False], ids=["all arguments", "only required"])
def test_conv_matches_definition(backend: Backend, shape, dtype, optional):
    backend.skip_unless_supported(dtype)
    batch, length, dim, width = shape
    backend.skip_if_slow(batch * length)
    arguments = conv_arguments(batch, length, dim, width, dtype=dtype, bias=optional, initial=optional)
    options = {"lengths": (length - torch.arange(batch) * 62).clamp(min=0) if optional else None}
    actual = run_with_gradients(backend.function("causal_conv1d"), arguments, backend.device, **options)
    expected = run_with_gradients(reference.causal_conv1d, arguments, torch.device("cpu"), upcast=True, **options)
    assert_all_close(actual, expected, TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 140),
    dim=st.integers(1, 40),
    width=st.integers(1, 6),
    packed=st.booleans(),
    data=st.data(),
)
def test_conv_matches_definition_for_any_shape(batch, length, dim, width, packed, data):
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch)))
    arguments = conv_arguments(batch, length, dim, width)
    options = {"lengths": lengths}
    if packed:
        options["resets"] = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < 0.2
    device = torch.device("cpu")
    actual = run_with_gradients(cobra.ops.causal_conv1d, arguments, device, **options)
    expected = run_with_gradients(reference.causal_conv1d, arguments, device, upcast=True, **options)
    like = run_with_gradients(reference.causal_conv1d, arguments, device, upcast=True, seed=2, **options)
    assert_all_close(actual, expected, TOLERANCE[torch.float32], like)


def test_conv_gradients_are_the_derivatives(any_backend: Backend):
    any_backend.skip_unless_supported(torch.float64)
    any_backend.skip_if_slow(100 * 3 * 6)  # numerical derivatives take about 100 calls
    arguments = conv_arguments(3, 6, 2, 4, dtype=torch.float64)
    leaves = [t.to(any_backend.device).requires_grad_() for t in arguments.values()]
    lengths = torch.tensor([6, 4, 1], device=any_backend.device)

    def call(*values):
        return any_backend.function("causal_conv1d")(**dict(zip(arguments, values, strict=True)), lengths=lengths)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("cut", [1, 2, 19, 64])
def test_conv_of_two_parts_then_single_steps_is_the_conv_of_the_whole(any_backend: Backend, cut):
    conv, update = any_backend.function("causal_conv1d"), any_backend.function("causal_conv1d_update")
    whole = {name: t.to(any_backend.device) for name, t in conv_arguments(2, 70, 40, 4).items()}
    y, final = conv(**whole)
    y1, state = conv(**(whole | {"x": whole["x"][:, :cut]}))
    y2, state = conv(**(whole | {"x": whole["x"][:, cut:67], "initial_state": state}))
    pieces = [y1, y2]
    for t in range(67, 70):
        before = state.clone()
        y_t, new_state = update(state, whole["x"][:, t], whole["weight"], whole["bias"])
        assert torch.equal(state, before), "the given state was changed"
        state = new_state
        pieces.append(y_t[:, None])
    torch.testing.assert_close(torch.cat(pieces, 1), y)
    assert torch.equal(state, final)


def test_conv_single_step_matches_definition(backend: Backend):
    full = conv_arguments(3, 1, 70, 4)
    arguments = {"state": full["initial_state"], "x": full["x"][:, 0], "weight": full["weight"], "bias": full["bias"]}
    actual = run_with_gradients(backend.function("causal_conv1d_update"), arguments, backend.device)
    expected = run_with_gradients(reference.causal_conv1d_update, arguments, torch.device("cpu"), upcast=True)
    assert_all_close(actual, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("initial", [True, False])
def test_conv_of_a_padded_batch_is_each_row_alone(any_backend: Backend, initial):
    conv = any_backend.function("causal_conv1d")
    batch = {name: t.to(any_backend.device) for name, t in conv_arguments(5, 80, 40, 4, initial=initial).items()}
    lengths = [80, 65, 2, 1, 0]  # two rows are shorter than the filter
    y, final = conv(**batch, lengths=torch.tensor(lengths, device=any_backend.device))
    for row, length in enumerate(lengths):
        assert (y[row, length:] == 0).all()
        alone = batch | {"x": batch["x"][row : row + 1, :length]}
        if initial:
            alone["initial_state"] = batch["initial_state"][row : row + 1]
        if length:
            y_alone, final_alone = conv(**alone)
            torch.testing.assert_close(y[row : row + 1, :length], y_alone)
            assert torch.equal(final[row : row + 1], final_alone)
        else:
            expected = batch["initial_state"][row] if initial else torch.zeros_like(final[row])
            assert torch.equal(final[row], expected)


def test_conv_ignores_whatever_stands_in_the_padding(any_backend: Backend):
    any_backend.skip_unless_repeatable()
    clean = conv_arguments(3, 80, 40, 4)
    junk = {name: t.clone() for name, t in clean.items()}
    junk["x"][1, 13:] = torch.nan
    junk["x"][2, :] = torch.nan
    options = {"lengths": torch.tensor([80, 13, 0])}
    function = any_backend.function("causal_conv1d")
    results = [run_with_gradients(function, given, any_backend.device, **options) for given in (clean, junk)]
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_conv_reads_strided_views(backend: Backend):
    joined = torch.randn(2, 30, 80, generator=torch.Generator().manual_seed(0)).to(backend.device)
    _, x = joined.chunk(2, dim=-1)
    weight = torch.randn(40, 1, 4, generator=torch.Generator().manual_seed(1)).to(backend.device).squeeze(1)
    conv = backend.function("causal_conv1d")
    for view, copy in zip(conv(x, weight), conv(x.contiguous(), weight), strict=True):
        assert torch.equal(view, copy)


def test_conv_repeats_bit_for_bit(backend: Backend):
    backend.skip_unless_repeatable()
    backend.skip_if_slow(4 * 300)
    arguments = conv_arguments(4, 300, 300, 4)
    first = run_with_gradients(backend.function("causal_conv1d"), arguments, backend.device)
    for _ in range(3):
        again = run_with_gradients(backend.function("causal_conv1d"), arguments, backend.device)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


def test_conv_of_no_steps_returns_the_initial_state():
    arguments = conv_arguments(2, 0, 5, 4)
    y, final = cobra.ops.causal_conv1d(**arguments)
    assert y.shape == (2, 0, 5)
    assert torch.equal(final, arguments["initial_state"])
