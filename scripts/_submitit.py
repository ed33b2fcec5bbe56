"""Jobs of Hydra's submitit launcher: where the task runs in another process, which submitit has started for it."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cobra.errors import CobraError, Interrupted

_NO_SLURM = 'Could not detect "srun"'  # a plain RuntimeError of submitit's


def let_jobs_import_scripts() -> None:
    """A job gets its task pickled and has to find the modules that it names, such as `_launch`."""
    paths = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)


@contextmanager
def requeued_when_stopped() -> Iterator[None]:
    """In a job: when SLURM is about to end it, save first, then let submitit put it back into the queue.

    submitit itself would leave at once. Its signal becomes the one that training saves at, and its own handling of
    the signal comes last.
    """
    number = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}")
    requeue = signal.getsignal(number)
    announced: list[int] = []

    def save(_number: int, _frame: object) -> None:
        announced.append(number)
        signal.raise_signal(signal.SIGUSR1 if number != signal.SIGUSR1 else signal.SIGTERM)

    signal.signal(number, save)
    try:
        yield
    except Interrupted:
        if announced and callable(requeue):
            requeue(number, None)  # ends the process where it could requeue the job
        raise
    finally:
        signal.signal(number, requeue)


@contextmanager
def errors_in_log() -> Iterator[None]:
    """In a job: write the error to the job's log too, which otherwise only the submitting process shows."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        bug = not isinstance(error, CobraError)
        logging.getLogger("cobra").error("error: %s", error, exc_info=bug)
        raise


def is_about_a_job(error: Exception) -> bool:
    """Whether submitit itself reports that a job has ended without a result, killed for example, or cannot be had."""
    return type(error).__module__.startswith("submitit.") or _NO_SLURM in str(error)


def explain(error: Exception) -> str:
    """Return submitit's report in one line, with the place of the job's log."""
    if _NO_SLURM in str(error):
        return (
            "hydra/launcher=submitit_slurm needs SLURM, and there is no srun here. Start it on a login node of the "
            "cluster, or choose hydra/launcher=submitit_local."
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    logs = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    return f"A job of the sweep has failed: {lines[0]} {' '.join(logs[:1])}"
