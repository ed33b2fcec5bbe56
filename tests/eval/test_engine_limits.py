"""The engine where things run short: memory, images that decode, questions that are wanted."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made import Made
from official import config_of, configured, rows_of, short
from PIL import Image

import cobra
from cobra.errors import DataError, ResourceError
from cobra.eval.benchmark import Choices, FreeText, Question
from cobra.eval.engine import Engine, group_by_image, select
from cobra.eval.engine import ask as ask_and_store
from cobra.eval.run import evaluate, evaluate_all
from cobra.eval.store import AnswerStore

SHORT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
]


OTHER_NAMES = [
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
]


class Crowded:
    """A model in which so many rows fit; its answer tells what was asked of which image."""

    def __init__(self, fits: int, error: BaseException) -> None:
        self.fits, self.error, self.sizes = fits, error, list[int]()

    def prepare_image(self, image: Path) -> Path:
        if "broken" in image.name:
            raise DataError("cannot be decoded.")
        return image

    def encode_image(self, image: Sequence[Path]) -> Any:
        return RowsOf(image)

    def generate(self, image: Any, prompt: Sequence[str], *, max_new_tokens: int) -> list[str]:
        self.sizes.append(len(prompt))
        if len(prompt) > self.fits:
            raise self.error
        return [f"{path.name} {text}" for path, text in zip(image, prompt, strict=True)]

    def max_batch_size(self) -> int:
        return 64


class RowsOf(list[Path]):
    def __getitem__(self, rows: Any) -> Any:
        return RowsOf(list.__getitem__(self, row) for row in rows) if isinstance(rows, list) else super()[rows]


def made(count: int, per_image: int = 3, name: str = "image") -> list[Question]:
    return [
        Question(id=str(i), image=Path(f"{name}{i // per_image}"), text=str(i), truth="", answer=FreeText())
        for i in range(count)
    ]


def ask(engine: Engine, questions: Sequence[Question]) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for found in engine.answers(group_by_image(questions, engine.batch_size)):
        assert not answers.keys() & found.keys()
        answers |= found
    return answers


@pytest.mark.parametrize("error", SHORT_OF_MEMORY)
@pytest.mark.parametrize("fits", [1, 2, 5, 40])
def test_batches_shrink_until_they_fit(error: BaseException, fits: int) -> None:
    model, questions = Crowded(fits, error), made(100)
    engine = Engine(model, None)
    assert ask(engine, questions) == {q.id: f"{q.image.name} {q.text}" for q in questions}
    assert engine.batch_size <= fits
    failed = [size for size in model.sizes if size > fits]
    assert failed == sorted(failed, reverse=True) and len(failed) == len(set(failed)) <= 6  # each size is tried once


def test_single_question_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ResourceError, match=r"too small for a single question \(0\): CUDA out of memory"):
        ask(Engine(Crowded(0, SHORT_OF_MEMORY[0]), 4), made(4))
    for error in OTHER_NAMES:
        with pytest.raises(ResourceError):
            ask(Engine(Crowded(0, error), 1), made(1))
    with pytest.raises(RuntimeError, match="another"):
        ask(Engine(Crowded(0, RuntimeError("another")), 4), made(4))


@pytest.mark.parametrize("error", [*SHORT_OF_MEMORY, *OTHER_NAMES])
def test_image_that_memory_is_too_small_for_is_not_taken_for_broken(error: BaseException) -> None:
    class Full(Crowded):
        def prepare_image(self, image: Path) -> Path:
            raise error

    with pytest.raises(ResourceError, match=r"too small to read image0 beside 1 others: .* smaller batch_size"):
        ask(Engine(Full(9, error), 6, skip_broken=True), made(6))


class Wrong(Crowded):
    """Gives the sixth question a wrong answer."""

    name = "somebody's model"

    def __init__(self, wrong: Any) -> None:
        super().__init__(9, MemoryError())
        self.wrong = wrong

    def generate(self, image: Any, prompt: Sequence[str], *, max_new_tokens: int) -> list[Any]:
        return [self.wrong if text == "5" else text for text in prompt]

    def score(self, image: Any, prompt: Sequence[str], choices: Sequence[str]) -> list[Any]:
        return [self.wrong if text == "5" else [np.float32(0.75), 0.25] for text in prompt]


NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "wrong", "words"),
    [
        (FreeText(), None, "None is no text"),
        (FreeText(), b"yes", "b'yes' is no text"),
        (Choices(words=("Yes", "No")), [NAN, NAN], "try dtype=float32"),
        (Choices(words=("Yes", "No")), [torch.tensor(0.5), 0.5], "numbers from 0 to 1"),
        (Choices(words=("Yes", "No")), [1.0], r"\[1.0\] does not give the probabilities of Yes and No"),
    ],
)
def test_wrong_answer_ends_the_run_and_is_not_stored(tmp_path: Path, kind: Any, wrong: Any, words: str) -> None:
    questions = [replace(question, answer=kind) for question in made(9)]
    store = AnswerStore(tmp_path, {}, Made(tmp_path), questions)
    with pytest.raises(DataError, match=rf"somebody's model answered question 5 in a wrong form: .*{words}"):
        ask_and_store(Engine(Wrong(wrong), 3), questions, store)
    store.close()
    expected = {str(i): str(i) if kind == FreeText() else {"Yes": 0.75, "No": 0.25} for i in range(3)}
    store = AnswerStore(tmp_path, {}, Made(tmp_path), questions)
    assert store.answers == expected
    store.close()


def test_number_of_answers_is_checked() -> None:
    class Short(Crowded):
        def generate(self, image: Any, prompt: Sequence[str], *, max_new_tokens: int) -> list[str]:
            return ["yes"]

    with pytest.raises(DataError, match="Short gave 1 answers to 3 questions"):
        ask(Engine(Short(9, MemoryError()), 3), made(3))


def test_image_that_does_not_decode_is_named_or_left_out() -> None:
    questions = [*made(6), *made(3, name="broken")]
    with pytest.raises(DataError, match=r"broken0: cannot be decoded\. on_missing=skip"):
        ask(Engine(Crowded(9, MemoryError()), 4), questions)
    engine = Engine(Crowded(9, MemoryError()), 4, skip_broken=True)
    assert list(ask(engine, questions).values()) == [f"image{i // 3} {i}" for i in range(6)]
    assert engine.broken == [Path("broken0")]


@pytest.fixture
def data_root(assets: Path) -> Path:
    return assets / "fixtures" / "scorers" / "data_root"


def test_broken_images_of_a_benchmark_are_left_out(trained_run: Path, data_root: Path, tmp_path: Path) -> None:
    shutil.copytree(data_root / "pope", tmp_path / "pope")
    benchmark = configured("pope", tmp_path)
    asked = select(benchmark.questions(), 12)
    broken = asked[0].image
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{broken.name}"):
        evaluate(config_of(trained_run, tmp_path / "out", limit=12), benchmark)
    evaluate(config_of(trained_run, tmp_path / "out", limit=12, on_missing="skip"), benchmark)
    left = [question.id for question in asked if question.image != broken]
    assert [row["question_id"] for row in rows_of(tmp_path / "out")] == left
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["broken_images"] == [str(broken)] and results["num_questions"] == len(left)


@pytest.mark.parametrize("name", ["vqav2", "vsr"])
def test_killed_run_ends_with_the_same_bytes(trained_run: Path, data_root: Path, tmp_path: Path, name: str) -> None:
    """Batches must not depend on what was answered before: sums in another order round differently."""
    benchmark = short(name, data_root)
    evaluate(config_of(trained_run, tmp_path, batch_size=7), benchmark)
    file = tmp_path / "predictions.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in (1, 9):
        file.write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
        evaluate(config_of(trained_run, tmp_path, batch_size=7), benchmark)
        assert file.read_bytes() == whole


def test_subset_has_whole_images_and_enough_of_each_part(data_root: Path) -> None:
    questions = configured("pope", data_root).questions()
    chosen = select(questions, subset="smoke")
    counts = Counter(question.part for question in chosen)
    total = Counter(question.part for question in questions)
    assert all(counts[part] >= min(50, total[part]) for part in total) and len(chosen) < len(questions)
    images = {question.image for question in chosen}
    assert (
        chosen == [question for question in questions if question.image in images] == select(questions, None, "smoke")
    )
    assert select(chosen, 5) == select(questions, 5, "smoke")


def test_batch_size_is_what_the_states_leave_room_for(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cobra.load(trained_run, device="cpu")
    state = model.encode_image(Image.new("RGB", (9, 9))).state
    row = 3 * sum(tensor.nbytes for tensor in [*state.conv, *state.ssm])
    weights = sum(parameter.nbytes for parameter in model.model.parameters())
    for rows, expected in ((1, 1), (5, 4), (100, 64), (10**6, 512), (0, 1)):
        monkeypatch.setattr("cobra.api.total_memory", lambda _, rows=rows: weights + 4 * rows * row)
        assert model.max_batch_size() == expected


def test_several_benchmarks_share_one_model(
    trained_run: Path, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Any] = []
    monkeypatch.setattr("cobra.eval.models.load", lambda *a, **k: loads.append(a) or cobra.load(*a, **k))
    benchmarks = [short(name, data_root) for name in ("vsr", "gqa")]
    both = evaluate_all(config_of(trained_run, tmp_path / "both"), benchmarks)
    with Image.open(tmp_path / "both" / "examples.png") as image:
        assert min(image.size) > 200
    assert "![examples](examples.png)" in (tmp_path / "both" / "summary.md").read_text()
    alone = evaluate(config_of(trained_run, tmp_path / "alone"), benchmarks[1])
    assert len(loads) == 2 and both[1].per_question == alone.per_question
    assert rows_of(tmp_path / "both" / "gqa") == rows_of(tmp_path / "alone")
    missing = [configured(name, tmp_path / "nothing") for name in ("pope", "refcoco")]
    with pytest.raises(DataError, match=r"pope lacks 4(.|\n)*refcoco lacks 7"):
        evaluate_all(config_of(trained_run, tmp_path / "none"), missing)
    assert len(loads) == 2


def test_batch_size_that_fits_is_kept_for_the_next_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Crowded(5, SHORT_OF_MEMORY[0])
    facts: list[dict[str, Any]] = []
    monkeypatch.setattr("cobra.eval.run.open_model", lambda *_, **__: model)
    monkeypatch.setattr("cobra.eval.run.model_fingerprint", lambda *_, **__: {})
    monkeypatch.setattr("cobra.eval.run._report", lambda *arguments: facts.append(arguments[-1]))
    monkeypatch.setattr("cobra.eval.run.summary.write", lambda *_: None)
    broken = [tmp_path / "broken-a" / "1.png", tmp_path / "broken-b" / "2.png"]
    monkeypatch.setattr(model, "prepare_image", lambda path: checked(path, broken))
    benchmarks = [Made(image.parent, num_images=4, name=image.parent.name) for image in broken]
    evaluate_all(config_of(tmp_path, tmp_path / "out", batch_size=16, on_missing="skip"), benchmarks)
    assert [size for size in model.sizes if size > 5] == [6]  # in the first benchmark
    assert [one["batch_size"] for one in facts] == [3, 3]
    assert [one["broken_images"] for one in facts] == [[str(image)] for image in broken]


def checked(image: Path, broken: Sequence[Path]) -> Path:
    if image in broken:
        raise DataError("cannot be decoded.")
    return image


def test_all_benchmarks_by_name(trained_run: Path, data_root: Path, tmp_path: Path, script: Any) -> None:
    common = [f"model={trained_run}", f"data_root={data_root}", "benchmark.limit=3", "device=cpu"]
    result = script("evaluate", "benchmark=[vsr,pope]", *common)
    assert result.returncode == 0, result.stderr
    assert {path.parts[-3] for path in tmp_path.glob("results/*/*/results.json")} == {"vsr", "pope"}
    result = script("evaluate", "benchmark=vsr,pope", *common, "benchmark.splits=[random]")
    assert result.returncode == 1 and "'benchmark.splits'" in result.stderr and "benchmark=vsr:" in result.stderr


@pytest.mark.parametrize(
    ("answer", "is_yes"),
    [
        ("Yes", True), ("yes, there is", True), ("No", False), ("no", False), ("There is not. Yes", False),
        ("Yes. No", True), ("Nothing", True), ("", True), ("No, there isn't", False), ("NO", True),
        ("It's no,way", True),
    ],
)  # fmt: skip
def test_pope_reads_text_as_its_script_does(data_root: Path, answer: str, is_yes: bool) -> None:
    """evaluate.py: the text before the first period, commas deleted, split at spaces; "No", "not" or "no" mean no."""
    benchmark: Any = configured("pope", data_root)
    assert benchmark.is_positive(answer) == is_yes
