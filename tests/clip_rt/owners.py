"""Other processes that own a server, and what they may leave behind when they end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import clip_rt
from clip_rt.embedded.server import EmbeddedServer

ROOT = Path(__file__).parents[2]
GONE_WITHIN_S = 5.0


class Owner:
    """Another Python that runs a program and may come to any end."""

    def __init__(self, program: str, *args: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
        self.pid = self.process.pid
        self.helpers: list[int] = []

    def read_line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        self.helpers += find_descendants(self.pid)
        return line

    def go_on(self) -> None:
        """Let a program go on that waits for a line."""
        self.say("")

    def say(self, words: str) -> None:
        """Send a program a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{words}\n")
        self.process.stdin.flush()

    def ask(self, words: str) -> str:
        """Send a program a line, and return the line it answers."""
        self.say(words)
        return self.read_line()

    def hang_up(self) -> None:
        """Close its standard input, for a program that then ends."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdin = None

    def find_remains(self) -> list[str]:
        """Name what is left of its servers: processes, folders, shared memory."""
        return find_remains(self.pid) + [
            f"process {pid}" for pid in self.helpers if is_running(pid)
        ]

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.communicate(timeout=60)


def find_server(client: clip_rt.Client) -> EmbeddedServer:
    """Return a client's reference to its embedded server."""
    connection = client._session.connection
    assert connection is not None
    (replica,) = connection.pool.replicas
    assert isinstance(replica.server, EmbeddedServer)
    return replica.server


def find_remains(owner_pid: int) -> list[str]:
    places = (os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir(), tempfile.gettempdir())
    remains = [
        str(path)
        for place in dict.fromkeys(places)
        for path in Path(place).glob(f"clip_rt*/clip_rt-{owner_pid}-*")
    ]
    remains += [str(path) for path in Path("/dev/shm").glob(f"cliprt_{owner_pid}_*")]
    for pid in list_pids():
        if f"clip_rt-{owner_pid}-" in read_command(pid) and is_running(pid):
            remains.append(f"process {pid}")
    return remains


def wait_until(is_true: Callable[[], object], timeout_s: float = GONE_WITHIN_S) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if is_true():
            return True
        time.sleep(0.05)
    return bool(is_true())


def find_processes(pattern: str, owner_pid: int) -> list[int]:
    """Find running processes of an owner's servers by a part of their command."""
    return [
        pid
        for pid in list_pids()
        if pattern in (command := read_command(pid)) and f"clip_rt-{owner_pid}-" in command
    ]


def find_descendants(pid: int) -> list[int]:
    children_of: dict[int, list[int]] = {}
    for each in list_pids():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            children_of.setdefault(int(fields[1]), []).append(each)
    found, pending = [], [pid]
    while pending:
        children = children_of.get(pending.pop(), [])
        found += children
        pending += children
    return found


def list_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def read_command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    return ""


def is_running(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def is_listening(url: str) -> bool:
    host, port = url.rsplit(":", 1)
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0
