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

    project: str = "cobra"  # name of the project there
    entity: str | None = None  # user or team; null: the one that is logged in
    mode: str = "auto"  # "online" | "offline" | "auto": offline when nobody is logged in

    def __post_init__(self) -> None:
        one_of("tracker.wandb.mode", self.mode, ("auto", "online", "offline"))


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: WandbConfig | None = None  # null: not used; `tracker=wandb` fills it


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """Folders."""

    data: str = "data"  # of data sets and benchmarks; also `data_root=...`, except in training
    runs: str = "runs"  # of run folders
    results: str = "results"  # of evaluations


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Name and seed of a run."""

    name: str  # the run folder is this one below `paths.runs`
    seed: int = 0  # of fresh weights, the order of the data and dropout

    def __post_init__(self) -> None:
        if "\\" in self.name or {"", ".", "..", "model", "checkpoints"} & set(self.name.split("/")):
            raise ConfigError(f"run.name={self.name!r} must be a folder name below paths.runs, such as 'tiny'.")
        not_negative("run.seed", self.seed)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """A benchmark that is asked during training."""

    every: int | None = None  # steps between two validations; null: none
    limit: int | None = 256  # questions, always the same ones; null: all
    batch_size: int = 64  # questions at once, per device
    benchmark: dict[str, Any] = field(default_factory=dict[str, Any])  # `benchmark@validation.benchmark=NAME`

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
    init_from: str | None = None  # a run or model folder whose weights the run starts from
    resume: str = "auto"  # "auto": go on where it stopped | "never": refuse an old run | "anyway": with other settings

    def __post_init__(self) -> None:
        one_of("resume", self.resume, ("auto", "never", "anyway"))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(LoadConfig):
    """Everything that `scripts/evaluate.py` needs besides the benchmark."""

    paths: PathsConfig
    batch_size: int | None = None  # questions at once; null: what fits into memory. Halved when it does not
    limit: int | None = None  # first questions of one fixed shuffled order; null: all
    subset: str | None = None  # "smoke" | "lite" | "medium": whole images with 50 | 500 | 2500 questions of each part
    output: str | None = None  # folder; null: `results/BENCHMARK/MODEL`
    processes: int | None = None  # started on this machine; null: one per GPU. Ignored below torchrun and SLURM
    on_missing: str = "error"  # images that are not there: "error" | "skip": leave out and list their questions

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
    predictions: str  # JSON lines with `question_id` and `prediction` or `probabilities`
    output: str | None = None  # folder for scores.jsonl and results.json; null: write nothing
    allow_partial: bool = False  # score what is there when ids are missing, doubled or unknown


@dataclass(frozen=True, kw_only=True)
class OwnDataConfig:
    """A user's own annotation file and images."""

    annotations: str | None = None  # .json, .jsonl or .csv file
    images: str | None = None  # folder of the images that it names
    name: str = "mine"  # of the data set: train with `data=mine`
    config: str | None = None  # YAML file to write; null: `configs/data/NAME.yaml`

    def __post_init__(self) -> None:
        if (self.annotations is None) != (self.images is None):
            raise ConfigError("own.annotations and own.images go together: the file, and the folder of its images.")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Everything that `scripts/prepare.py` needs."""

    paths: PathsConfig
    sets: list[str] = field(default_factory=list[str])  # training sets; on the command line `data=...`, also `data=all`
    benchmarks: list[str] = field(default_factory=list[str])  # likewise, `benchmark=...`
    dry_run: bool = False  # print what would be fetched, from where, how large; also `--dry-run`
    check: Any = False  # only look: "true": files, sizes, image headers | "full": decode every image
    repair: bool = False  # extract and convert again what a check found broken
    index: bool = True  # make the memory-mapped index of a training set, which training would make otherwise
    tokenizer: str | None = "EleutherAI/gpt-neox-20b"  # counts the tokens in the report; null: they are not counted
    keep_archives: bool = True  # false: delete an archive when it is extracted
    jobs: int = 4  # files downloaded at once; processes that extract, convert and check
    connections: int = 4  # for each large file
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

    max_new_tokens: int = 128  # limit of an answer
    temperature: float = 0.0  # 0: the likeliest token each time; above: tokens are drawn

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("max_new_tokens", self.max_new_tokens)
        not_negative("temperature", self.temperature)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AskConfig):
    """Everything that `scripts/generate.py` needs."""

    image: str | None = None  # path or URL; null: text alone. Taken as typed, without quotes for Hydra
    prompt: str | None = None  # one question, whose answer is printed, taken as typed; null: a chat
    top_k: int = 0  # draw from so many likeliest tokens; 0: all
    top_p: float = 1.0  # draw from the smallest set with this probability
    min_p: float = 0.0  # draw from tokens at least this many times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: words of the turn's own question and answer become less likely
    seed: int = 0  # of the first answer's draws; the next answer has the next seed
    stop: list[str] = field(default_factory=list[str])  # strings that end an answer
    history: str | None = None  # file of the questions typed in a terminal, for the arrow keys; null: not kept


@dataclass(frozen=True, kw_only=True)
class DemoPromptsConfig:
    """What is asked for `{question}` on each page of the demo."""

    short: str  # for a short answer
    judge: str  # for a statement that is true or false
    box: str  # for the place of what is described

    def __post_init__(self) -> None:
        for key in ("short", "judge", "box"):
            if "{question}" not in getattr(self, key):
                raise ConfigError(f"prompts.{key}={getattr(self, key)!r} must hold {{question}}.")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(AskConfig):
    """Everything that `scripts/demo.py` needs."""

    prompts: DemoPromptsConfig
    host: str = "127.0.0.1"  # "0.0.0.0": reachable from other machines
    port: int = 7860  # 0: any that is free
    share: bool = False  # a public address of Gradio's for 72 hours, through its servers
    max_image_mb: int = 20  # of an uploaded file

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("max_image_mb", self.max_image_mb)
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port={self.port} must be in 0 (any free one) to 65535.")
