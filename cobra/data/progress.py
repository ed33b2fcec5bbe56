"""One progress bar for everything that reads a whole data set."""

from __future__ import annotations

import logging
import sys
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)


def progress(total: int, what: str, unit: str) -> tqdm[Any]:
    """Return a bar over `total` units; a rare plain line where standard error is not a terminal."""
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=True,
        disable=not log.isEnabledFor(logging.INFO),
        mininterval=0.5 if sys.stderr.isatty() else 15,
    )
