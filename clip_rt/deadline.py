"""How long a call may take, and how it is cancelled before that."""

from __future__ import annotations

import contextlib
import numbers
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from clip_rt.errors import InputError

MAX_TIMEOUT_S = 365 * 24 * 3600.0
START_TIMEOUT_S = 60.0
"""Longest wait for the embedded server to load its models."""


class Cancellation:
    """A way to call off what one thread waits for from another. Thread-safe."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self.began_at_s: float | None = time.monotonic()
        """When the first deadline under it began, until that is made."""
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


_cancellation: ContextVar[Cancellation | None] = ContextVar("clip_rt.cancellation", default=None)


@contextlib.contextmanager
def cancellable(cancellation: Cancellation) -> Iterator[None]:
    """Put the deadlines made in a `with` block under a cancellation."""
    token = _cancellation.set(cancellation)
    try:
        yield
    finally:
        _cancellation.reset(token)


@dataclass(frozen=True)
class Deadline:
    """The moment a call must have ended by, on the monotonic clock."""

    timeout_s: float
    at_s: float
    cancellation: Cancellation | None = field(default=None, compare=False)

    @classmethod
    def after(cls, timeout_s: float) -> Deadline:
        """Return the deadline `timeout_s` from now; infinity means none."""
        cancellation, began_at_s = _cancellation.get(), time.monotonic()
        if cancellation is not None and cancellation.began_at_s is not None:
            began_at_s, cancellation.began_at_s = cancellation.began_at_s, None
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


def check_timeout(timeout_s: float, name: str = "timeout_s") -> None:
    """Make sure that a time-out is a number above 0.

    Raises:
        InputError: it is not.
    """
    if not (isinstance(timeout_s, numbers.Real) and timeout_s > 0):
        raise InputError(f"{name} is {timeout_s!r:.80}; it must be a number above 0.")
