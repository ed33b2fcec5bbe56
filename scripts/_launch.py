"""How every script starts: Hydra composes, the typed door checks, errors are one line."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import _environment  # noqa: F401
import _submitit
import hydra
from _configs import CONFIGS, find_own_configs, find_own_modules, groups
from _ranks import follow_parent, is_started_rank
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

# Idle OpenMP threads must sleep: spinning ones take the cores away from the kernels' own threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Hydra takes `model=...` for a choice in the config group of that name; where one is loaded, the setting is `load`.
_ALIASES = {
    "evaluate": {"model": "load", "data_root": "paths.data"},
    "score": {"data_root": "paths.data"},
    "generate": {"model": "load"},
    "demo": {"model": "load"},
    "serve": {"model": "load"},
    "prepare": {"data": "sets", "benchmark": "benchmarks", "data_root": "paths.data", "--dry-run": "dry_run=true"},
}
# Other spellings, understood and never shown.
_SYNONYMS = {"evaluate": {"benchmark.limit": "limit", "benchmark.subset": "subset"}}
# What makes a config with mandatory choices compose when only its keys matter.
_SOME_CHOICE = {"evaluate": ["benchmark=easyvqa"], "score": ["benchmark=gqa"]}

# What to do when memory runs out.
_LESS_MEMORY = {
    "pretrain": "Lower train.per_device_batch_size, which leaves the global batch as it is, or see "
    "docs/training.md#memory for what else saves memory.",
    "prepare": "Lower jobs.",
    "score": "Close other programs.",
}
_LESS_OF_A_MODEL = "Choose dtype=bfloat16, quantize=int8 or int4, or another device."

NINE: tuple[str, ...] = (
    "vqav2",
    "gqa",
    "vizwiz",
    "textvqa",
    "vsr",
    "pope",
    "refcoco",
)  # the paper's benchmarks; refcoco is three


def launch(config_name: str, main: Callable[[DictConfig], Any]) -> None:
    """Run `main(composed config)` for the command line; every error of Cobra's or Hydra's ends in one clear line."""
    follow_parent()
    _setup_logging()
    with _ending_at_ctrl_c():
        _launch(config_name, main)


def _launch(config_name: str, main: Callable[[DictConfig], Any]) -> None:
    find_own_modules()
    rerun = _take_option("--rerun") if config_name in ("pretrain", "evaluate") else None
    for alias, name in (_ALIASES.get(config_name, {}) | _SYNONYMS.get(config_name, {})).items():
        sys.argv[1:] = [_renamed(argument, alias, name) for argument in sys.argv[1:]]
    names = _take_benchmarks() if config_name == "evaluate" else []
    if rerun is not None:
        Task(config_name, main)(_load_rerun(rerun, sys.argv[1:]))
        return
    swept, benchmarks = _check_command_line(config_name, names)
    task = Task(config_name, main, swept=swept, benchmarks=benchmarks)
    _submitit.let_jobs_import_scripts()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us as they are
    with _errors_in_one_line(config_name):
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(task)()


def _renamed(argument: str, alias: str, name: str) -> str:
    """Put the setting's name for its alias. A flag stands for the whole setting; several names become a list."""
    if argument == alias:
        return name
    key, separator, value = argument.partition("=")
    if key != alias or not separator:
        return argument
    return f"{name}=[{value.strip('[]')}]" if name in ("sets", "benchmarks") else f"{name}={value}"


@dataclass
class Task:
    """What Hydra runs for each composed config: in this process, or pickled, as a job of the submitit launcher."""

    config_name: str
    main: Callable[[DictConfig], Any]
    swept: list[str] = field(default_factory=list[str])  # keys that a --multirun sweeps over
    benchmarks: list[Any] = field(default_factory=list[Any])  # composed, where there are several of them
    is_job: bool = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"is_job": True}

    def __call__(self, cfg: DictConfig) -> Any:
        """Run `main`; a job's error goes back to the process that submitted it, any other one ends the process.

        Returns: what `main` does, which a sweeper that searches makes small or large.
        """
        _setup_logging()
        if self.is_job:
            with _submitit.errors_in_log(), _stoppable(), _submitit.requeued_when_stopped():
                return self._run(cfg)
        else:
            with _errors_in_one_line(self.config_name), _stoppable():
                return self._run(cfg)

    def _run(self, cfg: DictConfig) -> Any:
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            _name_sweep_job(cfg, self.swept)
        if self.benchmarks:
            OmegaConf.set_struct(cfg, False)
            cfg.benchmark = self.benchmarks
        with _as_interrupted():  # in here, as a job is requeued by an Interrupted
            return self.main(cfg)


