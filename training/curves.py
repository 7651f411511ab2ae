"""The learning curves of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure


def draw_curves(log: Path, picture: Path) -> None:
    """Draw loss and zero-shot accuracy over steps from a run's log.jsonl into a PNG."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    if losses:
        left.plot(*zip(*losses, strict=True), linewidth=1)
    left.set(xlabel="step", ylabel="contrastive loss", title="training loss")
    styles = sorted({key for line in lines for key in line if key.startswith("top1_")})
    for style in styles:
        points = [(line["step"], 100 * line[style]) for line in lines if style in line]
        right.plot(*zip(*points, strict=True), marker=".", label=style.removeprefix("top1_"))
    right.set(
        xlabel="step",
        ylabel="top-1, %",
        title="zero-shot accuracy on held-out styles",
        ylim=(0, None),
    )
    if styles:
        right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=100)
