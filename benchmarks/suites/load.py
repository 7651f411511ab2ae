"""Served contenders under load: clients that wait for their answers, and calls that do not wait.

The first kind finds how much a server can do; it goes easy on a slow one, since nobody sends a call
before the last is answered. The second is what users are: calls arrive when they arrive, and the
time of each counts from then, however long it had to wait to be sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmarks.contenders.implementation import LoadResult
from benchmarks.findings import Level
from benchmarks.suites.bars import INFINITY
from benchmarks.suites.bench import Bench
from benchmarks.suites.cases import Case
from benchmarks.timing import in_turn

NUM_CLIENTS = (1, 2, 4, 8, 16, 32)
"""That send an image at a time; those that send texts are fewer, since they end sooner."""
NUM_CLIENTS_OF_TEXTS = (1, 8, 32)
NUM_CLIENTS_OF_BATCHES = (1, 8)
BATCH_TEXTS = 32
OFFERED_SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
"""Of the capacity."""
KEEPS_UP = 0.95
"""Of what is offered, so much must be answered while it is offered and just after."""
WARM_UP_S = 1.0
PERCENTILES = (50, 95, 99, 99.9)


def measure_concurrency(bench: Bench, images: Case, texts: Case) -> None:
    """Load everyone who is served with more and more clients, by turns.

    Args:
        bench: Gets the levels.
        images: Sent one in a call.
        texts: Sent one in a call, and `BATCH_TEXTS` in a call.
    """
    sweeps = (
        (images, 1, NUM_CLIENTS),
        (texts, 1, NUM_CLIENTS_OF_TEXTS),
        (texts, BATCH_TEXTS, NUM_CLIENTS_OF_BATCHES),
    )
    for case, items, counts in sweeps:
        takers = served(bench, case)
        for clients in counts:
            bench.progress.step(f"{items} x {case.key}, {clients} clients")
            for name, results in _take_turns(bench, takers, case, items, clients).items():
                bench.levels += _levels(bench, name, case, results, items=items, clients=clients)


def _take_turns(
    bench: Bench, names: Sequence[str], case: Case, items: int, clients: int
) -> dict[str, list[LoadResult]]:
    """Load each in turn, in rounds that begin with another each time."""

    def load(name: str, duration_s: float) -> LoadResult:
        contender = bench.contenders[name]
        return contender.run_clients(case.key, clients, duration_s, items_per_call=items)

    for name in names:
        load(name, WARM_UP_S)
    results: dict[str, list[LoadResult]] = {name: [] for name in names}
    for round_ in range(bench.settings.level_rounds):
        for name in in_turn(names, round_):
            bench.progress.say(f"{clients} clients: round {round_ + 1}, {name}")
            results[name].append(load(name, bench.settings.level_s))
    return results


def measure_arrivals(bench: Bench, case: Case) -> None:
    """Let single items arrive at shares of what each was seen to be capable of.

    Args:
        bench: Its closed loops tell the capacity; where there are none they are run with 8 clients.
        case: Its items are sent one in a call.
    """
    takers = served(bench, case)
    capacity_per_s = {name: _capacity(bench, name, case) for name in takers}
    found: dict[str, list[Level]] = {name: [] for name in takers}
    for number, share in enumerate(OFFERED_SHARES):
        bench.progress.step(f"arrivals of {case.key}, {share:.0%} of the capacity")
        for name in in_turn(takers, number):
            bench.progress.say(f"arrivals of {case.key}, {share:.0%} of the capacity, {name}")
            offered_per_s = share * capacity_per_s[name]
            due_at_s = arrival_times(offered_per_s, bench.settings.arrivals_s, seed=number)
            result = bench.contenders[name].run_arrivals(case.key, due_at_s)
            found[name] += _levels(bench, name, case, [result], offered_per_s=offered_per_s)
    for levels in found.values():
        bench.levels += mark_knee(levels)


def arrival_times(rate_per_s: float, duration_s: float, *, seed: int) -> list[float]:
    """Draw when calls arrive as a Poisson process; seconds from the start, rising.

    As many as the rate promises, one at least: of a Poisson process whose number of arrivals is
    known, the times are uniform. So what is offered is the rate, not what chance made of it.
    """
    num_calls = max(1, round(rate_per_s * duration_s))
    times_s = np.random.default_rng(seed).uniform(0.0, duration_s, num_calls)
    return [float(each) for each in np.sort(times_s)]


def mark_knee(levels: Sequence[Level]) -> list[Level]:
    """Mark the highest offered rate that is kept up with, as all below it are.

    Kept up with means: nothing failed, and `KEEPS_UP` of the rate was answered.

    Args:
        levels: Of one contender, of arrivals.

    Returns:
        The same in the order of their rates, one of them marked; none if it never kept up.
    """
    ordered = sorted(levels, key=lambda level: level.offered_per_s or 0.0)
    knee = -1
    for row, level in enumerate(ordered):
        if level.num_failed or level.answered_per_s < KEEPS_UP * (level.offered_per_s or 0.0):
            break
        knee = row
    return [replace(level, is_knee=row == knee) for row, level in enumerate(ordered)]


def served(bench: Bench, case: Case) -> list[str]:
    """Return who is served and answers a case right."""
    return [
        name
        for name in bench.admit(case)
        if bench.contenders[name].facts.kind in ("served", "gateway") or name == INFINITY
    ]


def _capacity(bench: Bench, name: str, case: Case) -> float:
    """Return the calls of one item that a contender was seen to answer each second, at best."""
    seen_per_s = [
        level.answered_per_s
        for level in bench.levels
        if (level.contender, level.call, level.items) == (name, case.call, 1)
        and level.num_clients is not None
    ]
    if not seen_per_s:
        result = bench.contenders[name].run_clients(case.key, 8, bench.settings.level_s)
        seen_per_s = [_rate_per_s(result)]
    return max(seen_per_s)


def _levels(
    bench: Bench,
    name: str,
    case: Case,
    results: Sequence[LoadResult],
    *,
    items: int = 1,
    clients: int | None = None,
    offered_per_s: float | None = None,
) -> list[Level]:
    """Make a level of all its rounds, and note failures; without an answer there is none."""
    latencies_s = [each_s for each in results for each_s in each.latencies_s]
    num_failed = sum(each.num_failed for each in results)
    num_calls = len(latencies_s) + num_failed
    if num_failed:
        how = f"{clients} clients" if clients else f"arrivals at {offered_per_s:.1f}/s"
        bench.failures.append(
            f"{items} x {case.key}, {how}: {num_failed} of {num_calls} calls of {name} failed"
        )
    if not latencies_s:
        return []
    p50_ms, p95_ms, p99_ms, p999_ms = (1e3 * np.percentile(latencies_s, PERCENTILES)).tolist()
    return [
        Level(
            contender=name,
            call=case.call,
            items=items,
            num_clients=clients,
            offered_per_s=offered_per_s,
            answered_per_s=float(np.median([_rate_per_s(each) for each in results])),
            num_calls=num_calls,
            num_failed=num_failed,
            p50_ms=p50_ms,
            p95_ms=p95_ms,
            p99_ms=p99_ms,
            p999_ms=p999_ms,
        )
    ]


def _rate_per_s(result: LoadResult) -> float:
    return len(result.latencies_s) / result.elapsed_s