@contextmanager
def _errors_in_one_line(config_name: str) -> Iterator[None]:
    """End the process with one line and the error's exit code if something fails."""
    from cobra.errors import CTRL_C, CobraError, Interrupted

    try:
        yield
    except Interrupted as error:
        if str(error):
            logging.getLogger("cobra").info("%s", error)
        _leave(error.exit_code)
    except HydraException as error:
        _fail(_explain_override(str(error), config_name))
    except CobraError as error:
        _fail(_unaliased(str(error), config_name), error.exit_code)
    except BrokenPipeError:  # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(0)
    except OSError as error:  # a folder that cannot be written, a full disk
        _fail(f"{error.filename or 'The system'}: {error.strerror or error}. Check the folder, or choose another one.")
    except KeyboardInterrupt:
        _fail("Interrupted.", CTRL_C)
    except Exception as error:
        if _submitit.is_about_a_job(error):
            _fail(_submitit.explain(error))
        from cobra.eval.memory import first_line, is_out_of_memory

        if is_out_of_memory(error):
            _fail(f"The memory is too small: {first_line(error)} {_LESS_MEMORY.get(config_name, _LESS_OF_A_MODEL)}")
        if not _is_one_of_several():
            raise
        traceback.print_exc()
        _leave(1)


class _Stopped(BaseException):
    """Of a signal. No `except Exception` of a library, while it is imported for example, may take it for its own."""


@contextmanager
def _as_interrupted() -> Iterator[None]:
    from cobra.errors import Interrupted

    try:
        yield
    except _Stopped as stopped:
        raise Interrupted(str(stopped)) from None


@contextmanager
def _ending_at_ctrl_c() -> Iterator[None]:
    """Until the work begins, let Ctrl-C end the process without the traceback of an import."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it may be ignored, in the background of a shell
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Until the training itself takes care of them, let SIGTERM and SIGUSR1 end the process as calmly as Ctrl-C."""
    if is_started_rank():  # they end it at once, and its parent says so
        yield
        return

    def stop(number: int, _frame: object) -> None:
        raise _Stopped(f"Stopped by {signal.Signals(number).name}; the same command goes on.")

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {number: signal.signal(number, stop) for number in numbers}
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with _as_interrupted():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _setup_logging() -> None:
    from cobra.errors import ConfigError
    from cobra.runtime import setup_logging

    try:
        setup_logging(_rank())
    except ConfigError as error:  # what the environment says of the ranks
        setup_logging()
        logging.getLogger("cobra").error("error: %s", error)
        sys.exit(1)


def _is_one_of_several() -> bool:
    from cobra.ranks import env_ranks

    return env_ranks() is not None


def _rank() -> int:
    from cobra.ranks import env_ranks

    return (env_ranks() or (0, 1))[0]


def _unaliased(message: str, config_name: str) -> str:
    """Name settings as the user typed them."""
    for alias, name in _ALIASES.get(config_name, {}).items():
        message = re.sub(rf"\b{re.escape(name)}(?= is not set|=)", alias, message)
    return message


def _take_option(name: str) -> str | None:
    """Remove `name VALUE` or `name=VALUE` from the command line and return VALUE."""
    for i, argument in enumerate(sys.argv):
        if argument == name and i + 1 < len(sys.argv):
            del sys.argv[i]
            return sys.argv.pop(i)
        if argument.startswith(f"{name}="):
            return sys.argv.pop(i).removeprefix(f"{name}=")
    return None


def _take_benchmarks() -> list[str]:
    """Of `benchmark=all`, `benchmark=[a,b]` or `benchmark=a,b`, return the names and leave the first one's to Hydra.

    A --multirun is a sweep, with a run of its own for each.
    """
    place = next((i for i, argument in enumerate(sys.argv) if argument.startswith("benchmark=")), None)
    if place is None:
        return []
    text = sys.argv[place].removeprefix("benchmark=").strip("[]")
    names = list(NINE) if text == "all" else list(dict.fromkeys(name.strip() for name in text.split(",")))
    is_sweep = bool({"--multirun", "-m"} & set(sys.argv))
    sys.argv[place] = f"benchmark={','.join(names) if is_sweep else names[0]}"
    return [] if is_sweep or len(names) == 1 else names


def _load_rerun(file: str, overrides: list[str]) -> DictConfig:
    """Read a run folder's config.yaml, with `key=value` changes on top."""
    if not Path(file).is_file():
        _fail(f"--rerun {file}: no such file; give a run folder's config.yaml.")
    wrong = [override for override in overrides if not re.match(r"[\w.]+=", override)]
    if wrong:
        _fail(f"--rerun takes a file and key=value changes of its settings, not {' '.join(wrong)}.")
    try:
        return OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_dotlist(overrides))  # type: ignore[return-value]
    except (YAMLError, OmegaConfBaseException) as error:
        _fail(f"--rerun {file}: {str(error).splitlines()[0]}")


