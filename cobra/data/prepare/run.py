"""The prepare journey: a name -> files downloaded, extracted, converted, counted, checked and indexed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from cobra.config import DataConfig, PrepareConfig
from cobra.data.makers import make_if_missing
from cobra.data.prepare import plan
from cobra.data.prepare.check import CheckReport, check, rows_to_check
from cobra.data.prepare.expect import unmet
from cobra.data.prepare.manifest import Manifest, available_manifests, load_with_needs
from cobra.data.prepare.own import prepare_own
from cobra.data.prepare.report import write_report
from cobra.data.prepare.steps import is_done, mark_of, take_steps
from cobra.errors import CheckpointError, DataError
from cobra.hub import resolve_file
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
    asked = [*_all(config.sets, "training"), *_all(config.benchmarks, "benchmark")]
    made = _made(asked, data_config)
    names = [name for name in asked if name not in made]
    manifests = {part.name: part for name in names for part in load_with_needs(name)}
    if config.dry_run:
        _describe(config, list(manifests.values()), made, root)
        return
    if config.own.annotations is not None:
        _prepare_own(config, root, configs)
    failed = {} if config.check else _fetch_all(list(manifests.values()), root, config)
    problems = list(failed.values())
    for name, data in made.items():
        for part in data.sets.values() if not config.check else ():
            make_if_missing(data.source, Path(part.annotations).expanduser())
        report = _report(config, name, lambda data=data: data, _report_folder(root, name))
        problems += [] if report.is_good else [_not_in_order(name, root, "Remove its folder to have it made again.")]
    for name in names:
        parts = load_with_needs(name)
        if any(part.name in failed for part in parts):
            continue
        report = _check(config, parts, root, data_config, questions)
        if report is not None and not report.is_good:
            remedy = "repair=true takes what is missing or broken from the archives again."
            problems.append(_not_in_order(name, root, remedy))
    if problems:
        raise DataError("\n".join(problems))


def _prepare_own(config: PrepareConfig, root: Path, configs: Path) -> None:
    own = config.own
    annotations, images = (Path(str(path)).expanduser() for path in (own.annotations, own.images))
    target = Path(own.config).expanduser() if own.config is not None else configs
    file = prepare_own(annotations, images, own.name, root / own.name, target)
    log.info("%s is written: train on it with data=%s.", file, own.name)


def _made(names: Sequence[str], data_config: Callable[[str], DataConfig | None]) -> dict[str, DataConfig]:
    """Return those of the data sets that need no manifest, as Cobra makes them by itself."""
    known = available_manifests()
    configs = {name: data_config(name) for name in names if name not in known}
    return {name: data for name, data in configs.items() if data is not None and data.source is not None}


def _not_in_order(name: str, root: Path, remedy: str) -> str:
    return f"{name} is not in order: {_report_folder(root, name) / 'report.md'} tells what is wrong. {remedy}"


def _describe(config: PrepareConfig, manifests: Sequence[Manifest], made: Mapping[str, DataConfig], root: Path) -> None:
    for name, data in made.items():
        files = ", ".join(str(part.annotations) for part in data.sets.values())
        log.info("%s: made by Cobra itself, nothing is fetched -> %s", name, files)
    if config.own.annotations is not None:
        log.info("%s would be checked, with the images in %s.", config.own.annotations, config.own.images)
    if manifests:
        log.info("%s", plan.describe(manifests, root, keep_archives=config.keep_archives))


def _all(names: Sequence[str], kind: str) -> list[str]:
    return available_manifests(kind) if list(names) == ["all"] else list(dict.fromkeys(names))


def _fetch_all(manifests: Sequence[Manifest], root: Path, config: PrepareConfig) -> dict[str, str]:
    """Download, extract and convert; return what went wrong, by manifest."""
    waiting: list[Manifest] = []
    for manifest in manifests:
        if is_done(manifest, root) and not config.repair:
            log.info("%s: complete in %s", manifest.name, root / manifest.folder)
        else:
            waiting.append(manifest)
    plan.check_space(waiting, root, keep_archives=config.keep_archives)
    failed: dict[str, str] = {}
    for manifest in waiting:
        log.info("%s: %s", manifest.name, manifest.title)
        try:
            (root / manifest.folder).mkdir(parents=True, exist_ok=True)
            with FileLock(mark_of(manifest, root).with_suffix(".lock"), timeout=0):
                take_steps(manifest, root, config)
        except Timeout:
            failed[manifest.name] = f"{manifest.name}: another process prepares it at this moment; wait for it."
        except DataError as error:
            failed[manifest.name] = f"{manifest.name}: {error}"
    return failed


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
    lacking = [str(one) for part in parts for one in unmet(part, root)]
    if manifest.kind == "benchmark":
        name = manifest.name
        return _report(config, name, lambda: rows_to_check(name, questions(name), folder / "rows"), folder, lacking)
    if not (config.index or config.check):
        return None
    return _report(config, manifest.name, lambda: data_config(manifest.name), folder, lacking)


def _report(
    config: PrepareConfig, name: str, read: Callable[[], DataConfig | None], folder: Path, lacking: Sequence[str] = ()
) -> CheckReport:
    """Check the rows that `read` finds; images alone (None) are known by the manifest's counts only."""
    try:
        data = read()
        if data is None:
            report = CheckReport(name=name, full=False, sets=[])
        else:
            report = check(data, full=config.check == "full", jobs=config.jobs, tokens=_tokens(config.tokenizer))
    except DataError as error:  # not even the annotations are there
        report = CheckReport(name=name, full=False, sets=[], unmet=[str(error)])
    report.unmet += lacking
    write_report(report, folder)
    log.info("%s: %s", name, folder / "report.md")
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
