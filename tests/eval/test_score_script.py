"""`scripts/score.py`: its last line, and what it says of files that do not fit."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from official import configured, predictions_file

from cobra.config import PathsConfig, ScoreConfig
from cobra.errors import DataError
from cobra.eval.benchmark import Benchmark
from cobra.eval.files import read_pickle
from cobra.eval.scoring import score

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data_root(assets: Path) -> Path:
    return assets / "fixtures" / "scorers" / "data_root"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Score rows (or the text of a file) against a benchmark."""

    def run(benchmark: Benchmark, rows: list[Any] | str, **settings: Any) -> dict[str, Any]:
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "predictions.jsonl").write_text(text)
        config = ScoreConfig(paths=PathsConfig(), predictions=str(tmp_path / "predictions.jsonl"), **settings)
        return score(config, benchmark)

    return run


def test_script_prints_one_object_last(assets: Path, data_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/score.py", "benchmark=refcoco", f"data_root={data_root}"]
    command += [f"predictions={predictions_file(assets, 'refcoco')}", f"output={tmp_path}", "allow_partial=true"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout.splitlines()[-1])
    assert (line["benchmark"], line["questions"]) == ("refcoco", 81)
    assert set(line["rules"]) == {"official", "paper"}
    part = line["rules"]["paper"]["RefCOCO+"]
    assert part["accuracy"] == pytest.approx(100 * 16 / 27) and part["invalid"] == 5 and part["questions"] == 27
    assert part["interval_95"][0] < part["accuracy"] < part["interval_95"][1]
    assert json.loads((tmp_path / "results.json").read_text()) == line
    rows = [json.loads(row) for row in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 81 and set(rows[0]) == {"question_id", "official", "paper"}


def test_scoring_needs_no_torch() -> None:
    names = ["easyvqa", "vqav2", "gqa", "vizwiz", "textvqa", "vsr", "pope", "refcoco"]
    code = "import sys, cobra.eval.scoring, " + ", ".join(f"cobra.eval.benchmarks.{name}" for name in names)
    output = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint([m for m in ('torch', 'timm', 'matplotlib') if m in sys.modules])"],
        cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip
    assert output.strip() == "[]"


def test_all_questions_need_no_permission(data_root: Path, run: Callable[..., dict[str, Any]]) -> None:
    benchmark = configured("gqa", data_root)
    questions = benchmark.questions()
    rows = [{"question_id": q.id, "prediction": q.truth["answer"]} for q in questions]
    result = run(benchmark, rows)
    numbers = result["rules"]["official"]
    assert numbers["accuracy"] == 100 and numbers["distribution"] == 0 and numbers["consistency"] == 100
    assert result["questions"] == 110 and numbers["questions"] == sum(q.is_counted for q in questions) < 110
    assert "left_out" not in result
    assert set(numbers) >= {"by_structural", "by_semantic", "by_steps", "by_words", "by_answer"}


def test_gqa_uses_the_choices_file_where_it_is(data_root: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    (tmp_path / "gqa").mkdir()
    source = data_root / "gqa" / "testdev_balanced_questions.json"
    (tmp_path / "gqa" / source.name).symlink_to(source)
    ids = list(json.loads(source.read_text()))
    choices = {one: {"valid": ["yes", "red"], "plausible": ["red"]} for one in ids}
    (tmp_path / "gqa" / "testdev_choices.json").write_text(json.dumps(choices))
    benchmark = configured("gqa", tmp_path)
    result = run(benchmark, [{"question_id": one, "prediction": "yes"} for one in ids])
    common = [q for q in benchmark.questions() if q.is_counted and "Common" in q.truth["detailed"]]
    counted = result["rules"]["paper"]["questions"]
    assert result["rules"]["paper"]["validity"] == pytest.approx(100 * (1 - len(common) / counted))
    assert result["rules"]["paper"]["plausibility"] == 0


def test_pope_has_the_mean_of_its_splits(assets: Path, data_root: Path, run: Callable[..., dict[str, Any]]) -> None:
    text = predictions_file(assets, "pope").read_text()
    parts = run(configured("pope", data_root), text, allow_partial=True)["rules"]["paper"]
    assert list(parts) == ["random", "popular", "adversarial", "all"]
    assert parts["all"]["accuracy"] == pytest.approx(sum(parts[p]["accuracy"] for p in list(parts)[:3]) / 3)
    assert set(parts["random"]) >= {"precision", "recall", "f1", "yes_ratio", "roc_auc", "pr_auc"}


def test_missing_doubled_and_unknown_ids_are_named(data_root: Path, run: Callable[..., dict[str, Any]]) -> None:
    benchmark = configured("vizwiz", data_root)
    name = "VizWiz_val_{:08}.jpg"
    rows = [{"question_id": name.format(i), "prediction": "yes"} for i in (0, 1, 1, 999_999)]
    with pytest.raises(DataError) as error:
        run(benchmark, rows)
    message = str(error.value)
    assert "114 missing ids" in message and "allow_partial=true" in message
    assert f"1 doubled id: {name.format(1)}" in message and f"1 unknown id: {name.format(999_999)}" in message
    result = run(benchmark, rows, allow_partial=True)
    assert result["questions"] == 2 and result["left_out"] == {"missing": 114, "doubled": 1, "unknown": 1}


def test_of_doubled_ids_the_first_counts(data_root: Path, run: Callable[..., dict[str, Any]]) -> None:
    rows = [{"question_id": "VizWiz_val_00000000.jpg", "prediction": text} for text in ("yes", "no")]
    rules = run(configured("vizwiz", data_root), rows, allow_partial=True)["rules"]
    assert rules["official"]["accuracy"] == 100


def test_numbers_and_texts_are_the_same_id(data_root: Path, run: Callable[..., dict[str, Any]]) -> None:
    rows = [{"question_id": "300097000", "prediction": "x"}, {"question_id": 70251000, "prediction": "x"}]
    assert run(configured("vqav2", data_root), rows, allow_partial=True)["questions"] == 2
    rows = [{"question_id": 203158380, "prediction": "x"}]
    assert run(configured("gqa", data_root), rows, allow_partial=True)["questions"] == 1


def test_predictions_of_another_benchmark_are_refused(
    assets: Path, data_root: Path, run: Callable[..., dict[str, Any]]
) -> None:
    text = predictions_file(assets, "gqa").read_text()
    for allow in (False, True):
        with pytest.raises(DataError, match="answers none of the 116 questions of vizwiz; is it the file of another"):
            run(configured("vizwiz", data_root), text, allow_partial=allow)


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("vsr", {"question_id": 0, "prediction": "True"}, 'line 1, probabilities: None .* A row is .*"True": 0.5'),
        (
            "vsr",
            {"question_id": 0, "probabilities": {"Yes": 1, "No": 0}},
            "does not give the probabilities of True and False",
        ),
        ("vsr", {"question_id": 0, "probabilities": {"True": float("nan"), "False": 0}}, "NaN comes from a model"),
        ("vsr", {"question_id": 0, "probabilities": {"True": -1, "False": 2}}, "numbers from 0 to 1"),
        ("vsr", {"question_id": 0, "probabilities": {"True": 10**400, "False": 0}}, "numbers from 0 to 1"),
        ("vsr", {"question_id": 0, "probabilities": {"True": 1e308, "False": 1e308}}, "numbers from 0 to 1"),
        ("vsr", {"question_id": 0, "probabilities": {"True": True, "False": False}}, "numbers from 0 to 1"),
        ("vsr", {"question_id": 0, "probabilities": {"True": 0, "False": 0}}, "not all 0"),
        ("vsr", {"question_id": 0, "probabilities": {"True": "1", "False": 0}}, "numbers from 0 to 1"),
        ("vqav2", {"question_id": 300097000, "prediction": None}, "line 1, prediction: None is no text. A row is"),
        ("vqav2", {"question_id": 300097000, "prediction": 2}, "line 1, prediction: 2 is no text"),
        ("vqav2", {"prediction": "x"}, "line 1, has no 'question_id'"),
        ("vqav2", ["x"], "line 1, has no 'question_id'"),
        ("textvqa", {"question_id": 34602, "prediction": "x"}, "has no 'prompt'"),
    ],
)
def test_bad_row_is_named(data_root: Path, run: Callable[..., dict[str, Any]], name: str, row: Any, words: str) -> None:
    for allow in (False, True):
        with pytest.raises(DataError, match=words):
            run(configured(name, data_root), [row], allow_partial=allow)


def test_broken_line_is_named(data_root: Path, run: Callable[..., dict[str, Any]]) -> None:
    text = '{"question_id": "VizWiz_val_00000000.jpg", "prediction": "yes"}\n{"question_id": "VizW'
    with pytest.raises(DataError, match=r"line 2, is not JSON"):
        run(configured("vizwiz", data_root), text)
    assert run(configured("vizwiz", data_root), text, allow_partial=True)["left_out"]["broken"] == 1


@pytest.mark.parametrize(
    "answer", ["\x00\x1b[31m\u2028\x85", "x" * 10_000, "[" * 10_000 + "zq", ".x" * 5_000, "\ud83d"]
)
@pytest.mark.parametrize("name", ["vqav2", "gqa", "vizwiz", "textvqa", "refcoco"])
def test_odd_answers_are_scored(data_root: Path, run: Callable[..., dict[str, Any]], name: str, answer: str) -> None:
    benchmark = configured(name, data_root)
    rows = [benchmark.id_fields(question) | {"prediction": answer} for question in benchmark.questions()]
    rules = run(benchmark, rows)["rules"]
    parts = rules["official"].values() if name in ("textvqa", "refcoco") else [rules["official"]]
    assert all(part["accuracy"] == 0 for part in parts)
    assert name != "refcoco" or all(part["invalid"] == part["questions"] for part in parts)


@pytest.mark.parametrize("name", ["vqav2", "gqa", "vizwiz", "textvqa", "vsr", "pope", "refcoco"])
def test_everything_missing_is_listed(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as error:
        configured(name, tmp_path).questions()
    lines = str(error.value).splitlines()
    count = {"vqav2": 3, "textvqa": 3, "pope": 4, "refcoco": 7}.get(name, 2)
    assert f"lacks {count} of what is needed" in lines[0] and len(lines) == 2 + 2 * count
    assert all("http" in line for line in lines[2:-1:2])
    assert lines[-1] == f"All of it comes with: cobra prepare benchmark={name} data_root={tmp_path}"


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        ("vizwiz", "vizwiz/val.json", '[{"image": "x.jpg"}]', "is not VizWiz's val.json: a row has no 'question'"),
        ("vizwiz", "vizwiz/val.json", "[{", "is not valid JSON"),
        ("gqa", "gqa/testdev_balanced_questions.json", "[]", "is not a file of GQA's questions"),
        ("vsr", "vsr/test.jsonl", '{"image": "x.jpg"}\n{', "line 2, is not valid JSON"),
        ("refcoco", "refcoco/refcoco+/instances.json", "{}", r"is not the instances.json of RefCOCO\+"),
        ("refcoco", "refcoco/refcoco/refs(unc).p", "nonsense", "is not a pickle of plain lists and dicts"),
        (
            "pope",
            "pope/coco_pope_random.json",
            '{"question_id": 1, "image": "x", "text": "?", "label": 1}',
            "yes or no",
        ),
    ],
)
def test_annotations_of_another_kind_are_named(
    data_root: Path, tmp_path: Path, name: str, file: str, content: str, words: str
) -> None:
    for source in (data_root / Path(file).parts[0]).rglob("*"):
        target = tmp_path / source.relative_to(data_root)
        if source.is_file() and source.suffix != ".jpg":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=words):
        configured(name, tmp_path).questions()


