"""The scan and its single step: every backend against the definition, and the definition against itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cobra.ops
from cobra.ops import reference

from .cases import assert_all_close, run_with_gradients, scan_arguments
from .conftest import Backend

# Relative to the largest magnitude of each tensor. float32: sums of some thousand terms in another order.
# bfloat16: outputs and gradients are rounded to 8 bits (2^-9 each way), float16: to 11. float64: rounding only.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-11}

SHAPES = [  # batch, length, dim, state; 63 and 100 are not multiples of any chunk, 5 and 70 of no vector width
    (1, 1, 5, 8),
    (2, 63, 70, 16),
    (3, 100, 5, 64),
    (2, 32, 64, 16),
    (1, 100, 96, 8),
    (2, 17, 33, 3),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("optional", [True, False], ids=["all arguments", "only required"])
def test_scan_matches_definition(backend: Backend, shape, dtype, optional):
    backend.skip_unless_supported(dtype)
    batch, length, dim, state = shape
    backend.skip_if_slow(batch * length)
    arguments = scan_arguments(batch, length, dim, state, dtype=dtype, optional=optional, initial=optional)
    if not optional:  # a bare step size must be positive
        arguments["delta"] = arguments["delta"].abs() * 0.5
    lengths = torch.arange(batch) * (length // 2) % (length + 1) if optional else None
    options = {"delta_softplus": optional, "lengths": lengths}
    actual = run_with_gradients(backend.function("selective_scan"), arguments, backend.device, **options)
    expected = run_with_gradients(reference.selective_scan, arguments, torch.device("cpu"), upcast=True, **options)
    assert_all_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("present", ["D", "z", "delta_bias", "initial_state", "lengths"])
def test_scan_matches_definition_with_one_optional_argument(backend: Backend, present):
    full = scan_arguments(2, 20, 40, 16)
    arguments = {name: t for name, t in full.items() if name in ("u", "delta", "A", "B", "C", present)}
    options = {"delta_softplus": True, "lengths": torch.tensor([20, 7]) if present == "lengths" else None}
    actual = run_with_gradients(backend.function("selective_scan"), arguments, backend.device, **options)
    expected = run_with_gradients(reference.selective_scan, arguments, torch.device("cpu"), upcast=True, **options)
    assert_all_close(actual, expected, TOLERANCE[torch.float32])


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    dim=st.integers(1, 70),
    state=st.integers(1, 20),
    packed=st.booleans(),
    data=st.data(),
)
def test_scan_matches_definition_for_any_shape(batch, length, dim, state, packed, data):
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch)))
    arguments = scan_arguments(batch, length, dim, state)
    options = {"delta_softplus": True, "lengths": lengths}
    if packed:
        options["resets"] = torch.rand(batch, length, generator=torch.Generator().manual_seed(length)) < 0.2
    device = torch.device("cpu")
    actual = run_with_gradients(cobra.ops.selective_scan, arguments, device, **options)
    expected = run_with_gradients(reference.selective_scan, arguments, device, upcast=True, **options)
    like = run_with_gradients(reference.selective_scan, arguments, device, upcast=True, seed=2, **options)
    assert_all_close(actual, expected, TOLERANCE[torch.float32], like)


def test_scan_gradients_are_the_derivatives(any_backend: Backend):
    any_backend.skip_unless_supported(torch.float64)
    any_backend.skip_if_slow(100 * 2 * 5)  # numerical derivatives take about 100 calls
    arguments = scan_arguments(2, 5, 3, 2, dtype=torch.float64)
    leaves = [t.to(any_backend.device).requires_grad_() for t in arguments.values()]
    lengths = torch.tensor([5, 3], device=any_backend.device)

    def call(*values):
        function = any_backend.function("selective_scan")
        return function(**dict(zip(arguments, values, strict=True)), delta_softplus=True, lengths=lengths)

    assert torch.autograd.gradcheck(call, leaves)


def test_scan_gradients_through_the_final_state_alone(backend: Backend):
    arguments = scan_arguments(2, 20, 8, 4)
    gradients = []
    for function, device in ((backend.function("selective_scan"), backend.device), (reference.selective_scan, "cpu")):
        leaves = {name: t.clone().to(device).requires_grad_() for name, t in arguments.items()}
        function(**leaves, delta_softplus=True)[1].square().sum().backward()
        gradients.append({n: torch.zeros_like(t).cpu() if t.grad is None else t.grad.cpu() for n, t in leaves.items()})
    assert_all_close(*gradients, TOLERANCE[torch.float32])


def test_scan_of_two_halves_is_the_scan_of_the_whole(any_backend: Backend):
    scan = any_backend.function("selective_scan")
    whole = {name: t.to(any_backend.device) for name, t in scan_arguments(2, 41, 40, 16).items()}
    along_time = ("u", "delta", "B", "C", "z")
    first = whole | {name: whole[name][:, :19] for name in along_time}
    second = whole | {name: whole[name][:, 19:] for name in along_time}
    y, final = scan(**whole, delta_softplus=True)
    y1, middle = scan(**first, delta_softplus=True)
    y2, end = scan(**(second | {"initial_state": middle}), delta_softplus=True)
    torch.testing.assert_close(torch.cat([y1, y2], 1), y)
    torch.testing.assert_close(end, final)


def test_scan_then_single_steps_is_the_scan_of_the_whole(any_backend: Backend):
    scan, update = any_backend.function("selective_scan"), any_backend.function("selective_state_update")
    whole = {name: t.to(any_backend.device) for name, t in scan_arguments(3, 24, 40, 16).items()}
    along_time = ("u", "delta", "B", "C", "z")
    y, final = scan(**whole, delta_softplus=True)
    _, state = scan(**(whole | {name: whole[name][:, :20] for name in along_time}), delta_softplus=True)
    parameters = {name: whole[name] for name in ("A", "D", "delta_bias")}
    for t in range(20, 24):
        before = state.clone()
        step = {name: whole[name][:, t] for name in along_time}
        y_t, new_state = update(state, **step, **parameters, delta_softplus=True)
        torch.testing.assert_close(y_t, y[:, t])
        assert torch.equal(state, before), "the given state was changed"
        state = new_state
    torch.testing.assert_close(state, final)


def test_single_step_matches_definition(backend: Backend):
    full = scan_arguments(3, 1, 70, 16)
    arguments = {n: t[:, 0] if n in ("u", "delta", "B", "C", "z") else t for n, t in full.items()}
    arguments["state"] = arguments.pop("initial_state")
    options = {"delta_softplus": True}
    function = backend.function("selective_state_update")
    actual = run_with_gradients(function, arguments, backend.device, **options)
    expected = run_with_gradients(
        reference.selective_state_update, arguments, torch.device("cpu"), upcast=True, **options
    )
    assert_all_close(actual, expected, TOLERANCE[torch.float32])


def test_scan_of_a_padded_batch_is_each_row_alone(any_backend: Backend):
    scan = any_backend.function("selective_scan")
    batch = {name: t.to(any_backend.device) for name, t in scan_arguments(3, 50, 40, 16).items()}
    lengths = [50, 17, 0]
    y, final = scan(**batch, delta_softplus=True, lengths=torch.tensor(lengths, device=any_backend.device))
    for row, length in enumerate(lengths):
        alone = {n: t[row : row + 1, :length] if n in ("u", "delta", "B", "C", "z") else t for n, t in batch.items()}
        alone["initial_state"] = batch["initial_state"][row : row + 1]
        assert (y[row, length:] == 0).all()
        if length:
            y_alone, final_alone = scan(**alone, delta_softplus=True)
            torch.testing.assert_close(y[row : row + 1, :length], y_alone)
            torch.testing.assert_close(final[row : row + 1], final_alone)
        else:
            torch.testing.assert_close(final[row], batch["initial_state"][row], rtol=0, atol=0)


def test_scan_ignores_whatever_stands_in_the_padding(any_backend: Backend):
    any_backend.skip_unless_repeatable()
    any_backend.skip_if_slow(2 * 40)
    clean = scan_arguments(2, 40, 40, 16)
    junk = {name: t.clone() for name, t in clean.items()}
    for name in ("u", "delta", "B", "C", "z"):
        junk[name][1, 13:] = torch.nan
    options = {"delta_softplus": True, "lengths": torch.tensor([40, 13])}
    function = any_backend.function("selective_scan")
    results = [run_with_gradients(function, given_, any_backend.device, **options) for given_ in (clean, junk)]
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_scan_reads_strided_views(backend: Backend):
    device = backend.device
    joined = torch.randn(2, 30, 80, generator=torch.Generator().manual_seed(0)).to(device)
    u, z = joined.chunk(2, dim=-1)
    projected = torch.randn(2, 30, 7 + 2 * 16, generator=torch.Generator().manual_seed(1)).to(device)
    _, B, C = projected.split([7, 16, 16], dim=-1)
    rest = {n: t.to(device) for n, t in scan_arguments(2, 30, 40, 16).items() if n in ("A", "D", "delta_bias")}
    delta = torch.randn(30, 2, 40, device=device).transpose(0, 1)
    views = {"u": u, "delta": delta, "B": B, "C": C, "z": z}
    scan = backend.function("selective_scan")
    y, final = scan(**views, **rest, delta_softplus=True)
    y_copy, final_copy = scan(**{n: t.contiguous() for n, t in views.items()}, **rest, delta_softplus=True)
    assert torch.equal(y, y_copy) and torch.equal(final, final_copy)
    # a transposed state and expanded inputs are views, too
    state = torch.randn(2, 16, 40, device=device).transpose(1, 2)
    expanded = views | {"B": B[:1].expand(2, -1, -1)}
    y, _ = scan(**expanded, **rest, delta_softplus=True, initial_state=state)
    copies = {n: t.contiguous() for n, t in expanded.items()} | {"initial_state": state.contiguous()}
    y_copy, _ = scan(**copies, **rest, delta_softplus=True)
    assert torch.equal(y, y_copy)


def test_scan_repeats_bit_for_bit(backend: Backend):
    backend.skip_unless_repeatable()
    backend.skip_if_slow(4 * 200)
    arguments = scan_arguments(4, 200, 300, 16)  # large enough for several threads
    function = backend.function("selective_scan")
    first = run_with_gradients(function, arguments, backend.device, delta_softplus=True)
    for _ in range(3):
        again = run_with_gradients(function, arguments, backend.device, delta_softplus=True)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


def test_cpu_scan_does_not_depend_on_the_number_of_threads():
    """Nor do its gradients, not by a bit."""
    pytest.importorskip("numba")
    arguments = scan_arguments(3, 200, 300, 16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                run_with_gradients(
                    cobra.ops.selective_scan, arguments, torch.device("cpu"), delta_softplus=True,
                    lengths=torch.tensor([200, 131, 7]),
                )
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, result[name]), name


def test_scan_spreads_nan_and_survives_extremes(any_backend: Backend):
    arguments = {name: t.to(any_backend.device) for name, t in scan_arguments(1, 6, 3, 4).items()}
    arguments["delta"][0, 1, 0] = 1e4  # forgets everything: exp underflows
    arguments["delta"][0, 1, 1] = -1e4  # a step of exactly zero
    arguments["u"][0, 2, 2] = torch.nan
    y, final = any_backend.function("selective_scan")(**arguments, delta_softplus=True)
    assert y[0, :, :2].isfinite().all() and final[0, :2].isfinite().all()
    assert y[0, 2:, 2].isnan().all() and final[0, 2].isnan().all()


def test_zero_steps_leave_the_state_bit_for_bit(any_backend: Backend):
    arguments = {name: t.to(any_backend.device) for name, t in scan_arguments(2, 9, 40, 16).items()}
    arguments["delta"] = torch.full_like(arguments["delta"], -1e4)
    _, final = any_backend.function("selective_scan")(**arguments, delta_softplus=True)
    assert torch.equal(final, arguments["initial_state"])


def test_scan_of_no_steps_returns_the_initial_state():
    arguments = scan_arguments(2, 0, 5, 3)
    y, final = cobra.ops.selective_scan(**arguments)
    assert y.shape == (2, 0, 5)
    assert torch.equal(final, arguments["initial_state"])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_scan_returns_the_documented_dtypes(any_backend: Backend, dtype):
    any_backend.skip_unless_supported(dtype)
    arguments = {name: t.to(any_backend.device) for name, t in scan_arguments(1, 4, 5, 3, dtype=dtype).items()}
    y, final = any_backend.function("selective_scan")(**arguments)
    assert y.dtype == dtype
    assert final.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_cpu_scan_leaves_parameters_as_fsdp_needs_them():
    """FSDP frees and refills gathered parameters by resizing their storage, which `Tensor.numpy()` forbids for good."""
    pytest.importorskip("numba")
    arguments = scan_arguments(1, 3, 5, 4)
    with cobra.ops.use_backend("cpu"):
        cobra.ops.selective_scan(**arguments, delta_softplus=True)
        cobra.ops.add_rms_norm(arguments["u"], None, arguments["D"], 1e-5)
        cobra.ops.causal_conv1d(arguments["u"], arguments["A"], arguments["D"])
    for name, tensor in arguments.items():
        assert tensor.untyped_storage().resizable(), name
