"""Several texts in one row: each gives what it gives alone, in every backend that can."""

import itertools

import pytest
import torch
from torch import Tensor

from cobra.ops import reference

from .cases import assert_all_close, conv_arguments, run_with_gradients, scan_arguments
from .conftest import Backend

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float64: 1e-11}  # reasons: see the tests of each op
ALONG_TIME = ("u", "delta", "B", "C", "z", "x")


def resets_at(length: int, *rows: tuple[int, ...]) -> Tensor:
    resets = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, steps in enumerate(rows):
        resets[row, list(steps)] = True
    return resets


def arguments_of(name: str, length: int, **options) -> dict[str, Tensor]:
    if name == "selective_scan":
        return scan_arguments(2, length, 5, 4, **options)
    return conv_arguments(2, length, 5, 4, **options)


@pytest.mark.parametrize("name", ["selective_scan", "causal_conv1d"])
@pytest.mark.parametrize("initial", [True, False])
def test_packed_texts_equal_each_text_alone(any_backend: Backend, name, initial):
    """Texts of 1, 2 and 9 steps: shorter and longer than the filter, and than the reach of the first text."""
    any_backend.skip_unless_packed()
    any_backend.skip_unless_supported(torch.float64)
    function, options = any_backend.function(name), {"delta_softplus": True} if name == "selective_scan" else {}
    full = arguments_of(name, 18, dtype=torch.float64, initial=initial)
    packed = {key: value.to(any_backend.device) for key, value in full.items()}
    cuts = [0, 6, 7, 9, 18]
    resets = resets_at(18, tuple(cuts[1:-1]), tuple(cuts[1:-1])).to(any_backend.device)
    y, final = function(**packed, **options, resets=resets)
    for begin, end in itertools.pairwise(cuts):
        alone = {n: t[:, begin:end] if n in ALONG_TIME else t for n, t in packed.items()}
        if begin:
            alone.pop("initial_state", None)
        y_alone, final_alone = function(**alone, **options)
        torch.testing.assert_close(y[:, begin:end], y_alone)
    torch.testing.assert_close(final, final_alone)


@pytest.mark.parametrize("name", ["selective_scan", "causal_conv1d"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_rows_match_definition(backend: Backend, name, dtype):
    """Resets at the first step, at neighbours, at the last step, behind the end of a row; gradients of everything."""
    backend.skip_unless_packed()
    backend.skip_unless_supported(dtype)
    length = 70 if backend.module.NAME == "cpu" else 10  # more than two of the CPU kernels' chunks of 32 and 64
    resets = resets_at(length, (0, 3, 4, length // 2, length - 1), (2, length - 2, length - 1))
    options = {"lengths": torch.tensor([length, length - 2]), "resets": resets}
    if name == "selective_scan":
        options["delta_softplus"] = True
    arguments = arguments_of(name, length, dtype=dtype)
    actual = run_with_gradients(backend.function(name), arguments, backend.device, **options)
    expected = run_with_gradients(getattr(reference, name), arguments, torch.device("cpu"), upcast=True, **options)
    assert_all_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["selective_scan", "causal_conv1d"])
def test_gradients_of_packed_rows_are_the_derivatives(any_backend: Backend, name):
    any_backend.skip_unless_packed()
    any_backend.skip_unless_supported(torch.float64)
    any_backend.skip_if_slow(100 * 2 * 6)
    full = arguments_of(name, 6, dtype=torch.float64)
    resets = resets_at(6, (2, 5), (0,)).to(any_backend.device)
    options = {"delta_softplus": True} if name == "selective_scan" else {}
    leaves = [t.to(any_backend.device).requires_grad_() for t in full.values()]

    def call(*values):
        return any_backend.function(name)(**dict(zip(full, values, strict=True)), **options, resets=resets)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("name", ["selective_scan", "causal_conv1d"])
def test_nothing_of_one_text_reaches_the_next(any_backend: Backend, name):
    """Not even NaN, forwards or backwards."""
    any_backend.skip_unless_packed()
    options = {"resets": resets_at(10, (6,), (6,))}
    if name == "selective_scan":
        options["delta_softplus"] = True
    clean = arguments_of(name, 10)
    junk = {key: value.clone() for key, value in clean.items()}
    for key in ALONG_TIME:
        if key in junk:
            junk[key][:, :6] = torch.nan
    junk["initial_state"][:] = torch.nan
    results = [
        run_with_gradients(any_backend.function(name), given, any_backend.device, **options) for given in (clean, junk)
    ]
    for key, value in results[0].items():
        other = results[1][key]
        if key.removeprefix("gradient of ") in ALONG_TIME or key == "first output":
            value, other = value[:, 6:], other[:, 6:]
        elif key != "second output":
            continue  # parameters and the initial state see both texts
        assert torch.equal(value, other), key


@pytest.mark.parametrize("name", ["selective_scan", "causal_conv1d"])
def test_no_reset_changes_no_bit(any_backend: Backend, name):
    any_backend.skip_unless_packed()
    arguments = arguments_of(name, 9)
    function = any_backend.function(name)
    plain = run_with_gradients(function, arguments, any_backend.device)
    packed = run_with_gradients(function, arguments, any_backend.device, resets=torch.zeros(2, 9, dtype=torch.bool))
    for key, value in plain.items():
        assert torch.equal(value, packed[key]), key
