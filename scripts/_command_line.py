"""What was typed, before Hydra runs: other names of settings, several benchmarks, and clear words for what is wrong."""

from __future__ import annotations

import re
import sys
from typing import Any

import _environment  # noqa: F401
import hydra
from _configs import CONFIGS, choices, find_own_configs, groups, typed_group
from _leaving import fail, is_one_of_several
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf

# Hydra takes `model=...` for a choice in the config group of that name; where one is loaded, the setting is `load`.
ALIASES = {
    "evaluate": {"model": "load", "data_root": "paths.data"},
    "score": {"data_root": "paths.data"},
    "generate": {"model": "load"},
    "demo": {"model": "load"},
    "serve": {"model": "load"},
    "prepare": {"data": "sets", "benchmark": "benchmarks", "data_root": "paths.data", "--dry-run": "dry_run=true"},
}
# Other spellings, understood and never shown.
_SYNONYMS = {
    "pretrain": {"data_root": "paths.data"},
    "evaluate": {"benchmark.limit": "limit", "benchmark.subset": "subset"},
}
# What makes a config with mandatory choices compose when only its keys matter.
_SOME_CHOICE = {"evaluate": ["benchmark=easyvqa"], "score": ["benchmark=gqa"]}

NINE: tuple[str, ...] = ("vqav2", "gqa", "vizwiz", "textvqa", "vsr", "pope", "refcoco")  # refcoco is three


def use_own_names(config_name: str) -> None:
    """Put the settings' own names into the command line, where others were typed."""
    for alias, name in (ALIASES.get(config_name, {}) | _SYNONYMS.get(config_name, {})).items():
        sys.argv[1:] = [renamed(argument, alias, name) for argument in sys.argv[1:]]


def renamed(argument: str, alias: str, name: str) -> str:
    """Put the setting's name for its alias. A flag stands for the whole setting; several names become a list."""
    if argument == alias and alias.startswith("--"):
        return name
    key, separator, value = argument.partition("=")
    if key != alias or not separator:
        return argument
    return f"{name}=[{value.strip('[]')}]" if name in ("sets", "benchmarks") else f"{name}={value}"


def unaliased(message: str, config_name: str) -> str:
    """Name settings as the user typed them."""
    for alias, name in ALIASES.get(config_name, {}).items():
        message = re.sub(rf"\b{re.escape(name)}(?= is not set|=)", alias, message)
    return message


def take_rerun() -> str | None:
    """Remove `--rerun FILE` or `--rerun=FILE` from the command line and return FILE."""
    for i, argument in enumerate(sys.argv):
        if argument.startswith("--rerun="):
            return sys.argv.pop(i).removeprefix("--rerun=")
        if argument == "--rerun":
            if i + 1 == len(sys.argv):
                fail("--rerun needs a run folder's config.yaml: --rerun runs/tiny/config.yaml")
            del sys.argv[i]
            return sys.argv.pop(i)
    return None


def take_benchmarks() -> list[str]:
    """Of `benchmark=all`, `benchmark=[a,b]` or `benchmark=a,b`, return the names and leave the first one's to Hydra.

    A --multirun is a sweep, with a run of its own for each. Of two such settings the last one counts, as in Hydra.
    """
    *earlier, place = [None, *(i for i, argument in enumerate(sys.argv) if argument.startswith("benchmark="))]
    if place is None:
        return []
    text = sys.argv[place].removeprefix("benchmark=").strip("[]")
    names = list(NINE) if text == "all" else list(dict.fromkeys(name.strip() for name in text.split(",")))
    is_sweep = bool({"--multirun", "-m"} & set(sys.argv))
    sys.argv[place] = f"benchmark={','.join(names) if is_sweep else names[0]}"
    sys.argv = [argument for i, argument in enumerate(sys.argv) if i not in earlier]
    return [] if is_sweep or len(names) == 1 else names


def check(config_name: str, names: list[str]) -> tuple[list[str], list[Any]]:
    """Compose once, with Hydra's messages shortened and the nearest valid name added, before Hydra itself runs.

    Args:
        config_name: of the script.
        names: of benchmarks, where there are several.

    Returns: the keys that a --multirun sweeps over, and the settings of each of the benchmarks.
    """
    _check_options()
    arguments = get_args_parser().parse_args()
    find_own_configs(arguments.config_dir)
    if arguments.help:  # shows the settings as composed, which needs every mandatory choice
        chosen = {override.split("=", 1)[0] for override in arguments.overrides}
        sys.argv += [choice for choice in _SOME_CHOICE.get(config_name, []) if choice.split("=")[0] not in chosen]
        return [], []
    if arguments.multirun and is_one_of_several():
        fail(
            "--multirun below torchrun or srun would start the whole sweep in every process. Start it plainly, which "
            "uses all GPUs for each run, or with hydra/launcher=submitit_slurm (docs/clusters.md)."
        )
    if arguments.hydra_help or arguments.shell_completion or arguments.config_path or arguments.config_name:
        return [], []
    benchmark = ""
    try:
        parsed = OverridesParser.create().parse_overrides(arguments.overrides)
        for override in parsed:
            _check_added_key(override.input_line or "")
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            values = [_one_value(override) for override in parsed]
            if not names:
                hydra.compose(config_name, overrides=values)
            others = [value for value in values if not value.startswith("benchmark=")]
            benchmarks: list[Any] = []
            for name in names:
                benchmark = f"benchmark={name}"
                composed = hydra.compose(config_name, overrides=[*others, benchmark])
                benchmarks.append(OmegaConf.to_container(composed.benchmark, resolve=True))
        swept = [(override.input_line or "").split("=", 1)[0] for override in parsed if override.is_sweep_override()]
        if arguments.multirun and config_name == "evaluate":
            _check_outputs(parsed, swept)
        return swept, benchmarks
    except MissingConfigException as error:
        fail(_explain_missing(error))
    except HydraException as error:
        hint = f" ({benchmark}: settings go to each of the benchmarks.)" if benchmark else ""
        fail(explain_override(str(error), config_name, benchmark) + hint)


