"""Hostile archives: none writes outside its target, none leaves a file inside, each gives an error line of its own."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hostile_archives import TAR_SUFFIXES, Case, all_cases, make, write_tar, write_zip

from cobra.data.prepare.extract import extract
from cobra.errors import DataError

CASES = all_cases()
FOUND_WHILE_WRITING = {"inflates-more", "inflates-less", "wrong-crc", "flipped-bits", "other-local-name"}


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a folder: modes and contents; links are not followed."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 200
    assert len(set(CASES)) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}{case.suffix}-{case.seed}")
def test_hostile_archive_is_refused(case: Case, tmp_path: Path) -> None:
    outside, target = tmp_path / "outside", tmp_path / "outside" / "target"
    target.mkdir(parents=True)
    (outside / "canary.txt").write_text("alive")
    (outside / "canary").mkdir()
    archive = make(case, tmp_path, outside)
    before = state(outside)

    with pytest.raises(DataError) as error:
        extract(archive, target, max_files=50, jobs=2)

    message = str(error.value)
    assert re.search(case.says, message), message
    assert str(archive) in message
    assert message.isprintable() and len(message) < 400, message  # one line, and nothing that steers a terminal
    after = state(outside)
    inside = {name for name in after if name.startswith("target/") and not name.endswith(".lock")}
    assert {name: after[name] for name in after if not name.startswith("target/")} == before
    if case.kind not in FOUND_WHILE_WRITING:
        assert not inside
    assert not [name for name in inside if "hostile" in name or name.endswith((".extracted", ".extracting"))]


@pytest.mark.parametrize("suffix", [".zip", *TAR_SUFFIXES])
def test_damage_anywhere_ends_in_an_error_or_not_at_all(suffix: str, tmp_path: Path) -> None:
    """Bytes changed or cut off at random: nothing but DataError, and no wrong content by a name that was right."""
    rng = random.Random(suffix)
    entries = [(f"images/{i}.jpg", rng.randbytes(200)) for i in range(3)]
    whole = tmp_path / f"whole{suffix}"
    (write_zip if suffix == ".zip" else write_tar)(whole, entries)
    errors = 0
    for number in range(60):
        data = bytearray(whole.read_bytes())
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if number % 4 == 0:
            del data[rng.randrange(len(data)) :]
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"a{suffix}").write_bytes(data)
        try:
            extract(folder / f"a{suffix}", folder / "around" / "target")
        except DataError as error:
            errors += 1
            assert str(error).isprintable()
        assert {path.name for path in folder.iterdir()} <= {f"a{suffix}", "around"}
        assert {path.name for path in (folder / "around").glob("*")} <= {"target"}
        for name, content in entries if suffix != ".tar" else []:  # a plain tar knows no checksums of contents
            file = folder / "around" / "target" / name
            assert not file.is_file() or file.read_bytes() == content
    assert errors > 20
