"""Stages, batches, devices: the schemas of training."""

from __future__ import annotations

from dataclasses import dataclass, field

from cobra.config.checks import not_negative, one_of, positive
from cobra.errors import ConfigError

STAGES = ("align", "finetune", "full-finetune")
LORA_TARGETS = ("in_proj", "x_proj", "dt_proj", "out_proj", "head")


@dataclass(frozen=True, kw_only=True)
class DataSetConfig:
    """One LLaVA-format annotation file with its image folder, as a part of a mixture.

    Its share is given by `epochs` or by `weight`; with neither, all its rows are seen once per epoch of the mixture.
    """

    annotations: str  # LLaVA-format .json or .jsonl
    images: str  # folder that the rows' image paths start from
    epochs: float | None = None  # times that its rows are seen in one epoch of the mixture; 0.5: every second row
    weight: float | None = None  # share of the mixture's rows, relative to the other weights

    def __post_init__(self) -> None:
        for key in ("epochs", "weight"):
            if getattr(self, key) is not None:
                positive(f"data.mix: {key}", getattr(self, key))
        if self.epochs is not None and self.weight is not None:
            raise ConfigError("data.mix: a data set has `epochs` or `weight`, not both.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data: one data set (`annotations` and `images`), or a mixture of several (`mix`)."""

    name: str  # of the data set, in reports
    annotations: str | None = None  # LLaVA-format .json or .jsonl
    images: str | None = None  # folder that the rows' image paths start from
    mix: dict[str, DataSetConfig] = field(default_factory=dict[str, DataSetConfig])  # several data sets, by name
    index: str = "data/index"  # folder for the memory-mapped indexes that are made of annotation files
    source: str | None = None  # "easyvqa" (a PyPI package) | "toy" (rendered): made when the annotations are not there
    rows_per_image: int = 1  # rows of the same image that share one reading of it in a step
    check: str = "exists"  # before training, every image: "exists" | "decode"
    on_bad_example: str = "error"  # a bad row or image: "error" ends the run | "skip" leaves it out and counts it

    def __post_init__(self) -> None:
        one_of("data.check", self.check, ("exists", "decode"))
        one_of("data.on_bad_example", self.on_bad_example, ("error", "skip"))
        if self.source is not None:
            one_of("data.source", self.source, ("easyvqa", "toy"))
        positive("data.rows_per_image", self.rows_per_image)
        if bool(self.mix) == (self.annotations is not None):
            raise ConfigError("data: give either `annotations` with `images`, or several data sets in `mix`.")
        if self.annotations is not None and self.images is None:
            raise ConfigError("data.images is not set; give it the folder that the rows' image paths start from.")
        if len({part.weight is None for part in self.mix.values()}) > 1:
            raise ConfigError("data.mix: either all data sets have a `weight`, or none has.")

    @property
    def sets(self) -> dict[str, DataSetConfig]:
        """The data sets by name, also when there is only one."""
        if self.annotations is None or self.images is None:
            return self.mix
        return {self.name: DataSetConfig(annotations=self.annotations, images=self.images)}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the language model's projections (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = 16  # of the adapters
    alpha: float = 32.0  # the adapters' output is scaled by alpha / rank
    dropout: float = 0.0  # of the adapters' input
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))  # projections that are adapted

    def __post_init__(self) -> None:
        positive("train.lora.rank", self.rank)
        positive("train.lora.alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"train.lora.dropout={self.dropout} must be in [0, 1).")
        if not self.targets:
            raise ConfigError(f"train.lora.targets is empty; choose some of {', '.join(LORA_TARGETS)}.")
        for target in self.targets:
            one_of("train.lora.targets", target, LORA_TARGETS)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training stage. Batch sizes count images (each with up to `data.rows_per_image` rows) or text-only rows."""

    stage: str  # what learns: "align": projector | "finetune": projector and llm | "full-finetune": everything
    global_batch_size: int  # images (or rows of text alone) of one step, over all devices
    per_device_batch_size: int  # of a micro-batch; a step accumulates global / per-device of them
    learning_rate: float  # the highest one, after the warmup; then it falls along a cosine
    epochs: float | None = None  # times that the data is seen
    max_steps: int | None = None  # steps; wins over epochs
    weight_decay: float = 0.0  # of AdamW; none on biases, norms, `A_log` and `D`
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # of AdamW
    warmup_ratio: float = 0.03  # part of the steps in which the learning rate rises
    max_grad_norm: float = 1.0  # a longer gradient is shortened to it
    global_batch_tokens: int | None = None  # a budget of image and text tokens; wins over global_batch_size
    per_device_batch_tokens: int | None = None  # of a micro-batch, padding included
    group_by_length: bool = True  # batches of rows of similar length: less padding
    log_every: int = 10  # steps between two lines of metrics
    save_every: int = 500  # steps between two checkpoints
    keep_checkpoints: int = 2  # how many of the newest stay
    keep_every: int | None = None  # steps; checkpoints at multiples of it stay for good
    max_minutes: float | None = None  # save and leave with code 75 after so long; the same command goes on
    max_skipped_steps: int = 10  # steps in a row whose loss or gradient is not finite, before the run stops
    num_workers: int = 0  # processes that load images, per device
    profile: int | None = None  # steps to profile after the first three
    lora: LoraConfig | None = None  # adapters instead of the whole language model; `train=lora` fills it

    def __post_init__(self) -> None:
        one_of("train.stage", self.stage, STAGES)
        for key in ("global_batch_size", "per_device_batch_size", "learning_rate", "max_grad_norm", "log_every"):
            positive(f"train.{key}", getattr(self, key))
        for key in ("save_every", "keep_checkpoints", "max_skipped_steps"):
            positive(f"train.{key}", getattr(self, key))
        not_negative("train.weight_decay", self.weight_decay)
        not_negative("train.num_workers", self.num_workers)
        if self.epochs is None and self.max_steps is None:
            raise ConfigError("train.epochs and train.max_steps are both null; set one of them.")
        tokens = ("global_batch_tokens", "per_device_batch_tokens")
        for key in ("epochs", "max_steps", "keep_every", "max_minutes", "profile", *tokens):
            if getattr(self, key) is not None:
                positive(f"train.{key}", getattr(self, key))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train.betas={list(self.betas)} must be two numbers in [0, 1), such as [0.9, 0.999].")
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"train.warmup_ratio={self.warmup_ratio} must be in [0, 1).")
        if (self.global_batch_tokens is None) != (self.per_device_batch_tokens is None):
            raise ConfigError("train.global_batch_tokens and train.per_device_batch_tokens are set together.")
        if self.lora is not None and self.stage != "finetune":
            raise ConfigError(
                f"train.lora works in train.stage=finetune, not in {self.stage}: it adapts the frozen llm."
            )
        size, part = self.global_batch_size, self.per_device_batch_size
        if size % part:
            lower, upper = size // part * part, (size // part + 1) * part
            usable = f"{lower} or {upper}" if lower else str(upper)
            raise ConfigError(
                f"train.global_batch_size={size} is not divisible by train.per_device_batch_size={part}; use {usable}."
            )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Where and in which precision the run computes."""

    device: str = "auto"  # "cpu" | "cuda" | "auto": a GPU where there is one
    precision: str = "fp32"  # of the computation, "fp32" | "bf16"; what learns and the optimizer stay fp32
    ops: str = "auto"  # kernels: "auto" | "cpu" | "triton" | "mamba_ssm" | "reference", see `python -m cobra.ops`
    processes: int | None = 1  # started on this machine; null: one per GPU. Ignored below torchrun and SLURM
    replicate: int = 1  # copies of the sharded model (HSDP); usually the number of nodes
    reshard: bool = False  # give gathered blocks up after the forward pass: less memory, one more gathering
    shard_frozen: bool = True  # shard the frozen encoders too; false: every device holds them whole
    recompute: int | None = None  # Mamba and ViT blocks computed again in the backward pass: 1 all, k every k-th
    compile: bool = False  # `torch.compile` each block
    defer_gradient_sync: bool = True  # sum gradients over ranks once a step; false: each micro-batch, less memory
    peak_tflops: float | None = None  # of one device in `precision`, for MFU; null: known for common GPUs
    timeout_minutes: float = 10.0  # ranks that wait longer for another one stop

    def __post_init__(self) -> None:
        one_of("parallel.precision", self.precision, ("fp32", "bf16"))
        for key in ("processes", "replicate", "recompute", "peak_tflops", "timeout_minutes"):
            if getattr(self, key) is not None:
                positive(f"parallel.{key}", getattr(self, key))
