"""Extraction of honest archives: the bytes that unzip and tar give, once, and after any kill the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import IO

import pytest
from hostile_archives import TAR_SUFFIXES, Entries, write_tar, write_zip

from cobra.data.prepare import extract as extract_module
from cobra.data.prepare.extract import extract
from cobra.errors import DataError

SUFFIXES = [".zip", *TAR_SUFFIXES]
EXTRACT = "import sys; from pathlib import Path; from cobra.data.prepare.extract import extract; "
EXTRACT += "extract(Path(sys.argv[1]), Path(sys.argv[2]), jobs=2)"


def write(archive: Path, entries: Entries) -> Path:
    (write_zip if archive.suffix == ".zip" else write_tar)(archive, entries)
    return archive


def entries_of(seed: int, count: int = 40) -> Entries:
    rng = random.Random(seed)
    entries = [(f"set/part{i % 3}/{i:05d}.jpg", rng.randbytes(rng.randrange(5000))) for i in range(count)]
    return [*entries, ("set/no bytes", b""), ("set/süß 图.json", b"[]" * 90_000), ("set/large", bytes(3 << 20))]


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder, without the notes about extraction."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".")}


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_members_are_written(suffix: str, jobs: int, tmp_path: Path) -> None:
    entries = entries_of(0)
    archive = write(tmp_path / f"a{suffix}", entries)
    assert extract(archive, tmp_path / "to", jobs=jobs) == len(entries)
    assert contents(tmp_path / "to") == dict(entries)
    for file in (tmp_path / "to" / "set").rglob("*"):  # the archives ask for 0o7777
        assert not file.stat().st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX)
        assert os.access(file, os.R_OK | os.W_OK)
    assert not list((tmp_path / "to").glob("*.extracting"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_same_bytes_as_unzip_and_tar(suffix: str, tmp_path: Path) -> None:
    tool = "unzip" if suffix == ".zip" else "tar"
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    archive = write(tmp_path / f"a{suffix}", entries_of(1))
    (tmp_path / "theirs").mkdir()
    command = ["unzip", "-q", archive] if tool == "unzip" else ["tar", "-xf", archive]
    subprocess.run(command, cwd=tmp_path / "theirs", check=True)
    extract(archive, tmp_path / "ours")
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert ours == theirs


@pytest.mark.skipif(shutil.which("tar") is None, reason="tar is not installed")
@pytest.mark.parametrize("form", ["gnu", "pax", "ustar", "v7"])
def test_what_tar_itself_writes(form: str, tmp_path: Path) -> None:
    """Every format of GNU tar, with "./" before names, a folder without files, and long names where they can be."""
    source = tmp_path / "source"
    (source / "empty").mkdir(parents=True)
    name = "n" * (90 if form == "v7" else 99) if form in ("v7", "ustar") else "n" * 200
    (source / name).write_bytes(b"long")
    subprocess.run(["tar", f"--format={form}", "-cf", tmp_path / "a.tar", "-C", source, "."], check=True)
    assert extract(tmp_path / "a.tar", tmp_path / "to") == 1
    assert contents(tmp_path / "to") == {name: b"long"}
    assert (tmp_path / "to" / "empty").is_dir()


class Pipe:
    """A file that can only be written on and on."""

    def __init__(self, file: IO[bytes]) -> None:
        self.write, self.flush = file.write, file.flush


def test_zip64_and_a_stream_of_unknown_length(tmp_path: Path) -> None:
    """Sizes of 64 bits, and sizes that stand behind the contents, as zip writes them into a pipe."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("a/64.txt", "w", force_zip64=True) as member:
            member.write(b"64" * 5000)
        file.mkdir("a/nothing")
    with (tmp_path / "b.zip").open("wb") as raw, zipfile.ZipFile(Pipe(raw), "w") as file:
        file.writestr("b.txt", b"streamed")
    assert extract(tmp_path / "a.zip", tmp_path / "to") == extract(tmp_path / "b.zip", tmp_path / "to") == 1
    assert contents(tmp_path / "to") == {"a/64.txt": b"64" * 5000, "b.txt": b"streamed"}
    assert (tmp_path / "to" / "a" / "nothing").is_dir()


