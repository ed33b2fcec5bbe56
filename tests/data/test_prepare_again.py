"""Preparing a second time: what was interrupted, damaged, changed, deleted, or brought by the user."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from file_server import Mirror
from mini_set import NUM_IMAGES, contents, report_of, run, write_manifest

from cobra.data.prepare import jpeg, manifest, plan
from cobra.errors import DataError


def files_of(manifests: Path) -> list[dict[str, Any]]:
    return yaml.safe_load((manifests / "mini.yaml").read_text())["files"]


def archives_fetched(host: Mirror) -> int:
    return sum(name == "images.zip" and asked != "bytes=0-0" for name, asked in host.requests)  # else asks the size


def told_gigabytes(root: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> str:
    """What the disk check says to be needed, on a disk that is full."""
    full = type("Usage", (), {"free": -1})
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: full)
    with pytest.raises(DataError) as caught:
        plan.check_space([manifest.load_manifest("mini")], root, **settings)
    return str(caught.value).partition(" needs ")[2].partition(" more")[0]


def test_space_is_counted_for_what_is_not_there(
    host: Mirror, manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, images = files_of(manifests)
    images |= {"gigabytes": 10}
    other = images | {"target": "downloads/more.zip", "gigabytes": 4}
    write_manifest(manifests, host, files=[rows, images, other])
    assert told_gigabytes(tmp_path, monkeypatch) == "28.0 GB"
    assert told_gigabytes(tmp_path, monkeypatch, keep_archives=False) == "24.0 GB"
    downloads = tmp_path / "mini" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / "images.zip.part").touch()
    (downloads / "images.zip.part.json").write_text(json.dumps({"ranges": [[0, 5 * 10**9], [6 * 10**9, 7 * 10**9]]}))
    assert told_gigabytes(tmp_path, monkeypatch) == "22.0 GB"
    (downloads / "images.zip").touch()  # complete, perhaps half extracted: `extract` knows what it still takes
    assert told_gigabytes(tmp_path, monkeypatch) == "8.0 GB"


def test_dry_run_adds_up_what_hosts_say(
    host: Mirror, manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.files["images.zip"] += bytes(60_000_000)
    text = plan.describe([manifest.load_manifest("mini")], tmp_path)
    assert "Still needed: 0.1 GB" in text  # the archive and what it holds
    assert "too little" not in text
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**8}))
    text = plan.describe([manifest.load_manifest("mini")], tmp_path)
    assert text.endswith("free: 0.1 GB. That is too little: nothing would be fetched.")


def test_archives_that_are_not_kept_come_one_by_one(host: Mirror, manifests: Path, tmp_path: Path) -> None:
    rows, images = files_of(manifests)
    twin = images | {"target": "downloads/twin.zip", "urls": [host.url("twin.zip")], "hint": "Ask a friend."}
    write_manifest(manifests, host, files=[rows, images, twin])
    with pytest.raises(DataError, match=r"twin\.zip could not be fetched(.|\n)*Ask a friend\.$"):
        run(tmp_path, keep_archives=False)
    assert not (tmp_path / "mini" / "downloads" / "images.zip").exists()
    assert (tmp_path / "mini" / "ocr" / "images" / "0.jpg").is_file()


@pytest.mark.parametrize("name", ["train.json", "downloads/images.zip"])
def test_damaged_file_is_fetched_once_more(host: Mirror, manifests: Path, tmp_path: Path, name: str) -> None:
    good = host.files[Path(name).name]
    (tmp_path / "mini" / name).parent.mkdir(parents=True)
    (tmp_path / "mini" / name).write_bytes(good[: len(good) // 2])
    run(tmp_path)
    assert (tmp_path / "mini" / name).read_bytes() == good and report_of(tmp_path)["is_good"]


@pytest.mark.parametrize("name", ["train.json", "images.zip"])
def test_damaged_file_comes_from_the_next_mirror(host: Mirror, manifests: Path, tmp_path: Path, name: str) -> None:
    files, good = files_of(manifests), host.files[name]
    host.files |= {name: good[:-3000], "other": good}
    for file in files:
        file["urls"] += [host.url("other")] * (Path(file["target"]).name == name)
    write_manifest(manifests, host, files=files)
    run(tmp_path)
    assert report_of(tmp_path)["is_good"]
    del host.files["other"]
    shutil.rmtree(tmp_path / "mini")
    with pytest.raises(DataError, match=r"is not valid JSON|cannot read the list of its members"):
        run(tmp_path)
    assert next((tmp_path / "mini").rglob(f"{name}.damaged")).stat().st_size == len(good) - 3000


def test_damaged_file_of_a_human_is_set_aside(host: Mirror, manifests: Path, tmp_path: Path) -> None:
    write_manifest(manifests, host, files=[{"target": "train.json", "manual": "the form"}, files_of(manifests)[1]])
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "train.json").write_text('[{"id": 1},')
    with pytest.raises(DataError, match=r"renamed to train\.json\.damaged\. Fetch the form again, and put it at "):
        run(tmp_path)
    assert not (tmp_path / "mini" / "train.json").exists() and (tmp_path / "mini" / "train.json.damaged").exists()


def test_other_rows_than_expected_fetch_no_archive_again(host: Mirror, manifests: Path, tmp_path: Path) -> None:
    write_manifest(manifests, host, expect=[{"rows": "train.json", "count": 41}])
    for _ in range(2):
        with pytest.raises(DataError, match="40 rows, expected 41"):
            run(tmp_path, keep_archives=False)
    assert archives_fetched(host) == 1


def test_only_archives_of_what_is_missing_are_taken_again(host: Mirror, manifests: Path, tmp_path: Path) -> None:
    rows, images = files_of(manifests)
    twin = images | {"target": "downloads/twin.zip", "urls": [host.url("twin.zip")], "extract": {"into": "twin"}}
    host.files["twin.zip"] = host.files["images.zip"]
    expect = [{"files": f"{folder}/images/*", "count": NUM_IMAGES} for folder in ("ocr", "twin/pack")]
    write_manifest(manifests, host, files=[rows, images, twin], expect=expect, convert=[])
    settings = {"keep_archives": False, "index": False}
    run(tmp_path, **settings)
    (tmp_path / "mini" / "twin" / "pack" / "images" / "0.jpg").unlink()
    host.requests.clear()
    run(tmp_path, **settings)
    assert {name for name, _ in host.requests} == {"twin.zip"}


def test_note_of_an_archive_that_nobody_can_fetch_stays(host: Mirror, manifests: Path, tmp_path: Path) -> None:
    rows, images = files_of(manifests)
    del images["urls"]
    write_manifest(manifests, host, files=[rows, images | {"manual": "the form"}])
    archive = tmp_path / "mini" / "downloads" / "images.zip"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(host.files["images.zip"])
    run(tmp_path, keep_archives=False)
    (tmp_path / "mini" / "ocr" / "images" / "0.jpg").unlink()
    for settings in ({}, {"repair": True}):
        with pytest.raises(DataError, match="39 files, expected 40"):
            run(tmp_path, keep_archives=False, **settings)
    archive.write_bytes(host.files["images.zip"])
    run(tmp_path)
    assert report_of(tmp_path)["is_good"]


def test_changed_manifest_brings_the_other_archive(host: Mirror, manifests: Path, tmp_path: Path) -> None:
    rows, images = files_of(manifests)
    old = len(host.files["images.zip"])
    write_manifest(manifests, host, files=[rows, images | {"size": old}])
    run(tmp_path, keep_archives=False)
    write_manifest(manifests, host, files=[rows | {"gigabytes": 1}, images | {"size": old}])
    run(tmp_path, keep_archives=False)
    assert archives_fetched(host) == 1  # nothing of the archive has changed
    host.requests.clear()
    write_manifest(manifests, host, files=[rows, images | {"size": old, "extract": {"into": "ocr", "strip": "pack/"}}])
    run(tmp_path, keep_archives=False)
    assert any(name == "images.zip" for name, _ in host.requests)


@pytest.mark.parametrize("at_least", [False, True])
def test_images_that_the_user_has_are_not_downloaded(
    host: Mirror, manifests: Path, tmp_path: Path, at_least: bool
) -> None:
    run(tmp_path / "whole")
    images = tmp_path / "own" / "mini" / "ocr" / "images"
    shutil.copytree(tmp_path / "whole" / "mini" / "ocr" / "images", images)
    expect = [{"files": "ocr/images/*.jpg", "at_least" if at_least else "count": NUM_IMAGES}]
    write_manifest(manifests, host, expect=expect)
    host.requests.clear()
    run(tmp_path / "own")
    assert {name for name, _ in host.requests} == {"train.json"} and report_of(tmp_path / "own")["is_good"]
    (images / "0.jpg").unlink()
    run(tmp_path / "own")
    assert any(name == "images.zip" for name, _ in host.requests)
    assert contents(tmp_path / "own") == contents(tmp_path / "whole")


def test_repair_of_gathered_images(host: Mirror, manifests: Path, tmp_path: Path) -> None:
    rows, images = files_of(manifests)
    images["extract"] = {"into": "ocr/unpacked"}
    convert = [{"kind": "gather", "source": "ocr/unpacked", "target": "ocr/images"}]
    convert.append({"kind": "ocr-vqa-jpeg", "source": "ocr/images"})
    write_manifest(manifests, host, files=[rows, images], convert=convert)
    run(tmp_path)
    good = contents(tmp_path)
    for number in range(3):  # of each kind that the archive has
        (tmp_path / "mini" / "ocr" / "images" / f"{number}.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"mini is not in order: .*repair=true"):
        run(tmp_path)
    run(tmp_path, repair=True)
    assert contents(tmp_path) == good and report_of(tmp_path)["is_good"]
    assert not [path for path in (tmp_path / "mini" / "ocr" / "unpacked").rglob("*") if not path.name.startswith(".")]


def test_check_of_images_alone(host: Mirror, manifests: Path, tmp_path: Path) -> None:
    write_manifest(manifests, host, kind="images", expect=[{"files": "ocr/images/*", "count": NUM_IMAGES}])
    with pytest.raises(DataError, match="mini is not in order"):
        run(tmp_path, check=True, data=False)
    assert "0 files, expected 40" in report_of(tmp_path)["unmet"][0]
    run(tmp_path, data=False)
    run(tmp_path, check=True, data=False)
    assert report_of(tmp_path)["is_good"]


def test_full_disk_ends_the_conversion(
    host: Mirror, manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(jpeg, "write_atomically", fail)
        with pytest.raises(DataError, match=r"Cannot write .*1\.jpg in place of 1\.gif: No space left on device"):
            run(tmp_path)
    run(tmp_path)
    assert report_of(tmp_path)["is_good"]
