"""The command `python -m cobra.describe +experiment=cobra-3b --world-size 8`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Any

from cobra.__main__ import SCRIPTS
from cobra.config import PretrainConfig, as_config
from cobra.describe import TEXT_TOKENS, describe


def main() -> None:
    """Read the command line, compose the config as `scripts/pretrain.py` does, and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m cobra.describe",
        usage="%(prog)s [--world-size N] [--text-tokens N] [+experiment=NAME] [group=choice] [key=value]",
        description="What a config of scripts/pretrain.py costs, without weights: parameters, FLOPs, memory, limits.",
        epilog="Groups and settings are those of `cobra pretrain --help`; a finished run is described by "
        "--rerun runs/NAME/config.yaml.",
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="GPUs that share a step (default: 1)")
    parser.add_argument(
        "--text-tokens",
        type=int,
        metavar="N",
        help=f"of a training example (default: {TEXT_TOKENS}, at most max_length)",
    )
    options, sys.argv[1:] = parser.parse_known_args()

    def show(cfg: Any) -> None:
        config = as_config(PretrainConfig, cfg)
        found = describe(config, world_size=options.world_size, text_tokens=options.text_tokens)
        sys.stdout.write(f"{found}\n")

    # The library itself never composes configs: this command borrows the scripts' way to do it, errors included.
    sys.path.insert(0, str(SCRIPTS))
    import_module("_launch").launch("pretrain", show)


if __name__ == "__main__":
    main()
