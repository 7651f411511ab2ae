"""The gateway when more is asked of it than it can do: requests arrive whether answered or not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

import httpx
import numpy as np
import psutil

from benchmarks import photos
from benchmarks.contenders.gateway import Gateway
from benchmarks.contenders.openai_server import data_uri
from benchmarks.findings import Bar, at_most
from benchmarks.photos import SMALL_PX
from benchmarks.serving.bench import Bench, Found, console, describe_latencies, run_threads
from benchmarks.suites.load import arrival_times

NUM_IMAGES = 64
NUM_CALLERS, NUM_CALLS = 16, 512
"""Of the closed loop that finds the capacity."""
MODERATE, OVERLOAD = 0.7, 1.5
"""Arrivals, as a share of the capacity."""
WARM_UP_S, MODERATE_S, OVERLOAD_S = 10.0, 60.0, 120.0
MAX_WAIT_S = 0.5
"""`--max-wait-s` of the gateway."""
SAMPLE_EVERY_S = 1.0
TIMEOUT_S = 60.0
MAX_P99_RATIO, MAX_REFUSAL_MS, MAX_GROWTH = 3.0, 100.0, 0.02


@dataclass
class _Arrivals:
    """What became of requests that arrived by themselves."""

    accepted_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    """Answered with 429."""
    failed: list[str] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    """Of the gateway and its server, every second."""
    elapsed_s: float = 0.0

    def describe(self, offered_per_s: float) -> Found:
        """Return it as JSON has it."""
        return {
            "offered_per_s": round(offered_per_s, 2),
            "answered_per_s": round(len(self.accepted_s) / self.elapsed_s, 2),
            "num_accepted": len(self.accepted_s),
            "num_refused": len(self.refused_s),
            "failed": sorted(set(self.failed)),
            "accepted": describe_latencies(self.accepted_s),
            "refused": describe_latencies(self.refused_s) if self.refused_s else {},
            "rss_mib": [round(each, 1) for each in self.rss_mib],
        }


def measure_overload(bench: Bench) -> tuple[Found, list[Bar]]:
    """Find the capacity for single JPEG files, then send 0.7 and 1.5 times as many."""
    bodies = [
        json.dumps(
            {"model": bench.model, "input": [data_uri(jpeg)], "encoding_format": "base64"}
        ).encode()
        for jpeg in photos.jpegs(SMALL_PX, NUM_IMAGES)
    ]
    capacity_per_s = _find_capacity(bench, bodies)
    rates_per_s = {share: share * capacity_per_s for share in (MODERATE, OVERLOAD)}
    gateway = Gateway(bench.repository, bench.model, "--max-wait-s", str(MAX_WAIT_S))
    try:
        with console.status(f"{MODERATE} of {capacity_per_s:.1f}/s, for {MODERATE_S:g} s"):
            asyncio.run(_send(gateway, bodies, rates_per_s[MODERATE], WARM_UP_S))
            moderate = asyncio.run(_send(gateway, bodies, rates_per_s[MODERATE], MODERATE_S))
        with console.status(f"{OVERLOAD} of {capacity_per_s:.1f}/s, for {OVERLOAD_S:g} s"):
            overload = asyncio.run(_send(gateway, bodies, rates_per_s[OVERLOAD], OVERLOAD_S))
        is_healthy = httpx.get(f"{gateway.url}/health/ready", trust_env=False).is_success
    finally:
        gateway.close()
    found = {
        "max_wait_s": MAX_WAIT_S,
        "capacity_per_s": round(capacity_per_s, 2),
        "moderate": moderate.describe(rates_per_s[MODERATE]),
        "overload": overload.describe(rates_per_s[OVERLOAD]),
        "is_healthy_after": is_healthy,
    }
    if not (moderate.accepted_s and overload.accepted_s and overload.refused_s):
        raise RuntimeError(f"nothing was accepted, or nothing refused: {found}")
    moderate_s, overload_s = (
        float(np.percentile(each.accepted_s, 99)) for each in (moderate, overload)
    )
    quarter = len(overload.rss_mib) // 4
    before_mib = statistics.mean(overload.rss_mib[quarter : 2 * quarter])
    growth = statistics.mean(overload.rss_mib[-quarter:]) / before_mib - 1.0
    found["growth"] = round(growth, 4)
    refusal_ms = 1e3 * float(np.percentile(overload.refused_s, 99))
    what = f"{OVERLOAD} times the capacity"
    return found, [
        at_most(f"{what}: failed, or not healthy after", len(overload.failed) + 1 - is_healthy, 0),
        at_most(
            f"{what}: p99 of accepted requests, times that at {MODERATE}",
            overload_s / moderate_s,
            MAX_P99_RATIO,
        ),
        at_most(f"{what}: p99 of refusals, ms", refusal_ms, MAX_REFUSAL_MS),
        at_most(f"{what}: growth of memory in the last three quarters", growth, MAX_GROWTH),
    ]


def _find_capacity(bench: Bench, bodies: Sequence[bytes]) -> float:
    """Return the requests a second of callers that wait for their answers, none of them refused."""
    gateway = Gateway(bench.repository, bench.model)
    try:
        with httpx.Client(timeout=TIMEOUT_S, trust_env=False) as http:

            def call(number: int) -> None:
                body = bodies[number % len(bodies)]
                http.post(gateway.embeddings_url, content=body).raise_for_status()

            run_threads(call, NUM_CALLS // 8, NUM_CALLERS)
            elapsed_s, _ = run_threads(call, NUM_CALLS, NUM_CALLERS)
    finally:
        gateway.close()
    return NUM_CALLS / elapsed_s


async def _send(
    gateway: Gateway, bodies: Sequence[bytes], rate_per_s: float, duration_s: float
) -> _Arrivals:
    """Send each request when it is due, whatever has become of those before."""
    found = _Arrivals()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False, limits=limits) as http:
        start_s = time.perf_counter()

        async def send(body: bytes, due_s: float) -> None:
            try:
                response = await http.post(gateway.embeddings_url, content=body)
            except httpx.HTTPError as error:
                found.failed.append(repr(error))
                return
            latency_s = time.perf_counter() - due_s
            if response.is_success:
                found.accepted_s.append(latency_s)
            elif response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
                found.refused_s.append(latency_s)
            else:
                found.failed.append(f"HTTP {response.status_code}")

        async def sample() -> None:
            while True:
                found.rss_mib.append(_rss_mib(gateway.pids()))
                await asyncio.sleep(SAMPLE_EVERY_S)

        sampling = asyncio.create_task(sample())
        sent = []
        for number, at_s in enumerate(arrival_times(rate_per_s, duration_s, seed=0)):
            await asyncio.sleep(max(0.0, start_s + at_s - time.perf_counter()))
            sent.append(asyncio.create_task(send(bodies[number % len(bodies)], start_s + at_s)))
        await asyncio.gather(*sent)
        found.elapsed_s = time.perf_counter() - start_s
        sampling.cancel()
    return found


def _rss_mib(pids: Sequence[int]) -> float:
    rss_bytes = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            rss_bytes += psutil.Process(pid).memory_info().rss
    return float(rss_bytes / 2**20)
