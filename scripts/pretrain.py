"""Train a model: configs -> run folder. `python scripts/pretrain.py --help` lists what can be chosen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from _configs import has_config
from _launch import launch
from _ranks import processes_to_start, run_ranks
from omegaconf import DictConfig

if TYPE_CHECKING:
    from cobra.config import PretrainConfig, ValidationConfig
    from cobra.eval.validation import Validation


def main(cfg: DictConfig) -> float | None:
    from cobra.config import PretrainConfig, as_config, as_dict

    config = as_config(PretrainConfig, cfg)  # wrong settings fail here, before torch is even imported
    check_first_stage(config)
    count = processes_to_start(config.parallel)
    if count > 1:
        from cobra.data.sampler import check_world_size

        check_world_size(config.train, count)  # here it is said once
        run_ranks(as_dict(config), count, Path(__file__).resolve())
    else:
        from cobra.train.run import pretrain

        pretrain(config, validator(config.validation))
    return outcome(config)


def check_first_stage(config: PretrainConfig) -> None:
    """Name the command of the stage that this one starts from, where that is an experiment nobody has run yet."""
    from cobra.errors import CheckpointError

    start = Path(config.init_from or "")
    is_ours = start.parent == Path(config.paths.runs) and has_config(f"experiment/{start.name}")
    if is_ours and not (start / "model").is_dir():
        raise CheckpointError(
            f"init_from={start}: this run has not finished. It comes first: cobra pretrain +experiment="
            f"{start.name}   (or name another run or model folder: init_from=FOLDER)"
        )


def validator(config: ValidationConfig) -> Validation | None:
    if config.every is None:
        return None
    from hydra.utils import instantiate

    from cobra.eval.validation import Validation

    return Validation(instantiate(config.benchmark), config)


def outcome(config: PretrainConfig) -> float | None:
    """Return what a sweeper that searches improves: the last validation score in percent, or the loss without one."""
    from cobra.train.trackers import METRICS_FILE, read_metrics

    rows = read_metrics(Path(config.paths.runs) / config.run.name / METRICS_FILE)
    wanted = "loss" if config.validation.every is None else "validation/"
    values = [value for row in rows for key, value in row.items() if key.startswith(wanted)]
    return values[-1] if values else None


if __name__ == "__main__":
    launch("pretrain", main)
