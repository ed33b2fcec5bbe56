"""Links from a page to files outside docs/, such as `../cobra/api.py`, which a repository has and the site has not.

They lead to the repository where mkdocs.yml names one (`repo_url`). Where it does not, the site shows the text alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

# A fenced block, a span of code, or a link with a relative target; only the last one has a `target`.
PIECES = re.compile(
    r"^ *(`{3,}|~{3,}).*?^ *\1 *$|(`+)(?!`).*?(?<!`)\2(?!`)"
    r"|(?<!!)\[(?P<text>(?:[^\[\]]|!?\[[^\]]*\])+)\]\((?P<target>(?![a-z]+:|#)[^)\s]+)\)",
    re.MULTILINE | re.DOTALL,
)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Mend a page's links; MkDocs calls it for every page."""
    docs = Path(config.docs_dir)
    return mend(markdown, docs / page.file.src_uri, docs, config.repo_url)


def mend(markdown: str, page: Path, docs: Path, repository: str | None) -> str:
    """Return the text of a page with its links to files outside `docs` replaced."""
    root = docs.parent.resolve()

    def replace(piece: re.Match[str]) -> str:
        if piece["target"] is None:
            return piece[0]
        file, _, anchor = piece["target"].partition("#")
        path = (page.parent / file).resolve()
        if path.is_relative_to(docs.resolve()) or not (path.is_relative_to(root) and path.exists()):
            return piece[0]  # inside, or broken, which MkDocs reports
        if not repository:
            return piece["text"]
        kind = "tree" if path.is_dir() else "blob"
        address = f"{repository.rstrip('/')}/{kind}/main/{path.relative_to(root).as_posix()}"
        return f"[{piece['text']}]({address}{'#' + anchor if anchor else ''})"

    return PIECES.sub(replace, markdown)
