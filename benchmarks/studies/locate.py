"""How often `clip_rt.locate` finds a drawing on a canvas of several, with the bundled model.

    python -m benchmarks.studies.locate

Drawings in a style that the model never saw are pasted at random places, in random sizes, onto a
white canvas, so that none covers another. One of them is looked for by its name. The first box is
right where it overlaps the true one by half (intersection over union), which is that of the
picture, with the margin that such pictures have, or of what is drawn in it ("tight"). The pointing
game (Zhang et al. 2016, "Top-down Neural Attention by Excitation Backprop",
section 4.1) asks only that its centre lies within what is drawn. Since the model names less than
half of these drawings right where it sees them alone, figures stand also for those that it does.
A name of no drawing on the canvas has a box too where its score reaches the threshold.

Every embedding comes from the real Triton through `clip_rt.Client`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

import clip_rt
from benchmarks.record import save
from benchmarks.studies.common import ROOT, show
from benchmarks.studies.drawings import pictures
from benchmarks.studies.emoji import load_style, names
from clip_rt import localization
from clip_rt.localization import Box, find_iou, locate
from clip_rt_commands import program
from clip_rt_commands.errors import command

STYLE = "openmoji"
TEMPLATES = ("{}", "an emoji of {}", "a drawing of {}")
NUM_DRAWN = (1, 4, 9)
SHARES = {1: (0.25, 0.75), 4: (0.25, 0.45), 9: (0.18, 0.3)}
"""Side of a picture as a share of the canvas's, by the number of drawings."""
MIN_IOU = 0.5
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "rectangles too": {"aspect_ratios": (0.5, 1.0, 2.0)},
}
MAX_TRIES = 200
"""For a place that is free, before a canvas is begun anew."""


@dataclass(frozen=True, kw_only=True)
class LocateStudyConfig:
    """Measure, print a table, and write a dated JSON."""

    repository: Path = ROOT / "model_repository"
    """Model repository to serve."""
    num_canvases: int = 16
    """For each number of drawings."""
    side_px: int = 512
    """Of a canvas."""
    seed: int = 0
    """Of drawings, places and sizes."""


@dataclass(frozen=True)
class Canvas:
    """Drawings on white."""

    image: Image.Image
    wanted: int
    """Which drawing of the style is looked for."""
    box: Box
    """Where its picture is."""
    tight: Box
    """Where in it something is drawn."""
    absent: int
    """A drawing of another name than any on the canvas."""


@dataclass
class Outcomes:
    """Of the canvases of one kind."""

    ious: list[float] = field(default_factory=list)
    tight_ious: list[float] = field(default_factory=list)
    has_false: list[bool] = field(default_factory=list)
    is_pointed: list[bool] = field(default_factory=list)
    is_known: list[bool] = field(default_factory=list)

    def add(self, found: Box, canvas: Canvas, *, has_false: bool, is_known: bool) -> None:
        """Note the first box of a canvas."""
        (x, y), tight = np.reshape(found, (2, 2)).mean(axis=0), canvas.tight
        both = find_iou(np.array([found]), np.array([canvas.box, tight]))[0].tolist()
        self.ious.append(both[0])
        self.tight_ious.append(both[1])
        self.is_pointed.append(bool(tight[0] <= x < tight[2] and tight[1] <= y < tight[3]))
        self.has_false.append(has_false)
        self.is_known.append(is_known)

    def summarise(self) -> dict[str, float]:
        """Return the figures."""
        is_right, is_known = np.array(self.ious) >= MIN_IOU, np.array(self.is_known)
        pointed = np.array(self.is_pointed)
        return {
            "recall": float(is_right.mean()),
            "recall_tight": float((np.array(self.tight_ious) >= MIN_IOU).mean()),
            "pointing": float(pointed.mean()),
            "false_boxes": float(np.mean(self.has_false)),
            "mean_iou": float(np.mean(self.ious)),
            "known": float(is_known.mean()),
            "recall_of_known": float(is_right[is_known].mean()),
            "pointing_of_known": float(pointed[is_known].mean()),
            "canvases": len(self.ious),
        }


def find_drawn(pixels: NDArray[np.uint8]) -> Box:
    """Return where a picture is not white, as shares of its side: left, top, right, bottom."""
    rows, columns = (np.flatnonzero((pixels < 250).any(axis=(axis, 2))) for axis in (1, 0))
    edges = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / len(pixels)
    left, top, right, bottom = edges.tolist()
    return left, top, right, bottom


