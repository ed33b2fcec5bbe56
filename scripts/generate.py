"""Ask a model, once or in a chat in the terminal. See `python scripts/generate.py --help`."""

import logging
import sys
from dataclasses import replace
from functools import partial

from _launch import launch
from omegaconf import DictConfig

# Hydra would read commas, braces and quotes in these as syntax.
AS_TYPED = ("image", "prompt")


def take_typed() -> dict[str, str]:
    """Remove the settings that are taken as typed from the command line and return them."""
    pairs = [argument.partition("=") for argument in sys.argv[1:]]
    typed = {key: value for key, separator, value in pairs if separator and key in AS_TYPED}
    sys.argv[1:] = ["".join(pair) for pair in pairs if not (pair[0] in typed and pair[1])]
    return {key: value for key, value in typed.items() if value != "null"}


def main(typed: dict[str, str], cfg: DictConfig) -> None:
    from cobra.config import GenerateConfig, as_config

    config = replace(as_config(GenerateConfig, cfg), **typed)

    from _terminal import TerminalChat

    import cobra
    from cobra.ops import use_backend

    logging.getLogger("cobra").setLevel(logging.WARNING)  # which kernels are used is no part of a chat
    with use_backend(config.ops):
        vlm = cobra.load(config.load, **config.load_options)
        chat = TerminalChat(vlm, config)
        if config.prompt is None:
            sys.exit(chat.run())
        chat.answer(config.prompt)


if __name__ == "__main__":
    launch("generate", partial(main, take_typed()))
