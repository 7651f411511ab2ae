"""The process between owners and a server; standard library only.

In: one line of JSON, the `Job`, on standard input, a socket whose other end is the first owner.
Every further owner connects to the socket in the server's folder. Each is told what the `Job` has
for owners, and what became of the server once that has ended. A connection is all that makes an
owner: the kernel closes it on any end of its process. When the last one is gone the server is
killed and what it used is removed: its processes, its folder and its entries in /dev/shm. The same
when one of its own processes dies: Triton 2.51 would never replace it, and answer every request
with an error.

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
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

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
IS_READY, DRAIN = b"r", b"d"
"""What an owner may say: the models are loaded; let requests end, and then the server."""
STUB_ENDED = "a process of the python backend ended before its model was loaded"
"""What the log says then: Triton 2.51 itself would wait for its word for ever."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_IN_CREATE = 0x100
_CHECK_S = 0.25
"""How often the processes of a server that is not ready yet are looked at."""
_MAX_LOOKS = 6
"""Looks in a row at a process that has ended and that Triton has not collected, which it does at
once. Looks, not seconds: where we get no time on a processor, neither does Triton."""
_DRAIN_EXTRA_S = 5.0
"""Triton's own time to unload its models, once the last request has ended."""
_PUT_BACK_TRIES = 50
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
    _let_go_of_owner()
    first = socket.socket(fileno=os.dup(0))
    job: Job = json.loads(_read_line(first))
    report: Report = {"exit_code": None, "log_tail": "", "problem": ""}
    owners = {first}
    try:
        with _wakeups() as wakeup, _hold(job["folder"]):
            _furnish(job)
            _run(job, report, wakeup, owners)
    except OSError as error:
        report["problem"] = f"{type(error).__name__}: {error}"
    finally:
        remove_leftovers(job["folder"], job["shared_memory_prefix"])
    _shorten(report)
    for owner in owners:
        tell(owner, {"report": report})
    # Their connections close as we end, and then nothing is left.
    _remove_parent(Path(job["folder"]).parent)


def _let_go_of_owner() -> None:
    """Leave the working folder and the open files of the first owner, which we may outlive."""
    os.chdir("/")
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # The list itself.
                os.close(int(name))


