"""Settings of a model that is loaded to be used, the same in every journey that does so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cobra.config.checks import weight_format


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """A model, and where and how it runs."""

    load: str  # a run or model folder, or whatever else `cobra.load` takes; on the command line `model=...`
    device: str = "auto"  # "cpu" | "cuda" | "auto": a GPU where there is one
    dtype: str = "float32"  # of weights: "float32" | "bfloat16"
    quantize: str | None = None  # "int8" | "int4": weights of fewer bits
    ops: str = "auto"  # kernels, as `parallel.ops` in training
    vision: Any = None  # a mapping or a YAML file that replaces the model's own settings, as `cobra.load` takes it
    llm: Any = None  # likewise, of the language model

    def __post_init__(self) -> None:
        weight_format(self.dtype, self.quantize)

    @property
    def load_options(self) -> dict[str, Any]:
        """The keywords of `cobra.load`; `ops` is none of them, as it holds for the whole process."""
        return {name: getattr(self, name) for name in ("device", "dtype", "quantize", "vision", "llm")}
