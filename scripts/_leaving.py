"""How a script ends: with one line, and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import NoReturn

import _environment  # noqa: F401


def this_rank() -> int:
    """Return the number of this process among those of the run; 0 if it is alone."""
    from cobra.ranks import env_ranks

    return (env_ranks() or (0, 1))[0]


def is_one_of_several() -> bool:
    """Whether this process was started as one of several ranks."""
    from cobra.ranks import env_ranks

    return env_ranks() is not None


def fail(message: object, code: int = 1) -> NoReturn:
    """End the process with one line about what is wrong."""
    if this_rank() > 0:
        time.sleep(0.5)  # most often rank 0 says the same, and this rank is ended before it repeats it
    logging.getLogger("cobra").error("error: %s", message)
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process. A rank ends at once: an orderly end could wait for the others, or for threads of theirs."""
    if is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
