"""Where the time of a call goes: the client tells of the whole stack, the engine of its inside."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from benchmarks.findings import Stages
from benchmarks.suites.bench import Bench
from benchmarks.suites.cases import Case
from clip_rt.telemetry import STAGES, TOTAL

MAX_MISSING = 0.05
SERVER_STAGES = ("server_queue", "server_compute")
NETWORK = "network"
ENGINE = "openvino"
NUM_CALLS_OF_MANY = 5
"""Of a call with many items, which are as many samples."""
NUM_INSIDE_CALLS = 3
"""Operators take nearly the same each time, and a call of a large model takes seconds."""


def measure_stages(bench: Bench, cases: Sequence[Case]) -> None:
    """Note where the time of each case goes, with each way through Triton."""
    for case in cases:
        bench.progress.step(f"stages of {case.key}")
        for name in bench.admit(case):
            if bench.contenders[name].facts.kind != "served":
                continue
            is_single = case.num_items == 1
            num_calls = bench.settings.num_stage_calls if is_single else NUM_CALLS_OF_MANY
            calls = bench.contenders[name].stages(case.key, num_calls)
            bench.stages.append(
                summarise(calls, contender=name, what=case.key, is_single=is_single)
            )


def measure_inside(bench: Bench, case: Case) -> None:
    """Note which operators of the engine take the time of a case of pixels, where it takes part."""
    if ENGINE not in bench.contenders:
        return
    bench.progress.step(f"inside the engine: {case.key}")
    if ENGINE in bench.admit(case):
        calls = bench.contenders[ENGINE].stages(case.key, NUM_INSIDE_CALLS)
        what = f"inside the engine: {case.suite}, {case.name}"
        bench.stages.append(summarise_inside(calls, contender=ENGINE, what=what))


def summarise_inside(calls: Sequence[Mapping[str, float]], *, contender: str, what: str) -> Stages:
    """Take the means of all calls.

    Args:
        calls: Seconds by kind of operator, and `total`.
        contender: Whose.
        what: The case.
    """
    means_ms = _means_ms(calls, dict.fromkeys(name for call in calls for name in call))
    note = "are in no operator: the engine's own work between them"
    return _stages(means_ms, note, contender=contender, what=what)


def summarise(
    calls: Sequence[Mapping[str, float]], *, contender: str, what: str, is_single: bool
) -> Stages:
    """Take the means of the calls in the middle half, so that what adds up in each adds up.

    Args:
        calls: Seconds by the names of `clip_rt.telemetry.STAGES`, and `total`. What they call
            `network` holds the server's own stages; here it does not.
        contender: Whose.
        what: The case.
        is_single: Whether a call has one item, whose stages follow each other. Those of many
            run side by side, so they may be more than the total.
    """
    ordered = sorted(calls, key=lambda call: call[TOTAL])
    cut = len(ordered) // 4
    means_ms = _means_ms(ordered[cut : len(ordered) - cut], (*STAGES, TOTAL))
    # Servers count each request of a call; side by side they may be longer than it.
    means_ms[NETWORK] -= sum(means_ms[name] for name in SERVER_STAGES)
    means_ms = {name: value for name, value in means_ms.items() if value > 0}
    note = "are in no stage: the client's own work between them, and waiting for a thread to run"
    found = _stages(means_ms, note, contender=contender, what=what)
    if is_single or found.missing_ms >= 0:
        return found
    note = (
        f"stages ran side by side: together they are {found.total_ms - found.missing_ms:.1f} ms of "
        f"work in {found.total_ms:.1f} ms"
    )
    return replace(found, note=note)


def _means_ms(calls: Sequence[Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    return {name: 1e3 * statistics.fmean(call.get(name, 0.0) for call in calls) for name in names}


def _stages(means_ms: Mapping[str, float], note: str, *, contender: str, what: str) -> Stages:
    """Say what is missing of the total; `note` is why, where it is much."""
    stages_ms = {name: value for name, value in means_ms.items() if name != TOTAL}
    total_ms = means_ms[TOTAL]
    missing_ms = total_ms - sum(stages_ms.values())
    return Stages(
        contender=contender,
        what=what,
        total_ms=total_ms,
        stages_ms=stages_ms,
        missing_ms=missing_ms,
        note=f"{missing_ms:.2f} ms {note}" if abs(missing_ms) > MAX_MISSING * total_ms else "",
    )
