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

from cobra.config import ModelConfig, PretrainConfig
from cobra.describe.flops import Flops, decoding_flops, training_flops
from cobra.describe.memory import BANDWIDTHS, Memory, decoding_bytes, micro_batch, state_bytes, training_memory
from cobra.describe.meta import build_on_meta, count, trace_image
from cobra.describe.table import table
from cobra.errors import ConfigError
from cobra.models.build import TRAINED_PARTS
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
    precision: str
    world_size: int
    text_tokens: int  # assumed
    rows: int  # images of a micro-batch on one GPU
    rows_per_image: int
    parts: list[Part]
    image_tokens: int
    state_bytes: int  # fp32, of one row
    state_formula: str
    training_flops: dict[str, Flops]  # by part: vision, projector, llm
    decoding_flops: int  # per generated token
    memory: Memory  # all activations kept
    memory_recomputed: Memory  # every Mamba block computed again in the backward pass
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
    if world_size < 1 or config.train.global_batch_size % world_size:
        raise ConfigError(
            f"world_size={world_size} must be at least 1 and divide train.global_batch_size="
            f"{config.train.global_batch_size}; choose a divisor of it."
        )
    longest = config.model.max_length
    text_tokens = min(TEXT_TOKENS, longest) if text_tokens is None else text_tokens
    if not 1 <= text_tokens <= longest:
        raise ConfigError(f"text_tokens={text_tokens} must be from 1 to model.max_length={longest}.")
    llm, trained = config.model.llm, TRAINED_PARTS[config.train.stage]
    model = build_on_meta(config.model)
    image = trace_image(model)
    memory, memory_recomputed = (
        training_memory(config, model, image, text_tokens, world_size, recompute=recompute)
        for recompute in (False, True)
    )
    per_token = decoding_bytes(model)
    return Description(
        name=config.model.name,
        stage=config.train.stage,
        precision=config.parallel.precision,
        world_size=world_size,
        text_tokens=text_tokens,
        rows=micro_batch(config, world_size),
        rows_per_image=config.data.rows_per_image,
        parts=_parts(config.model, model, trained),
        image_tokens=image.tokens,
        state_bytes=state_bytes(llm),
        state_formula=f"{llm.num_layers} layers x {llm.d_inner} x ({llm.d_state} + {llm.d_conv - 1}) x 4 bytes",
        training_flops=training_flops(llm, image, text_tokens, trained),
        decoding_flops=decoding_flops(llm),
        memory=memory,
        memory_recomputed=memory_recomputed,
        decoding_bytes=per_token,
        decoding_limits={gpu: bandwidth / per_token for gpu, bandwidth in BANDWIDTHS.items()},
    )


def _parts(config: ModelConfig, model: CobraVLM, trained: tuple[str, ...]) -> list[Part]:
    towers = zip(config.vision.towers, model.vision.towers, strict=True)
    modules = [
        *((f"vision: {tower.timm}", module) for tower, module in towers),
        (f"projector: {config.projector.kind}", model.projector),
        (f"llm: Mamba, {config.llm.num_layers} layers of width {config.llm.d_model}", model.llm),
    ]
    return [
        Part(name=name, parameters=count(module), is_trained=name.split(":")[0] in trained) for name, module in modules
    ]
