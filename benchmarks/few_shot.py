"""How many examples each way of using them needs, on a hand the bundled model never saw.

    python -m benchmarks.few_shot --checkpoint runs/drawings/checkpoint.safetensors

The classes are 30 kinds of emoji, drawn by OpenMoji, whose drawings are held out of training as a
whole. The recipes in `training.few_shot` and the prompt were chosen on one draw of OpenMoji's black
drawings. Those are outlines of the same pictures, so the choice is not independent of the test: the
figures are a little kinder than a new hand would be. Writes docs/few_shot.png and a dated JSON.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.emoji import ROOT, kind_by_hexcode, load_style, with_kinds
from benchmarks.record import save
from clip_rt.inputs.prompts import DEFAULT_TEMPLATE
from training import few_shot
from training.evaluation.embed import on_white, open_model

SHOTS = (1, 2, 4, 8, 16)


def main(
    checkpoint: Annotated[Path, typer.Option(help="Weights of the bundled model.")],
    style: Annotated[str, typer.Option(help="Hand to learn and to test on.")] = "openmoji",
    seeds: Annotated[int, typer.Option(help="Draws of examples to average over.")] = 3,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
    picture: Annotated[Path, typer.Option(help="Where the plot goes.")] = ROOT
    / "docs/few_shot.png",
) -> None:
    """Measure, print a table, draw the plot, and write a dated JSON."""
    torch.set_num_threads(threads)
    model = open_model(checkpoint)
    labels, _ = kind_by_hexcode()
    drawings, right_N = with_kinds(load_style(style))
    task = few_shot.make_task(model, on_white(drawings.pixels), right_N, labels, [DEFAULT_TEMPLATE])
    curves = few_shot.measure(model, task, shots=SHOTS, seeds=range(seeds))
    few_shot.show(curves, Console())
    few_shot.draw(
        curves,
        picture,
        title=f"Few-shot accuracy on {style}, a hand the model never saw",
        subtitle=f"{len(labels)} kinds of emoji; mean and standard deviation of {seeds} draws of "
        "examples",
    )
    path = save(
        "few_shot",
        {
            "style": style,
            "classes": labels,
            "images": len(right_N),
            "templates": [DEFAULT_TEMPLATE],
            "metric": "mean recall over classes, on images no method learned from",
            "summary": few_shot.summarise(curves),
            "scores": curves,
        },
        packages=("numpy", "scikit-learn", "torch"),
    )
    Console().print(f"written to {path} and {picture}")


if __name__ == "__main__":
    typer.run(main)
