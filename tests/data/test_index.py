"""Indexes: the same rows as the JSON, made once by one of many processes, never half, anew when the file changes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobra.data import index as index_module
from cobra.data.conversations import Row, read_rows
from cobra.data.dataset import ConversationDataset
from cobra.data.index import Index, open_index
from cobra.data.lengths import text_lengths
from cobra.errors import DataError
from cobra.text.prompt import IGNORE_INDEX, prompt_format
from cobra.text.tokenizer import Tokenizer

rows_of_files = st.lists(
    st.builds(
        lambda row_id, image, texts: (
            {
                "id": row_id,
                "conversations": [
                    {"from": role, "value": text}
                    for pair in texts
                    for role, text in zip(("human", "gpt"), pair, strict=True)
                ],
            }
            | ({} if image is None else {"image": image})
        ),
        row_id=st.integers() | st.text(max_size=5),
        image=st.none() | st.sampled_from(["a.png", "b/c.jpg", "b/ö.jpg"]),
        texts=st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=8,
)


def index_of(folder: Path, rows: object, name: str = "a.json") -> Index:
    (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return open_index(folder / name, "set", folder / "index")


def row(row_id: object = "ok", image: str | None = None, *values: str) -> dict[str, Any]:
    messages = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values or ("q", "a"))]
    return {"id": row_id, "image": image, "conversations": messages}


@settings(deadline=None, max_examples=25)  # files are written
@given(rows=rows_of_files, per_batch=st.integers(1, 5))
def test_index_equals_json(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], per_batch: int) -> None:
    folder = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_ROWS_PER_BATCH", per_batch)
        index = index_of(folder, rows)
        expected = read_rows(folder / "a.json")
        assert [index.row(i) for i in range(len(index))] == expected
        assert [row for some in index.rows() for row in some] == expected
    names = index.image_names()
    assert [None if number < 0 else names[number] for number in index.images] == [row.image for row in expected]
    assert len(set(names)) == len(names)


def test_digest_is_of_the_rows(tmp_path: Path) -> None:
    index = index_of(tmp_path, [row(7), row("x", "i.png")])
    text = "".join(repr((r.id, r.image, r.turns)) for r in read_rows(tmp_path / "a.json"))
    assert index.digest == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert index_of(tmp_path, [row(7), row("x", "i.png")], "other.json").digest == index.digest
    assert index_of(tmp_path, [row("x", "i.png"), row(7)]).digest != index.digest


def test_datasets_opens_both_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    index = index_of(tmp_path, [row(1, "i.png", "q", "a", "q2", "a2"), row(2)])
    found = datasets.Dataset.from_file(str(index.folder / "rows.arrow"))
    assert found.to_list() == [
        {"id": "1", "image": "i.png", "turns": ["q", "a", "q2", "a2"]},
        {"id": "2", "image": None, "turns": ["q", "a"]},
    ]
    assert datasets.Dataset.from_file(str(index.folder / "names.arrow"))["image"][:] == ["i.png"]


def test_json_lines_make_the_same_index(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row(1))}\n{json.dumps(row(2, 'i.png'))}\n")
    lines = open_index(tmp_path / "a.jsonl", "set", tmp_path / "index")
    assert lines.digest == index_of(tmp_path, [row(1), row(2, "i.png")]).digest


def test_every_bad_row_is_counted(tmp_path: Path) -> None:
    bad = {
        "not an object": ["text", 3, {"id": "x"}],
        "image is not a path": [row() | {"image": 7}],
        "image leaves the folder": [row(image="../x.png"), row(image="/x.png")],
        "not a message": [row() | {"conversations": [{"from": "human", "value": 3}]}],
        "roles do not alternate": [row() | {"conversations": [{"from": "gpt", "value": "a"}]}],
        "no answer": [row("late", None, "q", "a", "q")] * 30,
        "not Unicode": [row("half", None, "q", "\ud800")],
    }
    index = index_of(tmp_path, [row(1), *(r for rows in bad.values() for r in rows), row(2, None, "q", " ")])
    assert [index.row(i).id for i in range(len(index))] == ["1", "2"]
    report = index.report()
    assert report.counts == {kind: len(rows) for kind, rows in bad.items()}
    assert report.empty_answers == 1
    assert report.first["no answer"][0].startswith("row 9 (id 'late'): the conversation has no answer")
    assert len(report.first["no answer"]) == 20
    assert json.loads((index.folder / "report.json").read_text())["problems"]["no answer"]["count"] == 30


def test_file_without_a_good_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json holds no good row: 2 x not an object \(row 0: "):
        index_of(tmp_path, [1, 2])
    assert not any(path.is_dir() for path in (tmp_path / "index").iterdir())


def test_index_is_made_once(tmp_path: Path) -> None:
    folder = index_of(tmp_path, [row()]).folder
    before = (folder / "rows.arrow").stat().st_mtime_ns
    open_index(tmp_path / "a.json", "set", tmp_path / "index")
    assert (folder / "rows.arrow").stat().st_mtime_ns == before


def test_changed_file_makes_a_new_index(tmp_path: Path) -> None:
    old = index_of(tmp_path, [row(1), row(2)])
    new = index_of(tmp_path, [row(3)])
    assert (old.folder, len(new), new.row(0).id) == (new.folder, 1, "3")
    assert old.row(1).id == "2"  # who has the old one open keeps it
    os.utime(tmp_path / "a.json", ns=(0, 0))
    before = new.folder.stat().st_ino
    assert open_index(tmp_path / "a.json", "set", tmp_path / "index").folder.stat().st_ino != before
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [new.folder.name, f"{new.folder.name}.lock"]


def test_other_format_makes_a_new_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = index_of(tmp_path, [row()]).folder.stat().st_ino
    monkeypatch.setattr(index_module, "_FORMAT", 99)
    assert open_index(tmp_path / "a.json", "set", tmp_path / "index").folder.stat().st_ino != before


@pytest.mark.parametrize(
    ("stop", "expected"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError("disk full"), DataError)]
)
def test_stopped_build_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException, expected: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_number_images", fail)  # when the rows have been written
        with pytest.raises(expected):
            index_of(tmp_path, [row()])
    assert not any(path.is_dir() for path in (tmp_path / "index").iterdir())
    assert len(open_index(tmp_path / "a.json", "set", tmp_path / "index")) == 1


def test_killed_build_is_done_again(tmp_path: Path) -> None:
    folder = index_of(tmp_path, [row()]).folder
    folder.rename(folder.with_name(f"{folder.name}.tmp"))  # as if killed before the last rename
    assert len(open_index(tmp_path / "a.json", "set", tmp_path / "index")) == 1
    assert not folder.with_name(f"{folder.name}.tmp").exists()


@pytest.mark.parametrize("name", ["rows.arrow", "images.npy", "index.json"])
def test_damaged_index_is_made_again(tmp_path: Path, name: str) -> None:
    file = index_of(tmp_path, [row()]).folder / name
    file.write_bytes(file.read_bytes()[:20])
    assert open_index(tmp_path / "a.json", "set", tmp_path / "index").row(0).id == "ok"


def build_slowly(folder: Path, results: Any) -> None:
    original = index_module._build

    def build(*arguments: Any) -> None:
        results.put("built")
        original(*arguments)

    index_module._build = build
    results.put(len(open_index(folder / "a.json", "set", folder / "index")))


def test_one_of_many_processes_builds(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([row(i) for i in range(20_000)]))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=build_slowly, args=(tmp_path, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in range(5)]
    for worker in workers:
        worker.join(60)
    assert sorted(map(str, found)) == ["20000"] * 4 + ["built"]


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("a file")
    with pytest.raises(DataError, match=r"Cannot write the index .* Set data\.index"):
        index_of(tmp_path, [row()])


def test_other_processes_open_the_files_anew(tmp_path: Path) -> None:
    index = index_of(tmp_path, [row(i) for i in range(5000)])
    content = pickle.dumps(index)
    assert len(content) < 1000 and pickle.loads(content).row(4999) == Row("4999", None, (("q", "a"),))
    index_of(tmp_path, [row(1)])
    with pytest.raises(DataError, match="was made anew while this run used it"):
        pickle.loads(content)


class TestLengths:
    @settings(deadline=None, max_examples=25)
    @given(
        rows=rows_of_files,
        max_length=st.integers(1, 60),
        prompt=st.sampled_from(["zephyr", "mamba"]),
        captions=st.booleans(),
    )
    def test_lengths_equal_tokenized_rows(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        tokenizer: Tokenizer,
        rows: list[Any],
        max_length: int,
        prompt: str,
        captions: bool,
    ) -> None:
        index = index_of(tmp_path_factory.mktemp("lengths"), rows)
        options: dict[str, Any] = {"max_length": max_length, "captions_only": captions}
        lengths = text_lengths(index, "set", tokenizer, prompt_format(prompt), **options)
        dataset = ConversationDataset([], tokenizer, prompt_format(prompt), lambda _: [], **options)
        tokens = [dataset.tokenize(index.row(i)) for i in range(len(index))]
        assert lengths[0].tolist() == [len(ids) for ids, _ in tokens]
        assert lengths[1].tolist() == [sum(label != IGNORE_INDEX for label in labels) for _, labels in tokens]

    def test_lengths_are_counted_once_for_each_setting(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        index = index_of(tmp_path, [row()])
        for prompt, max_length in (("mamba", 9), ("mamba", 9), ("zephyr", 9), ("mamba", 5)):
            text_lengths(index, "set", tokenizer, prompt_format(prompt), max_length=max_length, captions_only=False)
        files = list(index.folder.glob("lengths-*.npy"))
        assert len(files) == 3 and all(np.load(file).dtype == np.int32 for file in files)
