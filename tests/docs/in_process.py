"""Scripts in this process, started as Python would start them: to their end, or up to the typed door."""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import hydra
import pytest
from code_blocks import ROOT
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override

import cobra.config

PLUGINS = {
    "hydra/sweeper=optuna": "hydra_plugins.hydra_optuna_sweeper",
    "hydra/launcher=submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
}
SHOWS = {"--help", "-h", "--cfg", "--info", "-sc", "-m cobra.ops"}  # something, and runs nothing

# Two steps, so that a model is there; what it answers says nothing.
SMALL_TRAINING = [
    "train.max_steps=2",
    "train.global_batch_size=8",
    "train.per_device_batch_size=8",
    "train.log_every=1",
    "parallel.device=cpu",
]


class Checked(BaseException):
    """The command's settings are what they may be; it would begin its work now."""


@contextmanager
def as_new() -> Iterator[pytest.MonkeyPatch]:
    """What scripts change for all of a process is put back behind them."""
    levels = {log: log.level for log in (logging.getLogger(), logging.getLogger("cobra"))}
    with pytest.MonkeyPatch.context() as changes:
        for folder in ("benchmarks", "scripts"):
            changes.syspath_prepend(str(ROOT / folder))
        changes.setenv("HYDRA_FULL_ERROR", "1")
        changes.setattr(sys, "argv", sys.argv)
        try:
            yield changes
        finally:
            for log, level in levels.items():
                log.setLevel(level)
            GlobalHydra.instance().clear()
            HydraConfig.instance().cfg = None
            if "_configs" in sys.modules:
                sys.modules["_configs"].OwnConfigs.first = None


def run(script: str, arguments: list[str]) -> int:
    """Run `scripts/NAME.py` or `-m MODULE` to its end. Returns: its exit code."""
    with as_new():
        return start(script, arguments)


def start(script: str, arguments: list[str]) -> int:
    sys.argv = [script, *arguments]
    try:
        if script.startswith("-m "):
            module = script.removeprefix("-m ")
            sys.modules.pop(f"{module}.__main__", None)
            runpy.run_module(module, run_name="__main__")
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def check(script: str, arguments: list[str]) -> None:
    """Run a script up to where its settings have been composed and checked; of a sweep, each of its runs.

    Raises:
        AssertionError: it ends before.
    """
    with as_new() as changes:
        stop_at_the_door(changes)
        is_show = bool(SHOWS & {script, *arguments})
        if not is_show:
            compose_once(changes)
        for single in single_runs(script, arguments):
            try:
                code = start(script, single)
            except Checked:
                continue
            assert code == 0, f"ends with exit code {code}"
            assert is_show, "does not check its settings"


def stop_at_the_door(changes: pytest.MonkeyPatch) -> None:
    """Let every script end as soon as its settings, or its options if it has no configs, have passed."""
    as_config, parse_args = cobra.config.as_config, argparse.ArgumentParser.parse_args

    def checked_config(schema: Any, config: Any) -> None:
        as_config(schema, config)
        raise Checked

    def checked_options(parser: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        found = parse_args(parser, *args, **options)
        if parser.description == "Hydra":
            return found
        raise Checked

    changes.setattr(cobra.config, "as_config", checked_config)
    changes.setattr(argparse.ArgumentParser, "parse_args", checked_options)


def compose_once(changes: pytest.MonkeyPatch) -> None:
    """Let Hydra hand on what the look at the command line has composed already, which halves the time."""
    compose: Callable[..., Any] = hydra.compose
    composed: list[Any] = []

    def remember(*args: Any, **options: Any) -> Any:
        composed.append(compose(*args, **options))
        return composed[-1]

    changes.setattr(hydra, "compose", remember)
    changes.setattr(hydra, "main", lambda **_: lambda task: lambda: task(composed[-1]))


def single_runs(script: str, arguments: list[str]) -> list[list[str]]:
    """Return command lines in which each of a sweep's values is once, when the sweep's own settings are composed."""
    if not {"--multirun", "-m"} & {*arguments}:
        return [arguments]
    name, given = (arguments[:1], arguments[1:]) if script == "-m cobra" else ([], arguments)
    overrides = get_args_parser().parse_args(given).overrides
    parsed = OverridesParser.create().parse_overrides(overrides)
    is_hydras = [override.key_or_group.split(".")[0].split("/")[0] == "hydra" for override in parsed]
    if all(find_spec(plugin) for word, plugin in PLUGINS.items() if word in overrides):
        with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            own = [override.input_line or "" for override, is_own in zip(parsed, is_hydras, strict=True) if is_own]
            hydra.compose("pretrain", overrides=own, return_hydra_config=True)
    swept = [values(override) for override, is_own in zip(parsed, is_hydras, strict=True) if not is_own]
    longest = max(map(len, swept))
    return [[*name, *(found[min(place, len(found) - 1)] for found in swept)] for place in range(longest)]


def values(override: Override) -> list[str]:
    """Return the override itself, or what a sweep makes of it; of an interval, where it begins."""
    text = override.input_line or ""
    if not override.is_sweep_override():
        return [text]
    found = override.value()
    each = [found.start] if isinstance(found, IntervalSweep) else override.sweep_string_iterator()
    return [f"{text.split('=', 1)[0]}={value}" for value in each]
