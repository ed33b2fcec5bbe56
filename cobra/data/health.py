"""Which rows of a data set can be trained on, and what is wrong with the others."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np

from cobra.config import DataConfig
from cobra.data.images import broken_images, missing_images, state_of_images
from cobra.data.index import Index, found_or_made
from cobra.data.prepare.manifest import available_manifests
from cobra.data.report import Report
from cobra.errors import DataError
from cobra.runtime import write_text

log = logging.getLogger(__name__)

_MISSING, _BROKEN, _NO_ANSWER = "image missing", "image does not decode", "no answer within model.max_length"


def usable_rows(index: Index, name: str, images: Path, num_labels: np.ndarray, config: DataConfig) -> np.ndarray | None:
    """Check every row and image of a data set; return the rows that can be trained on, None for all.

    What was found stands in the index's `report.json`; with `data.on_bad_example=skip` it is only a warning.

    Args:
        index: the rows that keep to the format; it knows of the others.
        name: of the data set.
        images: folder that the rows' image paths start from.
        num_labels: int32 [rows], learnt tokens of each row.
        config: how images are checked, and whether bad rows are left out.

    Raises:
        DataError: there are bad rows, or no good ones; it names the first of each kind, and the report.
    """
    names = index.image_names()
    if names and not images.is_dir():
        raise DataError(f"The image folder {images} does not exist. {how_to_get(config, 'data.images')}")
    bad_images = _bad_images(index, name, names, images, config)
    reasons = np.zeros(len(names) + 1, np.int8)  # of each image; the last one stands for text
    for number, reason in bad_images.items():
        reasons[number] = 1 if reason == _MISSING else 2
    reason_of_row = reasons[index.images]
    reason_of_row[(reason_of_row == 0) & (num_labels == 0)] = 3

    report = index.report()
    for code, kind in enumerate((_MISSING, _BROKEN, _NO_ANSWER), start=1):
        rows = np.flatnonzero(reason_of_row == code)
        examples = (_example(index, row, bad_images) for row in rows[: Report.kept].tolist())
        report.add_all(kind, examples, len(rows))
    used = np.flatnonzero(reason_of_row == 0).astype(np.int32)
    if report.counts:
        _tell(index, name, report, len(used), config)
    return None if len(used) == len(index) else used


def how_to_get(config: DataConfig, setting: str) -> str:
    """Return what to do where files of the data are missing: `setting` names them, unless a command fetches them."""
    if config.name in available_manifests("training"):
        return f"Fetch the data with: cobra prepare data={config.name}"
    return f"Check {setting}."


def _example(index: Index, number: int, bad_images: dict[int, str]) -> str:
    row, image = index.row(number), int(index.images[number])
    reason = "" if bad_images.get(image, _MISSING) == _MISSING else f": {bad_images[image]}"
    return f"id {row.id!r}" + ("" if row.image is None else f", {row.image}") + reason


def _tell(index: Index, name: str, report: Report, num_used: int, config: DataConfig) -> None:
    """Write down the problems and raise or log them."""
    file, text = index.folder / "report.json", report.as_json()

    def find() -> bool | None:
        return (file.is_file() and file.read_text(encoding="utf-8") == text) or None

    found_or_made(index.folder, find, lambda: write_text(file, text))
    count = sum(report.counts.values())
    what = f"{count:,} of {num_used + count:,} rows of {name} cannot be used: {report}"
    if not num_used:
        raise DataError(f"{what}. None is left; check data.annotations and data.images. More in {file}.")
    if config.on_bad_example == "error":
        raise DataError(f"{what}. Correct them, or leave them out with data.on_bad_example=skip. More in {file}.")
    log.warning("%s. They are left out (more in %s; delete its folder to look for images again).", what, file)


def _bad_images(index: Index, name: str, names: list[str], images: Path, config: DataConfig) -> dict[int, str]:
    """Return the numbers of the images that cannot be used, with the reason.

    With `skip`, the first answer stays: a run that is resumed has to leave out the same rows as before, or its steps
    would hold other examples. Images that vanish later are left out of their batches, see `cobra.data.loader`.
    """
    decode, skip = config.check == "decode", config.on_bad_example == "skip"
    if not decode and not skip:
        return dict.fromkeys(missing_images(images, names), _MISSING)
    key = hashlib.sha256(f"{images.absolute()} {config.check}".encode()).hexdigest()[:16]
    file = index.folder / f"images-{key}.json"
    state = state_of_images(images, names) if decode else ""

    def find() -> dict[int, str] | None:
        if not file.is_file():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        return {int(number): reason for number, reason in found["bad"]} if skip or found["state"] == state else None

    def make() -> dict[int, str]:
        bad = dict.fromkeys(missing_images(images, names), _MISSING)
        if decode:
            bad = broken_images(images, names, name) | bad
        if len(bad) < max(1, len(names)):  # else the folder is the wrong one, or not mounted
            write_text(file, json.dumps({"state": state, "bad": sorted(bad.items())}))
        return bad

    return found_or_made(index.folder, find, make)
