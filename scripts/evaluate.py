"""Evaluate a model on a benchmark: predictions, scores, report, pictures. See `python scripts/evaluate.py --help`."""

from _launch import launch
from omegaconf import DictConfig, OmegaConf


def main(cfg: DictConfig) -> None:
    from hydra.utils import instantiate

    from cobra.config import EvaluateConfig, as_config

    OmegaConf.set_struct(cfg, False)
    benchmark = cfg.pop("benchmark")
    config = as_config(EvaluateConfig, cfg)

    from cobra.eval.run import evaluate

    evaluate(config, instantiate(benchmark, _convert_="all"))


if __name__ == "__main__":
    launch("evaluate", main)
