"""From the name of any model that can be evaluated to the model, and to what its answers depend on."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cobra.api import load
from cobra.errors import CheckpointError, ConfigError
from cobra.eval import fingerprint
from cobra.eval.engine import Answerer
from cobra.eval.fingerprint import files_fingerprint
from cobra.integrations.transformers import hub_commit, load_transformers

TRANSFORMERS = "transformers:"
PYTHON = "python:"


class NamedAnswerer(Answerer[Any], Protocol):
    """A model that the evaluate journey asks; docs/other-models.md says how to write one."""

    name: str


def open_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "float32",
    quantize: str | None = None,
    vision: Mapping[str, Any] | str | Path | None = None,
    llm: Mapping[str, Any] | str | Path | None = None,
) -> NamedAnswerer:
    """Load a model by name.

    Args:
        name: `transformers:NAME` (a folder or Hub repository of transformers), `python:MODULE:FACTORY` (called with
            `device` and `dtype`), or whatever `cobra.load` takes.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: "float32" or "bfloat16".
        quantize: as in `cobra.load`, for its models alone.
        vision: likewise.
        llm: likewise.

    Raises:
        ConfigError: an argument does not fit, or there is no such factory.
        CheckpointError: there is no such model, or it is damaged.
    """
    if not name.startswith((TRANSFORMERS, PYTHON)):
        return load(name, device=device, dtype=dtype, quantize=quantize, vision=vision, llm=llm)
    if vision or llm or quantize:
        raise ConfigError(
            f"quantize, vision and llm have no effect on {name}; they are settings of Cobra models. Leave them out."
        )
    if name.startswith(TRANSFORMERS):
        return load_transformers(name.removeprefix(TRANSFORMERS), device=device, dtype=dtype)
    model = _factory(name)(device=device, dtype=dtype)
    lacking = [part for part in ("name", "encode_image", "generate", "score", "choice_ids") if not hasattr(model, part)]
    if lacking:
        raise ConfigError(
            f"What {name} returns has no {', '.join(lacking)}; docs/other-models.md lists what is needed."
        )
    return model


def model_fingerprint(
    name: str,
    *,
    vision: Mapping[str, Any] | str | Path | None = None,
    llm: Mapping[str, Any] | str | Path | None = None,
) -> dict[str, Any]:
    """Return what answers depend on, by model name as `open_model` takes it; no weights are loaded.

    Raises:
        CobraError: there is no such model, or a part of it is missing.
    """
    if name.startswith(TRANSFORMERS):
        return _transformers_fingerprint(name.removeprefix(TRANSFORMERS))
    if name.startswith(PYTHON):
        return {"model": name, "model config": str(getattr(_factory(name), "fingerprint", ""))}
    return fingerprint.model_fingerprint(name, vision=vision, llm=llm)


def _transformers_fingerprint(name: str) -> dict[str, str]:
    """Digests of a folder's files; of a Hub repository, its commit."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return {"model": name, "model config": hub_commit(name)}
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"{TRANSFORMERS}{name}: no *.safetensors in {folder.absolute()}; nothing else is read.")
    return files_fingerprint(weights, folder)


def _factory(name: str) -> Any:
    """Import what `python:MODULE:FACTORY` names."""
    module, separator, attribute = name.removeprefix(PYTHON).partition(":")
    if not (module and separator and attribute):
        raise ConfigError(f"{name} must be python:MODULE:FACTORY, such as python:my_package.my_model:build.")
    try:
        factory = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{name}: {error}. Install the package, or name the folder that holds it in PYTHONPATH."
        ) from None
    if not callable(factory):
        raise ConfigError(f"{name}: the module {module} has nothing called {attribute} that can be called.")
    return factory
