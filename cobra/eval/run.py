"""The evaluate journey: a model and benchmarks -> predictions, scores, reports, pictures."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cobra.config import EvaluateConfig
from cobra.errors import ConfigError, DataError
from cobra.eval import report, summary
from cobra.eval.benchmark import Benchmark, Choices, Question, Scores
from cobra.eval.engine import Answerer, Engine, ask, select, share
from cobra.eval.gallery import Example, one_of_each_column
from cobra.eval.models import model_fingerprint, open_model
from cobra.eval.scoring import log_scores
from cobra.eval.store import AnswerStore
from cobra.models.sharded import is_sharded
from cobra.ops import use_backend
from cobra.ranks import Ranks, joined
from cobra.runtime import write_text

log = logging.getLogger(__name__)

_TIMEOUT_MINUTES = 24 * 60.0  # ranks wait for each other only at the end; one that dies is noticed at once


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark, ready to be asked."""

    benchmark: Benchmark
    folder: Path
    every_question: list[Question]
    questions: list[Question]  # those of them that are asked
    missing: Mapping[Path, int]  # images that are not there, with how many questions each has


def evaluate(config: EvaluateConfig, benchmark: Benchmark) -> Scores:
    """Evaluate on one benchmark; the results are in `output` (default: results/<benchmark>/<model name>).

    Below torchrun and its like, every rank asks its share of the images and returns the same scores.

    Raises:
        CobraError: the data or the model is missing or broken, or the folder holds another evaluation.
    """
    (scores,) = evaluate_all(config, [benchmark])
    return scores


def evaluate_all(config: EvaluateConfig, benchmarks: Sequence[Benchmark]) -> list[Scores]:
    """Evaluate on several benchmarks with one loaded model, as `evaluate` does; `output` gets a folder for each."""
    with joined(config.device, _TIMEOUT_MINUTES) as ranks, use_backend(config.ops), ExitStack() as open_stores:
        return _evaluate(config, benchmarks, ranks, open_stores)


def _evaluate(
    config: EvaluateConfig, benchmarks: Sequence[Benchmark], ranks: Ranks, open_stores: ExitStack
) -> list[Scores]:
    if not ranks.is_first:
        ranks.barrier()  # the first rank prepares what data has to be prepared
    tasks = _prepare(config, benchmarks)
    if ranks.is_first:
        ranks.barrier()
    # Late, as it takes long; the other ranks wait in their stores, until the first one has fetched the model, too.
    fingerprint = model_fingerprint(config.load, vision=config.vision, llm=config.llm) if ranks.is_first else {}
    stores: list[AnswerStore] = []
    for task in tasks:
        stores.append(_open_store(config, task, fingerprint, ranks))
        open_stores.callback(stores[-1].close)
    model = open_model(config.load, **config.load_options)
    for task in tasks:
        _check_choices(model, task)
    engine = Engine(model, config.batch_size, skip_broken=config.on_missing == "skip")  # keeps a batch size that fits
    results: list[dict[str, Any]] = []
    scores: list[Scores] = []
    examples: list[Example] = []
    for task, store in zip(tasks, stores, strict=True):
        found, result = _run(config, engine, task, store, ranks)
        scores.append(found)
        results.append(result)
        examples += one_of_each_column(task.benchmark, task.questions, store.answers, found)
    if len(tasks) > 1 and ranks.is_first:
        folder = Path(config.output or Path(config.paths.results) / "summary" / _display_name(config))
        summary.write(folder, results, examples)
        log.info("All of them: %s, %s, %s", *(folder / name for name in ("summary.md", "summary.png", "examples.png")))
    return scores


def _prepare(config: EvaluateConfig, benchmarks: Sequence[Benchmark]) -> list[Task]:
    """Read all questions and look for all images; all that is wrong comes in one error, before the model is loaded."""
    tasks: list[Task] = []
    problems: list[str] = []
    for benchmark in benchmarks:
        try:
            tasks.append(_task(config, benchmark, is_one_of_several=len(benchmarks) > 1))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return tasks


def _task(config: EvaluateConfig, benchmark: Benchmark, *, is_one_of_several: bool) -> Task:
    every_question = benchmark.some_questions()
    questions = select(every_question, config.limit, config.subset)
    missing = _missing_images(questions)
    if missing and config.on_missing == "error":
        raise DataError(f"{_listed(benchmark, missing)}\non_missing=skip leaves their questions out.")
    questions = [question for question in questions if question.image not in missing]
    if not questions:
        raise DataError(f"{_listed(benchmark, missing)}\nNo question is left.")
    folder = Path(config.paths.results) / benchmark.name / _display_name(config)
    if config.output is not None:
        folder = Path(config.output) / benchmark.name if is_one_of_several else Path(config.output)
    return Task(benchmark=benchmark, folder=folder, every_question=every_question, questions=questions, missing=missing)


