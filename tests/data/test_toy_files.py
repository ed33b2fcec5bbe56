"""The miniature benchmarks on disk: the same bytes every time, balanced, apart from the training set."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from cobra.data import dataset, makers
from cobra.data.conversations import read_rows
from cobra.data.toy import Toy, prepare
from cobra.data.toy.prompts import PROMPTS
from cobra.errors import ConfigError, DataError
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ASSETS = Path(__file__).resolve().parents[2] / "cobra" / "assets" / "tiny"
SMALL = Toy(train=120, vqav2=40, gqa=8, vizwiz=60, textvqa=20, vsr=30, pope=20, refcoco=16)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepare(folder := tmp_path_factory.mktemp("data") / "toy", SMALL)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def images(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.jpg"))


def test_seed_names_the_bytes(toy: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "again", SMALL)
    assert contents(tmp_path / "again") == contents(toy)
    prepare(tmp_path / "other", Toy(**{**vars(SMALL), "seed": 1}))
    assert not {image.read_bytes() for image in images(tmp_path / "other")} & {
        image.read_bytes() for image in images(toy)
    }


def test_size_of_one_leaves_the_others_as_they_are(toy: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "more", Toy(**{**vars(SMALL), "gqa": 9}))
    ours, theirs = contents(toy), contents(tmp_path / "more")
    assert {name.split("/")[0] for name in ours | theirs if ours.get(name) != theirs.get(name)} == {"gqa", "toy.json"}


def test_no_scene_is_trained_on_and_asked(toy: Path) -> None:
    everything = [image.read_bytes() for image in images(toy)]
    assert len(set(everything)) == len(everything) == 120 + 40 + 8 + 60 + 20 + 30 + 15 + 16  # vsr has a dev split too


def test_images_have_as_many_questions_as_the_real_ones(toy: Path) -> None:
    gqa = json.loads((toy / "gqa" / "testdev_balanced_questions.json").read_text())
    assert set(Counter(row["imageId"] for row in gqa.values()).values()) == {31}
    vqa = json.loads((toy / "vqa-v2" / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    assert set(Counter(row["image_id"] for row in vqa).values()) == {5}
    pope = [row for split in POPE for row in lines(toy / "pope" / f"coco_pope_{split}.json")]
    assert set(Counter(row["image"] for row in pope).values()) == {18}


POPE = ("random", "popular", "adversarial")


@pytest.mark.parametrize("split", POPE)
def test_pope_is_balanced_and_true(toy: Path, split: str) -> None:
    rows = lines(toy / "pope" / f"coco_pope_{split}.json")
    assert [row["label"] for row in rows] == ["yes", "no"] * 60
    assert [row["question_id"] for row in rows] == list(range(1, 121))
    said: dict[tuple[str, str], str] = {}
    for other in POPE:
        for row in lines(toy / "pope" / f"coco_pope_{other}.json"):
            assert said.setdefault((row["image"], row["text"]), row["label"]) == row["label"]


def test_popes_absent_objects_are_chosen_as_pope_does(toy: Path) -> None:
    rows = {split: lines(toy / "pope" / f"coco_pope_{split}.json") for split in POPE}
    present: dict[str, set[str]] = defaultdict(set)
    for row in rows["random"]:
        if row["label"] == "yes":
            present[row["image"]].add(row["text"])

    def popularity(split: str) -> float:
        absent = [row["text"] for row in rows[split] if row["label"] == "no"]
        return sum(text in names for text in absent for names in present.values()) / len(absent)

    def company(split: str) -> float:
        absent = [row for row in rows[split] if row["label"] == "no"]
        shared = [len(present[row["image"]] & names) for row in absent for names in present.values()
                  if row["text"] in names]  # fmt: skip
        return sum(shared) / len(absent)

    assert popularity("popular") > 1.3 * popularity("random")
    assert company("adversarial") > max(company("popular"), 1.3 * company("random"))


def test_closed_questions_are_balanced(toy: Path) -> None:
    gqa = json.loads((toy / "gqa" / "testdev_balanced_questions.json").read_text())
    said = Counter(row["answer"] for row in gqa.values())
    assert 0.8 < said["yes"] / said["no"] < 1.25
    labels = Counter(row["label"] for row in lines(toy / "vsr" / "test.jsonl"))
    assert labels[0] == labels[1] == 30
    unanswerable = sum(not row["answerable"] for row in json.loads((toy / "vizwiz" / "val.json").read_text()))
    assert 0.15 < unanswerable / 60 < 0.5


def test_gqas_entailed_questions_are_about_the_same_image(toy: Path) -> None:
    rows = json.loads((toy / "gqa" / "testdev_balanced_questions.json").read_text())
    entailing = [row for row in rows.values() if len(row["entailed"]) > 1]
    assert entailing
    for row in entailing:
        assert {rows[one]["imageId"] for one in row["entailed"]} == {row["imageId"]}
        assert all(rows[one]["answer"] in ("yes", row["answer"]) for one in row["entailed"])
    choices = json.loads((toy / "gqa" / "testdev_choices.json").read_text())
    assert all(row["answer"] in choices[number]["valid"] for number, row in rows.items())
    assert all(row["answer"] in choices[number]["plausible"] for number, row in rows.items() if row["answer"] != "no")


def test_training_asks_as_evaluation_does(toy: Path) -> None:
    expected = {}
    for name in ("vqav2", "gqa", "pope", "vizwiz", "vsr", "refcoco"):
        expected[name] = yaml.safe_load((CONFIGS / "benchmark" / f"{name}.yaml").read_text())["prompt"]
    expected |= yaml.safe_load((CONFIGS / "benchmark" / "textvqa.yaml").read_text())["prompts"]
    assert expected == PROMPTS
    rows = read_rows(toy / "train.json")
    answers = {answer for row in rows for _, answer in row.turns}
    assert {"Yes", "No", "True", "False", "yes", "no", "Unanswerable", "red", "circle", "2"} <= answers
    for prompt in PROMPTS.values():
        ending = prompt.rpartition("}")[2]
        assert any(question.endswith(ending) for row in rows for question, _ in row.turns)


def test_toys_tokenizer_spells_numbers_and_nothing_else(toy: Path, tiny_config: Any) -> None:
    tokenizer = Tokenizer(ASSETS / "toy-tokenizer.json")
    assert len(tokenizer) == tiny_config("+experiment=tiny-toy").model.llm.vocab_size
    for row in read_rows(toy / "train.json"):
        for question, answer in row.turns:
            assert tokenizer.decode(tokenizer.encode(f"{question}\n{answer}")) == f"{question}\n{answer}"
            assert len(tokenizer.encode(question)) < 30  # what a benchmark always says is one token
            words = tokenizer.encode(answer)
            assert len(words) == 1 or any(letter.isdigit() for letter in answer) or " " in answer
    for word in ("Yes", "No", "True", "False"):
        tokenizer.single_id(word)


def test_training_makes_what_it_misses(tiny_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(makers._MAKERS, "toy", lambda folder: prepare(folder, SMALL))
    config = tiny_config("+experiment=tiny-toy", f"paths.data={tmp_path}")
    tokenizer, prompt = Tokenizer(ASSETS / "toy-tokenizer.json"), prompt_format("mamba")
    rows = dataset.open_data(
        config.data, tokenizer, prompt, lambda image: [], max_length=config.model.max_length, captions_only=False
    )
    assert (tmp_path / "toy" / "toy.json").is_file()
    assert rows.num_rows == len(read_rows(tmp_path / "toy" / "train.json"))


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is not empty and holds no toy benchmarks"):
        prepare(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_toy_is_left_alone(toy: Path) -> None:
    before = contents(toy)
    prepare(toy)  # any toy will do
    prepare(toy, SMALL)
    with pytest.raises(DataError, match="was made with seed=0, gqa=8; choose another folder"):
        prepare(toy, Toy(**{**vars(SMALL), "seed": 7, "gqa": 3}))
    assert contents(toy) == before


@pytest.mark.parametrize(
    ("sizes", "words"), [({"seed": -1}, "seed=-1"), ({"gqa": 0}, "gqa=0"), ({"vqav2": 5, "pope": 6}, "pope=6")]
)
def test_impossible_sizes_are_named(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Toy(**sizes)
