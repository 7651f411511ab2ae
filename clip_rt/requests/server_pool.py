"""Load balancing over replicas, and failover: which server a request goes to, and what it may cost.

A request goes to the healthy replica with the fewest under way. One that fails is taken out of
rotation; `connection` checks it now and then and puts it back.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Protocol

from clip_rt.deadline import Deadline
from clip_rt.errors import ClipRTError, ServerTimeoutError, ServerUnavailableError
from clip_rt.requests.replica import Replica, Slot
from clip_rt.requests.retries import RetryBudget, RetryPolicy


class Sender(Protocol):
    """What may wait for room at a server."""

    def send_waiting(self) -> None:
        """Send what waits, as far as there is room."""


class ServerPool:
    """The servers that have one model, and the retry budget of all calls to them. Thread-safe."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = tuple(replicas)
        self.retry_policy = RetryPolicy()
        self.retry_budget = RetryBudget()
        self._senders: weakref.WeakSet[Sender] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._turn = 0

    @property
    def urls(self) -> str:
        """All addresses, for messages."""
        return ", ".join(replica.transport.url for replica in self.replicas)

    @property
    def is_verified(self) -> bool:
        """Whether there is somebody to ask, of whom nobody has been silent for long."""
        healthy = [replica for replica in self.replicas if replica.is_healthy]
        return bool(healthy) and all(replica.is_verified for replica in healthy)

    def subscribe(self, sender: Sender) -> None:
        """Have a sender told when there may be room again, for as long as it exists."""
        with self._lock:
            self._senders.add(sender)

    def acquire(
        self, tower: str, max_in_flight: int, free_at_s: float, *, avoid: Replica | None = None
    ) -> tuple[Replica, Slot] | None:
        """Take a slot for a request at the least busy server.

        Args:
            tower: Name of the Triton model.
            max_in_flight: Slots of each server for a tower.
            free_at_s: When the slot is free again in any case.
            avoid: Taken only if there is no other.

        Returns:
            The server and the slot; None if none has room.

        Raises:
            ServerUnavailableError: none is healthy.
        """
        with self._lock:
            healthy = [each for each in self.replicas if each.is_healthy]
            if not healthy:
                raise ServerUnavailableError(f"{self.urls}: nobody answers there now.")
            others = [each for each in healthy if each is not avoid]
            free = [each for each in others or healthy if each.has_room(tower, max_in_flight)]
            if not free:
                return None
            self._turn += 1
            start = self._turn % len(free)
            chosen = min(free[start:] + free[:start], key=lambda each: each.num_in_flight)
            slot = Slot(free_at_s)
            chosen.slots_by_tower[tower].add(slot)
            return chosen, slot

    def release(
        self, replica: Replica, tower: str, slot: Slot, error: ClipRTError | None
    ) -> tuple[Sender, ...]:
        """Give a slot back, and note how the request ended.

        Returns:
            Who may have waited for it.
        """
        with self._lock:
            replica.slots_by_tower[tower].discard(slot)
            if error is None:
                replica.note_answer()
            elif isinstance(error, ServerUnavailableError):
                replica.mark_unhealthy()
            # That one caller was in a hurry says little about a server.
            elif not error.retryable and not isinstance(error, ServerTimeoutError):
                replica.require_check()
            return tuple(self._senders)

    def report_silence(self, replica: Replica, since_s: float) -> None:
        """Note that a server has said nothing since a moment: others are asked, if there are any.

        One that answers others is well.
        """
        with self._lock:
            if not replica.is_silent(since_s):
                return
            if self.has_other(replica):
                replica.mark_unhealthy()
            else:
                replica.require_check()

    def mark_healthy(
        self, replica: Replica, generation: int, version_by_tower: Mapping[str, str]
    ) -> None:
        """Put a server into rotation; see `Replica.mark_healthy`."""
        with self._lock:
            replica.mark_healthy(generation, version_by_tower)

    def mark_unhealthy(self, replica: Replica) -> None:
        """Take a server out of rotation."""
        with self._lock:
            replica.mark_unhealthy()

    def has_other(self, replica: Replica | None = None) -> bool:
        """Whether somebody else than `replica` may be asked now."""
        return any(each.is_healthy for each in self.replicas if each is not replica)

    def is_worth_waiting(self, error: ClipRTError) -> bool:
        """Whether to wait until the deadline: nothing got through, to a server that was there."""
        return (
            isinstance(error, ServerUnavailableError)
            and not error.was_reached
            and any(replica.was_reached for replica in self.replicas)
        )

    def may_retry(self, error: ClipRTError) -> bool:
        """Whether the budget has room for a retry of a request that failed so."""
        is_more_work = not isinstance(error, ServerUnavailableError) or error.was_reached
        return error.retryable and (not is_more_work or self.retry_budget.spend())

    def time_out(self, deadline: Deadline) -> ServerTimeoutError:
        """Return the error of a request that was not even sent in time."""
        return ServerTimeoutError(
            f"{self.urls} had no room within {deadline.timeout_s:g} s. Allow more with timeout_s=, "
            "or send less at a time.",
            timeout_s=deadline.timeout_s,
        )

    def restart_after_fork(self) -> None:
        """Begin anew in a forked child: locks may be held, and nothing under way comes back."""
        self._lock = threading.Lock()
        self.retry_budget = RetryBudget()
        for replica in self.replicas:
            replica.restart_after_fork()
