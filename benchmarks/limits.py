"""How fast a machine could do a call at most, and which share of that was reached.

How much work an item is, `clip_rt.planning.work` counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.findings import Interval, Peaks
from benchmarks.timing import median_interval, ratios
from clip_rt.planning.work import Precision


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The least time a call can take, and what sets it."""

    seconds: float
    name: str
    """Such as "fp32 GEMM", or "memory"."""


def limit_s(
    *,
    flop: float,
    num_bytes: float,
    flop_per_s: float,
    bytes_per_s: float,
    precision: Precision,
    cache_bytes: int = 0,
) -> Limit:
    """Return the roofline of a call (Williams, Waterman and Patterson 2009).

    Args:
        flop: Operations of the call.
        num_bytes: What it reads, the weights above all.
        flop_per_s: The most the machine does in this precision.
        bytes_per_s: The most it reads from memory.
        precision: Names the limit.
        cache_bytes: So much of what the call before it read may still be in the caches, and has
            not to come from memory.
    """
    compute_s = flop / flop_per_s
    memory_s = max(0.0, num_bytes - cache_bytes) / bytes_per_s
    if memory_s > compute_s:
        return Limit(seconds=memory_s, name="memory")
    return Limit(seconds=compute_s, name=f"{precision} GEMM")


def share_of_limit(
    samples_s: Sequence[Sequence[float]],
    probe_s: Sequence[Sequence[float]],
    *,
    flop: float,
    num_bytes: float,
    precision: Precision,
    peaks: Peaks,
    flop_while_probe: float,
    cache_bytes: int,
) -> tuple[Interval, str] | None:
    """Return the share of its limit that a contender reached, and the name of the limit.

    The GEMM rate is that of the same rounds, by the probe; INT8 is taken to slow down as FP32 does.
    The memory rate is that of `peaks`.

    Args:
        samples_s: For each start, seconds of a call, one for each round.
        probe_s: Seconds of the probe in the same rounds.
        flop: Operations of the call: of all its items.
        num_bytes: `weight_bytes` of the tower.
        precision: Of the contender.
        peaks: Of the machine.
        flop_while_probe: `machine.Probe.flop_while_probe`.
        cache_bytes: `machine.cache_bytes()`.

    Returns:
        The interval of the share, 1 at the limit; None where the peak of this precision is not
        known.
    """
    fp32 = peaks.gemm_fp32_gflop_per_s.median
    peak = {"fp32": peaks.gemm_fp32_gflop_per_s, "int8": peaks.gemm_int8_gop_per_s}.get(precision)
    if peak is None:
        return None
    limits = [
        [
            limit_s(
                flop=flop,
                num_bytes=num_bytes,
                flop_per_s=flop_while_probe / each_s * peak.median / fp32,
                bytes_per_s=peaks.read_gb_per_s.median * 1e9,
                precision=precision,
                cache_bytes=cache_bytes,
            )
            for each_s in start_s
        ]
        for start_s in probe_s
    ]
    names = [limit.name for start in limits for limit in start]
    shares = [
        ratios([limit.seconds for limit in start], start_s)
        for start, start_s in zip(limits, samples_s, strict=True)
    ]
    return median_interval(*shares), max(names, key=names.count)
