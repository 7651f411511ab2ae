"""`clip-rt locate`: where in an image something is, as boxes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from clip_rt.commands.connect import ModelOptions
from clip_rt.commands.exit_codes import SOME_BAD
from clip_rt.commands.output import OutputOptions
from clip_rt.commands.sheet import SUFFIXES
from clip_rt.errors import ImageError, InputError

if TYPE_CHECKING:
    from clip_rt.localization import Detection

NUM_DIGITS = 6
COLUMNS = ("text", "score", "similarity", "left", "top", "right", "bottom")


@dataclass(frozen=True, kw_only=True)
class LocateConfig:
    """In which image, what, and by which windows.

    Raises:
        InputError: an option cannot be used.
    """

    image: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IMAGE")]
    """A file."""
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT")]
    """What to look for; each text by itself."""
    templates: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A text with {} for what is looked for; may be repeated. Without it texts are as they are."""
    background: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A text for what else the image shows; may be repeated. Without it, some broad words."""
    threshold: float = 0.5
    """Least score of a box, from 0 to 1."""
    max_boxes: int = 10
    """Most boxes of each text."""
    max_iou: float = 0.2
    """Most that two boxes of a text overlap: intersection over union, from 0 to 1."""
    scales: tuple[float, ...] = (1.0, 0.7, 0.5, 0.35, 0.25)
    """Sides of a square window, as shares of the image's short side."""
    aspect_ratios: tuple[float, ...] = (1.0,)
    """Width by height of windows; 0.5 1 2 are for high and wide things too, three times as many."""
    stride: float = 0.25
    """From one window to the next, as a share of its side."""
    sheet: Path | None = None
    """A picture to write, the image with its boxes: .png, .jpg or .webp."""
    output: Annotated[OutputOptions, tyro.conf.arg(name="")]
    model: Annotated[ModelOptions, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        if not self.texts:
            raise InputError('name what to look for, such as "a red umbrella".')
        if self.sheet is not None:
            if self.sheet.suffix.lower() not in SUFFIXES:
                raise InputError(f"--sheet is {self.sheet}; it must end in {', '.join(SUFFIXES)}.")
            if not self.sheet.absolute().parent.is_dir():
                raise InputError(f"--sheet: there is no folder {self.sheet.parent}.")
        if not 0 <= self.threshold <= 1:
            raise InputError(f"--threshold is {self.threshold}; it must be from 0 to 1.")


def locate(config: Annotated[LocateConfig, tyro.conf.arg(name="")]) -> int:
    """Say where in an image something is, as boxes with scores.

    Returns:
        The exit code.

    Raises:
        ClipRTError: see `clip_rt.locate`.
        OSError: the answers cannot be written.
    """
    # Only here: help needs none of it.
    from clip_rt import localization
    from clip_rt.inputs.prompts import SLOT

    with config.model.connect() as client:
        try:
            found = localization.locate(
                client,
                config.image,
                config.texts,
                templates=config.templates or (SLOT,),
                background=config.background or None,
                scales=config.scales,
                aspect_ratios=config.aspect_ratios,
                stride=config.stride,
                # All, so that the best can be told where none is good enough.
                threshold=0.0,
                max_iou=config.max_iou,
                max_boxes=config.max_boxes,
            )
        except ImageError as error:
            sys.stderr.write(f"error: {error}\n")
            return SOME_BAD
    shown = [each for each in found if each.score >= config.threshold]
    if not shown:
        best = found[0]
        sys.stderr.write(
            f"warning: nothing has a score of {config.threshold} or more; the best is "
            f"{best.text!r} with {best.score:.4f}\n"
        )
    if config.sheet is not None:
        from clip_rt.commands.boxes import draw_boxes

        draw_boxes(config.image, shown, config.sheet)
    config.output.write(map(_make_row, shown), COLUMNS)
    return 0


def _make_row(found: Detection) -> dict[str, Any]:
    left, top, right, bottom = (round(each, 1) for each in found.box)
    return {
        "text": found.text,
        "score": round(found.score, NUM_DIGITS),
        "similarity": round(found.similarity, NUM_DIGITS),
        "left": left,
        "top": top,
        "right": right,
        "bottom": bottom,
    }