def paint(
    white: Sequence[NDArray[np.uint8]],
    chosen: Sequence[int],
    absent: int,
    side_px: int,
    rng: np.random.Generator,
) -> Canvas:
    """Paste drawings onto a canvas; the first of the chosen is the one that is looked for."""
    while True:
        image, boxes = Image.new("RGB", (side_px, side_px), "white"), np.zeros((0, 4))
        for index in chosen:
            side = round(rng.uniform(*SHARES[len(chosen)]) * side_px)
            for _ in range(MAX_TRIES):
                left, top = rng.integers(side_px - side + 1, size=2).tolist()
                box = np.array([[left, top, left + side, top + side]], np.float64)
                if find_iou(box, boxes).sum() == 0:
                    break
            else:
                break
            picture = Image.fromarray(white[index])
            image.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (left, top))
            boxes = np.concatenate([boxes, box])
        else:
            left, top, right, bottom = boxes[0].tolist()
            side = right - left
            inner = find_drawn(white[chosen[0]])
            tight = (
                *(left + side * inner[0], top + side * inner[1]),
                *(left + side * inner[2], top + side * inner[3]),
            )
            return Canvas(image, chosen[0], (left, top, right, bottom), tight, absent)


def main(config: LocateStudyConfig) -> None:
    """Measure canvases of each number of drawings, with each setting."""
    rng = np.random.default_rng(config.seed)
    drawings = load_style(STYLE)
    titles, white = names(drawings), pictures(drawings)
    canvases: dict[int, list[Canvas]] = {}
    for number in NUM_DRAWN:
        canvases[number] = []
        while len(canvases[number]) < config.num_canvases:
            absent, *chosen = rng.choice(len(white), number + 1, replace=False).tolist()
            if titles[absent] not in {titles[index] for index in chosen}:
                canvases[number].append(paint(white, chosen, absent, config.side_px, rng))
    whole: Box = (0.0, 0.0, config.side_px, config.side_px)
    results: dict[str, dict[str, float]] = {}
    with clip_rt.Client(repository=config.repository, timeout_s=300.0) as client:
        labels = tuple(dict.fromkeys(titles))
        best = client.zero_shot(white, labels, templates=TEMPLATES).best
        is_known = [found == title for found, title in zip(best, titles, strict=True)]
        for number, some in canvases.items():
            for setting, options in SETTINGS.items():
                outcomes = Outcomes()
                for canvas in some:
                    wanted, absent = titles[canvas.wanted], titles[canvas.absent]
                    found = locate(
                        client,
                        canvas.image,
                        [wanted, absent],
                        templates=TEMPLATES,
                        threshold=0.0,
                        **options,
                    )
                    first = next(each for each in found if each.text == wanted)
                    scores = [each.score for each in found if each.text == absent]
                    outcomes.add(
                        first.box,
                        canvas,
                        has_false=max(scores) >= localization.THRESHOLD,
                        is_known=is_known[canvas.wanted],
                    )
                results[f"{number} drawings, {setting}"] = outcomes.summarise()
            outcomes = Outcomes()
            for canvas in some:
                outcomes.add(
                    whole,
                    canvas,
                    has_false=True,
                    is_known=is_known[canvas.wanted],
                )
            results[f"{number} drawings, the whole image"] = outcomes.summarise()
    shown = (
        *("recall", "recall_tight", "pointing", "mean_iou", "recall_of_known"),
        *("pointing_of_known", "false_boxes"),
    )
    show(
        ("canvas, windows", *(each.replace("_", " ") for each in shown)),
        [(what, *(f"{row[each]:.3f}" for each in shown)) for what, row in results.items()],
        title=f"top box at IoU {MIN_IOU}",
    )
    document = {
        "style": STYLE,
        "templates": TEMPLATES,
        "side_px": config.side_px,
        "shares": SHARES,
        "seed": config.seed,
        "defaults": {
            "scales": localization.SCALES,
            "aspect_ratios": localization.ASPECT_RATIOS,
            "stride": localization.STRIDE,
        },
        "results": results,
    }
    save("studies.locate", document, packages=("numpy", "onnxruntime", "openvino", "pillow"))


if __name__ == "__main__":
    with command():
        main(tyro.cli(LocateStudyConfig, prog=program(__spec__.name), description=__doc__))
