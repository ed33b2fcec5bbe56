"""How every script starts: Hydra composes, `cobra.config` checks, errors are one line."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _environment  # noqa: F401
import _submitit
import hydra
from _command_line import check, explain_override, take_benchmarks, take_rerun, unaliased, use_own_names
from _configs import CONFIGS, find_own_modules
from _help import show_help
from _leaving import fail, is_one_of_several, leave, this_rank
from _ranks import follow_parent, is_started_rank
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

# Idle OpenMP threads must sleep: spinning ones take the cores away from the kernels' own threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What to do when memory runs out.
_LESS_MEMORY = {
    "pretrain": "Lower train.per_device_batch_size, which leaves the global batch as it is, or see "
    "docs/training.md#memory for what else saves memory.",
    "prepare": "Lower jobs.",
    "score": "Close other programs.",
}
_LESS_OF_A_MODEL = "Choose dtype=bfloat16, quantize=int8 or int4, or another device."


def launch(config_name: str, main: Callable[[DictConfig], Any]) -> None:
    """Run `main(composed config)` for the command line; every error of Cobra's or Hydra's ends in one clear line."""
    follow_parent()
    _setup_logging()
    with _ending_at_ctrl_c():
        _launch(config_name, main)


def _launch(config_name: str, main: Callable[[DictConfig], Any]) -> None:
    find_own_modules()
    rerun = take_rerun() if config_name in ("pretrain", "evaluate") else None
    use_own_names(config_name)
    names = take_benchmarks() if config_name == "evaluate" else []
    if rerun is not None:
        Task(config_name, main)(_load_rerun(rerun, sys.argv[1:]))
        return
    swept, benchmarks = check(config_name, names)
    task = Task(config_name, main, swept=swept, benchmarks=benchmarks)
    _submitit.let_jobs_import_scripts()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us as they are
    with _errors_in_one_line(config_name):
        run = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(task)
        show_help(config_name, run) if {"--help", "-h"} & {*sys.argv} else run()


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
        from cobra.errors import Interrupted

        try:
            if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
                _name_sweep_job(cfg, self.swept)
            if self.benchmarks:
                OmegaConf.set_struct(cfg, False)
                cfg.benchmark = self.benchmarks
            return self.main(cfg)
        except _Stopped as stopped:  # in here, as a job is requeued by an Interrupted
            raise Interrupted(str(stopped)) from None


@contextmanager
def _errors_in_one_line(config_name: str) -> Iterator[None]:
    """End the process with one line and the error's exit code if something fails."""
    from cobra.errors import CTRL_C, STOPPED_EARLY, CobraError, Interrupted

    try:
        yield
    except _Stopped as stopped:  # just before or after the work
        logging.getLogger("cobra").info("%s", stopped)
        leave(STOPPED_EARLY)
    except Interrupted as error:
        if str(error):
            logging.getLogger("cobra").info("%s", error)
        leave(error.exit_code)
    except HydraException as error:
        fail(explain_override(str(error), config_name))
    except CobraError as error:
        fail(unaliased(str(error), config_name), error.exit_code)
    except BrokenPipeError:  # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(0)
    except OSError as error:  # a folder that cannot be written, a full disk
        fail(f"{error.filename or 'The system'}: {error.strerror or error}. Check the folder, or choose another one.")
    except KeyboardInterrupt:
        logging.getLogger("cobra").info("Interrupted.")
        leave(CTRL_C)
    except Exception as error:
        if _submitit.is_about_a_job(error):
            fail(_submitit.explain(error))
        from cobra.eval.memory import first_line, is_out_of_memory

        if is_out_of_memory(error):
            fail(f"The memory is too small: {first_line(error)} {_LESS_MEMORY.get(config_name, _LESS_OF_A_MODEL)}")
        if not is_one_of_several():
            raise
        traceback.print_exc()
        leave(1)


class _Stopped(BaseException):
    """Of a signal. No `except Exception` of a library, while it is imported for example, may take it for its own."""


@contextmanager
def _ending_at_ctrl_c() -> Iterator[None]:
    """Until the work begins, let Ctrl-C end the process without the traceback of an import."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, in the background of a shell
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _setup_logging() -> None:
    from cobra.errors import ConfigError
    from cobra.runtime import setup_logging

    try:
        setup_logging(this_rank())
    except ConfigError as error:  # what the environment says of the ranks
        setup_logging()
        logging.getLogger("cobra").error("error: %s", error)
        sys.exit(1)


def _load_rerun(file: str, overrides: list[str]) -> DictConfig:
    """Read a run folder's config.yaml, with `key=value` changes on top."""
    if not Path(file).is_file():
        fail(f"--rerun {file}: no such file; give a run folder's config.yaml.")
    wrong = [override for override in overrides if not re.match(r"[\w.]+=", override)]
    if wrong:
        fail(f"--rerun takes a file and key=value changes of its settings, not {' '.join(wrong)}.")
    try:
        return OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_dotlist(overrides))  # type: ignore[return-value]
    except (YAMLError, OmegaConfBaseException) as error:
        fail(f"--rerun {file}: {str(error).splitlines()[0]}")


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
