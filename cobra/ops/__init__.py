"""The sequence model's operations, with interchangeable kernels.

Tensors are channel-last: [batch, length, dim]. Inputs may have any floating point dtype; sums and states are float32,
or float64 if the main input is. Every differentiable argument gets its gradient, states included, and gradients flow
back through the returned states. `COBRA_OPS_BACKEND` or `use_backend` force a backend, see `cobra.ops.dispatch`;
`python -m cobra.ops` shows what there is.

`lengths` marks right-padded rows: of row b only the first `lengths[b]` steps exist. Whatever stands behind them, NaN
included, changes neither outputs nor states nor gradients, and outputs there are zero. So a padded batch gives exactly
what its rows give alone. A length of zero returns the initial state.

`resets` marks packed rows: true at the first step of a new text, which then knows nothing of what stands before it in
the row. The initial state belongs to the steps before a row's first reset, the final state to its last text.

Shapes, dtypes and devices are checked in every call. Values are checked where that costs next to nothing: on the CPU,
lengths must lie within the sequence and parameters be finite (not in the two single steps, which follow a sequence with
the same parameters). On other devices a check would wait for the device; lengths are clamped there.

Second derivatives and the transforms of `torch.func` need the backend "reference"; forward-mode derivatives take it by
themselves.
"""

import math

import torch
from torch import Tensor

from cobra.errors import NumericsError, ShapeError

from .dispatch import implementation, set_backend, use_backend

__all__ = [
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "selective_scan",
    "selective_state_update",
    "set_backend",
    "use_backend",
]


def _check(name: str, tensor: Tensor | None, expected: tuple[int, ...], source: str, like: Tensor) -> None:
    """Raise ShapeError unless `tensor` is None or has the shape that `like`, the argument called `source`, implies."""
    if tensor is None:
        return
    _check_type(name, tensor)
    if tuple(tensor.shape) != expected:
        raise ShapeError(
            f"{name} has shape {list(tensor.shape)}, expected {list(expected)} to fit {source} {list(like.shape)}."
        )
    if tensor.device != like.device:
        raise ShapeError(f"{name} is on {tensor.device}, but {source} {list(like.shape)} is on {like.device}.")
    if name not in ("lengths", "resets") and not tensor.is_floating_point():
        raise ShapeError(f"{name} {list(tensor.shape)} has dtype {tensor.dtype}, expected a floating point dtype.")


def _check_type(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ShapeError(f"{name} is of type {type(tensor).__name__}, expected a tensor.")


def _check_main(name: str, tensor: Tensor, axes: str) -> None:
    _check_type(name, tensor)
    if tensor.dim() != len(axes.split()):
        raise ShapeError(f"{name} has shape {list(tensor.shape)}, expected [{', '.join(axes.split())}].")
    if not tensor.is_floating_point():
        raise ShapeError(f"{name} has dtype {tensor.dtype}, expected a floating point dtype.")


def _check_lengths(lengths: Tensor | None, source: str, like: Tensor) -> None:
    _check("lengths", lengths, (like.shape[0],), source, like)
    if lengths is None:
        return
    if lengths.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"lengths has dtype {lengths.dtype}, expected int64.")
    if _has_values_at_hand(lengths) and lengths.numel():
        least, most = (int(bound) for bound in torch.aminmax(lengths))
        if least < 0 or most > like.shape[1]:
            wrong = least if least < 0 else most
            raise ShapeError(
                f"lengths holds {wrong}, but {source} {list(like.shape)} has {like.shape[1]} steps; "
                f"expected values from 0 to {like.shape[1]}."
            )


def _check_resets(resets: Tensor | None, source: str, like: Tensor) -> None:
    _check("resets", resets, tuple(like.shape[:2]), source, like)
    if resets is not None and resets.dtype != torch.bool:
        raise ShapeError(f"resets has dtype {resets.dtype}, expected bool.")


