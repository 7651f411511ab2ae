"""Addresses in, a model found there and checked against the contract out.

Several addresses are replicas of one model. One that is unhealthy is checked now and then, and put
back into rotation when it serves the same model.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from clip_rt import fork, telemetry
from clip_rt.deadline import Deadline
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
from clip_rt.requests.dynamic_batching import DynamicBatcher
from clip_rt.requests.replica import Replica
from clip_rt.requests.server_pool import ServerPool
from clip_rt.specs import HiddenLayer, image_model, text_model
from clip_rt.wire.contract import Towers, check_towers, find_differences
from clip_rt.wire.manifest import Manifest
from clip_rt.wire.messages import ServedModel
from clip_rt.wire.transport import DEADLINE_GRACE_S, Transport

OTHERS_S = 0.25
"""How long the first answer of several servers is held back for those of the others."""
CHECK_TIMEOUT_S = 5.0
"""Longest wait for the answer of a server that was unhealthy."""

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Model:
    """Both towers of a model as served. A call uses one from its begin to its end."""

    def __init__(self, image: ServedModel, text: ServedModel, connection: Connection) -> None:
        self.image = DynamicBatcher(image, connection.pool)
        self.text = DynamicBatcher(text, connection.pool)
        self.hidden: dict[HiddenLayer, DynamicBatcher] = {}
        """To its hidden states, as far as they were asked for; see `requests.hidden`."""
        self.connection = connection

    @property
    def towers(self) -> Towers:
        """What the server says about both."""
        return self.image.tower, self.text.tower

    @property
    def manifest(self) -> Manifest:
        """What the server says about the model."""
        return self.image.tower.manifest

    @property
    def batchers(self) -> tuple[DynamicBatcher, ...]:
        """All ways to it."""
        return self.image, self.text, *self.hidden.values()

    def retire(self) -> None:
        """Note that another one was found in its place."""
        for batcher in self.batchers:
            batcher.retire()


class Description(NamedTuple):
    """What a server said it has."""

    towers: Towers
    generation: int
    """Of the connection on which it said so."""


class Connection:
    """One or several servers, and the model last found on them. Thread-safe; to be closed."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.pool = ServerPool(replicas)
        self._model: Model | None = None
        self._lock = threading.Lock()
        self._checking = threading.Lock()
        self._is_closed = False
        self._calls: dict[object, int] = {}
        self._is_retired = False
        fork.restart_in_child(self, Connection._restart_after_fork)

    @property
    def urls(self) -> str:
        """All addresses, for messages."""
        return self.pool.urls

    @property
    def content_key(self) -> str | None:
        """What a server of our own was made of; None of a server of somebody else."""
        server = self.pool.replicas[0].server
        return None if server is None else server.content_key

    def find_model(self, name: str | None, fingerprint: str | None, deadline: Deadline) -> Model:
        """Return the model `name`, or the only one, asking the servers unless one just answered.

        Raises:
            UnknownModelError: the server does not have it; carries those it has.
            ContractError: it is not what a client can use, not the weights asked for, or not the
                same on all servers.
            ServerError: no answer, or our own server died and does not start any more.
        """
        return self._find_in_use(fingerprint) or self.retry(
            lambda: self._ask(name, fingerprint, deadline), deadline
        )

    def verify(self, model: Model, deadline: Deadline) -> None:
        """Make sure that somebody serves the model a call began with, and nobody another.

        Raises:
            ModelReplacedError: another came back.
            ServerError: nobody answers.
        """
        found = self._find_in_use(None) or self._ask(model.manifest.model, None, deadline)
        if found is not model:
            before, now = model.manifest.fingerprint, found.manifest.fingerprint
            raise ModelReplacedError(
                f"{model.image.tower.name} at {self.urls} was replaced during the call: its "
                f"weights were {before}, now they are {now}. Call again.",
                expected=before,
                found=now,
            )

    def verify_with_retries(self, model: Model, deadline: Deadline) -> None:
        """Do as `verify`, and again as often as the retry policy allows."""
        self.retry(lambda: self.verify(model, deadline), deadline)

    def read_chunk(self, model: Model, name: str, index: int, deadline: Deadline) -> bytes:
        """Read a part of a file that a Triton model hands out, from whichever server answers.

        Raises:
            ModelReplacedError: `model` is not served any more.
            ServerError: nobody answers, or nobody has it.
        """

        def read() -> bytes:
            self.verify(model, deadline)
            healthy = [each for each in self.pool.replicas if each.is_healthy]
            if not healthy:
                raise ServerUnavailableError(f"{self.urls}: nobody answers there now.")
            replica = healthy[index % len(healthy)]
            # One that is silent leaves time for the others.
            share_s = deadline.remaining_s() / len(healthy)
            share = Deadline(share_s, time.monotonic() + share_s, deadline.cancellation)
            try:
                return replica.transport.read_chunk(name, index, share)
            except ServerTimeoutError as error:
                if len(healthy) == 1:
                    raise
                self.pool.mark_unhealthy(replica)
                raise ServerUnavailableError(str(error)) from error
            except ServerUnavailableError:
                self.pool.mark_unhealthy(replica)
                raise

        return self.retry(read, deadline)

    def retry(self, attempt: Callable[[], Result], deadline: Deadline) -> Result:
        """Ask the servers something, and again as often as the retry policy allows."""
        return self.pool.retry_policy.call(
            attempt, deadline, is_worth_waiting=self.pool.is_worth_waiting
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

    def close(self) -> None:
        """Hang up, and release the server if it is our own. Closing twice is harmless."""
        with self._lock:
            is_closed, self._is_closed = self._is_closed, True
        if is_closed:
            return
        for replica in self.pool.replicas:
            replica.transport.close()
            if replica.server is not None:
                replica.server.stop()

    def _restart_after_fork(self) -> None:
        """Begin anew in a forked child: locks may be held, and nothing under way comes back."""
        self._lock, self._checking = threading.Lock(), threading.Lock()
        # Of the calls under way only those of the thread that forked go on in the child.
        here = threading.get_ident()
        self._calls = {call: thread for call, thread in self._calls.items() if thread == here}
        self.pool.restart_after_fork()
        if self._model is not None:
            for batcher in self._model.batchers:
                batcher.restart_after_fork()

    def _find_in_use(self, fingerprint: str | None) -> Model | None:
        """Return the model last found, if all that is known of the servers holds still."""
        model = self._model
        if model is None or not self.pool.is_verified:
            return None
        if fingerprint not in (None, model.manifest.fingerprint):
            return None
        self._check_unhealthy(model)
        return model

    def _ask(self, name: str | None, fingerprint: str | None, deadline: Deadline) -> Model:
        """Ask the servers in one thread; the others use what it finds."""
        if not self._checking.acquire(timeout=max(deadline.remaining_s(), 0.0)):
            raise ServerTimeoutError(
                f"another thread is still connecting to {self.urls} after "
                f"{deadline.timeout_s:g} s. Is the server up?",
                timeout_s=deadline.timeout_s,
            )
        try:
            return self._find_in_use(fingerprint) or self._check_all(name, fingerprint, deadline)
        finally:
            self._checking.release()

    def _check_all(self, name: str | None, fingerprint: str | None, deadline: Deadline) -> Model:
        """Ask the servers what they have, and put those that have the same into rotation.

        While some are there the others are left to `_check_unhealthy`: they may keep one waiting.
        """
        for replica in self.pool.replicas:
            if self._is_closed:
                raise ClientClosedError("the client is closed. Make a new one.")
            replica.restart(deadline)
        if name is None and self._model is not None:
            name = self._model.manifest.model
        name = name or self._ask_in_turn(_name_only_model, deadline)
        found, errors = self._describe_all(name, deadline)
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
        before, self._model = self._model, model
        # First: a server is put into rotation with another model only once that is the one in use.
        if before is not None and before is not model:
            before.retire()
        for replica, description in found.items():
            self._put_back(replica, description, model)
        return model

    def _describe_all(
        self, name: str, deadline: Deadline
    ) -> tuple[dict[Replica, Description], dict[Replica, ClipRTError]]:
        """Ask servers at once; those that answer much later than the first are left out."""
        asked = [each for each in self.pool.replicas if each.is_healthy] or self.pool.replicas
        outcomes: queue.SimpleQueue[tuple[Replica, Description | ClipRTError]] = queue.SimpleQueue()
        if len(asked) == 1:
            outcomes.put(_describe(asked[0], name, deadline))
        else:
            for replica in asked:
                _describe_beside(replica, name, deadline, outcomes.put)
        found: dict[Replica, Description] = {}
        errors: dict[Replica, ClipRTError] = {}
        enough_at_s = float("inf")
        while len(found) + len(errors) < len(asked):
            wait_s = min(deadline.remaining_s() + DEADLINE_GRACE_S, enough_at_s - time.monotonic())
            try:
                replica, outcome = outcomes.get(timeout=max(wait_s, 0.0))
            except queue.Empty:
                break
            if isinstance(outcome, ClipRTError):
                errors[replica] = outcome
            else:
                found[replica] = outcome
                enough_at_s = min(enough_at_s, time.monotonic() + OTHERS_S)
        for replica in asked:
            if replica in found:
                continue
            error = errors.setdefault(replica, replica.transport.time_out(deadline))
            # That one caller was in a hurry says little about a server.
            if found or not isinstance(error, ServerTimeoutError):
                self.pool.mark_unhealthy(replica)
        # In the order they are named, whoever was the first to answer.
        return {each: found[each] for each in asked if each in found}, errors

    def _choose(self, found: Mapping[Replica, Description]) -> Model:
        """Return the model in use if somebody still has it, else the one that all have."""
        if self._model is not None and any(
            not find_differences(self._model.towers, description.towers)
            for description in found.values()
        ):
            return self._model
        (first, description), *others = found.items()
        model = Model(*description.towers, self)
        for replica, other in others:
            if differences := find_differences(model.towers, other.towers):
                raise ContractError(
                    f"{first.transport.url} and {replica.transport.url} serve different models "
                    f"under one name: {differences}. Name replicas of one model only.",
                    expected={name: pair[0] for name, pair in differences.items()},
                    found={name: pair[1] for name, pair in differences.items()},
                )
        return model

    def _put_back(self, replica: Replica, description: Description, model: Model) -> None:
        """Put a server that has the model in use into rotation, and no other."""
        towers, generation = description
        differences = find_differences(model.towers, towers)
        if not differences:
            self.pool.mark_healthy(
                replica, generation, {each.name: each.version for each in towers}
            )
            return
        self.pool.mark_unhealthy(replica)
        if replica.note_other_model(towers[0].manifest.fingerprint):
            _log.warning(
                "%s is left out, because it serves another model: %s differ",
                replica.transport.url,
                ", ".join(differences),
            )

    def _check_unhealthy(self, model: Model) -> None:
        """Ask servers that are away whether they are back, without waiting for them."""
        for replica in self.pool.replicas:
            if not replica.is_check_due or replica.server is not None:
                continue
            replica.is_being_checked = True

            def note(described: tuple[Replica, Description | ClipRTError]) -> None:
                replica, outcome = described
                if isinstance(outcome, ClipRTError):
                    self.pool.mark_unhealthy(replica)
                else:
                    self._put_back(replica, outcome, model)
                replica.is_being_checked = False
                telemetry.count("readmissions", int(replica.is_healthy))

            # Not of the call that happens to be the occasion: it may end before the answer.
            deadline = Deadline(CHECK_TIMEOUT_S, time.monotonic() + CHECK_TIMEOUT_S)
            try:
                _describe_beside(replica, model.manifest.model, deadline, note)
            except BaseException:  # Ctrl-C, or it would never be asked again.
                replica.is_being_checked = False
                raise

    def list_models(self, deadline: Deadline) -> tuple[str, ...]:
        """Return the names of all models there are, from the first server that answers.

        Raises:
            ServerError: nobody answers, or whoever does tells no names.
        """
        return self.retry(lambda: self._ask_in_turn(_list_models, deadline), deadline)

    def _ask_in_turn(
        self, ask: Callable[[Transport, Deadline], Result], deadline: Deadline
    ) -> Result:
        errors: dict[Replica, ClipRTError] = {}
        for index, replica in enumerate(self.pool.replicas):
            # One that is silent leaves time for the others.
            share_s = deadline.remaining_s() / (len(self.pool.replicas) - index)
            share = Deadline(share_s, time.monotonic() + share_s, deadline.cancellation)
            try:
                return ask(replica.transport, share)
            except (ServerTimeoutError, ServerUnavailableError) as error:
                errors[replica] = error
        raise self._tell(None, errors, deadline)

    def _tell(
        self, name: str | None, errors: Mapping[Replica, ClipRTError], deadline: Deadline
    ) -> ClipRTError:
        """Return the one error to raise when no server has what is asked for."""
        for replica, error in errors.items():
            if isinstance(error, UnknownModelError) and name is not None:
                return _list_known(replica.transport, name, error, deadline)
        telling = [error for error in errors.values() if not error.retryable]
        if telling or len(errors) == 1:
            return [*telling, *errors.values()][0]
        return ServerUnavailableError(
            f"none of {len(errors)} servers answers: {'; '.join(map(str, errors.values()))}",
            was_reached=any(getattr(error, "was_reached", True) for error in errors.values()),
        )


def _describe(
    replica: Replica, name: str, deadline: Deadline
) -> tuple[Replica, Description | ClipRTError]:
    """Ask a server what it has under a name, and check that it is what a client can use."""
    try:
        generation = replica.transport.dial()
        names = image_model(name), text_model(name)
        image, text = replica.transport.describe(names, deadline)
        check_towers((image, text))
    except ClipRTError as error:
        return replica, error
    return replica, Description((image, text), generation)


def _describe_beside(
    replica: Replica,
    name: str,
    deadline: Deadline,
    on_done: Callable[[tuple[Replica, Description | ClipRTError]], object],
) -> None:
    """Do as `_describe` in another thread."""
    threading.Thread(
        target=lambda: on_done(_describe(replica, name, deadline)), daemon=True
    ).start()


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
