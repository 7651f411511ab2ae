"""How long a call may take, how often it is tried again within that time, and how it is called off.

Trying again is work for servers that may be in trouble already, so it has a budget.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from clip_rt.errors import ClipRTError

MAX_TIMEOUT_S = 365 * 24 * 3600.0
START_TIMEOUT_S = 60.0
"""Longest wait for the embedded server to load its models."""
MIN_TRY_S = 0.05
"""Left to a call, too little for another try after a pause: it would run out of time, which says
less than the failure before it."""
Result = TypeVar("Result")


class Cancellation:
    """A way to call off what one thread waits for from another. Thread-safe."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self._wakes: set[Callable[[], object]] = set()
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """End the deadlines made under it, and wake whoever waits for one; for good."""
        with self._lock:
            self.is_cancelled = True
            wakes = list(self._wakes)
        for wake in wakes:
            wake()

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], object]) -> Iterator[None]:
        """Have `wake` called when it is cancelled, at once if it was."""
        with self._lock:
            self._wakes.add(wake)
        try:
            if self.is_cancelled:
                wake()
            yield
        finally:
            with self._lock:
                self._wakes.discard(wake)


@dataclass
class _Scope:
    """A call that another thread made, and began to count the time of."""

    cancellation: Cancellation
    began_at_s: float | None


_scope: ContextVar[_Scope | None] = ContextVar("clip_rt.scope", default=None)


@contextlib.contextmanager
def cancellable(cancellation: Cancellation, began_at_s: float) -> Iterator[None]:
    """Put the deadlines made in a `with` block under a cancellation.

    The first of them counts from `began_at_s`, on the monotonic clock.
    """
    token = _scope.set(_Scope(cancellation, began_at_s))
    try:
        yield
    finally:
        _scope.reset(token)


@dataclass(frozen=True)
class Deadline:
    """The moment a call must have ended by, on the monotonic clock."""

    timeout_s: float
    at_s: float
    cancellation: Cancellation | None = field(default=None, compare=False)

    @classmethod
    def after(cls, timeout_s: float) -> Deadline:
        """Return the deadline `timeout_s` from now; infinity means none."""
        scope, began_at_s = _scope.get(), None
        if scope is not None:
            began_at_s, scope.began_at_s = scope.began_at_s, None
        if began_at_s is None:
            began_at_s = time.monotonic()
        cancellation = None if scope is None else scope.cancellation
        return cls(timeout_s, began_at_s + min(timeout_s, MAX_TIMEOUT_S), cancellation)

    @property
    def is_called_off(self) -> bool:
        """Whether nobody waits for the call any more, however much time it had."""
        return self.cancellation is not None and self.cancellation.is_cancelled

    def remaining_s(self) -> float:
        """Return the time left; 0 or less when it has passed or was called off."""
        if self.is_called_off:
            return 0.0
        return self.at_s - time.monotonic()

    def waking(self, wake: Callable[[], object]) -> contextlib.AbstractContextManager[None]:
        """Have `wake` called should the call be called off in the `with` block."""
        if self.cancellation is None:
            return contextlib.nullcontext()
        return self.cancellation.waking(wake)


class RetryBudget:
    """How much may be tried again: a share of what is sent, and a few beyond. Thread-safe.

    Args:
        share: Tries earned with each request.
        per_s: Tries earned with each second.
        reserve: Tries that can be saved up; as many there are at the start.
    """

    def __init__(self, *, share: float = 0.1, per_s: float = 0.5, reserve: float = 10.0) -> None:
        self.share = share
        self.per_s = per_s
        self.reserve = reserve
        self._left = reserve
        self._counted_at_s = time.monotonic()
        self._lock = threading.Lock()

    def earn(self) -> None:
        """Note a request that was sent for the first time."""
        with self._lock:
            self._left = min(self._left + self.share, self.reserve)

    def spend(self) -> bool:
        """Take one retry from the budget; False when it is used up."""
        with self._lock:
            now_s = time.monotonic()
            earned = self.per_s * (now_s - self._counted_at_s)
            self._left, self._counted_at_s = min(self._left + earned, self.reserve), now_s
            if self._left < 1.0:
                return False
            self._left -= 1.0
            return True


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often, and how long apart, a passing fault is met with another try."""

    max_retries: int = 5
    first_pause_s: float = 0.1
    max_pause_s: float = 1.0

    def pause_s(self, num_failures: int) -> float:
        """Return the pause after so many failures: doubling, and jittered to keep clients apart."""
        pause_s = self.first_pause_s * 2.0 ** min(num_failures - 1, 30)
        return min(pause_s, self.max_pause_s) * random.uniform(0.5, 1.0)

    def call(
        self,
        attempt: Callable[[], Result],
        deadline: Deadline,
        *,
        may_retry: Callable[[ClipRTError], bool] = lambda error: error.retryable,
        is_worth_waiting: Callable[[ClipRTError], bool] = lambda _: False,
        is_other_ready: Callable[[ClipRTError], bool] = lambda _: False,
    ) -> Result:
        """Call `attempt` until it succeeds, fails for good, or the retries or the time are spent.

        Args:
            attempt: Raises a `ClipRTError` that knows whether it is `retryable`.
            deadline: When to give up.
            may_retry: Whether an error is met with another try at all.
            is_worth_waiting: Whether an error is retried until the deadline, however often.
            is_other_ready: Whether the next try goes elsewhere, so that it needs no pause.

        Raises:
            ClipRTError: the last failure.
        """
        num_failures = 0
        while True:
            try:
                return attempt()
            except ClipRTError as error:
                num_failures += 1
                is_last = num_failures > self.max_retries and not is_worth_waiting(error)
                if not may_retry(error) or is_last:
                    raise
                pause_s = self.pause_s(num_failures)
                if num_failures <= self.max_retries and is_other_ready(error):
                    pause_s = 0.0
                # Elsewhere, at once, even a short try may do.
                needed_s = MIN_TRY_S if pause_s else 0.0
                if pause_s + needed_s >= deadline.remaining_s():
                    raise
                time.sleep(pause_s)
                # On a busy machine a pause is longer than asked for.
                if deadline.remaining_s() < needed_s:
                    raise
