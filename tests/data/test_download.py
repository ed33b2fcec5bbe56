"""The downloader: what it checks, refuses and says."""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path

import pytest
from file_server import Mirror, serving

from cobra.data.prepare import transfer
from cobra.data.prepare.download import RemoteFile, download, is_complete, remote_sizes
from cobra.data.prepare.partial import Partial
from cobra.errors import DataError

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_FIRST_WAIT", 0.001)


@pytest.mark.parametrize("checksum", [SHA256, SHA256.upper(), "md5:" + hashlib.md5(CONTENT).hexdigest(), None])
def test_fetches_and_is_content_with_it(tmp_path: Path, checksum: str | None) -> None:
    mirror = Mirror({"a.zip": CONTENT, "empty": b""})
    with serving(mirror):
        files = [
            RemoteFile(urls=(mirror.url("a.zip"),), target=tmp_path / "new" / "a.zip", checksum=checksum),
            RemoteFile(urls=(mirror.url("empty"),), target=tmp_path / "empty"),
        ]
        assert not any(map(is_complete, files))
        assert remote_sizes(files) == [len(CONTENT), 0]
        download(files)
        count = len(mirror.requests)
        download(files)
    assert len(mirror.requests) == count and all(map(is_complete, files))
    assert [file.target.read_bytes() for file in files] == [CONTENT, b""]


def test_complete_means_size_and_checksum(tmp_path: Path) -> None:
    target = tmp_path / "a"
    file = RemoteFile(urls=(), target=target, checksum=SHA256)
    target.write_bytes(CONTENT)  # put there by hand
    assert is_complete(file) and (tmp_path / ".a.verified").is_file()
    target.write_bytes(CONTENT[:-1] + b"?")
    assert not is_complete(file)
    assert not is_complete(RemoteFile(urls=(), target=target, size=1))
    with pytest.raises(DataError, match=r"a is not there or not right, and has no address"):
        download([file])


def test_wrong_file_stays_until_the_right_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    mirror = Mirror({})
    with serving(mirror):
        file = RemoteFile(urls=(mirror.url("a"),), target=target, checksum=SHA256)
        with pytest.raises(DataError, match="404"):
            download([file])
        assert target.read_bytes() == b"old"
        mirror.files["a"] = CONTENT
        download([file])
    assert target.read_bytes() == CONTENT


def test_each_failure_is_named_with_every_mirror(tmp_path: Path) -> None:
    here = Mirror({"good": CONTENT})
    gone = Mirror({})
    with serving(here, gone):
        pass  # nobody answers at `gone` now
    with serving(here):
        names = ("a", "b", "good")
        files = [RemoteFile(urls=(gone.url(name), here.url(name)), target=tmp_path / name) for name in names]
        with pytest.raises(DataError) as error:
            download(files)
        lines = str(error.value).splitlines()
        assert len(lines) == 2
        for name, line in zip(("a", "b"), lines, strict=True):
            assert str(tmp_path / name) in line
            assert f"{gone.url(name)}: " in line and "Connection refused (6 attempts)" in line
            assert f"{here.url(name)}: status 404 Not Found" in line
    assert (tmp_path / "good").read_bytes() == CONTENT
    assert not (tmp_path / "a").exists()


def test_wrong_size_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    mirror = Mirror({"a": CONTENT})
    with serving(mirror):
        file = RemoteFile(urls=(mirror.url("a"),), target=tmp_path / "a", size=len(CONTENT) + 1)
        with pytest.raises(DataError, match="the file there has 300000 bytes, not 300001"):
            download([file])


def test_web_page_is_not_the_file(tmp_path: Path) -> None:
    page = Mirror({"a.zip": b"<html>Quota exceeded</html>"}, headers={"Content-Type": "text/html; charset=utf-8"})
    good = Mirror({"a.zip": CONTENT})
    with serving(page, good):
        alone = RemoteFile(urls=(page.url("a.zip"),), target=tmp_path / "a.zip")
        with pytest.raises(DataError, match="a web page instead of the file"):
            download([alone])
        download([RemoteFile(urls=(page.url("a.zip"), good.url("a.zip")), target=tmp_path / "a.zip")])
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("head", [b"<!DOCTYPE html>", b"\xef\xbb\xbf\r\n <HTML lang='en'>"])
def test_web_page_by_another_name_is_not_the_file(tmp_path: Path, head: bytes) -> None:
    page = Mirror({"a.zip": head + b"Quota exceeded", "a.html": head})
    good = Mirror({"a.zip": CONTENT})
    with serving(page, good):
        download([RemoteFile(urls=(page.url("a.zip"), good.url("a.zip")), target=tmp_path / "a.zip")])
        download([RemoteFile(urls=(page.url("a.html"),), target=tmp_path / "a.html")])
        page.ranges = False  # bytes that are here do not count as lost, either
        part = Partial(tmp_path / "b.zip", len(CONTENT), SHA256, lambda _: None)
        part.path.write_bytes(CONTENT[:5000])
        part.add(0, 5000)
        part.save()
        sent = good.sent
        urls = (page.url("a.zip"), good.url("a.zip"))
        download([RemoteFile(urls=urls, target=tmp_path / "b.zip", size=len(CONTENT), checksum=SHA256)])
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes() == CONTENT
    assert good.sent - sent == len(CONTENT) - 5000
    assert (tmp_path / "a.html").read_bytes() == head


