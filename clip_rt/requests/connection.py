"""Addresses in, a model found there and checked against the contract out; who of them is asked.

Several addresses are replicas of one model. Requests go to the one with the fewest under way; one
that is away is left out, asked again now and then, and taken back when it serves the same model.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from clip_rt import telemetry
from clip_rt.deadline import START_TIMEOUT_S, Deadline, RetryBudget, RetryPolicy
from clip_rt.errors import (
    ClientClosedError,
    ClipRTError,
    ContractError,
    InferenceError,
    ModelReplacedError,
    ServerTimeoutError,
    ServerUnavailableError,
    UnknownModelError,
)
from clip_rt.requests.endpoint import Endpoint, Place, dial
from clip_rt.requests.lane import Lane
from clip_rt.specs import image_model, text_model
from clip_rt.wire.channel import TLS
from clip_rt.wire.contract import Towers, check_towers, find_differences
from clip_rt.wire.manifest import Manifest
from clip_rt.wire.transport import GRACE_S, ServedModel, Transport

OTHERS_S = 0.25
"""How long the first answer of several servers is held back for those of the others."""
ASK_TIMEOUT_S = 5.0
"""Longest wait for the answer of a server that was away."""

_log = logging.getLogger(__name__)


class Model:
    """Both towers of a model, and the ways to them. A call uses one from its begin to its end."""

    def __init__(self, image: ServedModel, text: ServedModel, connection: Connection) -> None:
        self.image = Lane(image, connection)
        self.text = Lane(text, connection)

    @property
    def towers(self) -> Towers:
        """What the server says about both."""
        return self.image.tower, self.text.tower

    @property
    def manifest(self) -> Manifest:
        """What the server says about the model."""
        return self.image.tower.manifest


class Seen(NamedTuple):
    """What a server said it has."""

    towers: Towers
    generation: int
    """Of the connection on which it said so."""


class Connection:
    """One or several servers, and the model last found on them. Thread-safe; to be closed."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = tuple(endpoints)
        self.policy = RetryPolicy()
        self.budget = RetryBudget()
        self._model: Model | None = None
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._turn = 0
        self._is_closed = False
        self._calls: dict[object, int] = {}
        self._is_retired = False
        _connections.add(self)

    @classmethod
    def to_urls(
        cls,
        urls: Sequence[str],
        *,
        headers: Mapping[str, str] | None = None,
        tls: TLS | None = None,
    ) -> Connection:
        """Connect to running servers, at the first request."""
        return cls([Endpoint(Transport(url, headers=headers, tls=tls)) for url in urls])

    @classmethod
    def to_repository(
        cls, repository: str | os.PathLike[str], *, start_timeout_s: float = START_TIMEOUT_S
    ) -> Connection:
        """Connect to this machine's own server over a repository, starting it if needed.

        Raises:
            ServerStartError: it cannot run here.
        """
        # Here, because it needs Linux, and a client of a remote server does not.
        from clip_rt.embedded.server import borrow

        server = borrow(Path(repository), start_timeout_s=start_timeout_s)
        return cls([Endpoint(dial(server), server)])

    @property
    def urls(self) -> str:
        """All addresses, for messages."""
        return ", ".join(endpoint.transport.url for endpoint in self.endpoints)

    def find_model(self, name: str | None, fingerprint: str | None, deadline: Deadline) -> Model:
        """Return the model `name`, or the only one, asking the servers unless one just answered.

        Raises:
            UnknownModelError: the server does not have it; carries those it has.
            ContractError: it is not what a client can use, not the weights asked for, or not the
                same on all servers.
            ServerError: no answer, or our own server died and does not start any more.
        """

        def find() -> Model | None:
            model = self._model
            if model is None or not self._is_fresh():
                return None
            if fingerprint not in (None, model.manifest.fingerprint):
                return None
            self._ask_absent(model)
            return model

        def ask() -> Model:
            with self._asking_alone(deadline):
                return find() or self._ask(name, fingerprint, deadline)

        return find() or self.policy.call(ask, deadline, is_worth_waiting=self.is_worth_waiting)

    def confirm(self, model: Model, deadline: Deadline) -> None:
        """Make sure that somebody serves the model a call began with, and nobody another.

        Raises:
            ModelReplacedError: another came back.
            ServerError: nobody answers.
        """
        if self._model is model and self._is_fresh():
            self._ask_absent(model)
            return
        with self._asking_alone(deadline):
            found = self._model
            if not self._is_fresh() or found is None:
                found = self._ask(model.manifest.model, None, deadline)
        if found is not model:
            before, now = model.manifest.fingerprint, found.manifest.fingerprint
            raise ModelReplacedError(
                f"{model.image.tower.name} at {self.urls} was replaced during the call: its "
                f"weights were {before}, now they are {now}. Call again.",
                expected=before,
                found=now,
            )

    def insist(self, model: Model, deadline: Deadline) -> None:
        """Do as `confirm`, and try again as often as the policy allows."""
        self.policy.call(
            lambda: self.confirm(model, deadline),
            deadline,
            is_worth_waiting=self.is_worth_waiting,
        )

    def acquire(
        self, tower: str, max_in_flight: int, free_at_s: float, *, avoid: Endpoint | None = None
    ) -> tuple[Endpoint, Place] | None:
        """Take a place for a request at the least busy server.

        Args:
            tower: Name of the Triton model.
            max_in_flight: Places of each server for a tower.
            free_at_s: When the place is free again in any case.
            avoid: Taken only if there is no other.

        Returns:
            The server and the place; None if none has room.

        Raises:
            ServerUnavailableError: none is there.
        """
        now_s = time.monotonic()
        with self._lock:
            ready = [each for each in self.endpoints if each.is_admitted]
            if not ready:
                raise ServerUnavailableError(f"{self.urls}: nobody answers there now.")
            others = [each for each in ready if each is not avoid]
            free = []
            for each in others or ready:
                places = each.places.setdefault(tower, set())
                if len(places) >= max_in_flight:
                    places -= {place for place in places if place.free_at_s < now_s}
                if len(places) < max_in_flight:
                    free.append(each)
            if not free:
                return None
            self._turn += 1
            start = self._turn % len(free)
            chosen = min(free[start:] + free[:start], key=lambda each: each.num_in_flight)
            place = Place(free_at_s)
            chosen.places[tower].add(place)
            return chosen, place

    def release(
        self, endpoint: Endpoint, tower: str, place: Place, error: ClipRTError | None
    ) -> tuple[Lane, ...]:
        """Give a place back, and note how the request ended.

        Returns:
            The lanes that may have waited for it.
        """
        with self._lock:
            endpoint.places[tower].discard(place)
            if error is None:
                endpoint.trust()
            elif isinstance(error, ServerUnavailableError):
                endpoint.lose()
            # That one caller was in a hurry says little about a server.
            elif not error.retryable and not isinstance(error, ServerTimeoutError):
                endpoint.distrust()
            return () if self._model is None else (self._model.image, self._model.text)

    def suspect(self, endpoint: Endpoint, since_s: float) -> None:
        """Note that a server has said nothing since a moment: others are asked, if there are any.

        One that answers others is well.
        """
        with self._lock:
            if not endpoint.is_silent(since_s):
                return
            if any(each.is_admitted for each in self.endpoints if each is not endpoint):
                endpoint.lose()
            else:
                endpoint.distrust()

    def has_other(self, endpoint: Endpoint | None = None) -> bool:
        """Whether somebody else than `endpoint` may be asked now."""
        return any(each.is_admitted for each in self.endpoints if each is not endpoint)

    def is_worth_waiting(self, error: ClipRTError) -> bool:
        """Whether to wait until the deadline: nothing got through, to a server that was there."""
        return (
            isinstance(error, ServerUnavailableError)
            and not error.was_reached
            and any(endpoint.was_reached for endpoint in self.endpoints)
        )

    def may_retry(self, error: ClipRTError) -> bool:
        """Whether the budget has room for another try of a request that failed so."""
        is_more_work = not isinstance(error, ServerUnavailableError) or error.was_reached
        return error.retryable and (not is_more_work or self.budget.spend())

    def time_out(self, deadline: Deadline) -> ServerTimeoutError:
        """Return the error of a request that was not even sent in time."""
        return ServerTimeoutError(
            f"{self.urls} had no room within {deadline.timeout_s:g} s. Allow more with timeout_s=, "
            "or send less at a time.",
            timeout_s=deadline.timeout_s,
        )

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Keep it open for a call in a `with` block, even when it is retired meanwhile."""
        call = object()
        with self._lock:
            self._calls[call] = threading.get_ident()
        try:
            yield
        finally:
            with self._lock:
                self._calls.pop(call, None)
                is_last = self._is_retired and not self._calls
            if is_last:
                self.close()

    def retire(self) -> None:
        """Close it once the calls that use it have ended; no other may begin."""
        with self._lock:
            self._is_retired = True
            is_last = not self._calls
        if is_last:
            self.close()

    def is_current(self, lane: Lane) -> bool:
        """Whether a lane is of the model last found."""
        model = self._model
        return model is not None and lane in (model.image, model.text)

    def serves_as(self, other: Connection) -> bool:
        """Whether both lead to the same server of our own."""
        return [each.server for each in self.endpoints] == [each.server for each in other.endpoints]

    def close(self) -> None:
        """Hang up, and give back the server if it is our own. Closing twice is harmless."""
        with self._lock:
            is_closed, self._is_closed = self._is_closed, True
        if is_closed:
            return
        for endpoint in self.endpoints:
            endpoint.transport.close()
            if endpoint.server is not None:
                from clip_rt.embedded.server import give_back

                give_back(endpoint.server)

    def restart_after_fork(self) -> None:
        """Begin anew in a forked child: locks may be held, and nothing under way comes back."""
        self._lock, self._asking = threading.Lock(), threading.Lock()
        self.budget = RetryBudget()
        # Of the calls under way only those of the thread that forked go on in the child.
        here = threading.get_ident()
        self._calls = {call: thread for call, thread in self._calls.items() if thread == here}
        for endpoint in self.endpoints:
            endpoint.places.clear()
            endpoint.is_being_asked = False
        if self._model is not None:
            for lane in (self._model.image, self._model.text):
                lane.restart_after_fork()

    def _is_fresh(self) -> bool:
        """Whether there is somebody to ask, of whom nobody has been silent for long."""
        admitted = [endpoint for endpoint in self.endpoints if endpoint.is_admitted]
        return bool(admitted) and all(endpoint.is_fresh for endpoint in admitted)

    @contextlib.contextmanager
    def _asking_alone(self, deadline: Deadline) -> Iterator[None]:
        """Let one thread ask; the others use what it finds."""
        if not self._asking.acquire(timeout=max(deadline.remaining_s(), 0.0)):
            raise ServerTimeoutError(
                f"another thread is still connecting to {self.urls} after "
                f"{deadline.timeout_s:g} s. Is the server up?",
                timeout_s=deadline.timeout_s,
            )
        try:
            yield
        finally:
            self._asking.release()

    def _ask(self, name: str | None, fingerprint: str | None, deadline: Deadline) -> Model:
        """Ask the servers what they have, and admit those that have the same.

        While some are there the others are left to `_ask_absent`: they may keep one waiting.
        """
        for endpoint in self.endpoints:
            if self._is_closed:
                raise ClientClosedError("the client is closed. Make a new one.")
            endpoint.revive(deadline)
        if name is None and self._model is not None:
            name = self._model.manifest.model
        name = name or self._find_only_model(deadline)
        found, errors = self._ask_all(name, deadline)
        if not found:
            raise self._tell(name, errors, deadline)
        model = self._choose(found)
        manifest = model.manifest
        if fingerprint not in (None, manifest.fingerprint):
            raise ContractError(
                f"model {name!r} at {self.urls} has the weights {manifest.fingerprint}; asked for "
                f"were {fingerprint}.",
                expected=fingerprint,
                found=manifest.fingerprint,
            )
        self._model = model
        with self._lock:
            for endpoint, seen in found.items():
                self._receive(endpoint, seen, model)
        return model

    def _ask_all(
        self, name: str, deadline: Deadline
    ) -> tuple[dict[Endpoint, Seen], dict[Endpoint, ClipRTError]]:
        """Ask servers at once; those that answer much later than the first are left out."""
        asked = [each for each in self.endpoints if each.is_admitted] or self.endpoints
        outcomes: queue.SimpleQueue[tuple[Endpoint, Seen | ClipRTError]] = queue.SimpleQueue()
        for endpoint in asked:
            _ask_later(endpoint, name, deadline, lambda *outcome: outcomes.put(outcome))
        found: dict[Endpoint, Seen] = {}
        errors: dict[Endpoint, ClipRTError] = {}
        enough_at_s = float("inf")
        while len(found) + len(errors) < len(asked):
            wait_s = min(deadline.remaining_s() + GRACE_S, enough_at_s - time.monotonic())
            try:
                endpoint, outcome = outcomes.get(timeout=max(wait_s, 0.0))
            except queue.Empty:
                break
            if isinstance(outcome, ClipRTError):
                errors[endpoint] = outcome
            else:
                found[endpoint] = outcome
                enough_at_s = min(enough_at_s, time.monotonic() + OTHERS_S)
        with self._lock:
            for endpoint in asked:
                if endpoint in found:
                    continue
                error = errors.setdefault(endpoint, endpoint.transport.time_out(deadline))
                # That one caller was in a hurry says little about a server.
                if found or not isinstance(error, ServerTimeoutError):
                    endpoint.lose()
        return found, errors

    def _choose(self, found: Mapping[Endpoint, Seen]) -> Model:
        """Return the model in use if somebody still has it, else the one that all have."""
        if self._model is not None and any(
            not find_differences(self._model.towers, seen.towers) for seen in found.values()
        ):
            return self._model
        (first, seen), *others = found.items()
        model = Model(*seen.towers, self)
        for endpoint, other in others:
            if differences := find_differences(model.towers, other.towers):
                raise ContractError(
                    f"{first.transport.url} and {endpoint.transport.url} serve different models "
                    f"under one name: {differences}. Name replicas of one model only.",
                    expected={name: pair[0] for name, pair in differences.items()},
                    found={name: pair[1] for name, pair in differences.items()},
                )
        return model

    def _receive(self, endpoint: Endpoint, seen: Seen, model: Model) -> None:
        """Admit a server that has the model in use, and no other; the lock is held."""
        differences = find_differences(model.towers, seen.towers)
        if not differences:
            endpoint.admit(seen.generation, {each.name: each.version for each in seen.towers})
            return
        endpoint.lose()
        fingerprint = seen.towers[0].manifest.fingerprint
        if endpoint.left_out_for != fingerprint:
            endpoint.left_out_for = fingerprint
            _log.warning(
                "%s is left out, because it serves another model: %s differ",
                endpoint.transport.url,
                ", ".join(differences),
            )

    def _ask_absent(self, model: Model) -> None:
        """Ask servers that are away whether they are back, without waiting for them."""
        for endpoint in self.endpoints:
            if not endpoint.is_due or endpoint.server is not None:
                continue
            endpoint.is_being_asked = True

            def note(endpoint: Endpoint, outcome: Seen | ClipRTError) -> None:
                with self._lock:
                    endpoint.is_being_asked = False
                    if isinstance(outcome, ClipRTError):
                        endpoint.lose()
                    else:
                        self._receive(endpoint, outcome, model)
                telemetry.count("readmissions", int(endpoint.is_admitted))

            # Not of the call that happens to be the occasion: it may end before the answer.
            deadline = Deadline(ASK_TIMEOUT_S, time.monotonic() + ASK_TIMEOUT_S)
            try:
                _ask_later(endpoint, model.manifest.model, deadline, note)
            except BaseException:  # Ctrl-C, or it would never be asked again.
                endpoint.is_being_asked = False
                raise

    def _find_only_model(self, deadline: Deadline) -> str:
        errors: dict[Endpoint, ClipRTError] = {}
        for index, endpoint in enumerate(self.endpoints):
            # One that is silent leaves time for the others.
            share_s = deadline.remaining_s() / (len(self.endpoints) - index)
            share = Deadline(share_s, time.monotonic() + share_s, deadline.cancellation)
            try:
                return _name_only_model(endpoint.transport, share)
            except (ServerTimeoutError, ServerUnavailableError) as error:
                errors[endpoint] = error
        raise self._tell(None, errors, deadline)

    def _tell(
        self, name: str | None, errors: Mapping[Endpoint, ClipRTError], deadline: Deadline
    ) -> ClipRTError:
        """Return the one error to raise when no server has what is asked for."""
        for endpoint, error in errors.items():
            if isinstance(error, UnknownModelError) and name is not None:
                return _list_known(endpoint.transport, name, error, deadline)
        telling = [error for error in errors.values() if not error.retryable]
        if telling or len(errors) == 1:
            return [*telling, *errors.values()][0]
        return ServerUnavailableError(
            f"none of {len(errors)} servers answers: {'; '.join(map(str, errors.values()))}",
            was_reached=any(getattr(error, "was_reached", True) for error in errors.values()),
        )


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for connection in _connections:
        connection.restart_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _ask_later(
    endpoint: Endpoint,
    name: str,
    deadline: Deadline,
    on_done: Callable[[Endpoint, Seen | ClipRTError], None],
) -> None:
    """Ask a server what it has under a name, and check that it is what a client can use."""
    try:
        generation = endpoint.transport.dial()
    except ClipRTError as error:
        on_done(endpoint, error)
        return

    def check(outcome: tuple[ServedModel, ...] | ClipRTError) -> None:
        if isinstance(outcome, ClipRTError):
            on_done(endpoint, outcome)
            return
        image, text = outcome
        try:
            check_towers((image, text))
        except ContractError as error:
            on_done(endpoint, error)
        else:
            on_done(endpoint, Seen((image, text), generation))

    endpoint.transport.describe_later((image_model(name), text_model(name)), deadline, check)


def _name_only_model(transport: Transport, deadline: Deadline) -> str:
    try:
        known = _list_models(transport, deadline)
    except InferenceError as error:
        raise UnknownModelError(
            f"{transport.url} does not list its models ({error}). Name one with model=.",
            model=None,
            known=(),
        ) from error
    if len(known) != 1:
        raise UnknownModelError(
            f"{transport.url} serves {len(known)} models: {', '.join(known) or 'none'}. Name one "
            "with model=.",
            model=None,
            known=known,
        )
    return known[0]


def _list_known(
    transport: Transport, name: str, error: UnknownModelError, deadline: Deadline
) -> UnknownModelError:
    """Say what the server has instead, if it tells."""
    try:
        known = _list_models(transport, deadline)
    except InferenceError:
        return error
    return UnknownModelError(
        f"{transport.url} serves no model {name!r}; it serves {', '.join(known) or 'none'}.",
        model=name,
        known=known,
    )


def _list_models(transport: Transport, deadline: Deadline) -> tuple[str, ...]:
    """List what has both towers, by the stem of their names."""
    names = set(transport.list_models(deadline))
    stems = (name.removesuffix("_image") for name in names if name.endswith("_image"))
    return tuple(sorted(stem for stem in stems if f"{stem}_text" in names))
