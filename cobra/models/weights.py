"""Weights in and out of modules, and the model folder.

A **model folder** is what `cobra.load` reads: `model.safetensors`, `config.json` (a ModelConfig as plain data) and
`tokenizer.json`.

Modules may be built without memory for their parameters (`parameters_on_meta`) and are then filled tensor by tensor,
each at once on its device and in its dtype: the host holds no more than the model itself and one tensor.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cobra.config import ModelConfig, as_config, as_dict
from cobra.errors import CheckpointError, ConfigError
from cobra.models.quantized import is_quantized
from cobra.models.readers import Weights, read_json, read_weights, reading
from cobra.models.vlm import CobraVLM
from cobra.runtime import flush_to_disk

TIED = "lm_head.weight"  # the head shares the embedding's weight; it is stored once, under the embedding's name
# The scan's own parameters: rounding them to 16 bits moves every step of the recurrence.
KEPT_IN_FLOAT32 = ("A_log", "D", "dt_proj.bias")
# What parameters may be stored as. The smaller ones (float8) mean nothing without scales, which files keep elsewhere.
STORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MANY = 40  # names of a message; more are grouped


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file whole.

    Raises:
        CheckpointError: the file is missing, cut short or not safetensors.
    """
    with reading(path):
        return load_file(path)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside get parameters without memory or values; their buffers are real.

    Buffers stay real because a file does not bring them back: timm's towers and ours compute some when they are built.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def assign(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copy `tensors` into the parameters and buffers of `module`; errors as in `fill`."""
    fill(module, Weights.of(tensors, origin))


