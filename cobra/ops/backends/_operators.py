"""Turn a backend's kernels into the public operations: layouts, dtypes, autograd and `torch.compile` in one place.

A backend brings plain functions, one that computes outputs and one that computes gradients. Here both become custom
operators of PyTorch: `torch.compile` and fake tensors see their shapes and leave them as they are.

Kernels see one layout. What has the size of a state, A included, is contiguous [..., state, dim]; filters are
contiguous [width, dim]; sequences have a contiguous last axis and any strides before it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cobra.errors import BackendError

from ._shared import compute_dtype, first_steps, last_inputs, rows

# Inputs in the order of the schema -> outputs, then whatever the backward pass needs beside the inputs.
Forward = Callable[..., Tensor | tuple[Tensor, ...]]
# Gradients of the outputs (None: no gradient), saved outputs, inputs -> gradients of the floating inputs given.
Backward = Callable[..., list[Tensor]]


def _has_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def differentiable(
    name: str,
    inputs: str,
    *,
    forward: Forward,
    fake: Forward,
    backward: Backward,
    num_outputs: int,
    saved: Sequence[int],
    same_gradient: Sequence[int] = (),
) -> Callable[..., Any]:
    """Register `cobra::name` with its backward pass.

    Args:
        inputs: the schema's arguments.
        fake: computes outputs of the right shapes, dtypes and strides, and nothing else.
        num_outputs: outputs of `forward`.
        saved: positions of the outputs that `backward` gets.
        same_gradient: positions of inputs whose gradient is that of the first input, which `backward` leaves out.
    """
    gradients_of = torch.library.custom_op(
        f"cobra::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor?[] gradients, Tensor[] saved, {inputs}) -> Tensor[]",
    )

    def refuse(ctx: Any, *_: Any) -> None:
        raise BackendError(f"{name} has first derivatives only; for higher ones ask for the backend 'reference'.")

    gradients_of.register_autograd(refuse)

    @gradients_of.register_fake
    def _(gradients: list[Tensor | None], saved: list[Tensor], *inputs: Any) -> list[Tensor]:
        own = [value for at, value in enumerate(inputs) if at not in same_gradient]
        return [value.new_empty(value.shape) for value in own if _has_gradient(value)]

    results = "Tensor" if num_outputs == 1 else f"({', '.join(['Tensor'] * num_outputs)})"
    operator = torch.library.custom_op(f"cobra::{name}", forward, mutates_args=(), schema=f"({inputs}) -> {results}")
    operator.register_fake(fake)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*(output[at] for at in saved), *(value for value in inputs if isinstance(value, Tensor)))

    def differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.others)
        kept = list(ctx.saved_tensors)
        tensors = iter(kept[len(saved) :])
        inputs = [next(tensors) if is_tensor else ctx.others[at] for at, is_tensor in enumerate(ctx.is_tensor)]
        computed = iter(gradients_of(list(gradients), kept[: len(saved)], *inputs))
        found: list[Tensor | None] = []
        for at, value in enumerate(inputs):
            if not _has_gradient(value):
                found.append(None)
            else:
                found.append(found[0] if at in same_gradient else next(computed))
        return tuple(found)

    operator.register_autograd(differentiate, setup_context=keep)
    return operator


def _contiguous(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()


def _within_length(lengths: Tensor | None, like: Tensor) -> Tensor | None:
    """Every row's number of steps as int64; clamped, as a kernel would read memory that is not its own."""
    return None if lengths is None else lengths.to(like.device, torch.int64).clamp(0, like.shape[1]).contiguous()


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def scan_functions(
    backend: str,
    forward: Forward,
    backward: Backward,
    saved_shape: Callable[[int, int, int, int], tuple[int, ...]],
    *,
    upcast: bool,
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor]]]:
    """`selective_scan` and `selective_state_update` of a backend.

    Args:
        forward: gets (u, delta, A, B, C, D, z, delta_bias, delta_softplus, lengths, resets, initial, keep); returns y,
            the final state and, if `keep`, what the backward pass needs, else an empty tensor.
        backward: see `Backward`.
        saved_shape: (batch, length, dim, state) -> the shape of that.
        upcast: give kernels everything in the dtype that they compute in, rather than in the dtype it has.
    """

    def fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, lengths, resets, initial, keep):
        batch, length, dim = u.shape
        state = A.shape[0]
        saved = saved_shape(batch, length, dim, state) if keep else (0,)
        dtype = compute_dtype(u)
        return u.new_empty(u.shape), u.new_empty(batch, state, dim, dtype=dtype), u.new_empty(saved, dtype=dtype)

    operator = differentiable(
        f"{backend}_selective_scan",
        "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
        "bool delta_softplus, Tensor? lengths, Tensor? resets, Tensor? initial, bool keep",
        forward=forward,
        fake=fake,
        backward=backward,
        num_outputs=3,
        saved=(2,),
    )

    def selective_scan(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        *,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        initial_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `cobra.ops.selective_scan`."""
        dtype = compute_dtype(u) if upcast else None
        u_, delta, B, C = (rows(tensor.to(dtype or tensor.dtype)) for tensor in (u, delta, B, C))
        z = None if z is None else rows(z.to(dtype or z.dtype))
        D, delta_bias = _contiguous(D, dtype), _contiguous(delta_bias, dtype)
        A = A.to(dtype or A.dtype).t().contiguous()
        initial = None if initial_state is None else _contiguous(initial_state.transpose(1, 2), compute_dtype(u))
        resets = None if resets is None else resets.contiguous()
        y, final_state, _ = operator(
            u_, delta, A, B, C, D, z, delta_bias, delta_softplus, _within_length(lengths, u), resets, initial,
            _needs_gradient(u, delta, A, B, C, D, z, delta_bias, initial),
        )  # fmt: skip
        return y.to(u.dtype), final_state.transpose(1, 2)

    def selective_state_update(
        state: Tensor,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        *,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See `cobra.ops.selective_state_update`: a sequence of one step."""
        y, new_state = selective_scan(
            u[:, None],
            delta[:, None],
            A,
            B[:, None],
            C[:, None],
            D,
            z=None if z is None else z[:, None],
            delta_bias=delta_bias,
            delta_softplus=delta_softplus,
            initial_state=state,
        )
        return y[:, 0], new_state

    return selective_scan, selective_state_update


def conv_function(
    backend: str, forward: Forward, backward: Backward, *, upcast: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`causal_conv1d` of a backend.

    Args:
        forward: gets (x, weight, bias, lengths, firsts, initial), where firsts, int64 [batch, length], is the first
            step of the text that a step belongs to, negative if the text began before the row; returns y.
        backward: see `Backward`; nothing is saved.
        upcast: as in `scan_functions`.
    """
    operator = differentiable(
        f"{backend}_causal_conv1d",
        "Tensor x, Tensor weight, Tensor? bias, Tensor? lengths, Tensor? firsts, Tensor? initial",
        forward=forward,
        fake=lambda x, *_: x.new_empty(x.shape),
        backward=backward,
        num_outputs=1,
        saved=(),
    )

    def causal_conv1d(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        initial_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `cobra.ops.causal_conv1d`."""
        dtype = compute_dtype(x) if upcast else None
        lengths = _within_length(lengths, x)
        firsts = None if resets is None else first_steps(resets)
        # through the dtype of x, as in the definition: the state holds inputs
        initial = _contiguous(initial_state, x.dtype)
        y = operator(
            rows(x.to(dtype or x.dtype)),
            weight.to(dtype or weight.dtype).t().contiguous(),
            _contiguous(bias, dtype),
            lengths,
            firsts,
            _contiguous(initial, dtype),
        )
        return y.to(x.dtype), last_inputs(x, weight.shape[1], lengths, firsts, initial)

    return causal_conv1d


def norm_function(
    backend: str, forward: Forward, backward: Backward, *, upcast: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`add_rms_norm` of a backend.

    Args:
        forward: gets matrices (x, residual, weight, eps); returns normed, the sums and 1 / root mean square per row.
        backward: gets the last two as saved; where `upcast`, it leaves out the residual's gradient, which is x's.
        upcast: as in `scan_functions`.
    """

    def fake(x, residual, weight, eps):
        dtype = compute_dtype(x)
        return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)

    operator = differentiable(
        f"{backend}_add_rms_norm",
        "Tensor x, Tensor? residual, Tensor weight, float eps",
        forward=forward,
        fake=fake,
        backward=backward,
        num_outputs=3,
        saved=(1, 2),
        same_gradient=(1,) if upcast else (),
    )

    def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `cobra.ops.add_rms_norm`."""
        dtype = compute_dtype(x) if upcast else None
        x_, residual = (
            None if tensor is None else tensor.to(dtype or tensor.dtype).reshape(-1, x.shape[-1]).contiguous()
            for tensor in (x, residual)
        )
        normed, total, _ = operator(x_, residual, _contiguous(weight, dtype), float(eps))
        return normed.view(x.shape).to(x.dtype), total.view(x.shape)

    return add_rms_norm
