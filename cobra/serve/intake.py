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
from cobra.serve.tasks import end
from cobra.serve.worker import Job

_CHARACTERS_PER_TOKEN = 16  # longer texts are refused before they are split into tokens
_BYTES_PER_CHARACTER = 6  # of JSON: \uXXXX
_OTHER_BYTES = 2**16  # of a body, for all that is neither a conversation's text nor an image
_QUICK_BYTES = 2**16  # shorter bodies are checked without a thread
_IMAGE = re.compile(rb'"data:[^"]{1000,}"')
_BODIES = 8  # times `max_body_bytes`: what all bodies and fetched images may take together until they are read


@dataclass(frozen=True, kw_only=True)
class Order:
    """A checked request, whose images are still to be read.

    Attributes:
        asked: its fields.
        pieces: what the model is to read, the last one token ids.
        urls: of its images, each once.
        prompt_tokens: that the model reads, images included.
    """

    asked: ChatRequest
    pieces: list[list[int] | ImageSource]
    urls: list[str]
    prompt_tokens: int

    @property
    def num_answers(self) -> int:
        """How many are wanted."""
        return self.asked.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.asked.stream_options is not None and bool(self.asked.stream_options.include_usage)


class Intake:
    """Reads requests; use it in one event loop."""

    def __init__(self, vlm: Cobra, config: ServeConfig, name: str) -> None:
        self._vlm, self._config, self._name = vlm, config, name
        self._images = ImageReader(vlm, config)
        self._num_bytes = 0

    def close(self) -> None:
        """End the threads."""
        self._images.close()

    async def read(self, request: Request, count: Callable[[int], None]) -> Order:
        """Read and check a request.

        Raises:
            ApiError: it cannot be answered as it is.
            ClientDisconnect: it does not arrive.
        """
        body = await _read_body(request, self._config.max_body_bytes, count)
        asked = await asyncio.to_thread(self._parse, body) if len(body) > _QUICK_BYTES else self._parse(body)
        self._check(asked)
        pieces = render(turns_of(asked.messages), self._vlm.prompt)
        images = [piece.url for piece in pieces if isinstance(piece, ImageSource)]
        if len(images) > self._config.max_images:
            limit = self._config.max_images
            raise refuse(f"{len(images)} images are more than the {limit} that a request may hold.", "messages")
        encoded, num_tokens = self._encode(pieces, len(images))
        return Order(asked=asked, pieces=encoded, urls=list(dict.fromkeys(images)), prompt_tokens=num_tokens)

    async def prepare(self, order: Order, count: Callable[[int], None]) -> Job:
        """Read the images of a request.

        Raises:
            ApiError: one of them cannot be read.
        """
        reading = [asyncio.ensure_future(self._images.read(url, count)) for url in order.urls]
        try:
            pixels = dict(zip(order.urls, await asyncio.gather(*reading), strict=True))
        finally:
            await end(reading)
        asked = order.asked
        return Job(
            pieces=[pixels[piece.url] if isinstance(piece, ImageSource) else piece for piece in order.pieces],
            max_new_tokens=asked.num_tokens(self._config.default_tokens),
            samplings=self._samplings(asked),
            stops=tuple(asked.stop or ()),
            is_streamed=bool(asked.stream),
        )

    @contextmanager
    def counted_bytes(self) -> Generator[Callable[[int], None]]:
        """Give a function that counts bytes of a body, and of fetched images, against what all may take together; 429
        beyond that."""
        mine = 0

        def count(number: int) -> None:
            nonlocal mine
            mine += number
            self._num_bytes += number
            if self._num_bytes > _BODIES * self._config.max_body_bytes:
                raise ApiError(429, "Too much is being sent at once; try again later.", headers={"Retry-After": "1"})

        try:
            yield count
        finally:
            self._num_bytes -= mine

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
