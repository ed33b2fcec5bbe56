"""What decoding one token consists of, for `ops.py`: fused kernels, beside the same in single operations.

The blocks' weights together are larger than a GPU's cache.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cobra.ops
from cobra.ops import fused
from cobra.ops.fused import BlockWeights
from cobra.ops.quantized import QuantizedWeight, dequantize, quantize, quantized_linear

SIZES = {"cpu": (768, 1536, 48), "cuda": (2560, 5120, 160)}  # width, inner, rank: mamba-130m, mamba-2.8b
ROWS = {"cpu": (1, 8), "cuda": (1, 4, 16, 64)}
STATE, TAPS, LAYERS, EPS = 16, 4, 4, 1e-5

Call = Callable[..., "tuple[Tensor, ...] | None"]


def random_layers(device: torch.device, dtype: torch.dtype, bits: int) -> list[BlockWeights]:
    """Blocks whose three large projections have `bits` bits a number; 16 stands for `dtype`."""
    width, inner, rank = SIZES[device.type]
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * shape[-1] ** -0.5

    def large(*shape: int) -> Tensor | QuantizedWeight:
        return draw(*shape).to(dtype) if bits == 16 else quantize(draw(*shape), bits)

    return [
        BlockWeights(
            norm=torch.ones(width, device=device, dtype=dtype),
            in_proj=large(2 * inner, width),
            conv_weight=draw(inner, TAPS).to(dtype),
            conv_bias=draw(inner).to(dtype),
            x_proj=large(rank + 2 * STATE, inner),
            dt_proj=draw(inner, rank).to(dtype),
            dt_bias=draw(inner) - 4,
            A_log=draw(inner, STATE),
            D=draw(inner),
            out_proj=large(width, inner),
        )
        for _ in range(LAYERS)
    ]


def single_operations(
    layers: list[BlockWeights], conv: list[Tensor], ssm: list[Tensor], *, hidden: Tensor
) -> tuple[Tensor, ...]:
    """What `fused.stack_step` computes, operation by operation, in the dtype of `hidden`."""
    residual = None
    for weights, conv_state, ssm_state in zip(layers, conv, ssm, strict=True):
        normed, residual = cobra.ops.add_rms_norm(hidden, residual, weights.norm, EPS)
        x, z = _product(normed, weights.in_proj).chunk(2, dim=-1)
        x, _ = cobra.ops.causal_conv1d_update(conv_state, x, weights.conv_weight, weights.conv_bias)
        low, B, C = _product(x, weights.x_proj).split([weights.dt_proj.shape[1], STATE, STATE], dim=-1)
        y, _ = cobra.ops.selective_state_update(
            ssm_state, x, F.linear(low, weights.dt_proj), -torch.exp(weights.A_log), B, C, weights.D,
            z=z, delta_bias=weights.dt_bias, delta_softplus=True,
        )  # fmt: skip
        hidden = _product(y, weights.out_proj)
    assert residual is not None
    return hidden, residual


def _product(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    return quantized_linear(x, weight) if isinstance(weight, QuantizedWeight) else F.linear(x, weight)


def _torch_product(weight: Tensor, *, hidden: Tensor) -> tuple[Tensor, ...]:
    return (F.linear(hidden, weight),)


def _fused_step(
    backend: str, layers: list[BlockWeights], conv: list[Tensor], ssm: list[Tensor], *, hidden: Tensor
) -> tuple[Tensor, ...] | None:
    with torch.no_grad(), cobra.ops.use_backend(backend):
        found = fused.stack_step(layers, hidden, conv, ssm, EPS)
    return None if found is None else found[:2]


def _fused_product(backend: str, weight: Tensor | QuantizedWeight, *, hidden: Tensor) -> tuple[Tensor, ...] | None:
    with torch.no_grad(), cobra.ops.use_backend(backend):
        found = fused.linear(hidden, weight)
    return None if found is None else (found,)


def step_cases(device: torch.device, backends: list[str]) -> list[Mapping[str, Any]]:
    """Arguments of `ops.Case`; a backend is left out where it takes no such step."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    width, inner, _ = SIZES[device.type]
    found: list[Mapping[str, Any]] = []

    def add(name: str, hidden: Tensor, fused_call: Call, others: dict[str, Any], bytes_moved: int) -> None:
        ours = {f"{backend} fused": partial(fused_call, backend) for backend in backends}
        ours = {label: call for label, call in ours.items() if call(hidden=hidden) is not None}
        found.append(
            {
                "operation": name,
                "shape": tuple(hidden.shape),
                "tensors": {"hidden": hidden},
                "functions": ours | others,
                "definition": next(iter(others.values())),
                "passes": ("forward",),
                "bytes_moved": {"forward": bytes_moved},
                "exponentials": {"forward": 0},
                "tolerance": 1e-3 if dtype == torch.float32 else 5e-2,
            }
        )

    for bits in (16, 8, 4):
        layers = random_layers(device, dtype, bits)
        kind = dtype if bits == 16 else f"{bits} bits"
        for rows in ROWS[device.type]:
            conv = [torch.randn(rows, TAPS - 1, inner, device=device, dtype=dtype) for _ in layers]
            ssm = [torch.randn(rows, STATE, inner, device=device).transpose(1, 2) for _ in layers]
            hidden = torch.randn(rows, width, device=device, dtype=dtype)
            moved = sum(t.nbytes for layer in layers for t in layer) + 2 * sum(t.nbytes for t in (*conv, *ssm))
            given = (layers, conv, ssm)
            add(
                f"step of {LAYERS} blocks, {kind}", hidden, lambda name, g=given, **x: _fused_step(name, *g, **x),
                {"single": partial(single_operations, *given)}, moved,
            )  # fmt: skip
            for part in ("in_proj", "x_proj", "out_proj"):
                weight = getattr(layers[0], part)
                plain = weight if isinstance(weight, Tensor) else dequantize(weight, dtype)
                x = torch.randn(rows, weight.shape[1], device=device, dtype=dtype)
                add(
                    f"{part} of a step, {kind}", x, lambda name, w=weight, **x: _fused_product(name, w, **x),
                    {"torch": partial(_torch_product, plain)}, weight.nbytes,
                )  # fmt: skip
    return found


def as_graph(function: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """The same work as a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay
