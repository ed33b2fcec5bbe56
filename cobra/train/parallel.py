"""Sharding (FSDP2), precision and recomputation: applied from outside to a finished model that knows nothing of them.

Each Mamba block, each block of a vision tower and the projector is a unit of `fully_shard`; what is left (embedding and
head, final norm, patch embeddings) is the root's. One process alone needs no unit: it computes under autocast.

Source: FSDP2, pytorch.org/docs/stable/distributed.fsdp.fully_shard.html; HSDP is its two-dimensional mesh.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cobra.config import ParallelConfig
from cobra.errors import ConfigError
from cobra.models.build import cast_parameters
from cobra.models.vlm import CobraVLM
from cobra.models.weights import KEPT_IN_FLOAT32, untied_state

# torch's FSDP can keep single parameters in float32 since this field exists; before, bf16 runs gather float32 weights
# and compute under autocast, which costs twice the traffic and gives the same precision.
_CAN_KEEP_FLOAT32 = "param_dtype_override_fn" in {field.name for field in fields(MixedPrecisionPolicy)}


def prepare(model: CobraVLM, config: ParallelConfig) -> None:
    """Set recomputation and compilation, and let what never learns rest in 16 bits if the run computes in them.

    The scan's own parameters stay in float32. Works on the meta device too.
    """
    model.llm.checkpoint_activations(config.recompute)
    vision_learns = any(parameter.requires_grad for parameter in model.vision.parameters())
    if vision_learns and config.recompute is not None:  # timm knows all blocks or none
        for tower in model.vision.towers:
            tower.model.set_grad_checkpointing(True)  # type: ignore[union-attr,operator]
    if config.precision == "bf16":
        cast_parameters(model, torch.bfloat16, frozen_only=True)
    if config.compile:
        for block in _blocks(model, vision=vision_learns):
            block.compile()


def make_mesh(config: ParallelConfig, world_size: int, device: torch.device) -> DeviceMesh | None:
    """Lay the ranks out: one dimension to shard over, or copies of the model first and shards of each second (HSDP).

    One process alone has nothing to lay out: None.

    Raises:
        ConfigError: `parallel.replicate` does not divide the number of ranks.
    """
    if world_size % config.replicate:
        raise ConfigError(
            f"parallel.replicate={config.replicate} does not divide the {world_size} processes of this run; use a "
            "divisor, usually the number of nodes."
        )
    if world_size == 1:
        return None
    if config.replicate == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    shape = (config.replicate, world_size // config.replicate)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: CobraVLM, config: ParallelConfig, mesh: DeviceMesh, device: torch.device) -> None:
    """Cut the parameters over the mesh and give each rank its own part of rank 0's values.

    Args:
        model: with values on the CPU on rank 0, on the meta device on the others; `prepare` came before.
        config: precision, and whether frozen encoders are cut or kept whole.
        mesh: see `make_mesh`.
        device: of the shards.
    """
    values = untied_state(model) if dist.get_rank() == 0 else {}
    buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    _without_memory(model)
    vision = set(model.vision.parameters())
    keep_whole = not config.shard_frozen and not any(parameter.requires_grad for parameter in vision)
    # Inputs are left as they are: the residual stream and the states between blocks are float32 on purpose.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if config.precision == "bf16" and _CAN_KEEP_FLOAT32:
        kept = {id(parameter) for name, parameter in model.named_parameters() if name.endswith(KEPT_IN_FLOAT32)}
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
            param_dtype_override_fn=lambda parameter: torch.float32 if id(parameter) in kept else None,
        )
    # It warns of in-place operations on what a block returns; there are none here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    units = [*_blocks(model, vision=not keep_whole), model.projector]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=vision if keep_whole else None)

    model.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        for name, target in untied_state(model).items():
            whole = torch.empty(target.shape, dtype=target.dtype, device=device)
            if name in values:
                whole.copy_(values.pop(name))
            dist.broadcast(whole, src=0)
            if isinstance(target, DTensor):  # each rank cuts its own part out, nothing more is sent
                part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
                target.to_local().copy_(part.to_local())
            else:
                target.copy_(whole)


def autocasts(config: ParallelConfig, model: nn.Module) -> bool:
    """Whether the forward pass needs autocast: 16 bits are asked for, and sharding does not cast the weights."""
    return config.precision == "bf16" and not (isinstance(model, FSDPModule) and _CAN_KEEP_FLOAT32)


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Say whether the next backward pass sums gradients over ranks, or only adds to this rank's own."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def full(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole (a collective), any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_state(model: nn.Module, *, is_first: bool) -> dict[str, Tensor]:
    """Collect the model's tensors on the host of rank 0, one at a time; the other ranks take part and get nothing."""
    state: dict[str, Tensor] = {}
    for name, tensor in untied_state(model).items():
        whole = full(tensor.detach())
        if is_first:
            state[name] = whole.cpu().contiguous()
    return state


@contextmanager
def unsharded(model: nn.Module, config: ParallelConfig) -> Iterator[None]:
    """Hold all parameters whole inside, in the dtype they are computed in, so that any part can run on any rank alone.

    Takes the memory of the model in that dtype on every device.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            # the root's parameters are needed again at once in the backward pass, so they stay in any case
            unit.set_reshard_after_forward(config.reshard and unit is not model, recurse=False)


def _blocks(model: CobraVLM, *, vision: bool) -> Iterable[nn.Module]:
    yield from model.llm.backbone.layers
    if vision:
        for tower in model.vision.towers:
            yield from tower.model.blocks  # type: ignore[union-attr,misc]


def _without_memory(model: nn.Module) -> None:
    """Put every parameter on the meta device; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = made.setdefault(
                    id(parameter), nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                )
                module._parameters[name] = empty
