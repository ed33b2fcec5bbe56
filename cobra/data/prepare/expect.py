"""Does a finished folder hold what its manifest expects? Files and rows are counted, nothing is decoded."""

from __future__ import annotations

import json
from pathlib import Path

from cobra.data.conversations import read_objects
from cobra.data.prepare.manifest import Expect, Manifest
from cobra.errors import DataError


def unmet(manifest: Manifest, root: Path) -> list[str]:
    """Return, as sentences, what a manifest expects below the data folder `root` and is not there."""
    folder = root / manifest.folder
    return [text for entry in manifest.expect if (text := _unmet(entry, folder))]


def _unmet(entry: Expect, folder: Path) -> str | None:
    if entry.files is not None:
        count = sum(1 for _ in folder.glob(entry.files))
        what = f"{folder / entry.files}: {count:,} files"
    else:
        found = next(folder.glob(str(entry.rows)), None)
        if found is None:
            return f"{folder / str(entry.rows)} is missing"
        try:
            count = _count_rows(found, entry.key)
        except DataError as error:
            return str(error)
        what = f"{found}: {count:,} rows"
    if entry.count is None:
        return None if count else f"{what}, expected some"
    return None if count == entry.count else f"{what}, expected {entry.count:,}"


def _count_rows(file: Path, key: str | None) -> int:
    """Count the rows of a JSON list, a JSON object or JSON lines, whatever the name ends in."""
    with file.open("rb") as handle:
        is_list = handle.read(64).lstrip().startswith(b"[")
    if is_list or file.suffix == ".jsonl":
        return sum(1 for _ in read_objects(file))
    content = file.read_bytes()
    try:
        value = json.loads(content)
        return len(value if key is None else value[key])
    except (ValueError, KeyError, TypeError) as error:
        lines = content.splitlines()
        if key is None and len(lines) > 1 and all(line.startswith(b"{") for line in lines if line.strip()):
            return sum(1 for line in lines if line.strip())
        raise DataError(f"{file} is not what it should be: {error}. Download it again.") from None
