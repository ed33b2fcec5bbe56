"""ModelConfig -> modules, and which parts learn in which stage."""

from __future__ import annotations

import torch

from cobra.config import ModelConfig
from cobra.hub import resolve_file
from cobra.models.vlm import CobraVLM
from cobra.models.weights import load_part

TRAINED_PARTS = {
    "align": ("projector",),
    "finetune": ("projector", "llm"),
    "full-finetune": ("vision", "projector", "llm"),
}


def build_model(config: ModelConfig, seed: int) -> CobraVLM:
    """Build the model with fresh projector and language model, and pretrained parts as the config names them.

    Args:
        config: sizes, and `weights` of each part.
        seed: of the fresh weights; the same seed gives the same weights on every machine.
    """
    with torch.random.fork_rng(devices=[]):  # the layers' own initialisation draws from the global generator
        torch.manual_seed(seed)
        model = CobraVLM(config)
    generator = torch.Generator().manual_seed(seed)
    model.projector.init_weights(generator)
    model.llm.init_weights(generator)
    for i, tower in enumerate(config.vision.towers):
        if tower.weights not in ("timm", "random"):
            setting = f"model.vision.towers[{i}].weights"
            load_part(model.vision.towers[i].model, resolve_file(tower.weights, setting))  # type: ignore[union-attr,arg-type]
    if config.llm.weights != "random":
        load_part(model.llm, resolve_file(config.llm.weights, "model.llm.weights"))
    return model


def set_trainable(model: CobraVLM, stage: str) -> None:
    """Freeze everything but the parts that `stage` trains (paper, section 4.1)."""
    for name, part in model.named_children():
        part.requires_grad_(name in TRAINED_PARTS[stage])


# The scan's own parameters: rounding them to 16 bits moves every step of the recurrence.
KEPT_IN_FLOAT32 = ("A_log", "D", "dt_proj.bias")


def cast_parameters(model: CobraVLM, dtype: torch.dtype) -> CobraVLM:
    """Cast all parameters but the scan's own to `dtype`, in place."""
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not f"{module_name}.{name}".endswith(KEPT_IN_FLOAT32):
                parameter.data = parameter.data.to(dtype)
    return model
