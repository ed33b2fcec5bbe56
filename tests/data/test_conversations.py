"""Annotation files: labels on the answers alone; every kind of bad row or image is one clear error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cobra.data.batch import collate
from cobra.data.conversations import ConversationDataset, Row, read_rows
from cobra.errors import DataError
from cobra.text.prompt import IGNORE_INDEX, prompt_format
from cobra.text.tokenizer import Tokenizer

GOOD = {"id": "ok", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


def make_dataset(rows: list[Row], tokenizer: Tokenizer, folder: Path = Path(), **options: Any) -> ConversationDataset:
    return ConversationDataset(
        rows, folder, tokenizer, prompt_format(options.pop("prompt", "mamba")), lambda _: [], **options
    )


@given(
    turns=st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=4),
    prompt=st.sampled_from(["zephyr", "mamba"]),
)
def test_labels_cover_exactly_the_answers(tokenizer: Tokenizer, turns: list[tuple[str, str]], prompt: str) -> None:
    turns = [(question.replace("<", ""), answer.replace("<", "")) for question, answer in turns]
    dataset = make_dataset([Row("x", None, tuple(turns))], tokenizer, prompt=prompt)
    ((ids, labels),) = dataset[(0,)].rows
    assert len(ids) == len(labels)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
    runs: list[list[int]] = []  # stretches of labelled tokens
    for label, previous in zip(labels, [IGNORE_INDEX, *labels], strict=False):
        if label != IGNORE_INDEX:
            runs += [[]] if previous == IGNORE_INDEX else []
            runs[-1].append(label)
    assert [run[-1] for run in runs] == [tokenizer.end_id] * len(turns)
    assert [tokenizer.decode(run[:-1]) for run in runs] == [answer.strip() or " " for _, answer in turns]
    assert all(question.strip() in tokenizer.decode(ids) for question, _ in turns)


def test_align_stage_learns_the_first_answer_alone(tokenizer: Tokenizer) -> None:
    dataset = make_dataset([Row("x", None, (("describe", "red"), ("more", "no")))], tokenizer, captions_only=True)
    ids = [*tokenizer.encode("red"), tokenizer.end_id]
    assert dataset[(0,)].rows == [(ids, ids)]


def test_long_rows_are_cut(tokenizer: Tokenizer) -> None:
    rows = [Row("x", None, (("circle " * 50, "red"),))]
    ((ids, labels),) = make_dataset(rows, tokenizer, max_length=20)[(0,)].rows
    ((all_ids, _),) = make_dataset(rows, tokenizer)[(0,)].rows
    assert ids == all_ids[:20] and labels == [IGNORE_INDEX] * 20


@pytest.mark.parametrize("batch", ["mm2", "text_only", "align2"])
def test_ids_and_labels_equal_the_public_release(assets: Path, batch: str) -> None:
    """The public code's batches, which pad with the end token too."""
    folder = assets / "fixtures" / "public-cobra-tiny"
    neox = Tokenizer(assets / "data" / "gpt-neox-tokenizer" / "tokenizer.json")
    if batch == "align2":
        rows = [Row(answer, None, (("dropped", answer),)) for answer in ("a red disc and a blue box", "gradient")]
    else:
        chosen = {"mm2": (0, 1), "text_only": (2, 4)}[batch]
        rows = [replace(read_rows(folder / "train_chat.json")[i], image=None) for i in chosen]
    dataset = make_dataset(rows, neox, prompt="zephyr", captions_only=batch == "align2")
    arrays = np.load(folder / "outputs.npz")
    expected_ids, expected_labels = (arrays[f"train/{batch}/{key}"] for key in ("input_ids", "labels"))
    collated = collate([dataset[(i,)] for i in range(2)], neox.end_id)
    assert collated.input_ids.tolist() == expected_ids.tolist()
    assert collated.labels.tolist() == expected_labels.tolist()


