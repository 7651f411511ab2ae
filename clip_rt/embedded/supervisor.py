"""The supervisor: the process between a server and its owners; standard library only.

In: one line of JSON, the `Job`, on standard input, a socket whose other end is the first owner.
Every further owner connects to the socket in the server's folder. Each is told what the `Job` has
for owners, when the server is ready, and what became of it. Connections are the reference count:
the kernel closes one on any end of its process. When the last is gone the server is killed and what
it used is removed: its processes, its folder and its entries in /dev/shm. The same when one of its
own processes dies: Triton 2.51 would never replace it, and answer every request with an error.

PR_SET_PDEATHSIG would not do for owners: it fires when the thread ends that started the server.
Run as `python -I -S supervisor.py FOLDER`; the folder is named for those who look at processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

LOG_BYTES = 64 * 1024
"""How much of the end of the server's log is kept."""
REPORT_BYTES = 128 * 1024
"""Longest report: the buffer of a socket takes 208 KiB on Linux while nobody reads it."""
REAP_TIMEOUT_S = 2.0
DRAIN_TIMEOUT_S = 30.0
"""How long requests under way may take to end when a server is drained."""
SHARED_MEMORY = Path("/dev/shm")
ENVIRONMENTS = Path("/tmp")
"""Where the python backend makes a folder for packed environments, wherever TMPDIR is."""
SOCKET = "owners"
"""Name of the socket in the server's folder."""
DRAIN = b"d"
"""What an owner may say: let requests end, and then the server."""
STARTED = b"Started GRPCInferenceService at "
"""What Triton 2.51 logs once the models are loaded and the port is its own."""
STUB_ENDED = "a process of the python backend ended before its model was loaded"
"""What the log says then: Triton 2.51 itself would wait for it for ever."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_IN_CREATE = 0x100
_HEALTH_CHECK_S = 0.25
"""How often the processes of a server that is not ready yet are checked."""
_MAX_ZOMBIE_CHECKS = 6
"""Checks in a row that find a process ended and not collected, which Triton does at once. Checks,
not seconds: where we get no time on a processor, neither does Triton."""
_UNLOAD_TIMEOUT_S = 5.0
"""Triton's own time to unload its models, once the last request has ended."""
_RESTORE_TRIES = 50
"""Another supervisor may be about to remove what we make."""
_LOCK_TIMEOUT_S = 0.1
"""For another that ends as we do; who starts a server removes the folder itself if need be."""
_BACKLOG = 1024


class Job(TypedDict):
    """What the first owner asks for."""

    command: list[str]
    environment: dict[str, str]
    folder: str
    """Made here with mode 0700, so that none is left when the owner dies before we start."""
    files: dict[str, str]
    """Content of small files, by their path in the folder."""
    links: dict[str, str]
    """Targets of symbolic links, by their path in the folder."""
    copies: dict[str, str]
    """Executable files that the server may change, by their path in the folder."""
    shared_memory_prefix: str
    for_owners: dict[str, Any]
    """What each owner is told when it connects."""
    shows_log: bool
    """Whether the server's log goes to standard error as well."""


class Report(TypedDict):
    """How the server ended."""

    exit_code: int | None
    """As in subprocess; None when it was never started."""
    log_tail: str
    problem: str
    """What kept the server from being started, or nothing."""


def main() -> None:
    """Read the job, supervise it to its end, report."""
    _detach_from_owner()
    first = socket.socket(fileno=os.dup(0))
    job: Job = json.loads(_read_line(first))
    folder = Path(job["folder"])
    report: Report = {"exit_code": None, "log_tail": "", "problem": ""}
    owners = {first}
    try:
        supervisor = _Supervisor(job, owners)  # From here on a signal ends us in order.
        folder.mkdir(mode=0o700)
        # Locked while we live: who can lock it knows that we are dead.
        lock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
        _fill_folder(folder, job)
        supervisor.run(report)
    except OSError as error:
        report["problem"] = f"{type(error).__name__}: {error}"
    finally:
        remove_leftovers(job["folder"], job["shared_memory_prefix"])
    _shorten(report)
    for owner in owners:
        tell(owner, {"report": report})
    # Their connections close as we end, and then nothing is left.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if lock(descriptor, timeout_s=_LOCK_TIMEOUT_S):  # Else somebody starts a server in it.
            folder.parent.rmdir()


