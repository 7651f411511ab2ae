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
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks import findings
from benchmarks.contenders.implementation import Order, UnfitError
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
                first_answer_s=self.first_answer(limit_s=start_limit_s),
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

    def __getattr__(self, order: str) -> Callable[..., Any]:
        """Return what has `worker.Worker` do one of its orders, and waits for its answer.

        Raises:
            ContenderError: by what is returned; it failed, took too long, or has ended.
        """
        if order.startswith("_"):
            raise AttributeError(order)
        return partial(self._ask, order)

    def memory_mib(self) -> tuple[float, float]:
        """Return what all its processes hold now, and the sum of the most that each has held.

        Pages that they share are counted once for each.
        """
        now = peak = 0.0
        for pid in (self._process.pid, *self.pids(limit_s=END_LIMIT_S)):
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

    def _ask(self, name: str, *arguments: Any, limit_s: float | None = None, **options: Any) -> Any:
        if self._is_behind:
            # Its answer would be taken for that of this order.
            raise ContenderError(f"{self.name} still works on what it was given up on.")
        try:
            self._pipe.send((name, arguments, options))
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