def test_strip_and_rename(tmp_path: Path) -> None:
    entries = [("top/image/1.jpg", b"1"), ("top/other/2.jpg", b"2"), ("README", b"r"), ("top/3.jpg", b"3")]
    archive = write(tmp_path / "a.zip", entries)
    extract(archive, tmp_path / "to", strip="top", rename={"image": "lrv-vg", "other": "b/c"})
    expected = {"lrv-vg/1.jpg": b"1", "b/c/2.jpg": b"2", "README": b"r", "3.jpg": b"3"}
    assert contents(tmp_path / "to") == expected
    assert extract(write(tmp_path / "b.tar", [("./top/1", b"1")]), tmp_path / "to", strip="top/") == 1
    with pytest.raises(DataError, match="has no folder 'tpo'"):
        extract(archive, tmp_path / "to", strip="tpo")
    with pytest.raises(DataError, match="'README' is a file where another"):
        extract(archive, tmp_path / "to", strip="top", rename={"other": "README"})
    with pytest.raises(DataError, match=r"rename=.* leads out of its folder"):
        extract(archive, tmp_path / "to", rename={"top": "../../elsewhere"})


@pytest.mark.parametrize("name", [".a.prepared", ".b.zip.verified", "c.json.part", "d/c.json.PART.json", "Rows.json"])
def test_names_of_other_files_are_refused(name: str, tmp_path: Path) -> None:
    archive = write(tmp_path / "a.zip", [("1.jpg", b"1"), (name, b"x")])
    with pytest.raises(DataError, match=r"has (a name that is kept|the name of another file)"):
        extract(archive, tmp_path / "to", reserved=["rows.json"])
    assert not (tmp_path / "to" / "1.jpg").exists()


def test_what_a_mac_adds_is_left_out_and_same_twice_is_once(tmp_path: Path) -> None:
    added = [(name, b"x") for name in ("__MACOSX/a/._1.jpg", "a/.DS_Store", "a/._1.jpg")]
    entries = [*added, ("a/1.jpg", b"1"), ("a/1.jpg", b"1")]
    for suffix in (".zip", ".tar", ".tgz"):
        to = tmp_path / suffix
        assert extract(write(tmp_path / f"a{suffix}", entries), to) == 1
        assert contents(to) == {"a/1.jpg": b"1"}


