"""The plug-in that makes `lmms-eval --model cobra` work; lmms-eval finds `manifest` through its entry point.

Nothing heavy is imported here: lmms-eval asks every plug-in at each start, and drops all others after one that fails.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Say where the model classes are; they are imported when a run asks for one."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    module = f"{__name__}.model"
    return ModelManifest("cobra", simple_class_path=f"{module}.CobraSimple", chat_class_path=f"{module}.CobraChat")
