"""The errors Cobra raises on purpose. A message says what is wrong, the value, what is allowed, what to do."""


class CobraError(Exception):
    """Base of every error that Cobra raises on purpose; scripts print its message as one line."""


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
    """The run was asked to stop (Ctrl-C or SIGTERM) and has saved what it had."""


class BackendError(CobraError):
    """A kernel backend was asked for by name but cannot run here."""
