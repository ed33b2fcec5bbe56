"""The evaluate journey: a model and a benchmark -> predictions, scores, report, pictures."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cobra.api import Cobra, load
from cobra.config import EvaluateConfig
from cobra.errors import ConfigError, DataError
from cobra.eval import engine, report
from cobra.eval.benchmark import Benchmark, Choices, Question, Scores
from cobra.eval.fingerprint import model_fingerprint, questions_fingerprint
from cobra.eval.scoring import log_scores
from cobra.eval.store import AnswerStore
from cobra.models.sharded import is_sharded
from cobra.ops import use_backend
from cobra.ranks import Ranks, joined
from cobra.runtime import write_text

log = logging.getLogger(__name__)

_TIMEOUT_MINUTES = 24 * 60.0  # ranks wait for each other only at the end; one that dies is noticed at once


def evaluate(config: EvaluateConfig, benchmark: Benchmark) -> Scores:
    """Evaluate as configured; the results are in `output` (default: results/<benchmark>/<model name>).

    Below torchrun and its like, every rank asks its share of the images and returns the same scores.

    Raises:
        CobraError: the data or the model is missing or broken, or the folder holds another evaluation.
    """
    with joined(config.device, _TIMEOUT_MINUTES) as ranks, use_backend(config.ops):
        return _evaluate(config, benchmark, ranks)


def _evaluate(config: EvaluateConfig, benchmark: Benchmark, ranks: Ranks) -> Scores:
    if not ranks.is_first:
        ranks.barrier()  # the first rank fetches what has to be fetched
    fingerprint = model_fingerprint(config.load) if ranks.is_first else {}
    every_question = benchmark.questions()
    if ranks.is_first:
        ranks.barrier()
    questions = engine.select(every_question, config.limit)
    missing = _missing_images(questions)
    if missing and config.on_missing == "error":
        raise DataError(f"{_listed(benchmark, missing)}\non_missing=skip leaves their questions out.")
    questions = [question for question in questions if question.image not in missing]
    if not questions:
        raise DataError(f"{_listed(benchmark, missing)}\nNo question is left.")
    name = _display_name(config)
    folder = Path(config.output or Path(config.paths.results) / benchmark.name / name)
    store = AnswerStore(
        folder,
        {**fingerprint, "questions": questions_fingerprint(every_question), "dtype": config.dtype},
        benchmark,
        every_question,
        ranks,
    )
    if missing and ranks.is_first:
        write_text(folder / "missing_images.txt", "".join(f"{image}\n" for image in missing))
        log.warning("Left out: %s\nAll are listed in %s.", _listed(benchmark, missing), folder / "missing_images.txt")
    num_waiting = sum(question.id not in store.answers for question in questions)
    model = load(config.load, device=config.device, dtype=config.dtype)
    _check_choices(model, benchmark, questions)
    log.info("Asking %s %s questions of %s.", config.load, f"{num_waiting:,}", benchmark.name)
    started = time.perf_counter()
    try:
        engine.ask(model, engine.share(questions, ranks), store, config.batch_size)
    finally:
        store.close()
    store.join()
    seconds = time.perf_counter() - started

    scores = benchmark.score(store.answers, questions)
    if not ranks.is_first:
        return scores
    facts: dict[str, Any] = {"benchmark": benchmark.name, "model": config.load, "dtype": config.dtype}
    facts |= {
        "limit": config.limit,
        "asked_now": num_waiting,
        "seconds": round(seconds, 2),
        "processes": ranks.world_size,
    }
    facts |= {"missing_images": len(missing)} if missing else {}
    title = f"{name} on {benchmark.name}: {scores.overall.percent:.2f} %"
    report.write(folder, facts, benchmark, questions, store.answers, scores, title)
    log_scores(benchmark, scores)
    log.info("Report: %s", folder / "report.md")
    log.info("Examples: %s", folder / "examples.html")
    return scores


def _missing_images(questions: Sequence[Question]) -> dict[Path, int]:
    """Return the images that are not there, with how many questions each has."""
    counts = Counter(question.image for question in questions)
    return {image: count for image, count in counts.items() if not image.is_file()}


def _listed(benchmark: Benchmark, missing: Mapping[Path, int]) -> str:
    shown = [f"  {image}" for image in list(missing)[:10]] + ["  ..."] * (len(missing) > 10)
    source = f"\nGet them from {benchmark.image_url}." if benchmark.image_url else ""
    count = f"{len(missing):,} image{'s' * (len(missing) > 1)}"
    head = f"{benchmark.name} lacks {count}, about which there are {sum(missing.values()):,} questions:"
    return "\n".join([head, *shown]) + source


def _check_choices(model: Cobra, benchmark: Benchmark, questions: Sequence[Question]) -> None:
    """Raise ConfigError unless every word whose probability is asked for is one token of the model."""
    kinds = {question.answer for question in questions}
    try:
        for word in {word for kind in kinds if isinstance(kind, Choices) for word in kind.words}:
            model.tokenizer.single_id(word)
    except ConfigError as error:
        raise ConfigError(
            f"{benchmark.name} compares the probabilities of single tokens, which {model.name} does not have: {error}"
        ) from None


def _display_name(config: EvaluateConfig) -> str:
    """The run's name for a run folder, with the step for a checkpoint of it; else the folder's own name."""
    folder, runs = Path(config.load).expanduser().resolve(), Path(config.paths.runs).resolve()
    step = f"/{folder.name}" if is_sharded(folder) else ""
    folder = folder.parent.parent if step else folder
    return (folder.relative_to(runs).as_posix() if folder.is_relative_to(runs) else folder.name) + step
