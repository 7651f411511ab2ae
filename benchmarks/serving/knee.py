"""Does the queue that `clip-rt plan` reckons with bend where the real one does?

Batches of a server that has nothing else to do are timed. From these times alone the queue of
`clip_rt.planning.queueing` says how latency grows with the rate; then single images arrive at the
client at such rates, at the same moments, whether those before are answered or not. The knee is the
rate at which `KNEE_PERCENTILE` of the latencies are `KNEE_TIMES` that of an image alone.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

import clip_rt
from benchmarks.findings import Bar, at_most
from benchmarks.serving.bench import (
    INT8,
    START_TIMEOUT_S,
    TIMEOUT_S,
    Array,
    Bench,
    Found,
    console,
    preprocessed,
)
from benchmarks.suites.load import arrival_times
from benchmarks.timing import time_once
from clip_rt.planning.queueing import capacity_per_s, play

SIZES = (1, 2, 4, 8, 16, 32)
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the capacity that the times of batches promise."""
LEVEL_S, WARM_UP_S = 20.0, 5.0
NUM_ROUNDS = 3
KNEE_PERCENTILE, KNEE_TIMES = 90, 4.0
MAX_DIFFERENCE = 0.15


def measure_knee(bench: Bench) -> tuple[Found, list[Bar]]:
    """Time batches, foretell the knee, and find the real one."""
    with bench.client(INT8) as client:
        images = preprocessed(bench, client)
        times_s: dict[int, list[float]] = {size: [] for size in SIZES}
        _time_batches(client, images, times_s)  # Warm-up: the first are thrown away.
        times_s = {size: [] for size in SIZES}
        _time_batches(client, images, times_s)
        most_per_s = capacity_per_s(_every_size(times_s))
        measured: dict[float, list[float]] = {}
        with console.status("images arrive"):
            asyncio.run(_send(bench, images, most_per_s / 2, WARM_UP_S, seed=99))
            for number, share in enumerate(SHARES):
                rate = share * most_per_s
                measured[rate] = asyncio.run(_send(bench, images, rate, LEVEL_S, seed=number))
                # The machine's speed changes while this goes on.
                _time_batches(client, images, times_s)
    batch_s = _every_size(times_s)
    foretold = {
        rate: play(np.asarray(arrival_times(rate, LEVEL_S, seed=number)), batch_s).tolist()
        for number, rate in enumerate(measured)
    }
    alone_s = batch_s[0]
    levels = [
        {
            "offered_per_s": round(rate, 2),
            "measured_ms": _percentiles(measured[rate]),
            "foretold_ms": _percentiles(foretold[rate]),
        }
        for rate in measured
    ]
    found: Found = {
        "batch_ms": {size: round(1e3 * batch_s[size - 1], 3) for size in SIZES},
        "capacity_per_s": round(most_per_s, 2),
        "levels": levels,
    }
    knees = [_find_knee(each, KNEE_TIMES * alone_s) for each in (measured, foretold)]
    found["measured_knee_per_s"], found["foretold_knee_per_s"] = (round(each, 2) for each in knees)
    difference = abs(knees[1] / knees[0] - 1)
    return found, [at_most("the foretold knee beside the measured one", difference, MAX_DIFFERENCE)]


def _time_batches(
    client: clip_rt.Client, images: Sequence[Array], times_s: dict[int, list[float]]
) -> None:
    for _ in range(NUM_ROUNDS):
        for size in SIZES:
            first = np.random.default_rng(len(times_s[size])).integers(len(images) - size)
            batch = images[first : first + size]
            times_s[size].append(time_once(partial(client.encode_images, batch)))


def _every_size(times_s: dict[int, list[float]]) -> list[float]:
    medians = [statistics.median(each) for each in times_s.values()]
    return np.interp(np.arange(1, SIZES[-1] + 1), SIZES, medians).tolist()


async def _send(
    bench: Bench, images: Sequence[Array], rate_per_s: float, duration_s: float, *, seed: int
) -> list[float]:
    """Send each image when it is due, whatever has become of those before; return the latencies."""
    latencies_s: list[float] = []
    client = clip_rt.AsyncClient(
        repository=bench.repository,
        model=INT8,
        timeout_s=TIMEOUT_S,
        start_timeout_s=START_TIMEOUT_S,
    )
    async with client:
        await client.encode_images(images[:1])
        start_s = time.perf_counter()

        async def send(image: Array, due_s: float) -> None:
            await client.encode_images([image])
            latencies_s.append(time.perf_counter() - due_s)

        sent = []
        for number, at_s in enumerate(arrival_times(rate_per_s, duration_s, seed=seed)):
            await asyncio.sleep(max(0.0, start_s + at_s - time.perf_counter()))
            image = images[number % len(images)]
            sent.append(asyncio.create_task(send(image, start_s + at_s)))
        await asyncio.gather(*sent)
    return latencies_s


def _percentiles(latencies_s: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    return {
        f"p{percent}": round(1e3 * float(np.percentile(latencies_s, percent)), 2)
        for percent in (50, KNEE_PERCENTILE, 99)
    }


def _find_knee(latencies_s: dict[float, list[float]], limit_s: float) -> float:
    """Return the rate at which the percentile passes the limit, between two levels on a line.

    Raises:
        RuntimeError: it does not, or at once.
    """
    rates = list(latencies_s)
    values = [float(np.percentile(latencies_s[rate], KNEE_PERCENTILE)) for rate in rates]
    above = next((row for row, value in enumerate(values) if value > limit_s), 0)
    if above == 0:
        raise RuntimeError(f"no knee at {limit_s:.3f} s: {dict(zip(rates, values, strict=True))}")
    low, high = values[above - 1], values[above]
    share = (limit_s - low) / (high - low)
    return rates[above - 1] + share * (rates[above] - rates[above - 1])