def test_json_lines_equal_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([GOOD, GOOD]))
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n")
    assert read_rows(tmp_path / "a.json") == read_rows(tmp_path / "a.jsonl") == [Row("ok", None, (("q", "a"),))] * 2


def test_line_separators_inside_json_lines_survive(tmp_path: Path) -> None:
    row = {"id": "ok", "conversations": [{"from": "human", "value": "q\u2028\x85?"}, {"from": "gpt", "value": "a"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(tmp_path / "a.jsonl")[0].turns == (("q\u2028\x85?", "a"),)


def messages(*roles_and_values: tuple[str, object]) -> dict[str, Any]:
    return {"id": "bad", "conversations": [{"from": role, "value": value} for role, value in roles_and_values]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (messages(("human", "q")), "no answer"),
        (messages(), "no answer"),
        (messages(("human", "q"), ("gpt", "a"), ("human", "q")), "no answer"),
        (messages(("gpt", "a"), ("human", "q")), "message 0 is from 'gpt', expected 'human'"),
        (messages(("human", "q"), ("system", "a")), "message 1 is from 'system', expected 'gpt'"),
        (messages(("human", "q"), ("gpt", 3)), "message 1 must be"),
        (GOOD | {"id": "bad", "image": "../secret.png"}, "leaves the image folder"),
        (GOOD | {"id": "bad", "image": "/etc/secret.png"}, "leaves the image folder"),
        (GOOD | {"id": "bad", "image": 7}, '"image" must be a path'),
        ({"id": "bad", "conversations": "q a"}, '"conversations" list'),
        ("bad", '"conversations" list'),
    ],
)
def test_bad_row_is_named_in_one_line(tmp_path: Path, row: object, message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps([GOOD, row]))
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / "a.json")
    text = str(caught.value)
    assert message in text and f"{tmp_path}/a.json, row 1" in text and "\n" not in text
    assert "id 'bad'" in text or '"conversations" list' in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{", "not valid JSON"),
        (b"{}", "non-empty list"),
        (b"[]", "non-empty list"),
        (b"\xff\xfe\x00", "a.json"),
        (None, "Cannot read"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(caught.value) and "\n" not in str(caught.value)


class TestCheckImages:
    @pytest.fixture
    def dataset(self, tokenizer: Tokenizer, tmp_path: Path) -> ConversationDataset:
        names = ["0.png", "1.png", None, "1.png", "sub/2.png"]
        (tmp_path / "sub").mkdir()
        for name in filter(None, names):
            Image.new("RGB", (8, 8)).save(tmp_path / name)
        return make_dataset([Row(str(i), name, (("q", "a"),)) for i, name in enumerate(names)], tokenizer, tmp_path)

    def test_complete_folder_passes(self, dataset: ConversationDataset) -> None:
        dataset.check_images(decode=False)
        dataset.check_images(decode=True)

    def test_missing_images_are_counted_and_named(self, dataset: ConversationDataset, tmp_path: Path) -> None:
        (tmp_path / "1.png").unlink()
        with pytest.raises(DataError, match=r"1 of 3 images are missing in .*: 1\.png\."):
            dataset.check_images(decode=False)

    @pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "cut short"])
    def test_image_that_does_not_decode_is_named(
        self, dataset: ConversationDataset, tmp_path: Path, content: bytes | None
    ) -> None:
        file = tmp_path / "sub" / "2.png"
        file.write_bytes(file.read_bytes()[:-25] if content is None else content)
        dataset.check_images(decode=False)
        for use in (lambda: dataset.check_images(decode=True), lambda: dataset[(4,)]):
            with pytest.raises(DataError, match=r"sub/2\.png does not decode"):
                use()

    def test_missing_folder_is_named(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        dataset = make_dataset([Row("0", "0.png", (("q", "a"),))], tokenizer, tmp_path / "absent")
        with pytest.raises(DataError, match=r"absent does not exist. Check data\.images"):
            dataset.check_images(decode=False)
