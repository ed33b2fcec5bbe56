"""torch.compile takes every backend's operations whole, and fake tensors tell their shapes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import cobra.ops

from .cases import assert_all_close, conv_arguments, run_with_gradients, scan_arguments
from .conftest import Backend


def norm_arguments() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 4, 5), "residual": torch.randn(2, 4, 5), "weight": torch.randn(5)}


def step_arguments() -> dict[str, Tensor]:
    full = scan_arguments(2, 1, 5, 4)
    arguments = {n: t[:, 0] if n in ("u", "delta", "B", "C", "z") else t for n, t in full.items()}
    return arguments | {"state": arguments.pop("initial_state")}


def conv_step_arguments() -> dict[str, Tensor]:
    full = conv_arguments(2, 1, 5, 4)
    return {"state": full["initial_state"], "x": full["x"][:, 0], "weight": full["weight"], "bias": full["bias"]}


CASES: dict[str, tuple[Callable[[], dict[str, Tensor]], dict[str, object]]] = {
    "selective_scan": (
        lambda: scan_arguments(2, 4, 5, 4),
        {"delta_softplus": True, "lengths": torch.tensor([4, 2])},
    ),
    "selective_state_update": (step_arguments, {"delta_softplus": True}),
    "causal_conv1d": (lambda: conv_arguments(2, 4, 5, 4), {"lengths": torch.tensor([4, 2])}),
    "causal_conv1d_update": (conv_step_arguments, {}),
    "add_rms_norm": (norm_arguments, {"eps": 1e-5}),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_operation_equals_eager(any_backend: Backend, name):
    make, options = CASES[name]
    arguments = make()
    function = getattr(cobra.ops, name)

    def call(**tensors: Tensor) -> tuple[Tensor, Tensor]:
        first, second = function(**tensors, **moved)
        return 2 * first, second  # something to fuse around it

    moved = {key: o.to(any_backend.device) if isinstance(o, Tensor) else o for key, o in options.items()}
    with cobra.ops.use_backend(any_backend.module.NAME):
        torch._dynamo.reset()
        expected = run_with_gradients(call, arguments, any_backend.device)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        actual = run_with_gradients(compiled, arguments, any_backend.device)
    assert_all_close(actual, expected, 1e-6)  # float32: the graph may reorder what stands around the operation


@pytest.mark.parametrize("name", CASES)
def test_fake_tensors_have_the_real_shapes(any_backend: Backend, name):
    make, options = CASES[name]
    arguments = {key: t.to(any_backend.device) for key, t in make().items()}
    moved = {key: o.to(any_backend.device) if isinstance(o, Tensor) else o for key, o in options.items()}
    with cobra.ops.use_backend(any_backend.module.NAME):
        real = getattr(cobra.ops, name)(**arguments, **moved)
        with FakeTensorMode() as mode:
            fakes = {key: mode.from_tensor(t) for key, t in arguments.items()}
            lengths = {key: mode.from_tensor(o) if isinstance(o, Tensor) else o for key, o in moved.items()}
            fake = getattr(cobra.ops, name)(**fakes, **lengths)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_compiled_code_follows_the_chosen_backend():
    """Else a comparison of backends under torch.compile would compare one with itself."""
    pytest.importorskip("numba")
    graphs: list[str] = []

    def capture(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(cobra.ops.add_rms_norm, backend=capture, fullgraph=True)
    for name in ("cpu", "reference", "cpu"):
        with cobra.ops.use_backend(name):
            compiled(torch.ones(2, 5), None, torch.ones(5), 1e-5)
    assert len(graphs) == 2
    assert "cpu_add_rms_norm" in graphs[0] and "cpu_add_rms_norm" not in graphs[1]
