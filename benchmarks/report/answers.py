"""What a run comes to: which rows belong together, which matter most, and all in two sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.findings import Contender, Level, Row, Run
from benchmarks.report import words
from benchmarks.timing import half_width
from clip_rt.processor import in_brackets

KEY_CASES: tuple[tuple[str, int | None], ...] = (
    ("image", 1),
    ("image", 32),
    ("jpeg", 64),
    ("text", 1),
    ("classifier", None),
    ("jpeg", 1),
    ("text", 32),
    ("zero_shot", 1),
)
"""Suite and items of the cases that a reader sees first, the most telling first."""


@dataclass(frozen=True, kw_only=True)
class CaseRows:
    """All contenders in one case."""

    suite: str
    name: str
    rows: list[Row]
    """The fastest first."""

    @property
    def title(self) -> str:
        """Such as "image: batch 32"."""
        return words.case(self.suite, self.name)

    def of(self, contender: str) -> Row | None:
        """Return the row of a contender, None where it took no part."""
        return next((row for row in self.rows if row.contender == contender), None)


@dataclass(frozen=True, kw_only=True)
class Remark:
    """What a reader has to know before any figure."""

    level: Literal["bad", "warn"]
    text: str


def suites(run: Run) -> list[str]:
    """Return the suites of a run in its order."""
    return list(dict.fromkeys(row.suite for row in run.rows))


def cases(run: Run, suite: str | None = None) -> list[CaseRows]:
    """Return the cases of a run, or of one of its suites, in its order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in run.rows:
        if suite in (None, row.suite):
            found.setdefault((row.suite, row.case), []).append(row)
    return [
        CaseRows(suite=of, name=name, rows=sorted(rows, key=lambda row: row.time_ms.median))
        for (of, name), rows in found.items()
    ]


def key_cases(run: Run, limit: int = 6) -> list[CaseRows]:
    """Return the cases that a reader should see first, in the order of the run."""
    known = cases(run)
    chosen: list[CaseRows] = []
    for suite, items in KEY_CASES:
        match = (
            case for case in known if case.suite == suite and items in (None, case.rows[0].items)
        )
        chosen += [case for case in match if case not in chosen][:1]
    chosen = chosen[:limit] or known[:limit]
    return [case for case in known if case in chosen]


def by_call(levels: Iterable[Level]) -> list[tuple[str, list[Level]]]:
    """Return levels of load by what a call brings, each with its name."""
    groups: dict[str, list[Level]] = {}
    for level in levels:
        groups.setdefault(words.load(level.call, level.items), []).append(level)
    return list(groups.items())


def by_contender(levels: Iterable[Level]) -> list[tuple[str, list[Level]]]:
    """Return levels of load by contender; a run takes the contenders by turns."""
    groups: dict[str, list[Level]] = {}
    for level in levels:
        groups.setdefault(level.contender, []).append(level)
    return list(groups.items())


def contender(run: Run, name: str) -> Contender | None:
    """Return what is known of a contender."""
    return next((each for each in run.contenders if each.name == name), None)


def ours(run: Run, precision: Literal["fp32", "fp16", "int8"]) -> str | None:
    """Return the contender that speaks for this project in a precision.

    The whole path to Triton where it took part, else an engine called directly; of several the one
    that is fastest over all its cases (geometric mean of items each second, in the cases that all
    of them have), so that it is one and the same in every case.
    """
    for kind in ("served", "runtime"):
        names = [
            each.name
            for each in run.contenders
            if (each.kind, each.precision) == (kind, precision)
            and any(row.contender == each.name for row in run.rows)
        ]
        if names:
            return max(names, key=lambda name: _mean_rate(run, name, names))
    return None


def _mean_rate(run: Run, name: str, names: Sequence[str]) -> float:
    """Return the mean logarithm of the rates of `name` in the cases that all of `names` have."""
    shared = [case for case in cases(run) if all(case.of(each) for each in names)]
    rates = [row.per_s.median for case in shared if (row := case.of(name)) and row.per_s.median > 0]
    return sum(map(math.log, rates)) / len(rates) if rates else -math.inf


def top1(run: Run, name: str) -> float | None:
    """Return top-1 of the bundled model as `name` runs it, else as its precision does."""
    found = {each.contender: each.top1 for each in run.accuracy}
    if found.get(name) is not None:
        return found[name]
    facts = contender(run, name)
    if facts is None:
        return None
    same = [each.top1 for each in run.accuracy if each.precision == facts.precision]
    return next((each for each in same if each is not None), None)