def test_vqav2_files_of_different_splits_are_refused(data_root: Path, tmp_path: Path) -> None:
    (tmp_path / "v2_val2014_annotations.json").symlink_to(data_root / "vqa-v2" / "v2_val2014_annotations.json")
    text = (data_root / "vqa-v2" / "v2_val2014_questions.json").read_text()
    (tmp_path / "v2_val2014_questions.json").write_text(text.replace("300097000", "300097009"))
    with pytest.raises(DataError, match="belong to different splits: 2 question ids"):
        configured("vqav2", tmp_path).questions()


class Harmful:
    """What a malicious pickle holds."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch harmed",))


@pytest.mark.parametrize("value", [Harmful(), [Harmful()], ValueError("x"), Path("x")])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object, protocol: int) -> None:
    monkeypatch.chdir(tmp_path)
    Path("refs.p").write_bytes(pickle.dumps(value, protocol=protocol))
    with pytest.raises(DataError, match="is not a pickle of plain lists and dicts: it asks for"):
        read_pickle(Path("refs.p"))
    assert not Path("harmed").exists()


def test_plain_pickles_are_read(tmp_path: Path) -> None:
    value = [{"a": 1, "b": [0.5, "é"]}]
    value.append(value[0])
    for protocol in (0, 2, 4):
        (tmp_path / "refs.p").write_bytes(pickle.dumps(value, protocol=protocol))
        assert read_pickle(tmp_path / "refs.p") == value
    (tmp_path / "refs.p").write_bytes(pickle.dumps([b"bytes"]))
    with pytest.raises(DataError, match="holds a bytes"):
        read_pickle(tmp_path / "refs.p")
