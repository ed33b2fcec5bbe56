"""Settings of a model that is loaded to be used, the same in every journey that does so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cobra.config.checks import weight_format


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """A model, and where and how it runs."""

    load: str  # what cobra.load takes; `model=...` on the command line
    device: str = "auto"
    dtype: str = "float32"
    quantize: str | None = None  # a name in QUANTIZED: weights of fewer bits, as cobra.load takes them
    ops: str = "auto"  # as parallel.ops
    vision: Any = None  # a mapping or a YAML file, as cobra.load takes them
    llm: Any = None

    def __post_init__(self) -> None:
        weight_format(self.dtype, self.quantize)

    @property
    def load_options(self) -> dict[str, Any]:
        """The keywords of `cobra.load`; `ops` is none of them, as it holds for the whole process."""
        return {name: getattr(self, name) for name in ("device", "dtype", "quantize", "vision", "llm")}
