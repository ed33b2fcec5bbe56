"""Answers in OpenAI's form: one object, or a stream of server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from cobra.serve.errors import ApiError
from cobra.serve.worker import Update

END_OF_STREAM = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event; JSON in ASCII has no line breaks of any kind."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The end of a stream that fails after it has begun."""
    return event(error.body)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens read, images included, and generated; the prompt counts once for all answers to it."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Completion:
    """The frame of all that is sent for one request."""

    def __init__(self, model: str) -> None:
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self._frame = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, answers: Sequence[Update], prompt_tokens: int) -> dict[str, Any]:
        """Return all answers in one object."""
        choices = [
            {
                "index": answer.index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None,
                "finish_reason": answer.finish,
            }
            for answer in sorted(answers, key=lambda answer: answer.index)
        ]
        counted = usage(prompt_tokens, sum(answer.num_tokens for answer in answers))
        return self._frame | {"object": "chat.completion", "choices": choices, "usage": counted}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        """One event of a stream."""
        return event(self._frame | {"object": "chat.completion.chunk", "choices": choices} | more)

    def begin(self, index: int) -> dict[str, Any]:
        """The first piece of a streamed answer."""
        return _piece(index, {"role": "assistant", "content": ""}, None)

    def piece(self, update: Update) -> list[dict[str, Any]]:
        """Return pieces of a streamed answer; its finish reason comes in one of its own, without text."""
        pieces = [_piece(update.index, {"content": update.text}, None)] if update.text else []
        return pieces + ([_piece(update.index, {}, update.finish)] if update.finish else [])


def _piece(index: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
