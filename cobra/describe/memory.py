"""Bytes that training keeps on each GPU and that decoding moves per token; letters as in `cobra.describe`."""

from __future__ import annotations

from dataclasses import dataclass

from cobra.config import LLMConfig, LoraConfig, PretrainConfig
from cobra.describe.meta import ImageTrace, Trace, count
from cobra.models.build import TRAINED_PARTS
from cobra.models.loss import CHUNK
from cobra.models.state import state_bytes
from cobra.models.vlm import CobraVLM
from cobra.models.weights import KEPT_IN_FLOAT32

# Memory bandwidth in bytes per second, as the makers state it.
BANDWIDTHS = {
    "A100 PCIe 80GB": 1.935e12,  # NVIDIA A100 80GB PCIe product brief: 1,935 GB/s
    "A100 SXM 80GB": 2.039e12,  # NVIDIA A100 data sheet: 2,039 GB/s
    "H100 SXM": 3.35e12,  # NVIDIA H100 data sheet: 3.35 TB/s
    "H200": 4.8e12,  # NVIDIA H200 data sheet: 4.8 TB/s
    "RTX 4090": 1.008e12,  # 384 bits x 21 Gbit/s of GDDR6X (NVIDIA Ada architecture whitepaper): 1,008 GB/s
    "RTX 3090": 0.936e12,  # 384 bits x 19.5 Gbit/s of GDDR6X (NVIDIA Ampere GA102 whitepaper): 936 GB/s
}

_SCAN_CHUNK = 32  # steps between the states that a scan keeps for its backward pass; kernels use this many or more
_VIT_VALUES = 16  # per token and width that a transformer block keeps, see `vision_activation_bytes`


# -- decoding ----------------------------------------------------------------------------------------------------------