class TestAgain:
    @pytest.mark.parametrize("suffix", [".zip", ".tar", ".tgz"])
    def test_second_run_reads_only_the_note(self, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        archive = write(tmp_path / f"a{suffix}", entries_of(2))
        count = extract(archive, tmp_path / "to")
        monkeypatch.setattr(extract_module, "list_members", None)
        assert extract(archive, tmp_path / "to") == count
        archive.unlink()
        assert extract(archive, tmp_path / "to") == count
        with pytest.raises(DataError, match="was extracted in another way"):
            extract(archive, tmp_path / "to", strip="set")

    @pytest.mark.parametrize("suffix", [".zip", ".tar", ".tgz"])
    def test_another_archive_of_the_same_name_is_extracted(self, suffix: str, tmp_path: Path) -> None:
        extract(write(tmp_path / f"a{suffix}", [("1", b"old"), ("2", b"two")]), tmp_path / "to")
        extract(write(tmp_path / f"a{suffix}", [("1", b"new"), ("2", b"two")]), tmp_path / "to")
        assert contents(tmp_path / "to") == {"1": b"new", "2": b"two"}

    @pytest.mark.parametrize("suffix", [".zip", ".tar", ".tgz"])
    def test_only_what_is_not_whole_is_written_again(self, suffix: str, tmp_path: Path) -> None:
        """Short, and after a power cut of the right size but wrong content; the others keep their place on the disk."""
        entries, to = entries_of(3), tmp_path / "to"
        archive = write(tmp_path / f"a{suffix}", entries)
        extract(archive, to)
        (to / f".a{suffix}.extracted").write_text('{"files":')  # half a note
        damaged = {"set/part0/00000.jpg": b"", "set/part1/00001.jpg": bytes(len(entries[1][1])), "set/large": b"short"}
        for name, content in damaged.items():
            (to / name).write_bytes(content)
        (to / "set/no bytes").unlink()
        inodes = {path: path.stat().st_ino for path in to.rglob("*") if path.is_file()}
        extract(archive, to)
        assert contents(to) == dict(entries)
        written = {path.relative_to(to).as_posix() for path, inode in inodes.items() if path.stat().st_ino != inode}
        assert {name for name in written if not name.startswith(".")} == set(damaged)

    def test_no_second_process(self, tmp_path: Path) -> None:
        archive = write(tmp_path / "a.zip", [("1", b"1")])
        (tmp_path / "to").mkdir()
        with (
            extract_module.FileLock(tmp_path / "to" / ".a.zip.lock"),
            pytest.raises(DataError, match="another process"),
        ):
            extract(archive, tmp_path / "to")


class TestTarget:
    def test_link_below_the_target_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "to").mkdir()
        (tmp_path / "to" / "set").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(DataError, match="is a link, which may lead out"):
            extract(write(tmp_path / "a.zip", [("set/1", b"1")]), tmp_path / "to")
        assert not list((tmp_path / "elsewhere").iterdir())

    def test_link_in_place_of_a_file_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "precious").write_text("kept")
        (tmp_path / "to").mkdir()
        (tmp_path / "to" / "1").symlink_to(tmp_path / "precious")
        extract(write(tmp_path / "a.zip", [("1", b"1111")]), tmp_path / "to")
        assert (tmp_path / "precious").read_text() == "kept"
        assert contents(tmp_path / "to") == {"1": b"1111"}

    def test_target_may_be_a_link_itself(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "to").symlink_to(tmp_path / "disk")
        extract(write(tmp_path / "a.zip", [("1", b"1")]), tmp_path / "to")
        assert contents(tmp_path / "disk") == {"1": b"1"}

    def test_full_disk_is_told_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 20, 0, 1 << 20))
        with pytest.raises(DataError, match=r"needs 0\.0 GiB in .* Make room"):
            extract(write(tmp_path / "a.zip", entries_of(4)), tmp_path / "to")
        assert not contents(tmp_path / "to")

    def test_limits_are_those_that_were_given(self, tmp_path: Path) -> None:
        for suffix in (".zip", ".tar", ".tgz"):
            archive = write(tmp_path / f"a{suffix}", [("1", bytes(20_000)), ("2", bytes(20_001))])
            with pytest.raises(DataError, match="'2' brings it to"):
                extract(archive, tmp_path / suffix, max_bytes=40_000)
            with pytest.raises(DataError, match="'2' is one more than the 1 members"):
                extract(archive, tmp_path / suffix, max_files=1)
            assert not contents(tmp_path / suffix)
            assert extract(archive, tmp_path / suffix, max_bytes=40_001, max_files=2) == 2

    def test_folder_in_place_of_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "to" / "1").mkdir(parents=True)
        with pytest.raises(DataError, match=r"cannot write .*1: Is a directory"):
            extract(write(tmp_path / "a.zip", [("1", b"1")]), tmp_path / "to")

    def test_missing_archive(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"does not exist\. Download it first"):
            extract(tmp_path / "a.zip", tmp_path / "to")


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tgz"])
def test_killed_at_any_moment_ends_with_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    rng = random.Random(suffix)
    entries = [(f"set/{i % 7}/{i:05d}.jpg", rng.randbytes(rng.randrange(4000))) for i in range(1500)]
    archive, to = write(tmp_path / f"a{suffix}", entries), tmp_path / "to"
    expected, halfway = dict(entries), 0
    for share in (0.0, 0.05, 0.4, 0.8):
        process = subprocess.Popen([sys.executable, "-c", EXTRACT, archive, to])
        while process.poll() is None and len(list(to.glob("set/*/*.jpg"))) < share * len(entries):
            time.sleep(0.001)
        process.kill()
        process.wait()
        found = contents(to)
        halfway += 0 < len(found) < len(entries)
        assert found.items() <= expected.items()  # no half file by its own name
    assert halfway
    inodes = {path: path.stat().st_ino for path in to.glob("set/*/*.jpg")}
    assert extract(archive, to, jobs=2) == len(entries)
    assert contents(to) == expected
    assert all(path.stat().st_ino == inode for path, inode in inodes.items())
    assert json.loads((to / f".a{suffix}.extracted").read_text())["files"] == len(entries)
    assert {path.name for path in to.iterdir()} == {"set", f".a{suffix}.extracted", f".a{suffix}.lock"}
