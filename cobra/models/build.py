"""ModelConfig -> modules, and which parts learn in which stage."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from cobra.config import ModelConfig
from cobra.models.pretrained import load_llm, load_tower
from cobra.models.projector import Projector
from cobra.models.vlm import CobraVLM
from cobra.models.weights import KEPT_IN_FLOAT32, parameters_on_meta, self_contained

TRAINED_PARTS = {
    "align": ("projector",),
    "finetune": ("projector", "llm"),
    "full-finetune": ("vision", "projector", "llm"),
}


def build_model(config: ModelConfig, seed: int) -> CobraVLM:
    """Build the model with fresh projector and language model, and pretrained parts as the config names them.

    All parameters are float32, whatever their files store: 16 bits would lose an optimizer's small steps.

    Args:
        config: sizes, and `weights` of each part.
        seed: of the fresh weights; the same seed gives the same weights on every machine.

    Raises:
        CheckpointError: weights are missing, damaged or do not fit.
    """
    towers = config.vision.towers
    is_pretrained = config.llm.weights != "random" and all(tower.weights != "random" for tower in towers)
    with torch.random.fork_rng(devices=[]):  # the layers' own initialisation draws from the global generator
        torch.manual_seed(seed)
        with parameters_on_meta() if is_pretrained else nullcontext():  # no memory for what a file brings anyway
            model = CobraVLM(self_contained(config))
        model.config = config
        if is_pretrained:
            model.projector = Projector(config.projector, model.vision.width, config.llm.d_model)
    generator = torch.Generator().manual_seed(seed)
    model.projector.init_weights(generator)
    if config.llm.weights == "random":
        model.llm.init_weights(generator)
    for i, tower in enumerate(towers):
        if tower.weights != "random":
            setting = f"model.vision.towers[{i}].weights"
            load_tower(model.vision.towers[i], tower, setting, dtype=torch.float32)  # type: ignore[arg-type]
    if config.llm.weights != "random":
        load_llm(model.llm, config.llm.weights, "model.llm.weights", dtype=torch.float32)
    return model


def set_trainable(model: CobraVLM, stage: str) -> None:
    """Freeze everything but the parts that `stage` trains (paper, section 4.1)."""
    for name, part in model.named_children():
        part.requires_grad_(name in TRAINED_PARTS[stage])


def cast_parameters(model: nn.Module, dtype: torch.dtype, *, frozen_only: bool = False) -> None:
    """Cast parameters, all of them or those that do not learn, to `dtype` in place; the scan's own stay as they are."""
    for name, parameter in model.named_parameters():
        if not name.endswith(KEPT_IN_FLOAT32) and not (frozen_only and parameter.requires_grad):
            parameter.data = parameter.data.to(dtype)
