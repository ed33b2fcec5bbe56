"""Bytes that training keeps on each GPU and that decoding moves per token; letters as in `cobra.describe`."""

from __future__ import annotations

from dataclasses import dataclass

from cobra.config import LLMConfig, PretrainConfig
from cobra.describe.meta import ImageTrace, Trace, count
from cobra.models.build import TRAINED_PARTS
from cobra.models.loss import CHUNK
from cobra.models.vlm import CobraVLM

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


def state_bytes(config: LLMConfig) -> int:
    """The state of one row in fp32, however long the prefix: layers x E x (N + K - 1) numbers."""
    return 4 * config.num_layers * config.d_inner * (config.d_state + config.d_conv - 1)


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
    config: PretrainConfig, model: CobraVLM, image: ImageTrace, text_tokens: int, world_size: int, *, recompute: bool
) -> Memory:
    """Estimate what one GPU holds in a training step; `recompute`: every Mamba block runs again in the backward pass.

    One process holds everything in fp32 and autocast's copies of what is trained. Several hold trained parts sharded
    and frozen ones whole in the compute dtype.
    """
    trained = sum(count(model.get_submodule(name)) for name in TRAINED_PARTS[config.train.stage])
    frozen = count(model) - trained
    value_bytes = _value_bytes(config)
    shard = -(-trained // world_size)
    if world_size > 1:  # gathered: this block and the next, and the embedding, which is the head as well
        blocks = model.llm.backbone.layers
        copies = value_bytes * (2 * count(blocks[0]) + model.llm.backbone.embedding.weight.numel())
    else:
        copies = value_bytes * trained if value_bytes < 4 else 0
    return Memory(
        weights=4 * shard + (value_bytes if world_size > 1 else 4) * frozen,
        copies=copies,
        gradients=4 * shard,
        optimizer=8 * shard,
        activations=_activation_bytes(config, image, text_tokens, micro_batch(config, world_size), recompute),
    )


def micro_batch(config: PretrainConfig, world_size: int) -> int:
    """Return the images of a micro-batch on one GPU."""
    return min(config.train.per_device_batch_size, config.train.global_batch_size // world_size)


def _value_bytes(config: PretrainConfig) -> int:
    return 2 if config.parallel.precision == "bf16" else 4


def _activation_bytes(config: PretrainConfig, image: ImageTrace, text_tokens: int, images: int, recompute: bool) -> int:
    """What a micro-batch keeps for the backward pass: all that trained parts read, and the loss."""
    llm, value_bytes = config.model.llm, _value_bytes(config)
    texts = images * config.data.rows_per_image * text_tokens
    encoders = value_bytes * image.projector.kept_values
    if "vision" in TRAINED_PARTS[config.train.stage]:
        encoders += sum(vision_activation_bytes(trace, value_bytes) for trace in image.vision)
    blocks = llm_activation_bytes(llm, images * image.tokens + texts, value_bytes, recompute=recompute)
    return blocks + images * encoders + loss_bytes(llm, texts)


def block_activation_bytes(config: LLMConfig, value_bytes: int) -> int:
    """Bytes that one block keeps per token: 4 D + e (D + 5E + R + 2N) + 4 E N / 32.

    The fp32 sum that the norm reads; then normed input, x and z, convolved x, step size and output of the scan, the
    low-rank step size, B and C; and a state every 32 steps (kernels keep one that often or less).
    """
    inner, size = config.d_inner, config.d_state
    values = config.d_model + 5 * inner + config.rank + 2 * size
    return 4 * config.d_model + value_bytes * values + 4 * inner * size // _SCAN_CHUNK


def llm_activation_bytes(config: LLMConfig, tokens: int, value_bytes: int, *, recompute: bool) -> int:
    """Bytes that all blocks keep; with recomputation each keeps its two inputs, (e + 4) D, and one runs in full."""
    block = block_activation_bytes(config, value_bytes)
    if recompute:
        return tokens * (config.num_layers * (value_bytes + 4) * config.d_model + block)
    return tokens * config.num_layers * block


def vision_activation_bytes(trace: Trace, value_bytes: int) -> int:
    """Bytes that the blocks of a trained tower keep per image: 16 values per token and width.

    Two norms' inputs (2) and outputs (2), q, k, v (3), attention's output (1), both sides of the MLP's GELU, four
    times as wide (8); the attention matrix itself is not kept.
    """
    return _VIT_VALUES * value_bytes * trace.attended_values


def loss_bytes(config: LLMConfig, labels: int) -> int:
    """Bytes of the loss: logits of one chunk, their softmax and their gradient, fp32."""
    return 3 * 4 * min(labels, CHUNK) * config.padded_vocab_size
