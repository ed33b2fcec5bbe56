"""What `--help` shows: Hydra's page, with the groups that this script has, and its settings as they are typed."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from io import StringIO

import _environment  # noqa: F401
from _command_line import ALIASES
from _configs import CONFIGS
from omegaconf import OmegaConf


def show_help(config_name: str, run: Callable[[], object]) -> None:
    """Let Hydra write its page of help, and print what is left of it."""
    with redirect_stdout(StringIO()) as page, suppress(SystemExit):  # Hydra ends the process when it has written
        run()
    print(readable(page.getvalue(), config_name), end="")


def readable(page: str, config_name: str) -> str:
    """Return Hydra's page without the groups that change nothing here."""
    before, groups, after = re.split(r"(?<=\n)(Groups .*?\n\n)(?=Settings)", page, maxsplit=1, flags=re.DOTALL)
    heading, *lines = groups.strip().splitlines()
    kept = [line for line in lines if line and _applies(line.split(":")[0], config_name)]
    if kept:
        before += "\n".join([heading, "", *kept, "", ""])
    for alias, name in ALIASES.get(config_name, {}).items():
        after = re.sub(rf"^{re.escape(name)}:", f"{alias}:", after, flags=re.MULTILINE)
    return before + re.sub(r": \?\?\?$", ": (must be given)", after, flags=re.MULTILINE)


def _applies(group: str, config_name: str) -> bool:
    if config_name == "pretrain":  # takes all, and groups of the user's own
        return group != "cli"
    defaults = OmegaConf.load(CONFIGS / f"{config_name}.yaml").defaults
    return group != "cli" and group.split("/")[0] in {key for entry in defaults if entry != "_self_" for key in entry}
