"""How many examples each way of using them needs, on drawings of a new style.

    python -m benchmarks.studies.few_shot --checkpoint runs/drawings/checkpoint.safetensors

The classes are 30 kinds of emoji, drawn by OpenMoji, whose drawings are held out of training as a
whole. The recipes in `training.few_shot` and the prompt were chosen on one draw of OpenMoji's black
drawings. Those are outlines of the same pictures, so the choice is not independent of the test: the
figures are a little kinder than a new style would be. Writes docs/few_shot.png and a dated JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.record import save
from benchmarks.studies.common import ROOT, console
from benchmarks.studies.emoji import kind_by_hexcode, load_style, with_kinds
from clip_rt.inputs.prompts import DEFAULT_TEMPLATE
from clip_rt_commands import program
from clip_rt_commands.errors import command
from training import few_shot
from training.evaluation.embed import on_white, open_model

SHOTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class FewShotConfig:
    """Measure, print a table, draw the plot, and write a dated JSON."""

    checkpoint: Path
    """Weights of the bundled model."""
    style: str = "openmoji"
    """Drawing style to learn and to test on."""
    seeds: int = 3
    """Draws of examples to average over."""
    threads: int = 2
    """Of torch."""
    picture: Path = ROOT / "docs/few_shot.png"
    """Where the plot goes."""


def main(config: FewShotConfig) -> None:
    """Learn from more and more examples."""
    torch.set_num_threads(config.threads)
    model = open_model(config.checkpoint)
    labels, _ = kind_by_hexcode()
    drawings, right_N = with_kinds(load_style(config.style))
    task = few_shot.make_task(model, on_white(drawings.pixels), right_N, labels, [DEFAULT_TEMPLATE])
    curves = few_shot.measure(model, task, shots=SHOTS, seeds=range(config.seeds))
    few_shot.show(curves, console)
    few_shot.draw(
        curves,
        config.picture,
        title=f"Few-shot accuracy on {config.style}, a style the model never saw",
        subtitle=f"{len(labels)} kinds of emoji; mean and standard deviation of {config.seeds} "
        "draws of examples",
    )
    results = {
        "style": config.style,
        "classes": labels,
        "images": len(right_N),
        "templates": [DEFAULT_TEMPLATE],
        "metric": "mean recall over classes, on images no method learned from",
        "summary": few_shot.summarise(curves),
        "scores": curves,
    }
    save("studies.few_shot", results, packages=("numpy", "scikit-learn", "torch"))
    console.print(f"drawn to {config.picture}")


if __name__ == "__main__":
    with command():
        main(tyro.cli(FewShotConfig, prog=program(__spec__.name), description=__doc__))
