"""Typed settings: dataclass schemas, and `as_config`, the one door through which every setting enters.

Behind the door nobody sees a dict: unknown keys, wrong types, missing values and impossible combinations have all been
refused by name. The YAML files in `configs/` hold the values; this package says what may stand in them.
"""

from cobra.config.checks import DTYPES, QUANTIZED, nearest, one_of, weight_format
from cobra.config.door import as_config, as_dict, flatten, read_yaml
from cobra.config.journeys import (
    SUBSETS,
    AskConfig,
    DemoConfig,
    DemoPromptsConfig,
    EvaluateConfig,
    GenerateConfig,
    PathsConfig,
    PrepareConfig,
    PretrainConfig,
    RunConfig,
    ScoreConfig,
    TrackerConfig,
    ValidationConfig,
    WandbConfig,
)
from cobra.config.load import LoadConfig
from cobra.config.model import (
    PROJECTOR_KINDS,
    QUESTION_SLOT,
    RESIZE_STRATEGIES,
    LLMConfig,
    ModelConfig,
    ProjectorConfig,
    TowerConfig,
    VisionConfig,
)
from cobra.config.serve import ServeConfig
from cobra.config.train import (
    LORA_TARGETS,
    STAGES,
    DataConfig,
    DataSetConfig,
    LoraConfig,
    ParallelConfig,
    TrainConfig,
)

__all__ = [
    "DTYPES",
    "LORA_TARGETS",
    "PROJECTOR_KINDS",
    "QUANTIZED",
    "QUESTION_SLOT",
    "RESIZE_STRATEGIES",
    "STAGES",
    "SUBSETS",
    "AskConfig",
    "DataConfig",
    "DataSetConfig",
    "DemoConfig",
    "DemoPromptsConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "LLMConfig",
    "LoadConfig",
    "LoraConfig",
    "ModelConfig",
    "ParallelConfig",
    "PathsConfig",
    "PrepareConfig",
    "PretrainConfig",
    "ProjectorConfig",
    "RunConfig",
    "ScoreConfig",
    "ServeConfig",
    "TowerConfig",
    "TrackerConfig",
    "TrainConfig",
    "ValidationConfig",
    "VisionConfig",
    "WandbConfig",
    "as_config",
    "as_dict",
    "flatten",
    "nearest",
    "one_of",
    "read_yaml",
    "weight_format",
]
