"""One call's batches in, their embeddings out in order, whatever happens on the way.

What passes by itself is tried again within the deadline, elsewhere where there is another server.
A batch that is refused is halved down to the rows it is refused for, so that the others pass.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_rt import telemetry
from clip_rt.deadline import Deadline
from clip_rt.errors import (
    ClipRTError,
    InferenceError,
    MessageTooLongError,
    NonFiniteEmbeddingError,
    ServerError,
    ServerTimeoutError,
    ServerUnavailableError,
)
from clip_rt.requests.connection import Model
from clip_rt.requests.endpoint import RECHECK_AFTER_S
from clip_rt.requests.lane import MAX_IN_FLIGHT, Job, Lane
from clip_rt.wire.transport import GRACE_S

PATIENCE = 0.5
"""Share of a request's time that a silent server gets before another is asked."""
MAX_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What came back for one batch."""

    embeddings: NDArray[np.float32]
    """float32 (N, D), a row for each of the batch; those in `refused` mean nothing."""
    refused: dict[int, ServerError] = field(default_factory=dict)
    """Why a row has no embedding."""


def stream(
    model: Model,
    lane: Lane,
    batches: Iterable[NDArray[Any] | None],
    start_clock: Callable[[], Deadline],
) -> Generator[Answer, None, None]:
    """Embed batches one after another, with few of them under way.

    Args:
        model: What the call began with.
        lane: Of the tower that reads the batches.
        batches: Arrays of at most `lane.max_rows` rows; taken as needed. None stands for a batch of
            no rows, so that its turn comes without a request.
        start_clock: Called for when a batch must be back, as it is sent, and again where the caller
            comes for it only later.

    Yields:
        An answer for each batch, in order.

    Raises:
        ServerError: see `errors`; what is under way is given up.
        ContractError: the server came back with another model.
    """
    jobs: deque[Job | None] = deque()
    try:
        for batch in batches:
            jobs.append(None if batch is None else _submit(model, lane, batch, start_clock()))
            # More than may be under way, so that the next one waits where it can join others.
            if len(jobs) > MAX_IN_FLIGHT * len(lane.connection.endpoints):
                answer = _land(model, lane, jobs[0], start_clock)
                jobs.popleft()
                yield answer
        while jobs:
            answer = _land(model, lane, jobs[0], start_clock)
            jobs.popleft()
            yield answer
    finally:
        for job in jobs:
            if job is not None:
                job.abandon()


def _submit(model: Model, lane: Lane, batch: NDArray[Any], deadline: Deadline) -> Job:
    if deadline.remaining_s() <= 0:
        raise lane.connection.time_out(deadline)
    # In a lull of the caller's the server may have been replaced without anything failing.
    lane.connection.insist(model, deadline)
    return lane.submit(Job(batch, deadline))


def _land(model: Model, lane: Lane, job: Job | None, start_clock: Callable[[], Deadline]) -> Answer:
    """Wait for a batch, and do what it takes to get it back whole."""
    if job is None:
        return Answer(np.empty((0, lane.tower.embedding_dim), np.float32))
    if job.deadline.remaining_s() <= 0:
        job.deadline = start_clock()
    try:
        job, embeddings = _insist(model, lane, job)
    except InferenceError as error:
        if not error.may_be_one_item:
            raise
        if isinstance(error, MessageTooLongError):
            lane.shrink(job.sent_rows // 2)
        return _halve(model, lane, job, error)
    if job.bad and lane.connection.has_other(job.endpoint):
        # A replica may be broken where the others are not.
        elsewhere = Job(job.array, job.deadline, is_retry=True, avoid=job.endpoint)
        job, embeddings = _insist(model, lane, lane.submit(elsewhere))
    return Answer(embeddings, dict(job.bad))


def _insist(model: Model, lane: Lane, job: Job) -> tuple[Job, NDArray[np.float32]]:
    """Wait for a job, and send it again as often as the policy allows."""
    connection, deadline = lane.connection, job.deadline
    last: ServerError | None = None

    def attempt() -> tuple[Job, NDArray[np.float32]]:
        nonlocal job, last
        try:
            if last is not None:
                telemetry.count("retries")
                connection.confirm(model, deadline)
                job = lane.submit(Job(job.array, deadline, is_retry=True, is_alone=job.is_alone))
            embeddings = _wait(lane, job)
        except ServerError as error:
            last = error
            raise
        if job.is_other_version:
            # Perhaps of other weights: no answer is better than that.
            connection.confirm(model, deadline)
        elif job.is_unsure:
            # Of a server that has just ended, or of one that took its place. If it is there, ask.
            with contextlib.suppress(ServerUnavailableError, ServerTimeoutError):
                connection.confirm(model, deadline)
        return job, embeddings

    def is_other_ready(error: ClipRTError) -> bool:
        return isinstance(error, ServerUnavailableError) and connection.has_other()

    return connection.policy.call(
        attempt,
        deadline,
        may_retry=lambda error: error.retryable and job.may_retry,
        is_worth_waiting=connection.is_worth_waiting,
        is_other_ready=is_other_ready,
    )


def _wait(lane: Lane, job: Job) -> NDArray[np.float32]:
    """Wait for a job until its deadline, or until another server should be asked instead."""
    connection, deadline = lane.connection, job.deadline
    try:
        while True:
            left_s = deadline.remaining_s() + GRACE_S
            try:
                return job.wait(min(left_s, _patience_s(lane, job)))
            except TimeoutError:
                if job.is_over or left_s <= GRACE_S:
                    break
                _give_way(lane, job)
    except BaseException:
        job.abandon()
        raise
    finally:
        telemetry.add("queue", job.sent_at_s - job.queued_at_s)
        telemetry.add("network", max(job.done_at_s - job.sent_at_s, 0.0))
    job.abandon()
    if job.endpoint is None or deadline.is_called_off:
        raise connection.time_out(deadline)
    connection.suspect(job.endpoint, job.sent_at_s)
    raise job.endpoint.transport.time_out(deadline)


def _patience_s(lane: Lane, job: Job) -> float:
    """Return how long to wait before looking whether another server should be asked."""
    if len(lane.connection.endpoints) == 1:
        return float("inf")
    now_s = time.monotonic()
    begun_at_s = now_s if job.endpoint is None else job.sent_at_s
    patience_s = min(PATIENCE * (job.deadline.at_s - begun_at_s), MAX_PATIENCE_S)
    # Where that is over and the server answers others, look again now and then.
    return max(begun_at_s + patience_s - now_s, RECHECK_AFTER_S)


def _give_way(lane: Lane, job: Job) -> None:
    """Give up a server that answers nobody, if another can be asked in the time that is left."""
    connection, endpoint = lane.connection, job.endpoint
    if endpoint is None or not endpoint.is_silent(job.sent_at_s):
        return
    if not connection.has_other(endpoint) or not connection.budget.spend():
        return
    connection.suspect(endpoint, job.sent_at_s)
    telemetry.count("failovers")
    job.abandon()
    url, silent_s = endpoint.transport.url, time.monotonic() - job.sent_at_s
    raise ServerUnavailableError(
        f"{url} said nothing for {silent_s:.3g} s.", url=url, was_reached=True
    )


def _halve(model: Model, lane: Lane, job: Job, error: InferenceError) -> Answer:
    """Send the halves of a refused job, and theirs, down to single rows."""
    if job.was_joined:
        try:
            alone, embeddings = _insist(
                model, lane, lane.submit(Job(job.array, job.deadline, is_alone=True))
            )
            return Answer(embeddings, dict(alone.bad))
        except InferenceError as own:
            error = own
    num_rows = len(job.array)
    dim = lane.tower.embedding_dim
    if num_rows == 1:
        return Answer(np.zeros((1, dim), np.float32), {0: error})
    refused: dict[int, ServerError] = {}
    parts = []
    for start, end in ((0, num_rows // 2), (num_rows // 2, num_rows)):
        half = lane.submit(Job(job.array[start:end], job.deadline, is_alone=True))
        try:
            whole, embeddings = _insist(model, lane, half)
            answer = Answer(embeddings, dict(whole.bad))
        except InferenceError as own:
            answer = _halve(model, lane, half, own)
        parts.append(answer.embeddings)
        refused |= {start + row: why for row, why in answer.refused.items()}
    return Answer(np.concatenate(parts), refused)


def blame_item(error: ServerError, index: int) -> ServerError:
    """Return the error of a row as that of the caller's item."""
    if isinstance(error, NonFiniteEmbeddingError):
        message = str(error).replace(f"for item {error.index}.", f"for item {index}.")
        return NonFiniteEmbeddingError(message, url=error.url, index=index)
    return InferenceError(f"item {index} was refused: {error}", url=error.url, index=index)
