"""Batches of many callers in, few full requests out, and to each caller its own rows back.

While few requests are under way a batch is sent at once, alone. Beyond that batches wait until one
of those comes back, and whatever has gathered by then goes out together: concurrent callers of
single items fill requests without anyone waiting for company.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clip_rt.deadline import Deadline
from clip_rt.errors import (
    ClipRTError,
    NonFiniteEmbeddingError,
    ProtocolError,
    ServerUnavailableError,
)
from clip_rt.requests.batches import MAX_ROWS
from clip_rt.specs import TEXT_BUCKETS
from clip_rt.wire.transport import Future, ServedModel

if TYPE_CHECKING:
    from clip_rt.requests.connection import Connection
    from clip_rt.requests.endpoint import Endpoint, Place

MAX_IN_FLIGHT = 4
"""Requests under way at a server for one tower: enough to keep it busy, few enough to fill."""
RETURN_TIMEOUT_S = 1.0
"""How long after its deadline a request may keep its place."""
MAX_LOOKED_AT = 256
"""Waiting batches that are considered for a request."""


class Job:
    """One caller's batch on its way."""

    def __init__(
        self,
        array: NDArray[Any],
        deadline: Deadline,
        *,
        is_retry: bool = False,
        is_alone: bool = False,
        avoid: Endpoint | None = None,
    ) -> None:
        self.array = array
        self.deadline = deadline
        self.is_retry = is_retry
        self.is_alone = is_alone
        """Not to be joined with others, so that a refusal is its own."""
        self.avoid = avoid
        """Where it should not go if there is another."""
        self.request: Request | None = None
        """What it travels in, while it does."""
        self.endpoint: Endpoint | None = None
        """Where it was sent."""
        self.may_retry = True
        """Whether the budget has room for another try, where it failed."""
        self.was_joined = False
        """Whether it was sent together with others."""
        self.sent_rows = len(array)
        """Rows of the request it was sent in."""
        self.is_other_version = False
        """Whether the answer is of another version of the model than the server said it has."""
        self.is_unsure = False
        """Whether the connection changed meanwhile, so that another server may have answered."""
        self.queued_at_s = time.monotonic()
        self.sent_at_s = self.done_at_s = self.queued_at_s
        self.bad: dict[int, NonFiniteEmbeddingError] = {}
        """Rows of the answer that are no direction."""
        self._answer: concurrent.futures.Future[NDArray[np.float32]] = concurrent.futures.Future()

    @property
    def is_over(self) -> bool:
        """Whether it was answered, failed, or nobody waits for it any more."""
        return self._answer.done()

    def wait(self, timeout_s: float) -> NDArray[np.float32]:
        """Return the embeddings, float32 (N, D).

        Raises:
            ServerError: it failed.
            TimeoutError: it is still under way.
        """
        with self.deadline.waking(self.abandon):
            try:
                return self._answer.result(max(timeout_s, 0.0))
            except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
                raise TimeoutError from None

    def abandon(self) -> None:
        """Note that nobody waits for it any more."""
        if self._answer.cancel() and (request := self.request) is not None:
            request.give_up_if_unwanted()

    def succeed(self, embeddings: NDArray[np.float32]) -> None:
        """Hand over its rows of an answer."""
        self.done_at_s = time.monotonic()
        if self._answer.set_running_or_notify_cancel():
            self._answer.set_result(embeddings)

    def fail(self, error: ClipRTError) -> None:
        """Hand over what went wrong, unless it is over."""
        self.done_at_s = time.monotonic()
        if not self._answer.done() and self._answer.set_running_or_notify_cancel():
            self._answer.set_exception(error)


class Request:
    """Some jobs that travel together, and where they go."""

    def __init__(self, jobs: list[Job], endpoint: Endpoint, place: Place) -> None:
        self.jobs = jobs
        self.endpoint = endpoint
        self.place = place
        self.generation = endpoint.generation
        self.future: Future = None
        last = max((job.deadline for job in jobs), key=lambda deadline: deadline.at_s)
        # One of its own, which no caller can call off for the others.
        self.deadline = Deadline(last.timeout_s, last.at_s)
        for job in jobs:
            job.request, job.endpoint, job.was_joined = self, endpoint, len(jobs) > 1
            job.sent_rows = self.num_rows

    @property
    def num_rows(self) -> int:
        """Rows of all jobs."""
        return sum(len(job.array) for job in self.jobs)

    def stack(self) -> NDArray[Any]:
        """Return the rows of all jobs as one array; texts are padded to the longest."""
        arrays = [job.array for job in self.jobs]
        if len(arrays) == 1:
            return arrays[0]
        width = max(array.shape[1] for array in arrays)
        if arrays[0].ndim == 2:
            arrays = [np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays]
        return np.concatenate(arrays)

    def give_up_if_unwanted(self) -> None:
        """Call it off when no caller waits for any of it."""
        future = self.future
        if future is not None and all(job.is_over for job in self.jobs):
            self.endpoint.transport.give_up(future)


