"""Dynamic batching on the client: batches of many callers in, few full requests out.

While few requests are under way a batch is sent at once, alone. Beyond that batches wait until one
of those comes back, and whatever has gathered by then goes out together: concurrent callers of
single items fill requests without anyone waiting for company. Each caller gets its own rows back.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clip_rt import telemetry
from clip_rt.deadline import Deadline
from clip_rt.errors import (
    ClipRTError,
    NonFiniteEmbeddingError,
    ProtocolError,
    ServerUnavailableError,
)
from clip_rt.requests.batches import MAX_ROWS
from clip_rt.requests.replica import Replica, Slot
from clip_rt.requests.server_pool import ServerPool
from clip_rt.specs import TEXT_BUCKETS
from clip_rt.wire.messages import ServedModel, make_inference_request, make_row_error
from clip_rt.wire.transport import Future

if TYPE_CHECKING:
    from opentelemetry.trace import Span

MAX_IN_FLIGHT = 4
"""Requests under way at a server for one tower: enough to keep it busy, few enough to fill."""
RETURN_TIMEOUT_S = 1.0
"""How long after its deadline a request may keep its slot."""
MAX_LOOKED_AT = 256
"""Waiting batches that are considered for a request."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """What came of a batch."""

    at_s: float
    """When it was known, on the monotonic clock."""
    embeddings: NDArray[np.float32] | None = None
    """float32 (N, D); None if it failed."""
    refused: Mapping[int, NonFiniteEmbeddingError] = field(default_factory=dict)
    """Rows of the answer that are no direction."""
    error: ClipRTError | None = None
    may_retry: bool = True
    """Whether the retry budget had room for another try, where it failed."""
    is_other_version: bool = False
    """Whether the answer is of another version of the model than the server said it has."""
    is_unsure: bool = False
    """Whether the connection changed meanwhile, so that another server may have answered."""

    def read(self) -> NDArray[np.float32]:
        """Return the embeddings.

        Raises:
            ClipRTError: it failed.
        """
        if self.error is not None:
            raise self.error
        assert self.embeddings is not None
        return self.embeddings


@dataclass(eq=False, repr=False)
class PendingBatch:
    """One caller's batch on its way."""

    array: NDArray[Any]
    deadline: Deadline
    """When its caller stops waiting."""
    _: KW_ONLY
    is_retry: bool = False
    """Whether it was sent before."""
    is_alone: bool = False
    """Not to be joined with others, so that a refusal is its own."""
    avoid: Replica | None = None
    """Where it should not go if there is another."""
    request: Request | None = None
    """What it was sent in; None while it waits."""
    queued_at_s: float = field(default_factory=time.monotonic)
    span: Span | None = field(default_factory=telemetry.current_span)
    """Of its caller, which the server goes on with."""
    _outcome: concurrent.futures.Future[Outcome] = field(default_factory=concurrent.futures.Future)

    @property
    def is_over(self) -> bool:
        """Whether it was answered, failed, or nobody waits for it any more."""
        return self._outcome.done()

    def wait(self, timeout_s: float) -> Outcome:
        """Return what came of it.

        Raises:
            TimeoutError: it is still under way.
        """
        with self.deadline.waking(self.abandon):
            try:
                return self._outcome.result(max(timeout_s, 0.0))
            except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError):
                raise TimeoutError from None

    def abandon(self) -> None:
        """Note that nobody waits for it any more."""
        if self._outcome.cancel() and (request := self.request) is not None:
            request.give_up_if_unwanted()

    def end(self, outcome: Outcome) -> None:
        """Hand over what came of it, unless it is over."""
        if not self._outcome.done() and self._outcome.set_running_or_notify_cancel():
            self._outcome.set_result(outcome)


class Request:
    """Some batches that travel together, and where they go."""

    def __init__(self, batches: list[PendingBatch], replica: Replica, slot: Slot) -> None:
        self.batches = batches
        """Empty once it has ended, so that none keeps the rows of other callers alive."""
        self.replica = replica
        self.slot = slot
        self.generation = replica.generation
        self.at_s = time.monotonic()
        self.num_rows = sum(len(each.array) for each in batches)
        self.is_joined = len(batches) > 1
        self.future: Future = None
        """What its answer will come in, once it is sent."""
        last = max((each.deadline for each in batches), key=lambda deadline: deadline.at_s)
        # One of its own, which no caller can call off for the others.
        self.deadline = Deadline(last.timeout_s, last.at_s)
        for each in batches:
            each.request = self

    def stack(self, *, pad_id: int) -> NDArray[Any]:
        """Return the rows of all batches as one array; texts are padded to the longest."""
        arrays = [each.array for each in self.batches]
        if len(arrays) == 1:
            return arrays[0]
        width = max(array.shape[1] for array in arrays)
        if arrays[0].ndim == 2:
            arrays = [
                np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=pad_id)
                for array in arrays
            ]
        return np.concatenate(arrays)

    def trace_headers(self) -> tuple[tuple[str, str], ...]:
        """Return the headers by which the server goes on with the trace of its callers."""
        return telemetry.trace_headers(each.span for each in self.batches)

    def give_up_if_unwanted(self) -> None:
        """Call it off when no caller waits for any of it."""
        # Both at once, because it may end on another thread meanwhile.
        future, batches = self.future, self.batches
        if future is not None and all(each.is_over for each in batches):
            self.replica.transport.give_up(future)

    def end(self, error: ClipRTError | None, *, may_retry: bool) -> None:
        """Part its batches; those that have no outcome yet fail."""
        for each in self.batches if error is not None else ():
            each.end(Outcome(at_s=time.monotonic(), error=error, may_retry=may_retry))
        self.future, self.batches = None, []


