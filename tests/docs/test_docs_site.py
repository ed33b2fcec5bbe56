"""The documentation site: it builds without a warning, loads nothing from elsewhere, and says what the code says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest

from cobra.config import PretrainConfig, ServeConfig, as_dict, flatten

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where dataclasses look their types up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings() -> ModuleType:
    return imported(ROOT / "scripts" / "make_settings.py")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_site_builds_without_warnings_and_has_every_page(site: Path) -> None:
    for page in PAGES:
        file = site / page.relative_to(DOCS).with_suffix(".html")
        title = page.read_text().splitlines()[0].removeprefix("# ")
        assert re.search(rf"<h1[^>]*>{re.escape(title)}<", file.read_text()), f"{file} is not titled {title!r}"
    assert not list(site.rglob("*.py"))


def test_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = file.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=[\"']?(https?:[^\"' >]+)", text)
        loaded += re.findall(r"<link[^>]*rel=[\"']?(?:stylesheet|preconnect)[^>]*href=[\"']?(https?:[^\"' >]+)", text)
        loaded += re.findall(r"url\([\"']?(https?:[^\"')]+)", text)
        assert not loaded, f"{file.name} loads {loaded}"
        assert 'class="mermaid"' not in text, f"{file.name}: the theme would fetch the program that draws it"


def test_api_page_shows_arguments_errors_and_sources(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api" / "cobra.html").read_text())
    assert "cobra.Cobra" in text and "repetition_penalty" in text
    kernels = (site / "api" / "ops.html").read_text()
    assert 'id="cobra.ops.selective_scan"' in kernels
    assert "<strong>Source:</strong> Gu and Dao 2023" in kernels


def test_every_page_is_in_the_navigation_once() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = re.findall(r"\S+\.md", navigation)
    assert sorted(listed) == [page.relative_to(DOCS).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_lists_are_lists_on_the_site_too(page: Path) -> None:
    """Python-Markdown, unlike GitHub, wants an empty line before a list, and four spaces before one inside another."""
    text = re.sub(r"^( *)(`{3,}).*?^\1\2$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    item = re.compile(r"( *)(?:[-*+]|\d+\.) ")
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.strip("\n").splitlines()
        items = [found for line in lines if (found := item.match(line))]
        first = next((line for line in lines if not line.startswith("#")), "    ")
        assert not items or item.match(first) or first.startswith("    "), f"an empty line is missing: {lines}"
        assert all(len(found[1]) % 4 == 0 for found in items), f"four spaces, please: {lines}"


def test_settings_page_is_what_the_schemas_say(settings: ModuleType) -> None:
    assert settings.PAGE.read_text() == settings.page(), "run: python scripts/make_settings.py"


def test_settings_page_has_every_setting_with_a_meaning(tiny_config: Callable[..., PretrainConfig]) -> None:
    rows = re.findall(r"^\| `(\S+)` \| ([^|]+) \| (.+?) \| (.*) \|$", (DOCS / "settings.md").read_text(), re.MULTILINE)
    found = {key: (kind, default, meaning) for key, kind, default, meaning in rows}
    assert not [key for key, (_, _, meaning) in found.items() if not meaning.strip()]
    composed = flatten({name: value for name, value in as_dict(tiny_config()).items() if name != "validation"})
    wanted = {re.sub(r"^(data\.mix|tracker|validation\.benchmark)\..*", r"\1", key) for key in composed}
    assert {key for key in wanted if key != "tracker"} <= found.keys()
    assert {field.name for field in fields(ServeConfig)} <= found.keys()
    assert found["train.max_steps"][:2] == ("whole number or null", "`400`")


def all_schemas(schema: Any) -> Iterator[type]:
    yield schema
    for kind in get_type_hints(schema).values():
        for inner in (kind, *get_args(kind)):
            if is_dataclass(inner):
                yield from all_schemas(inner)


def test_every_field_says_what_it_means(settings: ModuleType) -> None:
    silent = [
        f"{schema.__name__}.{field.name}"
        for _, top in settings.SCRIPTS.values()
        for schema in all_schemas(top)
        for field in fields(schema)
        if not settings.comment(schema, field) and settings.schema_inside(get_type_hints(schema)[field.name]) is None
    ]
    assert not silent, "put a comment behind the field"


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        (None, "See the door and [b](b.md), `[x](../cobra/api.py)`, [gone](../cobra/gone.py)."),
        (
            "https://example.org/cobra",
            "See [the door](https://example.org/cobra/blob/main/cobra/api.py#L1) and [b](b.md), "
            "`[x](../cobra/api.py)`, [gone](../cobra/gone.py).",
        ),
    ],
)
def test_links_out_of_the_pages_lead_to_the_repository(repository: str | None, expected: str) -> None:
    mend = imported(DOCS / "theme" / "links.py").mend
    page = "See [the door](../cobra/api.py#L1) and [b](b.md), `[x](../cobra/api.py)`, [gone](../cobra/gone.py)."
    assert mend(page, DOCS / "a.md", DOCS, repository) == expected
    fenced = "```text\n[x](../cobra/api.py)\n```"
    assert mend(fenced, DOCS / "a.md", DOCS, repository) == fenced
