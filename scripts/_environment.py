"""Imported before anything else: one line instead of a traceback where Cobra is not installed in this Python."""

from __future__ import annotations

import sys
from importlib.util import find_spec

if find_spec("hydra") is None:
    sys.exit(
        "error: Cobra's packages are not in this Python. Choose its environment first, for example: "
        "source .venv/bin/activate"
    )
