"""The official CUDA kernels (`mamba-ssm`, `causal-conv1d`); what they lack is supplied by identities.

Their scan knows no initial state, no lengths and no gradient of the final state. As A is diagonal, these are exact:

- Steps of dt = 0 leave the state as it is. Padding becomes such steps, so the last state is that of each row's own end.
- With S the running sum of dt, an initial state h adds C[t] . (exp(A S[t]) h) to what is read from the state at step t,
  and exp(A S) h to the final state.
- Further steps of dt = 0, each with a one-hot C, read out the final state. The backward pass appends them if the final
  state has a gradient, which is then rounded to the dtype of u like that of y; the state itself is float32.

Called are the functions below the packages' own autograd functions: as operators they pass through `torch.compile`, and
importing `mamba_ssm` would import far more. Single steps are left to the next backend, as the official ones write into
the state that they are given. Gradients repeat to rounding only, because the kernels sum by atomic
additions. Interfaces as in mamba-ssm 2.3.2 and causal-conv1d 1.7.0.

Source: Gu and Dao 2023, arXiv:2312.00752; https://github.com/state-spaces/mamba,
https://github.com/Dao-AILab/causal-conv1d.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cobra.errors import BackendError
from cobra.ops.reference import steps_within, zero_outside

from ._operators import differentiable
from ._shared import last_inputs

NAME = "mamba_ssm"
PRIORITY = 30

# What the initial state adds passes through tensors of [batch, steps, dim, state], at most this many numbers at a time:
# 16 MiB, so that the chain of plain operations finds them in the cache of a large GPU, where it costs its launches.
_PIECE = 2**22

_CHUNK = 2048  # steps between two states that the forward kernel keeps
_OPEN = 32.0  # silu(32) is 32 in float32: a gate that only scales, by a power of two


def available() -> str | None:
    """None if both packages are here with their compiled parts, and a CUDA device; imports neither."""
    missing = [name for name in ("mamba_ssm", "causal_conv1d") if find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed; pip install mamba-ssm causal-conv1d --no-build-isolation"
    missing = [name for name in ("selective_scan_cuda", "causal_conv1d_cuda") if find_spec(name) is None]
    if missing:
        return (
            f"{' and '.join(missing)} not built; install mamba-ssm and causal-conv1d with nvcc and --no-build-isolation"
            " (recent versions of mamba-ssm build the Mamba-1 scan only if asked to)"
        )
    return None if torch.cuda.is_available() else "there is no CUDA device"


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """CUDA tensors in float32, bfloat16 or float16."""
    if device.type != "cuda":
        return "it takes CUDA tensors only"
    known = (torch.float32, torch.bfloat16, torch.float16)
    return None if dtype in known else "its kernels know float32, bfloat16 and float16 only"


def declines(function: str, **arguments: Any) -> str | None:
    """Also what the next backend does better. Triton is wherever mamba-ssm is, which requires it."""
    if (
        function == "selective_scan"
        and arguments["initial_state"] is not None
        and arguments["delta"].numel() * arguments["A"].shape[1] > _PIECE
    ):
        return "a long scan from a state takes longer than with kernels that know initial states"
    return _impossible(function, arguments)


def _impossible(function: str, arguments: dict[str, Any]) -> str | None:
    if arguments["resets"] is not None:
        return "its kernels cannot begin a new text inside a row"
    if function == "selective_scan" and arguments["A"].shape[1] > 256:
        return f"its kernels take states of at most 256, not {arguments['A'].shape[1]}"
    if function == "causal_conv1d" and arguments["weight"].shape[1] > 4:
        return f"its kernels take filters of at most 4, not {arguments['weight'].shape[1]}"
    return None


def _refuse_impossible(function: str, **arguments: Any) -> None:
    reason = _impossible(function, arguments)
    if reason is not None:
        raise BackendError(f"The ops backend {NAME!r} cannot run this {function}: {reason}; use 'triton'.")


def _as_float(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float().contiguous()


def _no_step(delta_softplus: bool) -> float:
    """The delta of a step of exactly zero, whatever the bias."""
    return -torch.inf if delta_softplus else 0.0


# Sequences are [batch, dim or state, length] from here to `selective_scan`, all contiguous.


def _scan_forward(*inputs: Any) -> tuple[Tensor, ...]:
    kernels = import_module("selective_scan_cuda")
    u, delta, A, B, C, D, z, delta_bias, delta_softplus = inputs
    out, chunks, *gated = kernels.fwd(u, delta, A, B[:, None], C[:, None], D, z, delta_bias, delta_softplus)
    # of each chunk: the product of its decays, then the state at its end
    final_state = chunks[:, :, -1, 1::2].clone(memory_format=torch.contiguous_format)
    return (out, final_state, chunks, u.new_empty(0)) if z is None else (gated[0], final_state, chunks, out)


def _scan_fake(*inputs: Any) -> tuple[Tensor, ...]:
    u, _, A, _, _, _, z, _, _ = inputs
    (batch, dim, length), state = u.shape, A.shape[1]
    chunks = A.new_empty(batch, dim, (length + _CHUNK - 1) // _CHUNK, 2 * state)
    return u.new_empty(u.shape), A.new_empty(batch, dim, state), chunks, u.new_empty(0 if z is None else u.shape)


def _scan_backward(gradients: list[Tensor | None], saved: list[Tensor], *inputs: Any) -> list[Tensor]:
    kernels = import_module("selective_scan_cuda")
    u, delta, A, B, C, D, z, delta_bias, delta_softplus = inputs
    (dy, dfinal, *_), (chunks, out) = gradients, saved
    length, state = u.shape[2], A.shape[1]
    dy = torch.zeros_like(u) if dy is None else dy
    if dfinal is not None:
        u, B = F.pad(u, (0, state)), F.pad(B, (0, state))
        delta = F.pad(delta, (0, state), value=_no_step(delta_softplus))
        C = torch.cat([C, torch.eye(state, dtype=C.dtype, device=C.device).expand(len(C), -1, -1)], 2)
        if z is not None:
            z, dfinal = F.pad(z, (0, state), value=_OPEN), dfinal / _OPEN
        dy = torch.cat([dy, dfinal.to(dy.dtype)], 2)
        _, _, chunks, out = _scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    du, ddelta, dA, dB, dC, dD, dbias, *rest = kernels.bwd(
        u, delta, A, B[:, None], C[:, None], D, z, delta_bias, dy.contiguous(), chunks, None if z is None else out,
        None, delta_softplus, False,
    )  # fmt: skip
    du, ddelta, dB, dC, *dz = (t[..., :length].contiguous() for t in (du, ddelta, dB[:, 0], dC[:, 0], *rest))
    return [du, ddelta, dA, dB, dC, *([] if D is None else [dD]), *dz, *([] if delta_bias is None else [dbias])]


_scan = differentiable(
    "mamba_ssm_selective_scan",
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus",
    forward=_scan_forward,
    fake=_scan_fake,
    backward=_scan_backward,
    num_outputs=4,
    saved=(2, 3),
)


def _read(total: Tensor, A: Tensor, C: Tensor, h: Tensor) -> Tensor:
    """C . (exp(A total) h): [batch, steps, dim], [dim, state], [batch, steps, state], [batch, dim, state].

    Not a matrix product: autocast and TF32 would round it.
    """
    return (torch.exp(total[..., None] * A) * h[:, None] * C[:, :, None]).sum(-1)


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
    _refuse_impossible("selective_scan", A=A, resets=resets)
    y_dtype, dtype, within = u.dtype, u.dtype, steps_within(lengths, u)
    A, D, delta_bias = A.float().contiguous(), _as_float(D), _as_float(delta_bias)
    if not delta_softplus:
        # a step size of zero needs a bias of zero, and the sum of delta and bias must not be rounded
        dtype, delta, delta_bias = torch.float32, delta if delta_bias is None else delta + delta_bias, None
    u, B, C = (zero_outside(t, within).to(dtype) for t in (u, B, C))
    delta = (delta if within is None else torch.where(within, delta, _no_step(delta_softplus))).to(dtype)
    gates = [] if z is None else [zero_outside(z, within).to(dtype)]
    u, delta, B, C, *gates = (t.transpose(1, 2).contiguous() for t in (u, delta, B, C, *gates))
    y, final_state, _, _ = _scan(u, delta, A, B, C, D, gates[0] if gates else None, delta_bias, delta_softplus)
    y = y.transpose(1, 2)
    if initial_state is not None:
        # from the copies for the kernel: rounding must not depend on the strides that the caller's tensors have
        h, (dt, C, *gates) = initial_state.float().contiguous(), (t.transpose(1, 2).float() for t in (delta, C, *gates))
        dt = dt if delta_bias is None else dt + delta_bias
        total = (F.softplus(dt) if delta_softplus else dt).cumsum(1)
        steps = max(1, _PIECE // h.numel())
        pieces = [
            checkpoint(_read, total[:, at : at + steps], A, C[:, at : at + steps], h, use_reentrant=False,
                       preserve_rng_state=False)
            for at in range(0, total.shape[1], steps)
        ]  # fmt: skip
        read = torch.cat(pieces, 1)
        y = y + (read * F.silu(gates[0]) if gates else read)
        final_state = final_state + torch.exp(total[:, -1, :, None] * A) * h
    return y.to(y_dtype), final_state


def _for_conv(x: Tensor) -> Tensor:
    """[batch, dim, length] in a layout that the kernels take, without a copy where channels come in eights."""
    if x.shape[2] % 8:
        return x.transpose(1, 2).contiguous()
    is_aligned = x.stride(2) == 1 and not any(at % 8 for at in (x.stride(0), x.stride(1), x.storage_offset()))
    return (x if is_aligned else x.clone(memory_format=torch.contiguous_format)).transpose(1, 2)


def _conv_forward(*inputs: Any) -> Tensor:
    kernels = import_module("causal_conv1d.cpp_functions")
    x, weight, bias = inputs
    y = kernels.causal_conv1d_fwd_function(_for_conv(x), weight, bias, None, None, None, True)
    return y.transpose(1, 2).contiguous()


def _conv_backward(gradients: list[Tensor | None], saved: list[Tensor], *inputs: Any) -> list[Tensor]:
    kernels = import_module("causal_conv1d.cpp_functions")
    (dy,), (x, weight, bias) = gradients, inputs
    assert dy is not None, "it is the only output"
    dx, dweight, dbias, _ = kernels.causal_conv1d_bwd_function(
        _for_conv(x), weight, bias, _for_conv(dy), None, None, None, None, False, True
    )
    return [dx.transpose(1, 2).contiguous(), dweight, dbias]


_conv = differentiable(
    "mamba_ssm_causal_conv1d",
    "Tensor x, Tensor weight, Tensor bias",
    forward=_conv_forward,
    fake=lambda x, *_: x.new_empty(x.shape),
    backward=_conv_backward,
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
    _refuse_impossible("causal_conv1d", weight=weight, resets=resets)
    length, width, within = x.shape[1], weight.shape[1], steps_within(lengths, x)
    x = zero_outside(x, within)
    ends = None if lengths is None else lengths.clamp(0, length).to(torch.int64)
    final_state = last_inputs(x, width, ends, None, initial_state)
    if initial_state is not None:
        x = torch.cat([initial_state.to(x.dtype), x], 1)
    if x.shape[1] == 1:  # the kernels cannot tell the layout of a single step
        x = F.pad(x, (0, 0, 1, 0))
    weight = F.pad(weight.float(), (max(0, 2 - width), 0)).contiguous()  # they want two taps at least
    # causal-conv1d 1.5 has no gradients without a bias
    y = _conv(x, weight, weight.new_zeros(len(weight)) if bias is None else _as_float(bias))[:, -length:]
    return zero_outside(y, within), final_state
