"""What a config costs, without weights and in seconds: parameters, tokens, FLOPs, memory, the limit of decoding.

    python -m cobra.describe +experiment=cobra-3b --world-size 8
    cobra.describe.describe(config).training_flops          # the same numbers for a notebook

Modules are built on the meta device, so sizes are those of the real modules; FLOPs and bytes follow from the formulas
in the docstrings. A product of an m x k with a k x n matrix counts 2 m n k FLOPs.

Letters: B rows, P image tokens, S text tokens, D model width, E inner width, N state size, K convolution width, R rank
of the step size, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cobra.config import LLMConfig, ModelConfig, PretrainConfig, as_config
from cobra.errors import ConfigError
from cobra.models.build import TRAINED_PARTS
from cobra.models.loss import CHUNK
from cobra.models.vlm import CobraVLM

TEXT_TOKENS = 256  # assumed of a training example, unless the caller says something else

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


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a model."""

    name: str
    parameters: int
    is_trained: bool


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one part for one training example."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward


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
        return _table(self)


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
    vision, projector, image_tokens = _trace(config.model, model)
    state_bytes = 4 * state_size(llm)
    decoding_bytes = 2 * _count(model.llm) + 2 * state_bytes
    rows = min(config.train.per_device_batch_size, config.train.global_batch_size // world_size)
    per_image = image_tokens + config.data.rows_per_image * text_tokens
    value_bytes = 2 if config.parallel.precision == "bf16" else 4
    others = projector.kept_values * value_bytes + (
        sum(vision_activation_bytes(trace, value_bytes) for trace in vision) if "vision" in trained else 0
    )

    def activations(*, recompute: bool) -> int:
        tokens = rows * per_image
        blocks = llm_activation_bytes(llm, tokens, value_bytes, recompute=recompute)
        return blocks + rows * others + loss_bytes(llm, rows * config.data.rows_per_image * text_tokens)

    return Description(
        name=config.model.name,
        stage=config.train.stage,
        precision=config.parallel.precision,
        world_size=world_size,
        text_tokens=text_tokens,
        rows=rows,
        rows_per_image=config.data.rows_per_image,
        parts=_parts(config.model, model, trained),
        image_tokens=image_tokens,
        state_bytes=state_bytes,
        state_formula=f"{llm.num_layers} layers x {llm.d_inner} x ({llm.d_state} + {llm.d_conv - 1}) x 4 bytes",
        training_flops=training_flops(llm, vision, projector, image_tokens, text_tokens, trained),
        decoding_flops=decoding_flops(llm),
        memory=_memory(config, model, world_size, activations(recompute=False)),
        memory_recomputed=_memory(config, model, world_size, activations(recompute=True)),
        decoding_bytes=decoding_bytes,
        decoding_limits={gpu: bandwidth / decoding_bytes for gpu, bandwidth in BANDWIDTHS.items()},
    )


def build_on_meta(config: ModelConfig) -> CobraVLM:
    """Build the model on the meta device: all shapes, no values. Weights that the config names are not looked at."""
    towers = [replace(tower, weights="random") for tower in config.vision.towers]
    llm = replace(config.llm, weights="random")
    with torch.device("meta"):
        model = CobraVLM(replace(config, vision=replace(config.vision, towers=towers), llm=llm))
    return model.to("meta")  # also what a module makes on the CPU on purpose, such as constants


# -- sizes and FLOPs of the language model -----------------------------------------------------------------------------


def state_size(config: LLMConfig) -> int:
    """Numbers in the state of one row: layers x E x (N + K - 1), however long the prefix."""
    return config.num_layers * config.d_inner * (config.d_state + config.d_conv - 1)


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


def head_flops(config: LLMConfig) -> int:
    """Output head for one token: 2 D V, padded vocabulary."""
    return 2 * config.d_model * config.padded_vocab_size


def decoding_flops(config: LLMConfig) -> int:
    """One generated token: all blocks and the head; it does not depend on what was read before."""
    return config.num_layers * (block_matmul_flops(config) + block_scan_flops(config)) + head_flops(config)


# -- FLOPs of vision and projector -------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Trace:
    """What one forward pass through a module computes and keeps.

    Attributes:
        matmul: FLOPs of linear layers and convolutions: 2 x weights x output positions.
        attention: FLOPs of q k^T and of its product with v: 4 n^2 d for n tokens of width d, in every layer.
        first: the part of `matmul` in the first layer, which needs no gradient for what it reads.
        kept_values: numbers that all leaf modules read: what a backward pass has to keep.
        attended_values: tokens x width, summed over the attention layers: over the blocks that are run.
    """

    matmul: int = 0
    attention: int = 0
    first: int = 0
    kept_values: int = 0
    attended_values: int = 0

    @property
    def forward(self) -> int:
        """FLOPs of the forward pass."""
        return self.matmul + self.attention

    def backward(self) -> int:
        """FLOPs of the backward pass of a trained module: twice the forward pass, less the first layer's input."""
        return 2 * self.forward - self.first


@contextmanager
def traced(module: nn.Module) -> Iterator[Trace]:
    """Fill a Trace with what runs through `module` inside the context, for one row."""
    trace = Trace()

    def leaf(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            trace.kept_values += inputs[0].numel()
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            positions = output.numel() // layer.weight.shape[0]
            flops = 2 * layer.weight.numel() * positions
            trace.first = trace.first or flops
            trace.matmul += flops

    def attention(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tokens, width = inputs[0].shape[-2:]
        trace.attention += 4 * tokens**2 * width
        trace.attended_values += tokens * width

    hooks: list[Any] = []
    for layer in module.modules():
        if not any(True for _ in layer.children()):
            hooks.append(layer.register_forward_hook(leaf))
        elif hasattr(layer, "num_heads") and hasattr(layer, "qkv"):
            hooks.append(layer.register_forward_hook(attention))
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def _trace(config: ModelConfig, model: CobraVLM) -> tuple[list[Trace], Trace, int]:
    """Run one image of shapes through towers and projector: a trace of each, and the image tokens that come out."""
    traces: list[Trace] = []
    with torch.no_grad():
        for tower, settings in zip(model.vision.towers, config.vision.towers, strict=True):
            image = torch.empty(1, 3, settings.image_size, settings.image_size, dtype=torch.uint8, device="meta")
            with traced(tower) as trace:
                tower(image)
            traces.append(trace)
        features = torch.empty(1, model.vision.num_patches, model.vision.width, device="meta")
        with traced(model.projector) as projector:
            tokens = model.projector(features)
    return traces, projector, int(tokens.shape[1])


def training_flops(
    llm: LLMConfig,
    vision: list[Trace],
    projector: Trace,
    image_tokens: int,
    text_tokens: int,
    trained: tuple[str, ...],
) -> dict[str, Flops]:
    """Forward and backward of one example (one image, one text), by part.

    A trained part's backward pass costs twice its forward pass (gradients of inputs and of weights); the projector's
    first layer needs no gradient of its inputs unless the vision towers learn. A frozen language model still carries
    gradients to the image tokens: once its forward pass. Frozen towers: nothing. The head is counted at every text
    token, though only the labelled ones reach it, which makes this an upper bound. What is computed again to save
    memory is not counted.
    """
    layers = llm.num_layers * (block_matmul_flops(llm) + block_scan_flops(llm))
    read = (image_tokens + text_tokens) * layers + text_tokens * head_flops(llm)
    learns = "vision" in trained
    return {
        "vision": Flops(
            forward=sum(trace.forward for trace in vision),
            backward=sum(trace.backward() for trace in vision) if learns else 0,
        ),
        "projector": Flops(
            forward=projector.forward, backward=2 * projector.forward if learns else projector.backward()
        ),
        "llm": Flops(forward=read, backward=(2 if "llm" in trained else 1) * read),
    }


# -- memory in training ------------------------------------------------------------------------------------------------


def block_activation_bytes(config: LLMConfig, value_bytes: int) -> int:
    """Bytes that one block keeps per token: 4 D + e (D + 5E + R + 2N) + 4 E N / 32, at e bytes per value.

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


def _memory(config: PretrainConfig, model: CobraVLM, world_size: int, activations: int) -> Memory:
    """One process: everything fp32, autocast copies. Several: trained parts sharded, frozen ones whole in bf16."""
    trained_parts = TRAINED_PARTS[config.train.stage]
    parts = dict(model.named_children())
    trained = sum(_count(part) for name, part in parts.items() if name in trained_parts)
    frozen = sum(_count(part) for part in parts.values()) - trained
    value_bytes = 2 if config.parallel.precision == "bf16" else 4
    shard = -(-trained // world_size)
    if world_size > 1:  # gathered: this block and the next, and the embedding, which is the head as well
        blocks = model.llm.backbone.layers
        copies = value_bytes * (2 * _count(blocks[0]) + model.llm.backbone.embedding.weight.numel())
    else:
        copies = value_bytes * trained if value_bytes < 4 else 0
    return Memory(
        weights=4 * shard + (value_bytes if world_size > 1 else 4) * frozen,
        copies=copies,
        gradients=4 * shard,
        optimizer=8 * shard,
        activations=activations,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _parts(config: ModelConfig, model: CobraVLM, trained: tuple[str, ...]) -> list[Part]:
    towers = [
        Part(name=f"vision: {settings.timm}", parameters=_count(tower), is_trained="vision" in trained)
        for tower, settings in zip(model.vision.towers, config.vision.towers, strict=True)
    ]
    rest = [
        Part(name=f"{name}: {what}", parameters=_count(module), is_trained=name in trained)
        for name, module, what in (
            ("projector", model.projector, config.projector.kind),
            ("llm", model.llm, f"Mamba, {config.llm.num_layers} layers of width {config.llm.d_model}"),
        )
    ]
    return towers + rest


# -- the command -------------------------------------------------------------------------------------------------------


def _rows(title: str, rows: list[tuple[str, ...]]) -> list[str]:
    """A block of the table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    widths[0] = max(widths[0], 44)
    lines = [
        "  "
        + "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [title, *(line.rstrip() for line in lines), ""]


def _short(number: float) -> str:
    """Three digits and a decimal prefix: 3,548,000,000 -> "3.55 G"."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.{max(0, 2 - math.floor(math.log10(number / size)))}f} {prefix}"
    return f"{number:.0f} "


def _table(found: Description) -> str:
    parts = [(part.name, _short(part.parameters), "trained" if part.is_trained else "frozen") for part in found.parts]
    total = _short(found.parameters)
    parts.append(("total", total, f"{_short(found.trained_parameters)} trained"))
    flops = [
        (name, *map(_short, (part.forward, part.backward, part.total))) for name, part in found.training_flops.items()
    ]
    sums = [sum(getattr(part, key) for part in found.training_flops.values()) for key in ("forward", "backward")]
    both = found.memory, found.memory_recomputed
    memory = [
        (label, *(f"{_short(getattr(memory, key))}B" for memory in both))
        for label, key in (
            ("weights", "weights"),
            (f"copies of weights ({found.precision})", "copies"),
            ("gradients", "gradients"),
            ("AdamW's two moments", "optimizer"),
            ("activations", "activations"),
            ("total", "total"),
        )
    ]
    sharing = (
        f"trained parts sharded over {found.world_size} GPUs (fp32, moments and gradients too), frozen parts whole in "
        f"{found.precision}"
        if found.world_size > 1
        else "parameters, moments and gradients in fp32"
    )
    batch = f"{found.rows} images" + (f" with {found.rows_per_image} texts each" if found.rows_per_image > 1 else "")
    lines = [
        f"{found.name}, stage {found.stage}",
        "",
        *_rows("Parameters", parts),
        *_rows(
            "Sequence",
            [
                ("image tokens", f"{found.image_tokens:,}"),
                ("text tokens of an example (assumed)", f"{found.text_tokens:,}"),
                ("Mamba state of a row, fp32", f"{_short(found.state_bytes)}B = {found.state_formula}"),
            ],
        ),
        *_rows(
            "FLOPs of one training example (one image, one text; head at every text token)",
            [
                ("", "forward", "backward", "both"),
                *flops,
                ("total", *map(_short, [*sums, sum(sums)])),
            ],
        ),
        *_rows("FLOPs of one generated token", [("llm", _short(found.decoding_flops))]),
        *_rows(
            f"Training memory per GPU, {found.world_size} GPU{'s' if found.world_size > 1 else ''} (estimate)",
            [("", "all kept", "blocks recomputed"), *memory],
        ),
        f"  Assumes {sharing};",
        f"  a micro-batch of {batch}, {found.text_tokens} text tokens each; computes in {found.precision}.",
        "  Left out: what passes through frozen towers, the allocator's gaps, the CUDA context.",
        "",
        *_rows(
            f"Limit of decoding, batch 1, bf16: {_short(found.decoding_bytes)}B per token (weights; state, both ways)",
            [(gpu, f"{limit:,.0f} tokens/s") for gpu, limit in found.decoding_limits.items()],
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the command line, compose the config as `scripts/pretrain.py` does, and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m cobra.describe",
        usage="%(prog)s [--world-size N] [--text-tokens N] [+experiment=NAME] [group=choice] [key=value]",
        description="What a config of scripts/pretrain.py costs, without weights: parameters, FLOPs, memory, limits.",
        epilog="Groups and settings are those of `python scripts/pretrain.py --help`; a finished run is described by "
        "--rerun runs/NAME/config.yaml.",
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="GPUs that share a step (default: 1)")
    parser.add_argument(
        "--text-tokens",
        type=int,
        metavar="N",
        help=f"of a training example (default: {TEXT_TOKENS}, at most max_length)",
    )
    options, sys.argv[1:] = parser.parse_known_args()
    scripts = Path(__file__).resolve().parents[1] / "scripts"

    def show(cfg: Any) -> None:
        config = as_config(PretrainConfig, cfg)
        found = describe(config, world_size=options.world_size, text_tokens=options.text_tokens)
        sys.stdout.write(f"{found}\n")

    if not (scripts / "_launch.py").is_file():
        parser.error(f"the configs come with a clone of the repository, and there is none around {scripts.parent}")
    # The library itself never composes configs: this command borrows the scripts' way to do it, errors included.
    sys.path.insert(0, str(scripts))
    import_module("_launch").launch("pretrain", show)


if __name__ == "__main__":
    main()