def test_full_disk_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    mirror = Mirror({"a": CONTENT, "b": CONTENT})
    with serving(mirror):
        files = [
            RemoteFile(urls=(mirror.url("a"),), target=tmp_path / "x" / "a", size=len(CONTENT)),
            RemoteFile(urls=(mirror.url("b"),), target=tmp_path / "x" / "b"),  # its size is asked for
        ]
        with pytest.raises(DataError, match=r"has 500kB free, and 600kB are still to be fetched"):
            download(files)
        assert mirror.sent <= 1  # the byte that brought the size, perhaps not counted yet
        download(files[:1])
        download(files)  # one is there: the other fits


def test_disk_that_fills_up_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    mirror = Mirror({"a": CONTENT}, etags={"a": '"1"'})
    with serving(mirror):
        file = RemoteFile(urls=(mirror.url("a"),), target=tmp_path / "a", size=len(CONTENT))
        with monkeypatch.context() as patch, pytest.raises(DataError, match="a cannot be written: No space left"):
            patch.setattr(Partial, "add", full)
            download([file])
        download([file])
    assert file.target.read_bytes() == CONTENT


def test_fetched_but_ended_before_it_had_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: object) -> None:
        raise OSError(4, "ended here")

    mirror = Mirror({"a": CONTENT}, etags={"a": '"1"'})
    with serving(mirror):
        file = RemoteFile(urls=(mirror.url("a"),), target=tmp_path / "a", size=len(CONTENT), checksum=SHA256)
        with monkeypatch.context() as patch, pytest.raises(DataError, match="ended here"):
            patch.setattr(Partial, "finish", end)
            download([file])
    assert not file.target.exists()
    download([file])  # no server is left to ask
    assert file.target.read_bytes() == CONTENT
    (tmp_path / ".a.verified").unlink()  # ended just before that was written
    assert is_complete(file)


@pytest.mark.parametrize("checksum", [SHA256, None])
def test_file_changed_between_two_runs(tmp_path: Path, checksum: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    old = random.Random(1).randbytes(len(CONTENT))
    mirror = Mirror({"a": old}, etags={"a": '"old"'}, cuts=1)
    with serving(mirror):
        file = RemoteFile(urls=(mirror.url("a"),), target=tmp_path / "a", size=len(CONTENT), checksum=checksum)
        with pytest.raises(DataError, match="broke off"):
            download([file], connections=1)
        present = (tmp_path / "a.part").stat().st_size
        assert 0 < present < len(old) and (tmp_path / "a.part").read_bytes() == old[:present]
        mirror.files["a"], mirror.etags["a"] = CONTENT, '"new"'
        download([file])
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_without_anything_to_compare_it_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    mirror = Mirror({"a": bytes(len(CONTENT))}, cuts=1)
    with serving(mirror):
        file = RemoteFile(urls=(mirror.url("a"),), target=tmp_path / "a", size=len(CONTENT))
        with pytest.raises(DataError, match="broke off"):
            download([file])
        mirror.files["a"] = CONTENT
        download([file])
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_busy_server_is_given_the_time_it_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror({"a": CONTENT}, statuses=[(429, {"Retry-After": "0"}), (503, {"Retry-After": "1"})])
    waits: list[float] = []
    monkeypatch.setattr(transfer.Interrupted, "__init__", _recording(waits))
    with serving(mirror):
        download([RemoteFile(urls=(mirror.url("a"),), target=tmp_path / "a", size=len(CONTENT))])
        mirror.statuses.append((503, {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}))
        with pytest.raises(DataError, match="status 503, to be asked again in"):
            download([RemoteFile(urls=(mirror.url("a"),), target=tmp_path / "b", size=len(CONTENT))])
    assert waits == [0, 1]


def _recording(waits: list[float]) -> object:
    def init(self: transfer.Interrupted, reason: str, wait: float = 0) -> None:
        Exception.__init__(self, reason)
        self.wait = wait
        waits.append(wait)

    return init


def test_server_that_does_not_say_how_large_the_file_is(tmp_path: Path) -> None:
    mirror = Mirror({"a": CONTENT}, ranges=False, sized=False, cuts=1)
    with serving(mirror):
        urls = (mirror.url("a"),)
        download([RemoteFile(urls=urls, target=tmp_path / "a", size=len(CONTENT))])
        download([RemoteFile(urls=urls, target=tmp_path / "b", checksum=SHA256)])
        with pytest.raises(DataError, match="neither how large the file is nor where it ends"):
            download([RemoteFile(urls=urls, target=tmp_path / "c")])
        with pytest.raises(DataError, match="the file there has 300000 bytes, not 299999"):
            download([RemoteFile(urls=urls, target=tmp_path / "d", size=len(CONTENT) - 1)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == CONTENT
    assert not (tmp_path / "c").exists() and not (tmp_path / "d").exists()


def test_redirections_stay_on_the_web(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    mirror = Mirror({"a": CONTENT}, statuses=[(302, {"Location": secret.as_uri()}), (302, {"Location": "/a"})])
    with serving(mirror):
        file = RemoteFile(urls=(mirror.url("x"),), target=tmp_path / "a", size=len(CONTENT))
        with pytest.raises(DataError, match="No connection adapters were found for 'file:"):
            download([file])
        download([file])
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_local_files(tmp_path: Path) -> None:
    (tmp_path / "source file").write_bytes(CONTENT)
    urls = ((tmp_path / "missing").as_uri(), (tmp_path / "source file").as_uri())
    download([RemoteFile(urls=urls, target=tmp_path / "a", checksum=SHA256)])
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("change", "message"),
    [({"urls": ("ftp://a/b",)}, "not an address of http, https or file"), ({"checksum": "sha1:00"}, "not a checksum")],
)
def test_what_cannot_be_meant_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        RemoteFile(**({"urls": (), "target": Path("a")} | change))  # type: ignore[arg-type]
