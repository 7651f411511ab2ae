"""Who has a turn when, for how long, and when it is enough; with a clock that the ways move."""

import itertools
import time
from collections.abc import Callable, Iterator

import pytest

from benchmarks.timing import MAX_WARM_UP_TURNS, MIN_SAMPLES, PROBE, Way, take_turns
from clip_rt.errors import InputError


class Stage:
    """A clock, and ways that let it pass and note who was called."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.calls: list[tuple[str, int]] = []

    def clock(self) -> float:
        return self.now_s

    def way(self, name: str, times_s: Iterator[float]) -> Way:
        def run(num_calls: int) -> list[float]:
            self.calls.append((name, num_calls))
            taken = [next(times_s) for _ in range(num_calls)]
            self.now_s += sum(taken)
            return taken

        return run


def alike(mean_s: float) -> Iterator[float]:
    return (mean_s * each for each in itertools.cycle([1.0, 1.01, 0.99]))


def jumping(mean_s: float) -> Iterator[float]:
    return (mean_s * each for each in itertools.cycle([1.0, 1.5]))


def rounds_of(stage: Stage, num_ways: int, num_rounds: int) -> list[list[str]]:
    names = [name for name, _ in stage.calls][-num_ways * num_rounds :]
    return [names[i : i + num_ways] for i in range(0, len(names), num_ways)]


def test_every_round_begins_with_another_and_has_everyone_once() -> None:
    stage = Stage()
    ways = {name: stage.way(name, alike(0.3)) for name in "abc"}
    turns = take_turns(ways, budget_s=1000, clock=stage.clock)
    num_rounds = len(turns["a"].samples_s)
    rounds = rounds_of(stage, 3, num_rounds)
    assert [each[0] for each in rounds] == list(
        itertools.islice(itertools.cycle("abc"), num_rounds)
    )
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert {len(each.samples_s) for each in turns.values()} == {num_rounds}


def test_a_turn_is_as_many_calls_as_take_long_enough() -> None:
    stage = Stage()
    ways = {"fast": stage.way("fast", alike(0.001)), "slow": stage.way("slow", alike(3.0))}
    turns = take_turns(ways, budget_s=1000, clock=stage.clock)
    assert 200 <= turns["fast"].calls_per_turn <= 210
    assert turns["slow"].calls_per_turn == 1
    assert turns["fast"].samples_s == pytest.approx(
        [0.001] * len(turns["fast"].samples_s), rel=0.02
    )


def test_warm_up_ends_when_it_is_steady_and_is_not_counted() -> None:
    stage = Stage()
    slow_start = itertools.chain([30.0, 2.0, 1.3], alike(1.0))
    found = take_turns({"a": stage.way("a", slow_start)}, budget_s=1000, clock=stage.clock)["a"]
    assert found.is_warm
    assert found.warm_up_s[:3] == [30.0, 2.0, 1.3]
    assert len(found.warm_up_s) == 6
    assert max(found.samples_s) < 1.05


def test_warm_up_has_an_end() -> None:
    stage = Stage()
    ways = {"a": stage.way("a", jumping(0.5))}
    found = take_turns(ways, budget_s=1e6, max_rounds=8, clock=stage.clock)["a"]
    assert len(found.warm_up_s) == MAX_WARM_UP_TURNS
    assert not found.is_warm


def test_warm_up_takes_its_share_of_the_budget_only() -> None:
    stage = Stage()
    ways = {name: stage.way(name, jumping(5.0)) for name in "ab"}
    turns = take_turns(ways, budget_s=20, min_rounds=1, clock=stage.clock)
    assert [len(each.warm_up_s) for each in turns.values()] == [1, 1]


def test_rounds_end_when_all_are_known_well_enough() -> None:
    stage = Stage()
    ways = {"a": stage.way("a", alike(0.3)), "b": stage.way("b", alike(0.4))}
    turns = take_turns(ways, budget_s=1000, clock=stage.clock)
    assert len(turns["a"].samples_s) == MIN_SAMPLES
    assert not any(each.is_noisy for each in turns.values())


@pytest.mark.parametrize(("noisy", "num_rounds"), [("b", 20), (PROBE, MIN_SAMPLES)])
def test_one_that_is_noisy_is_waited_for_unless_it_is_the_probe(
    noisy: str, num_rounds: int
) -> None:
    stage = Stage()
    ways = {"a": stage.way("a", alike(0.3)), noisy: stage.way(noisy, jumping(0.3))}
    turns = take_turns(ways, budget_s=1e6, max_rounds=20, clock=stage.clock)
    assert len(turns["a"].samples_s) == num_rounds
    assert turns[noisy].is_noisy
    assert not turns["a"].is_noisy


def test_no_round_begins_that_would_end_after_the_budget() -> None:
    stage = Stage()
    ways = {"a": stage.way("a", jumping(1.0)), "b": stage.way("b", jumping(1.0))}
    turns = take_turns(ways, budget_s=40, clock=stage.clock)
    assert MIN_SAMPLES < len(turns["a"].samples_s) < 20
    assert stage.now_s <= 40
    assert turns["a"].is_noisy


def test_the_least_number_of_rounds_is_made_in_any_case_and_few_are_called_noisy() -> None:
    stage = Stage()
    ways = {"a": stage.way("a", alike(100.0))}
    found = take_turns(ways, budget_s=10, min_rounds=3, clock=stage.clock)["a"]
    assert len(found.samples_s) == 3
    assert found.is_noisy


def test_it_is_told_after_each_round() -> None:
    stage = Stage()
    told: list[tuple[int, float]] = []
    ways = {"a": stage.way("a", jumping(0.3)), "b": stage.way("b", alike(0.3))}
    take_turns(
        ways,
        budget_s=1e6,
        max_rounds=9,
        clock=stage.clock,
        on_round=lambda num_rounds, widest: told.append((num_rounds, widest)),
    )
    assert [num_rounds for num_rounds, _ in told] == list(range(1, 10))
    assert told[-1][1] > 0.03


@pytest.mark.parametrize("way", [lambda n: [], lambda n: [1.0] * (n + 1), lambda n: [0.0] * n])
def test_a_way_that_does_not_time_its_calls_is_named(way: Callable[[int], list[float]]) -> None:
    with pytest.raises(InputError, match="'odd'"):
        take_turns({"odd": way}, budget_s=1)


@pytest.mark.parametrize(
    ("names", "limits"), [([PROBE], (6, 50)), (["a"], (8, 7)), (["a"], (0, 7))]
)
def test_limits_that_exclude_each_other(names: list[str], limits: tuple[int, int]) -> None:
    ways: dict[str, Way] = {name: lambda n: [1.0] * n for name in names}
    with pytest.raises(InputError, match="rounds need"):
        take_turns(ways, budget_s=1, min_rounds=limits[0], max_rounds=limits[1])


def test_real_calls_on_the_real_clock() -> None:
    def sleeping(num_calls: int) -> list[float]:
        times_s = []
        for _ in range(num_calls):
            start_s = time.perf_counter()
            time.sleep(0.004)
            times_s.append(time.perf_counter() - start_s)
        return times_s

    start_s = time.perf_counter()
    found = take_turns({"sleep": sleeping}, budget_s=1.0, min_turn_s=0.02)["sleep"]
    assert time.perf_counter() - start_s < 5
    assert found.calls_per_turn <= 5
    assert 0.004 <= found.interval_s.median < 0.04
