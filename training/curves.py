"""The learning curves of a run as a picture.

python -m training.curves runs/drawings      # at any time while it runs, too
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clip_rt_commands import program
from training.journal import read_journal


def draw_curves(log: Path, picture: Path) -> None:
    """Draw loss, zero-shot accuracy and retrieval over steps from a run's log.jsonl into a PNG."""
    lines = read_journal(log)
    panels = [
        ("training loss", "contrastive loss", {"loss": ""}, 1.0),
        ("zero-shot, held-out styles", "top-1, %", _series(lines, "top1_"), 100.0),
        ("retrieval by name, held-out sets", "recall at 10, %", _series(lines, "recall10_"), 100.0),
    ]
    panels = [panel for panel in panels if panel[2]]
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (title, unit, label_by_key, factor) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _draw(axes, lines, label_by_key, factor)
        axes.set(xlabel="step", ylabel=unit, title=title, ylim=(0, None))
    figure.savefig(picture, dpi=100)


def _series(lines: list[dict[str, Any]], prefix: str) -> dict[str, str]:
    keys = sorted({key for line in lines for key in line if key.startswith(prefix)})
    return {key: key.removeprefix(prefix) for key in keys}


def _draw(
    axes: Axes, lines: list[dict[str, Any]], label_by_key: dict[str, str], factor: float
) -> None:
    for key, label in label_by_key.items():
        points = [(line["step"], factor * line[key]) for line in lines if key in line]
        axes.plot(*zip(*points, strict=True), marker="." if label else "", lw=1, label=label)
    if any(label_by_key.values()):
        axes.legend()
    axes.grid(alpha=0.3)


def main(run: tyro.conf.Positional[Path]) -> None:
    """Draw curves.png of a run beside its log.

    Args:
        run: The out_dir of python -m training.run.
    """
    draw_curves(run / "log.jsonl", run / "curves.png")
    print(run / "curves.png")  # noqa: T201


if __name__ == "__main__":
    tyro.cli(main, prog=program("training.curves"))