def _has_values_at_hand(tensor: Tensor) -> bool:
    """Whether looking at values neither waits for a device nor breaks a graph that is being traced."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, torch.nn.Parameter)


def _check_finite(**parameters: Tensor | None) -> None:
    for name, tensor in parameters.items():
        # a sum takes a fifth of the time of isfinite().all()
        if tensor is None or not _has_values_at_hand(tensor) or math.isfinite(float(tensor.detach().sum())):
            continue
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise NumericsError(
                f"{name} {list(tensor.shape)} has {bad} values that are NaN or infinite; "
                "the weights are damaged, or a training step diverged."
            )


def _check_parameters(A: Tensor, D: Tensor | None, delta_bias: Tensor | None, u: Tensor) -> int:
    """Check what does not depend on the sequence; returns the state size."""
    dim = u.shape[-1]
    _check_type("A", A)
    if A.dim() != 2:
        raise ShapeError(f"A has shape {list(A.shape)}, expected [dim, state] to fit u {list(u.shape)}.")
    _check("A", A, (dim, A.shape[1]), "u", u)
    _check("D", D, (dim,), "u", u)
    _check("delta_bias", delta_bias, (dim,), "u", u)
    return A.shape[1]


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
    """Run the selective state-space recurrence along the sequence.

    With dt = softplus(delta + delta_bias), or without the softplus if `delta_softplus` is false, and for every
    channel d and state index n:

        h[t, d, n] = exp(dt[t, d] A[d, n]) h[t-1, d, n] + dt[t, d] B[t, n] u[t, d]
        y[t, d]    = (sum_n C[t, n] h[t, d, n] + D[d] u[t, d]) silu(z[t, d])

    Args:
        u: input, [batch, length, dim].
        delta: step size before bias and softplus, like u.
        A: [dim, state], negative for a stable model.
        B, C: input and output weights, [batch, length, state].
        D: skip weight, [dim]; no skip if None.
        z: gate before its SiLU, like u; no gate if None.
        delta_bias: [dim].
        lengths: int64, [batch], see the module; whole rows if None.
        resets: bool, [batch, length], see the module; one text per row if None.
        initial_state: [batch, dim, state]; zeros if None.

    Returns:
        y, like u, and the state after each row's last step, [batch, dim, state], float32 (float64 if u is). The state
        may be a strided view.

    Raises: ShapeError if sizes, dtypes, devices or lengths do not fit, NumericsError if A, D or delta_bias is not
        finite; the message names the argument.
    Source: Gu and Dao 2023, arXiv:2312.00752, Algorithm 2, with the simplified discretisation of B of their code.
    """
    _check_main("u", u, "batch length dim")
    batch, length, dim = u.shape
    state = _check_parameters(A, D, delta_bias, u)
    for name, tensor, expected in (
        ("delta", delta, (batch, length, dim)),
        ("B", B, (batch, length, state)),
        ("C", C, (batch, length, state)),
        ("z", z, (batch, length, dim)),
        ("initial_state", initial_state, (batch, dim, state)),
    ):
        _check(name, tensor, expected, "u" if expected[-1] == dim else "u and A", u)
    _check_lengths(lengths, "u", u)
    _check_resets(resets, "u", u)
    _check_finite(A=A, D=D, delta_bias=delta_bias)
    rest = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    rest |= {"delta_softplus": delta_softplus, "lengths": lengths, "resets": resets, "initial_state": initial_state}
    return implementation("selective_scan", u, rest)(u, **rest)


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
    """Run one step of `selective_scan`.

    Args:
        state: the state before this step, [batch, dim, state]; it is not changed.
        u, delta, z: [batch, dim]. B, C: [batch, state]. The others are as in `selective_scan`.

    Returns: y, like u, and the new state, [batch, dim, state], float32 (float64 if u is).
    Raises: ShapeError if sizes, dtypes or devices do not fit; the message names the argument.
    Source: Gu and Dao 2023, arXiv:2312.00752, section 3.3 and equation 2a.
    """
    _check_main("u", u, "batch dim")
    batch, dim = u.shape
    size = _check_parameters(A, D, delta_bias, u)
    for name, tensor, expected in (
        ("state", state, (batch, dim, size)),
        ("delta", delta, (batch, dim)),
        ("B", B, (batch, size)),
        ("C", C, (batch, size)),
        ("z", z, (batch, dim)),
    ):
        _check(name, tensor, expected, "u" if expected[-1] == dim else "u and A", u)
    rest = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    rest |= {"delta_softplus": delta_softplus}
    return implementation("selective_state_update", u, rest)(state, **rest)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve every channel with its own causal filter and apply SiLU.

        y[t, d] = silu(bias[d] + sum_k weight[d, k] x[t - (width - 1) + k, d])

    where inputs before the first are those of `initial_state`, or zeros.

    Args:
        x: [batch, length, dim].
        weight: [dim, width]. bias: [dim] or None.
        lengths: int64, [batch], see the module; whole rows if None.
        resets: bool, [batch, length], see the module; one text per row if None.
        initial_state: the inputs before the first, oldest first, [batch, width - 1, dim]; zeros if None.

    Returns:
        y, like x, and the last width - 1 inputs at each row's own end, oldest first, [batch, width - 1, dim], in the
        dtype of x: the `initial_state` of what follows.

    Raises: ShapeError if sizes, dtypes, devices or lengths do not fit, NumericsError if weight or bias is not finite;
        the message names the argument.
    Source: Gu and Dao 2023, arXiv:2312.00752, section 3.4 and figure 3.
    """
    _check_main("x", x, "batch length dim")
    batch, _, dim = x.shape
    width = _check_filter(weight, bias, x)
    _check("initial_state", initial_state, (batch, width - 1, dim), "x and weight", x)
    _check_lengths(lengths, "x", x)
    _check_resets(resets, "x", x)
    _check_finite(weight=weight, bias=bias)
    rest = {"weight": weight, "bias": bias, "lengths": lengths, "resets": resets, "initial_state": initial_state}
    return implementation("causal_conv1d", x, rest)(x, **rest)


