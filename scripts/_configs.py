"""Where configs are: Cobra's own, and a folder of the user's."""

from __future__ import annotations

import filecmp
import logging
import sys
from pathlib import Path

import _environment  # noqa: F401
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
OWN = Path("configs")  # of the working directory


class OwnConfigs(SearchPathPlugin):
    """What Hydra composes from besides Cobra's configs: `--config-dir` comes before them, `configs/` behind."""

    first: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folders; Hydra calls it whenever it is about to compose."""
        if self.first is not None and self.first.is_dir():  # if it is not, Hydra says so
            search_path.prepend("--config-dir", f"file://{self.first.resolve()}")
        if OWN.is_dir() and OWN.resolve() != CONFIGS:
            search_path.append("configs", f"file://{OWN.resolve()}")


def find_own_modules() -> None:
    """Let a config of the user's own name a class in a module beside its folder: `_target_: module.Class`."""
    if OWN.is_dir():
        sys.path.append(str(Path.cwd()))  # behind everything that is installed


def find_own_configs(config_dir: str | None) -> None:
    """Let everything that is composed from now on see the user's own configs, too."""
    OwnConfigs.first = Path(config_dir) if config_dir else None
    Plugins.instance().register(OwnConfigs)
    if OWN.is_dir() and OWN.resolve() not in (CONFIGS, OwnConfigs.first and OwnConfigs.first.resolve()):
        for file in sorted(OWN.rglob("*.yaml")):
            known = CONFIGS / file.relative_to(OWN)
            if known.is_file() and not filecmp.cmp(file, known, shallow=False):
                logging.getLogger("cobra").warning(
                    "%s is not used: Cobra has a file of that name. Rename it, or give --config-dir %s.", file, OWN
                )


def config_folders() -> list[Path]:
    """Return all folders that are there, in the order in which Hydra looks into them."""
    return [folder for folder in (OwnConfigs.first, CONFIGS, OWN) if folder is not None and folder.is_dir()]


def has_config(name: str) -> bool:
    """Whether there is a config such as `data/mine`."""
    return any((folder / f"{name}.yaml").is_file() for folder in config_folders())


def groups() -> list[str]:
    """Return the config groups of all folders, such as `model/llm`."""
    paths = [path.relative_to(folder) for folder in config_folders() for path in folder.rglob("*") if path.is_dir()]
    return [path.as_posix() for path in paths]


def choices(group: str) -> list[str]:
    """Return the names of a group's configs."""
    return sorted({file.stem for folder in config_folders() for file in (folder / group).glob("*.yaml")})


def typed_group(group: str, config_name: str) -> str | None:
    """Return how a group is chosen on a script's command line; None: it changes nothing there.

    What the defaults choose is written as they do, such as `benchmark@validation.benchmark`; pretrain takes more.
    """
    defaults = OmegaConf.load(CONFIGS / f"{config_name}.yaml").defaults
    written = {key.split("@")[0]: key for entry in defaults if entry != "_self_" for key in entry}
    top = group.split("/")[0]
    if top == "cli" or (top not in written and config_name != "pretrain"):
        return None
    return written.get(group, group if top in written else f"+{group}")