def _check_options() -> None:
    """Refuse options that Hydra does not have under this very name.

    argparse takes beginnings of names: `--experiment` would be Hydra's --experimental-rerun, which reads a pickle and
    so runs whatever is in it. That one is refused in full, too: --rerun repeats a run.
    """
    known = {name for action in get_args_parser()._actions for name in action.option_strings} - {"--experimental-rerun"}
    for argument in sys.argv[1:]:
        name = argument.split("=", 1)[0]
        if name.startswith("--") and name not in known:
            plus = "+" * (name == "--experiment")
            fail(f"There is no option {name}. Settings are written without dashes: {plus}{name[2:]}=...")


def _check_outputs(parsed: list[Override], swept: list[str]) -> None:
    """Refuse a folder that all evaluations of a sweep would share: the second would find the first one's answers."""
    outputs = [text for override in parsed if (text := override.input_line or "").startswith("output=")]
    if swept and "output" not in swept and outputs and "${" not in outputs[-1]:
        fail(
            f"{outputs[-1]} is one folder for all evaluations of this sweep, and each needs its own. Leave it out for "
            "results/<benchmark>/<model>, or name what is swept in it, such as 'output=OUT/${benchmark.name}'; several "
            "benchmarks without --multirun get folders below it."
        )


def _check_added_key(override: str) -> None:
    """Hydra would take a misspelt `+group=choice` for a new setting."""
    from cobra.config import nearest

    added = re.match(r"\++([\w/]+)=", override)
    if added and added.group(1) not in groups():
        fail(f"There is no group '{added.group(1)}' to add.{nearest(added.group(1), groups())}")


def _one_value(override: Override) -> str:
    """Return the override itself; of a sweep, its first value stands for all."""
    text = override.input_line or ""
    if not override.is_sweep_override():
        return text
    key, value = text.split("=", 1)[0], override.value()
    if isinstance(value, IntervalSweep):  # for a sweeper that searches
        return f"{key}={value.start}"
    if isinstance(value, Glob):
        fitting = value.filter(choices(override.key_or_group))
        if not fitting:
            fail(f"{text}: nothing fits; there are {', '.join(choices(override.key_or_group)) or 'no choices'}.")
        return f"{key}={fitting[0]}"
    return f"{key}={next(iter(override.sweep_string_iterator()))}"


def _explain_missing(error: MissingConfigException) -> str:
    from cobra.config import nearest

    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    options = [option for option in error.options or [] if option]
    if options:
        return f"There is no '{choice}' in {group}.{nearest(choice, options)} Choose one of: {', '.join(options)}."
    return str(error).splitlines()[0]


def explain_override(message: str, config_name: str, benchmark: str = "") -> str:
    """Shorten Hydra's message and add the nearest key or group to it."""
    from cobra.config import flatten, nearest

    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if lines[0].startswith("You must specify"):
        several = ", several as benchmark=NAME,NAME, or benchmark=all" * (config_name == "evaluate")
        return f"Name a benchmark: benchmark=NAME{several}. Choose from: {', '.join(lines[2:])}."
    wrong = re.search(r"Could not override '(?:.*: )?([^'@]+)|Key '([^']+)' is not in struct", lines[0])
    if wrong is None:
        return lines[0]
    chosen = [benchmark] if benchmark else _SOME_CHOICE.get(config_name, [])
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config: Any = OmegaConf.to_container(hydra.compose(config_name, overrides=chosen))
    name = wrong.group(1) or wrong.group(2)
    typed = typed_group(name, config_name) if name in groups() else None
    if typed == f"+{name}":
        return f"'{name}' is not chosen by default, so it is added with a plus: +{name}=..."
    if typed not in (None, name):
        return f"'{name}' is written {typed}=... here."
    known = [*flatten(config), *config, *groups(), *ALIASES.get(config_name, {})]
    return f"There is no setting or group '{name}'.{nearest(name, known)}"