def tell(peer: socket.socket, message: dict[str, Any]) -> None:
    """Send one line of JSON; a peer that is gone or does not read misses it."""
    with contextlib.suppress(OSError):
        peer.send(_to_line(message), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def lock(descriptor: int, *, timeout_s: float = 0.0, is_shared: bool = False) -> bool:
    """Lock an open file or folder until it is closed; False when somebody else has it.

    Raises:
        OSError: its file system has no locks.
    """
    # Here, because this module is imported where fcntl does not exist, to say so.
    import fcntl

    kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(0.01)
        else:
            return True


def remove_leftovers(folder: str, shared_memory_prefix: str) -> None:
    """Remove the folder and the entries in /dev/shm that a server has left behind."""
    for entry in SHARED_MEMORY.glob(f"{shared_memory_prefix}*"):
        with contextlib.suppress(OSError):
            entry.unlink()
    # Last, because it is by the folder that leftovers are found.
    shutil.rmtree(folder, ignore_errors=True)


def _detach_from_owner() -> None:
    """Leave the working folder and the open files of the first owner, which we may outlive."""
    os.chdir("/")
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # The list itself.
                os.close(int(name))


def _read_line(first: socket.socket) -> bytes:
    with first.makefile("rb") as file:
        line = file.readline()  # Owners say no more before they are answered.
    if not line.endswith(b"\n"):
        sys.exit(0)  # The owner ended before it said what to do.
    return line


def _to_line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _shorten(report: Report) -> None:
    """Drop the begin of the log until the report fits into the buffer of a socket.

    Owners that only hold the connection read it when they next look, long after we have ended; and
    as JSON a byte that is no text takes up to six.
    """
    while report["log_tail"] and len(_to_line({"report": report})) > REPORT_BYTES:
        report["log_tail"] = report["log_tail"][len(report["log_tail"]) // 8 + 1 :]


def _fill_folder(folder: Path, job: Job) -> None:
    for name in (*job["files"], *job["links"], *job["copies"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name, content in job["files"].items():
        (folder / name).write_text(content, "utf-8")
    for name, target in job["links"].items():
        (folder / name).symlink_to(target)
    for name, source in job["copies"].items():
        _copy_executable(Path(source), folder / name)


def _copy_executable(source: Path, copy: Path) -> None:
    """Copy a file to where it can be executed, even if the disk of the copy is mounted noexec."""
    if not os.statvfs(copy.parent).f_flag & os.ST_NOEXEC:
        shutil.copyfile(source, copy)
        copy.chmod(0o700)
        return
    # A file in memory belongs to no mount. It lives as long as we do.
    with source.open("rb") as original, open(os.memfd_create(copy.name), "wb") as file:
        shutil.copyfileobj(original, file)
        os.fchmod(file.fileno(), 0o700)
        # What is open for writing cannot be executed.
        descriptor = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
    copy.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")


class _Supervisor:
    """Runs a server until it fails, has no owner, or a signal asks us to stop.

    `owners` are connections; those that are left in it at the end await the report.
    """

    def __init__(self, job: Job, owners: set[socket.socket]) -> None:
        self._job = job
        self._owners = owners
        self._log = bytearray()
        self._shows_log = job["shows_log"]
        self._is_ready = False
        self._drain_deadline_s: float | None = None
        self._next_check_s = 0.0
        self._zombie_checks: dict[int, int] = {}
        """In how many checks in a row a child of the server was a zombie, by its process id."""
        self._wakeup = _open_wakeup()
        self._environments = _Environments()
        self._selector = selectors.DefaultSelector()

    def run(self, report: Report) -> None:
        """Start the server, return when it has ended, and write down how it did."""
        _call_libc("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        with _listen(self._job["folder"]) as self._listener:
            self._server = subprocess.Popen(
                self._job["command"],
                env=self._job["environment"],
                cwd=self._job["folder"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_supervisor,
            )
            assert self._server.stdout is not None
            self._output = self._server.stdout.fileno()
            os.set_blocking(self._output, False)
            try:
                self._watch()
            finally:
                _kill_group(self._server)
                self._environments.remove()
                self._read_log()
                report["exit_code"] = self._server.returncode
                report["log_tail"] = self._log.decode("utf-8", "replace")

    def _watch(self) -> None:
        for each in (self._listener, self._wakeup, self._output):
            self._selector.register(each, selectors.EVENT_READ)
        for owner in self._owners:
            self._send_handshake(owner)
        while self._drain_deadline_s is None or time.monotonic() < self._drain_deadline_s:
            if not self._is_ready and self._has_lost_a_child():
                self._read_log()
                self._add_to_log(f"error: {STUB_ENDED}\n".encode())
                return
            # A server that is ready costs nothing: all there is to notice wakes us.
            is_polled = not self._is_ready or self._drain_deadline_s is not None
            for key, _ in self._selector.select(_HEALTH_CHECK_S if is_polled else None):
                if not self._handle(key.fileobj):
                    return

    def _handle(self, readable: object) -> bool:
        """Handle an event; False when the server is to end."""
        if readable == self._output:
            if not self._read_log():
                self._selector.unregister(self._output)
            if not self._is_ready and STARTED in self._log:
                self._note_ready()
        elif readable == self._wakeup:
            if set(os.read(self._wakeup, 4096)) - {signal.SIGCHLD}:
                return False
            # Left to be collected, so that its number stays its own.
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._server.pid, options) is None
        elif readable is self._listener:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                owner, _ = self._listener.accept()
                self._owners.add(owner)
                self._send_handshake(owner)
        elif isinstance(readable, socket.socket):
            return self._receive(readable)
        elif self._drain_deadline_s is None:
            self._add_to_log(b"error: a process of the python backend died\n")
            return False
        else:
            self._selector.unregister(readable)  # type: ignore[arg-type]
        return True

    def _send_handshake(self, owner: socket.socket) -> None:
        self._selector.register(owner, selectors.EVENT_READ)
        tell(owner, {"server": self._job["for_owners"], "is_ready": self._is_ready})

    def _receive(self, owner: socket.socket) -> bool:
        """Read what an owner says; False when it was the last and has left."""
        try:
            words = owner.recv(4096)
        except ConnectionError:
            words = b""
        if not words:
            self._selector.unregister(owner)
            if len(self._owners) == 1:
                return False  # It hears the report, if it still listens.
            self._owners.discard(owner)
            tell(owner, {})
            owner.close()
        elif self._drain_deadline_s is None:
            self._is_ready = True
            self._drain_deadline_s = time.monotonic() + DRAIN_TIMEOUT_S + _UNLOAD_TIMEOUT_S
            self._environments.restore()
            self._server.terminate()
        return True

    def _note_ready(self) -> None:
        """From now on watch the processes of the models as well."""
        self._is_ready = True
        self._environments.remove()
        for pid, _, _ in _list_group(self._server.pid):
            # It may end while we look; before Linux 5.3 there are no such descriptors.
            with contextlib.suppress(OSError, AttributeError):
                self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ)
        for owner in self._owners:
            tell(owner, {"is_ready": True})

    def _has_lost_a_child(self) -> bool:
        """Whether a child of the server has ended for good, and the server goes on without it."""
        if time.monotonic() < self._next_check_s:
            return False
        self._zombie_checks = {
            pid: self._zombie_checks.get(pid, 0) + 1
            for pid, state, parent in _list_group(self._server.pid)
            if state == "Z" and parent == self._server.pid
        }
        self._next_check_s = time.monotonic() + _HEALTH_CHECK_S
        return any(checks >= _MAX_ZOMBIE_CHECKS for checks in self._zombie_checks.values())

    def _read_log(self) -> bool:
        """Move what the server printed into the log; False at the end of its output."""
        while True:
            try:
                part = os.read(self._output, 65536)
            except BlockingIOError:
                return True
            if not part:
                return False
            self._add_to_log(part)

    def _add_to_log(self, part: bytes) -> None:
        self._log += part
        del self._log[:-LOG_BYTES]
        while self._shows_log and part:
            try:
                part = part[os.write(2, part) :]
            except OSError:
                self._shows_log = False  # Nobody reads it any more.


def _open_wakeup() -> int:
    """Return a descriptor that becomes readable when a child ends or a signal asks us to stop."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reader


@contextlib.contextmanager
def _listen(folder: str) -> Iterator[socket.socket]:
    """Listen where further owners connect, until the server is ended."""
    # A path by way of a descriptor: the folder's own may be longer than a socket's may be.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{descriptor}/{SOCKET}")
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        yield listener
    os.close(descriptor)


def _list_group(leader: int) -> Iterator[tuple[int, str, int]]:
    """Yield the id, the state and the parent of each other process of the server."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # Any of them may end while we look.
            # Its name comes before, in parentheses, and may be any bytes.
            fields = (path / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[2]) == leader != int(path.name):
                yield int(path.name), fields[0].decode(), int(fields[1])


def _kill_group(server: subprocess.Popen[bytes]) -> None:
    """Kill the server with its stubs and collect them.

    Without a SIGTERM first: nobody is left to take an answer, there is nothing to save, and Triton
    2.51 takes 2 s to end by itself.
    """
    deadline_s = time.monotonic() + REAP_TIMEOUT_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    # The stubs are our children now, as we are the subreaper.
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline_s:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.01)


class _Environments:
    """The folder in /tmp that Triton makes for packed environments, whether it has any or not.

    It leaves its folder behind when it is killed, so we remove it while it is empty. Asked to end,
    Triton deletes it itself, and aborts if it is not there, so we restore it before.

    Which one is its own nobody can tell if several servers start at once: each supervisor treats
    all that were made meanwhile as its own, and none removes one that another has restored, as it
    holds a file. The kernel tells their names: one may be gone again before we look.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._events = _call_libc("inotify_init1", os.O_NONBLOCK | os.O_CLOEXEC)
        _call_libc("inotify_add_watch", self._events, os.fsencode(ENVIRONMENTS), _IN_CREATE)

    def remove(self) -> None:
        """Remove those that are empty."""
        if not self._names:
            self._names = self._read_names()
        for folder in (ENVIRONMENTS / name for name in self._names):
            with contextlib.suppress(OSError):
                if _is_own(folder):
                    (folder / str(os.getpid())).unlink(missing_ok=True)
                    folder.rmdir()

    def restore(self) -> None:
        """Make those anew that were removed."""
        for folder in (ENVIRONMENTS / name for name in self._names):
            for _ in range(_RESTORE_TRIES):
                with contextlib.suppress(OSError):
                    with contextlib.suppress(FileExistsError):
                        folder.mkdir(mode=0o700)
                    if _is_own(folder):
                        (folder / str(os.getpid())).touch()
                    break

    def _read_names(self) -> set[str]:
        """Return which were made since the start. Source: inotify(7), `struct inotify_event`."""
        events = b""
        with contextlib.suppress(OSError):
            while True:
                events += os.read(self._events, 65536)
        return {name.decode() for name in re.findall(rb"\0(python_env_[A-Za-z0-9]{6})\0", events)}


def _is_own(folder: Path) -> bool:
    """Whether it is a folder and this user's.

    Raises:
        OSError: it does not exist.
    """
    found = folder.stat(follow_symlinks=False)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _die_with_supervisor() -> None:
    """Run in the new process: should we be killed ourselves, the kernel kills the server."""
    _call_libc("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _call_libc(function: str, *arguments: Any) -> int:
    """Call the C library; -1 when it fails, or in a Python without ctypes."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        return int(getattr(ctypes.CDLL(None), function)(*arguments))
    return -1


if __name__ == "__main__":
    main()