class Lane:
    """The way to one tower of one model, wherever it is served. Thread-safe.

    Args:
        tower: What is asked.
        connection: Knows the servers that have it.
    """

    def __init__(self, tower: ServedModel, connection: Connection) -> None:
        self.tower = tower
        self.connection = connection
        self.max_rows = min(tower.max_batch_size, MAX_ROWS)
        """Rows of one request at most; fewer once a message was found to be too long."""
        self._waiting: deque[Job] = deque()
        self._lock = threading.Lock()

    def submit(self, job: Job) -> Job:
        """Send a job as soon as there is room, and return at once."""
        with self._lock:
            self._waiting.append(job)
        self._pump()
        return job

    def shrink(self, num_rows: int) -> None:
        """Send no more rows than that in one request from now on."""
        self.max_rows = max(1, min(self.max_rows, num_rows))

    def restart_after_fork(self) -> None:
        """Begin anew in a forked child, where nothing comes back of what the parent sent."""
        self._waiting.clear()
        self._lock = threading.Lock()

    def _pump(self) -> None:
        """Send requests while there is room."""
        active: set[Lane] = _pumping.__dict__.setdefault("lanes", set())
        if self in active:
            return  # A request failed at once; the loop that sent it goes on.
        active.add(self)
        request: Request | None = None
        try:
            while (request := self._take()) is not None:
                self._send(request)
        except BaseException:  # Ctrl-C in this caller; the others of the request try again.
            if request is not None and request.jobs[0].request is request:
                self._end(request, ServerUnavailableError("the sending thread was interrupted."))
            raise
        finally:
            active.discard(self)

    def _take(self) -> Request | None:
        """Choose the next request; None when there is no room or nothing to send."""
        with self._lock:
            while self._waiting:
                first = self._waiting.popleft()
                if first.is_over:
                    continue
                if first.deadline.remaining_s() <= 0:
                    first.fail(self.connection.time_out(first.deadline))
                    continue
                try:
                    taken = self.connection.acquire(
                        self.tower.name,
                        MAX_IN_FLIGHT,
                        first.deadline.at_s + RETURN_TIMEOUT_S,
                        avoid=first.avoid,
                    )
                except ServerUnavailableError as error:
                    first.fail(error)
                    continue
                if taken is None:
                    self._waiting.appendleft(first)
                    return None
                if not first.is_retry:
                    self.connection.budget.earn()
                return Request([first, *self._find_company(first)], *taken)
        return None

    def _find_company(self, first: Job) -> list[Job]:
        """Remove waiting jobs that fit into one request with `first`."""
        room = self.max_rows - len(first.array)
        company: list[Job] = []
        if first.is_alone or room < 1 or not self._waiting:
            return company
        kind = _kind(first.array)
        passed = []
        for job in itertools.islice(self._waiting, MAX_LOOKED_AT):
            fits = not job.is_alone and job.avoid is None and len(job.array) <= room
            if fits and not job.is_over and _kind(job.array) == kind:
                company.append(job)
                room -= len(job.array)
                if room == 0:
                    break
            else:
                passed.append(job)
        num_seen = len(passed) + len(company)
        rest = itertools.islice(self._waiting, num_seen, None)
        self._waiting = deque([*passed, *rest])
        return company

    def _send(self, request: Request) -> None:
        now_s = time.monotonic()
        for job in request.jobs:
            job.sent_at_s = now_s
        try:
            transport = request.endpoint.transport
            request.future = transport.send(self.tower, request.stack(), request.deadline)
        except ClipRTError as error:
            self._end(request, error)
        else:
            request.future.add_done_callback(lambda _: self._read(request))
            request.give_up_if_unwanted()  # They may have left while it was being sent.

    def _read(self, request: Request) -> None:
        """Take an answer apart; in a thread of gRPC's."""
        transport = request.endpoint.transport
        try:
            embeddings, bad_rows = transport.read(
                request.future, self.tower, request.num_rows, request.deadline
            )
        except ClipRTError as error:
            self._end(request, error)
            return
        except Exception as error:  # Or everyone would wait for nothing, and the place be lost.
            problem = f"{transport.url} answered what cannot be read: {error!r:.300}"
            self._end(request, ProtocolError(problem, url=transport.url))
            return
        version = request.future.result().model_version
        is_other_version = not request.endpoint.is_version(self.tower.name, version)
        is_same = not is_other_version and request.endpoint.is_known(request.generation)
        # Last: a server is admitted with another model only once that is the connection's.
        start, is_unsure = 0, not (is_same and self.connection.is_current(self))
        for job in request.jobs:
            job.is_unsure, job.is_other_version = is_unsure, is_other_version
            end = start + len(job.array)
            own = embeddings[start:end]
            for row in bad_rows:
                if start <= row < end:
                    job.bad[row - start] = transport.blame_row(self.tower, own, row - start)
            job.succeed(own)
            start = end
        self._end(request, None)

    def _end(self, request: Request, error: ClipRTError | None) -> None:
        """Make room, and tell everyone whom it concerns what went wrong."""
        lanes = self.connection.release(request.endpoint, self.tower.name, request.place, error)
        # Once for the request, however many wait for it: their tries travel together again.
        may_retry = error is None or self.connection.may_retry(error)
        for job in request.jobs:
            job.request = None  # Or they would keep each other, and their rows, alive.
            job.may_retry = may_retry
            if error is not None:
                job.fail(error)
        request.future = None
        for lane in {self, *lanes}:
            lane._pump()


_pumping = threading.local()


def _kind(array: NDArray[Any]) -> object:
    """Return what two arrays must share to travel together."""
    if array.ndim != 2:
        return array.shape[1:]
    return min((bucket for bucket in TEXT_BUCKETS if bucket >= array.shape[1]), default=0)