def headline(run: Run) -> list[str]:
    """Return what the run found in about two sentences; empty where it timed nothing of ours."""
    fp32, int8 = ours(run, "fp32"), ours(run, "int8")
    first = next((suite for suite in ("image", "jpeg", *suites(run)) if cases(run, suite)), None)
    images = cases(run, first) if first else []
    return [
        sentence
        for sentence in (_faster(run, images, fp32, int8), _how_fast(images, fp32, int8))
        if sentence
    ]


def _faster(run: Run, images: list[CaseRows], fp32: str | None, int8: str | None) -> str:
    parts: list[str] = []
    for name, precision in ((fp32, "FP32"), (int8, "INT8")):
        rows = [row for case in images if name and (row := case.of(name))]
        ratios = [row.speed.median for row in rows if row.speed]
        if ratios and name != run.baseline:
            low, high = words.number(min(ratios)), words.number(max(ratios))
            span = low if low == high else f"{low} to {high}"
            if any(row.is_noisy for row in rows):
                span = f"roughly {span}"
            as_fast = "" if parts else f" times as fast as {run.baseline}"
            parts.append(f"{span}{as_fast} in {precision}")
    facts = contender(run, fp32 or int8 or "")
    if not parts or facts is None:
        return ""
    path = "From client through Triton to engine" if facts.kind == "served" else "Called directly"
    unit = images[0].rows[0].unit
    return f"{path}, {run.model} encodes {unit} {words.listed(parts)}, with the same weights."


def _how_fast(images: list[CaseRows], fp32: str | None, int8: str | None) -> str:
    rows = {
        name: [row for case in images if name and (row := case.of(name))] for name in (fp32, int8)
    }
    main = rows[fp32] or rows[int8]
    if not main:
        return ""
    first = min(main, key=lambda row: row.items)
    most = max(main, key=lambda row: row.per_s.median)
    unit = (
        first.unit.removesuffix("es") if first.unit == "classes" else first.unit.removesuffix("s")
    )
    what = f"One {unit}" if first.items == 1 else f"A batch of {first.items}"
    text = f"{what} takes {words.duration(first.time_ms.median)}"
    other = next((row for row in rows[int8] if row.case == first.case), None)
    if other and main is not rows[int8]:
        text += f" ({words.duration(other.time_ms.median)} in INT8)"
    best = "FP32" if main is rows[fp32] else "INT8"
    text += f"; at best {best} does {words.number(most.per_s.median)} {most.unit}/s"
    if most.share_of_limit and most.limit:
        share = words.percent(most.share_of_limit.median)
        text += f", {share} of what this machine could ({most.limit})"
    return text + "."


def remarks(run: Run) -> list[Remark]:
    """Return, in plain words, why the run is not to be believed, or only with care."""
    found = [Remark(level="bad", text=f"This run failed: {each}") for each in run.failures]
    missed = [bar for bar in run.bars if not bar.is_met]
    if missed:
        names = words.listed([bar.what for bar in missed])
        found.append(
            Remark(level="warn", text=f"Missed {len(missed)} of {len(run.bars)} bars: {names}.")
        )
    noisy = [row for row in run.rows if row.is_noisy]
    if noisy:
        worst = max(noisy, key=lambda row: half_width(row.time_ms))
        found.append(
            Remark(
                level="warn",
                text=f"Noisy: {len(noisy)} of {len(run.rows)} times are less certain than was "
                f"asked for, the worst {words.plus_minus(worst.time_ms)} ({worst.contender}, "
                f"{words.case(worst.suite, worst.case)}). They are marked ~.",
            )
        )
    others = [each[:1].upper() + each[1:] for each in run.conditions.warnings]
    return found + [Remark(level="warn", text=each) for each in others]


def machine(run: Run) -> str:
    """Return what the run was made on: "2 cores of Intel Xeon (AVX-512, VNNI), 23.5 GiB".

    How fast it is depends on the instruction sets more than on the name; older runs do not say.
    """
    facts = run.machine
    cpu = str(facts.get("cpu") or "an unnamed processor")
    flags, caps = facts.get("cpu_flags"), facts.get("cpu_caps")
    cpu += in_brackets(
        flags if isinstance(flags, list) else (), caps if isinstance(caps, dict) else {}
    )
    cores = facts.get("usable_cores") or facts.get("cores")
    parts = [f"{cores} cores of {cpu}" if cores else cpu]
    if facts.get("memory_gib"):
        parts.append(f"{facts['memory_gib']} GiB")
    if facts.get("gpu"):
        parts.append(str(facts["gpu"]))
    return ", ".join(parts)
