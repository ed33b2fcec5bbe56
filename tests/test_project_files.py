"""Files about the project: they parse, and agree with each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cobra import __version__

ROOT = Path(__file__).resolve().parents[1]


def test_citation_names_paper_and_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["version"] == __version__
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Zhao", "Zhang", "Zhao", "Ding", "Huang", "Wang"]
    assert paper["url"].endswith("2403.14520") and paper["year"] == 2025


@pytest.mark.parametrize("form", ["bug", "number", "idea"])
def test_issue_form_has_what_github_asks_for(form: str) -> None:
    content = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())
    assert {"name", "description", "body"} <= content.keys()
    ids = [field["id"] for field in content["body"]]
    assert len(ids) == len(set(ids))
    assert {field["type"] for field in content["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert all(field["attributes"]["label"] for field in content["body"])


def test_changelog_has_this_version_or_what_becomes_it() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{__version__}]" in text
