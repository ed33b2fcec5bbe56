"""`scripts/evaluate.py` on every benchmark: what it writes, and that `scripts/score.py` gives the same scores."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from official import FOLDERS, LIMIT, config_of, configured, rows_of, short
from PIL import Image

import cobra
from cobra.config import PathsConfig, ScoreConfig
from cobra.errors import CheckpointError, ConfigError, DataError
from cobra.eval import engine, gallery
from cobra.eval.benchmark import Choices
from cobra.eval.fingerprint import model_fingerprint
from cobra.eval.gallery import examples, plot_examples, show
from cobra.eval.run import evaluate
from cobra.eval.scoring import score


@pytest.fixture
def data_root(assets: Path) -> Path:
    return assets / "fixtures" / "scorers" / "data_root"


@pytest.mark.parametrize("name", FOLDERS)
def test_benchmark_is_asked_and_scored(trained_run: Path, data_root: Path, tmp_path: Path, name: str) -> None:
    benchmark = short(name, data_root)
    evaluate(config_of(trained_run, tmp_path), benchmark)
    results = json.loads((tmp_path / "results.json").read_text())
    again = score(
        ScoreConfig(paths=PathsConfig(), predictions=str(tmp_path / "predictions.jsonl"), allow_partial=True), benchmark
    )
    assert again["questions"] == LIMIT and set(again["left_out"]) == {"missing"}
    assert results["rules"] == again["rules"] and set(results["rules"]) == {"official", "paper"}
    report = (tmp_path / "report.md").read_text()
    assert "| official (%) | 95 % interval | paper's rule (%) | 95 % interval |" in report
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) >= 2 and all(f"]({picture.name})" in report for picture in pictures)
    for picture in pictures:
        with Image.open(picture) as image:
            image.load()


def test_other_files_in_the_folder_stay(trained_run: Path, data_root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"mine")
    benchmark = short("pope", data_root)
    evaluate(replace(config_of(trained_run, tmp_path), limit=1), benchmark)
    assert (tmp_path / "examples.png").is_file()
    evaluate(config_of(trained_run, tmp_path), benchmark)  # goes on, and writes its report anew
    assert (tmp_path / "mine.png").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["pope", "vsr", "refcoco", "textvqa"])
def test_batched_answers_equal_one_by_one(trained_run: Path, data_root: Path, tmp_path: Path, name: str) -> None:
    benchmark = short(name, data_root)
    evaluate(config_of(trained_run, tmp_path), benchmark)
    model, questions = cobra.load(trained_run, device="cpu"), {q.id: q for q in benchmark.questions()}
    rows = rows_of(tmp_path)
    assert len(rows) == LIMIT
    for row in rows:
        question = questions[benchmark.row_id(row)]
        assert row.items() >= benchmark.id_fields(question).items()
        if isinstance(question.answer, Choices):
            words = question.answer.words
            assert list(row["probabilities"]) == list(words)
            alone = model.score(question.image, question.text, words)
            assert list(row["probabilities"].values()) == pytest.approx(alone, abs=1e-5)
        else:
            assert row["prediction"] == model.generate(question.image, question.text, max_new_tokens=6)


def test_stopped_evaluation_of_probabilities_goes_on(trained_run: Path, data_root: Path, tmp_path: Path) -> None:
    benchmark = configured("pope", data_root)
    evaluate(config_of(trained_run, tmp_path), benchmark)
    whole, results = rows_of(tmp_path), (tmp_path / "results.json").read_text()
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in whole[:7]) + '{"question_id": "rand')
    evaluate(config_of(trained_run, tmp_path), benchmark)
    assert rows_of(tmp_path)[:7] == whole[:7] and len(rows_of(tmp_path)) == len(whole)
    assert json.loads((tmp_path / "results.json").read_text())["asked_now"] == LIMIT - 7
    assert json.loads(results)["rules"].keys() == {"official", "paper"}


def test_every_right_answer_can_be_read(data_root: Path) -> None:
    expected = {
        "pope": ("Yes", "No"), "vsr": ("True", "False"), "refcoco": "[0.", "vqav2": "(", "vizwiz": "(", "textvqa": "(",
    }  # fmt: skip
    for name in FOLDERS:
        benchmark = configured(name, data_root)
        for question in benchmark.questions():
            shown = benchmark.show_truth(question)
            words = expected.get(name, "")
            assert shown in words if isinstance(words, tuple) else words in shown
            assert "{" not in shown and "Truth" not in shown
            assert (benchmark.true_box(question) is None) == (name != "refcoco")
    assert show({"Yes": 0.5, "No": 0.5}) == "Yes (50 %)" and show("") == "(nothing)"


def test_odd_answers_are_drawn(data_root: Path, tmp_path: Path) -> None:
    benchmark = configured("refcoco", data_root)
    questions = engine.select(benchmark.questions(), 5)
    odd = ["$x_$", "\x00\x1b[31m\u2028", "x" * 10_000, "[0.1, 0.2, 0.8, 0.9]", "\ud83d"]
    answers = dict(zip([question.id for question in questions], odd, strict=True))
    shown = examples(benchmark, questions, answers, benchmark.score(answers, questions))
    plot_examples(tmp_path / "examples.png", shown, "odd")
    with Image.open(tmp_path / "examples.png") as image:
        assert max(image.size) < 3000


def test_texts_of_examples_do_not_run_into_each_other(data_root: Path) -> None:
    benchmark = configured("refcoco", data_root)
    chosen = engine.select(benchmark.questions(), 6)
    questions = [
        replace(question, text="the one on the left " * (3 + 40 * (i % 2))) for i, question in enumerate(chosen)
    ]
    answers = {question.id: "a long answer " * 20 for question in questions}
    shown = examples(benchmark, questions, answers, benchmark.score(answers, questions))
    figure = gallery._figure(shown, "title", num_columns=3)
    FigureCanvasAgg(figure).draw()
    boxes = [part.get_tightbbox() or pytest.fail("empty") for part in (*figure.axes, *figure.texts)]
    assert len(boxes) == 7
    for box in boxes:
        assert box.y0 >= 0 and box.y1 <= figure.bbox.height
        assert not [other for other in boxes if other is not box and box.overlaps(other)]


def test_model_without_the_words_is_refused(
    trained_run: Path, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = configured("vsr", data_root)
    monkeypatch.setattr("cobra.eval.benchmarks.vsr.VSR.words", ("True", "Untrueish"))
    monkeypatch.setattr("cobra.eval.run.ask", lambda *_: pytest.fail("was asked"))
    with pytest.raises(ConfigError, match=r"vsr compares the probabilities of single tokens, .*'Untrueish' is \d tok"):
        evaluate(config_of(trained_run, tmp_path), benchmark)


def test_missing_images_are_listed_or_skipped(trained_run: Path, data_root: Path, tmp_path: Path) -> None:
    shutil.copytree(data_root / "pope", tmp_path / "pope")
    benchmark = configured("pope", tmp_path)
    asked = engine.select(benchmark.questions(), LIMIT)
    gone = {question.image for question in asked[:2]}
    for image in gone:
        image.unlink()
    left = [question.id for question in asked if question.image not in gone]
    with pytest.raises(DataError, match=rf"pope lacks {len(gone)} image(.|\n)*on_missing=skip") as error:
        evaluate(config_of(trained_run, tmp_path / "out"), benchmark)
    assert all(str(image) in str(error.value) for image in gone)
    evaluate(config_of(trained_run, tmp_path / "out", on_missing="skip"), benchmark)
    assert {row["question_id"] for row in rows_of(tmp_path / "out")} == set(left)
    listed = (tmp_path / "out" / "missing_images.txt").read_text().splitlines()
    assert set(listed) == {str(image) for image in gone}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["missing_images"] == len(gone)
    for image in {question.image for question in asked} - gone:
        image.unlink()
    with pytest.raises(DataError, match="No question is left"):
        evaluate(config_of(trained_run, tmp_path / "out", on_missing="skip"), benchmark)


def test_training_checkpoint_is_evaluated(trained_run: Path, data_root: Path, tmp_path: Path) -> None:
    benchmark = configured("pope", data_root)
    (checkpoint,) = (trained_run / "checkpoints").glob("step-*")
    evaluate(config_of(trained_run, tmp_path / "model"), benchmark)
    config = replace(config_of(checkpoint, tmp_path), output=None, paths=PathsConfig(results=str(tmp_path / "results")))
    evaluate(config, benchmark)
    folder = tmp_path / "results" / "pope" / trained_run.name / checkpoint.name
    assert rows_of(folder) == rows_of(tmp_path / "model")
    run = tmp_path / "resumed"
    shutil.copytree(trained_run, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("max_steps: 60", "max_steps: 90"))
    again = run / "checkpoints" / checkpoint.name
    assert model_fingerprint(str(again)) == model_fingerprint(str(checkpoint))
    (run / "config.yaml").write_text(text.replace("prompt: ", "prompt: x"))
    with pytest.raises(DataError, match="another model config;"):
        evaluate(replace(config, load=str(again), output=str(folder)), benchmark)
    (run / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"config\.yaml is missing"):
        model_fingerprint(str(again))


def test_two_processes_equal_one(trained_run: Path, data_root: Path, tmp_path: Path, script: Any) -> None:
    """Also after a kill that left a part of each rank's answers."""
    arguments = ["benchmark=pope", f"data_root={data_root}", f"model={trained_run}", "limit=24", "device=cpu"]
    evaluate(config_of(trained_run, tmp_path / "one"), configured("pope", data_root))
    alone = rows_of(tmp_path / "one")
    (tmp_path / "two").mkdir()
    for file in ("fingerprint.json", "questions.json"):
        shutil.copy(tmp_path / "one" / file, tmp_path / "two")
    for file, rows in (("predictions", alone[:3]), ("predictions.rank1", alone[5:9])):
        text = "".join(json.dumps(row) + "\n" for row in rows) + '{"question_id": "ran'
        (tmp_path / "two" / f"{file}.jsonl").write_text(text)
    result = script("evaluate", *arguments, f"output={tmp_path / 'two'}", "processes=2")
    assert result.returncode == 0, result.stderr
    together = rows_of(tmp_path / "two")
    assert [row["question_id"] for row in together] == [row["question_id"] for row in alone]
    for row, other in zip(together, alone, strict=True):
        assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0]["rules"] == results[1]["rules"]
    assert (results[1]["processes"], results[1]["asked_now"]) == (2, LIMIT - 7)
    assert not list((tmp_path / "two").glob("predictions.rank*"))
    assert result.stderr.count("Report: ") + result.stdout.count("Report: ") == 1
