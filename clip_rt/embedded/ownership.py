"""One owner's reference to a server: a connection to its supervisor, from handshake to report.

The kernel closes the connection on any end of the process, and that is all the supervisor goes by.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_rt import fork
from clip_rt.embedded import sharing, supervisor
from clip_rt.embedded.installation import OTHER_WAY, Home, find_way_out
from clip_rt.errors import ServerStartError

_COLLECT_S = 0.002
_HANDSHAKE_TIMEOUT_S = 5.0
"""How long a supervisor that runs may take to answer another owner."""
_JOIN_SHARE = 0.25
"""Share of the time for a start after which a supervisor that does not answer is given up."""
_END_TIMEOUT_S = 10.0
_MAX_WAIT_S = 1e6
_MESSAGE_CHARS = 600
_SIGNALS = {
    "SIGKILL": f"it was killed, perhaps for want of memory. Give it more. {OTHER_WAY}",
    "SIGSEGV": f"it crashed. Report it with .log_tail. {OTHER_WAY}",
    "SIGILL": f"this processor lacks instructions that a model's library uses. {OTHER_WAY}",
}


@dataclass(frozen=True)
class Facts:
    """What a supervisor tells each owner about its server."""

    server_id: str
    port: int
    token: str

    @property
    def url(self) -> str:
        """Its address, host:port."""
        return f"127.0.0.1:{self.port}"


class _Process:
    """A child of this process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._lock = threading.Lock()
        self._has_ended = False

    def has_ended(self) -> bool:
        """Whether it has; if so, collect it."""
        with self._lock:
            if not self._has_ended:
                try:
                    self._has_ended = os.waitpid(self._pid, os.WNOHANG) != (0, 0)
                except ChildProcessError:  # Somebody collects all children, or none are kept.
                    self._has_ended = True
            return self._has_ended

    def kill(self) -> None:
        if not self.has_ended():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def wait(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not self.has_ended() and time.monotonic() < deadline_s:
            time.sleep(_COLLECT_S)


def _spawn(command: list[str], stdin: int, stderr: int) -> _Process:
    """Start a program in a session of its own; Ctrl-C in the terminal does not reach it.

    Not by `subprocess`: gevent puts a fork by `os.fork` in its place, and the threads of gRPC may
    end the child before it is another program.

    Raises:
        OSError: it cannot be executed.
    """
    actions: list[tuple[Any, ...]] = [
        (os.POSIX_SPAWN_DUP2, stdin, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
    ]
    if stderr != 2:  # Which may be closed.
        actions.append((os.POSIX_SPAWN_DUP2, stderr, 2))
    pid = os.posix_spawn(
        *(command[0], command, os.environ),
        file_actions=actions,
        setsid=True,
        setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),  # Python ignores them; a child inherits that.
    )
    return _Process(pid)


class Run:
    """One life of a server, as one of its owners sees it: a connection to its supervisor.

    That is `process` if this process started it, and wrote its faults to the open file `stderr`.
    Who joins a server waits less for the handshake, and has time left to start another.

    Raises:
        ServerStartError: the supervisor does not answer, or reports that it could not start it.
    """

    def __init__(
        self,
        link: socket.socket,
        folder: Path,
        process: _Process | None = None,
        *,
        stderr: int | None = None,
        deadline_s: float,
    ) -> None:
        self._folder = folder
        self._process = process
        self._lock = threading.RLock()
        self._link: socket.socket | None = None
        self._received = b""
        self._report: supervisor.Report | None = None
        self._ready_at_s: float | None = None
        self._is_over = False
        fork.restart_in_child(self, Run._leave_to_parent)
        timeout_s = _left_s(deadline_s)
        if process is None:
            timeout_s = min(_HANDSHAKE_TIMEOUT_S, _JOIN_SHARE * timeout_s)
        self.facts = self._handshake(link, timeout_s, stderr)

    @property
    def is_joined(self) -> bool:
        """Whether another process started it."""
        return self._process is None

    def is_alive(self) -> bool:
        """Whether its supervisor has not said otherwise; in a forked child this makes an owner."""
        with self._lock:
            if self._is_over:
                return False
            if self._link is None and not self._rejoin():
                return False
            assert self._link is not None
            with contextlib.suppress(OSError):
                try:
                    self._link.recv(1, socket.MSG_PEEK)  # Its report, or its end.
                except BlockingIOError:
                    return not self._received
            return False

    def lived_s(self) -> float:
        """Return how long ago it became ready; 0 if it never was."""
        return 0.0 if self._ready_at_s is None else time.monotonic() - self._ready_at_s

    def wait_until_ready(
        self, deadline_s: float, start_timeout_s: float, models: list[str]
    ) -> bool:
        """Wait until the models are loaded.

        Returns:
            False when it died instead.
        """
        if self._ready_at_s is None and (link := self._link) is not None:
            message = self._read_message(link, _left_s(deadline_s)) or {}
            self._report = message.get("report")
            self._note_if_ready(message)
        if self._ready_at_s is not None:
            return True
        if self._report is not None or time.monotonic() < deadline_s:
            return False
        report = self.end()
        raise ServerStartError(
            f"the embedded server was not ready after {start_timeout_s:g} s, loading "
            f"{', '.join(models)}. Allow more time with start_timeout_s=.",
            url=self.facts.url,
            log_tail=report["log_tail"],
        )

    def wait(self) -> None:
        """Return when it has ended."""
        while self.is_alive():
            link = self._link
            if link is not None:
                poll = select.poll()
                poll.register(link, select.POLLIN)
                poll.poll(1000)

    def drain(self) -> None:
        """Have it end once its requests have, and return then."""
        if (link := self._link) is not None:
            with contextlib.suppress(OSError):
                link.send(supervisor.DRAIN, socket.MSG_NOSIGNAL)
        self.wait()

    def end(self) -> supervisor.Report:
        """Drop the reference. If it was the last, return the report once the server is gone."""
        with self._lock:
            self._is_over = True
            if (link := self._take_link()) is not None:
                with contextlib.suppress(OSError):
                    link.shutdown(socket.SHUT_WR)
                self._await_end(link)
                link.close()
            return self._report or {"exit_code": None, "log_tail": "", "problem": ""}

    def _leave_to_parent(self) -> None:
        """Drop the parent's connection and process, in a forked child."""
        self._lock = threading.RLock()
        self._process = None
        if (link := self._take_link()) is not None:
            link.close()

    def _take_link(self) -> socket.socket | None:
        link, self._link = self._link, None
        return link

    def _handshake(self, link: socket.socket, timeout_s: float, stderr: int | None = None) -> Facts:
        self._link = link
        weakref.finalize(self, link.close)
        message = self._read_message(link, timeout_s)
        if message is not None and "server" in message:
            self._note_if_ready(message)
            return Facts(**message["server"])
        if message is not None and "report" in message:
            self._report = message["report"]
            self.end()
            raise make_start_error(message["report"], None)
        said = b""
        if self._process is None:
            self._is_over = True
            self._take_link()
            link.close()  # Without waiting for a report: it is stopped, perhaps.
        else:
            self._process.kill()
            if stderr is not None:
                size = os.fstat(stderr).st_size
                said = os.pread(stderr, _MESSAGE_CHARS, max(size - _MESSAGE_CHARS, 0))
            self.end()
        words = said.decode("utf-8", "replace") or f"no word within {timeout_s:.3g} s"
        raise ServerStartError(
            f"the supervisor of the embedded server does not answer: {words}. {OTHER_WAY}"
        )

    def _note_if_ready(self, message: dict[str, Any]) -> None:
        if message.get("is_ready"):
            self._ready_at_s = time.monotonic()

    def _rejoin(self) -> bool:
        """Become an owner of one's own, in a forked child."""
        try:
            self.facts = self._handshake(sharing.connect(self._folder), _HANDSHAKE_TIMEOUT_S)
        except (OSError, ServerStartError):
            self._is_over = True
            return False
        return True

    def _await_end(self, link: socket.socket) -> None:
        """Read the report, clean up after a supervisor that sends none, collect it."""
        if self._report is None:
            message = self._read_message(link, _END_TIMEOUT_S)
            if message is not None and "is_ready" in message:  # It became so a moment ago.
                message = self._read_message(link, _END_TIMEOUT_S)
            if message is not None and "report" not in message:
                return  # Others own it still.
            if message is None:
                if self._process is not None:
                    self._process.kill()
                sharing.remove_dead_server(self._folder)
                if self._process is None:
                    return  # It is dead, or stopped and not ours to kill.
            else:
                self._report = message["report"]
        link.settimeout(_END_TIMEOUT_S)
        with contextlib.suppress(OSError):
            while link.recv(65536):  # It closes the connection as it ends.
                pass
        if self._process is not None:
            self._process.wait(_END_TIMEOUT_S)

    def _read_message(self, link: socket.socket, timeout_s: float) -> dict[str, Any] | None:
        """Read one line of JSON; None at the end, or when none comes in time."""
        deadline_s = time.monotonic() + timeout_s
        try:
            while b"\n" not in self._received:
                link.settimeout(_left_s(deadline_s))
                part = link.recv(65536)
                if not part:
                    return None
                self._received += part
            line, _, self._received = self._received.partition(b"\n")
            message: dict[str, Any] = json.loads(line)
        except (OSError, ValueError):
            return None
        finally:
            # Not MSG_DONTWAIT for a look that must not wait: sockets of gevent's would.
            with contextlib.suppress(OSError):
                link.setblocking(False)
        return message


_supervisors: list[_Process] = []
"""Those that this process started and that may live: others may own their servers."""
fork.in_child(_supervisors.clear)


def launch(home: Home, job: supervisor.Job, deadline_s: float, start_timeout_s: float) -> Run:
    """Start a supervisor with its server; this process is the first owner.

    Raises:
        ServerStartError: it does not start, or does not answer in time.
    """
    _supervisors[:] = [process for process in _supervisors if not process.has_ended()]
    ours, its = socket.socketpair()
    # Not a pipe, whose end nobody sees while somebody else has it open.
    stderr = os.memfd_create("clip_rt")
    try:
        with its:
            process = _spawn(
                [str(home.python), "-I", "-S", supervisor.__file__, job["folder"]],
                its.fileno(),
                2 if job["shows_log"] else stderr,
            )
        _supervisors.append(process)
        ours.settimeout(_left_s(deadline_s))
        # Else it has ended already, and its standard error says why, or it will not answer either.
        with contextlib.suppress(OSError):
            ours.sendall(json.dumps(job).encode() + b"\n")
        return Run(ours, Path(job["folder"]), process, stderr=stderr, deadline_s=deadline_s)
    except OSError as error:
        ours.close()
        raise ServerStartError(
            f"the supervisor did not start: {error}. {find_way_out(str(error))}"
        ) from error
    except ServerStartError as error:
        if time.monotonic() < deadline_s:
            raise
        raise ServerStartError(
            f"the embedded server was not ready after {start_timeout_s:g} s, in which its "
            "supervisor has not said a word. Allow more time with start_timeout_s=."
        ) from error
    finally:
        os.close(stderr)


def _left_s(deadline_s: float) -> float:
    """Return the time left, as a socket takes it: neither 0, which is not to wait, nor infinity."""
    return min(max(deadline_s - time.monotonic(), 0.001), _MAX_WAIT_S)


def make_start_error(report: supervisor.Report, url: str | None) -> ServerStartError:
    """Make the error that says why a server did not start."""
    return ServerStartError(
        f"the embedded server did not start: {find_cause(report)}",
        url=url,
        log_tail=report["log_tail"],
    )


def find_cause(report: supervisor.Report) -> str:
    """Pick the reason out of a report, with the way out."""
    if report["problem"]:
        return _with_way_out(report["problem"])
    log_tail = report["log_tail"]
    failures = {
        name: reason.partition(r"\n\nAt:")[0].rstrip('"')
        for name, reason in re.findall(r"failed to load '([^']+)' version \d+: (.*)", log_tail)
    }
    if failures:
        reasons = "; ".join(f"model {name!r}: {reason}" for name, reason in failures.items())
        return _with_way_out(reasons, default="Export it again, or remove its folder.")
    # Triton says on every machine without a GPU that it has no driver.
    lines = re.findall(r"^(?:E\d{4} .*?\] |error: )(?!.*CudaDriverHelper)(.*)", log_tail, re.M)
    if lines and lines[-1] == supervisor.STUB_ENDED:
        # Why, it or the shell that started it says in no form of Triton's.
        words = re.findall(r"^(?![IWEF]\d{4} |error: |[|+]|\s*$)(.*)", log_tail, re.M)
        lines.append(": ".join([lines[-1], *words[-1:]]))
    lines = lines or re.findall(r"^  what\(\):  (.*)", log_tail, re.M)
    exit_code = report["exit_code"]
    if not lines and exit_code is not None and exit_code < 0:
        name = next((each.name for each in signal.Signals if each == -exit_code), "a signal")
        return _SIGNALS.get(name, f"it was ended by {name}. {OTHER_WAY}")
    lines = lines or log_tail.strip().splitlines() or ["it ended without a word"]
    return _with_way_out(lines[-1])


def _with_way_out(fault: str, *, default: str = OTHER_WAY) -> str:
    return f"{fault[:_MESSAGE_CHARS].rstrip('.')}. {find_way_out(fault, default=default)}"
