"""Cobra: an open research framework for Mamba vision-language models.

    import cobra
    vlm = cobra.load("runs/tiny")
    vlm.generate("photo.png", "what shape is in the image?")

Names are loaded when they are first used: `import cobra` alone needs neither torch nor a GPU.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cobra.api import Cobra, load
    from cobra.errors import CobraError
    from cobra.generation.prompts import Prompt
    from cobra.releases import available_models

__all__ = ["Cobra", "CobraError", "Prompt", "available_models", "load"]

_HOMES = {
    "Cobra": "cobra.api",
    "CobraError": "cobra.errors",
    "Prompt": "cobra.generation.prompts",
    "available_models": "cobra.releases",
    "load": "cobra.api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("cobra-vlm")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cobra' has no attribute {name!r}")
