"""Arguments that do not fit are refused by name."""

import pytest
import torch

import cobra.ops
from cobra.errors import BackendError, NumericsError, ShapeError
from cobra.ops import dispatch

from .cases import conv_arguments, scan_arguments


@pytest.mark.parametrize("name", ["delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_scan_names_the_argument_of_a_wrong_shape(name):
    arguments = scan_arguments(2, 6, 5, 3)
    arguments[name] = arguments[name][..., :-1] if name != "A" else arguments[name][:-1]
    with pytest.raises(ShapeError, match=rf"^{name} has shape .* to fit u .*\[2, 6, 5\]"):
        cobra.ops.selective_scan(**arguments)


def test_scan_names_both_shapes():
    arguments = scan_arguments(2, 6, 5, 3) | {"z": torch.zeros(2, 7, 5)}
    with pytest.raises(ShapeError, match=r"z has shape \[2, 7, 5\], expected \[2, 6, 5\] to fit u \[2, 6, 5\]"):
        cobra.ops.selective_scan(**arguments)


@pytest.mark.parametrize("name", ["state", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_state_update_names_the_argument_of_a_wrong_shape(name):
    full = scan_arguments(2, 1, 5, 3)
    arguments = {n: t[:, 0] if n in ("u", "delta", "B", "C", "z") else t for n, t in full.items()}
    arguments["state"] = arguments.pop("initial_state")
    arguments[name] = arguments[name][:-1]
    with pytest.raises(ShapeError, match=f"^{name} has shape"):
        cobra.ops.selective_state_update(**arguments)


@pytest.mark.parametrize("name", ["weight", "bias", "initial_state"])
def test_conv_names_the_argument_of_a_wrong_shape(name):
    arguments = conv_arguments(2, 6, 5, 4)
    arguments[name] = arguments[name][:-1]
    with pytest.raises(ShapeError, match=f"^{name} has shape"):
        cobra.ops.causal_conv1d(**arguments)


def test_conv_update_names_a_wrong_state():
    x = torch.zeros(2, 5)
    with pytest.raises(ShapeError, match=r"^state has shape"):
        cobra.ops.causal_conv1d_update(torch.zeros(2, 2, 5), x, torch.zeros(5, 4))


@pytest.mark.parametrize("lengths", [torch.tensor([1, 2, 3]), torch.tensor([[1, 2]]), torch.tensor([1.0, 2.0])])
def test_lengths_of_a_wrong_kind_are_refused(lengths):
    with pytest.raises(ShapeError, match=r"^lengths has"):
        cobra.ops.selective_scan(**scan_arguments(2, 6, 5, 3), lengths=lengths)
    with pytest.raises(ShapeError, match=r"^lengths has"):
        cobra.ops.causal_conv1d(**conv_arguments(2, 6, 5, 4), lengths=lengths)


def test_main_argument_of_a_wrong_kind_is_refused():
    with pytest.raises(ShapeError, match=r"^u has shape \[6, 5\], expected \[batch, length, dim\]"):
        cobra.ops.selective_scan(**(scan_arguments(2, 6, 5, 3) | {"u": torch.zeros(6, 5)}))
    with pytest.raises(ShapeError, match=r"^x has dtype torch.int64"):
        cobra.ops.causal_conv1d(torch.zeros(2, 6, 5, dtype=torch.int64), torch.zeros(5, 4))


def test_norm_names_the_argument_of_a_wrong_shape():
    x = torch.zeros(2, 5)
    with pytest.raises(ShapeError, match=r"^weight has shape"):
        cobra.ops.add_rms_norm(x, None, torch.ones(4), 1e-5)
    with pytest.raises(ShapeError, match=r"^residual has shape"):
        cobra.ops.add_rms_norm(x, torch.zeros(1, 5), torch.ones(5), 1e-5)


@pytest.mark.parametrize("wrong", [7, -1])
def test_lengths_outside_the_sequence_are_refused(wrong):
    message = rf"^lengths holds {wrong}, but \w \[2, 6, 5\] has 6 steps; expected values from 0 to 6"
    with pytest.raises(ShapeError, match=message):
        cobra.ops.selective_scan(**scan_arguments(2, 6, 5, 3), lengths=torch.tensor([6, wrong]))
    with pytest.raises(ShapeError, match=message):
        cobra.ops.causal_conv1d(**conv_arguments(2, 6, 5, 4), lengths=torch.tensor([wrong, 0]))


@pytest.mark.parametrize("resets", [torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 6)])
def test_resets_of_a_wrong_kind_are_refused(resets):
    with pytest.raises(ShapeError, match=r"^resets has"):
        cobra.ops.selective_scan(**scan_arguments(2, 6, 5, 3), resets=resets)
    with pytest.raises(ShapeError, match=r"^resets has"):
        cobra.ops.causal_conv1d(**conv_arguments(2, 6, 5, 4), resets=resets)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["A", "D", "delta_bias", "weight", "bias"])
def test_parameters_that_are_not_finite_are_refused(name, value):
    is_filter = name in ("weight", "bias")
    arguments = conv_arguments(2, 6, 5, 4) if is_filter else scan_arguments(2, 6, 5, 3)
    arguments[name].view(-1)[3] = value
    with pytest.raises(NumericsError, match=rf"^{name} \[.*\] has 1 values that are NaN or infinite"):
        (cobra.ops.causal_conv1d if is_filter else cobra.ops.selective_scan)(**arguments)


def test_norm_refuses_what_is_not_finite_or_positive():
    x = torch.ones(2, 5)
    with pytest.raises(NumericsError, match=r"^weight \[5\] has 5 values"):
        cobra.ops.add_rms_norm(x, None, torch.full((5,), torch.nan), 1e-5)
    for eps in (0, -1e-5, torch.inf, None):
        with pytest.raises(NumericsError, match=r"^eps=.* must be a positive number"):
            cobra.ops.add_rms_norm(x, None, torch.ones(5), eps)


def test_what_is_no_tensor_is_refused_by_name():
    arguments = scan_arguments(2, 6, 5, 3)
    for name, value in (("u", None), ("A", [1.0]), ("lengths", [6, 3]), ("B", arguments["B"].numpy())):
        with pytest.raises(ShapeError, match=rf"^{name} is of type {type(value).__name__}, expected a tensor"):
            cobra.ops.selective_scan(**(arguments | {name: value}))
    with pytest.raises(ShapeError, match=r"^weight is of type NoneType"):
        cobra.ops.causal_conv1d(torch.zeros(2, 6, 5), None)


def test_derivatives_beyond_the_first_are_refused_or_right():
    arguments = {name: t.requires_grad_() for name, t in scan_arguments(1, 4, 3, 2).items()}

    def scan(u: torch.Tensor) -> torch.Tensor:
        return cobra.ops.selective_scan(**(arguments | {"u": u}), delta_softplus=True)[0]

    if "cpu" in dispatch.choose("cpu", torch.float32, None)[0][0].NAME:
        (gradient,) = torch.autograd.grad(scan(arguments["u"]).sum(), arguments["u"], create_graph=True)
        with pytest.raises(BackendError, match=r"first derivatives only; .* 'reference'"):
            gradient.sum().backward()
    direction = torch.ones_like(arguments["u"])
    _, tangent = torch.func.jvp(scan, (arguments["u"].detach(),), (direction,))
    with cobra.ops.use_backend("reference"):
        _, expected = torch.func.jvp(scan, (arguments["u"].detach(),), (direction,))
    torch.testing.assert_close(tangent, expected)
    assert tangent.abs().sum() > 0


def test_parameters_of_a_wrong_dtype_are_refused():
    arguments = scan_arguments(2, 6, 5, 3)
    with pytest.raises(ShapeError, match=r"^A \[5, 3\] has dtype torch.int64, expected a floating point dtype"):
        cobra.ops.selective_scan(**(arguments | {"A": arguments["A"].long()}))
    with pytest.raises(ShapeError, match=r"^B \[2, 6, 3\] has dtype torch.bool"):
        cobra.ops.selective_scan(**(arguments | {"B": arguments["B"] > 0}))


def test_arguments_on_different_devices_are_refused():
    arguments = scan_arguments(2, 6, 5, 3)
    with pytest.raises(ShapeError, match=r"^D is on meta, but u \[2, 6, 5\] is on cpu"):
        cobra.ops.selective_scan(**(arguments | {"D": arguments["D"].to("meta")}))
