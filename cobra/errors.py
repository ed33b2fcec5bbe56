"""The errors Cobra raises on purpose. A message says what is wrong, the value, what is allowed, what to do.

A script ends with 0 when it is done, or with its error's exit code: 1, but 75 when a run has saved what it had and
left early, so that the same command goes on, and 130 after Ctrl-C.
"""

STOPPED_EARLY = 75  # sysexits.h calls it EX_TEMPFAIL: try again
CTRL_C = 130  # as shells say it: 128 + SIGINT


class CobraError(Exception):
    """Base of every error that Cobra raises on purpose; scripts print its message as one line."""

    exit_code = 1


class ConfigError(CobraError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class ShapeError(CobraError):
    """Tensors whose shapes, dtypes or devices do not fit together."""


class NumericsError(CobraError):
    """A number that has to be finite is NaN or infinite."""


class DataError(CobraError):
    """A data file or image is missing, unreadable, or not in the expected format."""


class CheckpointError(CobraError):
    """A checkpoint, model folder or run folder is damaged or belongs to another configuration."""


class Interrupted(CobraError):
    """The run was asked to stop (Ctrl-C, SIGTERM, SIGUSR1 or its time limit) and has saved what it had."""

    def __init__(self, message: str, exit_code: int = STOPPED_EARLY):
        super().__init__(message)
        self.exit_code = exit_code  # 75: the same command goes on | 130: Ctrl-C


class RankError(CobraError):
    """Another process of the run has died or does not answer."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code  # as the process that died had it


class BackendError(CobraError):
    """A kernel backend was asked for by name but cannot run here."""


class ResourceError(CobraError):
    """The machine's memory is too small for what was asked."""
