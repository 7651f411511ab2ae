"""One of the servers a client may ask: is it healthy, and how busy is it."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Protocol

from clip_rt.deadline import Deadline
from clip_rt.errors import ServerTimeoutError
from clip_rt.requests.retries import RetryPolicy
from clip_rt.wire.transport import Transport

HEALTH_CHECK_AFTER_S = 0.5
"""Silent for longer, and the server may have been replaced meanwhile: ask it again what it has."""
_BACKOFF = RetryPolicy(first_pause_s=0.1, max_pause_s=2.0)
"""Between two health checks of a server that is unhealthy."""


class ServerHandle(Protocol):
    """A server that this process can start again, such as the embedded one."""

    @property
    def url(self) -> str:
        """Address while it runs, host:port."""

    @property
    def headers(self) -> Mapping[str, str]:
        """What a request must carry."""

    @property
    def server_id(self) -> str:
        """Another one after each start."""

    @property
    def content_key(self) -> str:
        """Of what it was made."""

    @property
    def is_running(self) -> bool:
        """Whether it is up."""

    @property
    def start_timeout_s(self) -> float:
        """Longest wait for its models."""

    def start(self, *, timeout_s: float | None = None) -> str:
        """Start it unless it runs, and return its url."""

    def stop(self) -> None:
        """Release it."""


class Replica:
    """A server and what is known of it. Its pool guards it with a lock.

    `server` is given where it is ours, to be started again when it dies.
    """

    def __init__(self, transport: Transport, server: ServerHandle | None = None) -> None:
        self.transport = transport
        self.server = server
        self.is_healthy = False
        """Whether it was seen to serve the model that is in use, and has not failed since."""
        self.was_reached = False
        """Whether it ever answered, so that it is worth waiting for."""
        self.is_being_checked = False
        """Whether it is being asked whether it is back."""
        self.generation: int | None = None
        """Of the connection on which it was found healthy."""
        self.slots_by_tower: defaultdict[str, set[Slot]] = defaultdict(set)
        """Requests under way, by the name of the tower."""
        self._server_id = None if server is None else server.server_id
        self._version_by_tower: dict[str, str] = {}
        self._starting: Future[str] | None = None
        self._answered_at_s = float("-inf")
        self._check_at_s = float("-inf")
        self._num_failures = 0
        self._other_fingerprint: str | None = None

    @property
    def is_gone(self) -> bool:
        """Whether it is ours and died, or was started anew."""
        server = self.server
        return server is not None and not (
            server.is_running and server.server_id == self._server_id
        )

    @property
    def is_verified(self) -> bool:
        """Whether it may be asked without asking first what it has.

        Its connection is the one on which it said so; it answered lately, or is busy.
        """
        silent_s = time.monotonic() - self._answered_at_s
        is_busy = self.num_in_flight > 0 and self._answered_at_s > float("-inf")
        is_same = self.is_healthy and self.is_known(self.generation) and not self.is_gone
        return is_same and (is_busy or silent_s <= HEALTH_CHECK_AFTER_S)

    @property
    def is_check_due(self) -> bool:
        """Whether it is time to ask an unhealthy one whether it is back."""
        is_away = not self.is_healthy and not self.is_being_checked
        return is_away and time.monotonic() >= self._check_at_s

    @property
    def num_in_flight(self) -> int:
        """Requests under way to both towers."""
        return sum(map(len, self.slots_by_tower.values()))

    def is_known(self, generation: int | None) -> bool:
        """Whether its connection is still that of a generation."""
        return generation == self.transport.generation

    def is_silent(self, since_s: float) -> bool:
        """Whether it has answered nobody for a while, nor since a moment."""
        return time.monotonic() - max(self._answered_at_s, since_s) > HEALTH_CHECK_AFTER_S

    def is_version(self, tower: str, version: str, otherwise: str = "") -> bool:
        """Whether it may have answered in a version, as it said which it has; else ask it again.

        A server that takes another's place at once is reached without a connection being seen to
        fail, and one may exchange its models in place.

        Args:
            tower: Name of the Triton model.
            version: That answered.
            otherwise: Version that is expected of a model this server was not asked about.
        """
        if self._version_by_tower.get(tower, otherwise) in ("", version):
            return True
        self.generation = None
        return False

    def has_room(self, tower: str, max_in_flight: int) -> bool:
        """Whether another request for a tower may be sent to it."""
        slots = self.slots_by_tower[tower]
        if len(slots) >= max_in_flight:
            now_s = time.monotonic()
            slots -= {slot for slot in slots if slot.free_at_s < now_s}
        return len(slots) < max_in_flight

    def restart(self, deadline: Deadline) -> None:
        """Start it again if it is ours and died, and find it where it is now.

        Raises:
            ServerStartError: it does not start any more.
        """
        if self.server is None:
            return
        if not self.server.is_running:
            self._start(self.server, deadline)
        if self.is_gone:
            # The old way is not closed: requests of other threads may still be failing on it.
            self.transport = connect_to(self.server)
            self._server_id = self.server.server_id

    def _start(self, server: ServerHandle, deadline: Deadline) -> None:
        """Start it, or wait for a start under way; a call in a hurry does not cut that short."""
        starting = self._starting
        if starting is None or starting.done():
            starting = self._starting = Future()
            begin = threading.Thread(target=_start_into, args=(starting, server), daemon=True)
            begin.start()
        try:
            starting.result(max(deadline.remaining_s(), 0.0))
        except FutureTimeoutError:
            if starting.done():
                raise
            raise ServerTimeoutError(
                f"the embedded server died and was not up again within {deadline.timeout_s:g} s. "
                "Allow more with timeout_s=, or call again.",
                timeout_s=deadline.timeout_s,
            ) from None

    def mark_healthy(self, generation: int, version_by_tower: Mapping[str, str]) -> None:
        """Note that it serves the model in use, as it said on a connection, in which versions."""
        self._version_by_tower = dict(version_by_tower)
        self.is_healthy = self.was_reached = True
        self.generation = generation
        self._num_failures = 0
        self.note_answer()

    def mark_unhealthy(self) -> None:
        """Note that it is away, or not what it should be; the next check comes after a backoff."""
        self.is_healthy = False
        self._num_failures += 1
        self._check_at_s = time.monotonic() + _BACKOFF.pause_s(self._num_failures)

    def note_other_model(self, fingerprint: str) -> bool:
        """Note that it serves other weights; return whether they are others than last time."""
        is_news = self._other_fingerprint != fingerprint
        self._other_fingerprint = fingerprint
        return is_news

    def note_answer(self) -> None:
        """Note that it just answered as it should."""
        self._answered_at_s = time.monotonic()

    def require_check(self) -> None:
        """Note that something went wrong: ask it what it has before the next call."""
        self._answered_at_s = float("-inf")

    def restart_after_fork(self) -> None:
        """Forget in a forked child what is under way in the parent."""
        self.slots_by_tower.clear()
        self.is_being_checked = False


@dataclass(frozen=True, eq=False)
class Slot:
    """Room for one request."""

    free_at_s: float
    """When it is free in any case: an interrupted thread may never give it back."""


def connect_to(server: ServerHandle) -> Transport:
    """Return a transport to our own server; it is not told of calls that are given up."""
    return Transport(server.url, headers=server.headers, may_cancel=False)


def _start_into(starting: Future[str], server: ServerHandle) -> None:
    try:
        starting.set_result(server.start(timeout_s=server.start_timeout_s))
    except BaseException as error:
        starting.set_exception(error)
