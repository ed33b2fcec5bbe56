"""A web page to try a model. See `python scripts/demo.py --help`."""

from _launch import launch
from omegaconf import DictConfig


def main(cfg: DictConfig) -> None:
    from cobra.config import DemoConfig, as_config
    from cobra.demo.page import serve

    serve(as_config(DemoConfig, cfg))


if __name__ == "__main__":
    launch("demo", main)
