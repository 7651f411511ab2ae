"""A client's connection to its model over its whole life: opened, used, replaced, closed."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeVar, get_args

from clip_rt import fork, telemetry
from clip_rt.deadline import Deadline, check_timeout
from clip_rt.embedded.bundled import choose_repository
from clip_rt.errors import ClientClosedError, InputError, ModelReplacedError, ServerTimeoutError
from clip_rt.requests.connection import Connection, Model
from clip_rt.requests.replica import Replica, connect_to
from clip_rt.specs import slug
from clip_rt.wire.channel import TLS, check_headers, split_urls
from clip_rt.wire.transport import Transport

URL_VARIABLE = "CLIP_RT_URL"

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


ServerKind = Literal["auto", "embedded", "in_process"]
"""What runs the models of a repository: a Triton on loopback, this process, or the first of them
that there is for this machine."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Which server, and which of its models; see `Client`."""

    urls: tuple[str, ...] | None
    repository: Path | None
    model: str | None
    fingerprint: str | None
    headers: Mapping[str, str] = field(repr=False)
    """May hold a token."""
    tls: TLS | None
    start_timeout_s: float
    server: ServerKind = "auto"

    def __post_init__(self) -> None:
        """Refuse what no server could be asked with.

        Raises:
            InputError: names the argument.
        """
        if self.urls is not None and self.server != "auto":
            raise InputError(
                f"url and server={self.server!r} exclude each other; name a server or what runs "
                "the models of a repository."
            )
        if self.server not in get_args(ServerKind):
            known = ", ".join(map(repr, get_args(ServerKind)))
            raise InputError(f"server is {self.server!r:.80}; it must be one of {known}.")
        if self.model is not None:
            slug(self.model)
        if not (self.fingerprint is None or isinstance(self.fingerprint, str)):
            raise InputError(
                f"fingerprint is a {type(self.fingerprint).__name__}; pass hex digits."
            )
        if not isinstance(self.tls, TLS | None):
            raise InputError(f"tls is a {type(self.tls).__name__}; pass a clip_rt.TLS.")
        check_headers(self.headers)
        object.__setattr__(self, "headers", dict(self.headers))


def choose_source(
    urls: Sequence[str] | None, repository: Path | None, *, may_be_remote: bool = True
) -> Sequence[str] | Path:
    """Return the addresses of servers, or the repository for one of our own.

    What the caller named comes first, then what the environment names, then the bundled model.
    Addresses of the environment are not asked where the caller wants a repository to be run.

    Raises:
        InputError: the environment names no address.
        ServerStartError: nothing is named, and the bundled model is not installed.
    """
    if urls is not None:
        return urls
    if repository is not None:
        return repository
    if may_be_remote and (given := os.environ.get(URL_VARIABLE)):
        return split_urls(given)
    return choose_repository()


@functools.cache
def _say_in_process() -> None:
    """Say it once, however many clients there are."""
    _log.warning(
        "there is no embedded Triton here, so models run in this process; server='in_process' says "
        "that it shall be so"
    )


def is_in_process(kind: ServerKind) -> bool:
    """Return whether models run in this process; logged where the caller did not ask for it."""
    if kind != "auto":
        return kind == "in_process"
    if find_spec("pytriton") is not None:
        return False
    _say_in_process()
    return True


