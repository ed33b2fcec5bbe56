"""From a request for an answer to the answer: checks, limits, waiting, streaming."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Generator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cobra.api import Cobra
from cobra.config import ServeConfig
from cobra.serve.answers import END_OF_STREAM, Completion, error_event, usage
from cobra.serve.errors import ApiError
from cobra.serve.intake import Intake, Order
from cobra.serve.metrics import Metrics
from cobra.serve.streams import EventStream, Mailbox
from cobra.serve.tasks import unless_gone
from cobra.serve.worker import Delivery, Job, Update, Worker

T = TypeVar("T")

_BODIES_AT_ONCE = 256  # requests that are arriving
_LAST_READ = 10  # seconds that a client has to read the end of a stream


class Service:
    """Answers requests; lives in one event loop, beside the worker's thread."""

    def __init__(self, vlm: Cobra, config: ServeConfig) -> None:
        self.name = config.name or vlm.name
        self.config = config
        self.metrics = Metrics()
        self.open_answers = 0
        self._num_bodies = 0
        self.is_draining = False
        self.worker = Worker(vlm, max_rows=config.max_rows, deliver=self._deliver, on_failure=self._on_failure)
        self._intake = Intake(vlm, config, self.name)
        self._mailboxes: dict[Job, Mailbox] = {}

    async def start(self) -> None:
        """Begin to answer."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()

    async def close(self) -> None:
        """End whatever is unfinished."""
        await asyncio.to_thread(self.worker.stop)
        self._intake.close()

    def end_all(self) -> None:
        """Tell everybody who still waits that the server stops."""
        for mailbox in self._mailboxes.values():
            mailbox.put(_stopping())

    def fail_all(self) -> None:
        """Tell everybody who still waits that there is no model any more."""
        for mailbox in self._mailboxes.values():
            mailbox.put(_failed())

    async def complete(self, request: Request) -> Response:
        """Answer a request for a chat completion.

        Raises:
            ApiError: what the client is told instead.
            ClientDisconnect: there is no client any more.
        """
        deadline = self._loop.time() + self.config.timeout
        with ExitStack() as stack:
            self._check_running()
            order, job = await self._receive(request, stack, deadline)
            self._check_running()
            mailbox = stack.enter_context(self._submitted(job, deadline))
            completion = Completion(self.name)
            facts = request.scope["facts"]
            facts |= {"id": completion.id, "images": _count_images(job), "prompt": order.prompt_tokens, "tokens": 0}
            self.metrics.add("prompt_tokens_total", order.prompt_tokens)
            self.metrics.add("images_total", facts["images"])
            if job.is_streamed:
                events = self._events(completion, order, job, mailbox, facts)
                return EventStream(events, seconds=self.config.timeout + _LAST_READ, on_end=stack.pop_all().close)
            answers = await unless_gone(request, _collect(job, mailbox))
            facts["tokens"] = sum(answer.num_tokens for answer in answers)
            self.metrics.add("completion_tokens_total", facts["tokens"])
            return JSONResponse(completion.whole(answers, order.prompt_tokens))

    def _check_running(self) -> None:
        if self.worker.has_failed:
            raise _failed()
        if self.is_draining:
            raise _stopping()

    async def _receive(self, request: Request, stack: ExitStack, deadline: float) -> tuple[Order, Job]:
        """Read a request and its images; the stack then holds its places.

        They are taken when the body is there, so that those who send slowly keep nobody out of the batch, and before
        images are decoded, which take more memory than all else.
        """
        with self._intake.counted_bytes() as count:
            with self._reading_body():
                seconds = min(self.config.body_timeout, self.config.timeout)
                order = await _within(seconds, self._intake.read(request, count))
            places = max(order.num_answers, len(order.urls))
            stack.enter_context(self._open_answers(min(places, self.config.max_rows + self.config.max_waiting)))
            preparing = unless_gone(request, self._intake.prepare(order, count))
            return order, await _within(deadline - self._loop.time(), preparing)

    @contextmanager
    def _reading_body(self) -> Generator[None]:
        """Be one of those whose bodies are arriving; 429 when there are too many, or no place for an answer."""
        if self._num_bodies >= _BODIES_AT_ONCE or not self._has_room(1):
            raise _full()
        self._num_bodies += 1
        try:
            yield
        finally:
            self._num_bodies -= 1

    @contextmanager
    def _open_answers(self, count: int) -> Generator[None]:
        """Hold places in the batch or the queue before it; 429 when there are none."""
        if not self._has_room(count):
            raise _full()
        self.open_answers += count
        try:
            yield
        finally:
            self.open_answers -= count

    def _has_room(self, count: int) -> bool:
        return self.open_answers + count <= self.config.max_rows + self.config.max_waiting

    @contextmanager
    def _submitted(self, job: Job, deadline: float) -> Generator[Mailbox]:
        """Let the worker answer a job until the block ends."""
        mailbox = self._mailboxes[job] = Mailbox()
        late = ApiError(504, f"The answer is not complete after {self.config.timeout:g} s.", code="timeout")
        timer = self._loop.call_at(deadline, mailbox.put, late)
        self.worker.submit(job)
        try:
            yield mailbox
        finally:
            timer.cancel()
            del self._mailboxes[job]
            self.worker.cancel(job)

    def _deliver(self, delivery: Delivery) -> None:
        """Called by the worker: hand over to the event loop, in one go."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._distribute, delivery)

    def _on_failure(self) -> None:
        """Called by the worker at its end, if nobody has stopped it."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.fail_all)

    def _distribute(self, delivery: Delivery) -> None:
        for job, item in delivery:
            if job in self._mailboxes:
                self._mailboxes[job].put(item)

    async def _events(
        self, completion: Completion, order: Order, job: Job, mailbox: Mailbox, facts: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        """The stream of an answer."""
        started, counts = time.monotonic(), [0] * order.num_answers
        more: dict[str, Any] = {"usage": None} if order.wants_usage else {}
        is_waiting = True
        try:
            for index in range(len(counts)):
                yield completion.chunk([completion.begin(index)], **more)
            async for updates in _updates(job, mailbox):
                if is_waiting:
                    is_waiting = False
                    self.metrics.add("first_token_seconds_sum", time.monotonic() - started)
                    self.metrics.add("first_token_seconds_count")
                for update in updates:
                    counts[update.index] = update.num_tokens
                joined = _joined(updates)
                yield b"".join(completion.chunk([piece], **more) for one in joined for piece in completion.piece(one))
            if order.wants_usage:
                yield completion.chunk([], usage=usage(order.prompt_tokens, sum(counts)))
            yield END_OF_STREAM
        except ApiError as error:
            facts["error"] = error.code or "failed"
            yield error_event(error)
        finally:
            facts["tokens"] = sum(counts)
            self.metrics.add("completion_tokens_total", facts["tokens"])


def _joined(updates: list[Update]) -> list[Update]:
    """Put together what has come for each answer since the last time."""
    joined: dict[int, Update] = {}
    for update in updates:
        before = joined[update.index].text if update.index in joined else ""
        joined[update.index] = Update(
            index=update.index, text=before + update.text, num_tokens=update.num_tokens, finish=update.finish
        )
    return list(joined.values())


async def _updates(job: Job, mailbox: Mailbox) -> AsyncIterator[list[Update]]:
    """Yield what comes until all answers are complete; raises what comes instead."""
    left = len(job.samplings)
    while left:
        items = await mailbox.take()
        for item in items:
            if isinstance(item, ApiError):
                raise item
        updates = [item for item in items if isinstance(item, Update)]
        left -= sum(update.finish is not None for update in updates)
        yield updates


async def _collect(job: Job, mailbox: Mailbox) -> list[Update]:
    return [update async for updates in _updates(job, mailbox) for update in updates]


def _count_images(job: Job) -> int:
    return sum(not isinstance(piece, list) for piece in job.pieces)


async def _within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    try:
        return await asyncio.wait_for(work, seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, "The request, with its images, did not arrive in time.", code="timeout") from None


def _full() -> ApiError:
    return ApiError(
        429,
        "The server has as many requests as it can take; try again later.",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def _failed() -> ApiError:
    return ApiError(503, "The model has failed, and the server ends; its log has the reason.", code="failed")


def _stopping() -> ApiError:
    return ApiError(503, "The server is stopping.", code="stopping", headers={"Retry-After": "5"})