def _check_filter(weight: Tensor, bias: Tensor | None, x: Tensor) -> int:
    """Returns the filter's width."""
    _check_type("weight", weight)
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ShapeError(f"weight has shape {list(weight.shape)}, expected [dim, width] to fit x {list(x.shape)}.")
    _check("weight", weight, (x.shape[-1], weight.shape[1]), "x", x)
    _check("bias", bias, (x.shape[-1],), "x", x)
    return weight.shape[1]


def causal_conv1d_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run one step of `causal_conv1d`.

    Args:
        state: the last width - 1 inputs, oldest first, [batch, width - 1, dim]; it is not changed.
        x: [batch, dim]. weight: [dim, width]. bias: [dim] or None.

    Returns: y, like x, and the new state, like `state` in the dtype of x.
    Raises: ShapeError if sizes, dtypes or devices do not fit; the message names the argument.
    Source: as `causal_conv1d`.
    """
    _check_main("x", x, "batch dim")
    width = _check_filter(weight, bias, x)
    _check("state", state, (x.shape[0], width - 1, x.shape[1]), "x and weight", x)
    rest = {"x": x, "weight": weight, "bias": bias}
    return implementation("causal_conv1d_update", x, rest)(state, **rest)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream in full precision and normalise the sum.

        new_residual = x + residual
        normed       = weight new_residual / sqrt(mean(new_residual^2) + eps)

    Args:
        x: [..., dim]. residual: like x in any dtype, or None at the first block. weight: [dim].
        eps: added to the mean square.

    Returns: normed, in the dtype of x, and new_residual, float32 (float64 if x is).
    Raises: ShapeError if sizes, dtypes or devices do not fit, NumericsError if weight is not finite or eps not
        positive; the message names the argument.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.
    """
    _check_type("x", x)
    if x.dim() == 0:
        raise ShapeError("x is a scalar, expected [..., dim].")
    if not x.is_floating_point():
        raise ShapeError(f"x has dtype {x.dtype}, expected a floating point dtype.")
    _check("residual", residual, tuple(x.shape), "x", x)
    _check("weight", weight, (x.shape[-1],), "x", x)
    _check_finite(weight=weight)
    if not (isinstance(eps, (int, float)) and 0 < eps < math.inf):
        raise NumericsError(f"eps={eps!r} must be a positive number.")
    rest = {"residual": residual, "weight": weight, "eps": eps}
    return implementation("add_rms_norm", x, rest)(x, **rest)
