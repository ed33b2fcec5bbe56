"""Random arguments for the five operations, and how results are compared."""

from collections.abc import Callable

import torch
from torch import Tensor


def scan_arguments(
    batch: int,
    length: int,
    dim: int,
    state: int,
    *,
    dtype: torch.dtype = torch.float32,
    optional: bool = True,
    initial: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Tensors for `selective_scan` by name; parameters are float32 (float64 in double precision) as in the model."""
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {"u": draw(batch, length, dim), "delta": draw(batch, length, dim)}
    inputs |= {"B": draw(batch, length, state), "C": draw(batch, length, state)}
    parameters = {"A": -torch.exp(draw(dim, state))}
    if optional:
        inputs["z"] = draw(batch, length, dim)
        parameters |= {"D": draw(dim), "delta_bias": draw(dim) - 1}
    if initial:
        parameters["initial_state"] = draw(batch, dim, state)
    return {name: t.to(dtype) for name, t in inputs.items()} | {n: t.to(parameter_dtype) for n, t in parameters.items()}


def conv_arguments(
    batch: int,
    length: int,
    dim: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    initial: bool = True,
) -> dict[str, Tensor]:
    """Tensors for `causal_conv1d` by name."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    arguments = {"x": draw(batch, length, dim), "weight": draw(dim, width)}
    if bias:
        arguments["bias"] = draw(dim)
    if initial:
        arguments["initial_state"] = draw(batch, width - 1, dim)
    return arguments


def run_with_gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    arguments: dict[str, Tensor],
    device: torch.device,
    *,
    upcast: bool = False,
    seed: int = 1,
    **options: object,
) -> dict[str, Tensor]:
    """Both outputs and the gradients of a random function of both outputs, by name; the seed says of which one.

    With `upcast` the same numbers are computed in float64: the truth for any dtype.
    """
    leaves = {
        name: (t.double() if upcast else t).detach().clone().to(device).requires_grad_()
        for name, t in arguments.items()
    }
    outputs = function(**leaves, **options)
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (torch.randn(out.shape, generator=generator).to(device, torch.float64) * out.double()).sum() for out in outputs
    )
    loss.backward()
    results = {"first output": outputs[0], "second output": outputs[1]}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"{name} got no gradient"
        results[f"gradient of {name}"] = leaf.grad
    return {name: t.detach().cpu() for name, t in results.items()}


def assert_all_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, like: dict[str, Tensor] | None = None
) -> None:
    """Compare by name; the tolerance is relative to the largest magnitude of each expected tensor.

    `like` has tensors of the same kind, from another seed. Their magnitudes count as well: where one number is the sum
    over a whole sequence, its terms may cancel, and what they were rounded by does not get smaller with them.
    """
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name].double()
        magnitudes = [of[name].abs().max().item() for of in (expected, like or {}) if name in of and want.numel()]
        scale = max([*magnitudes, 1e-3])
        error = (got - want.double()).abs().max().item() if want.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: error {error:.3g}, largest magnitude {scale:.3g}"
