"""The prepare journey, from a name to a checked data set, against a server of this machine."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from file_server import Mirror
from mini_set import NUM_IMAGES, contents, picture, report_of, run, write_manifest
from PIL import Image

from cobra.data.prepare import manifest, plan
from cobra.errors import DataError

NUM_KILLS = 8
CHILD = """
import os
import signal
import sys
from pathlib import Path
from cobra.config import DataConfig, PathsConfig, PrepareConfig
from cobra.data.prepare import manifest
from cobra.data.prepare.run import prepare
from cobra.runtime import setup_logging
setup_logging()
manifests, root = map(Path, sys.argv[1:3])
kill_at, calls = int(sys.argv[3]), 0

def counted(original):
    # Kill this process before one of the calls that change what the disk holds.
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call

for name in ("replace", "unlink", "mkdir", "touch"):
    setattr(Path, name, counted(getattr(Path, name)))
manifest._FOLDER = manifests
rows = root / "mini" / "train.json"
data = DataConfig(name="mini", annotations=str(rows), images=str(root / "mini"), index=str(root / "index"))
prepare(
    PrepareConfig(paths=PathsConfig(data=str(root)), sets=["mini"], tokenizer=None),
    configs=root, data_config=lambda _: data, questions=lambda _: [],
)
print(calls)
"""


@pytest.mark.parametrize("keep_archives", [True, False])
def test_a_set_is_fetched_unpacked_converted_checked_once(
    host: Mirror, manifests: Path, tmp_path: Path, keep_archives: bool
) -> None:
    root = tmp_path / "data"
    run(root, keep_archives=keep_archives)
    assert len(contents(root)) == NUM_IMAGES + 1
    for i in range(NUM_IMAGES):
        with Image.open(root / "mini" / "ocr" / "images" / f"{i}.jpg") as image:
            assert image.format == "JPEG" and image.size == (48, 48)
    assert (root / "mini" / "downloads" / "images.zip").exists() == keep_archives
    found = report_of(root)
    assert found["is_good"] and found["sets"]["mini"]["rows"] == NUM_IMAGES
    assert (root / "reports" / "mini" / "lengths.png").is_file() and any((root / "index").iterdir())
    before, sent = contents(root), host.sent
    run(root, keep_archives=keep_archives)
    assert host.sent == sent and contents(root) == before


def test_kills_in_every_phase_end_with_the_same_bytes(host: Mirror, manifests: Path, tmp_path: Path) -> None:
    run(tmp_path / "whole", tokenizer=None)

    def start(root: Path, kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CHILD, str(manifests), str(root), str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    calls = int(start(tmp_path / "counted", 0).stdout)
    root, phases = tmp_path / "killed", set[str]()
    for number in range(NUM_KILLS):  # each run has a part of the calls left to do, so that the points move on
        if start(root, 1 + calls * (number + 1) // (2 * NUM_KILLS)).returncode != -signal.SIGKILL:
            break
        images = list((root / "mini" / "ocr" / "images").glob("*.*"))
        there = {path.suffix for path in images}
        is_extracted = plan.is_extracted(manifest.load_manifest("mini").files[1], root / "mini")
        phases |= {"convert"} if is_extracted and ".gif" in there else {"end"} if is_extracted else set()
        phases |= {"extract"} if there and not is_extracted else {"download"} if not there else set()
    done = start(root, 0)
    assert done.returncode == 0, done.stderr
    assert contents(root) == contents(tmp_path / "whole") and report_of(root)["is_good"]
    assert phases >= {"download", "extract", "convert"}


def test_what_needs_a_human_is_said_and_the_rest_is_done(host: Mirror, manifests: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    files = yaml.safe_load((manifests / "mini.yaml").read_text())["files"]
    write_manifest(manifests, host, files=[{"target": "train.json", "manual": "the form at https://host"}, files[1]])
    with pytest.raises(DataError, match=rf"mini: Fetch the form at https://host\n.*{root / 'mini' / 'train.json'}"):
        run(root)
    assert (root / "mini" / "ocr" / "images" / "0.jpg").is_file()
    (root / "mini" / "train.json").write_bytes(host.files["train.json"])
    run(root)
    assert report_of(root)["is_good"]


def test_what_is_not_as_expected_is_said(host: Mirror, manifests: Path, tmp_path: Path) -> None:
    write_manifest(manifests, host, expect=[{"rows": "train.json", "count": 41}])
    with pytest.raises(DataError, match=r"train\.json: 40 rows, expected 41"):
        run(tmp_path / "data")


def test_check_names_what_is_missing_and_broken(host: Mirror, manifests: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    run(root)
    images = root / "mini" / "ocr" / "images"
    (images / "3.jpg").unlink()
    (images / "4.jpg").write_bytes((images / "4.jpg").read_bytes()[:200])
    (images / "5.jpg").write_bytes(b"no image")
    for check, broken in ((True, {"ocr/images/5.jpg"}), ("full", {"ocr/images/4.jpg", "ocr/images/5.jpg"})):
        with pytest.raises(DataError, match=r"mini is not in order: .*report\.md"):
            run(root, check=check)
        lines = (root / "reports" / "mini" / "broken_images.txt").read_text().splitlines()
        assert {line.split("\t")[0] for line in lines} >= broken
        assert (root / "reports" / "mini" / "missing_images.txt").read_text() == "ocr/images/3.jpg\n"
        assert any("39 files, expected 40" in text for text in report_of(root)["unmet"])
    sent = host.sent
    run(root)  # files have gone, so the archive, which is still there, is looked through again
    assert report_of(root)["is_good"]
    (images / "6.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="mini is not in order"):
        run(root)
    run(root, repair=True)
    run(root, check="full")
    assert host.sent == sent and report_of(root)["is_good"]


def test_check_of_nothing_is_a_report_too(manifests: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mini is not in order"):
        run(tmp_path / "data", check=True)
    assert not report_of(tmp_path / "data")["is_good"]


def test_dry_run_fetches_nothing_and_knows_sizes(
    host: Mirror, manifests: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "data"
    text = plan.describe([manifest.load_manifest("mini")], root)
    size = len(host.files["images.zip"]) / 1e6
    assert re.search(rf"to download +{size:.1f} MB  downloads/images\.zip", text) and host.url("images.zip") in text
    run(root, dry_run=True)
    assert not root.exists()
    run(root)
    assert "extracted" in plan.describe([manifest.load_manifest("mini")], root)


def test_too_small_a_disk_is_said_first(
    host: Mirror, manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = yaml.safe_load((manifests / "mini.yaml").read_text())["files"]
    write_manifest(manifests, host, files=[files[0], files[1] | {"gigabytes": 10**6}])
    with pytest.raises(DataError, match=r"needs 2,000,000\.0 GB more"):
        run(tmp_path / "data")
    assert host.sent == 0


def test_own_data_by_the_command_line(script: Any, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(picture(0, "PNG"))
    (tmp_path / "rows.csv").write_text("image,question,answer\na.png,What is it?,Noise.\n")
    own = ["own.annotations=rows.csv", "own.images=photos", "own.name=mine", "own.config=mine.yaml"]
    assert script("prepare", *own, "--dry-run").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "rows.csv"]
    result = script("prepare", *own)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["name"] == "mine"
    for arguments, said in (
        (["own.annotations=rows.csv"], "own.annotations and own.images go together"),
        ([], "Nothing to prepare"),
        (["data=llava-1.5"], "Did you mean 'llava-v1.5'"),
        (["check=all", "data=llava-v1.5"], "check='all' must be"),
    ):
        result = script("prepare", *arguments)
        assert result.returncode == 1 and said in result.stderr


def test_benchmark_is_checked_by_its_own_reader(script: Any, assets: Path, tmp_path: Path) -> None:
    copy = tmp_path / "it's a copy"
    (tmp_path / "data").symlink_to(assets / "fixtures" / "scorers" / "data_root")
    command = ["benchmark=vsr", "check=full", "tokenizer=null", f'data_root="{copy}"']
    subprocess.run(["cp", "-r", str(tmp_path / "data") + "/.", str(copy)], check=True)
    result = script("prepare", *command)
    found = json.loads((copy / "reports" / "vsr" / "report.json").read_text())
    assert found["sets"]["vsr"]["rows"] == 200 and found["sets"]["vsr"]["images missing"] == 0, result.stderr
    assert result.returncode == 1 and "expected 1,222" in " ".join(found["unmet"])  # it is but a part of the benchmark
