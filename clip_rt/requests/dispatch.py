"""One call's batches in, their embeddings out in order, whatever happens on the way.

What passes by itself is retried within the deadline, on another server where there is one. A batch
that is refused is halved down to the rows it is refused for, so that the others pass.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
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
from clip_rt.requests.dynamic_batching import MAX_IN_FLIGHT, DynamicBatcher, Outcome, PendingBatch
from clip_rt.requests.replica import HEALTH_CHECK_AFTER_S, Replica
from clip_rt.wire.transport import DEADLINE_GRACE_S

FAILOVER_SHARE = 0.5
"""Of a request's time that a silent server gets before another is asked."""
MAX_FAILOVER_S = 60.0
"""And at most so long."""


@dataclass(frozen=True)
class Answer:
    """What came back for one batch."""

    embeddings: NDArray[np.float32]
    """float32 (N, D), a row for each of the batch; those in `refused` mean nothing."""
    refused: Mapping[int, ServerError] = field(default_factory=dict)
    """Why a row has no embedding."""


def stream(
    model: Model,
    batcher: DynamicBatcher,
    batches: Iterable[NDArray[Any] | None],
    start_clock: Callable[[], Deadline],
) -> Generator[Answer, None, None]:
    """Embed batches one after another, with few of them under way.

    Args:
        model: What the call began with.
        batcher: Of the tower that reads the batches.
        batches: Arrays of at most `batcher.max_rows` rows; taken as needed. None stands for a batch
            of no rows, so that its turn comes without a request.
        start_clock: Called for when a batch must be back, as it is sent, and again where the caller
            comes for it only later.

    Yields:
        An answer for each batch, in order.

    Raises:
        ServerError: see `errors`; what is under way is given up.
        ContractError: the server came back with another model.
    """
    under_way: deque[PendingBatch | None] = deque()
    try:
        for batch in batches:
            if batch is None:
                under_way.append(None)
            else:
                deadline = start_clock()
                if deadline.remaining_s() <= 0:
                    raise batcher.pool.time_out(deadline)
                # In a lull of the caller's the server may have been replaced, and nothing failed.
                model.connection.verify_with_retries(model, deadline)
                under_way.append(batcher.submit(PendingBatch(batch, deadline)))
            # More than may be under way, so that the next one waits where it can join others.
            if len(under_way) > MAX_IN_FLIGHT * len(batcher.pool.replicas):
                answer = _collect(model, batcher, under_way[0], start_clock)
                under_way.popleft()
                yield answer
        while under_way:
            answer = _collect(model, batcher, under_way[0], start_clock)
            under_way.popleft()
            yield answer
    finally:
        for pending in under_way:
            if pending is not None:
                pending.abandon()


