"""The downloader among what earlier runs have left behind."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from file_server import Mirror, serving

from cobra.data.prepare import transfer
from cobra.data.prepare.download import RemoteFile, download, is_complete
from cobra.data.prepare.partial import Partial
from cobra.errors import DataError

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


def test_old_bytes_that_nothing_is_known_of_do_not_stay(tmp_path: Path) -> None:
    mirror = Mirror({"a": CONTENT})
    with serving(mirror):
        for name, checksum in (("a", SHA256), ("b", None)):
            (tmp_path / f"{name}.part").write_bytes(bytes(2 * len(CONTENT)))  # its notes were lost
            file = RemoteFile(urls=(mirror.url("a"),), target=tmp_path / name, checksum=checksum)
            download([file])
            assert file.target.read_bytes() == CONTENT


@pytest.mark.parametrize("sized", [True, False])
def test_shorter_file_has_nothing_of_the_longer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sized: bool
) -> None:
    """Another checksum is wanted than before, or nothing tells that the file has changed: it begins again."""
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    old, new = random.Random(1).randbytes(2 * len(CONTENT)), CONTENT[:5000]
    checksums = [("sha256:" + hashlib.sha256(content).hexdigest()) for content in (old, new)]
    for name, before, now in (("a", *checksums), ("b", None, None), ("c", None, checksums[1])):
        mirror = Mirror({name: old}, cuts=1)
        with serving(mirror):
            urls, target = (mirror.url(name),), tmp_path / name
            with pytest.raises(DataError, match="broke off"):
                download([RemoteFile(urls=urls, target=target, size=len(old), checksum=before)], connections=1)
            assert target.with_name(f"{name}.part").stat().st_size > len(new)
            mirror.files[name], mirror.sized = new, sized or now is None
            download([RemoteFile(urls=urls, target=target, checksum=now)])
        assert target.read_bytes() == new


def test_part_that_something_else_changes_gets_no_name(tmp_path: Path) -> None:
    for size in (len(CONTENT) - 1, len(CONTENT) + 1):
        part = Partial(tmp_path / "a", len(CONTENT), None, lambda _: None)
        part.add(0, len(CONTENT))
        part.path.write_bytes(bytes(size))
        with pytest.raises(DataError, match=f"a.part has {size} bytes now"):
            part.finish()
    part = Partial(tmp_path / "a", len(CONTENT), SHA256, lambda _: None)
    part.add(0, len(CONTENT))
    with pytest.raises(DataError, match=r"a.part has 0 bytes now"):
        part.wrong_checksum()
    assert not (tmp_path / "a").exists()


def test_part_of_a_file_that_is_there_goes(tmp_path: Path) -> None:
    target = tmp_path / "a"
    part = Partial(target, None, None, lambda _: None)
    part.add(0, 10)
    part.save()
    target.write_bytes(CONTENT)  # put there by hand
    file = RemoteFile(urls=(), target=target, checksum=SHA256)
    assert is_complete(file, remember=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.part", "a.part.json"]  # nothing was written
    download([file])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.lock", ".a.verified", "a"]
