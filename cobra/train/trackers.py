"""Where metrics go: metrics.jsonl always, Weights & Biases when asked for."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cobra.config import TrackerConfig, WandbConfig
from cobra.errors import ConfigError
from cobra.runtime import write_text

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"

_SECONDS_TO_REACH_WANDB = 30.0


class Tracker(Protocol):
    """Takes metrics as they come."""

    def log(self, metrics: dict[str, Any]) -> None:
        """Record the metrics of one step; `metrics["step"]` says which."""
        ...

    def close(self) -> None:
        """Finish; nothing is logged afterwards."""
        ...


class JsonlTracker:
    """Appends one JSON object a line to metrics.jsonl."""

    def __init__(self, run_folder: Path, first_step: int) -> None:
        """Open the file; lines after `first_step` are dropped, for they will be written again."""
        self.path = run_folder / METRICS_FILE
        drop_after(self.path, first_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._has_failed = False

    def log(self, metrics: dict[str, Any]) -> None:
        """Append a line and flush it; what is not finite becomes null, as JSON has no word for it.

        What a full disk refuses is kept and written with a later line: no metric is worth a run.
        """
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in metrics.items()
        }
        with self._survived():
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with self._survived():
            self._file.close()

    @contextmanager
    def _survived(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._has_failed:
                log.warning("%s cannot be written (%s). Training goes on.", self.path, error.strerror or error)
            self._has_failed = True


class WandbTracker:
    """Weights & Biases; offline when nobody is logged in, and the run can be synchronised later."""

    def __init__(self, config: WandbConfig, run_folder: Path, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("tracker=wandb needs a package that is not installed: pip install wandb") from None
        self._has_failed = False
        mode = config.mode
        if mode == "auto":
            mode = "online" if wandb.api.api_key else "offline"
            if mode == "offline":
                log.info("W&B: not logged in, writing offline to %s/wandb (`wandb sync` uploads it).", run_folder)
        name = settings["run"]["name"]
        folder_hash = hashlib.sha256(str(run_folder.resolve()).encode()).hexdigest()[:8]  # two folders, two runs
        start = partial(
            wandb.init,
            project=config.project,
            entity=config.entity,
            name=name,
            id=f"{name.replace('/', '-')}-{folder_hash}",
            resume="allow",
            dir=run_folder,
            config=settings,
            settings=wandb.Settings(init_timeout=_SECONDS_TO_REACH_WANDB),
        )
        try:
            self._run = start(mode=mode)  # type: ignore[arg-type]
        except Exception as error:  # its errors have no common base, and no metric is worth a run
            log.warning(
                "W&B cannot be reached (%s). Training goes on; its metrics are written offline to %s/wandb (`wandb "
                "sync` uploads them), and to metrics.jsonl as always.",
                _first_line(error),
                run_folder,
            )
            wandb.teardown()
            self._run = start(mode="offline")

    def log(self, metrics: dict[str, Any]) -> None:
        """Send the metrics."""
        with self._survived():
            self._run.log({key: value for key, value in metrics.items() if value is not None}, step=metrics["step"])

    def close(self) -> None:
        """Finish the run."""
        with self._survived():
            self._run.finish()

    @contextmanager
    def _survived(self) -> Iterator[None]:
        """Say once what W&B does not do any more; no metric is worth a run."""
        try:
            yield
        except Exception as error:
            if not self._has_failed:
                log.warning("W&B has failed (%s). Training goes on, metrics.jsonl has everything.", _first_line(error))
            self._has_failed = True


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def build_trackers(config: TrackerConfig, run_folder: Path, settings: dict[str, Any], first_step: int) -> list[Tracker]:
    """Return the trackers that the config asks for; `settings` is the whole config as plain data."""
    trackers: list[Tracker] = [JsonlTracker(run_folder, first_step)]
    if config.wandb is not None:
        trackers.append(WandbTracker(config.wandb, run_folder, settings))
    return trackers


def drop_after(path: Path, step: int) -> None:
    """Take the lines of later steps out of a JSON-lines file, if there is one: they will be written again."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a last line that a kill cut short is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
