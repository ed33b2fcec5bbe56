"""What a config costs, without weights and in seconds: parameters, tokens, FLOPs, memory, the limit of decoding.

    python -m cobra.describe +experiment=cobra-3b --world-size 8
    cobra.describe.describe(config).training_flops          # the same numbers for a notebook

Modules are built on the meta device, so sizes are those of the real modules; FLOPs and bytes follow from the formulas
in the docstrings. A product of an m x k with a k x n matrix counts 2 m n k FLOPs.

Letters: D model width, E inner width, N state size, K convolution width, R rank of the step size, V vocabulary, e bytes
per value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cobra.config import ParallelConfig, PretrainConfig
from cobra.describe.flops import Flops, decoding_flops, training_flops
from cobra.describe.memory import BANDWIDTHS, Memory, decoding_bytes, micro_batch, training_memory
from cobra.describe.meta import build_on_meta, count, trace_image
from cobra.describe.table import table
from cobra.errors import ConfigError
from cobra.models.build import TRAINED_PARTS, set_trainable
from cobra.models.lora import adapters, attach_adapters
from cobra.models.state import state_bytes
from cobra.models.vlm import CobraVLM

__all__ = ["TEXT_TOKENS", "Description", "Flops", "Memory", "Part", "build_on_meta", "describe"]

TEXT_TOKENS = 256  # assumed of a training example, unless the caller says something else


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a model."""

    name: str
    parameters: int
    is_trained: bool


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a config costs; `str()` of it is the table that the command prints."""

    name: str
    stage: str
    parallel: ParallelConfig  # which the estimates of memory are for
    world_size: int
    text_tokens: int  # assumed
    rows: int  # images of a micro-batch on one GPU
    rows_per_image: int
    parts: list[Part]
    image_tokens: int
    state_bytes: int  # fp32, of one row
    state_formula: str
    training_flops: dict[str, Flops]  # by part: vision, projector, llm, adapters where there are some
    decoding_flops: int  # per generated token
    memories: dict[int | None, Memory]  # by parallel.recompute: the config's own, none and all
    decoding_bytes: int  # read and written per generated token at batch 1
    decoding_limits: dict[str, float]  # GPU -> tokens per second

    @property
    def parameters(self) -> int:
        """Of all parts; tied weights once."""
        return sum(part.parameters for part in self.parts)

    @property
    def trained_parameters(self) -> int:
        """Of the parts that the stage trains."""
        return sum(part.parameters for part in self.parts if part.is_trained)

    @property
    def memory(self) -> Memory:
        """As the config has it."""
        return self.memories[self.parallel.recompute]

    def __str__(self) -> str:
        return table(self)


def describe(config: PretrainConfig, *, world_size: int = 1, text_tokens: int | None = None) -> Description:
    """Count everything that a config decides. No weights are read, nothing is downloaded, no GPU is needed.

    Args:
        config: as the typed door returns it.
        world_size: GPUs that share a training step.
        text_tokens: of one training example; None: 256, or `model.max_length` where that is less.

    Raises:
        ConfigError: an impossible number of GPUs or tokens, or a model that cannot be built.
    """
    _check_world_size(config, world_size)
    longest = config.model.max_length
    text_tokens = min(TEXT_TOKENS, longest) if text_tokens is None else text_tokens
    if not 1 <= text_tokens <= longest:
        raise ConfigError(f"text_tokens={text_tokens} must be from 1 to model.max_length={longest}.")
    llm, train = config.model.llm, config.train
    model = build_on_meta(config.model)
    image, per_token = trace_image(model), decoding_bytes(model)
    set_trainable(model, train.stage)
    if train.lora is not None:
        attach_adapters(model, train.lora, torch.Generator())
    return Description(
        name=config.model.name,
        stage=train.stage,
        parallel=config.parallel,
        world_size=world_size,
        text_tokens=text_tokens,
        rows=micro_batch(config, image, text_tokens, world_size),
        rows_per_image=config.data.rows_per_image,
        parts=_parts(config, model),
        image_tokens=image.tokens,
        state_bytes=state_bytes(llm),
        state_formula=f"{llm.num_layers} layers x {llm.d_inner} x ({llm.d_state} + {llm.d_conv - 1}) x 4 bytes",
        training_flops=training_flops(llm, image, text_tokens, TRAINED_PARTS[train.stage], train.lora),
        decoding_flops=decoding_flops(llm),
        memories={
            recompute: training_memory(config, model, image, text_tokens, world_size, recompute)
            for recompute in dict.fromkeys([config.parallel.recompute, None, 1])
        },
        decoding_bytes=per_token,
        decoding_limits={gpu: bandwidth / per_token for gpu, bandwidth in BANDWIDTHS.items()},
    )


def _check_world_size(config: PretrainConfig, world_size: int) -> None:
    size, replicate = config.train.global_batch_size, config.parallel.replicate
    if world_size < 1 or (size % world_size and config.train.global_batch_tokens is None):
        raise ConfigError(
            f"world_size={world_size} must be at least 1 and divide train.global_batch_size={size}; choose a divisor "
            "of it."
        )
    if world_size % replicate:
        raise ConfigError(
            f"parallel.replicate={replicate} does not divide world_size={world_size}; use a divisor, usually the "
            "number of nodes."
        )


def _parts(config: PretrainConfig, model: CobraVLM) -> list[Part]:
    llm, lora = config.model.llm, config.train.lora
    towers = zip(config.model.vision.towers, model.vision.towers, strict=True)
    adapted = sum(count(adapter) for adapter in adapters(model).values())
    sizes = [
        *((f"vision: {tower.timm}", count(module)) for tower, module in towers),
        (f"projector: {config.model.projector.kind}", count(model.projector)),
        (f"llm: Mamba, {llm.num_layers} layers of width {llm.d_model}", count(model.llm) - adapted),
    ]
    trained = {*TRAINED_PARTS[config.train.stage]} - ({"llm"} if lora is not None else set())
    parts = [Part(name=name, parameters=size, is_trained=name.split(":")[0] in trained) for name, size in sizes]
    if lora is not None:
        parts.append(Part(name=f"adapters of rank {lora.rank}", parameters=adapted, is_trained=True))
    return parts
