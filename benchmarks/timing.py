"""The one timer: contenders by turns in rounds, and medians with intervals of what came of them.

Whatever slows the machine for a while slows all of them, so what one is against another is seen in
the same rounds. Every way has one turn in each round, and each round begins with another. A turn
is as many calls as take long enough for the clock and the scheduler, and its sample is their mean.

The interval of a median comes from order statistics: how many of the rounds lie below the true
median is binomial, whatever the times are distributed like, so its bounds are two of the sorted
samples. Exact confidence jumps with the number of rounds (96.9 % at 6, 99.2 % at 8), so the bounds
are interpolated between neighbours to 95 % (Hettmansperger and Sheather 1986, "Confidence intervals
based on interpolated order statistics", Statistics & Probability Letters 4), as SciPy does it. Of
normal, log-normal and exponential samples they held the median in 94.4 to 95.5 % of 4,000 trials,
for 6 to 50 rounds; the percentile bootstrap, which promises the same, in 87 % with 7 rounds, 91 to
94 % with 8 to 15.

Both take rounds for independent. Two things break that. A host slows down for minutes, for which
there are ratios of the same rounds. And a process that is started anew may be faster or slower than
the one before for all its life, which its own rounds do not show; so the rounds of several starts
are given apart, and the interval reaches as far as that of any start.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from benchmarks.findings import Interval
from clip_rt.errors import InputError

CONFIDENCE = 0.95
MIN_SAMPLES = 6
"""Of fewer samples not even the smallest and the largest hold the median with 95 %."""
STEADY_WITHIN = 0.05
STEADY_TURNS = 3
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
    max_warm_up_turns: int = MAX_WARM_UP_TURNS,
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
        min_rounds: At least; below `MIN_SAMPLES` every result is called noisy.
        max_rounds: At most.
        min_turn_s: As many calls make a turn as take this long; one that takes longer is a turn.
        max_warm_up_turns: Of each way; of 0 a turn is one call.
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
        name: _warm_up(name, way, warm_up_s, min_turn_s, max_warm_up_turns, target, clock)
        for name, way in ways.items()
    }
    names = list(ways)
    longest_round_s = 0.0
    for num_rounds in range(1, max_rounds + 1):
        round_start_s = clock()
        for name in in_turn(names, num_rounds - 1):
            turns[name].samples_s.append(_turn(name, ways[name], turns[name].calls_per_turn))
        longest_round_s = max(longest_round_s, clock() - round_start_s)
        judged = [each for name, each in turns.items() if name != PROBE]
        on_round(num_rounds, max(half_width(each.interval_s) for each in judged))
        is_late = clock() - start_s + longest_round_s > budget_s
        if num_rounds >= min_rounds and (is_late or not any(each.is_noisy for each in judged)):
            break
    return turns


def in_turn(names: Sequence[str], round_: int) -> list[str]:
    """Return the names in the order of a round, counted from 0: each begins with another."""
    first = round_ % max(1, len(names))
    return [*names[first:], *names[:first]]


def way_of(measure: Callable[[], float]) -> Way:
    """Make a way of a call that returns the seconds it took."""
    return lambda num_calls: [measure() for _ in range(num_calls)]


def time_each(call: Callable[[], object]) -> Way:
    """Make of a call a way that times each of its calls."""
    return way_of(partial(time_once, call))


def time_once(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def take_rounds(
    ways: Mapping[str, Way], num_rounds: int, *, is_warm: bool = False
) -> dict[str, list[float]]:
    """Take turns of one call each in a fixed number of rounds.

    Args:
        ways: As for `take_turns`.
        num_rounds: How many are counted.
        is_warm: Whether the ways have been called already, such as to compare their answers;
            otherwise each has a first turn that does not count.

    Returns:
        By name the seconds of a call, one for each round.
    """
    turns = take_turns(
        ways,
        budget_s=0.0,
        min_rounds=num_rounds,
        max_rounds=num_rounds,
        min_turn_s=0.0,
        max_warm_up_turns=0 if is_warm else 1,
    )
    return {name: each.samples_s for name, each in turns.items()}


def _warm_up(
    name: str,
    way: Way,
    budget_s: float,
    min_turn_s: float,
    max_turns: int,
    target: float,
    clock: Callable[[], float],
) -> Turns:
    """Take turns until three are alike or the time is up; the last says how many calls are one."""
    start_s = clock()
    samples_s: list[float] = []
    num_calls = 1
    while len(samples_s) < max_turns and not is_steady(samples_s):
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


def median_interval(*starts: Sequence[float]) -> Interval:
    """Return the median of all samples and where it lies with 95 % confidence.

    Of fewer than `MIN_SAMPLES` samples the interval is all they span, which holds the median with
    1 - 2^(1 - n) only: 94 % of 5, 75 % of 3, and nothing is known of 1. Whoever uses it says so.

    Args:
        starts: The samples of each start, one for each round, any order, finite. Of several starts
            the interval is from the lowest end of any to the highest. The 95 % are of each start;
            of two, both may be alike and a third unlike them.

    Raises:
        InputError: no samples, or one that is not finite.
    """
    if not all(starts) or not starts or not all(map(math.isfinite, itertools.chain(*starts))):
        raise InputError(f"an interval needs finite samples; these are {[*map(list, starts)]}.")
    bounds = [_bounds(sorted(samples)) for samples in starts]
    return Interval(
        median=statistics.median(itertools.chain(*starts)),
        low=min(low for low, _ in bounds),
        high=max(high for _, high in bounds),
    )


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratios of the same rounds, for `median_interval`.

    Args:
        numerators: One for each round, in order.
        denominators: Those of the same rounds, none of them 0.

    Raises:
        InputError: not as many of one as of the other, none, or a ratio that is not finite.
    """
    if len(numerators) != len(denominators) or not all(denominators):
        raise InputError(
            f"ratios need the same rounds and no zero below; there are {len(numerators)} "
            f"numerators and the denominators {list(denominators)}."
        )
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios of the same rounds."""
    return statistics.median(ratios(numerators, denominators))


def speeds(
    times_s: Mapping[str, Sequence[float]], baseline: str
) -> dict[str, tuple[Interval, Interval]]:
    """Return by name the seconds of a call, and how many times as fast as the baseline that is."""
    return {
        name: (median_interval(each_s), median_interval(ratios(times_s[baseline], each_s)))
        for name, each_s in times_s.items()
    }


def inverse(interval: Interval, numerator: float) -> Interval:
    """Return `numerator / interval`, such as the items of a call each second from its time."""
    return Interval(
        median=numerator / interval.median,
        low=numerator / interval.high,
        high=numerator / interval.low,
    )


def scaled(interval: Interval, factor: float) -> Interval:
    """Return the interval in other units; the factor is above 0."""
    return Interval(
        median=factor * interval.median, low=factor * interval.low, high=factor * interval.high
    )


def half_width(interval: Interval) -> float:
    """Return how far its farther end is from the median, as a share of the median."""
    farther = max(interval.high - interval.median, interval.median - interval.low)
    return farther / abs(interval.median) if interval.median else math.inf


def is_narrow(*starts: Sequence[float], target: float) -> bool:
    """Return whether the median of the samples is known to ±`target`, a share, with 95 %."""
    return sum(map(len, starts)) >= MIN_SAMPLES and half_width(median_interval(*starts)) <= target


def is_steady(last_samples: Sequence[float]) -> bool:
    """Return whether the last three turns differ by less than 5 %, so that warm-up is over."""
    last = last_samples[-STEADY_TURNS:]
    return len(last) == STEADY_TURNS and max(last) < (1 + STEADY_WITHIN) * min(last)


def _bounds(ordered: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the interval of one start."""
    num = len(ordered)
    if num < MIN_SAMPLES:
        return ordered[0], ordered[-1]
    k, inward = _places(num)
    return (
        (1 - inward) * ordered[k - 1] + inward * ordered[k],
        (1 - inward) * ordered[-k] + inward * ordered[-k - 1],
    )


@functools.cache
def _places(num: int) -> tuple[int, float]:
    """Return which sample from either end is a bound, and how far inward of it the bound lies.

    The k-th is the farthest inward with enough confidence, the next has not enough; the second
    figure is the share of the way to it.
    """
    k = next(k for k in range(num) if _chance_of_at_most(k, num) >= (1 - CONFIDENCE) / 2)
    # The k-th samples from both ends hold the median between them so often.
    wide, narrow = (1 - 2 * _chance_of_at_most(each - 1, num) for each in (k, k + 1))
    share = (wide - CONFIDENCE) / (wide - narrow)
    return k, (num - k) * share / (k + (num - 2 * k) * share)


def _chance_of_at_most(k: int, num: int) -> float:
    """Return how likely at most `k` of `num` samples are below the median."""
    return sum(math.comb(num, each) for each in range(k + 1)) / 2**num
