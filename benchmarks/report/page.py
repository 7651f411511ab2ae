"""A run as one HTML page that needs nothing else: no script, no font, no picture is fetched.

All text of the run is escaped, and the page forbids the browser to load anything, so that a name
in a result can do no harm.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from benchmarks.findings import Row, Run
from benchmarks.report import answers, plots, words

TEMPLATE = "page.html"


def render_page(run: Run) -> str:
    """Return a run as a page of HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = "suite label number duration times percent plus_minus low_to_high cosine".split()
    environment.filters.update({name: getattr(words, name) for name in names})
    environment.filters.update(plain=_plain, top1=lambda name: answers.top1(run, name))
    return environment.get_template(TEMPLATE).render(
        run=run,
        colour_of=lambda name: plots.colour_of(run, name),
        headline=answers.headline(run),
        remarks=answers.remarks(run),
        machine=answers.machine(run),
        suites=[(suite, answers.cases(run, suite)) for suite in answers.suites(run)],
        is_ours=lambda name: name in _served(run),
        width_of=_width_of,
        pictures=_pictures(run),
    )


def write_page(run: Run, path: Path) -> None:
    """Write a run as a page of HTML."""
    path.write_text(render_page(run), encoding="utf-8")


def _served(run: Run) -> set[str]:
    return {each.name for each in run.contenders if each.kind == "served"}


def _pictures(run: Run) -> dict[str, Markup]:
    """Return the SVG of each plot that the run has something for, by its name."""
    figures: dict[str, Figure | None] = {
        "speedups": plots.speedups(run),
        "limits": plots.limits(run),
        "concurrency": plots.concurrency(run),
        "offered": plots.offered(run),
        "stages": plots.stages(run),
        "accuracy": plots.accuracy(run),
    }
    for number, suite in enumerate(answers.suites(run)):
        figures[f"latencies-{number}"] = plots.latencies(run, suite)
    # Safe: matplotlib escapes what is text in its SVG.
    return {
        name: Markup(plots.svg(figure, name))
        for name, figure in figures.items()
        if figure is not None
    }


def _width_of(row: Row, rows: Iterable[Row]) -> str:
    """Return how long the bar of a row is, in percent of the longest of its case."""
    return f"{100 * row.per_s.median / max(each.per_s.median for each in rows):.1f}"


def _plain(value: object) -> str:
    """Return a value of machine, versions or settings as a reader would write it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
