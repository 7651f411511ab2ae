"""The handle of a contender that works in a process of its own (`worker`).

A process each, because threads, allocators and garbage of one would be in the way of another's,
and because memory and start-up are to be told apart. Orders go over a pipe and wait for their
answer, so that at most one works at a time. Every wait has a limit, and the process ends with ours.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from benchmarks import findings
from benchmarks.contenders.implementation import UnfitError
from benchmarks.contenders.kit import Kit
from benchmarks.findings import CallKind
from benchmarks.resources import peak_mib

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 300.0
CALL_LIMIT_S = 3600.0
"""The classifier of a peer, 80,000 prompts, takes the better part of an hour."""
END_LIMIT_S = 20.0
LOG_LINES = 12
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
NOT_INHERITED = ("CLIP_RT_CACHE_DIR", "CLIP_RT_URL", "CLIP_RT_REPOSITORY")
"""A contender shall find neither what another run has cached, nor another server."""


class ContenderError(Exception):
    """A contender failed, or took too long; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class LoadResult:
    """What came of a contender under load."""

    latencies_s: list[float]
    """Of the calls that were answered."""
    num_failed: int
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker is to be: all that it is told when it starts."""

    module: str
    """With a function `make(kit, **options)` that returns an Implementation."""
    kit: Kit
    options: dict[str, Any]


class ContenderProcess:
    """A contender in its process, started and ready.

    Args:
        facts: Who it is.
        order: What its process is to be.
        start_limit_s: Longest wait until it is ready.
        call_limit_s: Longest wait for one answer to us.

    Raises:
        UnfitError: it cannot take part here.
        ContenderError: it did not start.
    """

    def __init__(
        self,
        facts: findings.Contender,
        order: Order,
        *,
        start_limit_s: float = START_LIMIT_S,
        call_limit_s: float = CALL_LIMIT_S,
    ) -> None:
        self._facts = facts
        self._call_limit_s = call_limit_s
        self._is_behind = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close().
        self._pipe, theirs = multiprocessing.Pipe()
        environment = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED} | ENVIRONMENT
        start_s = time.perf_counter()
        # Not multiprocessing's own Process: that would import our main module over there, which
        # costs time and memory that are none of the contender's. In a session of its own, so that
        # an interrupt reaches us alone and we end it, and with it whatever it started.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contenders.worker", str(theirs.fileno())],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()
        try:
            self._pipe.send(order)
            self.calls: frozenset[CallKind]
            self.calls, versions = self._receive(start_limit_s, "to start")
            ready_s = time.perf_counter() - start_s
            rss_mib, most_mib = self.memory_mib()
            startup = findings.StartUp(
                ready_s=ready_s,
                first_answer_s=self._ask("first_answer", limit_s=start_limit_s),
                rss_mib=rss_mib,
                peak_rss_mib=most_mib,
            )
            self._facts = replace(facts, versions=versions, startup=startup)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ContenderProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """Which contender it is."""
        return self._facts.name

    @property
    def facts(self) -> findings.Contender:
        """Who it is and how it started; `peak_rss_mib` up to now, or to its end."""
        return self._facts

    def load(self, key: str, call: CallKind, items: Any) -> None:
        """Let it bring items to the form its call takes; untimed.

        Args:
            key: What they are called from now on; what had that name is forgotten.
            call: What they are for; one of `calls`.
            items: As `findings.CallKind` has them.
        """
        self._ask("load", key, call, items)

    def forget(self, key: str) -> None:
        """Let it give back the memory of items."""
        self._ask("forget", key)

    def answer(self, key: str) -> NDArray[np.float32]:
        """Run once with all items of a key, and return what comes out."""
        return self._ask("answer", key)

    def time(self, key: str, num_calls: int) -> list[float]:
        """Run with all items of a key, one call after another; return the seconds of each."""
        return self._ask("time", key, num_calls)

    def run_clients(
        self, key: str, num_clients: int, duration_s: float, *, items_per_call: int = 1
    ) -> LoadResult:
        """Keep some threads over there busy, each calling again when it has its answer.

        Args:
            key: Items that are dealt out, again from the first after the last.
            num_clients: Threads.
            duration_s: No call begins later than that; the last ones end later.
            items_per_call: How many of the items a call takes.
        """
        return self._ask("run_clients", key, num_clients, duration_s, items_per_call)

    def run_arrivals(
        self, key: str, due_at_s: Sequence[float], *, items_per_call: int = 1
    ) -> LoadResult:
        """Make each call when it is due, whatever has become of those before.

        Args:
            key: As for `run_clients`.
            due_at_s: Seconds from the beginning, rising; latencies count from these.
            items_per_call: As for `run_clients`.
        """
        return self._ask("run_arrivals", key, list(due_at_s), items_per_call)

    def stages(self, key: str, num_calls: int) -> list[dict[str, float]]:
        """Run as `time` does; return for each call the seconds of each stage, and `total`.

        Of a client the stages are those of `clip_rt.telemetry`; of an engine, kinds of operators.

        Raises:
            ContenderError: it has neither a client nor an engine that could tell.
        """
        return self._ask("stages", key, num_calls)

    def memory_mib(self) -> tuple[float, float]:
        """Return what all its processes hold now, and the sum of the most that each has held.

        Pages that they share are counted once for each.
        """
        now = peak = 0.0
        for pid in (self._process.pid, *self._ask("pids", limit_s=END_LIMIT_S)):
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                now += psutil.Process(pid).memory_info().rss / 2**20
                peak += peak_mib(pid)
        return now, peak

    def close(self) -> None:
        """End it; harmless when it has ended."""
        if self._log.closed:
            return
        if self._facts.startup is not None and self._process.poll() is None:
            # Not worth an error: it may be in the middle of what it was interrupted in.
            with contextlib.suppress(ContenderError, OSError):
                _, most_mib = self.memory_mib()
                startup = replace(self._facts.startup, peak_rss_mib=most_mib)
                self._facts = replace(self._facts, startup=startup)
        self._pipe.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_LIMIT_S)
        finally:
            # Its group: with it whatever it started and could not end. A shared Triton is in none.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._log.close()

    def _ask(self, name: str, *arguments: Any, limit_s: float | None = None) -> Any:
        if self._is_behind:
            # Its answer would be taken for that of this order.
            raise ContenderError(f"{self.name} still works on what it was given up on.")
        try:
            self._pipe.send((name, arguments))
        except (BrokenPipeError, OSError) as error:
            raise ContenderError(f"{self.name} has ended. {self._last_words()}") from error
        return self._receive(self._call_limit_s if limit_s is None else limit_s, f"to {name}")

    def _receive(self, limit_s: float, what: str) -> Any:
        self._is_behind = True
        try:
            if not self._pipe.poll(limit_s):
                raise ContenderError(
                    f"{self.name} took more than {limit_s:g} s {what}. {self._last_words()}"
                )
            outcome, value = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_LIMIT_S)
            raise ContenderError(
                f"{self.name} ended (exit code {self._process.poll()}) when it was asked {what}. "
                f"{self._last_words()}"
            ) from error
        self._is_behind = False
        if outcome == "unfit":
            raise UnfitError(value)
        if outcome == "failed":
            raise ContenderError(f"{self.name} failed {what}: {value} {self._last_words()}".strip())
        return value

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read()[-20_000:].decode("utf-8", "replace").splitlines()
        last = [line for line in lines if line.strip()][-LOG_LINES:]
        self._log.seek(0, os.SEEK_END)
        return "Its log ends so:\n" + "\n".join(last) if last else ""
