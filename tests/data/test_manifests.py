"""Manifests: their schema refuses mistakes, and what they describe is what the readers of data and benchmarks find."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_sets import TRANSFORM, make_row
from hydra.utils import instantiate
from PIL import Image

from cobra.config import PretrainConfig
from cobra.data.dataset import open_data
from cobra.data.prepare import manifest as manifest_module
from cobra.data.prepare.convert import convert_lrv, convert_lvis, gather
from cobra.data.prepare.expect import unmet
from cobra.data.prepare.manifest import (
    Convert,
    Expect,
    Manifest,
    available_manifests,
    load_manifest,
    load_with_needs,
    read_manifest,
)
from cobra.errors import ConfigError
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TRAINING = [
    "cobra-mix", "cobra-mix-lrv", "cobra-mix-lvis", "llava-align", "llava-v1.5", "lrv-instruct", "lvis-instruct4v",
]  # fmt: skip
BENCHMARKS = ["gqa", "pope", "refcoco", "textvqa", "vizwiz", "vqav2", "vsr"]

INSTANCES = "instances.json"
Contents = dict[str, bytes | dict[str, bytes]]  # of a file by its name; of an archive: of its members by their path

GOOD: dict[str, Any] = {
    "name": "good",
    "title": "t",
    "kind": "training",
    "folder": "set",
    "homepage": "h",
    "licence": "l",
    "citation": "c",
    "files": [{"target": "a.zip", "urls": ["https://host/a.zip"]}],
}


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return file.getvalue()


def dump(rows: object) -> bytes:
    return json.dumps(rows).encode()


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def build(manifest: Manifest, root: Path, contents: Contents) -> None:
    """Do what preparing does with the manifest, with these contents for the files that it downloads."""
    folder = root / manifest.folder
    for file in manifest.files:
        content = contents[Path(file.target).name]
        assert isinstance(content, dict) == (file.extract is not None), file.target
        if isinstance(content, bytes) or file.extract is None:
            write(folder / file.target, content if isinstance(content, bytes) else b"")
            continue
        for member, data in content.items():
            member = member.removeprefix(f"{file.extract.strip}/") if file.extract.strip else member
            first, slash, rest = member.partition("/")
            write(folder / file.extract.into / (file.extract.rename.get(first, first) + slash + rest), data)
    for step in manifest.convert:
        source, target = folder / step.source, folder / str(step.target)
        if step.kind == "gather":
            gather(source, target)
        elif step.kind == "lvis":
            convert_lvis(source, target)
        elif step.kind == "lrv":
            convert_lrv(source, target, str(step.image))


def prepare(name: str, root: Path, contents: Contents) -> None:
    """Prepare a data set and what it needs; all that is expected must be there then, numbers aside."""
    for manifest in load_with_needs(name):
        build(manifest, root, contents)
        assert not unmet(
            replace(manifest, expect=[replace(entry, count=None, at_least=None) for entry in manifest.expect]), root
        )


def files_of(folder: Path, below: str) -> dict[str, bytes]:
    """The images of a fixture, as members of an archive."""
    return {f"{below}/{file.name}": file.read_bytes() for file in folder.iterdir()}


def benchmark_contents(name: str, data: Path) -> Contents:
    """The official files of the fixtures, packed as their hosts pack them."""
    if name == "vqav2":
        folder = data / "vqa-v2"
        questions, annotations = (folder / f"v2_val2014_{kind}.json" for kind in ("questions", "annotations"))
        return {
            "val2014.zip": files_of(folder / "images_val2014", "val2014"),
            "v2_Questions_Val_mscoco.zip": {"v2_OpenEnded_mscoco_val2014_questions.json": questions.read_bytes()},
            "v2_Annotations_Val_mscoco.zip": {"v2_mscoco_val2014_annotations.json": annotations.read_bytes()},
        }
    if name == "gqa":
        questions = data / "gqa" / "testdev_balanced_questions.json"
        return {
            "images.zip": files_of(data / "gqa" / "images", "images"),
            "questions1.2.zip": {questions.name: questions.read_bytes()},
        }
    if name == "vizwiz":
        return {
            "val.zip": files_of(data / "vizwiz" / "val_images", "val"),
            "Annotations.zip": {"Annotations/val.json": (data / "vizwiz" / "val.json").read_bytes()},
        }
    if name == "refcoco":
        names = {"refcoco": "refs(unc).p", "refcoco+": "refs(unc).p", "refcocog": "refs(umd).p"}
        archives: Contents = {
            f"{one}.zip": {
                f"{one}/{file}": (data / name / one / file).read_bytes() for file in (refs, "instances.json")
            }
            for one, refs in names.items()
        }
        return {"train2014.zip": files_of(data / name / "train2014", "train2014"), **archives}
    folder, images, archive, below = {
        "textvqa": ("text-vqa", "train_val_images", "train_val_images.zip", "train_images"),
        "vsr": ("vsr", "images", "vsr_images.zip", "whatever/images"),
        "pope": ("pope", "val_images", "val2014.zip", "val2014"),
    }[name]
    plain: Contents = {file.name: file.read_bytes() for file in (data / folder).iterdir() if file.is_file()}
    return {archive: files_of(data / folder / images, below), **plain}


def training_contents() -> Contents:
    """Small files in the formats of the training sets; every image folder is named by a row."""
    sources = ["coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2"]
    lrv = [{"image_id": "7", "question": "q", "answer": "a"}]
    return {
        "chat.json": dump([make_row("004539375", "00453/004539375.jpg")]),
        "images.zip": {"00453/004539375.jpg": jpeg(), "images/1.jpg": jpeg()},  # that of LLaVA-Pretrain, that of GQA
        "llava_v1_5_mix665k.json": dump([*(make_row(i, f"{one}/1.jpg") for i, one in enumerate(sources)), make_row(9)]),
        "train2017.zip": {"train2017/1.jpg": jpeg()},
        "val2017.zip": {"val2017/1.jpg": jpeg()},
        "ocr_vqa.zip": {"whatever/1.jpg": jpeg()},
        "train_val_images.zip": {"train_images/1.jpg": jpeg()},
        "vg_images.zip": {"VG_100K/1.jpg": jpeg()},
        "vg_images2.zip": {"VG_100K_2/1.jpg": jpeg()},
        "lvis_instruct4v_220k.json": dump(
            [make_row(i, f"coco/{one}2017/1.jpg") for i, one in enumerate(("train", "val"))]
        ),
        "filter_cap1.json": dump(lrv),
        "filter_cap_more1.json": dump(lrv),
        "chart_release_update.json": dump([lrv[0] | {"image_id": "c.png"}]),
        "image.tar.gz": {"image/7.jpg": jpeg()},
        "chart_image.zip": {"chart_image/c.png": jpeg()},
    }


def test_every_set_has_a_manifest() -> None:
    assert available_manifests("training") == TRAINING
    assert available_manifests("benchmark") == BENCHMARKS
    configs = {kind: {file.stem for file in (CONFIGS / kind).iterdir()} for kind in ("data", "benchmark")}
    assert configs["data"] - {"easyvqa", "toy"} == set(TRAINING)
    assert configs["benchmark"] - {"easyvqa"} == set(BENCHMARKS)
    assert set(available_manifests()) == {*TRAINING, *BENCHMARKS, *available_manifests("images")}


def test_page_names_every_set_and_file_that_needs_a_human() -> None:
    text = (CONFIGS.parent / "docs" / "data.md").read_text()
    assert all(f"`{name}`" in text for name in (*TRAINING, *BENCHMARKS))
    for file in load_manifest("lrv-instruct").files:
        assert f"| `{file.target}` | `{str(file.manual).split('/')[5]}` |" in text


def test_no_two_manifests_write_the_same_file() -> None:
    targets = [f"{m.folder}/{file.target}" for m in map(load_manifest, available_manifests()) for file in m.files]
    assert len(set(targets)) == len(targets) > 25


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_finds_all_that_its_manifest_prepares(assets: Path, tmp_path: Path, name: str) -> None:
    prepare(name, tmp_path, benchmark_contents(name, assets / "fixtures" / "scorers" / "data_root"))
    config: dict[str, Any] = yaml.safe_load((CONFIGS / "benchmark" / f"{name}.yaml").read_text())
    benchmark = instantiate(config | {"data_root": str(tmp_path)}, _convert_="all")
    questions = benchmark.questions()
    assert questions and all(question.image.is_file() for question in questions)
    urls = {url for manifest in load_with_needs(name) for file in manifest.files for url in file.urls}
    assert benchmark.image_url in urls


@pytest.mark.parametrize(("name", "rows"), zip(TRAINING, [12, 10, 9, 1, 7, 3, 2], strict=True))
def test_training_finds_all_that_its_manifest_prepares(
    tmp_path: Path, tokenizer: Tokenizer, tiny_config: Callable[..., PretrainConfig], name: str, rows: int
) -> None:
    prepare(name, tmp_path, training_contents())
    config = tiny_config(f"data={name}", f"paths.data={tmp_path}", "data.check=decode").data
    data = open_data(config, tokenizer, prompt_format("mamba"), TRANSFORM, max_length=64, captions_only=False)
    assert data.num_rows == rows


def test_shared_images_are_downloaded_once() -> None:
    names = {name: {manifest.name for manifest in load_with_needs(name)} for name in (*TRAINING, *BENCHMARKS)}
    assert names["vqav2"] & names["pope"] == {"coco-val2014"}
    assert names["llava-v1.5"] & names["gqa"] == {"gqa-images"}
    assert names["llava-v1.5"] & names["textvqa"] == {"textvqa-images"}
    assert names["llava-v1.5"] & names["lvis-instruct4v"] == {"coco-train2017"}
    mix = [manifest.name for manifest in load_with_needs("cobra-mix")]
    assert (
        len(set(mix)) == len(mix) and mix[-1] == "cobra-mix" and mix.index("coco-train2017") < mix.index("llava-v1.5")
    )


def test_disk_space_is_that_of_archives_and_what_is_in_them() -> None:
    assert load_manifest("coco-train2017").gigabytes == pytest.approx(2 * 19.3)
    assert load_manifest("llava-align").gigabytes == pytest.approx(0.181 + 2 * 27.4)


def test_known_checksums() -> None:
    found = {file.target: file.checksum for name in ("pope", "vsr") for file in load_manifest(name).files}
    assert [found[f"coco_pope_{split}.json"][7:15] for split in ("random", "popular", "adversarial")] == [  # type: ignore[index]
        "c16b65d2", "5b166530", "1d8f0906",
    ]  # fmt: skip
    assert str(found["test.jsonl"]).endswith("7778cacaad4")


def test_what_needs_a_human_names_its_address() -> None:
    manual = [file for name in available_manifests() for file in load_manifest(name).files if file.manual]
    assert len(manual) == 5 and all(str(file.manual).startswith("https://drive.google.com/") for file in manual)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"licens": "x"}, "Unknown setting 'licens'. Did you mean 'licence'"),
        ({"files": [{"target": "a", "url": ["x"]}]}, r"Unknown setting 'files\[0\]\.url'"),
        ({"kind": "trainings"}, "kind='trainings' is not known"),
        ({"folder": "../x"}, r"folder='\.\./x' leaves its folder"),
        ({"folder": "/x"}, "folder='/x' leaves"),
        ({"name": "other"}, "name='other' must be the file's own, 'good'"),
        ({"files": []}, "files: there are none"),
        ({"files": [{"target": "a"}]}, "a: give either `urls` or `manual`"),
        ({"files": [{"target": "a", "urls": ["https://h"], "manual": "x"}]}, "a: give either"),
        ({"files": [{"target": "../a", "urls": ["https://h"]}]}, r"target='\.\./a' leaves"),
        ({"files": [{"target": "c:a", "urls": ["https://h"]}]}, "target='c:a' leaves"),
        ({"files": [{"target": "a", "urls": ["ftp://h"]}]}, "a: urls has 'ftp://h'"),
        ({"files": [{"target": "a", "urls": ["https://h"], "checksum": "sha256:12"}]}, "a: checksum='sha256:12' must"),
        ({"files": [{"target": "a", "urls": ["https://h"], "size": 0}]}, "a: size=0 must be greater"),
        ({"files": [{"target": "a", "urls": ["https://h"], "size": "1"}]}, r"files\[0\]\.size='1' is not of type"),
        ({"files": [{"target": "a", "urls": ["https://h"]}] * 2}, "two have the same target, a"),
        ({"files": [{"target": "a", "urls": ["https://h"], "extract": {"into": "x/../.."}}]}, "extract.into="),
        ({"files": [{"target": "a", "urls": ["https://h"], "extract": {"rename": {"a": "/b"}}}]}, "extract.rename="),
        ({"convert": [{"kind": "zip", "source": "a", "target": "b"}]}, "convert.kind='zip' is not known"),
        ({"convert": [{"kind": "lrv", "source": "a", "target": "b"}]}, "convert.image is for the kind lrv"),
        ({"convert": [{"kind": "lvis", "source": "a"}]}, "convert.target: a step lvis has to name one"),
        ({"convert": [{"kind": "ocr-vqa-jpeg", "source": "a", "target": "b"}]}, "a step ocr-vqa-jpeg has none"),
        ({"expect": [{"count": 1}]}, "expect: each entry has either"),
        ({"expect": [{"files": "*", "key": "x"}]}, "expect.key belongs"),
        ({"expect": [{"files": "../*"}]}, "leaves its folder"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = tmp_path / "good.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    assert read_manifest(file).files[0].target == "a.zip"
    file.write_text(yaml.safe_dump(GOOD | changes))
    with pytest.raises(ConfigError, match=rf"good\.yaml: .*{message}"):
        read_manifest(file)


def test_unknown_name_and_circles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"There is no data set 'llava-v15'\. Did you mean 'llava-v1\.5'"):
        load_manifest("llava-v15")
    monkeypatch.setattr(manifest_module, "_FOLDER", tmp_path)
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(GOOD | {"name": name, "needs": [other]}))
    with pytest.raises(ConfigError, match="a -> b -> a need each other"):
        load_with_needs("a")


def test_unmet_expectations_are_told(tmp_path: Path) -> None:
    contents = {
        "list.json": dump([1, 2, 3]), "object.json": dump({"a": 1, "b": 2}), "keyed.json": dump({"data": [1]}),
        "lines.jsonl": b"1\n2\n\n", "named.json": b'{"a": 1}\n{"a": 2}\n', "half.json": b'{"a": [',
        "sub/x(1).jpg": b"", "sub/y.jpg": b"",
    }  # fmt: skip
    for name, content in contents.items():
        write(tmp_path / "set" / name, content)

    def told(**entry: Any) -> str:
        found = unmet(manifest(Expect(**entry)), tmp_path)
        return str(found[0]) if found else ""

    def manifest(entry: Expect) -> Manifest:
        parts = {key: value for key, value in GOOD.items() if key != "files"}
        return Manifest(**parts, needs=["x"], expect=[entry], convert=[Convert(kind="gather", source="a", target="b")])

    counts = {"list.json": 3, "object.json": 2, "lines.jsonl": 2, "named.json": 2}
    for name, count in counts.items():
        assert told(rows=name, count=count) == told(rows=name) == ""
        assert told(rows=name, count=5).endswith(f"{name}: {count} rows, expected 5")
    assert told(rows="keyed.json", key="data", count=1) == told(rows="**/keyed.json", key="data") == ""
    assert "keyed.json is not what it should be: 'rows'" in told(rows="keyed.json", key="rows")
    assert "half.json is not what it should be" in told(rows="half.json")
    assert told(rows="gone.json").endswith("gone.json is missing")
    assert told(files="sub/*.jpg", count=2) == told(files="sub/x(1).jpg") == ""
    assert told(files="sub/*.jpg", count=3).endswith("2 files, expected 3")
    assert told(files="*.png").endswith("0 files, expected some")
