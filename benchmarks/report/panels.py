"""One panel of a plot each, and what panels are made of; drawn in the colours for paper."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from benchmarks.findings import Interval, Level, Row, Run, Stages
from benchmarks.report import answers, style, words
from benchmarks.report.answers import CaseRows
from benchmarks.report.style import FAINT, INK, PAGE

Panel = Callable[[Axes], None]
Value = Callable[[Row], Interval | None]


def speed_panels(run: Run) -> list[Panel]:
    """Return how many times as fast as the baseline all are, a panel for each key case."""
    return [
        bars(run, case, lambda row: row.speed, words.times, mark=1.0)
        for case in answers.key_cases(run)
        if any(row.speed and row.contender != run.baseline for row in case.rows)
    ]


def bars(
    run: Run, case: CaseRows, value: Value, text: Callable[[float], str], mark: float
) -> Panel:
    """Horizontal bars, the longest on top, each with its interval and its figure."""

    def draw(axes: Axes) -> None:
        found = [(row, each) for row in case.rows if (each := value(row))]
        found.sort(key=lambda pair: pair[1].median)
        longest = max(max(each.high for _, each in found), mark)
        for place, (row, each) in enumerate(found):
            colour = _colour(run, row.contender)
            axes.barh(place, each.median, height=0.72, color=colour)
            sides = [[each.median - each.low], [each.high - each.median]]
            axes.errorbar(
                each.median,
                place,
                xerr=sides,
                color=INK.paper,
                elinewidth=1,
                capsize=2.5,
                fmt="none",
            )
            shown = text(each.median) + (" ~" if row.is_noisy else "")
            axes.text(
                each.high + 0.035 * longest,
                place,
                shown,
                va="center",
                # Over the line of the mark.
                bbox={"facecolor": PAGE.paper, "edgecolor": "none", "pad": 0.5},
                fontweight="bold" if _is_ours(run, row.contender) else "normal",
                color=INK.paper,
            )
        axes.axvline(mark, color=FAINT.paper, lw=1, linestyle=(0, (4, 3)), zorder=2.5)
        _name_rows(run, axes, [row for row, _ in found])
        axes.set_xlim(0, 1.28 * longest)
        _title(axes, case.title)
        axes.xaxis.set_major_locator(NullLocator())
        axes.spines["bottom"].set_visible(False)

    return draw


def strip(run: Run, case: CaseRows) -> Panel:
    """Every round as a dot, the median as a line; times on a scale of equal ratios."""

    def draw(axes: Axes) -> None:
        rng = np.random.default_rng(0)
        rows = case.rows[::-1]
        for place, row in enumerate(rows):
            colour = _colour(run, row.contender)
            heights = place + rng.uniform(-0.22, 0.22, len(row.samples_ms))
            axes.plot(row.samples_ms, heights, "o", ms=4, color=colour, alpha=0.7, mew=0)
            middle = row.time_ms.median
            axes.plot([middle, middle], [place - 0.36, place + 0.36], color=INK.paper, lw=1.6)
        shown = [row.time_ms.median for row in rows] + [x for row in rows for x in row.samples_ms]
        low, high = min(shown), max(shown)
        room = (high / low) ** 0.05 * 1.03
        axes.set(xscale="log", xlim=(low / room, high * room))
        _title(axes, case.title)
        _plain_log(axes, "x")
        axes.set_xlabel("ms for each call")
        _name_rows(run, axes, rows, [words.duration(row.time_ms.median) for row in rows])

    return draw


def closed_panels(run: Run) -> list[Panel]:
    """Return the rate against the number of clients, a panel for each sort of call."""
    levels = [level for level in run.levels if level.num_clients is not None]
    return [_closed(run, title, group) for title, group in answers.by_call(levels)]


def _closed(run: Run, title: str, levels: list[Level]) -> Panel:
    def draw(axes: Axes) -> None:
        ends = []
        for name, own in answers.by_contender(levels):
            own = sorted(own, key=lambda level: level.num_clients or 0)
            clients = [level.num_clients or 0 for level in own]
            rates = [level.answered_per_s * level.items for level in own]
            colour = _colour(run, name)
            axes.plot(clients, rates, marker="o", ms=5, lw=2, color=colour, zorder=3)
            ends.append((name, rates[-1]))
        counts = sorted({level.num_clients or 0 for level in levels})
        axes.set(
            xscale="log",
            ylim=(0, None),
            title=f"{title}, closed loop",
            xlabel="clients, each waiting for its answer",
        )
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylabel(f"{_unit(levels[0])}/s")
        _name_ends(run, axes, ends)

    return draw


def open_panels(run: Run) -> list[Panel]:
    """Return latency against the offered rate, a panel for each sort of call."""
    levels = [level for level in run.levels if level.offered_per_s is not None]
    return [_open(run, title, group) for title, group in answers.by_call(levels)]


def _open(run: Run, title: str, levels: list[Level]) -> Panel:
    def draw(axes: Axes) -> None:
        ends = []
        for name, own in answers.by_contender(levels):
            own = sorted(own, key=lambda level: level.offered_per_s or 0)
            rates = [level.offered_per_s or 0 for level in own]
            colour = _colour(run, name)
            median, tail = [level.p50_ms for level in own], [level.p99_ms for level in own]
            axes.plot(rates, median, marker="o", ms=4, lw=2, color=colour, zorder=3)
            axes.plot(rates, tail, lw=1.2, linestyle=(0, (4, 2)), color=colour, zorder=3)
            axes.fill_between(rates, median, tail, color=colour, alpha=0.10, lw=0)
            ends.append((name, median[-1]))
            for rate, level in zip(rates, own, strict=True):
                if level.is_knee:
                    axes.plot(rate, level.p50_ms, "o", ms=12, mfc="none", mec=INK.paper, zorder=5)
        axes.set(yscale="log", xlim=(0, None), title=f"{title}, Poisson arrivals")
        _plain_log(axes, "y")
        axes.set_xlabel("calls/s offered (ring: it still keeps up)")
        axes.set_ylabel("latency: line p50, dashes p99; ms")
        _name_ends(run, axes, ends)

    return draw


def stack(axes: Axes, rows: Sequence[Stages]) -> None:
    """Draw where the time of calls goes, as shares of each."""
    names = list(dict.fromkeys(name for row in rows for name in row.stages_ms))
    for place, row in enumerate(reversed(rows)):
        whole, left = max(row.total_ms, sum(row.stages_ms.values())), 0.0
        for name, took_ms in row.stages_ms.items():
            share = 100 * took_ms / whole
            colour = style.of_stage(names.index(name)).paper
            axes.barh(place, share, left=left, height=0.66, color=colour)
            if share >= 4.5:
                # Ink on paper is dark, ink in the dark is light; on these colours only black reads.
                axes.text(
                    left + share / 2,
                    place,
                    f"{share:.0f}",
                    ha="center",
                    va="center",
                    color="#000000",
                )
            left += share
        if row.missing_ms > 0:
            share = 100 * row.missing_ms / whole
            axes.barh(
                place,
                share,
                left=left,
                height=0.66,
                fc="none",
                ec=FAINT.paper,
                hatch="////",
                lw=0.6,
            )
        axes.text(101, place, words.duration(row.total_ms), va="center", fontweight="bold")
    labels = [f"{row.contender}\n{row.what}" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), labels, color=INK.paper)
    axes.set(xlim=(0, 100), xlabel="share of the time of a call, %")
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    handles = [
        Patch(label=name.replace("_", " "), color=style.of_stage(place).paper)
        for place, name in enumerate(names)
    ]
    if any(row.missing_ms > 0 for row in rows):
        handles.append(Patch(label="not accounted for", fc="none", ec=FAINT.paper, hatch="////"))
    axes.figure.legend(
        handles=handles, loc="outside upper left", ncols=5 if len(handles) > 6 else len(handles)
    )


def trade_panel(run: Run) -> Panel | None:
    """Top-1 against images each second; without any top-1, the distance of embeddings."""
    case = next((each for each in answers.cases(run, "image") if each.rows[0].items == 32), None)
    if case is None:
        return None
    points = [(row, answers.top1(run, row.contender)) for row in case.rows]
    known = [(row, 100 * top1) for row, top1 in points if top1 is not None]
    if len({top1 for _, top1 in known}) > 1:
        span = max(top1 for _, top1 in known) - min(top1 for _, top1 in known)
        low = min(top1 for _, top1 in known) - max(1.0, span)
        high = max(top1 for _, top1 in known) + max(1.0, span)
        return _trade(run, case, known, "top-1 of the bundled model, %", (low, high))
    off = [(row, max(1 - row.min_cosine, 1e-8)) for row in case.rows if row.min_cosine is not None]
    if len(off) < 2:
        return None
    return _trade(run, case, off, "1 − worst cosine with FP32", None)


def _trade(
    run: Run,
    case: CaseRows,
    points: Sequence[tuple[Row, float]],
    label: str,
    height: tuple[float, float] | None,
) -> Panel:
    def draw(axes: Axes) -> None:
        for row, value in points:
            colour = _colour(run, row.contender)
            axes.plot(row.per_s.median, value, "o", ms=9, color=colour, zorder=3)
        if height:
            axes.set_ylim(*height)
        else:
            axes.set_yscale("log")
            axes.invert_yaxis()
            axes.margins(y=0.2)
        fastest = max(row.per_s.median for row, _ in points)
        axes.set(xlim=(0, 1.1 * fastest), title="speed against accuracy", ylabel=label)
        axes.set_xlabel(f"images/s ({case.title})")
        _name_points(run, axes, [(row.contender, row.per_s.median, value) for row, value in points])

    return draw


def _title(axes: Axes, text: str) -> None:
    """Title a panel from the left end of the labels of its rows, where there is room for it."""

    def labels(renderer: Any) -> Any:
        return axes.yaxis.get_tightbbox(renderer)

    axes.set_title(" ")  # Keeps the height.
    axes.annotate(
        text,
        (0, 1),
        xycoords=(labels, "axes fraction"),
        xytext=(0, 6),
        textcoords="offset points",
        # A third of a page holds about 28 letters.
        fontsize=rcParams["axes.titlesize"] * min(1.0, 28 / len(text)),
        fontweight="bold",
        annotation_clip=False,
        in_layout=False,
    )


def _colour(run: Run, name: str) -> str:
    return style.of_contender(answers.contender(run, name), name).paper


def _is_ours(run: Run, name: str) -> bool:
    facts = answers.contender(run, name)
    return facts is not None and facts.kind == "served"


def _name_rows(
    run: Run, axes: Axes, rows: Sequence[Row], figures: Sequence[str] | None = None
) -> None:
    """Label horizontal rows with their contenders, those behind Triton in bold."""
    labels = [row.contender for row in rows]
    if figures:
        labels = [f"{label}  {figure}" for label, figure in zip(labels, figures, strict=True)]
    axes.set_yticks(range(len(rows)), labels, color=INK.paper)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if _is_ours(run, row.contender) else "normal")
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.6, len(rows) - 0.4)


def _name_ends(run: Run, axes: Axes, ends: Sequence[tuple[str, float]]) -> None:
    """Write the name of each line at its right end, moved apart where they would meet."""
    # In shares of the height, which stay what they are when the layout moves the axes.
    to_share = axes.transData + axes.transAxes.inverted()
    right = axes.get_xlim()[1]
    heights = [float(to_share.transform((right, value))[1]) for _, value in ends]
    for (name, _), height in zip(ends, _spread(heights, 0.085), strict=True):
        # Some colours are too light for letters, so a dot has the colour of the line.
        dot: Any = {"color": _colour(run, name), "transform": axes.transAxes, "clip_on": False}
        axes.plot(1.03, height, "o", ms=6, **dot)
        _label(run, axes, name, (1.03, height))


def _name_points(run: Run, axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write the name of each point beside it; names at the same place go below each other."""
    to_share = axes.transData + axes.transAxes.inverted()
    places = [tuple(to_share.transform((x, y))) for _, x, y in points]
    order = sorted(range(len(points)), key=lambda index: (places[index][0] > 0.5, places[index][0]))
    for is_right in (False, True):
        side = [index for index in order if (places[index][0] > 0.5) == is_right]
        heights = _spread([places[index][1] for index in side], 0.085)
        left = min((places[index][0] for index in side), default=0.0)
        edge = max((places[index][0] for index in side), default=0.0)
        for index, height in zip(side, heights, strict=True):
            x, y = places[index]
            text_x = left - 0.04 if is_right else edge + 0.06
            look: Any = {"transform": axes.transAxes, "color": FAINT.paper, "lw": 0.6, "zorder": 2}
            axes.plot([x, text_x], [y, height], **look)
            _label(run, axes, points[index][0], (text_x, height), "right" if is_right else "left")


