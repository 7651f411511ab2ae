"""How long a call may take, and how often it is tried again within that time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from clip_rt.errors import ClipRTError

MAX_TIMEOUT_S = 365 * 24 * 3600.0
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Deadline:
    """The moment a call must have ended by, on the monotonic clock."""

    timeout_s: float
    at_s: float

    @classmethod
    def after(cls, timeout_s: float) -> Deadline:
        """Return the deadline `timeout_s` from now; infinity means none."""
        return cls(timeout_s, time.monotonic() + min(timeout_s, MAX_TIMEOUT_S))

    def remaining_s(self) -> float:
        """Return the time left; 0 or less when it has passed."""
        return self.at_s - time.monotonic()


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often, and how long apart, a passing fault is met with another try."""

    max_retries: int = 5
    first_pause_s: float = 0.1
    max_pause_s: float = 2.0

    def pauses_s(self) -> Iterator[float]:
        """Yield the pause before each retry: doubling, and jittered to keep clients apart."""
        for attempt in range(self.max_retries):
            pause_s = min(self.first_pause_s * 2**attempt, self.max_pause_s)
            yield pause_s * random.uniform(0.5, 1.0)

    def call(self, attempt: Callable[[], Answer], deadline: Deadline) -> Answer:
        """Call `attempt` until it succeeds, fails for good, or the retries or the time are spent.

        Raises:
            ClipRTError: the last failure.
        """
        for pause_s in self.pauses_s():
            try:
                return attempt()
            except ClipRTError as error:
                if not error.retryable or pause_s >= deadline.remaining_s():
                    raise
            time.sleep(pause_s)
        return attempt()
