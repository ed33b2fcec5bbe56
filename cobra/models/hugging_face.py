"""Models in Hugging Face's form, as `cobra.integrations.hf` exports them; reading them needs no transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from cobra.config import ModelConfig, as_config
from cobra.errors import CheckpointError, ConfigError
from cobra.models.pretrained import EMBEDDING
from cobra.models.readers import read_json, read_weights
from cobra.models.vlm import CobraVLM
from cobra.models.weights import fill, parameters_on_meta, self_contained

MODEL_TYPE = "cobra"
_OURS, _THEIRS = f"llm.{EMBEDDING}", "llm.backbone.embeddings.weight"


def their_name(name: str) -> str:
    """Return what a parameter of ours is called there."""
    return _THEIRS if name == _OURS else name


def our_name(name: str) -> str:
    """Return what a parameter from there is called here."""
    return _OURS if name == _THEIRS else name


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds a model in this form."""
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("model_type") == MODEL_TYPE


def load_hugging_face(
    folder: Path, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> CobraVLM:
    """Build the model that such a folder describes, with its weights; arguments as in `load_model_folder`.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the config.
    """
    file = folder / "config.json"
    plain = read_json(file)
    try:
        own = {key: plain[key] for key in ("name", "vision", "projector", "llm")}
        config = self_contained(as_config(ModelConfig, own | {"max_length": plain["max_text_length"]}))
    except KeyError as error:
        raise CheckpointError(f"{file} describes no Cobra model: it lacks {error}. Export the model again.") from None
    except ConfigError as error:
        raise CheckpointError(f"{file} describes no Cobra model: {error}") from None
    with parameters_on_meta():
        model = CobraVLM(config)
    fill(model, read_weights(folder).renamed(our_name), device=device, dtype=dtype)
    return model.to(device)
