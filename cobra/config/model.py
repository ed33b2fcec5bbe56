"""What is saved beside the weights: the schemas of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from cobra.config.checks import one_of, positive
from cobra.errors import ConfigError

RESIZE_STRATEGIES = ("resize-naive", "resize-crop", "letterbox")
PROJECTOR_KINDS = ("linear", "gelu-mlp", "fused-gelu-mlp", "ldpv2", "fused-ldpv2")
PROMPT_FORMATS = ("zephyr", "mamba")
QUESTION_SLOT = "{question}"  # of a prompt format that is a template


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """One vision transformer of timm."""

    timm: str  # architecture, and tag of its weights, for `timm.create_model`
    image_size: int  # pixels of a side
    layer: int = -2  # block whose output is taken, Python indexing; -2: the second-to-last
    ignore_rest: bool = False  # the patch size need not divide image_size: what is left over at two sides goes unseen
    args: dict[str, Any] = field(default_factory=dict[str, Any])  # further arguments of `timm.create_model`
    weights: str = "timm"  # "timm": its published weights | "random" | a weight file, folder or Hub id

    def __post_init__(self) -> None:
        positive("model.vision.towers: image_size", self.image_size)
        taken = sorted({"pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"} & self.args.keys())
        if taken:
            raise ConfigError(
                f"model.vision.towers: args may not hold {', '.join(taken)}; weights come from `weights`."
            )
        fixed = sorted(
            {"img_size", "num_classes", "in_chans", "dynamic_img_size", "dynamic_img_pad"} & self.args.keys()
        )
        if fixed:
            raise ConfigError(
                f"model.vision.towers: args may not hold {', '.join(fixed)}; the size comes from `image_size`, and "
                "every image has it."
            )
        if ":" in self.timm:
            raise ConfigError(f"model.vision.towers: timm={self.timm!r} must be the name of an architecture in timm.")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision encoder: one or several towers over the same image, features joined on the channel axis."""

    towers: list[TowerConfig]  # over the same image; their features are joined
    resize: str = "resize-naive"  # to a square: "resize-naive" squeezes | "resize-crop" cuts | "letterbox" pads

    def __post_init__(self) -> None:
        one_of("model.vision.resize", self.resize, RESIZE_STRATEGIES)
        if not self.towers:
            raise ConfigError("model.vision.towers is empty; name at least one tower.")


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The map from vision features to image tokens."""

    kind: str  # "linear" | "gelu-mlp" | "fused-gelu-mlp" | "ldpv2" | "fused-ldpv2"
    expansion: int = 4  # hidden width of the fused kinds, in multiples of the vision width
    grid: int | None = None  # side of the square of image tokens that the ldpv2 kinds make; null: half the patches'

    def __post_init__(self) -> None:
        one_of("model.projector.kind", self.kind, PROJECTOR_KINDS)
        positive("model.projector.expansion", self.expansion)
        if self.grid is not None:
            positive("model.projector.grid", self.grid)


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """A Mamba-1 language model with its tokenizer and prompt format."""

    d_model: int  # width of the residual stream
    num_layers: int  # Mamba blocks
    vocab_size: int  # tokens that the weights know; rows of the embedding are rounded up
    tokenizer: str  # tokenizer.json, or a folder or Hub id with one; "cobra:..." is a file of this package
    prompt: str  # "zephyr" (chat) | "mamba" (base) | a template of one's own, such as "Q: {question}\nA: "
    d_state: int = 16  # state of each channel
    d_conv: int = 4  # width of the causal convolution
    expand: int = 2  # width inside a block, in multiples of d_model
    dt_rank: int | None = None  # rank of the step-size projection; null: d_model / 16, rounded up
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    pad_vocab_multiple: int = 8  # rows of the embedding are a multiple of it
    weights: str = "random"  # "random" | a weight file, folder or Hub id, of any layout
    init: str = "mamba"  # fresh weights: "mamba" (its authors') | "small" (small models trained from scratch)

    def __post_init__(self) -> None:
        if self.prompt.count(QUESTION_SLOT) > 1:
            raise ConfigError(f"model.llm.prompt={self.prompt!r} must hold {QUESTION_SLOT} once.")
        if QUESTION_SLOT not in self.prompt:
            one_of("model.llm.prompt", self.prompt, PROMPT_FORMATS)
        one_of("model.llm.init", self.init, ("mamba", "small"))
        for key in ("d_model", "num_layers", "vocab_size", "d_state", "d_conv", "expand", "pad_vocab_multiple"):
            positive(f"model.llm.{key}", getattr(self, key))
        positive("model.llm.norm_eps", self.norm_eps)
        if self.dt_rank is not None:
            positive("model.llm.dt_rank", self.dt_rank)

    @property
    def d_inner(self) -> int:
        """Width inside the mixer."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """Rank of the step-size projection."""
        return self.dt_rank if self.dt_rank is not None else math.ceil(self.d_model / 16)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of `pad_vocab_multiple`."""
        return math.ceil(self.vocab_size / self.pad_vocab_multiple) * self.pad_vocab_multiple


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All that is needed to build the model again: saved beside the weights as plain data."""

    name: str  # of the model
    vision: VisionConfig
    projector: ProjectorConfig
    llm: LLMConfig
    max_length: int = 2048  # text tokens of one training example

    def __post_init__(self) -> None:
        positive("model.max_length", self.max_length)
