"""The README of an exported model, with its evaluation results where there are some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cobra.config import ModelConfig
from cobra.errors import DataError
from cobra.models.export import parts_table
from cobra.models.readers import read_json

_USAGE = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "ORGANISATION/NAME"  # or the folder
model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
content = [{"type": "image", "url": "photo.png"}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.device)
answer = model.generate(**inputs, max_new_tokens=128)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
```

It needs `transformers` (5.23 or newer), `timm` and `torch`. One image per conversation, or none. `cobra.load(name)` of
the Cobra project reads it, too.
"""


def model_card(config: ModelConfig, results: Path | None) -> str:
    """Return the README.

    Args:
        config: of the model.
        results: an evaluation's folder, or one around the evaluations of one model; None for no results.

    Raises:
        DataError: there are no results in that folder, or those of several models.
    """
    evaluations = [] if results is None else _read(results)
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["cobra", "mamba", "vision-language"],
    }
    if evaluations:
        head["model-index"] = [{"name": config.name, "results": _index(evaluations)}]
    front = yaml.safe_dump(head, sort_keys=False)
    lines = [f"# {config.name}", "", "A Mamba vision-language model made with Cobra (arXiv 2403.14520).", ""]
    lines += [parts_table(config), _USAGE]
    if evaluations:
        lines += ["## Evaluation", "", *_table(evaluations)]
    return f"---\n{front}---\n" + "\n".join(lines)


def _read(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.rglob("results.json"))
    if not files:
        raise DataError(f"{folder} holds no results.json; give the folder that scripts/evaluate.py wrote.")
    evaluations = [read_json(file) for file in files]
    for file, evaluation in zip(files, evaluations, strict=True):
        missing = [key for key in ("benchmark", "model", "columns") if key not in evaluation]
        if missing:
            raise DataError(f"{file} is no result of an evaluation: it lacks {', '.join(missing)}.")
    models = sorted({str(evaluation["model"]) for evaluation in evaluations})
    if len(models) > 1:
        raise DataError(f"{folder} holds results of several models ({', '.join(models)}); give the folder of one.")
    try:
        _table(evaluations)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder} holds results that are not as evaluations write them ({error!r}).") from None
    return evaluations


def _scores(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, int, str, Mapping[str, Any]]]:
    """Return benchmark, column, number of questions, rule and its numbers, for every score there is."""
    return [
        (*_dataset(evaluation["benchmark"], column, found), found["questions"], rule, numbers)
        for evaluation in evaluations
        for column, found in evaluation["columns"].items()
        for rule, numbers in found["rules"].items()
    ]


def _dataset(benchmark: str, column: str, found: Mapping[str, Any]) -> tuple[str, str]:
    """Return type and name; a part of a known benchmark, or a miniature, must not pass for the benchmark itself."""
    if found.get("reference") is None or found["is_whole"]:
        return benchmark, column
    return f"{benchmark}-other-questions", f"{column} (other questions)"


def _index(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the scores as the Hub's `model-index` has them."""
    return [
        {
            "task": {"type": "image-text-to-text"},
            "dataset": {"type": benchmark, "name": column},
            "metrics": [
                {
                    "type": "accuracy",
                    "value": round(numbers["accuracy"], 2),
                    "name": f"accuracy in percent, {rule} rule, {questions} questions",
                }
            ],
        }
        for benchmark, column, questions, rule, numbers in _scores(evaluations)
    ]


def _table(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = ["| benchmark | questions | rule | accuracy (%) | 95 % interval |", "|---|---|---|---|---|"]
    for _, column, questions, rule, numbers in _scores(evaluations):
        low, high = numbers["interval_95"]
        rows.append(f"| {column} | {questions:,} | {rule} | {numbers['accuracy']:.2f} | {low:.2f} - {high:.2f} |")
    return [*rows, "", f"Evaluated by Cobra as `{evaluations[0]['model']}`, greedily.", ""]
