"""Servers that are killed, drained and started again while a client calls them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.hosts import Host
from clip_rt.embedded.bundled import find_model_repository

START_TIMEOUT_S = 300.0
"""A model that was not served before is measured first."""
DRAIN_TIMEOUT_S = 60.0
POLL_S = 0.1


def find_server(port: int) -> int | None:
    """Return the process id of the tritonserver that was told to listen on a port."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        is_server = Path(command[0]).name == "tritonserver"
        if is_server and f"--grpc-port={port}" in command:
            return int(process.pid)
    return None


def find_children(parent: int) -> list[int]:
    """Return the process ids of the children of a process; none of one that has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(parent).children()]
    return []


def kill(pid: int | None) -> None:
    """Kill a process, if it is still there."""
    if pid is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()


def port_of(url: str) -> int:
    """Return the port of host:port."""
    return int(url.rpartition(":")[2])


class Replica:
    """`python -m clip_rt serve` on a port of its own.

    Args:
        name: For people.
        log: Where its output goes.
        repository: What it serves; the bundled model without it.
        host: Where it runs.
    """

    def __init__(
        self, name: str, log: Path, repository: Path | None = None, host: Host | None = None
    ) -> None:
        self.name = name
        self.host = host or Host()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"{self.host.address}:{self.port}"
        self.exit_codes: list[int] = []
        """Of drains."""
        self._log = log
        self._repository = repository or find_model_repository()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it can be called.

        Raises:
            RuntimeError: it cannot.
        """
        command = [*self.host.prefix, sys.executable, "-m", "clip_rt", "serve"]
        command += ["--port", str(self.port), "--repository", str(self._repository)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._is_listening():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                tail = self._log.read_text("utf-8", "replace")[-2000:]
                raise RuntimeError(f"{self.name} does not start: {tail}")
            time.sleep(POLL_S)

    def kill(self) -> None:
        """End both of its processes at once, the server and the one that runs it."""
        assert self._process is not None
        kill(find_server(self.port))
        self._process.kill()
        self._process.wait()

    def drain(self) -> None:
        """Ask it to end what it has begun, and wait for that.

        Raises:
            RuntimeError: it does not end.
        """
        assert self._process is not None
        self._process.terminate()
        try:
            self.exit_codes.append(self._process.wait(DRAIN_TIMEOUT_S))
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{self.name} does not end: {error}") from error

    def close(self) -> None:
        """End it, whatever it does."""
        if self._process is not None:
            self.kill()

    def _is_listening(self) -> bool:
        """Whether its port answers, which Triton opens once its models are loaded.

        Asked without a client, whose descriptors and memory would be counted.
        """
        if not self.host.is_here:
            return _is_listening_in(self.host, self.port)
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def _is_listening_in(host: Host, port: int) -> bool:
    """Whether somebody listens on a port of a host's loopback: a relay takes any connection."""
    code = f"import socket; socket.create_connection(('127.0.0.1', {port}))"
    done = subprocess.run([*host.prefix, sys.executable, "-c", code], capture_output=True)
    return done.returncode == 0


@contextmanager
def replicas(folder: Path) -> Iterator[tuple[Replica, Replica]]:
    """Yield two running replicas."""
    one, other = (Replica(name, folder / f"{name}.log") for name in ("replica 1", "replica 2"))
    try:
        one.start()
        other.start()
        yield one, other
    finally:
        one.close()
        other.close()
