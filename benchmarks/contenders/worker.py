"""The process of one contender: `python -m benchmarks.contenders.worker DESCRIPTOR`.

`process.ContenderProcess` starts it, with one end of a pipe as DESCRIPTOR. The main thread does
what it is ordered to; another one reads the orders, so that the end of the pipe is noticed at any
time: then this process ends, with all that it started.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import clip_rt
from benchmarks.contenders.implementation import Implementation, LoadResult, Order, UnfitError
from benchmarks.findings import CallKind
from clip_rt.wire.canary import TEXT, draw_image

MAX_ARRIVAL_THREADS = 256
"""Calls under way at once when they arrive by themselves; a call that has to wait for one of these
threads is as late as it would be in the queue of a server."""
CLOSE_LIMIT_S = 10.0


Call: TypeAlias = Callable[[int, float], None]
"""Makes the call of a number, whose latency counts from a time."""


@dataclass
class Loaded:
    """Items in the form that a call takes."""

    call: CallKind
    items: Any
    prepared: Any
    parts: dict[int, list[Any]]
    """Prepared in parts for calls under load, by their size."""


class Worker:
    """What can be ordered; each public method is an order of `process.ContenderProcess`."""

    def __init__(self, implementation: Implementation) -> None:
        self._implementation = implementation
        self._loaded: dict[str, Loaded] = {}

    def first_answer(self) -> float:
        """Embed the canary, the first thing after the start, and return the seconds it took."""
        calls = self._implementation.calls
        call: CallKind = "jpegs" if "jpegs" in calls else "texts"
        prepared = self._implementation.prepare(call, [draw_image()] if call == "jpegs" else [TEXT])
        start_s = time.perf_counter()
        self._implementation.run(call, prepared)
        return time.perf_counter() - start_s

    def load(self, key: str, call: CallKind, items: Any) -> None:
        """Bring items to the form a call takes; untimed.

        Args:
            key: What they are called from now on; what had that name is forgotten.
            call: What they are for; one of its `calls`.
            items: As `findings.CallKind` has them.
        """
        if call not in self._implementation.calls:
            raise ValueError(f"it has no call for {call}.")
        self._loaded[key] = Loaded(call, items, self._implementation.prepare(call, items), {})

    def forget(self, key: str) -> None:
        """Give back the memory of items."""
        del self._loaded[key]

    def answer(self, key: str) -> NDArray[np.float32]:
        """Run once with all items of a key, and return what comes out."""
        loaded = self._loaded[key]
        return np.ascontiguousarray(self._implementation.run(loaded.call, loaded.prepared))

    def time(self, key: str, num_calls: int) -> list[float]:
        """Run with all items of a key, one call after another; return the seconds of each."""
        loaded, run = self._loaded[key], self._implementation.run
        times_s = []
        for _ in range(num_calls):
            start_s = time.perf_counter()
            run(loaded.call, loaded.prepared)
            times_s.append(time.perf_counter() - start_s)
        return times_s

    def stages(self, key: str, num_calls: int) -> list[dict[str, float]]:
        """Run as `time` does; return for each call the seconds of each stage, and `total`.

        Of a client the stages are those of `clip_rt.telemetry`; of an engine, kinds of operators.

        Raises:
            TypeError: it has neither a client nor an engine that could tell.
        """
        loaded, implementation = self._loaded[key], self._implementation
        if profile := getattr(implementation, "profile", None):
            return profile(loaded.call, loaded.prepared, num_calls)
        if implementation.client is None:
            raise TypeError("it has no client that could tell its stages.")
        found = []
        for _ in range(num_calls):
            with clip_rt.measure(server=implementation.client) as timings:
                implementation.run(loaded.call, loaded.prepared)
            found.append(timings.seconds)
        return found

    def run_clients(
        self, key: str, num_clients: int, duration_s: float, *, items_per_call: int = 1
    ) -> LoadResult:
        """Keep some threads busy, each calling again when it has its answer.

        Args:
            key: Items that are dealt out, again from the first after the last.
            num_clients: Threads.
            duration_s: No call begins later than that; the last ones end later.
            items_per_call: How many of the items a call takes.
        """
        numbers = itertools.count()

        def work(call: Call, end_s: float) -> None:
            while (since_s := time.perf_counter()) < end_s:
                call(next(numbers), since_s)

        def submit(pool: ThreadPoolExecutor, call: Call, start_s: float) -> None:
            for _ in range(num_clients):
                pool.submit(work, call, start_s + duration_s)

        return self._run_threads(key, items_per_call, num_clients, submit)

    def run_arrivals(
        self, key: str, due_at_s: Sequence[float], *, items_per_call: int = 1
    ) -> LoadResult:
        """Make each call when it is due, whatever has become of those before.

        Args:
            key: As for `run_clients`.
            due_at_s: Seconds from the beginning, rising; latencies count from these.
            items_per_call: As for `run_clients`.
        """

        def submit(pool: ThreadPoolExecutor, call: Call, start_s: float) -> None:
            for number, at_s in enumerate(due_at_s):
                time.sleep(max(0.0, start_s + at_s - time.perf_counter()))
                pool.submit(call, number, start_s + at_s)

        num_threads = max(1, min(len(due_at_s), MAX_ARRIVAL_THREADS))
        return self._run_threads(key, items_per_call, num_threads, submit)

    def pids(self) -> list[int]:
        """Return the processes beside this one."""
        return self._implementation.pids()

    def _run_threads(
        self,
        key: str,
        items_per_call: int,
        num_threads: int,
        submit: Callable[[ThreadPoolExecutor, Call, float], None],
    ) -> LoadResult:
        """Let `submit` give calls to threads, and note what came of each."""
        loaded, run = self._loaded[key], self._implementation.run
        if items_per_call not in loaded.parts:
            loaded.parts[items_per_call] = [
                self._implementation.prepare(loaded.call, part)
                for part in split_items(loaded.call, loaded.items, items_per_call)
            ]
        parts = loaded.parts[items_per_call]
        latencies_s: list[float] = []
        failures: list[str] = []

        def call(number: int, since_s: float) -> None:
            try:
                run(loaded.call, parts[number % len(parts)])
            except Exception as error:  # A failure under load is a result.
                failures.append(repr(error))
            else:
                latencies_s.append(time.perf_counter() - since_s)

        start_s = time.perf_counter()
        with ThreadPoolExecutor(num_threads) as pool:
            submit(pool, call, start_s)
        elapsed_s = time.perf_counter() - start_s
        # One of each sort, for the log.
        for failure in dict.fromkeys(each[:200] for each in failures):
            print("failed:", failure, flush=True)  # noqa: T201
        return LoadResult(latencies_s, len(failures), elapsed_s)


def split_items(call: CallKind, items: Any, size: int) -> list[Any]:
    """Return the items in parts of `size`, without the rest that would be smaller.

    Raises:
        ValueError: there are fewer items than that.
    """
    singles, labels = items if call == "zero_shot" else (items, None)
    starts = range(0, len(singles) - size + 1, size)
    if not starts:
        raise ValueError(f"{len(singles)} items are not enough for calls of {size}.")
    parts = [singles[start : start + size] for start in starts]
    return parts if labels is None else [(part, labels) for part in parts]


def _read_orders(
    pipe: Connection, orders: queue.SimpleQueue[Any], made: list[Implementation]
) -> None:
    """Hand orders on; at the end of the pipe end this process and its group."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            orders.put(pipe.recv())
    # The main thread may be at work; whatever it does is of no use to anyone.
    timer = threading.Timer(CLOSE_LIMIT_S, os.killpg, (0, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    for implementation in made:
        with contextlib.suppress(Exception):
            implementation.close()
    os.killpg(0, signal.SIGKILL)


def main(descriptor: int) -> None:
    """Be the contender until the pipe ends."""
    os.set_inheritable(descriptor, False)
    pipe = Connection(descriptor)
    order: Order = pipe.recv()
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
    made: list[Implementation] = []
    threading.Thread(target=_read_orders, args=(pipe, orders, made), daemon=True).start()
    try:
        implementation: Implementation = importlib.import_module(order.module).make(
            order.kit, **order.options
        )
        made.append(implementation)
    except UnfitError as error:
        pipe.send(("unfit", str(error)))
        return
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
        return
    pipe.send(("done", (implementation.calls, implementation.versions)))
    worker = Worker(implementation)
    while True:
        name, arguments, options = orders.get()
        try:
            outcome = ("done", getattr(worker, name)(*arguments, **options))
        except Exception as error:  # The one who gave the order is told.
            outcome = ("failed", f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):  # It has gone: the other thread ends this process.
            pipe.send(outcome)


if __name__ == "__main__":
    main(int(sys.argv[1]))
