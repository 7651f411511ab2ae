"""Ways by turns, calls from many threads, and the figures that come of their times."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

SINGLES_A_TURN = 10

console = Console()
Found = dict[str, Any]
"""Part of a result, as JSON has it."""


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """Make of a call one that returns how long it took, in seconds."""

    def measure() -> float:
        start_s = time.perf_counter()
        call()
        return time.perf_counter() - start_s

    return measure


def by_turns(
    ways: Mapping[str, Callable[[], float]], num_rounds: int, what: str
) -> dict[str, list[float]]:
    """Time every way once in each round, and begin each round with another.

    Args:
        ways: Each returns its time in seconds.
        num_rounds: How often.
        what: Said beside the progress.
    """
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for n in track(range(num_rounds), description=what, console=console, transient=True):
        first = n % len(names)
        for name in names[first:] + names[:first]:
            times_s[name].append(ways[name]())
    return times_s


def one_by_one(
    call: Callable[[int], float], num_items: int, latencies_s: list[float]
) -> Callable[[], float]:
    """Make of a call for one item a turn of `SINGLES_A_TURN`, each going on where the last ended.

    Args:
        call: Gets the number of an item, and returns its time in seconds.
        num_items: After the last comes the first again.
        latencies_s: Gets the seconds of each call.
    """
    numbers = itertools.cycle(range(num_items))

    def turn() -> float:
        each_s = [call(n) for n in itertools.islice(numbers, SINGLES_A_TURN)]
        latencies_s.extend(each_s)
        return sum(each_s)

    return turn


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Return the median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def rates(times_s: Mapping[str, Sequence[float]], num_items: int, unit: str) -> Found:
    """Return the median throughput of each way, and all its rounds."""
    return {
        name: {
            f"{unit}_per_s": round(num_items / statistics.median(times), 2),
            "rounds_s": [round(each, 4) for each in times],
        }
        for name, times in times_s.items()
    }


def run_threads(
    call: Callable[[int], object], num_calls: int, num_threads: int
) -> tuple[float, list[float]]:
    """Make calls from threads that begin together, each thread one after another.

    Args:
        call: Gets the number of the call, 0 to `num_calls` - 1, each once.
        num_calls: Of all threads.
        num_threads: How many.

    Returns:
        Seconds from the common start to the last end, and the seconds of each call. What a call
        raises is raised.
    """
    barrier = threading.Barrier(num_threads + 1)

    def work(first: int) -> list[float]:
        measures = [timed(partial(call, n)) for n in range(first, num_calls, num_threads)]
        barrier.wait()
        return [measure() for measure in measures]

    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(work, first) for first in range(num_threads)]
        barrier.wait()
        start_s = time.perf_counter()
        latencies_s = [each for future in futures for each in future.result()]
        return time.perf_counter() - start_s, latencies_s


def describe_latencies(latencies_s: Sequence[float]) -> dict[str, float]:
    """Return percentiles in milliseconds."""
    return {
        f"p{percent}_ms": round(1e3 * float(np.percentile(latencies_s, percent)), 2)
        for percent in (50, 90, 99)
    }
