"""One of the servers a client may ask: whether it may be asked now, and how busy it is."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clip_rt.deadline import Deadline, RetryPolicy
from clip_rt.errors import ServerTimeoutError
from clip_rt.wire.transport import Transport

if TYPE_CHECKING:
    from clip_rt.embedded.server import EmbeddedServer

RECHECK_AFTER_S = 0.5
"""Silent for longer, and the server may have been replaced meanwhile: ask it again what it has."""
_PAUSES = RetryPolicy(first_pause_s=0.1, max_pause_s=2.0)


class Endpoint:
    """A server and what is known of it. Its connection guards it with a lock.

    Args:
        transport: The way to it.
        server: Ours, which is started again when it dies; None if it is somebody else's.
    """

    def __init__(self, transport: Transport, server: EmbeddedServer | None = None) -> None:
        self.transport = transport
        self.server = server
        self.is_admitted = False
        """Whether it was seen to serve the model that is in use."""
        self.was_reached = False
        """Whether it ever answered, so that it is worth waiting for."""
        self.is_being_asked = False
        self.left_out_for: str | None = None
        """Fingerprint of the other weights it was last seen with."""
        self.places: dict[str, set[Place]] = {}
        """Requests under way, by the name of the tower."""
        self._server_id = None if server is None else server.server_id
        self._generation: int | None = None
        self._version_by_tower: dict[str, str] = {}
        self._starting: Future[str] | None = None
        self._answered_at_s = float("-inf")
        self._ask_again_at_s = float("-inf")
        self._num_losses = 0

    @property
    def is_lost(self) -> bool:
        """Whether it is ours and died, or was started anew."""
        server = self.server
        return server is not None and not (
            server.is_running and server.server_id == self._server_id
        )

    @property
    def is_fresh(self) -> bool:
        """Whether it may be asked without asking first what it has.

        Its connection is the one on which it said so; it answered lately, or is busy.
        """
        silent_s = time.monotonic() - self._answered_at_s
        is_busy = self.num_in_flight > 0 and self._answered_at_s > float("-inf")
        is_same = self.is_admitted and self.is_known(self._generation) and not self.is_lost
        return is_same and (is_busy or silent_s <= RECHECK_AFTER_S)

    @property
    def generation(self) -> int | None:
        """Of the connection on which it was admitted."""
        return self._generation

    @property
    def num_in_flight(self) -> int:
        """Requests under way to both towers."""
        return sum(map(len, self.places.values()))

    def is_known(self, generation: int | None) -> bool:
        """Whether its connection is still that of a generation."""
        return generation == self.transport.generation

    def is_silent(self, since_s: float) -> bool:
        """Whether it has answered nobody for a while, nor since a moment."""
        return time.monotonic() - max(self._answered_at_s, since_s) > RECHECK_AFTER_S

    @property
    def is_due(self) -> bool:
        """Whether it is time to ask an absent one whether it is back."""
        is_absent = not self.is_admitted and not self.is_being_asked
        return is_absent and time.monotonic() >= self._ask_again_at_s

    def revive(self, deadline: Deadline) -> None:
        """Start it again if it is ours and died, and find it where it is now.

        Raises:
            ServerStartError: it does not start any more.
        """
        if self.server is None:
            return
        if not self.server.is_running:
            self._start(self.server, deadline)
        if self.is_lost:
            # The old way is not closed: requests of other threads may still be failing on it.
            self.transport = dial(self.server)
            self._server_id = self.server.server_id

    def _start(self, server: EmbeddedServer, deadline: Deadline) -> None:
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

    def is_version(self, tower: str, version: str) -> bool:
        """Whether it may have answered in a version, as it said which it has; else ask it again.

        A server that takes another's place at once is reached without a connection being seen to
        fail, and one may exchange its models in place.
        """
        if self._version_by_tower.get(tower, "") in ("", version):
            return True
        self._generation = None
        return False

    def admit(self, generation: int, version_by_tower: dict[str, str]) -> None:
        """Note that it serves the model in use, as it said on a connection, in which versions."""
        self._version_by_tower = version_by_tower
        self.is_admitted = self.was_reached = True
        self._generation = generation
        self._num_losses = 0
        self.trust()

    def trust(self) -> None:
        """Note that it just answered as it should."""
        self._answered_at_s = time.monotonic()

    def distrust(self) -> None:
        """Note that something went wrong: ask it what it has before the next call."""
        self._answered_at_s = float("-inf")

    def lose(self) -> None:
        """Note that it is away, or not what it should be."""
        self.is_admitted = False
        self._num_losses += 1
        self._ask_again_at_s = time.monotonic() + _PAUSES.pause_s(self._num_losses)


@dataclass(frozen=True, eq=False)
class Place:
    """Room for one request."""

    free_at_s: float
    """When it is free in any case: an interrupted thread may never give it back."""


def _start_into(starting: Future[str], server: EmbeddedServer) -> None:
    try:
        starting.set_result(server.start(timeout_s=server.start_timeout_s))
    except BaseException as error:
        starting.set_exception(error)


def dial(server: EmbeddedServer) -> Transport:
    """Return a transport to our own server; it is not told of calls that are given up."""
    return Transport(server.url, headers=server.headers, may_cancel=False)
