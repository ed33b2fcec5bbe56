"""Write docs/settings.md: every setting of every script, with its type, default and meaning.

    python scripts/make_settings.py

The schemas in `cobra/config` say what there is, the comment behind each field what it means, and the configs in
`configs/` with what value a command begins.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import hydra
import yaml
from omegaconf import OmegaConf

from cobra import config as schemas
from cobra.runtime import write_text

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
PAGE = ROOT / "docs" / "settings.md"

SCRIPTS = {  # command: its config, and the schema of that
    "pretrain": ("pretrain", schemas.PretrainConfig),
    "prepare": ("prepare", schemas.PrepareConfig),
    "evaluate": ("evaluate", schemas.EvaluateConfig),
    "score": ("score", schemas.ScoreConfig),
    "chat": ("generate", schemas.GenerateConfig),
    "serve": ("serve", schemas.ServeConfig),
    "demo": ("demo", schemas.DemoConfig),
}
INTRODUCTION = """# Settings

Every setting of every command: on the command line `key=value`, in a YAML file nested as the dots say. How files,
groups and experiments are put together: [configuration](configuration.md).

The default is what a command begins with when nothing is given. An experiment, or another file of a group, brings
values of its own; `cobra pretrain +experiment=NAME --cfg job` shows them. Places in lists are counted from 0. `cobra
compare` and `cobra convert` take options instead, which `--help` explains.
"""
BENCHMARKS = """## Benchmarks

Settings of what `benchmark=NAME` chooses for `cobra evaluate` and `cobra score`. In training, they begin with
`validation.benchmark` instead.
"""
NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", list: "list", Any: "any"}
REQUIRED = object()  # the default of what must be given


@dataclass(frozen=True)
class Setting:
    """One row of a table."""

    key: str
    kind: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class Section:
    """A table: the settings of one schema, at one place."""

    title: str
    about: str
    settings: list[Setting]


def main() -> None:
    write_text(PAGE, page())


def page() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION]
    written: dict[type, str] = {}  # schema: the title under which its settings are
    for command, (name, schema) in SCRIPTS.items():
        values, choices = compose(name)
        about = f"{summary(name)}. `cobra {command}` or `python scripts/{name}.py`."
        parts.append(f"## cobra {command}\n\n{wrapped(about)}\n")
        for section in sections(schema, "", values, choices, written):
            parts.append(show(section))
    parts.append(BENCHMARKS)
    for name in group_files("benchmark"):
        values, _ = compose("evaluate", f"benchmark={name}")
        kind = hydra.utils.get_class(values["benchmark"]["_target_"])
        for section in sections(kind, "benchmark", values["benchmark"], {}, {}, title=f"benchmark={name}"):
            parts.append(show(section))
    return "\n".join(parts)


def compose(name: str, *overrides: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a script's settings, and for each package such as `model.llm` the group and file that fill it."""
    if name in ("evaluate", "score") and not overrides:
        overrides = ("~benchmark",)
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose(name, list(overrides), return_hydra_config=True)
    choices = config.hydra.runtime.choices
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    values: Any = OmegaConf.to_container(config)
    places = {key.rpartition("@")[2].replace("/", "."): f"{key}={choice}" for key, choice in choices.items()}
    return values, places


def sections(
    schema: type,
    key: str,
    values: Mapping[str, Any] | None,
    choices: Mapping[str, str],
    written: dict[type, str],
    *,
    title: str = "",
) -> Iterator[Section]:
    """Yield the tables of a schema and of those inside it.

    Args:
        schema: a dataclass.
        key: where it stands, such as "train.lora".
        values: what the configs put there; None: nothing.
        choices: as of `compose`.
        written: schemas that have their tables, and under which titles; more are added.
        title: of the first table, if not `key`.
    """
    written[schema] = title or key
    settings: list[Setting] = []
    inside: list[tuple[str, type[Any], Mapping[str, Any] | None]] = []
    links: list[str] = []
    hints = get_type_hints(schema)
    for item in fields(schema):
        kind = hints[item.name]
        name = f"{key}.{item.name}" if key else item.name
        value = default(item, values)
        group = schema_inside(kind)
        if group is None or group[1] or isinstance(kind, UnionType):
            settings.append(Setting(name, kind_name(kind), shown(value, name, choices), comment(schema, item)))
        if group is not None and group[0] in written:
            links.append(f"`{name}` is as in [{written[group[0]]}](#{anchor(written[group[0]])}).")
        elif group is not None:
            filled = value if isinstance(value, Mapping) and not group[1] else None
            inside.append((name + group[1], group[0], filled))
    about = " ".join([*([sentence(schema)] if key else []), *filter(None, [files(choices.get(key))]), *links])
    yield Section(title or key, about, settings)
    for name, inner, inner_values in inside:
        yield from sections(inner, name, inner_values, choices, written)


