"""Typed settings: dataclass schemas, and `as_config`, the one door through which every setting enters.

Behind the door nobody sees a dict: unknown keys, wrong types, missing values and impossible combinations have all been
refused by name. The YAML files in `configs/` hold the values; this file says what may stand in them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from cobra.errors import ConfigError

STAGES = ("align", "finetune", "full-finetune")
RESIZE_STRATEGIES = ("resize-naive", "resize-crop", "letterbox")
PROJECTOR_KINDS = ("linear", "gelu-mlp", "fused-gelu-mlp", "ldpv2", "fused-ldpv2")

T = TypeVar("T")


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean '...'?` for the closest of `choices`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def one_of(key: str, value: object, choices: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise ConfigError(
            f"{key}={value!r} is not known; choose one of {', '.join(choices)}.{nearest(str(value), choices)}"
        )


def _positive(key: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{key}={value} must be greater than 0.")


def _not_negative(key: str, value: float) -> None:
    if not value >= 0:
        raise ConfigError(f"{key}={value} must not be negative.")


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """One vision transformer of timm."""

    timm: str  # name for timm.create_model
    image_size: int  # pixels
    layer: int = -2  # block whose output is taken, Python indexing; -2: the second-to-last
    ignore_rest: bool = False  # the patch size need not divide image_size: what is left over at two sides goes unseen
    args: dict[str, Any] = field(default_factory=dict[str, Any])  # further arguments of timm.create_model
    weights: str = "timm"  # "timm": its published weights | "random" | a weight file, folder or Hub id

    def __post_init__(self) -> None:
        _positive("model.vision.towers: image_size", self.image_size)
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

    towers: list[TowerConfig]
    resize: str = "resize-naive"

    def __post_init__(self) -> None:
        one_of("model.vision.resize", self.resize, RESIZE_STRATEGIES)
        if not self.towers:
            raise ConfigError("model.vision.towers is empty; name at least one tower.")


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The map from vision features to image tokens."""

    kind: str
    expansion: int = 4  # hidden width of the fused kinds, in multiples of the vision width
    grid: int | None = None  # side of the square of image tokens that the ldpv2 kinds make; null: half the patches'

    def __post_init__(self) -> None:
        one_of("model.projector.kind", self.kind, PROJECTOR_KINDS)
        _positive("model.projector.expansion", self.expansion)
        if self.grid is not None:
            _positive("model.projector.grid", self.grid)


