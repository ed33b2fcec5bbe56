"""A host of the small published set, and the manifest that describes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import Mirror, serving
from mini_set import published, write_manifest

from cobra.data.prepare import manifest


@pytest.fixture
def host() -> Iterator[Mirror]:
    mirror = Mirror(published())
    with serving(mirror):
        yield mirror


@pytest.fixture
def manifests(host: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "manifests"
    folder.mkdir()
    write_manifest(folder, host)
    monkeypatch.setattr(manifest, "_FOLDER", folder)
    return folder
