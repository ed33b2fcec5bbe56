"""All settings of a script, one schema each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cobra.config.checks import not_negative, one_of, positive
from cobra.config.load import LoadConfig
from cobra.config.model import ModelConfig
from cobra.config.train import DataConfig, ParallelConfig, TrainConfig
from cobra.errors import ConfigError

SUBSETS = {"smoke": 50, "lite": 500, "medium": 2500}  # of a benchmark: whole images with so many questions of each part


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases."""

    project: str = "cobra"
    entity: str | None = None
    mode: str = "auto"

    def __post_init__(self) -> None:
        one_of("tracker.wandb.mode", self.mode, ("auto", "online", "offline"))


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: WandbConfig | None = None


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """Folders."""

    data: str = "data"
    runs: str = "runs"
    results: str = "results"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Name and seed of a run."""

    name: str
    seed: int = 0

    def __post_init__(self) -> None:
        if "\\" in self.name or {"", ".", "..", "model", "checkpoints"} & set(self.name.split("/")):
            raise ConfigError(f"run.name={self.name!r} must be a folder name below paths.runs, such as 'tiny'.")
        not_negative("run.seed", self.seed)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """A benchmark that is asked during training."""

    every: int | None = None  # steps; null: never
    limit: int | None = 256  # questions, always the same ones; null: all
    batch_size: int = 64  # questions asked at once, per device
    benchmark: dict[str, Any] = field(default_factory=dict[str, Any])  # a file of configs/benchmark

    def __post_init__(self) -> None:
        for key in ("every", "limit", "batch_size"):
            if getattr(self, key) is not None:
                positive(f"validation.{key}", getattr(self, key))


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that `scripts/pretrain.py` needs; saved resolved as config.yaml in the run folder."""

    paths: PathsConfig
    run: RunConfig
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    init_from: str | None = None
    resume: str = "auto"  # "never" refuses an existing run | "anyway" goes on with other settings than it had

    def __post_init__(self) -> None:
        one_of("resume", self.resume, ("auto", "never", "anyway"))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(LoadConfig):
    """Everything that `scripts/evaluate.py` needs besides the benchmark."""

    paths: PathsConfig
    batch_size: int | None = None  # questions at once; null: what fits into memory
    limit: int | None = None
    subset: str | None = None  # a name in SUBSETS
    output: str | None = None
    processes: int | None = None  # started on this machine; null: one per GPU. Ignored below torchrun and SLURM
    on_missing: str = "error"  # images: "error" | "skip"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("on_missing", self.on_missing, ("error", "skip"))
        if self.subset is not None:
            one_of("subset", self.subset, SUBSETS)
        for key in ("batch_size", "limit", "processes"):
            if getattr(self, key) is not None:
                positive(key, getattr(self, key))


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Everything that `scripts/score.py` needs besides the benchmark."""

    paths: PathsConfig
    predictions: str  # a file of JSON lines
    output: str | None = None  # a folder
    allow_partial: bool = False


@dataclass(frozen=True, kw_only=True)
class OwnDataConfig:
    """A user's own annotation file and images."""

    annotations: str | None = None  # .json, .jsonl or .csv
    images: str | None = None  # folder
    name: str = "mine"
    config: str | None = None  # YAML file to write; null: configs/data/<name>.yaml

    def __post_init__(self) -> None:
        if (self.annotations is None) != (self.images is None):
            raise ConfigError("own.annotations and own.images go together: the file, and the folder of its images.")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Everything that `scripts/prepare.py` needs."""

    paths: PathsConfig
    sets: list[str] = field(default_factory=list[str])  # names of manifests; `data=...` on the command line
    benchmarks: list[str] = field(default_factory=list[str])  # likewise, `benchmark=...`
    dry_run: bool = False
    check: Any = False  # False | True | "full"
    repair: bool = False
    index: bool = True
    tokenizer: str | None = "EleutherAI/gpt-neox-20b"  # of the lengths in a report
    keep_archives: bool = True
    jobs: int = 4
    connections: int = 4
    own: OwnDataConfig = field(default_factory=OwnDataConfig)

    def __post_init__(self) -> None:
        if self.check not in (False, True, "full"):
            raise ConfigError(f"check={self.check!r} must be false, true or full.")
        positive("jobs", self.jobs)
        positive("connections", self.connections)
        if not (self.sets or self.benchmarks or self.own.annotations):
            raise ConfigError("Nothing to prepare: give data=NAME, benchmark=NAME or own.annotations=FILE; see --help.")


@dataclass(frozen=True, kw_only=True)
class AskConfig(LoadConfig):
    """What `scripts/generate.py` and `scripts/demo.py` share."""

    max_new_tokens: int = 128
    temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("max_new_tokens", self.max_new_tokens)
        not_negative("temperature", self.temperature)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AskConfig):
    """Everything that `scripts/generate.py` needs."""

    image: str | None = None  # path or URL
    prompt: str | None = None  # None: a chat
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: list[str] = field(default_factory=list[str])
    history: str | None = None  # file of the questions typed before


@dataclass(frozen=True, kw_only=True)
class DemoPromptsConfig:
    """What is asked for `{question}` on each page of the demo."""

    short: str
    judge: str
    box: str

    def __post_init__(self) -> None:
        for key in ("short", "judge", "box"):
            if "{question}" not in getattr(self, key):
                raise ConfigError(f"prompts.{key}={getattr(self, key)!r} must hold {{question}}.")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(AskConfig):
    """Everything that `scripts/demo.py` needs."""

    prompts: DemoPromptsConfig
    host: str = "127.0.0.1"
    port: int = 7860  # 0: any that is free
    share: bool = False
    max_image_mb: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("max_image_mb", self.max_image_mb)
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port={self.port} must be in 0 (any free one) to 65535.")
