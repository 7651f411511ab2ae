"""A rollout of what a repository holds now, by a `python -m clip_rt serve` that is told to reload.

A second Triton is started on the same port, and once its models are loaded the first one ends: new
connections then reach the second. Until that moment the first goes on, and for good if the second
does not start.

The first is ended, not drained: while Triton 2.51 drains it keeps its connections and refuses every
new request on them, for two seconds and up to the drain time-out, and goes on to accept connections
meant for the second. Requests under way are lost with it, at once, and a retry finds the second.
`clip_rt.Client` does that by itself; each of its calls is of one model.

Who serves a port listens on a socket named for it in Linux's abstract namespace, which ends with
the process and is as large as that of ports. It is the lock of the port, too, because two servers
that may share one would not notice each other.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from clip_rt.embedded import sharing, supervisor
from clip_rt.embedded.installation import find_home, find_models
from clip_rt.embedded.server import EmbeddedServer, make_port_error
from clip_rt.errors import InputError, ServerStartError

CONNECT_TIMEOUT_S = 5.0
LOCK_TIMEOUT_S = 60.0
"""Longest wait for an export that is changing the repository."""
MAX_ANSWER_BYTES = 1024 * 1024
_BACKLOG = 16

_log = logging.getLogger(__name__)


def reload(port: int, *, timeout_s: float) -> bool:
    """Have the server of a port take what its repository holds now.

    Args:
        port: Of `python -m clip_rt serve`.
        timeout_s: Longest wait; it goes on by itself afterwards.

    Returns:
        Whether there was anything new.

    Raises:
        InputError: this user serves nothing there.
        ServerStartError: what is new does not start, and the server goes on with what it had.
    """
    if not timeout_s > 0:
        raise InputError(f"timeout_s is {timeout_s!r:.40}; it must be a number above 0.")
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(CONNECT_TIMEOUT_S)
        try:
            link.connect(_name(port))
        except OSError as error:
            raise InputError(
                f"no `python -m clip_rt serve` of this user is ready on port {port}: "
                f"{error.strerror or error}. Name it: python -m clip_rt reload --port PORT. A "
                "client with a server of its own has Client.reload()."
            ) from error
        link.settimeout(min(timeout_s, threading.TIMEOUT_MAX))
        try:
            # Whoever else listens there is not believed.
            is_ours = _find_user(link) == os.getuid()
            answer = json.loads(link.makefile("rb").read(MAX_ANSWER_BYTES) if is_ours else b"")
            is_new, problem = bool(answer["is_new"]), str(answer["error"])
        except TimeoutError:
            raise ServerStartError(
                f"the server on port {port} has not said within {timeout_s:g} s what came of it. "
                "It may still do it; wait longer with python -m clip_rt reload --timeout-s."
            ) from None
        except (OSError, ValueError, KeyError, TypeError):
            raise ServerStartError(
                f"the server on port {port} ended, or belongs to another user, and has reloaded "
                "nothing. Start it again with python -m clip_rt serve."
            ) from None
    if problem:
        raise ServerStartError(f"the server on port {port} goes on with what it had: {problem}")
    return is_new


def take_port(port: int) -> tuple[int, socket.socket]:
    """Take a port, or any that is free for 0, and a socket where its server is asked to reload.

    Raises:
        ServerStartError: somebody else has it.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        with socket.socket() as probe:
            # As a server would: one that ended a moment ago is no hindrance.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            port = probe.getsockname()[1]
            listener.bind(_name(port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise make_port_error(port) from None
        raise ServerStartError(
            f"port {port} of 127.0.0.1 cannot be used: {error.strerror}. Name another port."
        ) from error
    return port, listener


class Reloader:
    """Where a server can be asked to reload, and the server that serves now. Thread-safe."""

    def __init__(
        self,
        listener: socket.socket,
        repository: Path,
        make_server: Callable[[], EmbeddedServer],
        *,
        may_overlap: bool,
    ) -> None:
        self.server = make_server()
        self._listener = listener
        self._repository = repository
        self._make_server = make_server
        self._may_overlap = may_overlap
        self._key = self._make_key()
        self._lock = threading.Lock()
        self._is_open = self._is_closed = False

    def open(self) -> None:
        """Begin to answer, once the server is ready."""
        if self._is_open:
            return
        self._is_open = True
        self._listener.listen(_BACKLOG)
        threading.Thread(target=self._answer_all, daemon=True).start()

    def close(self) -> EmbeddedServer:
        """Have no other server take over any more, and return the one that serves."""
        with self._lock:
            self._is_closed = True
            return self.server

    def _answer_all(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return  # It is closed as we end.
                time.sleep(1.0)  # No descriptor is free, say.
                continue
            with link, contextlib.suppress(OSError):
                if _find_user(link) == os.getuid():
                    answer: dict[str, object] = {"is_new": False, "error": ""}
                    try:
                        answer["is_new"] = self._reload()
                    except Exception as error:  # Or nobody could reload any more.
                        _log.warning("nothing was reloaded: %s", error)
                        answer["error"] = str(error)
                    link.sendall(json.dumps(answer).encode("utf-8", "replace"))

    def _reload(self) -> bool:
        with _locked(self._repository):
            key = self._make_key()
            if key == self._key:
                return False
            if not self._may_overlap:
                raise ServerStartError(
                    "it shows its metrics on a port that two servers cannot share. End it and "
                    "start it again, one replica after the other."
                )
            new = self._make_server()
            new.start()
        with self._lock:
            is_closed = self._is_closed
            if not is_closed:
                old, self.server, self._key = self.server, new, key
        if is_closed:
            new.stop()
            raise ServerStartError("it was told to end meanwhile.")
        old.stop()
        return True

    def _make_key(self) -> str:
        return sharing.make_key(find_home(), find_models(self._repository))


@contextlib.contextmanager
def _locked(repository: Path) -> Iterator[None]:
    """Wait until no export changes the repository, and keep exports out: both towers are of one."""
    descriptor = os.open(repository, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not supervisor.lock(descriptor, timeout_s=LOCK_TIMEOUT_S, is_shared=True):
            raise ServerStartError(
                f"an export has been changing {repository} for {LOCK_TIMEOUT_S:g} s. Reload again "
                "when it has ended."
            )
        yield
    finally:
        os.close(descriptor)


def _name(port: int) -> str:
    return f"\0clip_rt-serve-{port}"


def _find_user(link: socket.socket) -> int:
    """Return the user at the other end."""
    user: int
    _, user, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return user
