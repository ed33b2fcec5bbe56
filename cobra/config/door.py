"""`as_config`, the one door through which every setting enters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from cobra.config.checks import nearest
from cobra.errors import ConfigError

T = TypeVar("T")


def read_yaml(file: Path, argument: str) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        ConfigError: it is missing, or holds no settings; the message names `argument`, which it was given as.
    """
    try:
        node = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except OSError as error:
        raise ConfigError(f"{argument}={file} cannot be read: {error.strerror or error}.") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{argument}={file} is not a YAML file of settings: {str(error).splitlines()[0]}.") from None
    if not isinstance(node, dict):
        raise ConfigError(f"{argument}={file} must hold settings, key: value.")
    return cast("dict[str, Any]", node)


def as_config(schema: type[T], node: DictConfig | Mapping[str, Any]) -> T:
    """Check `node` against the dataclass `schema` and return an instance of it.

    Raises:
        ConfigError: an unknown key (with the nearest valid one), a wrong type, a missing value, or a combination that
            a schema's own checks refuse. The message is one line and names the key.
    """
    if isinstance(node, DictConfig):
        try:
            node = cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True, throw_on_missing=True))
        except MissingMandatoryValue as error:
            raise ConfigError(f"{error.full_key} is not set; give it a value: {error.full_key}=...") from None
        except OmegaConfBaseException as error:
            raise ConfigError(str(error).splitlines()[0]) from None
    return _convert(schema, node, "")


def as_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain data, ready for JSON or YAML."""
    return asdict(config)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level with dotted keys: {"train": {"epochs": 1}} -> {"train.epochs": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _convert(kind: Any, value: Any, key: str) -> Any:
    """Return `value` as `kind` (a dataclass, list[...], dict[...], X | None or a scalar type), or say what is wrong."""
    arguments = get_args(kind)
    if isinstance(kind, UnionType):
        return None if value is None else _convert(arguments[0], value, key)
    if is_dataclass(kind):
        return _build(cast("type[Any]", kind), value, key)
    if get_origin(kind) is list and isinstance(value, list):
        return [_convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(cast("list[Any]", value))]
    if get_origin(kind) is dict and isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return {str(name): _convert(arguments[1], item, f"{key}.{name}") for name, item in items}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    name = getattr(get_origin(kind) or kind, "__name__", str(kind))
    raise ConfigError(f"{key}={value!r} is not of type {name}.")


def _build(schema: type[Any], node: Any, prefix: str) -> Any:
    if not isinstance(node, Mapping):
        raise ConfigError(f"{prefix}={node!r} must be a group of settings.")
    dot = f"{prefix}." if prefix else ""
    hints = get_type_hints(schema)
    items = {item.name: item for item in fields(schema)}
    values: dict[str, Any] = {}
    for name, value in cast("Mapping[str, Any]", node).items():
        if name not in items:
            raise ConfigError(f"Unknown setting '{dot}{name}'.{nearest(name, items)} Known: {', '.join(items)}.")
        values[name] = _convert(hints[name], value, f"{dot}{name}")
    for name, item in items.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{dot}{name} is not set; give it a value: {dot}{name}=...")
    return schema(**values)
