"""Retries with exponential backoff and jitter, within a deadline and a retry budget.

A retry is more work for servers that may be in trouble already, so of all requests only a share may
be retried.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from clip_rt.deadline import Deadline
from clip_rt.errors import ClipRTError

MIN_TRY_S = 0.05
"""Left to a call, too little for another try after a pause: it would run out of time, which says
less than the failure before it."""

Result = TypeVar("Result")


@dataclass(kw_only=True)
class RetryBudget:
    """How much may be tried again: a share of what is sent, and a few beyond. Thread-safe."""

    share: float = 0.1
    """Tries earned with each request."""
    per_s: float = 0.5
    """Tries earned with each second."""
    reserve: float = 10.0
    """Tries that can be saved up; as many there are at the start."""

    def __post_init__(self) -> None:
        self._left = self.reserve
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
