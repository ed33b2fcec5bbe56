"""Weights in and out of modules. Only safetensors: nothing that a user downloaded is ever unpickled.

A **model folder** is what `cobra.load` reads: `model.safetensors`, `config.json` (a ModelConfig as plain data) and
`tokenizer.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cobra.config import ModelConfig, as_config, as_dict
from cobra.errors import CheckpointError, ConfigError
from cobra.models.vlm import CobraVLM
from cobra.runtime import flush_to_disk

TIED = "lm_head.weight"  # the head shares the embedding's weight; it is stored once, under the embedding's name


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: the file is missing, cut short or not safetensors.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); it may be cut short. Fetch or write it again."
        ) from None


def load_part(module: nn.Module, path: Path) -> None:
    """Load one module's weights from a safetensors file; every key must fit."""
    assign(module, read_safetensors(path), str(path))


@torch.no_grad()
def assign(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy `tensors` into the parameters and buffers of `module`.

    Raises:
        CheckpointError: keys are missing, unexpected or of another shape; all of them are listed, with `origin`.
    """
    wanted = untied_state(module)
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys())
    misshapen = [
        f"{key} {list(tensors[key].shape)} (needs {list(wanted[key].shape)})"
        for key in sorted(wanted.keys() & tensors.keys())
        if tensors[key].shape != wanted[key].shape
    ]
    problems = [
        f"{what}: {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''} ({len(keys)})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{origin} does not fit the model: {'; '.join(problems)}. Was it written with another model config?"
        )
    for key, parameter in wanted.items():
        parameter.copy_(tensors[key])


def untied_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's state, each tied tensor once."""
    return {key: tensor for key, tensor in module.state_dict().items() if not key.endswith(TIED)}


def save_model_folder(model: CobraVLM, tokenizer_file: Path, folder: Path) -> None:
    """Write a model folder, complete or not at all: into a temporary folder beside it, then renamed.

    The folder stands for itself: its config points to its own tokenizer and needs no other weights.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in untied_state(model).items()}
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tokenizer_file, temporary / "tokenizer.json")
    config = as_dict(self_contained(model.config))
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    flush_to_disk(temporary / "model.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def self_contained(config: ModelConfig) -> ModelConfig:
    """Return the config with every reference to weights and tokenizers outside the model folder removed."""
    towers = [replace(tower, weights="random") for tower in config.vision.towers]
    return replace(
        config,
        vision=replace(config.vision, towers=towers),
        llm=replace(config.llm, weights="random", tokenizer="tokenizer.json"),
    )


def load_model_folder(folder: Path) -> CobraVLM:
    """Build the model that a model folder describes, with its weights, on the CPU in float32.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the config.
    """
    try:
        # Self-contained whatever it says: a folder from elsewhere must not point to other files of this machine.
        config = self_contained(as_config(ModelConfig, json.loads((folder / "config.json").read_text())))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is not valid JSON: {error}") from None
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a model: {error}") from None
    model = CobraVLM(config)
    assign(model, read_safetensors(folder / "model.safetensors"), str(folder / "model.safetensors"))
    return model
