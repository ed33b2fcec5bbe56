"""The run folder: one process group at a time, one config for ever."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from cobra.config import PretrainConfig, as_dict, flatten
from cobra.errors import CheckpointError, ConfigError
from cobra.ranks import Ranks
from cobra.runtime import write_text
from cobra.train import checkpoint

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
_SECONDS_TO_APPEAR = 60.0  # a network file system may show a new file late

# Settings that may differ when a run is resumed: they change no weight (rounding aside, as the number of ranks does),
# or are compared in another way (the data's rows themselves).
FREE_SETTINGS = (
    "paths.",
    "tracker.",
    "validation.",
    "resume",
    "data.annotations",
    "data.images",
    "data.index",
    "data.mix.",
    "data.check",
    "parallel.processes",
    "parallel.replicate",
    "parallel.reshard",
    "parallel.shard_frozen",
    "parallel.defer_gradient_sync",
    "parallel.recompute",
    "parallel.peak_tflops",
    "parallel.timeout_minutes",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.max_minutes",
    "train.max_skipped_steps",
    "train.num_workers",
    "train.profile",
)
# Of the data sets in a mixture, what decides how often a row is seen does matter.
_FIXED_ENDINGS = (".epochs", ".weight")


@contextmanager
def locked(run_folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder; the lock goes with the process, however that ends.

    Raises:
        CheckpointError: another process trains in it.
    """
    made = [folder for folder in (run_folder, *run_folder.parents) if not folder.exists()]
    run_folder.mkdir(parents=True, exist_ok=True)
    file = run_folder / LOCK_FILE
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise CheckpointError(
            f"Another process trains in {run_folder} at this moment. Wait for it, stop it, or choose another run.name."
        ) from None
    try:
        yield
    finally:
        if made and list(run_folder.iterdir()) == [file]:  # nothing came of it: leave nothing behind
            file.unlink()
            for folder in made:
                if not any(folder.iterdir()):
                    folder.rmdir()
        lock.release()


def check_shared(run_folder: Path, ranks: Ranks) -> None:
    """Refuse a run folder that is not the same on all machines: each would keep its own part of a checkpoint.

    Raises:
        ConfigError: some ranks do not see what rank 0 has made.
    """
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not (sees := (run_folder / LOCK_FILE).exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [rank for rank, found in enumerate(ranks.gather(sees)) if not found]
    if blind:
        raise ConfigError(
            f"The run folder {run_folder} of rank 0 is not there for rank {', '.join(map(str, blind))} on another "
            "machine. Set paths.runs to a folder that all machines share: each rank writes its part of a checkpoint."
        )


def check_run_folder(run_folder: Path, config: PretrainConfig) -> None:
    """Refuse a folder in which another config has been trained, unless `resume=anyway` allows it.

    Raises:
        CheckpointError: it names every setting that differs, and both values.
    """
    file, remedy = run_folder / CONFIG_FILE, "Choose another run.name, or delete the folder to start anew."
    has_checkpoint = checkpoint.latest(run_folder / "checkpoints") is not None
    if not has_checkpoint and not (run_folder / "model").exists():
        return  # nothing was trained here yet
    if config.resume == "never":
        raise CheckpointError(f"{run_folder} holds a trained run and resume=never. {remedy}")
    if not has_checkpoint:
        raise CheckpointError(f"{run_folder} holds a finished model but no checkpoint to go on from. {remedy}")
    if not file.exists():
        raise CheckpointError(f"{run_folder} holds checkpoints but no {CONFIG_FILE} that says of what. {remedy}")
    try:
        found: dict[str, Any] = flatten(yaml.safe_load(file.read_text()))
    except (yaml.YAMLError, AttributeError):
        raise CheckpointError(f"{file} is not a config. {remedy}") from None
    wanted = flatten(as_dict(config))
    different = [
        f"{key}: {found.get(key)} there, {wanted.get(key)} asked for"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key) and not _is_free(key)
    ]
    if different and config.resume == "anyway":
        log.warning("Going on in %s with other settings: %s.", run_folder, "; ".join(different))
    elif different:
        raise CheckpointError(
            f"{run_folder} belongs to a run with other settings ({'; '.join(different)}). {remedy} resume=anyway goes "
            "on with the new settings."
        )


def _is_free(key: str) -> bool:
    return key.startswith(FREE_SETTINGS) and not (key.startswith("data.mix.") and key.endswith(_FIXED_ENDINGS))


def write_config(run_folder: Path, config: PretrainConfig) -> None:
    """Write the resolved config."""
    write_text(run_folder / CONFIG_FILE, yaml.safe_dump(as_dict(config), sort_keys=False))