def decoding_bytes(model: CobraVLM) -> int:
    """Read and written per generated token at batch 1: all weights in bf16, and the state both ways."""
    return 2 * count(model.llm) + 2 * state_bytes(model.config.llm)


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Estimated bytes per GPU in training."""

    weights: int  # trained parts, fp32, and frozen parts
    copies: int  # of weights in the compute dtype
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.copies + self.gradients + self.optimizer + self.activations


def training_memory(
    config: PretrainConfig, model: CobraVLM, image: ImageTrace, text_tokens: int, world_size: int, recompute: int | None
) -> Memory:
    """Estimate what one GPU holds in a training step, with `parallel` of the config but its `recompute`.

    What learns is fp32 with fp32 gradients and moments, what is frozen rests in the compute dtype. One process holds
    all of it, and autocast's copies of what learns. Several cut it over `world_size / replicate` of them and gather it
    again: all of it, or with `reshard` a Mamba block, the next one and the embedding, which is the head as well. Frozen
    encoders are cut only with `shard_frozen`, gradients only when they are summed after each micro-batch.

    Args:
        config: as the typed door returns it.
        model: on the meta device, frozen and adapted as the stage asks for.
        image: its trace of one image.
        text_tokens: of one row.
        world_size: GPUs that share a training step.
        recompute: as `parallel.recompute`.
    """
    parallel, value_bytes, shards = config.parallel, _value_bytes(config), world_size // config.parallel.replicate
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = {name: _frozen_bytes(model, name, value_bytes) for name, _ in model.named_children()}
    learns = any(parameter.requires_grad for parameter in model.vision.parameters())
    whole = 0 if parallel.shard_frozen or learns or world_size == 1 else frozen["vision"]
    if world_size == 1:
        copies = value_bytes * trained if value_bytes < 4 else 0
    elif parallel.reshard:
        copies = value_bytes * (2 * count(model.llm.backbone.layers[0]) + model.llm.backbone.embedding.weight.numel())
    else:
        copies = value_bytes * (count(model) - (count(model.vision) if whole else 0))
    waits = world_size > 1 and parallel.defer_gradient_sync and accumulated(config, image, text_tokens, world_size) > 1
    return Memory(
        weights=4 * _part(trained, shards) + _part(sum(frozen.values()) - whole, shards) + whole,
        copies=copies,
        gradients=4 * (trained if waits else _part(trained, shards)),
        optimizer=8 * _part(trained, shards),
        activations=_activation_bytes(config, image, text_tokens, world_size, recompute),
    )


def micro_batch(config: PretrainConfig, image: ImageTrace, text_tokens: int, world_size: int) -> int:
    """Return the images of a micro-batch on one GPU: as many as are asked for, or as the budget of tokens holds."""
    budget = config.train.per_device_batch_tokens
    if budget is not None:
        return max(1, budget // (image.tokens + config.data.rows_per_image * text_tokens))
    return min(config.train.per_device_batch_size, config.train.global_batch_size // world_size)


def accumulated(config: PretrainConfig, image: ImageTrace, text_tokens: int, world_size: int) -> int:
    """Return the micro-batches that each GPU runs in a step."""
    train = config.train
    if train.global_batch_tokens is not None and train.per_device_batch_tokens is not None:
        return -(-train.global_batch_tokens // (train.per_device_batch_tokens * world_size))
    return -(-train.global_batch_size // (micro_batch(config, image, text_tokens, world_size) * world_size))


def _part(number: int, shards: int) -> int:
    return -(-number // shards)


def _frozen_bytes(model: CobraVLM, part: str, value_bytes: int) -> int:
    """Bytes of a part's frozen parameters: in the compute dtype, but the scan's own in fp32."""
    return sum(
        parameter.numel() * (4 if name.endswith(KEPT_IN_FLOAT32) else value_bytes)
        for name, parameter in model.get_submodule(part).named_parameters()
        if not parameter.requires_grad
    )


def _value_bytes(config: PretrainConfig) -> int:
    return 2 if config.parallel.precision == "bf16" else 4


def _activation_bytes(
    config: PretrainConfig, image: ImageTrace, text_tokens: int, world_size: int, recompute: int | None
) -> int:
    """What a micro-batch keeps for the backward pass: all that trained parts read, and the loss."""
    llm, value_bytes = config.model.llm, _value_bytes(config)
    images = micro_batch(config, image, text_tokens, world_size)
    texts = images * config.data.rows_per_image * text_tokens
    encoders = value_bytes * image.projector.kept_values
    if "vision" in TRAINED_PARTS[config.train.stage]:
        is_kept = recompute is None
        encoders += sum(vision_activation_bytes(trace, value_bytes, is_kept=is_kept) for trace in image.vision)
    blocks = llm_activation_bytes(llm, images * image.tokens + texts, value_bytes, recompute, config.train.lora)
    return blocks + images * encoders + loss_bytes(llm, texts)


def block_activation_bytes(config: LLMConfig, value_bytes: int) -> int:
    """Bytes that one block keeps per token: 4 D + e (D + 5E + R + 2N) + 4 E N / 32.

    The fp32 sum that the norm reads; then normed input, x and z, convolved x, step size and output of the scan, the
    low-rank step size, B and C; and a state every 32 steps (kernels keep one that often or less).
    """
    inner, size = config.d_inner, config.d_state
    values = config.d_model + 5 * inner + config.rank + 2 * size
    return 4 * config.d_model + value_bytes * values + 4 * inner * size // _SCAN_CHUNK


def llm_activation_bytes(
    config: LLMConfig, tokens: int, value_bytes: int, recompute: int | None, lora: LoraConfig | None = None
) -> int:
    """Bytes that all blocks keep: a recomputed one keeps its two inputs, (e + 4) D, and one of them runs in full.

    An adapter keeps its low-rank numbers besides, e per rank; what it reads is kept in any case.
    """
    block = block_activation_bytes(config, value_bytes)
    if lora is not None:
        block += value_bytes * lora.rank * len({*lora.targets} - {"head"})
    recomputed = 0 if recompute is None else -(-config.num_layers // recompute)  # every k-th, from the first
    in_full = config.num_layers - recomputed + (recomputed > 0)
    return tokens * (recomputed * (value_bytes + 4) * config.d_model + in_full * block)


def vision_activation_bytes(trace: Trace, value_bytes: int, *, is_kept: bool) -> int:
    """Bytes that the blocks of a trained tower keep per image: 16 values per token and width.

    Two norms' inputs (2) and outputs (2), q, k, v (3), attention's output (1), both sides of the MLP's GELU, four
    times as wide (8); the attention matrix itself is not kept. A recomputed block keeps its input alone, and one of
    them runs in full.
    """
    values = _VIT_VALUES * trace.attended_values
    if not is_kept:
        values = trace.attended_values + values // max(1, trace.attended_layers)
    return value_bytes * values


def loss_bytes(config: LLMConfig, labels: int) -> int:
    """Bytes of the loss: logits of one chunk, their softmax and their gradient, fp32."""
    return 3 * 4 * min(labels, CHUNK) * config.padded_vocab_size
