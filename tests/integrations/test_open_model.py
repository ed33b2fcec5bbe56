"""Models by name: of transformers, of the user's own, of Cobra; what answers depend on; the engine asking them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from cobra.api import Cobra
from cobra.errors import CheckpointError, ConfigError
from cobra.eval import engine
from cobra.eval.benchmark import OFFICIAL, Benchmark, Choices, FreeText, Prediction, Question
from cobra.eval.fingerprint import model_fingerprint as cobra_fingerprint
from cobra.eval.models import model_fingerprint, open_model
from cobra.eval.store import AnswerStore

DOCS = Path(__file__).resolve().parents[2] / "docs"


@dataclass
class Mixed(Benchmark):
    """An open and a closed question about every picture."""

    rules: ClassVar[tuple[str, ...]] = (OFFICIAL,)
    pictures: list[Path]
    name: str = "mixed"

    def questions(self) -> list[Question]:
        kinds = (FreeText(max_new_tokens=5), Choices(words=("Yes", "No")))
        return [
            Question(id=f"{i}/{k}", image=picture, text=f"what is picture {i * k}?", answer=kind, truth="Yes")
            for k, kind in enumerate(kinds)
            for i, picture in enumerate(self.pictures)
        ]

    def score_answer(self, prediction: Prediction, question: Question) -> tuple[float]:
        return (float(not isinstance(prediction, str) and max(prediction, key=prediction.__getitem__) == "Yes"),)


@pytest.fixture
def mixed(pictures: list[Path]) -> Mixed:
    return Mixed(pictures)


def test_engine_asks_a_transformers_model(llava: Path, mixed: Mixed, tmp_path: Path) -> None:
    model, questions = open_model(f"transformers:{llava}", device="cpu"), mixed.questions()
    store = AnswerStore(tmp_path, {}, mixed, questions)
    engine.ask(engine.Engine(model, 5), questions, store)
    store.close()
    for question in questions:
        image, answer = model.encode_image([question.image]), store.answers[question.id]
        if isinstance(question.answer, Choices):
            (row,) = model.score(image, [question.text], ["Yes", "No"])
            assert answer == pytest.approx({"Yes": row[0], "No": row[1]}, abs=1e-5)
        else:
            assert [answer] == model.generate(image, [question.text], max_new_tokens=5)
    likely = sum(answer["Yes"] >= 0.5 for answer in store.answers.values() if not isinstance(answer, str))
    assert mixed.score(store.answers, questions).overall.percent == pytest.approx(100 * likely / 12)
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 12


def test_cobra_models_by_name(trained_run: Path, pictures: list[Path]) -> None:
    model = open_model(str(trained_run), device="cpu")
    assert isinstance(model, Cobra)
    assert model_fingerprint(str(trained_run)) == cobra_fingerprint(str(trained_run))
    with pytest.raises(CheckpointError):
        open_model("absent/folder/of/a/model", device="cpu")


@pytest.fixture
def my_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The example of the documentation, as a module that can be imported."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "other-models.md").read_text(), re.DOTALL)
    (tmp_path / "my_documented_model.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return "my_documented_model"


def test_documented_example_is_asked(my_model: str, mixed: Mixed, tmp_path: Path) -> None:
    model, questions = open_model(f"python:{my_model}:MyModel", device="cpu"), mixed.questions()
    store = AnswerStore(tmp_path / "answers", {}, mixed, questions)
    engine.ask(engine.Engine(model, 4), questions, store)
    store.close()
    rows = [json.loads(line) for line in (tmp_path / "answers" / "predictions.jsonl").read_text().splitlines()]
    sizes = {f"{i}/0": picture.stat().st_size for i, picture in enumerate(mixed.pictures)}
    found = {row["question_id"]: row["prediction"] for row in rows if "prediction" in row}
    assert found == {key: f"{size} bytes: what is picture 0?" for key, size in sizes.items()}
    assert [row["probabilities"] for row in rows if "probabilities" in row] == [{"Yes": 0.5, "No": 0.5}] * 6


def test_fingerprint_of_a_factory(my_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import my_documented_model  # pyright: ignore[reportMissingImports]

    name = f"python:{my_model}:MyModel"
    plain = model_fingerprint(name)
    assert plain["model"] == name and model_fingerprint(name) == plain
    monkeypatch.setattr(my_documented_model.MyModel, "fingerprint", "version 2", raising=False)
    assert model_fingerprint(name) != plain


def test_fingerprint_of_a_transformers_folder(llava: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in llava.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    first = model_fingerprint(f"transformers:{llava}")
    assert model_fingerprint(f"transformers:{copy}") == first
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    changed = model_fingerprint(f"transformers:{copy}")
    assert changed["model"] == first["model"] and changed["model config"] != first["model config"]
    (copy / "model.safetensors").write_bytes(b"other weights")
    assert model_fingerprint(f"transformers:{copy}")["model"] != first["model"]
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        model_fingerprint(f"transformers:{copy}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("python:absent_module_of_nobody:build", "No module named"),
        ("python:json", "must be python:MODULE:FACTORY"),
        ("python:json:nothing", "nothing called nothing"),
    ],
)
def test_names_of_no_factory(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_model(name)


def test_model_without_the_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_half_a_model.py").write_text(
        "class Half:\n    name = 'half'\n    def __init__(self, device, dtype): pass\n    def generate(self): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="has no encode_image, score, choice_ids;"):
        open_model("python:my_half_a_model:Half")


def test_fingerprint_of_a_hub_name_is_the_cached_commit(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: list[Path]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789" * 4
    repository = tmp_path / "models--somebody--tiny-llava"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / commit).symlink_to(llava, target_is_directory=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    name = "transformers:somebody/tiny-llava"
    assert model_fingerprint(name) == {"model": "somebody/tiny-llava", "model config": commit}
    model = open_model(name, device="cpu")
    local = open_model(f"transformers:{llava}", device="cpu")
    answers = [m.generate(m.encode_image(pictures), ["what?"] * 6, max_new_tokens=5) for m in (model, local)]
    assert answers[0] == answers[1] and model.name == "somebody/tiny-llava"
