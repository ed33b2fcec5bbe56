"""Training state on disk: written to a temporary name and renamed, so that a kill at any moment leaves a good one.

checkpoints/step-000500/tensors.safetensors   model, optimizer moments, random states
checkpoints/step-000500/state.json            step and counters
checkpoints/latest                            the name of the newest complete checkpoint
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cobra.errors import CheckpointError
from cobra.models.weights import assign, read_safetensors, untied_state
from cobra.runtime import flush_to_disk, write_text

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is. The sampler's position is the step itself: batches are a function of (seed, step)."""

    step: int = 0  # steps done
    tokens: int = 0  # text tokens and patches read
    seconds: float = 0.0  # of training, over all starts
    data: str = ""  # digest of the rows that are trained on


def save(folder: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int) -> None:
    """Write a checkpoint, point `latest` to it, and remove all but the newest `keep`."""
    target = folder / f"step-{progress.step:06d}"
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(_collect(model, optimizer), temporary / "tensors.safetensors")
    (temporary / "state.json").write_text(json.dumps(vars(progress)) + "\n")
    for file in (temporary / "tensors.safetensors", temporary / "state.json"):
        flush_to_disk(file)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    write_text(folder / "latest", target.name + "\n")
    complete = sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp")
    for old in complete[:-keep]:
        shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None when the run has none yet."""
    pointer = folder / "latest"
    return folder / pointer.read_text().strip() if pointer.is_file() else None


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a checkpoint back into the model, the optimizer and the random generators.

    Raises:
        CheckpointError: it is damaged or belongs to another model; nothing is silently skipped.
    """
    remedy = f"Delete {checkpoint} and write the name of an older checkpoint into {checkpoint.parent / 'latest'}, or "
    remedy += "delete the run folder to start anew."
    try:
        progress = Progress(**json.loads((checkpoint / "state.json").read_text()))
        tensors = read_safetensors(checkpoint / "tensors.safetensors")
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise CheckpointError(f"The checkpoint {checkpoint} is damaged: {error}. {remedy}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{error} {remedy}") from None
    assign(model, _below(tensors, "model."), str(checkpoint))
    _restore_optimizer(model, optimizer, _below(tensors, "optimizer."), checkpoint)
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return progress


def _collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in untied_state(model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], checkpoint: Path
) -> None:
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter not in trained:
            continue
        keys = [key for key in ADAMW_STATE if f"{name}.{key}" in tensors]
        if keys and len(keys) < len(ADAMW_STATE):
            raise CheckpointError(f"{checkpoint} has only {keys} of the optimizer state of {name}.")
        if keys:  # none: it has had no gradient yet, such as blocks behind the one that features are taken from
            optimizer.state[parameter] = {key: tensors.pop(f"{name}.{key}").to(parameter.device) for key in keys}
    if tensors:
        raise CheckpointError(
            f"{checkpoint} has optimizer state that this stage does not train: {sorted(tensors)[:4]}."
        )


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
