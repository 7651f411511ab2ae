"""An image with boxes drawn on it, each with its text and score."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clip_rt.localization import Detection

MAX_SIDE_PX = 1600
"""Longest side of the picture; a larger image is shown smaller."""
COLOURS = ("#cf222e", "#0969da", "#1a7f37", "#9a6700", "#8250df", "#bf3989")
"""Of the texts, in the order in which they come; after the last, the first again."""
FONT_PX = 16


def draw_boxes(image: Path, found: Iterable[Detection], path: Path) -> None:
    """Write an image with boxes on it, the best on top.

    Args:
        image: The file in which they were found.
        found: The best first.
        path: To write to; its suffix says the format.

    Raises:
        ImageError: the image cannot be used.
        OSError: the picture cannot be written.
    """
    from PIL import ImageDraw, ImageFont

    from clip_rt.inputs.transform import open_upright

    picture = open_upright(image)
    scale = min(1.0, MAX_SIDE_PX / max(picture.size))
    if scale < 1:
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        picture = picture.resize(size)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_PX)
    shown = list(found)
    texts = list(dict.fromkeys(each.text for each in shown))
    line_px = max(2, round(max(picture.size) / 300))
    for each in reversed(shown):
        colour = COLOURS[texts.index(each.text) % len(COLOURS)]
        left, top, right, bottom = (round(edge * scale) for edge in each.box)
        # Pillow draws a box's last row and column too.
        pen.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=line_px)
        words = " ".join(f"{each.text} {each.score:.0%}".split())
        width, height = pen.textlength(words, font) + 8, FONT_PX + 6
        # Above its box, or in it where there is no room.
        at = max(0, min(left, picture.width - round(width))), top - height if top >= height else top
        pen.rectangle((*at, at[0] + width, at[1] + height), fill=colour)
        pen.text((at[0] + 4, at[1] + 1), words, "white", font)
    picture.save(path)
