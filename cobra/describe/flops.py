"""FLOPs of a training example and of a generated token; letters as in `cobra.describe`."""

from __future__ import annotations

from dataclasses import dataclass

from cobra.config import LLMConfig, LoraConfig
from cobra.describe.meta import ImageTrace


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one part for one training example."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


def block_matmul_flops(config: LLMConfig) -> int:
    """Matrix products of one block for one token: 2 (D 2E + E (R + 2N) + R E + E D)."""
    width, inner, rank = config.d_model, config.d_inner, config.rank
    return 2 * (2 * width * inner + inner * (rank + 2 * config.d_state) + rank * inner + inner * width)


def block_scan_flops(config: LLMConfig) -> int:
    """Convolution and scan of one block for one token: 2 E K + 7 E N.

    Per channel and state: dt A, its exponential, (dt x) B, a multiply-add of the state, a multiply-add of C. What is
    done once per channel (SiLU, softplus, gate, skip, norm) is left out: under 1 % of a block.
    """
    return config.d_inner * (2 * config.d_conv + 7 * config.d_state)


def blocks_flops(config: LLMConfig) -> int:
    """All blocks for one token."""
    return config.num_layers * (block_matmul_flops(config) + block_scan_flops(config))


def head_flops(config: LLMConfig) -> int:
    """Output head for one token: 2 D V, padded vocabulary."""
    return 2 * config.d_model * config.padded_vocab_size


def decoding_flops(config: LLMConfig) -> int:
    """One generated token: all blocks and the head; it does not depend on what was read before."""
    return blocks_flops(config) + head_flops(config)


def block_adapter_flops(config: LLMConfig, lora: LoraConfig) -> int:
    """Adapters of one block for one token: 2 r (in + out) for each projection that is adapted."""
    width, inner, rank = config.d_model, config.d_inner, config.rank
    sides = {
        "in_proj": width + 2 * inner,
        "x_proj": inner + rank + 2 * config.d_state,
        "dt_proj": rank + inner,
        "out_proj": inner + width,
    }
    return 2 * lora.rank * sum(size for name, size in sides.items() if name in lora.targets)


def head_adapter_flops(config: LLMConfig, lora: LoraConfig) -> int:
    """The head's adapter for one token: 2 r (D + V); what it adds to the embedding is left out."""
    return 2 * lora.rank * (config.d_model + config.padded_vocab_size) if "head" in lora.targets else 0


def training_flops(
    llm: LLMConfig, image: ImageTrace, text_tokens: int, trained: tuple[str, ...], lora: LoraConfig | None = None
) -> dict[str, Flops]:
    """Forward and backward of one example (one image, one text), by part.

    A trained part's backward pass costs twice its forward pass (gradients of inputs and of weights); the projector's
    first layer needs no gradient of its inputs unless the vision towers learn. A frozen language model still carries
    gradients to the image tokens: once its forward pass. Frozen towers: nothing. The head is counted at every text
    token, though only the labelled ones reach it, which makes this an upper bound. What is computed again to save
    memory is not counted.
    """
    read = (image.tokens + text_tokens) * blocks_flops(llm) + text_tokens * head_flops(llm)
    learns = "vision" in trained
    projector = image.projector
    llm_learns = "llm" in trained and lora is None
    found = {
        "vision": Flops(
            forward=sum(trace.forward for trace in image.vision),
            backward=sum(trace.backward for trace in image.vision) if learns else 0,
        ),
        "projector": Flops(forward=projector.forward, backward=2 * projector.forward if learns else projector.backward),
        "llm": Flops(forward=read, backward=(2 if llm_learns else 1) * read),
    }
    if lora is not None:
        added = (image.tokens + text_tokens) * llm.num_layers * block_adapter_flops(llm, lora)
        added += text_tokens * head_adapter_flops(llm, lora)
        found["adapters"] = Flops(forward=added, backward=2 * added)
    return found
