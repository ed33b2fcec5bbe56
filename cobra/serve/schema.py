"""Requests: JSON -> checked fields. What the model cannot do is refused, never left out silently."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cobra.config import nearest
from cobra.serve.errors import ApiError, refuse

MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # strings, and characters of each: every token is compared with them

# A server may be set to take fewer. Lists end at their first wrong item: an error for each would take far more time and
# memory than the request.
MAX_MESSAGES, MAX_PARTS = 4096, 256

# Fields of OpenAI's interface without any influence on an answer of this model.
_IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields that this server does not have, with the values that ask for nothing. null never does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_INSTEAD = {
    "frequency_penalty": "; repetition_penalty, a factor, is",
    "presence_penalty": "; repetition_penalty, a factor, is",
    "response_format": "; only text is",
    "modalities": "; only text is",
}


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(_Part):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    """Where an image is; its `detail` means nothing here, as every image is read at one size."""

    url: str


class ImagePart(_Part):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Content = Annotated[
    list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
    Field(fail_fast=True, max_length=MAX_PARTS),
    BeforeValidator(_as_parts),
]


class Message(BaseModel):
    """One message of the conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None  # clients send null for an answer without text

    @model_validator(mode="after")
    def _nothing_else(self) -> Message:
        """Answers come back with fields of theirs that are empty, such as tool_calls."""
        filled = [name for name, value in (self.model_extra or {}).items() if value and name != "name"]
        if filled:
            raise ValueError(f"{filled[0][:100]!r} is not supported")
        return self


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """The body of `/v1/chat/completions`; names as in OpenAI's interface, further ones as in `Cobra.generate`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
            Field(fail_fast=True, max_length=MAX_STOPS),
            BeforeValidator(_as_list),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None

    def num_tokens(self, default: int) -> int:
        """Return the limit of an answer, which has two names."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise refuse(
                f"max_tokens={old} and max_completion_tokens={new} mean the same; send one of them.", "max_tokens"
            )
        return next((limit for limit in (new, old) if limit is not None), default)


def parse(body: bytes) -> ChatRequest:
    """Check a request.

    Raises:
        ApiError: it is no JSON, or a field is missing, wrong, unknown or not supported.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None
    for name, value in (request.model_extra or {}).items():
        _check_extra(name, value)
    if request.stream_options is not None and not request.stream:
        raise refuse("stream_options needs stream=true.", "stream_options")
    return request


def _check_extra(name: str, value: Any) -> None:
    if value is None or name in _IGNORED or value in _NEUTRAL.get(name, ()):
        return
    if name in _NEUTRAL:
        raise refuse(f"{name} is not supported{_INSTEAD.get(name, '')}; leave it out.", name, "unsupported_parameter")
    known = [*ChatRequest.model_fields, *_NEUTRAL, *_IGNORED]
    raise refuse(f"Unknown field {name[:100]!r}.{nearest(name[:100], known)}", name[:100], "unknown_parameter")


def _explain(error: ValidationError) -> ApiError:
    """Name the first wrong field as OpenAI does, `messages[0].content`; what it holds is not repeated."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "union_tag_invalid":
        message = "the type of a part must be 'text' or 'image_url'"
    if first["type"] == "json_invalid":
        return refuse(f"The body is not JSON: {message.removeprefix('Invalid JSON: ')}.", code="invalid_json")
    place = first["loc"]
    if place[2:3] == ("content",):  # behind the number of a part, its type, which is no field
        place = place[:4] + place[5:]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    return refuse(f"{param or 'The body'}: {message}.", param or None, "invalid_value")
