"""Serve a model with OpenAI's chat interface. See `python scripts/serve.py --help`."""

from importlib.util import find_spec

from _launch import launch
from omegaconf import DictConfig, OmegaConf


def main(cfg: DictConfig) -> None:
    from cobra.config import ServeConfig, as_config
    from cobra.errors import ConfigError

    OmegaConf.set_struct(cfg, False)
    config = as_config(ServeConfig, cfg)
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"The server needs {' and '.join(missing)}: pip install 'cobra-vlm[serve]'")

    from cobra.serve.run import serve

    serve(config)


if __name__ == "__main__":
    launch("serve", main)
