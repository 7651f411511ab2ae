"""The plots of a run, one function each; None where the run has nothing for it.

Drawn in the colours for paper of `style`, so that a page can give them others.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.findings import Run
from benchmarks.report import answers, panels, style, words
from benchmarks.report.panels import Panel
from benchmarks.report.style import FAINT, GRID, INK

PAGE_IN = 10.0
"""Width of a plot of a page."""
PNG_IN, PNG_DPI = 14.0, 100
LOOK = Path(__file__).with_name("paper.mplstyle")


def speedups(run: Run) -> Figure | None:
    """Draw how many times as fast as the baseline each contender is, in the key cases."""
    return _grid(panels.speed_panels(run))


def limits(run: Run) -> Figure | None:
    """Draw which share of what the machine could do each contender reaches, in the key cases."""
    shares = [
        panels.bars(run, case, lambda row: row.share_of_limit, words.percent, mark=1.0)
        for case in answers.key_cases(run)
        if any(row.share_of_limit for row in case.rows)
    ]
    return _grid(shares)


def latencies(run: Run, suite: str) -> Figure | None:
    """Draw the times of all rounds of each contender, in all cases of a suite."""
    return _grid([panels.strip(run, case) for case in answers.cases(run, suite)], num_columns=2)


def concurrency(run: Run) -> Figure | None:
    """Draw the rate of answers against the number of clients (closed loop)."""
    return _grid(panels.closed_panels(run), num_columns=2, row_in=3.4)


def offered(run: Run) -> Figure | None:
    """Draw latency against the rate at which calls arrive (open loop); knees are ringed."""
    return _grid(panels.open_panels(run), num_columns=2, row_in=3.8)


def stages(run: Run) -> Figure | None:
    """Draw where the time of a call goes, as shares of the whole."""
    if not run.stages:
        return None
    with _look():
        figure = Figure(figsize=(PAGE_IN, 1.1 + 0.52 * len(run.stages)), layout="constrained")
        panels.stack(figure.subplots(), run.stages)
    return figure


def accuracy(run: Run) -> Figure | None:
    """Draw what is lost in accuracy against what is won in speed."""
    panel = panels.trade_panel(run)
    return _grid([panel] if panel else [], num_columns=1, row_in=3.8)


def svg(figure: Figure, name: str) -> str:
    """Write a figure as SVG to put into a page.

    Args:
        figure: What to draw.
        name: Of the figure in the page; letters and dashes. Ids within begin with it.

    Returns:
        An `<svg>` element of no fixed size, its text as text, its colours as variables of
        `style.css`; nothing in it is fetched.
    """
    file = io.StringIO()
    with _look(**{"svg.hashsalt": name}):
        # Without these there is no block of metadata, which names hosts and the time of day.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    head = re.sub(r' (?:width|height|version)="[^"]*"', "", head)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\1{name}-", body)
    # Of the width of the page, and no wider than it was drawn for: letters would grow with it.
    width = f"max-width:{100 * figure.get_figwidth() / PAGE_IN:.0f}%"
    return style.by_name(f'{head} role="img" aria-labelledby="{name}" style="{width}">{body}')


def render_png(run: Run, path: Path) -> bool:
    """Draw the key plots as one PNG, 1400 pixels wide and legible at half of that.

    Returns:
        Whether there was anything to draw; else no file is written.
    """
    speeds = panels.speed_panels(run)
    shown = speeds or [panels.strip(run, case) for case in answers.key_cases(run)]
    more = [*panels.closed_panels(run)[:1], *panels.open_panels(run)[:1]]
    if not shown and not more:
        return False
    heights = [3.9] * math.ceil(len(shown) / 3) + [5.0] * bool(more)
    with _look(**{"font.size": 13.0, "axes.titlesize": 14.0}):
        figure = Figure(figsize=(PNG_IN, sum(heights) + 1.1), layout="constrained")
        figure.set_facecolor("white")
        tops = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for position, part in enumerate(tops):
            is_more = bool(more) and position == len(tops) - 1
            part.set_facecolor("none")
            row = more if is_more else shown[3 * position : 3 * position + 3]
            _fill(part.subplots(1, 2 if is_more else 3, squeeze=False), row)
        title = f"{run.model}, times as fast as {run.baseline}" if speeds else run.model
        figure.suptitle(title, x=0.012, ha="left", fontsize=20, fontweight="bold")
        note = "; ".join([answers.machine(run), run.date, run.command, *_accuracy_note(run)])
        figure.supxlabel(
            textwrap.fill(note, 165), x=0.012, ha="left", fontsize=11, color=FAINT.paper
        )
        figure.savefig(path, dpi=PNG_DPI, metadata={"Software": None})
    return True


def _accuracy_note(run: Run) -> list[str]:
    """What each precision costs, in words."""
    top1 = {each.precision: each.top1 for each in run.accuracy if each.top1 is not None}
    parts = [f"{100 * value:.1f} % in {name.upper()}" for name, value in top1.items()]
    return [f"top-1 of the bundled model {words.listed(parts)}"] if parts else []


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


def _look(**more: object) -> AbstractContextManager[None]:
    """Draw as `paper.mplstyle` says, in the colours for paper."""
    look: Any = dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), FAINT.paper)
    look |= dict.fromkeys(("axes.edgecolor", "grid.color"), GRID.paper)
    return rc_context(look | {"text.color": INK.paper} | more, LOOK)