def _name_sweep_job(cfg: DictConfig, swept: list[str]) -> None:
    """Give each job of a --multirun its own run folder, named after what is swept, never after a clock.

    `=` and `,` mean something on Hydra's command line, so the folder `tiny-run.seed-1` stands for run.seed=1. Swept
    experiments bring names of their own, by which one stage finds the one before.
    """
    overrides = HydraConfig.get().overrides.task
    if not any(text.lstrip("+").startswith("run.name=") for text in overrides):
        swept = [key for key in swept if key != "+experiment"]
    values = [text for text in overrides if text.split("=", 1)[0] in swept]
    if "run" in cfg and values and "run.name" not in swept:
        names = [re.sub(r"[^\w.-]", "-", value.lstrip("+")) for value in values]
        cfg.run.name = f"{cfg.run.name}-{'_'.join(names)}"


def _check_command_line(config_name: str, names: list[str]) -> tuple[list[str], list[Any]]:
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
    if arguments.multirun and _is_one_of_several():
        _fail(
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
        _fail(_explain_missing(error))
    except HydraException as error:
        hint = f" ({benchmark}: settings go to each of the benchmarks.)" if benchmark else ""
        _fail(_explain_override(str(error), config_name, benchmark) + hint)


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
            _fail(f"There is no option {name}. Settings are written without dashes: {plus}{name[2:]}=...")


def _check_outputs(parsed: list[Override], swept: list[str]) -> None:
    """Refuse a folder that all evaluations of a sweep would share: the second would find the first one's answers."""
    outputs = [text for override in parsed if (text := override.input_line or "").startswith("output=")]
    if swept and "output" not in swept and outputs and "${" not in outputs[-1]:
        _fail(
            f"{outputs[-1]} is one folder for all evaluations of this sweep, and each needs its own. Leave it out for "
            "results/<benchmark>/<model>, or name what is swept in it, such as 'output=OUT/${benchmark.name}'; several "
            "benchmarks without --multirun get folders below it."
        )


def _check_added_key(override: str) -> None:
    """Hydra would take a misspelt `+group=choice` for a new setting."""
    from cobra.config import nearest

    added = re.match(r"\++([\w/]+)=", override)
    if added and added.group(1) not in groups():
        _fail(f"There is no group '{added.group(1)}' to add.{nearest(added.group(1), groups())}")


def _one_value(override: Override) -> str:
    """Return the override itself; of a sweep, its first value stands for all."""
    text = override.input_line or ""
    if not override.is_sweep_override():
        return text
    value = override.value()
    if isinstance(value, IntervalSweep):  # for a sweeper that searches
        return f"{text.split('=', 1)[0]}={value.start}"
    return f"{text.split('=', 1)[0]}={next(iter(override.sweep_string_iterator()))}"


def _explain_missing(error: MissingConfigException) -> str:
    from cobra.config import nearest

    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    options = [option for option in error.options or [] if option]
    if options:
        return f"There is no '{choice}' in {group}.{nearest(choice, options)} Choose one of: {', '.join(options)}."
    return str(error).splitlines()[0]


def _explain_override(message: str, config_name: str, benchmark: str = "") -> str:
    """Shorten Hydra's message and add the nearest key or group to it."""
    from cobra.config import flatten, nearest

    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if lines[0].startswith("You must specify"):
        return (
            "Name a benchmark: benchmark=NAME, several as benchmark=NAME,NAME, or benchmark=all. "
            f"Choose from: {', '.join(lines[2:])}."
        )
    wrong = re.search(r"Could not override '(?:.*: )?([^'@]+)|Key '([^']+)' is not in struct", lines[0])
    if wrong is None:
        return lines[0]
    choices = [benchmark] if benchmark else _SOME_CHOICE.get(config_name, [])
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config: Any = OmegaConf.to_container(hydra.compose(config_name, overrides=choices))
    name = wrong.group(1) or wrong.group(2)
    if name in groups():
        return f"'{name}' is not chosen by default, so it is added with a plus: +{name}=..."
    return f"There is no setting or group '{name}'.{nearest(name, [*flatten(config), *config, *groups()])}"


def _fail(message: object, code: int = 1) -> NoReturn:
    if _rank() > 0:
        time.sleep(0.5)  # most often rank 0 says the same, and this rank is ended before it repeats it
    logging.getLogger("cobra").error("error: %s", message)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process. A rank ends at once: an orderly end could wait for the others, or for threads of theirs."""
    if _is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
