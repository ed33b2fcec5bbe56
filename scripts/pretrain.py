"""Train a model: configs -> run folder. `python scripts/pretrain.py --help` lists what can be chosen."""

from pathlib import Path

from _launch import launch
from _ranks import processes_to_start, run_ranks
from omegaconf import DictConfig


def main(cfg: DictConfig) -> None:
    from cobra.config import PretrainConfig, as_config

    config = as_config(PretrainConfig, cfg)  # wrong settings fail here, before torch is even imported
    count = processes_to_start(config.parallel)
    if count > 1:
        run_ranks(config, count, Path(__file__).resolve())
        return

    from cobra.train.run import pretrain

    pretrain(config)


if __name__ == "__main__":
    launch("pretrain", main)
