"""Serve a model with OpenAI's chat interface. See `python scripts/serve.py --help`."""

from _launch import launch
from omegaconf import DictConfig


def main(cfg: DictConfig) -> None:
    from cobra.config import ServeConfig, as_config
    from cobra.runtime import require

    config = as_config(ServeConfig, cfg)
    require("The server", "fastapi", "uvicorn", extra="serve")

    from cobra.serve.run import serve

    serve(config)


if __name__ == "__main__":
    launch("serve", main)
