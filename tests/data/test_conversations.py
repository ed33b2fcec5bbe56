"""Annotation files: read as a stream, labels on the answers alone; every kind of bad row is one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobra.data import conversations
from cobra.data.batch import Example, collate
from cobra.data.conversations import Row, read_objects, read_rows
from cobra.data.dataset import ConversationDataset
from cobra.errors import DataError
from cobra.text.prompt import IGNORE_INDEX, prompt_format
from cobra.text.tokenizer import Tokenizer

untimed = settings(deadline=None)  # others may have the cores

GOOD = {"id": "ok", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


def make_dataset(tokenizer: Tokenizer, prompt: str = "mamba", **options: Any) -> ConversationDataset:
    return ConversationDataset([], tokenizer, prompt_format(prompt), lambda _: [], **options)


@untimed
@given(
    turns=st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=4),
    prompt=st.sampled_from(["zephyr", "mamba"]),
)
def test_labels_cover_exactly_the_answers(tokenizer: Tokenizer, turns: list[tuple[str, str]], prompt: str) -> None:
    turns = [(question.replace("<", ""), answer.replace("<", "")) for question, answer in turns]
    ids, labels = make_dataset(tokenizer, prompt).tokenize(Row("x", None, tuple(turns)))
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
    row = Row("x", None, (("describe", "red"), ("more", "no")))
    ids = [*tokenizer.encode("red"), tokenizer.end_id]
    assert make_dataset(tokenizer, captions_only=True).tokenize(row) == (ids, ids)


def test_long_rows_are_cut(tokenizer: Tokenizer) -> None:
    row = Row("x", None, (("circle " * 50, "red"),))
    ids, labels = make_dataset(tokenizer, max_length=20).tokenize(row)
    all_ids, _ = make_dataset(tokenizer).tokenize(row)
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
        rows = [read_rows(folder / "train_chat.json")[i] for i in chosen]
    dataset = make_dataset(neox, "zephyr", captions_only=batch == "align2")
    arrays = np.load(folder / "outputs.npz")
    expected_ids, expected_labels = (arrays[f"train/{batch}/{key}"] for key in ("input_ids", "labels"))
    collated = collate([Example(pixels=None, rows=[dataset.tokenize(row)]) for row in rows], neox.end_id)
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
        (messages(("human", "q"), ("gpt", "\ud800")), "half of a surrogate pair"),
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
        (b"[{", r"not valid JSON: row 0, character 1: .* Is the file complete\?"),
        (b'[{"id": 1}', r"after row 0 stands '' instead of ',' or '\]'"),
        (b'[{"id": 1} {"id": 2}]', r"after row 0 stands '\{'"),
        (b'[{"id": 1},]', "not valid JSON: row 1"),
        (b'[{"id": 1}] []', "more text follows the list at character 12"),
        (b"[" + b"[" * 100_000, "not valid JSON"),
        (b"id,image\n", r"does not start with '\['"),
        (b"", r"does not start with '\['"),
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
        list(read_objects(tmp_path / "a.json"))
    assert str(tmp_path / "a.json") in str(caught.value) and "\n" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@untimed
@given(
    values=st.lists(json_values, min_size=1, max_size=8), chunk=st.integers(1, 40), indent=st.sampled_from([None, 2])
)
def test_stream_equals_json(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], chunk: int, indent: int | None
) -> None:
    file = tmp_path_factory.getbasetemp() / "stream.json"
    file.write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8")
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversations, "_CHUNK", chunk)
        assert list(read_objects(file, seen.append)) == values
    assert sum(seen) == file.stat().st_size


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_damaged_file_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A bracket or line end that is missing early must not cost as much memory as the file has text."""
    for setting, size in (("_CHUNK", 1000), ("MAX_ROW", 10_000)):
        monkeypatch.setattr(conversations, setting, size)
    (tmp_path / name).write_text("[" * name.endswith("json") + '{"id": "' + "x" * 1_000_000)
    seen: list[int] = []
    with pytest.raises(DataError, match="not valid JSON"):
        list(read_objects(tmp_path / name, seen.append))
    assert sum(seen) < 50_000


def test_bad_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{{nonsense\n")
    with pytest.raises(DataError, match="line 3 of the file"):
        read_rows(tmp_path / "a.jsonl")


def test_byte_order_mark_and_numbers_as_ids_are_fine(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([GOOD | {"id": 7}, GOOD | {"id": None}]), encoding="utf-8-sig")
    assert [row.id for row in read_rows(tmp_path / "a.json")] == ["7", "row 1"]
