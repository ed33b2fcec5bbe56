"""What the project's docstrings and comments say, in the shape that the API pages are made from."""

from __future__ import annotations

import re
from typing import Any

import griffe

# `Returns: text`, and further lines that are indented more.
ONE_LINE = re.compile(r"^(?P<name>Returns|Yields|Raises|Source): (?P<text>\S.*(?:\n[ \t]+\S.*)*)$", re.MULTILINE)
# `B, C: text` below `Args:`.
SEVERAL = re.compile(r"^(?P<indent>[ \t]+)(?P<names>\w+(?:, \w+)+): (?P<text>.*)$", re.MULTILINE)
COMMENT = re.compile(r"  # (?!type:|pyright:|noqa)(?P<text>.+)$")


class Docstrings(griffe.Extension):
    """Sections of one line become paragraphs, arguments described together one entry each."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite a docstring before it is parsed; Griffe calls it for every object."""
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Take the comment behind a field for its description, as readers of the code do."""
        if attr.docstring is None and attr.parent is not None and attr.parent.is_class and attr.lines:
            found = COMMENT.search(attr.lines[-1])
            if found is not None:
                attr.docstring = griffe.Docstring(found["text"], parent=attr, lineno=attr.endlineno)


def readable(docstring: str) -> str:
    """Return the docstring in Google's style, in which sections of one line do not exist."""
    docstring = SEVERAL.sub(
        lambda entry: "\n".join(f"{entry['indent']}{name}: {entry['text']}" for name in entry["names"].split(", ")),
        docstring,
    )
    return ONE_LINE.sub(
        lambda section: f"\n**{section['name']}:** " + re.sub(r"\n[ \t]+", " ", section["text"]) + "\n", docstring
    )
