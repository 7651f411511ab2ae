"""A gateway, or the page over it, as a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import httpx
from owners import ROOT


@contextlib.contextmanager
def starting(command: str, *always: object) -> Iterator[Callable[..., Gateway]]:
    """Yield what starts processes with further options; all that it started end with this."""
    started: list[Gateway] = []

    def start(*options: object, **environment: object) -> Gateway:
        started.append(Gateway(*always, *options, command=command, **environment))
        return started[-1]

    yield start
    for each in started:
        each.dispose()


class Gateway:
    """A process that serves HTTP on loopback; `command` is which of ours.

    With `port` one can come back at the address of another.
    """

    def __init__(
        self, *options: object, command: str = "gateway", port: int = 0, **environment: str
    ) -> None:
        self.log: list[str] = []
        program = [sys.executable, "-m", "clip_rt", command, "--port", str(port)]
        self.process = subprocess.Popen(
            [*program, *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        line = self.process.stdout.readline()
        self.url = line.partition(" on ")[2].strip()
        assert self.url, "".join(self.log)

    def _read_log(self) -> None:
        self.log.extend(self.process.stderr)

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False, **options)

    def wait_for(self, words: str, times: int = 1) -> None:
        until_s = time.monotonic() + 60
        while sum(words in line for line in self.log) < times:
            assert time.monotonic() < until_s, "".join(self.log)
            time.sleep(0.05)

    def address(self) -> tuple[str, int]:
        host, _, port = self.url.rpartition("//")[2].rpartition(":")
        return host, int(port)

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=60)

    def dispose(self) -> None:
        self.process.kill()
        self.process.wait(timeout=60)
        self._reader.join(timeout=60)
        self.process.stdout.close()
        self.process.stderr.close()
