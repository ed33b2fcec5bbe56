"""Train a model: configs -> run folder. `python scripts/pretrain.py --help` lists what can be chosen."""

from _launch import launch
from omegaconf import DictConfig


def main(cfg: DictConfig) -> None:
    from cobra.config import PretrainConfig, as_config

    config = as_config(PretrainConfig, cfg)  # wrong settings fail here, before torch is even imported

    from cobra.train.run import pretrain

    pretrain(config)


if __name__ == "__main__":
    launch("pretrain", main)