def _collect(
    model: Model,
    batcher: DynamicBatcher,
    pending: PendingBatch | None,
    start_clock: Callable[[], Deadline],
) -> Answer:
    """Wait for a batch, and do what it takes to get it back whole."""
    if pending is None:
        return Answer(np.empty((0, batcher.tower.row_size), np.float32))
    deadline = pending.deadline if pending.deadline.remaining_s() > 0 else start_clock()
    try:
        answer, replica = _deliver(model, batcher, pending, deadline)
    except InferenceError as error:
        if not error.may_be_one_item:
            raise
        if isinstance(error, MessageTooLongError) and pending.request is not None:
            batcher.shrink(pending.request.num_rows // 2)
        return _bisect(model, batcher, pending, deadline, error)
    if answer.refused and batcher.pool.has_other(replica):
        # A replica may be broken where the others are not.
        elsewhere = PendingBatch(pending.array, deadline, is_retry=True, avoid=replica)
        answer, _ = _deliver(model, batcher, batcher.submit(elsewhere), deadline)
    return answer


def _deliver(
    model: Model, batcher: DynamicBatcher, pending: PendingBatch, deadline: Deadline
) -> tuple[Answer, Replica | None]:
    """Wait for a batch, and retry it as often as the policy allows.

    Returns:
        The answer, and who gave it.
    """
    pool, verify = batcher.pool, model.connection.verify
    outcome: Outcome | None = None
    has_failed = False

    def attempt() -> tuple[Answer, Replica | None]:
        nonlocal pending, outcome, has_failed
        try:
            if has_failed:
                telemetry.count("retries")
                verify(model, deadline)
                pending = batcher.submit(
                    PendingBatch(pending.array, deadline, is_retry=True, is_alone=pending.is_alone)
                )
            outcome = None
            outcome = _wait(batcher, pending, deadline)
            embeddings = outcome.read()
        except ServerError:
            has_failed = True
            raise
        if outcome.is_other_version:
            # Perhaps of other weights: no answer is better than that.
            verify(model, deadline)
        elif outcome.is_unsure:
            # Of a server that has just ended, or of one that took its place. If it is there, ask.
            with contextlib.suppress(ServerUnavailableError, ServerTimeoutError):
                verify(model, deadline)
        replica = None if pending.request is None else pending.request.replica
        return Answer(embeddings, outcome.refused), replica

    def may_retry(error: ClipRTError) -> bool:
        return error.retryable and (outcome is None or outcome.may_retry)

    def is_other_ready(error: ClipRTError) -> bool:
        return isinstance(error, ServerUnavailableError) and pool.has_other()

    return pool.retry_policy.call(
        attempt,
        deadline,
        may_retry=may_retry,
        is_worth_waiting=pool.is_worth_waiting,
        is_other_ready=is_other_ready,
    )


def _wait(batcher: DynamicBatcher, pending: PendingBatch, deadline: Deadline) -> Outcome:
    """Wait for a batch until the deadline, or until another server should be asked instead."""
    pool, outcome = batcher.pool, None
    try:
        while outcome is None:
            left_s = deadline.remaining_s() + DEADLINE_GRACE_S
            try:
                outcome = pending.wait(min(left_s, _failover_after_s(batcher, pending)))
            except TimeoutError:
                if pending.is_over or left_s <= DEADLINE_GRACE_S:
                    break
                _fail_over(batcher, pending)
    except BaseException:
        pending.abandon()
        raise
    finally:
        _report_times(pending, outcome)
    if outcome is not None:
        return outcome
    pending.abandon()
    request = pending.request
    if request is None or deadline.is_called_off:
        raise pool.time_out(deadline)
    pool.report_silence(request.replica, request.at_s)
    raise request.replica.transport.time_out(deadline)


def _report_times(pending: PendingBatch, outcome: Outcome | None) -> None:
    sent_at_s = pending.queued_at_s if pending.request is None else pending.request.at_s
    ended_at_s = sent_at_s if outcome is None else outcome.at_s
    telemetry.add("queue", sent_at_s - pending.queued_at_s)
    telemetry.add("network", max(ended_at_s - sent_at_s, 0.0))


def _failover_after_s(batcher: DynamicBatcher, pending: PendingBatch) -> float:
    """Return how long to wait before looking whether another server should be asked."""
    if len(batcher.pool.replicas) == 1:
        return float("inf")
    now_s = time.monotonic()
    begun_at_s = now_s if pending.request is None else pending.request.at_s
    share_s = FAILOVER_SHARE * (pending.deadline.at_s - begun_at_s)
    # Where that is over and the server answers others, look again now and then.
    return max(begun_at_s + min(share_s, MAX_FAILOVER_S) - now_s, HEALTH_CHECK_AFTER_S)


def _fail_over(batcher: DynamicBatcher, pending: PendingBatch) -> None:
    """Give up a server that answers nobody, if another can be asked in the time that is left."""
    pool, request = batcher.pool, pending.request
    if request is None or not request.replica.is_silent(request.at_s):
        return
    if not pool.has_other(request.replica) or not pool.retry_budget.spend():
        return
    pool.report_silence(request.replica, request.at_s)
    telemetry.count("failovers")
    pending.abandon()
    url, silent_s = request.replica.transport.url, time.monotonic() - request.at_s
    raise ServerUnavailableError(
        f"{url} said nothing for {silent_s:.3g} s.", url=url, was_reached=True
    )


def _bisect(
    model: Model,
    batcher: DynamicBatcher,
    pending: PendingBatch,
    deadline: Deadline,
    error: InferenceError,
) -> Answer:
    """Send the halves of a refused batch, and theirs, down to single rows."""

    def deliver_alone(array: NDArray[Any]) -> Answer:
        alone = batcher.submit(PendingBatch(array, deadline, is_alone=True))
        try:
            return _deliver(model, batcher, alone, deadline)[0]
        except InferenceError as own:
            return _bisect(model, batcher, alone, deadline, own)

    if pending.request is not None and pending.request.is_joined:
        return deliver_alone(pending.array)
    num_rows = len(pending.array)
    if num_rows == 1:
        return Answer(np.zeros((1, batcher.tower.row_size), np.float32), {0: error})
    refused: dict[int, ServerError] = {}
    parts = []
    for start, end in ((0, num_rows // 2), (num_rows // 2, num_rows)):
        answer = deliver_alone(pending.array[start:end])
        parts.append(answer.embeddings)
        refused |= {start + row: why for row, why in answer.refused.items()}
    return Answer(np.concatenate(parts), refused)


def blame_item(error: ServerError, index: int) -> ServerError:
    """Return the error of a row as that of the caller's item."""
    if isinstance(error, NonFiniteEmbeddingError):
        message = str(error).replace(f"for item {error.index}.", f"for item {index}.")
        return NonFiniteEmbeddingError(message, url=error.url, index=index)
    return InferenceError(f"item {index} was refused: {error}", url=error.url, index=index)