def _label(run: Run, axes: Axes, name: str, place: tuple[float, float], side: str = "left") -> None:
    axes.annotate(
        name,
        place,
        xycoords="axes fraction",
        xytext=(8 if side == "left" else -8, 0),
        textcoords="offset points",
        annotation_clip=False,
        va="center",
        ha=side,
        fontweight="bold" if _is_ours(run, name) else "normal",
    )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart to at least `gap`, each as little as may be."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    groups: list[list[int]] = []
    middles: list[float] = []
    for index in order:
        groups.append([index])
        middles.append(heights[index])
        while len(groups) > 1 and (
            middles[-1] - middles[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
            middles[-2:] = [float(np.mean([heights[each] for each in groups[-1]]))]
    moved = list(heights)
    for group, middle in zip(groups, middles, strict=True):
        for place, index in enumerate(group):
            moved[index] = middle + gap * (place - (len(group) - 1) / 2)
    return moved


def _plain_log(axes: Axes, side: str) -> None:
    """Label a logarithmic axis with plain numbers, as many as there is room for."""
    axis = axes.xaxis if side == "x" else axes.yaxis
    # Labels beside each other take more room than labels below each other.
    low, high = axes.get_xlim() if side == "x" else axes.get_ylim()
    ticks = _ticks(low, high, min_gap=0.2 if side == "x" else 0.09)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def _ticks(low: float, high: float, min_gap: float) -> list[float]:
    """Return round numbers in a range, of the finest series that leaves gaps of a share of it."""
    span = math.log(high / low)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for series in (
        (1.0,),
        (1.0, 3.0),
        (1.0, 2.0, 5.0),
        (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
        (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0),
    ):
        ticks = [round(step * 10.0**decade, 12) for decade in decades for step in series]
        ticks = [tick for tick in ticks if low <= tick <= high]
        gaps = [math.log(b / a) / span for a, b in itertools.pairwise(ticks)]
        if min(gaps, default=1.0) >= min_gap:
            found = ticks
    if len(found) < 2:  # So narrow that it might as well be linear.
        ticks = list(MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high))
        found = [round(float(tick), 12) for tick in ticks if low <= tick <= high]
    return found


def _unit(level: Level) -> str:
    return "texts" if level.call == "texts" else "images"