def fill(
    module: nn.Module, weights: Weights, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """Give the parameters and buffers of `module` their values; see `fill_parts`."""
    fill_parts([(module, weights)], device=device, dtype=dtype)


@torch.no_grad()
def fill_parts(
    parts: Sequence[tuple[nn.Module, Weights]],
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Give the parameters and buffers of several modules their values, all from one file.

    Args:
        parts: modules and their weights, of which every name, shape and type must fit; a tied head is left out. A
            tensor that has memory is copied into as it is; one on the meta device gets memory.
        device: where memory is made; None: the CPU.
        dtype: of parameters that are made, but for the scan's own, which are float32; None: as they are stored.

    Raises:
        CheckpointError: keys are missing, unexpected, or of another shape or type, or values are not finite; all of
            them are listed as the file calls them, with the file. The modules are of no use then.
    """
    check_keys(parts)
    damaged = [name for module, weights in parts for name in _fill(module, weights, device, dtype)]
    if damaged:
        raise not_finite(parts[0][1].origin, damaged)


def _fill(module: nn.Module, weights: Weights, device: torch.device | None, dtype: torch.dtype | None) -> list[str]:
    """Fill a module with weights that fit; return the file's names of those that are not finite."""
    made: dict[int, nn.Parameter] = {}
    damaged: list[str] = []
    parameters = dict(module.named_parameters())
    for name, target in untied_state(module).items():
        source = weights[name]
        if not is_finite(source):
            damaged.append(weights.source(name))
        elif target.is_meta:
            kept = name.endswith(KEPT_IN_FLOAT32)
            chosen = source.dtype if dtype is None else torch.float32 if kept else dtype
            new = torch.empty(source.shape, dtype=chosen, device=device).copy_(source)
            made[id(parameters[name])] = nn.Parameter(new, requires_grad=parameters[name].requires_grad)
        else:
            target.copy_(source)
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if id(parameter) in made:  # a tied parameter is met twice and stays tied
                child._parameters[name] = made[id(parameter)]
    return damaged


def check_keys(parts: Sequence[tuple[nn.Module, Weights]]) -> None:
    """Raise CheckpointError, as `fill_parts` does, if names, shapes or types do not fit; no value is read."""
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "wrong shape": [], "wrong type": []}
    for module, weights in parts:
        wanted = untied_state(module)
        problems["missing"] += [weights.source(name) for name in wanted if name not in weights]
        problems["unexpected"] += [weights.source(name) for name in weights if name not in wanted]
        for name, target in wanted.items():
            if name not in weights:
                continue
            shape, dtype = weights.shapes[name], weights.dtypes[name]
            if shape != tuple(target.shape):
                problems["wrong shape"].append(f"{weights.source(name)} {list(shape)} (needs {list(target.shape)})")
            if dtype != target.dtype and not (dtype in STORED_DTYPES and target.dtype in STORED_DTYPES):
                needed = f"needs a float of 16 bits or more, such as {target.dtype}".replace("torch.", "")
                problems["wrong type"].append(f"{weights.source(name)} {dtype} ({needed})".replace("torch.", ""))
    listed = "; ".join(f"{what}: {_listed(names)}" for what, names in problems.items() if names)
    if listed:
        raise CheckpointError(
            f"{parts[0][1].origin} does not fit the model: {listed}. Use the model config that it was written with, or "
            "a file that was written with this one."
        )


def _listed(names: Sequence[str]) -> str:
    """Return all names and their number; many are grouped over their last index: `layers.{0..63}.norm.weight`."""
    if len(names) <= _MANY:
        return f"{', '.join(names)} ({len(names)})"
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        indexed = re.fullmatch(r"(.*\.)(\d+)(\..*)", name)
        head, index, tail = indexed.groups() if indexed else (name, None, "")
        groups.setdefault((head, tail), []).extend([] if index is None else [int(index)])
    grouped = [f"{head}{_ranges(numbers)}{tail}" for (head, tail), numbers in groups.items()]
    return f"{', '.join(grouped)} ({len(names)})"


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "{0..2,5}", [5] -> "5", [] -> ""."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ",".join("..".join(map(str, run)) for run in runs)
    return f"{{{text}}}" if "," in text or ".." in text else text


def not_finite(origin: str, names: Sequence[str]) -> CheckpointError:
    """Return the error that says so."""
    return CheckpointError(
        f"{origin} holds NaN or infinite numbers in {_listed(names)}; such a model answers nothing. Use an earlier "
        "checkpoint, or fetch the file again."
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are numbers; True for types that cannot tell, which no parameter has."""
    if tensor.dtype not in STORED_DTYPES or tensor.numel() == 0:
        return True
    smallest, largest = tensor.aminmax()  # without a tensor of the same size; NaN wins
    return bool(smallest.isfinite() and largest.isfinite())


def untied_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's state, each tied tensor once."""
    return {key: tensor for key, tensor in module.state_dict().items() if not key.endswith(TIED)}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder` to write into; it takes that name when all went well, else it vanishes.

    Raises:
        CheckpointError: it cannot be written; what is in `folder` is as it was.
    """
    folder = folder.absolute()
    try:
        with _whole_folder(folder) as temporary:
            yield temporary
    except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{folder} cannot be written ({reason}); nothing was changed there. See to free space and to your rights."
        ) from error


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # its own name, as a folder of the user's or of another process may have any that could be guessed
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    mask = _umask()
    temporary.chmod(0o777 & ~mask)  # mkdtemp's folders are for their owner alone
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~mask)  # as are safetensors' files
                flush_to_disk(file)
        old = temporary.with_name(f"{temporary.name}.old")
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_model_folder(
    model: CobraVLM, tokenizer_file: Path, folder: Path, *, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model folder, complete or not at all: into a temporary folder beside it, then renamed.

    The folder stands for itself: its config points to its own tokenizer and needs no other weights.

    Args:
        model: its config is written, and its tensors.
        tokenizer_file: is copied.
        folder: is replaced.
        tensors: stand in for the model's own, such as those gathered from a sharded model.

    Raises:
        ConfigError: the model is quantised.
    """
    if is_quantized(model):
        raise ConfigError(
            "A quantised model cannot be saved: what was rounded away is lost. Load it without quantize to save it, "
            "and quantise the saved one whenever it is loaded."
        )
    with whole_folder(folder) as temporary:
        state = untied_state(model) if tensors is None else tensors
        state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(tokenizer_file, temporary / "tokenizer.json")
        config = as_dict(self_contained(model.config))
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def self_contained(config: ModelConfig) -> ModelConfig:
    """Return the config with every reference to weights and tokenizers outside the model folder removed."""
    towers = [replace(tower, weights="random") for tower in config.vision.towers]
    return replace(
        config,
        vision=replace(config.vision, towers=towers),
        llm=replace(config.llm, weights="random", tokenizer="tokenizer.json"),
    )


def read_model_config(folder: Path) -> ModelConfig:
    """Read a model folder's config.

    Raises:
        CheckpointError: the file is missing, damaged, or describes no model.
    """
    file = folder / "config.json"
    try:
        # Self-contained whatever it says: a folder from elsewhere must not point to other files of this machine.
        return self_contained(as_config(ModelConfig, read_json(file)))
    except ConfigError as error:
        raise CheckpointError(f"{file} does not describe a model: {error}") from None


def load_model_folder(
    folder: Path,
    *,
    config: ModelConfig | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> CobraVLM:
    """Build the model that a model folder describes, with its weights.

    Args:
        folder: the model folder.
        config: stands in for the folder's own; None: its own.
        device: of the weights; None: the CPU.
        dtype: as in `fill`.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the config.
    """
    with parameters_on_meta():
        model = CobraVLM(config or read_model_config(folder))
    fill(model, read_weights(folder / "model.safetensors"), device=device, dtype=dtype)
    return model.to(device)