def tell(peer: socket.socket, message: dict[str, Any]) -> None:
    """Send one line of JSON; a peer that is gone or does not read misses it."""
    with contextlib.suppress(OSError):
        peer.send(_to_line(message), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _to_line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _shorten(report: Report) -> None:
    """Drop the begin of the log until the report fits into the buffer of a socket.

    Owners that only hold the connection read it when they next look, long after we have ended; and
    as JSON a byte that is no text takes up to six.
    """
    while report["log_tail"] and len(_to_line({"report": report})) > REPORT_BYTES:
        report["log_tail"] = report["log_tail"][len(report["log_tail"]) // 8 + 1 :]


def lock(descriptor: int) -> bool:
    """Lock an open file or folder until it is closed; False when somebody else has it.

    Raises:
        OSError: its file system has no locks.
    """
    # Here, because this module is imported where fcntl does not exist, to say so.
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_leftovers(folder: str, shared_memory_prefix: str) -> None:
    """Remove the folder and the entries in /dev/shm that a server has left behind."""
    for entry in SHARED_MEMORY.glob(f"{shared_memory_prefix}*"):
        with contextlib.suppress(OSError):
            entry.unlink()
    # Last, because it is by the folder that leftovers are found.
    shutil.rmtree(folder, ignore_errors=True)


def _read_line(first: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = first.recv(65536)
        if not part:
            sys.exit(0)  # The owner ended before it said what to do.
        line += part
    return line


@contextlib.contextmanager
def _wakeups() -> Iterator[int]:
    """Yield a descriptor that becomes readable when a child ends or someone asks us to stop."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    yield reader


@contextlib.contextmanager
def _hold(folder: str) -> Iterator[None]:
    """Make the folder and lock it: who can lock it later knows that we are dead."""
    Path(folder).mkdir(mode=0o700)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _furnish(job: Job) -> None:
    folder = Path(job["folder"])
    for name, content in job["files"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, "utf-8")
    for name, target in job["links"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
    for name, source in job["copies"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
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


def _run(job: Job, report: Report, wakeup: int, owners: set[socket.socket]) -> None:
    _control_process(_PR_SET_CHILD_SUBREAPER, 1)
    log = _Log(shows=job["shows_log"])
    with _listen(job["folder"]) as listener, contextlib.closing(_Environments()) as environments:
        server = subprocess.Popen(
            job["command"],
            env=job["environment"],
            cwd=job["folder"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_supervisor,
        )
        assert server.stdout is not None
        output = server.stdout.fileno()
        os.set_blocking(output, False)
        try:
            _Watch(job, server, listener, wakeup, owners, log, environments).wait()
        finally:
            _kill_group(server)
            environments.remove()
            log.drain(output)
            report["exit_code"] = server.returncode
            report["log_tail"] = log.tail.decode("utf-8", "replace")


@contextlib.contextmanager
def _listen(folder: str) -> Iterator[socket.socket]:
    """Listen where further owners connect, until the server is ended."""
    # A path by way of a descriptor: the folder's own may be longer than a socket's may be.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{descriptor}/{SOCKET}")
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        try:
            yield listener
        finally:
            # First of all, so that whoever comes now starts a server of its own.
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(SOCKET, dir_fd=descriptor)
            os.close(descriptor)


class _Log:
    """The end of what the server printed."""

    def __init__(self, *, shows: bool) -> None:
        self.tail = bytearray()
        self._shows = shows

    def add(self, part: bytes) -> None:
        self.tail += part
        del self.tail[:-LOG_BYTES]
        while self._shows and part:
            try:
                part = part[os.write(2, part) :]
            except OSError:
                self._shows = False  # Nobody reads it any more.

    def drain(self, output: int) -> bool:
        """Move what the server printed into the log; False at the end of its output."""
        while True:
            try:
                part = os.read(output, 65536)
            except BlockingIOError:
                return True
            if not part:
                return False
            self.add(part)


class _Watch:
    """Waits until the server is no use any more, has no owner, or a signal asks us to stop."""

    def __init__(
        self,
        job: Job,
        server: subprocess.Popen[bytes],
        listener: socket.socket,
        wakeup: int,
        owners: set[socket.socket],
        log: _Log,
        environments: _Environments,
    ) -> None:
        self._greeting = {"server": job["for_owners"]}
        self._server = server
        self._listener = listener
        self._wakeup = wakeup
        self._owners = owners
        self._log = log
        self._environments = environments
        self._is_ready = False
        self._look_again_at_s = 0.0
        self._uncollected: dict[int, int] = {}
        """In how many looks in a row a child of the server had ended, by its process id."""
        self._drained_by_s: float | None = None
        self._selector = selectors.DefaultSelector()

    def wait(self) -> None:
        assert self._server.stdout is not None
        output = self._server.stdout.fileno()
        for each in (self._listener, self._wakeup, output):
            self._selector.register(each, selectors.EVENT_READ)
        for owner in self._owners:
            self._welcome(owner)
        while self._drained_by_s is None or time.monotonic() < self._drained_by_s:
            if not self._is_ready and self._has_lost_a_child():
                self._log.drain(output)
                self._log.add(f"error: {STUB_ENDED}\n".encode())
                return
            for key, _ in self._selector.select(self._pause_s()):
                readable = key.fileobj
                if readable == output:
                    if not self._log.drain(output):
                        self._selector.unregister(output)
                elif readable == self._wakeup:
                    if self._is_asked_to_end():
                        return
                elif readable is self._listener:
                    self._let_in()
                elif isinstance(readable, socket.socket):
                    if not self._hear(readable):
                        return
                elif self._drained_by_s is None:
                    self._log.add(b"error: a process of the python backend died\n")
                    return
                else:
                    self._selector.unregister(readable)

    def _pause_s(self) -> float | None:
        """Return how long to wait for something to happen before looking for ourselves."""
        if not self._is_ready:
            return _CHECK_S
        # While it drains, once a second is soon enough to notice that its time is up.
        return None if self._drained_by_s is None else 1.0

    def _has_lost_a_child(self) -> bool:
        """Whether a child of the server has ended for good, and the server goes on without it."""
        if time.monotonic() < self._look_again_at_s:
            return False
        self._uncollected = {
            each.pid: self._uncollected.get(each.pid, 0) + 1
            for each in _list_group(self._server.pid)
            if each.state == "Z" and each.parent == self._server.pid
        }
        self._look_again_at_s = time.monotonic() + _CHECK_S
        return any(num_looks >= _MAX_LOOKS for num_looks in self._uncollected.values())

    def _let_in(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            owner, _ = self._listener.accept()
            self._owners.add(owner)
            self._welcome(owner)

    def _welcome(self, owner: socket.socket) -> None:
        self._selector.register(owner, selectors.EVENT_READ)
        tell(owner, self._greeting)

    def _hear(self, owner: socket.socket) -> bool:
        """Heed an owner; False when it was the last and has left."""
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
            return True
        if IS_READY in words and not self._is_ready and self._drained_by_s is None:
            self._is_ready = True
            self._environments.remove()
            for stub in _watch_group(self._server.pid):
                self._selector.register(stub, selectors.EVENT_READ)
        if DRAIN in words and self._drained_by_s is None:
            self._is_ready = True
            self._drained_by_s = time.monotonic() + DRAIN_TIMEOUT_S + _DRAIN_EXTRA_S
            self._environments.put_back()
            self._server.terminate()
        return True

    def _is_asked_to_end(self) -> bool:
        numbers = os.read(self._wakeup, 4096)
        return _has_ended(self._server.pid) or bool(set(numbers) - {signal.SIGCHLD})


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; it is left to be collected, so that its number stays its own."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class _Member(NamedTuple):
    """A process of the server."""

    pid: int
    state: str
    """Z when it has ended and was not collected."""
    parent: int


def _list_group(leader: int) -> Iterator[_Member]:
    """List the other processes of the server."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # Any of them may end while we look.
            # Its name comes before, in parentheses, and may be any bytes.
            fields = (path / "stat").read_bytes().rpartition(b")")[2].split()
            state, parent, group = fields[0].decode(), int(fields[1]), int(fields[2])
            if group == leader != int(path.name):
                yield _Member(int(path.name), state, parent)


def _watch_group(leader: int) -> set[int]:
    """Open a descriptor for each other process of the server, which is readable when it ends."""
    descriptors = set()
    for each in _list_group(leader):
        # It may end while we look; before Linux 5.3 there are no such descriptors.
        with contextlib.suppress(OSError, AttributeError):
            descriptors.add(os.pidfd_open(each.pid))
    return descriptors


def _kill_group(server: subprocess.Popen[bytes]) -> None:
    """Kill the server with its stubs and collect them.

    Without a SIGTERM first: nobody is left to take an answer, there is nothing to save, and Triton
    2.51 takes 2 s to end by itself.
    """
    deadline = time.monotonic() + REAP_TIMEOUT_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    # The stubs are our children now, as we are the subreaper.
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.01)


class _Environments:
    """The folder in /tmp that Triton makes for packed environments, whether it has any or not.

    It leaves its folder behind when it is killed, so we remove it while it is empty. Asked to end,
    Triton deletes it itself, and aborts if it is not there, so we put it back before.

    Which one is its own nobody can tell if several servers start at once: each supervisor treats
    all that were made meanwhile as its own, and none removes one that another has put back, as it
    holds a file.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._is_known = False
        self._since_s = time.time()
        self._events = _watch_folder(ENVIRONMENTS)

    def remove(self) -> None:
        """Remove those that are empty."""
        if not self._is_known:
            self._look()
            self._is_known = True
        for name in self._names:
            with contextlib.suppress(OSError):
                (ENVIRONMENTS / name / str(os.getpid())).unlink(missing_ok=True)
                (ENVIRONMENTS / name).rmdir()

    def put_back(self) -> None:
        """Make those anew that were removed."""
        for folder in (ENVIRONMENTS / name for name in self._names):
            for _ in range(_PUT_BACK_TRIES):
                with contextlib.suppress(OSError):
                    with contextlib.suppress(FileExistsError):
                        folder.mkdir(mode=0o700)
                    if _is_own(folder):
                        (folder / str(os.getpid())).touch()
                    break

    def close(self) -> None:
        """Stop looking."""
        if self._events is not None:
            os.close(self._events)

    def _look(self) -> None:
        """Note which were made since the start."""
        names = _read_created(self._events) if self._events is not None else set()
        for folder in ENVIRONMENTS.glob("python_env_??????"):
            with contextlib.suppress(OSError):
                # The clock of a file system is a little behind.
                if folder.stat(follow_symlinks=False).st_ctime >= self._since_s - 0.1:
                    names.add(folder.name)
        for name in names:
            try:
                is_own = _is_own(ENVIRONMENTS / name)
            except OSError:
                is_own = True  # Another supervisor has removed it already.
            if is_own:
                self._names.add(name)


def _is_own(folder: Path) -> bool:
    """Whether it is a folder and this user's.

    Raises:
        OSError: it does not exist.
    """
    found = folder.stat(follow_symlinks=False)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _watch_folder(folder: Path) -> int | None:
    """Have the kernel note what is made in a folder; None if it does not."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        libc = ctypes.CDLL(None)
        descriptor: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor >= 0:
            if libc.inotify_add_watch(descriptor, os.fsencode(folder), _IN_CREATE) >= 0:
                return descriptor
            os.close(descriptor)
    return None


def _read_created(events: int) -> set[str]:
    """Return the names of the folders for environments that were made meanwhile.

    Source: inotify(7), `struct inotify_event`.
    """
    names = set()
    with contextlib.suppress(BlockingIOError):
        while True:
            part = os.read(events, 65536)
            while part:
                *_, length = struct.unpack_from("iIII", part)
                name, part = part[16 : 16 + length].rstrip(b"\0"), part[16 + length :]
                if re.fullmatch(rb"python_env_[A-Za-z0-9]{6}", name):
                    names.add(name.decode())
    return names


def _remove_parent(folder: Path) -> None:
    """Remove the folder that servers lie in when we were the last, unless somebody starts one."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        while time.monotonic() < deadline:
            if lock(descriptor):
                folder.rmdir()
                return
            time.sleep(0.02)


def _die_with_supervisor() -> None:
    """Run in the new process: should we be killed ourselves, the kernel kills the server."""
    _control_process(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _control_process(option: int, value: int) -> None:
    # A Python without ctypes only loses these second lines of defence.
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
