"""The keywords that say how an answer is generated, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from cobra.errors import ConfigError
from cobra.generation.sampling import Sampling, SamplingOptions, is_whole
from cobra.generation.stopping import stop_strings

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GenerateOptions(SamplingOptions, total=False):
    """Keywords of `Cobra.generate`, which explains them, of `Cobra.stream` and of chats."""

    max_new_tokens: int
    stop: str | Sequence[str]


def checked(
    *, max_new_tokens: int = 128, stop: str | Sequence[str] = (), **sampling: Unpack[SamplingOptions]
) -> tuple[int, tuple[str, ...], Sampling]:
    """Return limit, stop strings and sampling.

    Raises:
        ConfigError: an option is not known, or out of its range.
    """
    known = {field.name for field in fields(Sampling)}
    unknown = sorted(set(sampling) - known)
    if unknown:
        names = ", ".join(["max_new_tokens", "stop", *sorted(known)])
        raise ConfigError(f"{unknown[0]} is no option of an answer; choose among {names}.")
    return check_limit(max_new_tokens), stop_strings(stop), Sampling(**sampling)


def check_limit(max_new_tokens: int) -> int:
    """Return the limit of an answer.

    Raises:
        ConfigError: it is no whole number, or less than 1.
    """
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens!r} must be a whole number, at least 1.")
    return int(max_new_tokens)
