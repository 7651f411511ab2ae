"""Run one server for as long as its owner lives; a process of its own, standard library only.

In: one line of JSON on standard input, which the owner then holds open, and a byte once the server
is ready. Out, once the server has ended: one line of JSON on standard output. When standard input
closes, because the owner closed it or ended in whatever way, the server is killed and what it used
is removed: its processes, its folder and its entries in /dev/shm. The same when one of its own
processes dies: Triton 2.51 would never replace it, and answer every request with an error.

A pipe, because the kernel closes it on any end of the owner. PR_SET_PDEATHSIG would not do for the
owner: it fires when the thread ends that started the server. Run as `python -I -S supervisor.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

LOG_BYTES = 64 * 1024
"""How much of the end of the server's log is kept."""
REAP_TIMEOUT_S = 2.0
SHARED_MEMORY = Path("/dev/shm")

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Job(TypedDict):
    """What the owner asks for."""

    command: list[str]
    environment: dict[str, str]
    folder: str
    """Made here with mode 0700, so that none is left when the owner dies before we start."""
    files: dict[str, str]
    """Content of small files, by their path in the folder."""
    links: dict[str, str]
    """Targets of symbolic links, by their path in the folder."""
    shared_memory_prefix: str


class Report(TypedDict):
    """How the server ended."""

    exit_code: int | None
    """As in subprocess; None when it was never started."""
    log_tail: str
    problem: str
    """What kept the server from being started, or nothing."""


def main() -> None:
    """Read the job, supervise it to its end, report."""
    job: Job = json.loads(_read_line())
    report: Report = {"exit_code": None, "log_tail": "", "problem": ""}
    try:
        with _wakeups() as wakeup:
            _furnish(job)
            _run(job, report, wakeup)
    except OSError as error:
        report["problem"] = f"{type(error).__name__}: {error}"
    finally:
        remove_leftovers(job["folder"], job["shared_memory_prefix"])
    # The owner may be gone; then nobody minds.
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(report).encode() + b"\n")


def remove_leftovers(folder: str, shared_memory_prefix: str) -> None:
    """Remove the folder and the entries in /dev/shm that a server has left behind."""
    shutil.rmtree(folder, ignore_errors=True)
    for entry in SHARED_MEMORY.glob(f"{shared_memory_prefix}*"):
        with contextlib.suppress(OSError):
            entry.unlink()


def _read_line() -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 65536)
        if not part:
            sys.exit(0)  # The owner ended before it said what to do.
        line += part
    return line


@contextlib.contextmanager
def _wakeups() -> Iterator[int]:
    """Yield a descriptor that becomes readable when a child ends or someone asks us to stop."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    yield reader


def _furnish(job: Job) -> None:
    folder = Path(job["folder"])
    folder.mkdir(mode=0o700)
    for name, content in job["files"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, "utf-8")
    for name, target in job["links"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)


def _run(job: Job, report: Report, wakeup: int) -> None:
    _control_process(_PR_SET_CHILD_SUBREAPER, 1)
    log = bytearray()
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
        _wait(server, wakeup, output, log)
    finally:
        _kill_group(server)
        _drain(output, log)
        report["exit_code"] = server.returncode
        report["log_tail"] = log.decode("utf-8", "replace")


def _wait(server: subprocess.Popen[bytes], wakeup: int, output: int, log: bytearray) -> None:
    """Return when the server is no use any more, the owner is gone, or a signal asks us to stop."""
    watched = {0, wakeup, output}
    stubs: set[int] = set()
    while True:
        readable, _, _ = select.select(watched | stubs, (), ())
        if output in readable and not _drain(output, log):
            watched.discard(output)
        if stubs & set(readable):
            log += b"error: a process of the python backend died\n"
            return
        if 0 in readable:
            if not os.read(0, 4096):
                return
            stubs = _watch_group(server.pid)
        if wakeup in readable:
            numbers = os.read(wakeup, 4096)
            if server.poll() is not None or set(numbers) - {signal.SIGCHLD}:
                return


def _watch_group(leader: int) -> set[int]:
    """Open a descriptor for each other process of the server, which is readable when it ends."""
    descriptors = set()
    for path in Path("/proc").glob("[0-9]*"):
        # Any of them may end while we look; before Linux 5.3 there are no such descriptors.
        with contextlib.suppress(OSError, AttributeError):
            group = int((path / "stat").read_text().rpartition(")")[2].split()[2])
            if group == leader != int(path.name):
                descriptors.add(os.pidfd_open(int(path.name)))
    return descriptors


def _drain(output: int, log: bytearray) -> bool:
    """Move what the server printed into the log; False at the end of its output."""
    while True:
        try:
            part = os.read(output, 65536)
        except BlockingIOError:
            return True
        if not part:
            return False
        log += part
        del log[:-LOG_BYTES]


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
