"""The checks that the schemas share; each names the key, the value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from cobra.errors import ConfigError

DTYPES = ("float32", "bfloat16")  # of weights
QUANTIZED = {"int8": 8, "int4": 4}  # names of weights of fewer bits


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean '...'?` for the closest of `choices`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def one_of(key: str, value: object, choices: Iterable[str]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise ConfigError(
            f"{key}={value!r} is not known; choose one of {', '.join(choices)}.{nearest(str(value), choices)}"
        )


def positive(key: str, value: float) -> None:
    """Raise ConfigError unless `value` is greater than 0."""
    if not value > 0:
        raise ConfigError(f"{key}={value} must be greater than 0.")


def not_negative(key: str, value: float) -> None:
    """Raise ConfigError if `value` is less than 0."""
    if not value >= 0:
        raise ConfigError(f"{key}={value} must not be negative.")


def weight_format(dtype: str, quantize: str | None) -> None:
    """Refuse dtypes and quantisations of weights that `cobra.load` does not know."""
    one_of("dtype", dtype, DTYPES)
    if quantize is not None:
        one_of("quantize", quantize, QUANTIZED)