class Session:
    """Connects at the first call, and again in a forked child. Thread-safe; to be closed.

    A call takes no longer than `timeout_s` unless it says otherwise.
    """

    def __init__(self, target: Target, timeout_s: float) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._reloading = threading.Lock()
        self._is_closed = False
        self._connection: Connection | None = None
        self._finalizer: weakref.finalize[..., Session] | None = None
        fork.restart_in_child(self, Session._renew_locks)

    @property
    def connection(self) -> Connection | None:
        """The one that calls use now; None before the first and when it is closed."""
        return self._connection

    def call(
        self,
        name: str,
        timeout_s: float | None,
        work: Callable[[Model, Deadline], Result],
        source: object = (),
    ) -> Result:
        """Make a public call and report how it goes: anew when the model is replaced meanwhile.

        Args:
            name: Of the call.
            timeout_s: For all of it.
            work: Uses one model from begin to end, so that no result is of two.
            source: What it reads; an iterator cannot be read again.

        Raises:
            ModelReplacedError: the client insists on a fingerprint, or the source is an iterator.
        """
        with telemetry.call(name) as call, self.begun(timeout_s) as (model, deadline):
            while True:
                call.attributes["model"] = model.manifest.model
                try:
                    return work(model, deadline)
                except ModelReplacedError as error:
                    if self._target.fingerprint is not None:
                        raise
                    if isinstance(source, Iterator) and not hasattr(source, "read"):
                        raise ModelReplacedError(
                            f"{error} It cannot be done again by itself, because its items came "
                            "from an iterator, which is used up: pass a list.",
                            expected=error.expected,
                            found=error.found,
                        ) from error
                model = model.connection.find_model(self._target.model, None, deadline)

    @contextlib.contextmanager
    def begun(self, timeout_s: float | None) -> Iterator[tuple[Model, Deadline]]:
        """Make sure of a connection to the right model, start the clock, and keep both."""
        with self._connected(timeout_s) as (connection, deadline):
            yield (
                connection.find_model(self._target.model, self._target.fingerprint, deadline),
                deadline,
            )

    def list_models(self, timeout_s: float | None) -> tuple[str, ...]:
        """Return what the server has; see `Client.list_models`."""
        with self._connected(timeout_s) as (connection, deadline):
            return connection.list_models(deadline)

    @contextlib.contextmanager
    def _connected(self, timeout_s: float | None) -> Iterator[tuple[Connection, Deadline]]:
        """Make sure of a connection, start the clock, and keep the connection."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        check_timeout(timeout_s)
        with contextlib.ExitStack() as until_end:
            with self._locked(timeout_s):
                if self._is_closed:
                    raise ClientClosedError("the client is closed. Make a new one.")
                if self._connection is None:
                    self._use(self._connect())
                connection = self._connection
                assert connection is not None
                until_end.enter_context(connection.used())
            yield connection, Deadline.after(timeout_s)

    def server_seconds(self) -> dict[str, float]:
        """Return what the servers have spent; see `Client.server_seconds`."""
        with self.begun(None) as (model, deadline):
            names = [tower.name for tower in model.towers]
            counted = [
                each
                for replica in model.connection.pool.replicas
                if replica.is_healthy
                for each in replica.transport.read_statistics(names, deadline).values()
            ]
            return {
                "server_queue": sum(each.queue_s for each in counted),
                "server_compute": sum(each.compute_s for each in counted),
            }

    def _use(self, connection: Connection) -> None:
        """Make calls with a connection from now on; the lock is held."""
        if self._finalizer is not None:
            self._finalizer.detach()
        self._connection = connection
        # One that is dropped without being closed hangs up.
        self._finalizer = weakref.finalize(self, connection.close)

    @contextlib.contextmanager
    def _reloading_alone(self, timeout_s: float) -> Iterator[None]:
        if not self._reloading.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX)):
            raise ServerTimeoutError(
                f"another thread is still reloading after {timeout_s:g} s. Call again later.",
                timeout_s=timeout_s,
            )
        try:
            yield
        finally:
            self._reloading.release()

    @contextlib.contextmanager
    def _locked(self, timeout_s: float) -> Iterator[None]:
        """Hold the lock; another thread may have it while it connects, for longer than we have."""
        wait_s = timeout_s + (self._target.start_timeout_s if self._connection is None else 0.0)
        if not self._lock.acquire(timeout=min(wait_s, threading.TIMEOUT_MAX)):
            raise ServerTimeoutError(
                f"another thread is still connecting after {wait_s:g} s. Is the server up?",
                timeout_s=timeout_s,
            )
        try:
            yield
        finally:
            self._lock.release()

    def _connect(self) -> Connection:
        target = self._target
        source = choose_source(
            target.urls, target.repository, may_be_remote=target.server == "auto"
        )
        if not isinstance(source, Path):
            transports = (Transport(url, headers=target.headers, tls=target.tls) for url in source)
            return Connection([Replica(transport) for transport in transports])
        if is_in_process(target.server):
            from clip_rt.in_process import InProcessTransport

            return Connection([Replica(InProcessTransport(source))])
        # Here, because it needs Linux, and a client of a remote server does not.
        from clip_rt.embedded.server import acquire_server

        server = acquire_server(source, start_timeout_s=target.start_timeout_s)
        return Connection([Replica(connect_to(server), server)])

    def reload(self, *, timeout_s: float | None = None) -> bool:
        """Take what the repository of the embedded server holds now; see `Client.reload`."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        check_timeout(timeout_s)
        with self._reloading_alone(timeout_s + self._target.start_timeout_s):
            with self.begun(timeout_s) as (model, _):
                before = model.connection
            if before.content_key is None:
                raise InputError(
                    f"the server at {before.urls} is not this client's own, so it cannot have it "
                    "reload its models. Of a `python -m clip_rt serve`: python -m clip_rt reload "
                    "--port PORT. In process, close all clients of the repository, and make others."
                )
            found = self._connect()
            try:
                is_new = found.content_key != before.content_key
                if is_new:
                    deadline = Deadline.after(timeout_s)
                    found.find_model(self._target.model, self._target.fingerprint, deadline)
                    with self._locked(timeout_s):
                        if self._is_closed:
                            raise ClientClosedError("the client is closed. Make a new one.")
                        self._use(found)
            except BaseException:
                found.close()
                raise
            (before if is_new else found).retire()
            return is_new

    def close(self) -> None:
        """Close the connection; see `Client.close`."""
        with self._lock:
            self._is_closed = True
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def _renew_locks(self) -> None:
        """In a forked child: another thread may have held them, and does not exist here."""
        self._lock, self._reloading = threading.Lock(), threading.Lock()