@dataclass(frozen=True, kw_only=True)
class LLMConfig:
    """A Mamba-1 language model with its tokenizer and prompt format."""

    d_model: int
    num_layers: int
    vocab_size: int
    tokenizer: str  # tokenizer.json, or a folder or Hub id with one; "cobra:..." is a file of this package
    prompt: str  # "zephyr" (chat) | "mamba" (base)
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None  # null: d_model / 16, rounded up
    norm_eps: float = 1e-5
    pad_vocab_multiple: int = 8
    weights: str = "random"  # "random" | a weight file, folder or Hub id, of any layout
    init: str = "mamba"  # fresh weights: "mamba" (its authors') | "small" (small models trained from scratch)

    def __post_init__(self) -> None:
        one_of("model.llm.prompt", self.prompt, ("zephyr", "mamba"))
        one_of("model.llm.init", self.init, ("mamba", "small"))
        for key in ("d_model", "num_layers", "vocab_size", "d_state", "d_conv", "expand", "pad_vocab_multiple"):
            _positive(f"model.llm.{key}", getattr(self, key))
        _positive("model.llm.norm_eps", self.norm_eps)
        if self.dt_rank is not None:
            _positive("model.llm.dt_rank", self.dt_rank)

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

    name: str
    vision: VisionConfig
    projector: ProjectorConfig
    llm: LLMConfig
    max_length: int = 2048  # text tokens of one training example

    def __post_init__(self) -> None:
        _positive("model.max_length", self.max_length)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A LLaVA-format annotation file and its image folder."""

    name: str
    annotations: str
    images: str
    source: str | None = None  # "easyvqa": made from the PyPI package when the annotations are not there yet
    rows_per_image: int = 1  # rows of the same image that share one reading of it in a step
    check: str = "exists"  # before training, every image: "exists" | "decode"

    def __post_init__(self) -> None:
        one_of("data.check", self.check, ("exists", "decode"))
        if self.source is not None:
            one_of("data.source", self.source, ("easyvqa",))
        _positive("data.rows_per_image", self.rows_per_image)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training stage. Batch sizes count images (each with up to `data.rows_per_image` rows) or text-only rows."""

    stage: str  # align: projector | finetune: projector + llm | full-finetune: everything
    global_batch_size: int
    per_device_batch_size: int  # of a micro-batch; a step accumulates global / per-device of them
    learning_rate: float
    epochs: float | None = None
    max_steps: int | None = None  # wins over epochs
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    log_every: int = 10  # steps
    save_every: int = 500  # steps
    keep_checkpoints: int = 2
    num_workers: int = 0

    def __post_init__(self) -> None:
        one_of("train.stage", self.stage, STAGES)
        for key in ("global_batch_size", "per_device_batch_size", "learning_rate", "max_grad_norm", "log_every"):
            _positive(f"train.{key}", getattr(self, key))
        _positive("train.save_every", self.save_every)
        _positive("train.keep_checkpoints", self.keep_checkpoints)
        _not_negative("train.weight_decay", self.weight_decay)
        _not_negative("train.num_workers", self.num_workers)
        if self.epochs is None and self.max_steps is None:
            raise ConfigError("train.epochs and train.max_steps are both null; set one of them.")
        for key in ("epochs", "max_steps"):
            if getattr(self, key) is not None:
                _positive(f"train.{key}", getattr(self, key))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train.betas={list(self.betas)} must be two numbers in [0, 1), such as [0.9, 0.999].")
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigError(f"train.warmup_ratio={self.warmup_ratio} must be in [0, 1).")
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

    device: str = "auto"
    precision: str = "fp32"
    ops: str = "auto"  # backend of the sequence model's operations, see cobra.ops

    def __post_init__(self) -> None:
        one_of("parallel.precision", self.precision, ("fp32", "bf16"))


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
        _not_negative("run.seed", self.seed)


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
    init_from: str | None = None
    resume: str = "auto"

    def __post_init__(self) -> None:
        one_of("resume", self.resume, ("auto", "never"))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Everything that `scripts/evaluate.py` needs besides the benchmark."""

    paths: PathsConfig
    load: str  # what cobra.load takes; `model=...` on the command line
    batch_size: int = 512
    limit: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    ops: str = "auto"  # as parallel.ops
    output: str | None = None

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, ("float32", "bfloat16"))
        _positive("batch_size", self.batch_size)
        if self.limit is not None:
            _positive("limit", self.limit)


def read_yaml(file: Path, argument: str) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        ConfigError: it is missing, or holds no settings; the message names `argument`, which it was given as.
    """
    try:
        node = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except OSError as error:
        raise ConfigError(f"{argument}={file} cannot be read: {error.strerror or error}.") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{argument}={file} is not a YAML file of settings: {str(error).splitlines()[0]}.") from None
    if not isinstance(node, dict):
        raise ConfigError(f"{argument}={file} must hold settings, key: value.")
    return cast("dict[str, Any]", node)


def as_config(schema: type[T], node: DictConfig | Mapping[str, Any]) -> T:
    """Check `node` against the dataclass `schema` and return an instance of it.

    Raises:
        ConfigError: an unknown key (with the nearest valid one), a wrong type, a missing value, or a combination that
            a schema's own checks refuse. The message is one line and names the key.
    """
    if isinstance(node, DictConfig):
        try:
            node = cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True, throw_on_missing=True))
        except MissingMandatoryValue as error:
            raise ConfigError(f"{error.full_key} is not set; give it a value: {error.full_key}=...") from None
        except OmegaConfBaseException as error:
            raise ConfigError(str(error).splitlines()[0]) from None
    return _convert(schema, node, "")


def as_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain data, ready for JSON or YAML."""
    return asdict(config)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level with dotted keys: {"train": {"epochs": 1}} -> {"train.epochs": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _convert(kind: Any, value: Any, key: str) -> Any:
    """Return `value` as `kind` (a dataclass, list[...], dict[...], X | None or a scalar type), or say what is wrong."""
    arguments = get_args(kind)
    if isinstance(kind, UnionType):
        return None if value is None else _convert(arguments[0], value, key)
    if is_dataclass(kind):
        return _build(cast("type[Any]", kind), value, key)
    if get_origin(kind) is list and isinstance(value, list):
        return [_convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(cast("list[Any]", value))]
    if get_origin(kind) is dict and isinstance(value, Mapping):
        return dict(cast("Mapping[str, Any]", value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    name = getattr(get_origin(kind) or kind, "__name__", str(kind))
    raise ConfigError(f"{key}={value!r} is not of type {name}.")


def _build(schema: type[Any], node: Any, prefix: str) -> Any:
    if not isinstance(node, Mapping):
        raise ConfigError(f"{prefix}={node!r} must be a group of settings.")
    dot = f"{prefix}." if prefix else ""
    hints = get_type_hints(schema)
    items = {item.name: item for item in fields(schema)}
    values: dict[str, Any] = {}
    for name, value in cast("Mapping[str, Any]", node).items():
        if name not in items:
            raise ConfigError(f"Unknown setting '{dot}{name}'.{nearest(name, items)} Known: {', '.join(items)}.")
        values[name] = _convert(hints[name], value, f"{dot}{name}")
    for name, item in items.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{dot}{name} is not set; give it a value: {dot}{name}=...")
    return schema(**values)
