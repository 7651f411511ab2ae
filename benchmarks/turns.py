"""Rounds in which the contenders of a case take turns.

Whatever slows the machine for a while slows all of them, so what one is against another is seen in
the same rounds. Every way has one turn in each round, and each round begins with another. A turn
is as many calls as take long enough for the clock and the scheduler, and its sample is their mean.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.findings import Interval
from benchmarks.intervals import (
    MIN_SAMPLES,
    STEADY_TURNS,
    half_width,
    is_narrow,
    is_steady,
    median_interval,
)
from clip_rt.errors import InputError

PROBE = "probe"
"""The way that times the machine itself: it has its turns, but no round is made for its sake."""
TARGET = 0.03
MIN_TURN_S = 0.2
MAX_WARM_UP_TURNS = 10
WARM_UP_SHARE = 0.3
"""Of the budget, for the warm-up of all ways together."""

Way = Callable[[int], list[float]]
"""Makes so many calls and returns the seconds of each."""


@dataclass(kw_only=True)
class Turns:
    """What one way did in a case."""

    calls_per_turn: int
    is_warm: bool
    """Whether its last turns of warm-up were alike, before its time for that was up."""
    warm_up_s: list[float]
    """Seconds of a call in each turn of warm-up."""
    target: float
    """How well its median was to be known, as a share."""
    samples_s: list[float] = field(default_factory=list)
    """Seconds of a call, mean of a turn; one for each round, in order."""

    @property
    def interval_s(self) -> Interval:
        """The median of a call in seconds, and its interval."""
        return median_interval(self.samples_s)

    @property
    def is_noisy(self) -> bool:
        """Whether its median is not known as well as it was to be."""
        return not is_narrow(self.samples_s, target=self.target)


def take_turns(
    ways: Mapping[str, Way],
    *,
    target: float = TARGET,
    budget_s: float,
    min_rounds: int = MIN_SAMPLES,
    max_rounds: int = 50,
    min_turn_s: float = MIN_TURN_S,
    on_round: Callable[[int, float], None] = lambda num_rounds, widest: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Turns]:
    """Time every way once in each round, until all medians are known well enough.

    First each way warms up until three turns in a row are alike; meanwhile it is seen how many
    calls make a turn. Rounds end when every way but `PROBE` has a 95 % interval within ±`target`,
    or when the next one would end after the budget.

    Args:
        ways: By name; order matters only for who begins.
        target: Half-width of an interval that is enough, as a share of the median.
        budget_s: Time for warm-up and rounds. `min_rounds` are made even when it is over.
        min_rounds: At least; below `intervals.MIN_SAMPLES` every result is called noisy.
        max_rounds: At most.
        min_turn_s: As many calls make a turn as take this long; one that takes longer is a turn.
        on_round: Told after each round how many there were, and the half-width of the widest
            interval, as a share.
        clock: Seconds; for the budget only, since the ways time themselves.

    Raises:
        InputError: no way but the probe, limits that exclude each other, or a way that does not
            return a positive time for each call.
        Exception: whatever a way raises.
    """
    if not set(ways) - {PROBE} or not 1 <= min_rounds <= max_rounds:
        raise InputError(
            f"rounds need a way and 1 <= min_rounds <= max_rounds; the ways are {list(ways)}, "
            f"the limits {min_rounds} and {max_rounds}."
        )
    start_s = clock()
    warm_up_s = WARM_UP_SHARE * budget_s / len(ways)
    turns = {
        name: _warm_up(name, way, warm_up_s, min_turn_s, target, clock)
        for name, way in ways.items()
    }
    names = list(ways)
    longest_round_s = 0.0
    for num_rounds in range(1, max_rounds + 1):
        round_start_s = clock()
        first = (num_rounds - 1) % len(names)
        for name in names[first:] + names[:first]:
            turns[name].samples_s.append(_turn(name, ways[name], turns[name].calls_per_turn))
        longest_round_s = max(longest_round_s, clock() - round_start_s)
        judged = [each for name, each in turns.items() if name != PROBE]
        on_round(num_rounds, max(half_width(each.interval_s) for each in judged))
        is_late = clock() - start_s + longest_round_s > budget_s
        if num_rounds >= min_rounds and (is_late or not any(each.is_noisy for each in judged)):
            break
    return turns


def _warm_up(
    name: str,
    way: Way,
    budget_s: float,
    min_turn_s: float,
    target: float,
    clock: Callable[[], float],
) -> Turns:
    """Take turns until three are alike or the time is up; the last says how many calls are one."""
    start_s = clock()
    samples_s: list[float] = []
    num_calls = 1
    while len(samples_s) < MAX_WARM_UP_TURNS and not is_steady(samples_s):
        samples_s.append(_turn(name, way, num_calls))
        # The first call may be slower than the rest by far, so this is seen anew in each turn.
        num_calls = max(1, math.ceil(min_turn_s / min(samples_s[-STEADY_TURNS:])))
        if clock() - start_s >= budget_s:
            break
    return Turns(
        calls_per_turn=num_calls,
        is_warm=is_steady(samples_s),
        warm_up_s=samples_s,
        target=target,
    )


def _turn(name: str, way: Way, num_calls: int) -> float:
    """Return the mean time of a call in seconds."""
    times_s = way(num_calls)
    mean_s = statistics.fmean(times_s) if times_s else math.nan
    if len(times_s) != num_calls or not 0 < mean_s < math.inf:
        raise InputError(
            f"{name!r} gave {len(times_s)} times with the mean {mean_s} s for {num_calls} calls; "
            "it must give the time of each."
        )
    return mean_s