def _open_store(config: EvaluateConfig, task: Task, fingerprint: Mapping[str, Any], ranks: Ranks) -> AnswerStore:
    made_with = {**fingerprint, "benchmark": task.benchmark.name, **_weight_format(config)}
    store = AnswerStore(task.folder, made_with, task.benchmark, task.every_question, ranks)
    if task.missing and ranks.is_first:
        file = task.folder / "missing_images.txt"
        write_text(file, "".join(f"{image}\n" for image in task.missing))
        log.warning("Left out: %s\nAll are listed in %s.", _listed(task.benchmark, task.missing), file)
    return store


def _run(
    config: EvaluateConfig, engine: Engine, task: Task, store: AnswerStore, ranks: Ranks
) -> tuple[Scores, dict[str, Any]]:
    benchmark, questions = task.benchmark, task.questions
    num_waiting = sum(question.id not in store.answers for question in questions)
    log.info("Asking %s %s questions of %s.", config.load, f"{num_waiting:,}", benchmark.name)
    if num_waiting and store.answers and ranks.is_first:  # else the folder is new, and holds nothing of ours
        report.remove(task.folder)
    started = time.perf_counter()
    ask(engine, share(questions, ranks), store)
    store.join()
    seconds = time.perf_counter() - started
    asked = {question.image for question in questions}  # the engine also knows broken images of other benchmarks
    mine = [str(image) for image in engine.broken if image in asked]
    broken = {image for images in ranks.gather(mine) for image in images}
    questions = [question for question in questions if str(question.image) not in broken]
    if not questions:
        raise DataError(f"{benchmark.name}: no image decodes, so no question is left.")
    lost = [question.id for question in questions if question.id not in store.answers]
    if lost:
        raise DataError(
            f"{store.path} lacks the answers to {len(lost):,} of {len(questions):,} questions, such as {lost[0]}; was "
            "it changed meanwhile? Run the same command again: it asks only these."
        )

    scores = benchmark.score(store.answers, questions)
    facts: dict[str, Any] = {"benchmark": benchmark.name, "model": config.load, **_weight_format(config)}
    facts |= {
        "limit": config.limit,
        "subset": config.subset,
        "batch_size": engine.batch_size,
        "asked_now": num_waiting,
        "seconds": round(seconds, 2),
        "questions_per_second": round(num_waiting / seconds, 1),
        "processes": ranks.world_size,
    }
    facts |= {"missing_images": len(task.missing)} if task.missing else {}
    facts |= {"broken_images": sorted(broken)} if broken else {}
    return scores, _report(config, task, questions, store, scores, facts) if ranks.is_first else facts


def _report(
    config: EvaluateConfig,
    task: Task,
    questions: Sequence[Question],
    store: AnswerStore,
    scores: Scores,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write everything there is to say of one benchmark; return what results.json holds."""
    title = f"{_display_name(config)} on {task.benchmark.name}: {scores.overall.percent:.2f} %"
    results = report.write(task.folder, facts, task.benchmark, questions, store.answers, scores, title)
    log_scores(task.benchmark, scores)
    log.info("Report: %s", task.folder / "report.md")
    log.info("Examples: %s", task.folder / "examples.html")
    return results


def _missing_images(questions: Sequence[Question]) -> dict[Path, int]:
    counts = Counter(question.image for question in questions)
    return {image: count for image, count in counts.items() if not image.is_file()}


def _listed(benchmark: Benchmark, missing: Mapping[Path, int]) -> str:
    shown = [f"  {image}" for image in list(missing)[:10]] + ["  ..."] * (len(missing) > 10)
    source = f"\nGet them from {benchmark.image_url}." if benchmark.image_url else ""
    count = f"{len(missing):,} image{'s' * (len(missing) > 1)}"
    head = f"{benchmark.name} lacks {count}, about which there are {sum(missing.values()):,} questions:"
    return "\n".join([head, *shown]) + source


def _check_choices(model: Answerer[Any], task: Task) -> None:
    """Raise ConfigError unless every word whose probability is asked for is one token of the model."""
    for kind in {question.answer for question in task.questions}:
        try:
            if isinstance(kind, Choices):
                model.choice_ids(kind.words)
        except ConfigError as error:
            raise ConfigError(
                f"{task.benchmark.name} compares the probabilities of single tokens, which this model does not have: "
                f"{error}"
            ) from None


def _display_name(config: EvaluateConfig) -> str:
    """The run's name for a run folder, with the step for a checkpoint of it; else the folder's own name."""
    folder, runs = Path(config.load).expanduser().resolve(), Path(config.paths.runs).resolve()
    step = f"/{folder.name}" if is_sharded(folder) else ""
    folder = folder.parent.parent if step else folder
    quantized = "" if config.quantize is None else f"-{config.quantize}"
    return (folder.relative_to(runs).as_posix() if folder.is_relative_to(runs) else folder.name) + step + quantized


def _weight_format(config: EvaluateConfig) -> dict[str, Any]:
    return {"dtype": config.dtype} | ({} if config.quantize is None else {"quantize": config.quantize})
