"""The one thread that owns the model: reads prompts, runs the batch, hands out what is generated."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from cobra.api import Cobra, Pixels
from cobra.errors import CobraError
from cobra.generation.engine import prefill
from cobra.generation.sampling import Sampling
from cobra.generation.scheduler import CHUNK, Event, Request, Scheduler
from cobra.generation.stopping import AnswerText
from cobra.models.state import MambaState
from cobra.serve.errors import ApiError

log = logging.getLogger(__name__)

IMAGES_AT_ONCE = 4  # read between two steps of the running answers, which wait for as long

Piece = Pixels | list[int]  # an image, or token ids


@dataclass(frozen=True, kw_only=True)
class Update:
    """What has been added to an answer.

    Attributes:
        index: of the answer among those to one request.
        num_tokens: of the answer so far.
        finish: "stop" or "length" when it is complete, with its last text.
    """

    index: int
    text: str
    num_tokens: int
    finish: str | None = None


@dataclass(kw_only=True, eq=False)
class Job:
    """A request to be answered.

    Attributes:
        pieces: what the model reads, the last one token ids.
        samplings: one for each answer wanted.
        is_streamed: text is wanted as it comes; else each answer at its end.
    """

    pieces: Sequence[Piece]
    max_new_tokens: int
    samplings: Sequence[Sampling]
    stops: tuple[str, ...] = ()
    is_streamed: bool = False


Delivery = list[tuple[Job, Update | ApiError]]


@dataclass(eq=False)
class _Reading:
    """A job whose pieces before the last one are being read."""

    job: Job
    left: deque[Piece] = field(init=False)
    state: MambaState | None = None

    def __post_init__(self) -> None:
        self.left = deque(self.job.pieces)

    @property
    def is_read(self) -> bool:
        """Only the last piece is left, which the scheduler reads."""
        return len(self.left) == 1

    @property
    def is_fresh_image(self) -> bool:
        """An image is to be read from the beginning of a text, so with others like it."""
        return not self.is_read and self.state is None and isinstance(self.left[0], Pixels)


class _Answer:
    """An answer that is being generated."""

    def __init__(self, job: Job, index: int, vlm: Cobra) -> None:
        self.job, self.index, self.num_tokens = job, index, 0
        self._text = AnswerText(vlm.tokenizer.decode, job.stops)

    def add(self, token: int) -> bool:
        """Take a token; return whether the answer ends with it."""
        self.num_tokens += 1
        self._text.add(token)
        return self._text.is_over

    def update(self, finish: str | None) -> Update:
        text = self._text.take() if finish is None else self._text.finish()
        return Update(index=self.index, text=text, num_tokens=self.num_tokens, finish=finish)


class Worker:
    """Runs jobs; all methods may be called from other threads.

    Args:
        vlm: the model; while the worker runs, nobody else may run it.
        max_rows: answers that are generated at once.
        deliver: called in the worker's thread with what is new, after every step.
        on_failure: called in the worker's thread when it ends by an error; nothing is delivered any more.

    Attributes:
        has_failed: it has ended by an error.
    """

    def __init__(
        self, vlm: Cobra, *, max_rows: int, deliver: Callable[[Delivery], object], on_failure: Callable[[], object]
    ) -> None:
        self._vlm, self._max_rows, self._deliver, self._on_failure = vlm, max_rows, deliver, on_failure
        self.has_failed = False
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._reading: deque[_Reading] = deque()
        self._answers: dict[int, _Answer] = {}  # by ticket
        self._scheduler = self._new_scheduler()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End after the current step, whatever is unfinished, and wait for that."""
        self._orders.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Let a job join the batch when there is room; updates, or one error, are delivered."""
        self._orders.put(lambda: self._reading.append(_Reading(job)))

    def cancel(self, job: Job) -> None:
        """Forget a job; one that is finished or unknown is fine."""
        self._orders.put(lambda: self._forget(job))

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self._vlm.model.llm, end_id=self._vlm.tokenizer.end_id, max_rows=self._max_rows)

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._take_orders():
                self._read()
                if len(self._scheduler):
                    self._step()
        except BaseException as error:
            log.critical("The model's thread ends by an error.", exc_info=error)
            self.has_failed = True
            self._on_failure()

    def _take_orders(self) -> bool:
        """Carry out what was ordered, waiting for it if there is nothing else to do; False: the end."""
        is_idle = not self._reading and not len(self._scheduler)
        try:
            while True:
                order = self._orders.get(block=is_idle)
                if order is None:
                    return False
                try:
                    order()
                except Exception as error:
                    self._start_over(error)
                is_idle = False
        except queue.Empty:
            return True

    def _forget(self, job: Job) -> None:
        self._reading = deque(reading for reading in self._reading if reading.job is not job)
        for ticket in [ticket for ticket, answer in self._answers.items() if answer.job is job]:
            self._scheduler.cancel(ticket)
            del self._answers[ticket]

    def _read(self) -> None:
        """Go on with the prompts of the first jobs; running answers wait meanwhile, so only with a few pieces.

        Jobs come first that came first, whatever they hold, or those that need little would keep others out for ever.
        Jobs without room in the batch wait unread, as what has been read of an image is many times larger than it.
        """
        first = list(islice(self._reading, self._room()))
        for reading in first:
            if reading.is_read:
                self._reading.remove(reading)
                self._guarded([reading], lambda reading=reading: self._add(reading))
        unread = [reading for reading in first if not reading.is_read]
        if unread and unread[0].is_fresh_image:
            batch = [reading for reading in unread if reading.is_fresh_image][:IMAGES_AT_ONCE]
            self._guarded(batch, lambda: self._read_first_images(batch))
        elif unread:
            self._guarded(unread[:1], lambda: self._read_piece(unread[0]))

    def _room(self) -> int:
        return max(0, self._max_rows - len(self._scheduler))

    def _guarded(self, readings: Sequence[_Reading], work: Callable[[], None]) -> None:
        """Do something for jobs; an error ends them and no others."""
        try:
            work()
        except Exception as error:
            self._reading = deque(reading for reading in self._reading if reading not in readings)
            self._fail([reading.job for reading in readings], error)

    def _read_first_images(self, batch: Sequence[_Reading]) -> None:
        states = self._vlm.encode_image([reading.left[0] for reading in batch])  # type: ignore[misc]
        for row, reading in enumerate(batch):
            reading.left.popleft()
            reading.state = states[row].state

    def _read_piece(self, reading: _Reading) -> None:
        """Read the next piece, of a text a chunk, of a prompt with text before an image, or several images."""
        piece, model = reading.left[0], self._vlm.model
        if isinstance(piece, Pixels):
            views = [view[None].to(model.device) for view in piece.views]
            _, reading.state = model.llm(model.embed_images(views), state=reading.state)
        else:
            _, reading.state = prefill(model.llm, [piece[:CHUNK]], reading.state)
            if len(piece) > CHUNK:
                reading.left[0] = piece[CHUNK:]
                return
        reading.left.popleft()

    def _add(self, reading: _Reading) -> None:
        """Let the answers to a job join the batch."""
        job, prompt = reading.job, reading.left[0]
        assert isinstance(prompt, list)
        for index, sampling in enumerate(job.samplings):
            answer = _Answer(job, index, self._vlm)
            request = Request(
                prompt=prompt,
                state=reading.state,
                max_new_tokens=job.max_new_tokens,
                sampling=sampling,
                is_over=answer.add,
            )
            self._answers[self._scheduler.add(request)] = answer

    def _step(self) -> None:
        try:
            events = self._scheduler.step()
        except Exception as error:  # such as memory that ran out: whoever comes next may be luckier
            self._start_over(error)
            return
        delivery: Delivery = []
        for event in events:
            delivery += self._take(event)
        if delivery:
            self._deliver(delivery)

    def _start_over(self, error: Exception) -> None:
        """End all running answers with an error, and go on with an empty batch."""
        jobs = dict.fromkeys(answer.job for answer in self._answers.values())
        self._answers.clear()
        self._scheduler = self._new_scheduler()
        self._fail(jobs, error)

    def _take(self, event: Event) -> Delivery:
        answer = self._answers.get(event.ticket)
        if answer is None:  # forgotten, as another answer to the same request has failed
            return []
        if event.finish is not None:
            del self._answers[event.ticket]
        if event.finish == "error":
            self._forget(answer.job)
            return [(answer.job, ApiError(500, "The model's output is NaN or infinite; check its weights and dtype."))]
        if event.finish is None and not answer.job.is_streamed:
            return []
        update = answer.update(event.finish)
        return [(answer.job, update)] if update.text or update.finish else []

    def _fail(self, jobs: Iterable[Job], error: Exception) -> None:
        if not isinstance(error, CobraError):
            log.error("A request failed in the model.", exc_info=error)
        reason = str(error) if isinstance(error, CobraError) else "The model failed; the server's log has the reason."
        self._deliver([(job, ApiError(500, reason)) for job in jobs])
