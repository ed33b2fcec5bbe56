"""Compile kernels at first use and keep them on disk, where the system lets us."""

import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit

_log = logging.getLogger(__name__)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that runs without the interpreter lock."""
    compiled = njit(nogil=True, error_model="numpy")(function)
    try:
        compiled.enable_caching()
    except RuntimeError:  # neither the package's folder nor the user's own can be written
        _warn_of_missing_cache()
    else:
        _drop_stale(Path(compiled.stats.cache_path))
    return compiled


@cache
def _warn_of_missing_cache() -> None:
    _log.warning(
        "The compiled CPU kernels cannot be kept: no cache folder can be written. Every process compiles them anew, "
        "some ten seconds; set NUMBA_CACHE_DIR to a folder of yours."
    )


@cache
def _drop_stale(folder: Path) -> None:
    """Delete kernels of another version of this package: Numba's cache looks at a kernel's own file only."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    stamp = folder / "sources.sha256"
    with suppress(OSError):  # another process was faster, or the folder is not ours
        if stamp.exists() and stamp.read_text() == digest:
            return
        for name in {source.stem for source in sources}:
            for old in (*folder.glob(f"{name}.*.nbi"), *folder.glob(f"{name}.*.nbc")):
                old.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(digest)
