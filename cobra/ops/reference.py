"""The five operations in plain PyTorch: their definition, for any device and any floating point dtype.

Slow where it loops over time, differentiable through plain autograd. Every other backend is tested against this file;
arguments are described in `cobra.ops`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "reference"
PRIORITY = 0


def available() -> str | None:
    """Always: it needs PyTorch only."""
    return None


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Everything."""
    return None


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _upcast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def steps_within(lengths: Tensor | None, tensor: Tensor) -> Tensor | None:
    """[batch, length, 1], true at the steps that count; None if all do."""
    if lengths is None:
        return None
    return (torch.arange(tensor.shape[1], device=tensor.device) < lengths[:, None])[..., None]


def zero_outside(tensor: Tensor, within: Tensor | None) -> Tensor:
    """Padding as zeros, by selection and not by product: NaN there reaches neither values nor gradients."""
    return tensor if within is None else torch.where(within, tensor, 0.0)


def _steps_since_reset(resets: Tensor) -> Tensor:
    """int64 [batch, length]: how many steps ago each step's text began; very many before a row's first reset."""
    steps = torch.arange(resets.shape[1], device=resets.device)
    return steps - torch.where(resets, steps, -(2**31)).cummax(1).values


def _step_size(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    shifted = delta if delta_bias is None else delta + delta_bias
    # threshold: beyond it PyTorch returns its input, which in double precision is 2e-9 away from the function
    return F.softplus(shifted, threshold=40.0) if delta_softplus else shifted


def _step(h: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the recurrence for a batch: h' = exp(dt A) h + dt B u, and C . h'."""
    h = torch.exp(dt[..., None] * A) * h + (dt * u)[..., None] * B[:, None, :]
    return h, (h * C[:, None, :]).sum(-1)


def _skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    y = y if D is None else y + D * u
    return y if z is None else y * F.silu(z)


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
    """`cobra.ops.selective_scan` as a loop over time."""
    out_dtype = u.dtype
    dtype = _compute_dtype(u)
    within = steps_within(lengths, u)
    u, delta, B, C = (zero_outside(tensor.to(dtype), within) for tensor in (u, delta, B, C))
    z = None if z is None else zero_outside(z.to(dtype), within)
    A, D, delta_bias = A.to(dtype), _upcast(D, dtype), _upcast(delta_bias, dtype)
    dt = zero_outside(_step_size(delta, delta_bias, delta_softplus), within)  # dt = 0 leaves the state as it is
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1]) if initial_state is None else initial_state.to(dtype)
    forget = None if resets is None else resets if within is None else resets & within[..., 0]
    ys = []
    for t in range(u.shape[1]):
        if forget is not None:
            h = torch.where(forget[:, t, None, None], 0.0, h)
        h, y = _step(h, u[:, t], dt[:, t], A, B[:, t], C[:, t])
        ys.append(y)
    y = torch.stack(ys, dim=1) if ys else torch.zeros_like(u)
    return _skip_and_gate(y, u, D, z).to(out_dtype), h


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
    """`cobra.ops.selective_state_update`: one step of the same recurrence."""
    out_dtype = u.dtype
    dtype = _compute_dtype(u)
    h, u, delta, A, B, C = (tensor.to(dtype) for tensor in (state, u, delta, A, B, C))
    D, z, delta_bias = _upcast(D, dtype), _upcast(z, dtype), _upcast(delta_bias, dtype)
    h, y = _step(h, u, _step_size(delta, delta_bias, delta_softplus), A, B, C)
    return _skip_and_gate(y, u, D, z).to(out_dtype), h


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`cobra.ops.causal_conv1d` as a sum of shifted inputs."""
    batch, length, dim = x.shape
    width = weight.shape[1]
    within = steps_within(lengths, x)
    before = x.new_zeros(batch, width - 1, dim) if initial_state is None else initial_state.to(x.dtype)
    # position t of the input is position t + width - 1 here
    padded = torch.cat([before, zero_outside(x, within)], dim=1)

    dtype = _compute_dtype(x)
    taps = weight.to(dtype)
    products = []
    for k in range(width):
        values = padded[:, k : k + length].to(dtype)
        if resets is not None:  # a text does not see the one before it
            values = torch.where(_steps_since_reset(resets)[..., None] >= width - 1 - k, values, 0.0)
        products.append(values * taps[:, k])
    y = torch.stack(products).sum(0)
    y = zero_outside(F.silu(y if bias is None else y + bias.to(dtype)), within)

    ends = torch.full((batch,), length, device=x.device) if lengths is None else lengths.clamp(0, length)
    window = ends[:, None] + torch.arange(width - 1, device=x.device)  # [batch, width - 1]
    final_state = padded.gather(1, window[..., None].expand(-1, -1, dim))
    if resets is not None and length:
        ages = torch.arange(width - 2, -1, -1, device=x.device)  # how long before the last step an input came
        last = _steps_since_reset(resets).gather(1, (ends - 1).clamp(min=0)[:, None])
        is_of_last_text = (ages <= last) | (ends == 0)[:, None]
        final_state = torch.where(is_of_last_text[..., None], final_state, 0.0)
    return y.to(x.dtype), final_state


def causal_conv1d_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`cobra.ops.causal_conv1d_update`: one step of the same convolution."""
    dtype = _compute_dtype(x)
    window = torch.cat([state.to(x.dtype), x[:, None]], dim=1)  # [batch, width, dim]
    y = (window.to(dtype) * weight.to(dtype).t()).sum(1)
    y = F.silu(y if bias is None else y + bias.to(dtype))
    return y.to(x.dtype), window[:, 1:]


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`cobra.ops.add_rms_norm`."""
    dtype = _compute_dtype(x)
    new_residual = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    scale = torch.rsqrt(new_residual.square().mean(-1, keepdim=True) + eps)
    return (new_residual * scale * weight.to(dtype)).to(x.dtype), new_residual
