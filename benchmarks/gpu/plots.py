"""The plots of a run on a GPU as one PNG, in the look of the report of `benchmarks/run.py`."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.document import result_of
from benchmarks.gpu.tables import number

LOOK = Path(__file__).parents[1] / "report/paper.mplstyle"
OURS = ("#0b3c7d", "#2878c8", "#7fbcec", "#0091a1", "#4a4fa8", "#8d97dc")
PEERS = ("#56595d", "#96999d")
WIDTH_IN, ROW_IN, DPI = 14.0, 4.4, 100
Panel = Callable[[Any], None]


def render_png(run: Mapping[str, Any], path: Path) -> bool:
    """Draw what was measured of encoders and training.

    Returns:
        Whether there was anything to draw, and matplotlib to draw it with; else no file is written.
    """
    panels = _panels(run)
    if not panels or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(fname=LOOK):
        num_rows = math.ceil(len(panels) / 2)
        figure = Figure(figsize=(WIDTH_IN, ROW_IN * num_rows), layout="constrained")
        grid = figure.subplots(num_rows, 2, squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place < len(panels):
                panels[place](axes)
            else:
                axes.set_axis_off()
        what = result_of(run, "device").get("name") or "rehearsal on a processor"
        figure.suptitle(f"{what}, {run['date']}", x=0.012, ha="left", fontweight="bold")
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return True


def _panels(run: Mapping[str, Any]) -> list[Panel]:
    cases = [case for case in result_of(run, "encoders").get("cases", []) if case["rows"]]
    groups: dict[tuple[str, str], list[Any]] = {}
    for case in cases:
        groups.setdefault((case["model"], case["tower"]), []).append(case)
    panels = [_throughput(*key, group) for key, group in groups.items()]
    if any("gemm_share" in row for case in cases for row in case["rows"].values()):
        panels.append(_shares(cases[0]))
    steps = [
        (f"{model['model']}, {name}{', compiled' * model['is_compiled']}", row)
        for model in result_of(run, "training").get("models", [])
        for name, row in model["rows"].items()
        if "images_per_s" in row
    ]
    return panels + ([_steps(steps)] if steps else [])


def _throughput(model: str, tower: str, cases: list[Any]) -> Panel:
    def draw(axes: Any) -> None:
        cases.sort(key=lambda case: case["batch"])
        names = dict.fromkeys(name for case in cases for name in case["rows"])
        for name in names:
            own = [(case["batch"], case["rows"][name]) for case in cases if name in case["rows"]]
            axes.plot(
                [batch for batch, _ in own],
                [row["items_per_s"]["median"] for _, row in own],
                marker="o",
                label=name,
                color=_colour(list(names), name, is_ours=own[0][1]["is_ours"]),
            )
        axes.set(xscale="log", yscale="log", title=f"{model}, {tower}s", xlabel=f"{tower}s a call")
        axes.set_ylabel(f"{tower}s/s")
        axes.set_xticks([case["batch"] for case in cases], [str(case["batch"]) for case in cases])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: number(value))
        axes.legend(fontsize=8)

    return draw


def _shares(case: Any) -> Panel:
    rows = [(name, row) for name, row in case["rows"].items() if "gemm_share" in row]

    def draw(axes: Any) -> None:
        names = [name for name, _ in rows]
        values = [100 * row["gemm_share"]["median"] for _, row in rows]
        colours = [_colour(names, name, is_ours=row["is_ours"]) for name, row in rows]
        _bars(axes, names, values, colours)
        axes.set_title(f"{case['model']}, {case['batch']} {case['tower']}s: % of the GEMM rate")

    return draw


def _steps(rows: list[tuple[str, Any]]) -> Panel:
    def draw(axes: Any) -> None:
        colours = [PEERS[0] if "open_clip" in name else OURS[1] for name, _ in rows]
        _bars(axes, [name for name, _ in rows],
              [row["images_per_s"]["median"] for _, row in rows], colours)  # fmt: skip
        axes.set_title("training in bf16, images/s")

    return draw


def _bars(axes: Any, names: list[str], values: list[float], colours: list[str]) -> None:
    places = range(len(names))
    axes.barh(places, values, color=colours)
    for place, value in zip(places, values, strict=True):
        axes.text(value, place, f" {number(value)}", va="center")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.15 * max(values))


def _colour(names: list[str], name: str, *, is_ours: bool) -> str:
    colours = OURS if is_ours else PEERS
    return colours[names.index(name) % len(colours)]
