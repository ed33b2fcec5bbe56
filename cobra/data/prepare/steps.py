"""The steps of one manifest: download, extract, convert. What is damaged, or has gone, or has changed is taken again.

`.<name>.prepared` in the manifest's folder says that all was done, and with which files.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from cobra.config import PrepareConfig
from cobra.data.prepare import plan
from cobra.data.prepare.convert import convert_lrv, convert_lvis, gather
from cobra.data.prepare.download import download
from cobra.data.prepare.expect import Unmet, concerns, count_rows, unmet
from cobra.data.prepare.extract import extract
from cobra.data.prepare.jpeg import convert_to_jpeg
from cobra.data.prepare.manifest import Convert, Manifest, SourceFile
from cobra.data.prepare.members import Damaged
from cobra.errors import DataError
from cobra.runtime import write_text

log = logging.getLogger(__name__)


def is_done(manifest: Manifest, root: Path) -> bool:
    """Whether all steps were taken for this very manifest, and what it expects is still there."""
    return _read_mark(manifest, root).get("manifest") == _digest(manifest) and not unmet(manifest, root)


def mark_of(manifest: Manifest, root: Path) -> Path:
    """Return the file that says that a manifest is done."""
    return root / manifest.folder / f".{manifest.name}.prepared"


def take_steps(manifest: Manifest, root: Path, config: PrepareConfig) -> None:
    """Take all steps; where files have gone since they were taken, those that bring them are taken again.

    Raises:
        DataError: something could not be fetched, needs a human, or is not what was expected.
    """
    _take(manifest, root, config, manifest.files if config.repair else _changed(manifest, root))
    lacking = unmet(manifest, root)
    if lacking and not config.repair and (again := _that_bring(lacking, manifest, root)):
        _take(manifest, root, config, again)
        lacking = unmet(manifest, root)
    if lacking:
        raise DataError("not what was expected:\n" + "\n".join(f"  {one}" for one in lacking))
    facts = {file.target: _facts(file) for file in manifest.files}
    write_text(mark_of(manifest, root), json.dumps({"manifest": _digest(manifest), "files": facts}) + "\n")


def _take(manifest: Manifest, root: Path, config: PrepareConfig, again: Sequence[SourceFile]) -> None:
    """Take all steps once; of the archives `again`, every file is looked at even if they were extracted before."""
    folder = root / manifest.folder
    for file in again:
        if (folder / file.target).exists() or file.urls:  # else nobody could extract it again
            plan.extraction_note(file, folder).unlink(missing_ok=True)
    files = plan.wanted(manifest, root, [file.target for file in again if file.urls])
    problems = plan.needs_a_human(files, folder)
    for some in [files] if config.keep_archives else [[file] for file in files]:
        problems += _fetch([file for file in some if file.urls], folder, config)
        for file in some:
            if (folder / file.target).is_file():
                problems += _use(file, manifest, folder, config)
    if problems:
        raise DataError("\n".join(problems))
    for step in manifest.convert:
        _convert(step, folder, config)


def _fetch(files: Sequence[SourceFile], folder: Path, config: PrepareConfig) -> list[str]:
    try:
        remote = [plan.remote_file(file, folder) for file in files]
        download(remote, jobs=config.jobs, connections=config.connections)
    except DataError as error:
        hints = [file.hint for file in files if file.hint is not None and not (folder / file.target).exists()]
        return [str(error), *hints]
    return []


def _use(file: SourceFile, manifest: Manifest, folder: Path, config: PrepareConfig) -> list[str]:
    """Extract an archive, read rows through. A damaged file is set aside and fetched once more; return problems."""
    target = folder / file.target
    try:
        try:
            _open(file, manifest, folder, config.jobs)
        except Damaged as error:
            aside = target.with_name(f"{target.name}.damaged")
            target.replace(aside)
            if not file.urls:
                return [f"{error} It was renamed to {aside.name}. Fetch {file.manual} again, and put it at {target}."]
            log.warning("%s It was renamed to %s, and is fetched once more.", error, aside.name)
            others_first = replace(file, urls=[*file.urls[1:], file.urls[0]])
            if problems := _fetch([others_first], folder, config):
                return problems
            _open(file, manifest, folder, config.jobs)
            aside.unlink()
    except DataError as error:
        return [str(error)]
    if file.extract is not None and not config.keep_archives:
        target.unlink(missing_ok=True)
    return []


def _open(file: SourceFile, manifest: Manifest, folder: Path, jobs: int) -> None:
    target, how = folder / file.target, file.extract
    if how is not None:
        into = PurePosixPath(how.into)
        paths = [PurePosixPath(other.target) for other in manifest.files]
        reserved = [str(path.relative_to(into)) for path in paths if path.is_relative_to(into)]
        extract(target, folder / into, strip=how.strip, rename=how.rename, reserved=reserved, jobs=jobs)
    elif file.checksum is None and target.suffix in (".json", ".jsonl"):
        try:
            count_rows(target)
        except DataError as error:
            raise Damaged(str(error)) from None


def _convert(step: Convert, folder: Path, config: PrepareConfig) -> None:
    source, target = folder / step.source, folder / (step.target or step.source)
    if step.kind == "ocr-vqa-jpeg":
        convert_to_jpeg(source, jobs=config.jobs)
    elif step.kind == "gather":
        gather(source, target, replace=config.repair)
    elif step.kind == "lvis":
        convert_lvis(source, target)
    else:
        convert_lrv(source, target, step.image or "")


def _that_bring(lacking: Collection[Unmet], manifest: Manifest, root: Path) -> list[SourceFile]:
    """Return the archives that may bring what is not there; for other rows than expected, none is fetched again."""
    return [
        file
        for file in manifest.files
        for is_there in [(root / manifest.folder / file.target).exists()]
        if any(concerns(one.entry, file, manifest) and (is_there or not one.is_row_count) for one in lacking)
    ]


def _changed(manifest: Manifest, root: Path) -> list[SourceFile]:
    """Return the archives that the manifest described otherwise when its steps were taken."""
    known = _read_mark(manifest, root).get("files", {})
    return [file for file in manifest.files if _differ(known.get(file.target), _facts(file))]


def _differ(old: dict[str, Any] | None, new: dict[str, Any]) -> bool:
    """Whether facts contradict each other; one that was not known before does not."""
    return old is not None and any(old.get(key) is not None and old[key] != new[key] for key in new)


def _facts(file: SourceFile) -> dict[str, Any]:
    how = file.extract
    return {
        "size": file.size,
        "checksum": file.checksum,
        "extract": None if how is None else [how.into, how.strip, how.rename],
    }


def _read_mark(manifest: Manifest, root: Path) -> dict[str, Any]:
    try:
        found = json.loads(mark_of(manifest, root).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(repr(manifest).encode()).hexdigest()[:16]
