"""From the body of a request to what the worker is to do: limits, checks, tokens, pixels."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import Request

from cobra.api import Cobra
from cobra.config import ServeConfig
from cobra.generation.sampling import Sampling
from cobra.serve.errors import ApiError, refuse
from cobra.serve.images import ImageReader
from cobra.serve.prompt import ImageSource, render, turns_of
from cobra.serve.schema import ChatRequest, parse
from cobra.serve.worker import Job

_CHARACTERS_PER_TOKEN = 16  # longer texts are refused before they are split into tokens
_BYTES_PER_CHARACTER = 6  # of JSON: \uXXXX
_OTHER_BYTES = 2**16  # of a body, for all that is neither a conversation's text nor an image
_QUICK_BYTES = 2**16  # shorter bodies are checked without a thread
_IMAGE = re.compile(rb'"data:[^"]{1000,}"')
_BODIES = 8  # times `max_body_bytes`: what all bodies that are being read may take together


@dataclass(frozen=True, kw_only=True)
class Order:
    """A checked request.

    Attributes:
        job: for the worker.
        prompt_tokens: that it reads, images included.
        wants_usage: whether a stream ends with the number of tokens.
    """

    job: Job
    prompt_tokens: int
    wants_usage: bool


class Intake:
    """Reads requests; use it in one event loop."""

    def __init__(self, vlm: Cobra, config: ServeConfig, name: str) -> None:
        self._vlm, self._config, self._name = vlm, config, name
        self._images = ImageReader(vlm, config)
        self._body_bytes = 0

    def close(self) -> None:
        """End the threads."""
        self._images.close()

    async def read(self, request: Request) -> Order:
        """Read and check a request, and prepare its images.

        Raises:
            ApiError: it cannot be answered as it is.
            ClientDisconnect: it does not arrive.
        """
        with self._counted_bytes() as count:
            body = await _read_body(request, self._config.max_body_bytes, count)
            asked = await asyncio.to_thread(self._parse, body) if len(body) > _QUICK_BYTES else self._parse(body)
            self._check(asked)
            pieces = render(turns_of(asked.messages), self._vlm.prompt)
            images = [piece.url for piece in pieces if isinstance(piece, ImageSource)]
            if len(images) > self._config.max_images:
                limit = self._config.max_images
                raise refuse(f"{len(images)} images are more than the {limit} that a request may hold.", "messages")
            encoded, num_tokens = self._encode(pieces, len(images))
            urls = list(dict.fromkeys(images))
            pixels = dict(zip(urls, await asyncio.gather(*map(self._images.read, urls)), strict=True))
        job = Job(
            pieces=[pixels[piece.url] if isinstance(piece, ImageSource) else piece for piece in encoded],
            max_new_tokens=asked.num_tokens(self._config.default_tokens),
            samplings=self._samplings(asked),
            stops=tuple(asked.stop or ()),
            is_streamed=bool(asked.stream),
        )
        wants_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
        return Order(job=job, prompt_tokens=num_tokens, wants_usage=wants_usage)

    @contextmanager
    def _counted_bytes(self) -> Generator[Callable[[int], None]]:
        """Give a function that counts bytes of a body against what all of them may take; 429 beyond that."""
        mine = 0

        def count(number: int) -> None:
            nonlocal mine
            mine += number
            self._body_bytes += number
            if self._body_bytes > _BODIES * self._config.max_body_bytes:
                raise ApiError(429, "Too much is being sent at once; try again later.", headers={"Retry-After": "1"})

        try:
            yield count
        finally:
            self._body_bytes -= mine

    def _parse(self, body: bytes) -> ChatRequest:
        """Check the form of a body, if there is not more of it beside its images than a conversation needs.

        JSON takes up to a hundred times more memory when it is read, but its strings do not.
        """
        limit = _OTHER_BYTES + _BYTES_PER_CHARACTER * _CHARACTERS_PER_TOKEN * self._config.max_prompt_tokens
        if len(body) > limit and len(body) - sum(len(image[0]) for image in _IMAGE.finditer(body)) > limit:
            raise ApiError(413, f"The body without images is larger than {limit} bytes, which is this server's limit.")
        return parse(body)

    def _check(self, asked: ChatRequest) -> None:
        """Refuse what this server does not have or allow."""
        limits = self._config
        if asked.model != self._name:
            raise ApiError(
                404,
                f"There is no model {asked.model[:100]!r}; this server has {self._name!r}.",
                param="model",
                code="model_not_found",
            )
        if len(asked.messages) > limits.max_messages:
            raise refuse(f"More than {limits.max_messages} messages are not taken.", "messages")
        if (asked.n or 1) > limits.max_choices:
            raise refuse(f"n={asked.n} is more than the {limits.max_choices} answers that a request may get.", "n")
        tokens = asked.num_tokens(limits.default_tokens)
        if tokens > limits.max_tokens:
            raise refuse(f"An answer of {tokens} tokens is longer than the {limits.max_tokens} allowed.", "max_tokens")

    def _encode(self, pieces: list[str | ImageSource], num_images: int) -> tuple[list[list[int] | ImageSource], int]:
        """Return token ids in place of texts, neighbours joined, and how many tokens there are with the images'."""
        limit = self._config.max_prompt_tokens
        too_long = refuse(
            f"The conversation with its images is longer than the {limit} tokens that this server takes.",
            "messages",
            "context_length_exceeded",
        )
        if sum(len(piece) for piece in pieces if isinstance(piece, str)) > _CHARACTERS_PER_TOKEN * limit:
            raise too_long
        encoded: list[list[int] | ImageSource] = []
        num_tokens = num_images * self._vlm.model.num_image_tokens
        for piece in pieces:
            if isinstance(piece, ImageSource):
                encoded.append(piece)
                continue
            ids = self._vlm.tokenizer.encode(piece)
            num_tokens += len(ids)
            if encoded and isinstance(encoded[-1], list):
                encoded[-1] += ids
            else:
                encoded.append(ids)
        if num_tokens > limit:
            raise too_long
        return encoded, num_tokens

    def _samplings(self, asked: ChatRequest) -> list[Sampling]:
        """One for each answer wanted; each draws from a seed of its own."""
        given = {name: getattr(asked, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
        chosen = {name: value for name, value in given.items() if value is not None}
        temperature = self._config.temperature if asked.temperature is None else asked.temperature
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        return [Sampling(temperature=temperature, seed=(seed + i) % 2**63, **chosen) for i in range(asked.n or 1)]


async def _read_body(request: Request, limit: int, count: Callable[[int], None]) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The body must be JSON; send the header Content-Type: application/json.")
    too_large = ApiError(413, f"The body is larger than {limit} bytes, which is this server's limit.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    body = bytearray()
    async for block in request.stream():
        count(len(block))
        body += block
        if len(body) > limit:
            raise too_large
    return bytes(body)