def schema_inside(kind: Any) -> tuple[Any, str] | None:
    """Return the dataclass that a field holds, and what is added to the key: nothing, or a place in it."""
    arguments = get_args(kind)
    if isinstance(kind, UnionType):
        return schema_inside(arguments[0])
    for outer, suffix in ((list, ".0"), (dict, ".NAME")):
        if get_origin(kind) is outer and is_dataclass(arguments[-1]):
            return arguments[-1], suffix
    return (kind, "") if isinstance(kind, type) and is_dataclass(kind) else None


def default(item: Field[Any], values: Mapping[str, Any] | None) -> Any:
    """Return what the configs say of a field, else its schema, else REQUIRED."""
    if values is not None and item.name in values:
        return REQUIRED if values[item.name] == "???" else values[item.name]
    if item.default is not MISSING:
        return item.default
    return REQUIRED if item.default_factory is MISSING else item.default_factory()


def shown(value: Any, key: str, choices: Mapping[str, str]) -> str:
    """Return a default as it would be typed."""
    if value is REQUIRED:
        return "*required*"
    if key in choices:
        return f"`{choices[key].partition('=')[2]}`"
    if isinstance(value, (dict, list)) and any(isinstance(part, dict) for part in (value, *value) if part):
        return "*what the file says*"
    variable = re.fullmatch(r"\$\{oc\.env:(\w+),(.*)\}", value) if isinstance(value, str) else None
    if variable is not None:
        return f"`{variable[2]}` or `${variable[1]}`"
    if isinstance(value, str) and "\n" in value:
        return f"`{json.dumps(value, ensure_ascii=False)}`"  # which is YAML, too
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return "`" + text.strip().removesuffix("...").strip() + "`"


def kind_name(kind: Any) -> str:
    """Return a type in words."""
    arguments = get_args(kind)
    if isinstance(kind, UnionType):
        return f"{kind_name(arguments[0])} or null"
    if get_origin(kind) is list:
        return "list" if is_dataclass(arguments[0]) else f"list: {kind_name(arguments[0])}"
    return NAMES.get(kind, "mapping")


@cache
def comments(schema: type) -> dict[str, str]:
    """Return what stands behind each of a class's fields in its file."""
    found: dict[str, str] = {}
    name = ""
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(schema)).readline):
        if token.type == tokenize.NAME and re.match(rf"    {token.string}:", token.line):
            name = token.string
        elif token.type == tokenize.COMMENT and name:
            found[name] = token.string.removeprefix("#").strip()
        elif token.type == tokenize.NEWLINE:
            name = ""
    return found


def comment(schema: type, item: Field[Any]) -> str:
    """Return the meaning of a field, in the class or in one that it inherits from."""
    return next((text for base in schema.__mro__[:-1] if (text := comments(base).get(item.name))), "")


def sentence(schema: type) -> str:
    """Return the first sentence about a schema."""
    return inspect.cleandoc(schema.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def summary(script: str) -> str:
    """Return the first sentence about a script."""
    tree = ast.parse((ROOT / "scripts" / f"{script}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition(". ")[0]


def files(choice: str | None) -> str:
    """Return which file of a group fills a section, and which others could."""
    if choice is None:
        return ""
    option, _, name = choice.partition("=")
    others = ", ".join(f"`{other}`" for other in group_files(option) if other != name)
    return f"The file is `{choice}`; there are also {others}." if others else ""


def group_files(group: str) -> list[str]:
    """Return the choices of a group of configs."""
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def anchor(title: str) -> str:
    """Return what a heading is linked to by."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def show(section: Section) -> str:
    """Return a section in Markdown."""
    rows = [
        f"| `{setting.key}` | {setting.kind} | {setting.default} | {in_a_cell(setting.meaning)} |"
        for setting in section.settings
    ]
    lines = [f"### {section.title}", ""] if section.title else []
    lines += [wrapped(section.about), ""] if section.about else []
    if rows:
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def wrapped(text: str) -> str:
    """Return a paragraph in lines of 120 characters, code spans whole."""
    whole = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    return textwrap.fill(whole, 120, break_on_hyphens=False, break_long_words=False).replace("\0", " ")


def in_a_cell(text: str) -> str:
    """Return a comment as Markdown: its quoted words as code, nothing that would end the cell."""
    return re.sub(r'"([^" ]+)"', r"`\1`", text).replace("|", r"\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
