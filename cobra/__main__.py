"""The command `cobra NAME ...`, also `python -m cobra NAME ...`: runs scripts/NAME.py, from a clone or the wheel."""

from __future__ import annotations

import ast
import os
import runpy
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# The wheel carries both folders inside the package.
SCRIPTS = next(folder for folder in (_PACKAGE / "scripts", _PACKAGE.parent / "scripts") if folder.is_dir())
CONFIGS = SCRIPTS.parent / "configs"

_NAMES = {"generate": "chat"}  # script: its command, where that has another name


def main() -> None:
    """Run the command that the command line names."""
    scripts = commands()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_help(scripts))
        return
    if name in ("-V", "--version"):
        from importlib.metadata import version

        print(version("cobra-vlm"))
        return
    name = _NAMES.get(name, name)  # a script's name is understood, too
    if name in ("-sc", "--shell-completion"):
        name, arguments = _completed_command(), ["-sc", *arguments]
        if not (CONFIGS / f"{scripts.get(name, Path(name)).stem}.yaml").is_file():  # Hydra completes its own alone
            print(" ".join([] if name in scripts else scripts))
            return
    if name not in scripts:
        from cobra.config import nearest

        sys.exit(f"error: There is no command '{name}'.{nearest(name, scripts)} Choose one of: {', '.join(scripts)}.")
    sys.argv = ["cobra", *arguments]
    sys.path.insert(0, str(SCRIPTS))  # as `python scripts/NAME.py` does
    runpy.run_path(str(scripts[name]), run_name="__main__")


def commands() -> dict[str, Path]:
    """Return all commands with their scripts. Those that make Cobra's own assets, and helpers, are none."""
    files = sorted(file for file in SCRIPTS.glob("*.py") if not file.name.startswith(("_", "make_")))
    return dict(sorted((_NAMES.get(file.stem, file.stem), file) for file in files))


def _help(scripts: dict[str, Path]) -> str:
    lines = [f"  {name:<10} {_summary(file)}" for name, file in scripts.items()]
    return "\n".join(
        [
            "Cobra: Mamba vision-language models.   cobra COMMAND ...\n",
            *lines,
            "\n`cobra COMMAND --help` shows settings and examples. Data, runs and results are folders of the working",
            'directory. `cobra --version` tells this one. Shell completion: eval "$(cobra -sc install=bash)"',
        ]
    )


def _summary(script: Path) -> str:
    """Return the first sentence of the script, without running it."""
    return (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").partition(". ")[0]


def _completed_command() -> str:
    """Return the command of the line that the shell completes, and take it out: Hydra expects settings alone."""
    line = os.environ.get("COMP_LINE")
    if line is None:  # the shell is being prepared, which is the same for all commands
        return "pretrain"
    program, _, rest = line.lstrip().partition(" ")
    name, typed, settings = rest.lstrip().partition(" ")
    os.environ["COMP_LINE"] = f"{program} {settings}"
    return name if typed else ""


if __name__ == "__main__":
    main()