class DynamicBatcher:
    """The way to one tower of one model, wherever it is served. Thread-safe."""

    def __init__(self, tower: ServedModel, pool: ServerPool) -> None:
        self.tower = tower
        self.pool = pool
        self.max_rows = min(tower.max_batch_size, MAX_ROWS)
        """Rows of one request at most; fewer once a message was found to be too long."""
        self._is_retired = False
        self._waiting: deque[PendingBatch] = deque()
        self._lock = threading.Lock()
        pool.subscribe(self)

    def submit(self, batch: PendingBatch) -> PendingBatch:
        """Send a batch as soon as there is room, and return at once."""
        with self._lock:
            self._waiting.append(batch)
        self.send_waiting()
        return batch

    def shrink(self, num_rows: int) -> None:
        """Send no more rows than that in one request from now on."""
        self.max_rows = max(1, min(self.max_rows, num_rows))

    def retire(self) -> None:
        """Note that the servers have another model now: answers may be of that one."""
        self._is_retired = True

    def restart_after_fork(self) -> None:
        """Begin anew in a forked child, where nothing comes back of what the parent sent."""
        self._waiting.clear()
        self._lock = threading.Lock()

    def send_waiting(self) -> None:
        """Send requests while there is room."""
        active: set[DynamicBatcher] = _sending.__dict__.setdefault("batchers", set())
        if self in active:
            return  # A request failed at once; the loop that sent it goes on.
        active.add(self)
        request: Request | None = None
        pad_id = self.tower.manifest.tokenization.pad_id
        try:
            while (request := self._take()) is not None:
                transport = request.replica.transport
                try:
                    message = make_inference_request(
                        self.tower, request.stack(pad_id=pad_id), request.deadline
                    )
                    future = transport.send(
                        "ModelInfer", message, request.deadline, headers=request.trace_headers()
                    )
                except ClipRTError as error:
                    self._end(request, error)
                else:
                    request.future = future
                    future.add_done_callback(partial(self.read, request))
                    request.give_up_if_unwanted()  # They may have left while it was being sent.
        except BaseException:  # Ctrl-C in this caller; the others of the request try again.
            if request is not None and request.batches:
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
                    _fail(first, self.pool.time_out(first.deadline))
                    continue
                try:
                    taken = self.pool.acquire(
                        self.tower.name,
                        MAX_IN_FLIGHT,
                        first.deadline.at_s + RETURN_TIMEOUT_S,
                        avoid=first.avoid,
                    )
                except ServerUnavailableError as error:
                    _fail(first, error)
                    continue
                if taken is None:
                    self._waiting.appendleft(first)
                    return None
                if not first.is_retry:
                    self.pool.retry_budget.earn()
                return Request([first, *self._take_joinable(first)], *taken)
        return None

    def _take_joinable(self, first: PendingBatch) -> list[PendingBatch]:
        """Remove waiting batches that fit into one request with `first`."""
        room = self.max_rows - len(first.array)
        joined: list[PendingBatch] = []
        if first.is_alone or room < 1 or not self._waiting:
            return joined
        kind = _kind(first.array)
        passed = []
        for each in itertools.islice(self._waiting, MAX_LOOKED_AT):
            fits = not each.is_alone and each.avoid is None and len(each.array) <= room
            if fits and not each.is_over and _kind(each.array) == kind:
                joined.append(each)
                room -= len(each.array)
                if room == 0:
                    break
            else:
                passed.append(each)
        num_seen = len(passed) + len(joined)
        rest = itertools.islice(self._waiting, num_seen, None)
        self._waiting = deque([*passed, *rest])
        return joined

    def read(self, request: Request, future: Future) -> None:
        """Take an answer apart; in a thread of gRPC's."""
        transport = request.replica.transport
        try:
            embeddings, bad_rows = transport.read(
                future, self.tower, request.num_rows, request.deadline
            )
        except ClipRTError as error:
            self._end(request, error)
            return
        except Exception as error:  # Or everyone would wait for nothing, and the slot be lost.
            problem = f"{transport.url} answered what cannot be read: {error!r:.300}"
            self._end(request, ProtocolError(problem, url=transport.url))
            return
        version = future.result().model_version
        is_other_version = not request.replica.is_version(
            self.tower.name, version, self.tower.version
        )
        is_same = not is_other_version and request.replica.is_known(request.generation)
        # Last: a server is put into rotation with another model only once this one is retired.
        is_unsure = not is_same or self._is_retired
        start = 0
        for each in request.batches:
            end = start + len(each.array)
            own = embeddings[start:end]
            refused = {
                row - start: make_row_error(self.tower, embeddings[row], transport.url, row - start)
                for row in bad_rows
                if start <= row < end
            }
            each.end(
                Outcome(
                    at_s=time.monotonic(),
                    embeddings=own,
                    refused=refused,
                    is_other_version=is_other_version,
                    is_unsure=is_unsure,
                )
            )
            start = end
        self._end(request, None)

    def _end(self, request: Request, error: ClipRTError | None) -> None:
        """Make room, and tell everyone whom it concerns what went wrong."""
        senders = self.pool.release(request.replica, self.tower.name, request.slot, error)
        # Once for the request, however many wait for it: their retries travel together again.
        may_retry = error is None or self.pool.may_retry(error)
        request.end(error, may_retry=may_retry)
        for sender in {self, *senders}:
            sender.send_waiting()


_sending = threading.local()


def _fail(batch: PendingBatch, error: ClipRTError) -> None:
    batch.end(Outcome(at_s=time.monotonic(), error=error))


def _kind(array: NDArray[Any]) -> object:
    """Return what two arrays must share to travel together."""
    if array.ndim != 2:
        return array.shape[1:]
    return min((bucket for bucket in TEXT_BUCKETS if bucket >= array.shape[1]), default=0)
