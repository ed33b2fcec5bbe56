"""What `--help` shows: Hydra's page, with the groups that this script has, and its settings as they are typed."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from io import StringIO

import _environment  # noqa: F401
from _command_line import ALIASES
from _configs import typed_group


def show_help(config_name: str, run: Callable[[], object]) -> None:
    """Let Hydra write its page of help, and print what is left of it."""
    with redirect_stdout(StringIO()) as page, suppress(SystemExit):  # Hydra ends the process when it has written
        run()
    print(readable(page.getvalue(), config_name), end="")


def readable(page: str, config_name: str) -> str:
    """Return Hydra's page without the groups that change nothing here."""
    parts = re.fullmatch(r"(.*?)\n*\nGroups [^\n]*\n(.*)\nSettings (.*)", page, flags=re.DOTALL)
    if parts is None:  # of another template
        return page
    before, groups, after = parts.groups()
    lines = [line.partition(":") for line in groups.splitlines() if line]
    kept = [f"  {typed}:{choices}" for group, _, choices in lines if (typed := typed_group(group, config_name))]
    if kept:
        before += "\n".join(["\n\nGroups (group=choice)", *kept])
    for alias, name in ALIASES.get(config_name, {}).items():
        after = re.sub(rf"^{re.escape(name)}:", f"{alias}:", after, flags=re.MULTILINE)
    after = re.sub(r": \?\?\?$", ": (must be given)", after, flags=re.MULTILINE)
    return f"{before}\n\nSettings {after.rstrip()}\n"
