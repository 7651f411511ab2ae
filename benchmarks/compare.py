"""Two runs beside each other: what became slower or faster, and what is noise.

Times are compared in units of what the baseline took for the same case in the same rounds: a slower
hour of the host slows it as it does the others. The baseline itself, and runs without one, are
compared in units of the machine's probe. A row has changed when its new interval lies wholly on one
side of the old one and the medians differ by more than 5 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from benchmarks.findings import Interval, Row, Run
from benchmarks.timing import inverse

MIN_CHANGE = 0.05
"""Medians that are closer are the same, however narrow their intervals are."""

Unit = Literal["of the baseline", "probes", "ms"]
"""What times are given in; milliseconds where a run has neither a baseline nor a probe. Then a
slower hour of the host is a change too."""

Verdict = Literal["slower", "faster", "same"]
"""The last: same within noise."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One row of both runs."""

    suite: str
    case: str
    contender: str
    old: Interval
    new: Interval
    """Both in `unit`."""
    unit: Unit
    ratio: float
    """New median time / old one: above 1 is slower."""
    noise: float
    """What the ratio could be off by, as a share, for the intervals to meet."""
    verdict: Verdict

    @property
    def agrees(self) -> bool:
        """Whether the intervals meet."""
        return self.old.low <= self.new.high and self.new.low <= self.old.high


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What became of the rows of a run in a later one."""

    changes: list[Change]
    """In the order of the new run."""
    gone: list[tuple[str, str, str]]
    """Rows (suite, case, contender) of the old run that the new one does not have."""
    added: list[tuple[str, str, str]]
    warnings: list[str]
    """Why the runs are hard to compare: another machine, version, setting; noise."""

    @property
    def regressions(self) -> list[Change]:
        """Rows that became slower."""
        return [change for change in self.changes if change.verdict == "slower"]

    @property
    def agreeing(self) -> list[Change]:
        """Rows whose intervals meet; of runs of the same code nearly all do."""
        return [change for change in self.changes if change.agrees]

    @property
    def improvements(self) -> list[Change]:
        """Rows that became faster."""
        return [change for change in self.changes if change.verdict == "faster"]


def compare(old: Run, new: Run) -> Comparison:
    """Match the rows of two runs by suite, case and contender, and judge each pair."""
    before, after = (
        {(row.suite, row.case, row.contender): row for row in run.rows} for run in (old, new)
    )
    shared = [key for key in after if key in before]
    return Comparison(
        changes=[
            _judge(before[key], after[key], by_baseline=old.baseline == new.baseline != key[2])
            for key in shared
        ],
        gone=[key for key in before if key not in after],
        added=[key for key in after if key not in before],
        warnings=_warnings(old, new, [(before[key], after[key]) for key in shared]),
    )


def _times(old: Row, new: Row, *, by_baseline: bool) -> tuple[Unit, Interval, Interval]:
    if by_baseline and old.speed and new.speed:
        return "of the baseline", inverse(old.speed, 1.0), inverse(new.speed, 1.0)
    if old.steadied and new.steadied:
        return "probes", old.steadied, new.steadied
    return "ms", old.time_ms, new.time_ms


def _judge(old: Row, new: Row, *, by_baseline: bool) -> Change:
    unit, before, after = _times(old, new, by_baseline=by_baseline)
    ratio = after.median / before.median
    verdict: Verdict = "same"
    if after.low > before.high and ratio > 1 + MIN_CHANGE:
        verdict = "slower"
    elif after.high < before.low and ratio < 1 - MIN_CHANGE:
        verdict = "faster"
    # On the sides that face each other, which are the ones the verdict is about.
    lower, upper = (before, after) if ratio >= 1 else (after, before)
    noise = (lower.high - lower.median) / lower.median
    noise += (upper.median - upper.low) / upper.median
    return Change(
        suite=new.suite,
        case=new.case,
        contender=new.contender,
        old=before,
        new=after,
        unit=unit,
        ratio=ratio,
        noise=noise,
        verdict=verdict,
    )


def _warnings(old: Run, new: Run, pairs: list[tuple[Row, Row]]) -> list[str]:
    warnings = [
        f"{what} differs: {key} was {was}, is {now}"
        for what, was_all, now_all in (
            ("machine", old.machine, new.machine),
            ("version", old.versions, new.versions),
            ("setting", old.settings, new.settings),
        )
        for key, was, now in _differences(was_all, now_all)
    ]
    of_contenders = {each.name: each for each in old.contenders if not each.absent}
    for contender in new.contenders:
        if contender.absent or contender.name not in of_contenders:
            continue
        before = of_contenders[contender.name].versions
        warnings += [
            f"version differs: {key} of {contender.name} was {was}, is {now}"
            for key, was, now in _differences(before, contender.versions)
            if (key not in old.versions) or (key not in new.versions)
        ]
    warnings += [
        f"{what} differs: was {was}, is {now}"
        for what, was, now in (
            ("model", old.model, new.model),
            ("weights", old.weights, new.weights),
            ("probe", old.peaks.how, new.peaks.how),
        )
        if was != now
    ]
    for which, run in (("old", old), ("new", new)):
        warnings += [f"the {which} run: {warning}" for warning in run.conditions.warnings]
    warnings += [
        f"{after.suite}, {after.case}, {after.contender}: items of a call were {before.items}, "
        f"are {after.items}"
        for before, after in pairs
        if before.items != after.items
    ]
    num_noisy = sum(before.is_noisy or after.is_noisy for before, after in pairs)
    if num_noisy:
        warnings.append(f"{num_noisy} of {len(pairs)} rows are noisy in one of the runs")
    return warnings


def _differences(
    old: Mapping[str, object], new: Mapping[str, object]
) -> list[tuple[str, object, object]]:
    """Keys whose values differ, with both; "absent" where there is none."""
    return [
        (key, old.get(key, "absent"), new.get(key, "absent"))
        for key in dict.fromkeys([*old, *new])
        if old.get(key, "absent") != new.get(key, "absent")
    ]
