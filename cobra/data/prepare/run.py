"""The prepare journey: a name -> files downloaded, extracted, converted, counted, checked and indexed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from cobra.config import DataConfig, PrepareConfig
from cobra.data.prepare import plan
from cobra.data.prepare.check import CheckReport, check, rows_to_check
from cobra.data.prepare.convert import convert_lrv, convert_lvis, gather
from cobra.data.prepare.download import download
from cobra.data.prepare.expect import unmet
from cobra.data.prepare.extract import extract
from cobra.data.prepare.jpeg import convert_to_jpeg
from cobra.data.prepare.manifest import Convert, Manifest, available_manifests, load_with_needs
from cobra.data.prepare.own import prepare_own
from cobra.data.prepare.report import write_report
from cobra.errors import CheckpointError, DataError
from cobra.hub import resolve_file
from cobra.runtime import write_text
from cobra.text.prompt import PromptFormat, prompt_format
from cobra.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# id, image, question and true answer of a benchmark's questions
Questions = Iterable[tuple[str, Path, str, str]]


def prepare(
    config: PrepareConfig,
    *,
    configs: Path,
    data_config: Callable[[str], DataConfig | None],
    questions: Callable[[str], Questions],
) -> None:
    """Prepare as configured; whatever is there and whole is left alone.

    Args:
        config: what to prepare, and where.
        configs: folder of data configs, which own data gets one in.
        data_config: the training data of that name; None: there is a manifest alone.
        questions: reads a benchmark's files.

    Raises:
        DataError: something could not be fetched, needs a human, or is not what it should be. All else is done first.
        ConfigError: there is no such data set.
    """
    root = Path(config.paths.data).expanduser()
    if config.own.annotations is not None and config.own.images is not None:
        own = config.own
        target = Path(own.config) if own.config is not None else configs
        file = prepare_own(Path(config.own.annotations), Path(config.own.images), own.name, root / own.name, target)
        log.info("%s is written: train on it with data=%s.", file, own.name)
    names = [*_all(config.sets, "training"), *_all(config.benchmarks, "benchmark")]
    manifests = {part.name: part for name in names for part in load_with_needs(name)}
    if config.dry_run:
        log.info("%s", plan.describe(list(manifests.values()), root))
        return
    failed = {} if config.check else _fetch_all(list(manifests.values()), root, config)
    problems = list(failed.values())
    for name in names:
        parts = load_with_needs(name)
        if any(part.name in failed for part in parts):
            continue
        report = _check(config, parts, root, data_config, questions)
        if report is not None and not report.is_good:
            problems.append(f"{name} is not in order: {_report_folder(root, name) / 'report.md'} tells what is wrong.")
    if problems:
        raise DataError("\n".join(problems))


def _all(names: Sequence[str], kind: str) -> list[str]:
    return available_manifests(kind) if list(names) == ["all"] else list(dict.fromkeys(names))


def _fetch_all(manifests: Sequence[Manifest], root: Path, config: PrepareConfig) -> dict[str, str]:
    """Download, extract and convert; return what went wrong, by manifest."""
    waiting: list[Manifest] = []
    for manifest in manifests:
        if _is_done(manifest, root) and not config.repair:
            log.info("%s: complete in %s", manifest.name, root / manifest.folder)
        else:
            waiting.append(manifest)
    plan.check_space(waiting, root)
    failed: dict[str, str] = {}
    for manifest in waiting:
        log.info("%s: %s", manifest.name, manifest.title)
        try:
            (root / manifest.folder).mkdir(parents=True, exist_ok=True)
            with FileLock(_mark(manifest, root).with_suffix(".lock"), timeout=0):
                _fetch(manifest, root, config)
        except Timeout:
            failed[manifest.name] = f"{manifest.name}: another process prepares it at this moment; wait for it."
        except DataError as error:
            failed[manifest.name] = f"{manifest.name}: {error}"
    return failed


def _fetch(manifest: Manifest, root: Path, config: PrepareConfig) -> None:
    """Take all steps. Where files have gone since they were taken, they are taken again."""
    _take_steps(manifest, root, config, again=config.repair)
    if unmet(manifest, root) and not config.repair:
        _take_steps(manifest, root, config, again=True)
    if lacking := unmet(manifest, root):
        raise DataError("not what was expected:\n" + "\n".join(f"  {text}" for text in lacking))
    write_text(_mark(manifest, root), json.dumps({"manifest": _digest(manifest)}) + "\n")


def _take_steps(manifest: Manifest, root: Path, config: PrepareConfig, *, again: bool) -> None:
    """Download, extract, convert; `again` looks at every file of an archive that was extracted before."""
    folder = root / manifest.folder
    if again:
        for file in manifest.files:
            plan.extraction_note(file, folder).unlink(missing_ok=True)
    problems = plan.needs_a_human(manifest, root)
    try:
        download(plan.remote_files(manifest, root), jobs=config.jobs, connections=config.connections)
    except DataError as error:
        problems.append(str(error))
    for file in manifest.files:
        archive, how = folder / file.target, file.extract
        if how is not None and (archive.is_file() or plan.is_extracted(file, folder)):
            extract(archive, folder / how.into, strip=how.strip, rename=how.rename, jobs=config.jobs)
            if not config.keep_archives:
                archive.unlink(missing_ok=True)
    if problems:
        raise DataError("\n".join(problems))
    for step in manifest.convert:
        _convert(step, folder, config.jobs)


def _convert(step: Convert, folder: Path, jobs: int) -> None:
    source, target = folder / step.source, folder / (step.target or step.source)
    if step.kind == "ocr-vqa-jpeg":
        convert_to_jpeg(source, jobs=jobs)
    elif step.kind == "gather":
        gather(source, target)
    elif step.kind == "lvis":
        convert_lvis(source, target)
    else:
        convert_lrv(source, target, step.image or "")


def _is_done(manifest: Manifest, root: Path) -> bool:
    try:
        found = json.loads(_mark(manifest, root).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return found == {"manifest": _digest(manifest)} and not unmet(manifest, root)


def _mark(manifest: Manifest, root: Path) -> Path:
    return root / manifest.folder / f".{manifest.name}.prepared"


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(repr(manifest).encode()).hexdigest()[:16]


def _check(
    config: PrepareConfig,
    parts: Sequence[Manifest],
    root: Path,
    data_config: Callable[[str], DataConfig | None],
    questions: Callable[[str], Questions],
) -> CheckReport | None:
    """Walk rows and images, which makes a training set's index as well; write the report."""
    manifest = parts[-1]
    folder = _report_folder(root, manifest.name)
    lacking = [text for part in parts for text in unmet(part, root)]
    try:
        if manifest.kind == "benchmark":
            data = rows_to_check(manifest.name, questions(manifest.name), folder / "rows")
        else:
            data = data_config(manifest.name)
            if data is None or not (config.index or config.check):
                return None
        report = check(data, full=config.check == "full", jobs=config.jobs, tokens=_tokens(config.tokenizer))
    except DataError as error:  # not even the annotations are there
        report = CheckReport(name=manifest.name, full=False, sets=[], unmet=[str(error)])
    report.unmet += lacking
    write_report(report, folder)
    log.info("%s: %s", manifest.name, folder / "report.md")
    return report


def _tokens(tokenizer: str | None) -> tuple[Tokenizer, PromptFormat] | None:
    """Return how rows become tokens; None, with a warning, where the tokenizer cannot be had."""
    if tokenizer is None:
        return None
    try:
        return Tokenizer(resolve_file(tokenizer, "tokenizer")), prompt_format("zephyr")
    except CheckpointError as error:
        log.warning("Token lengths are left out of the report: %s", error)
        return None


def _report_folder(root: Path, name: str) -> Path:
    return root / "reports" / name
