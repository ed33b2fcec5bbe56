"""From a request for an answer to the answer: checks, limits, waiting, streaming."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Generator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from cobra.api import Cobra
from cobra.config import ServeConfig
from cobra.serve.answers import END_OF_STREAM, Completion, error_event, usage
from cobra.serve.errors import ApiError
from cobra.serve.intake import Intake, Order
from cobra.serve.metrics import Metrics
from cobra.serve.streams import EventStream, Mailbox
from cobra.serve.worker import Delivery, Job, Update, Worker

T = TypeVar("T")

_LAST_READ = 10  # seconds that a client has to read the end of a stream


class Service:
    """Answers requests; lives in one event loop, beside the worker's thread."""

    def __init__(self, vlm: Cobra, config: ServeConfig) -> None:
        self.name = config.name or vlm.name
        self.config = config
        self.metrics = Metrics()
        self.open_answers = 0
        self.is_draining = False
        self.worker = Worker(vlm, max_rows=config.max_rows, deliver=self._deliver)
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

    async def complete(self, request: Request) -> Response:
        """Answer a request for a chat completion.

        Raises:
            ApiError: what the client is told instead.
            ClientDisconnect: there is no client any more.
        """
        deadline = self._loop.time() + self.config.timeout
        with ExitStack() as stack:
            if self.is_draining:
                raise _stopping()
            stack.enter_context(self._open_answers(1))
            try:
                order = await asyncio.wait_for(self._intake.read(request), self.config.timeout)
            except asyncio.TimeoutError:
                raise ApiError(408, "The request, with its images, did not arrive in time.", code="timeout") from None
            job, prompt_tokens = order.job, order.prompt_tokens
            stack.enter_context(self._open_answers(len(job.samplings) - 1))
            mailbox = stack.enter_context(self._submitted(job, deadline))
            completion = Completion(self.name)
            facts = request.scope["facts"]
            facts |= {"id": completion.id, "images": _count_images(job), "prompt": prompt_tokens, "tokens": 0}
            self.metrics.add("prompt_tokens_total", prompt_tokens)
            self.metrics.add("images_total", facts["images"])
            if job.is_streamed:
                events = self._events(completion, order, mailbox, facts)
                return EventStream(events, seconds=self.config.timeout + _LAST_READ, on_end=stack.pop_all().close)
            answers = await _unless_gone(request, _collect(job, mailbox))
            facts["tokens"] = sum(answer.num_tokens for answer in answers)
            self.metrics.add("completion_tokens_total", facts["tokens"])
            return JSONResponse(completion.whole(answers, prompt_tokens))

    @contextmanager
    def _open_answers(self, count: int) -> Generator[None]:
        """Hold places in the batch or the queue before it; 429 when there are none."""
        room = self.config.max_rows + self.config.max_waiting - self.open_answers
        if count > room:
            raise ApiError(
                429,
                "The server has as many requests as it can take; try again later.",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        self.open_answers += count
        try:
            yield
        finally:
            self.open_answers -= count

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

    def _distribute(self, delivery: Delivery) -> None:
        for job, item in delivery:
            if job in self._mailboxes:
                self._mailboxes[job].put(item)

    async def _events(
        self, completion: Completion, order: Order, mailbox: Mailbox, facts: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        """The stream of an answer."""
        started, counts = time.monotonic(), [0] * len(order.job.samplings)
        more: dict[str, Any] = {"usage": None} if order.wants_usage else {}
        is_waiting = True
        try:
            for index in range(len(counts)):
                yield completion.chunk([completion.begin(index)], **more)
            async for updates in _updates(order.job, mailbox):
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


def _stopping() -> ApiError:
    return ApiError(503, "The server is stopping.", code="stopping", headers={"Retry-After": "5"})


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Wait for `work`; ClientDisconnect, and the end of it, as soon as nobody waits for the answer."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
