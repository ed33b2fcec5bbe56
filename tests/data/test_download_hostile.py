"""Downloads from servers that fail in every way: complete and right in the end, and nothing good fetched twice."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from file_server import Mirror, serving

from cobra.data.prepare import transfer
from cobra.data.prepare.download import RemoteFile, download, is_complete
from cobra.errors import DataError

MIB = 2**20


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small segments, short waits."""
    monkeypatch.setattr(transfer, "SEGMENT", MIB // 2)
    monkeypatch.setattr(transfer, "_FIRST_WAIT", 0.001)


def content_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def test_cuts_errors_a_wrong_mirror_and_one_without_ranges(tmp_path: Path) -> None:
    content = content_of(8 * MIB)
    wrong = Mirror({"a": content_of(8 * MIB, seed=1)}, cuts=20, error_rate=0.1, seed=1)
    rangeless = Mirror({"a": content}, ranges=False, cuts=1000, error_rate=0.1, seed=2)
    good = Mirror({"a": content}, cuts=29, error_rate=0.1, etags={"a": '"1"'}, seed=3)
    file = RemoteFile(urls=(), target=tmp_path / "a", size=len(content), checksum=sha256(content))
    with serving(wrong, rangeless, good):
        urls = tuple(mirror.url("a") for mirror in (wrong, rangeless, good))
        download([RemoteFile(urls=urls, target=file.target, size=file.size, checksum=file.checksum)])
    assert file.target.read_bytes() == content
    assert wrong.cuts == good.cuts == 0  # all used up: 20 + 29, and at least one of the other
    assert wrong.sent == len(content)  # each of its bytes once
    assert 0 < good.sent < len(content)  # what the second mirror gave before its cut was kept
    in_flight = 2 * MIB  # sent by the second mirror from the start again, when it was asked for the rest
    assert good.sent + rangeless.sent <= len(content) + in_flight
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.lock", ".a.verified", "a"]


def test_fifty_cuts_cost_no_byte(tmp_path: Path) -> None:
    contents = {f"{i}": content_of(2 * MIB, seed=i) for i in range(4)}
    mirror = Mirror(contents, cuts=50, error_rate=0.1, etags=dict.fromkeys(contents, '"1"'))
    with serving(mirror):
        files = [RemoteFile(urls=(mirror.url(name),), target=tmp_path / name) for name in contents]
        download(files, jobs=4, connections=3)  # neither sizes nor checksums are known
    assert all((tmp_path / name).read_bytes() == content for name, content in contents.items())
    asked = 4  # bytes: for the sizes
    assert mirror.cuts == 0 and mirror.sent <= sum(map(len, contents.values())) + asked


@pytest.mark.parametrize("refusals", [1, 2, 3])
def test_refused_connections_leave_the_others(tmp_path: Path, refusals: int) -> None:
    """Also where all three are refused in the end: one alone goes on."""
    content = content_of(4 * MIB)
    refused = [(403, {}), (429, {"Retry-After": "3600"}), (403, {})][:refusals]
    first, second = Mirror({"a": content}, statuses=[(0, {}), *refused]), Mirror({"a": content})
    with serving(first, second):
        urls = (first.url("a"), second.url("a"))
        download([RemoteFile(urls=urls, target=tmp_path / "a", size=len(content))], connections=3)
        assert (tmp_path / "a").read_bytes() == content
        assert not first.statuses and not second.requests
        first.statuses = [(0, {})] + 4 * [(403, {})]  # the one alone, too: the other mirror has to give the rest
        second.statuses = [(0, {})]
        files = [RemoteFile(urls=urls, target=tmp_path / "b", size=len(content), checksum=sha256(content))]
        download(files, connections=3)
    assert (tmp_path / "b").read_bytes() == content
    assert not first.statuses and first.sent + second.sent == 2 * len(content)


def test_only_mirror_without_ranges_begins_again(tmp_path: Path) -> None:
    content = content_of(MIB)
    mirror = Mirror({"a": content}, ranges=False, cuts=2)
    with serving(mirror):
        download([RemoteFile(urls=(mirror.url("a"),), target=tmp_path / "a", checksum=sha256(content))])
    assert (tmp_path / "a").read_bytes() == content


def test_wrong_mirror_is_remembered_until_all_are(tmp_path: Path) -> None:
    content = content_of(MIB)
    wrong, dead = Mirror({"a": content_of(MIB, seed=1)}), Mirror({})
    with serving(wrong, dead):
        file = RemoteFile(urls=(wrong.url("a"), dead.url("a")), target=tmp_path / "a", checksum=sha256(content))
        with pytest.raises(DataError, match=r"its content is wrong \(sha256:.*status 404"):
            download([file])
        sent = wrong.sent
        dead.files["a"] = content
        download([file])
    assert file.target.read_bytes() == content
    assert wrong.sent <= sent + 1  # its size was asked for


def test_two_mirrors_do_not_fit_together(tmp_path: Path) -> None:
    """One breaks off for good, the other goes on with another content: begun again, from one mirror alone."""
    content = content_of(2 * MIB)
    half, wrong, good = (
        Mirror(_Once(a=content), cuts=1),
        Mirror({"a": content_of(2 * MIB, seed=1)}),
        Mirror({"a": content}),
    )
    with serving(half, wrong, good):
        urls = tuple(mirror.url("a") for mirror in (half, wrong, good))
        file = RemoteFile(urls=urls, target=tmp_path / "a", size=len(content), checksum=sha256(content))
        download([file], connections=1)
    assert file.target.read_bytes() == content
    assert 0 < half.sent < len(content)
    assert wrong.sent == 2 * len(content) - half.sent  # the rest of the other's, then all of its own
    assert good.sent == len(content)


class _Once(dict[str, bytes]):
    """Gives a file for one answer, then never again."""

    left = 1

    def __contains__(self, key: object) -> bool:
        self.left -= 1
        return self.left >= 0


CODE = """
import sys
from pathlib import Path
from cobra.data.prepare import transfer
from cobra.data.prepare.download import RemoteFile, download
transfer.SEGMENT, transfer._SAVE_EVERY, transfer._FIRST_WAIT = 2**19, 0.05, 0.01
url, target, size, checksum = sys.argv[1:]
download([RemoteFile(urls=(url,), target=Path(target), size=int(size), checksum=checksum)], connections=3)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_at_any_moment(tmp_path: Path) -> None:
    content = content_of(8 * MIB)
    mirror = Mirror({"a": content}, etags={"a": '"1"'}, bytes_per_second=MIB)  # a connection
    rng, kills = random.Random(0), 0
    file = RemoteFile(urls=(), target=tmp_path / "a", size=len(content), checksum=sha256(content))
    with serving(mirror):
        command = [sys.executable, "-c", CODE, mirror.url("a"), str(file.target), str(file.size), str(file.checksum)]
        while True:
            process = subprocess.Popen(command)
            seen = mirror.sent
            while process.poll() is None and mirror.sent == seen and kills < 6:
                time.sleep(0.005)
            if kills == 6:
                assert process.wait(60) == 0
                break
            time.sleep(rng.uniform(0, 0.6))
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            assert not file.target.exists() or file.target.read_bytes() == content  # never a part under its name
    assert file.target.read_bytes() == content and is_complete(file)
    lost = mirror.sent - len(content)
    assert lost < kills * 3 * MIB // 2  # what three connections had under way since the last note


def test_several_processes_fetch_once(tmp_path: Path) -> None:
    content = content_of(2 * MIB)
    mirror = Mirror({"a": content}, bytes_per_second=2 * MIB)
    with serving(mirror):
        command = [sys.executable, "-c", CODE, mirror.url("a"), str(tmp_path / "a"), str(2 * MIB), sha256(content)]
        processes = [subprocess.Popen(command) for _ in range(3)]
        assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "a").read_bytes() == content and mirror.sent == len(content)
    assert mirror.most_connections == 3  # of the one process that worked
