"""Links, names of files and make targets in all that is written for people lead somewhere."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]
FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
INLINE = re.compile(r"\]\(\s*<?([^()\s>]+(?:\([^()\s]*\))?)>?(?:\s+\"[^\"]*\")?\s*\)")
REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]: +(\S+)", re.MULTILINE)
AUTOMATIC = re.compile(r"<(https?://[^>]+)>|(?<![\w(<\"'`/])(https?://[^\s<>()\"'`|]+[\w/])")
HEADING = re.compile(r"^#{1,6} +(.+?)\s*#*$", re.MULTILINE)
# A file or folder of the project. Files of the user's are called mine, or stand in capitals.
PROJECT_PATH = re.compile(r"(?:cobra|configs|scripts|docs|tests|benchmarks|notebooks)/[\w./*+-]*")


def markdown(file: Path) -> str:
    """The text of a page, or of a notebook's text cells."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def links(file: Path) -> Iterator[str]:
    """What a document links to, outside code."""
    text = SPAN.sub("", FENCE.sub("", markdown(file)))
    for pattern in (INLINE, REFERENCE):
        yield from pattern.findall(text)
    for bracketed, bare in AUTOMATIC.findall(REFERENCE.sub("", INLINE.sub("](", text))):
        yield bracketed or bare


def anchors(file: Path) -> set[str]:
    """What can stand behind `#` in a link to a page, by GitHub's rule; on API pages also the names they document."""
    text = FENCE.sub("", markdown(file))
    found: Counter[str] = Counter()
    result = set(re.findall(r"^::: ([\w.]+)", text, re.MULTILINE))
    for heading in HEADING.findall(text):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        result.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return result


def is_anchor(anchor: str, file: Path) -> bool:
    known = anchors(file)
    return anchor in known or any(anchor.startswith(f"{name}.") for name in known if name.startswith("cobra"))


@pytest.fixture(params=DOCUMENTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def document(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_relative_links_lead_to_files_and_headings(document: Path) -> None:
    for link in links(document):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{link}: there is no {target}"
        assert target.is_relative_to(ROOT), f"{link} leaves the project"
        if anchor and target.suffix in (".md", ".ipynb"):
            assert is_anchor(anchor, target), f"{link}: no such heading; there are {sorted(anchors(target))}"


def test_links_to_elsewhere_are_well_formed(document: Path) -> None:
    for link in links(document):
        if "://" not in link:
            continue
        address = urlsplit(link)
        if address.hostname in ("localhost", "127.0.0.1"):
            continue
        assert address.scheme == "https", f"{link} is not https"
        assert address.hostname and re.fullmatch(r"(?:[a-z0-9-]+\.)+[a-z]{2,}", address.hostname), link
        assert not re.search(r"[\s\\]|[.,;:!?]$", link), f"{link} ends in the sentence's own sign"


def test_files_named_in_the_text_exist(document: Path) -> None:
    for _, code in SPAN.findall(FENCE.sub("", markdown(document))):
        if PROJECT_PATH.fullmatch(code) and not re.search(r"[A-Z]{3}|\bmine\b", code.replace("README", "")):
            assert any(ROOT.glob(code.rstrip("/."))), f"there is no {code}"


def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = markdown(document)
    named = re.findall(r"`make ((?:[a-z-]+ ?)+)", text) + re.findall(r"^ *make ((?:[a-z-]+ ?)+)", text, re.MULTILINE)
    wanted = {name for names in named for name in names.split()}
    assert wanted <= targets, f"no make target: {wanted - targets}"
