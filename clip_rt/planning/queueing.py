"""How long items wait for a batch server, as Triton with dynamic batching is one.

Items come at random and independently (a Poisson process). Whenever the server is free it takes all
that wait, up to its largest batch, and is busy for a time that the size of the batch fixes: the
queue M/D[1,B]/1 (Bailey 1954; Chaudhry and Templeton, A First Course in Bulk Queues, 1983). The
numbers that wait when a batch is finished are a Markov chain, solved here; `simulate` plays the
same queue out, and tests hold the two together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_MOMENTS = 16
"""Of a service at which an arrival is looked at; they are alike."""
NUM_QUANTILES = 6
"""That stand for a number of arrivals."""
MAX_STATES = 2048
TAIL = 1e-6
"""Probability that may be beyond what is looked at."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """What a rate of arrivals comes to."""

    p50_s: float
    p99_s: float
    mean_batch: float
    busy: float
    """Share of the time that the server has something to do. A server of batches is nearly always
    busy long before its capacity: small batches take longer for each item."""


def capacity_per_s(batch_s: Sequence[float]) -> float:
    """Return the highest rate that batches of any allowed size can keep up with.

    Args:
        batch_s: Seconds of a batch of 1, 2, ... items.
    """
    return max(size / each for size, each in enumerate(batch_s, 1))


def estimate(rate_per_s: float, batch_s: Sequence[float]) -> Latency:
    """Return the latency of items that come at a rate; infinite at the capacity and beyond.

    Args:
        rate_per_s: Of items.
        batch_s: Seconds of a batch of 1, 2, ... items.
    """
    largest = len(batch_s)
    if rate_per_s * batch_s[-1] >= largest * 0.995:
        return Latency(p50_s=math.inf, p99_s=math.inf, mean_batch=float(largest), busy=1.0)
    waiting = _stationary(rate_per_s, batch_s)
    sizes = np.minimum(np.maximum(np.arange(len(waiting)), 1), largest)
    times = np.asarray(batch_s)[sizes - 1]
    busy_s = float(waiting @ times)
    idle_s = float(waiting[0]) / rate_per_s
    cycle_s = busy_s + idle_s
    latencies, weights = _latencies(rate_per_s, np.asarray(batch_s), waiting)
    # Whoever finds the server idle is a batch by itself.
    latencies = np.append(latencies, batch_s[0])
    weights = np.append(weights / weights.sum() * busy_s / cycle_s, idle_s / cycle_s)
    order = np.argsort(latencies)
    summed = np.cumsum(weights[order])
    p50_s, p99_s = (
        float(latencies[order[min(int(np.searchsorted(summed, share)), len(order) - 1)]])
        for share in (0.5, 0.99)
    )
    return Latency(
        p50_s=p50_s,
        p99_s=p99_s,
        mean_batch=float(waiting @ sizes),
        busy=busy_s / cycle_s,
    )


def simulate(
    rate_per_s: float, batch_s: Sequence[float], *, num_items: int = 200_000, seed: int = 0
) -> NDArray[np.float64]:
    """Play the queue out with arrivals at random.

    Returns:
        float64 (num_items,): the latency of each item in seconds.
    """
    waits_s = np.random.default_rng(seed).exponential(1 / rate_per_s, num_items)
    return play(np.cumsum(waits_s), batch_s)


def play(arrivals_s: NDArray[np.float64], batch_s: Sequence[float]) -> NDArray[np.float64]:
    """Play the queue out with arrivals that are given.

    Args:
        arrivals_s: float64 (N,), rising.
        batch_s: Seconds of a batch of 1, 2, ... items.

    Returns:
        float64 (N,): seconds from the arrival of each item to the end of its batch.
    """
    num, largest = len(arrivals_s), len(batch_s)
    ends_s = np.empty(num)
    first, free_s = 0, 0.0
    while first < num:
        start_s = max(free_s, float(arrivals_s[first]))
        there = np.searchsorted(arrivals_s[first : first + largest], start_s, "right")
        size = max(int(there), 1)
        free_s = start_s + batch_s[size - 1]
        ends_s[first : first + size] = free_s
        first += size
    return ends_s - arrivals_s


def _poisson(mean: float, num: int) -> NDArray[np.float64]:
    """Return the probabilities of 0 to num - 1 events."""
    if mean == 0:
        return np.asarray(np.eye(1, num)[0], np.float64)
    logs = np.arange(num) * math.log(mean) - mean - _log_factorials(num)
    return np.asarray(np.exp(logs), np.float64)


@functools.cache
def _log_factorials(num: int) -> NDArray[np.float64]:
    return np.asarray(np.cumsum(np.log(np.maximum(np.arange(num), 1))), np.float64)


def _quantiles(probabilities: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return numbers of events that stand for all, each for an equal part of the probability."""
    shares = (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
    return np.searchsorted(np.cumsum(probabilities), shares)


def _stationary(rate_per_s: float, batch_s: Sequence[float]) -> NDArray[np.float64]:
    """Return the probabilities of 0, 1, ... items that wait when a batch is finished."""
    largest = len(batch_s)
    num = max(64, 2 * largest)
    while True:
        by_size = [_poisson(rate_per_s * each, num) for each in batch_s]
        # Row by row: what is left over, and what comes meanwhile.
        chain = np.zeros((num, num))
        for waiting in range(num):
            size = min(max(waiting, 1), largest)
            left = max(waiting - size, 0)
            chain[waiting, left:] = by_size[size - 1][: num - left]
        chain[:, -1] += 1 - chain.sum(axis=1)
        equations = np.vstack([(chain.T - np.eye(num))[:-1], np.ones(num)])
        found = np.linalg.solve(equations, np.append(np.zeros(num - 1), 1.0))
        found = np.maximum(found, 0)
        if found[-num // 8 :].sum() < TAIL or num >= MAX_STATES:
            return np.asarray(found / found.sum())
        num *= 2


def _latencies(
    rate_per_s: float, batch_s: NDArray[np.float64], waiting: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return latencies of items that come while the server is busy, and their weights."""
    largest = len(batch_s)
    latencies, weights = [], []
    for state, probability in enumerate(waiting):
        if probability < TAIL:
            continue
        size = min(max(state, 1), largest)
        left = max(state - size, 0)
        service_s = float(batch_s[size - 1])
        num = int(rate_per_s * service_s + 6 * math.sqrt(rate_per_s * service_s) + 12)
        for moment in (np.arange(NUM_MOMENTS) + 0.5) / NUM_MOMENTS * service_s:
            before = _poisson(rate_per_s * moment, num)
            likely = np.flatnonzero(before > TAIL)
            before, ahead = before[likely], left + likely
            # Who is ahead and fills whole batches is served first, each time for the longest.
            rounds = ahead // largest
            wait_s = service_s - moment + rounds * batch_s[-1]
            # Those that come while it waits fill up its batch.
            during = _quantiles(_poisson(rate_per_s * (service_s - moment), num))
            later = rate_per_s * rounds * batch_s[-1]
            joined = (ahead % largest + 1 + later)[:, None] + during
            own = np.clip(np.rint(joined), 1, largest).astype(int)
            latencies.append((wait_s[:, None] + batch_s[own - 1]).ravel())
            weight = probability * service_s / NUM_MOMENTS / NUM_QUANTILES * before
            weights.append(np.repeat(weight, NUM_QUANTILES))
    return np.concatenate(latencies), np.concatenate(weights)
