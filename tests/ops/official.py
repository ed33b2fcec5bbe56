"""Stand-ins for the official packages: their functions, layouts and limits in plain PyTorch on the CPU.

Their checks are those of mamba-ssm 2.3.2 (csrc/selective_scan/selective_scan.cpp) and causal-conv1d 1.7.0
(csrc/causal_conv1d.cpp and causal_conv1d/cpp_functions.py); the numbers come from `cobra.ops.reference`.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cobra.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 2048


def _with_autograd(function: Callable[[], Any]) -> Any:
    """Inside an operator autograd is off; in another thread it is not."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _check_scan(u, delta, A, B, C, D, z, delta_bias):
    batch, dim, length = u.shape
    state = A.shape[1]
    assert u.dtype in DTYPES and A.dtype == torch.float32 and A.shape == (dim, state) and state <= 256
    for sequence, sizes in ((u, (dim,)), (delta, (dim,)), (B, (1, state)), (C, (1, state)), (z, (dim,))):
        if sequence is not None:
            assert sequence.dtype == u.dtype and sequence.shape == (batch, *sizes, length)
            assert sequence.stride(-1) == 1 or length == 1
    for vector in (D, delta_bias):
        assert vector is None or (vector.dtype == torch.float32 and vector.shape == (dim,) and vector.stride(0) == 1)


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    sequences = (None if t is None else t.transpose(1, 2) for t in (u, delta, B[:, 0], C[:, 0], z))
    u, delta, B, C, z = sequences
    options = {"z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
    y, state = reference.selective_scan(u, delta, A, B, C, D, **options)
    return y.transpose(1, 2), state


def scan_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    _check_scan(u, delta, A, B, C, D, z, delta_bias)
    out, state = _scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    chunks = torch.full((*u.shape[:2], -(-u.shape[2] // CHUNK), 2 * A.shape[1]), torch.nan)
    chunks[:, :, -1, 1::2] = state
    gated = [] if z is None else [_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)[0].contiguous()]
    return [out.contiguous(), chunks, *gated]


def scan_bwd(u, delta, A, B, C, D, z, delta_bias, dout, chunks, out, dz, delta_softplus, recompute_out_z):
    _check_scan(u, delta, A, B, C, D, z, delta_bias)
    assert dout.dtype == u.dtype and dout.shape == u.shape and (dout.stride(-1) == 1 or u.shape[2] == 1)
    assert dz is None and not recompute_out_z and (out is None) == (z is None)
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}

    def differentiate() -> tuple[list[Tensor], Tensor]:
        leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in given.items()}
        y, state = _scan(**leaves, delta_softplus=delta_softplus)
        return torch.autograd.grad(y, [t for t in leaves.values() if t is not None], dout), state.detach()

    gradients, state = _with_autograd(differentiate)
    assert chunks.is_contiguous() and torch.equal(chunks[:, :, -1, 1::2], state), "states of another forward pass"
    if z is not None:
        ungated = _scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)[0]
        assert torch.equal(out, ungated), "outputs of another forward pass"
    by_name = dict(zip((name for name, t in given.items() if t is not None), gradients, strict=True))
    last = [] if z is None else [by_name["z"]]
    return [*(by_name.get(name) for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")), *last]


def _check_filter(dim: int, weight: Tensor, bias: Tensor | None) -> None:
    assert weight.dtype in DTYPES and weight.shape[0] == dim and 2 <= weight.shape[1] <= 4
    assert bias is None or (bias.dtype == weight.dtype and bias.shape == (dim,) and bias.stride(0) == 1)


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.causal_conv1d(x.transpose(1, 2), weight, bias)[0].transpose(1, 2)


def _is_channel_last(x: Tensor) -> bool:
    assert x.dtype in DTYPES and x.shape[2] > 1, "the layout of a single step would be a guess"
    if x.stride(1) != 1:
        assert x.stride(2) == 1
        return False
    assert x.shape[1] % 8 == 0 and not any(at % 8 for at in (x.stride(0), x.stride(2), x.storage_offset()))
    return True


def causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation):
    assert seq_idx is None and initial_states is None and final_states_out is None and silu_activation is True
    assert bias is not None, "1.5 has no gradients without a bias"
    _check_filter(x.shape[1], weight, bias)
    _is_channel_last(x)
    return torch.empty_like(x).copy_(_conv(x, weight, bias))


def causal_conv1d_bwd_function(
    x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu_activation
):
    assert seq_idx is None and initial_states is None and dfinal_states is None and dx is None
    assert return_dinitial_states is False and silu_activation is True
    _check_filter(x.shape[1], weight, bias)
    assert dout.dtype == x.dtype and dout.shape == x.shape and _is_channel_last(x) == _is_channel_last(dout)

    def differentiate() -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(_conv(*leaves), leaves, dout)

    gradient, dweight, dbias = _with_autograd(differentiate)
    return torch.empty_like(x).copy_(gradient), dweight, dbias, None


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stand-ins be what is imported."""
    functions = {
        "selective_scan_cuda": {"fwd": scan_fwd, "bwd": scan_bwd},
        "causal_conv1d.cpp_functions": {
            "causal_conv1d_fwd_function": causal_conv1d_fwd_function,
            "causal_conv1d_bwd_function": causal_conv1d_bwd_function,
        },
    }
    for name, members in functions.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "causal_conv1d", ModuleType("causal_conv1d"))
